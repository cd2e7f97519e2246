"""Counts instructions in the class loops of compiled kernels: the rows of benchmarks/results/compiled.csv.

    python -m tests.tools.compiled PATH...      # fastkd/_cuda.so, a .cubin, or a folder that was TRITON_CACHE_DIR

Kernels of any commit can be counted, compiled in a checkout of it:

    nvcc -std=c++17 -O3 -fmad=false -arch=sm_90 -cubin -o kd.cubin csrc/cuda/resized_kd.cu
    TRITON_CACHE_DIR=cache python -c "from tests.compilation import compile_case as c; c('resized-kd-150', 'sm_90')"
"""

from __future__ import annotations

import csv
import re
import subprocess
import sys
from pathlib import Path

from triton import knobs

from ..test_cuda_build import INSTRUCTION_NAME, class_loops

COLUMNS = (
    "language", "kernel", "registers", "spilled_bytes", "layout_conversions", "shared_accesses", "loop_exponentials",
    "loop_instructions", "loop_loads", "loop_shared_accesses",
)  # fmt: skip


def cuobjdump(*options: str) -> str:
    return subprocess.check_output([knobs.nvidia.cuobjdump.path, *options], text=True)


def short(symbol: str) -> str:
    """``ResizedTiles<Any, 1, true>`` from a mangled name; a Triton kernel's name as it is."""
    name = subprocess.check_output(["c++filt", symbol], text=True).strip().replace("fastkd::gpu::", "")
    kernel = re.fullmatch(r"void run<(.*?) ?>\(.*", name)
    return kernel[1] if kernel else name


def rows(binary: Path) -> list[tuple]:
    """A row for each class loop of each kernel in a file."""
    usage = cuobjdump("-res-usage", "-arch", "sm_90", str(binary))
    resources = {
        name: (int(registers), int(stack) + int(local))
        for name, registers, stack, local in re.findall(
            r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage
        )
    }
    layouts = binary.with_suffix(".ttgir")
    conversions = layouts.read_text().count("convert_layout") if layouts.exists() else ""
    out = []
    for part in cuobjdump("-sass", "-arch", "sm_90", str(binary)).split("Function : ")[1:]:
        name = part.split(None, 1)[0]
        shared = sum(i.startswith(("LDS", "STS")) for i in INSTRUCTION_NAME.findall(part))
        kernel = ("Triton" if layouts.exists() else "CUDA C++", short(name), *resources[name], conversions, shared)
        out += [(*kernel, loop.exponentials, loop.instructions, loop.loads, loop.shared) for loop in class_loops(part)]
    return out


def main() -> None:
    if len(sys.argv) == 1:
        sys.exit(__doc__)
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(COLUMNS)
    for path in map(Path, sys.argv[1:]):
        for binary in sorted(path.rglob("*.cubin")) if path.is_dir() else [path]:
            writer.writerows(rows(binary))


if __name__ == "__main__":
    main()

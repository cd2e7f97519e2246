"""Builds the CUDA kernels for an emulated GPU (csrc/cuda/emulation.h), as a library that runs them on CPU tensors.

If ``FASTKD_CUDA_EMULATION`` is set to its path, it replaces the real CUDA library. `make test` does so for the files
that ``tests/suites.py`` lists as emulated. ``python -m tests.emulation`` builds it and prints its path.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import torch
from torch.utils.cpp_extension import include_paths

ROOT = Path(__file__).parents[1]
RUNNING = "FASTKD_CUDA_EMULATION" in os.environ
FLAGS = (
    "-std=c++17", "-O2", "-march=native", "-ffp-contract=off", "-fPIC", "-shared", "-Wall", "-Wno-unknown-pragmas",
    "-DFASTKD_EMULATION", "-DTORCH_TARGET_VERSION=0x020a000000000000",
)  # fmt: skip

# The operators at the end of csrc/cuda/emulation.cpp: configuration of the GPU, and plans.
OPERATORS = (
    "configure(int shared_per_block, int shared_per_cores, int multiprocessors, int cluster, int smallest, "
    "int smallest_budget, str threads) -> ()",
    "row_units(Tensor like, int runs, int groups, int length, int vector) -> Tensor",
    "column_blocks(Tensor like, int outer, int rows, int inner, int vector) -> Tensor",
    "row_pieces(Tensor like, int runs, int groups, int length, int bytes) -> Tensor",
    "nfd_reads(Tensor student, Tensor teacher, str dims) -> Tensor",
    "kd_tiles(Tensor x) -> Tensor",
    "axis_cells(Tensor like, int size_in, int size_out, bool align_corners) -> Tensor",
    "cell_parts(Tensor student, Tensor teacher, int height, int width, bool align_corners) -> Tensor",
    "cells_plan(Tensor student, Tensor teacher, int height, int width, bool align_corners) -> Tensor",
)
library = torch.library.Library("fastkd_cuda_emulation", "DEF")
for schema in OPERATORS:
    library.define(schema)


def compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "c++"))


def build() -> Path:
    """Path of the library, compiled unless this source was compiled before."""
    sources = [*(ROOT / "csrc/cuda").glob("*.h"), *(ROOT / "csrc/cuda").glob("*.cpp"), ROOT / "csrc/checks.h"]
    digest = hashlib.blake2b(repr((FLAGS, torch.__version__)).encode(), digest_size=8)
    for path in sorted(sources):
        digest.update(path.read_bytes())
    out = ROOT / "build" / f"cuda-emulation-{digest.hexdigest()}.so"
    if not out.exists():
        out.parent.mkdir(exist_ok=True)
        fresh = out.with_suffix(f".{os.getpid()}")
        libraries = Path(torch.__file__).parent / "lib"
        command = [
            compiler(), *FLAGS, *(f"-I{path}" for path in include_paths()),
            *(str(ROOT / "csrc/cuda" / name) for name in ("registration.cpp", "emulation.cpp")),
            "-o", str(fresh), f"-L{libraries}", "-ltorch_cpu",
        ]  # fmt: skip
        run = subprocess.run(command, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        os.replace(fresh, out)
    return out


def run_program(source: Path, folder: Path, *flags: str) -> str:
    """Output of a program that includes the emulation."""
    program = folder / "program"
    includes = [f"-I{path}" for path in (*include_paths(), ROOT / "csrc/cuda")]
    command = [compiler(), "-std=c++17", "-DFASTKD_EMULATION", *flags, *includes, str(source), "-o", str(program)]
    compiled = subprocess.run(command, capture_output=True, text=True)
    assert compiled.returncode == 0, compiled.stderr
    run = subprocess.run([str(program)], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


if __name__ == "__main__":
    print(build())

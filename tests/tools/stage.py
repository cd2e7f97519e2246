"""A copy of the project in another folder with a separate C++ library, which the tools build, modify and run.

pytest and ``python -m`` run in that folder, so the copy takes precedence over an installed package.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch.utils.cpp_extension import include_paths

ROOT = Path(__file__).parents[2]
KERNELS = tuple(sorted(path.stem for path in (ROOT / "csrc" / "cpu").glob("*.cpp") if path.stem != "dispatch"))
FLAGS = ("-std=c++17", "-fPIC", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden", "-w")
ISA_FLAGS = {
    "baseline": (),
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
    "avx512": ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"),
}
# Stubs for the instruction sets that are not built.
OTHER = """namespace fastkd::{isa} {{
Kernels table() {{ throw std::runtime_error("{isa} is not in this build, which this processor does not have"); }}
}}
"""


def widest() -> str:
    """The widest instruction set of this processor; "baseline" if it is not x86."""
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    return "avx512" if "avx512vl" in flags else "avx2" if "avx2" in flags and "fma" in flags else "baseline"


def copy(to: Path) -> Path:
    """Copies the package, its sources and its tests, without build results."""
    if to.exists():
        shutil.rmtree(to)
    ignore = shutil.ignore_patterns("__pycache__", "*.so")
    for name in ("fastkd", "kernels", "csrc", "tests", "benchmarks"):
        shutil.copytree(ROOT / name, to / name, ignore=ignore, symlinks=True)
    for name in ("pyproject.toml", "setup.py", "Makefile"):
        shutil.copy(ROOT / name, to / name)
    if not (to / "fastkd" / "kernels").is_symlink():  # already a link if copied from a copy
        (to / "fastkd" / "kernels").symlink_to("../kernels")
    return to


def build(
    stage: Path, isa: str, flags: tuple[str, ...], units: tuple[str, ...] | None = None, link: bool = True
) -> None:
    """Compiles ``stage/csrc`` for one instruction set into ``stage/fastkd/_cpu.so``.

    Args:
        flags: for compiler and linker, e.g. ``("-O1", "-fsanitize=address")``.
        units: units to recompile (:data:`KERNELS`, "registration", "dispatch", "others"); None: all.
        link: whether to link the library, or only create ``stage/objects``.

    Raises:
        subprocess.CalledProcessError: it does not compile; ``stderr`` has the compiler's messages.
    """
    csrc, objects = stage / "csrc", stage / "objects"
    objects.mkdir(exist_ok=True)
    others = "".join(OTHER.format(isa=other) for other in ISA_FLAGS if other != isa)
    (objects / "others.cpp").write_text('#include <stdexcept>\n#include "kernels.h"\n' + others)
    compiler = os.environ.get("CXX", "g++")
    headers = [f"-I{path}" for path in include_paths()]
    sources = {
        "registration": (csrc / "registration.cpp", ("-DTORCH_TARGET_VERSION=0x020a000000000000", *headers)),
        "dispatch": (csrc / "cpu" / "dispatch.cpp", ()),
        "others": (objects / "others.cpp", (f"-I{csrc / 'cpu'}",)),
    }
    for name in KERNELS:
        sources[name] = (csrc / "cpu" / f"{name}.cpp", (f"-DFASTKD_ISA={isa}", *ISA_FLAGS[isa]))

    def compile_unit(name: str) -> None:
        source, extra = sources[name]
        run([compiler, *FLAGS, *flags, *extra, "-c", str(source), "-o", str(objects / f"{name}.o")])

    wanted = [name for name in sources if units is None or name in units]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile_unit, wanted))
    if not link:
        return
    libs = Path(torch.__file__).parent / "lib"
    linked = [str(objects / f"{name}.o") for name in sources]
    run([compiler, *flags, "-shared", *linked, "-o", str(stage / "fastkd" / "_cpu.so"), f"-L{libs}", "-ltorch_cpu"])


def keep(stage: Path) -> Path:
    """Saves the build, for :func:`restore`."""
    whole = stage / "whole"
    shutil.copytree(stage / "objects", whole)
    shutil.copy(stage / "fastkd" / "_cpu.so", whole)
    return whole


def restore(stage: Path, whole: Path) -> None:
    """Restores a saved build. The library gets a new file, because processes have mapped the old one."""
    for kept in whole.iterdir():
        to = stage / ("fastkd" if kept.suffix == ".so" else "objects") / kept.name
        to.unlink(missing_ok=True)
        shutil.copy2(kept, to)


def run(command: list[str], **options) -> subprocess.CompletedProcess:
    return subprocess.run(command, check=True, capture_output=True, text=True, **options)


def environment(isa: str, **extra: str) -> dict[str, str]:
    """Environment variables for a process in a stage."""
    return {**os.environ, "FASTKD_CPU_ISA": isa, "PYTHONDONTWRITEBYTECODE": "1", **extra}

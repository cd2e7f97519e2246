"""The CUDA kernels on an emulated GPU (csrc/cuda/emulation.h): builds the library that runs them on CPU tensors.

It stands in for the real one where ``FASTKD_CUDA_EMULATION`` names it, so tests that use it run in a process of their own.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from torch.utils.cpp_extension import include_paths

ROOT = Path(__file__).parents[1]
# What runs on it: how work is cut, and the operator tests of the losses that have a CUDA kernel.
SUITE = tuple(f"tests/test_{name}.py" for name in ("cuda_plan", "nfd", "kd", "resized", "resized_kernels", "rdd"))
RUNNING = "FASTKD_CUDA_EMULATION" in os.environ
FLAGS = (
    "-std=c++17", "-O2", "-march=native", "-ffp-contract=off", "-fPIC", "-shared", "-Wall", "-Wno-unknown-pragmas",
    "-DFASTKD_EMULATION", "-DTORCH_TARGET_VERSION=0x020a000000000000",
)  # fmt: skip


def compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "c++"))


def build() -> Path:
    """The library, compiled unless this source was before."""
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
    """What a program that includes the emulation prints."""
    program = folder / "program"
    includes = [f"-I{path}" for path in (*include_paths(), ROOT / "csrc/cuda")]
    command = [compiler(), "-std=c++17", "-DFASTKD_EMULATION", *flags, *includes, str(source), "-o", str(program)]
    compiled = subprocess.run(command, capture_output=True, text=True)
    assert compiled.returncode == 0, compiled.stderr
    run = subprocess.run([str(program)], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


def run_tests(*files: str) -> subprocess.CompletedProcess:
    """These files of tests in a process whose CUDA backend is the emulation."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow", *files]
    env = {**os.environ, "FASTKD_CUDA_EMULATION": str(build())}
    return subprocess.run(command, cwd=ROOT, env=env, text=True, capture_output=True)

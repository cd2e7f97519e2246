"""Builds the C++ extensions: fastkd/_cpu.so with the operators torch.ops.fastkd_cpu.*, and fastkd/_cuda.so with
torch.ops.fastkd_cuda.*. Everything else is in pyproject.toml.

The libraries use LibTorch's stable ABI and no Python, so one file works with every Python and every torch from 2.10 on.
The kernels in csrc/cpu are compiled once per instruction set and selected at run time. Those in csrc/cuda are compiled
if nvcc and a CUDA build of torch are present.

Environment variables:
    FASTKD_BUILD: 0 builds no libraries; 1 makes a failure an error; by default a failed library is left out with a
        message.
    FASTKD_CUDA: the same for the CUDA library.
    FASTKD_CUDA_ARCHS: CUDA architectures (default: all below).
    MAX_JOBS: maximum number of parallel compilers (default: one per core).
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

if int(setuptools.__version__.split(".")[0]) < 77:  # a fresh environment of Python 3.11 has 65
    sys.exit(f"fastkd is built with setuptools 77 or later, got {setuptools.__version__}: pip install 'setuptools>=77'")

from setuptools.command.bdist_wheel import bdist_wheel

CSRC = Path("csrc")
KERNELS = sorted(path.stem for path in (CSRC / "cpu").glob("*.cpp") if path.stem != "dispatch")
FLAGS = [
    "-std=c++17",
    "-O3",
    "-g0",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fvisibility=hidden",
    "-Wall",
    "-Wno-psabi",
    "-Wno-maybe-uninitialized",  # top_ and again_ are set and read only for recomputed pixels
]
JOBS = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
STABLE_ABI = "0x020a000000000000"  # torch 2.10
X86 = platform.machine().lower() in ("x86_64", "amd64")
ISAS = {"baseline": []}
if X86:
    ISAS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    ISAS["avx512"] = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"]


# Each gets its own machine code, which later chips of the same generation also run (86 and 89 that of 80). The last is
# also compiled to PTX, for later generations.
CUDA_ARCHS = os.environ.get("FASTKD_CUDA_ARCHS", "80 90 100").split()
# Multiply-adds are fused only where the source says so, so the emulation computes the same bits.
CUDA_FLAGS = ["-std=c++17", "-O3", "-fmad=false", "-Xcompiler", "-fPIC,-fvisibility=hidden"]


def torch_paths() -> tuple[list[str], str] | str:
    """Include directories and library directory of torch, or the reason why there are none."""
    if sys.platform == "win32":
        return "its vector types need GCC or Clang"
    try:
        import torch
        from torch.utils.cpp_extension import include_paths
    except ImportError:
        return "torch is not installed where the build runs (use pip install --no-build-isolation)"
    if tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2]) < (2, 10):
        return f"torch is {torch.__version__}, the stable ABI it uses needs 2.10"
    return include_paths(), str(Path(torch.__file__).parent / "lib")


def cuda_compiler() -> tuple[str, list[str]] | str:
    """nvcc and the architecture flags, or the reason why there are no CUDA kernels."""
    if os.environ.get("FASTKD_CUDA") == "0":
        return "FASTKD_CUDA=0"
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path=os.path.join(home, "bin"))
    if nvcc is None:
        return "nvcc is neither in PATH nor in CUDA_HOME"
    import torch

    if not torch.version.cuda:
        return f"torch {torch.__version__} is not a CUDA build"
    known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True).stdout.split()
    archs = [arch for arch in CUDA_ARCHS if f"compute_{arch}" in known]
    if not archs:
        return f"{nvcc} knows none of the architectures {', '.join(CUDA_ARCHS)}"
    flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    return nvcc, [*flags, f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}"]


class BuildExt(build_ext):
    """Compiles in parallel and links libraries without a Python tag."""

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", os.sep) + ".so"

    def build_extensions(self) -> None:
        for ext in list(self.extensions):
            try:
                self.build_extension(ext)
            except Exception as error:
                if os.environ.get("FASTKD_BUILD") == "1":
                    raise
                print(f"fastkd: installed without {ext.name}, which did not compile: {error}", file=sys.stderr)
                self.extensions.remove(ext)  # nothing to copy in place or to list

    def build_extension(self, ext: Extension) -> None:
        os.makedirs(os.path.dirname(self.get_ext_fullpath(ext.name)), exist_ok=True)
        if ext.name == "fastkd._cuda":
            self.build_cuda(ext)
        else:
            self.build_cpu(ext)

    def compile_all(
        self, units: list[tuple[str, Path, list[str]]], includes: list[str], depends: list[str]
    ) -> list[str]:
        def compile_unit(unit: tuple[str, Path, list[str]]) -> str:
            name, source, flags = unit
            # A separate directory each: the object file is named after the source.
            return self.compiler.compile(
                [str(source)],
                output_dir=os.path.join(self.build_temp, name),
                include_dirs=includes if "registration" in name else [],
                extra_postargs=[*FLAGS, *flags],
                depends=depends,
            )[0]

        with ThreadPoolExecutor(JOBS) as pool:
            return list(pool.map(compile_unit, units))

    def build_cpu(self, ext: Extension) -> None:
        """The kernels once per instruction set."""
        includes, libs = PATHS
        units = [
            ("registration", CSRC / "registration.cpp", ["-DTORCH_TARGET_VERSION=" + STABLE_ABI]),
            ("dispatch", CSRC / "cpu" / "dispatch.cpp", []),
        ]
        for isa, flags in ISAS.items():
            units += [
                (f"{isa}_{name}", CSRC / "cpu" / f"{name}.cpp", [f"-DFASTKD_ISA={isa}", *flags]) for name in KERNELS
            ]
        objects = self.compile_all(units, includes, ext.depends)
        self.compiler.link_shared_object(
            objects, self.get_ext_fullpath(ext.name), libraries=["torch_cpu"], library_dirs=[libs], target_lang="c++"
        )

    def build_cuda(self, ext: Extension) -> None:
        """The kernels for each architecture, with the CUDA runtime linked statically, independent of torch's."""
        includes, libs = PATHS
        nvcc, archs = CUDA
        folder = Path(self.build_temp) / "cuda"
        folder.mkdir(parents=True, exist_ok=True)
        sources = sorted((CSRC / "cuda").glob("*.cu"))
        objects = [str(folder / f"{source.stem}.o") for source in sources]

        def compile_kernels(source: Path, target: str) -> None:
            self.spawn([nvcc, *CUDA_FLAGS, *archs, "--threads", str(JOBS), "-c", str(source), "-o", target])

        with ThreadPoolExecutor(JOBS) as pool:
            list(pool.map(compile_kernels, sources, objects))
        unit = ("cuda_registration", CSRC / "cuda" / "registration.cpp", ["-DTORCH_TARGET_VERSION=" + STABLE_ABI])
        objects += self.compile_all([unit], includes, ext.depends)
        out = self.get_ext_fullpath(ext.name)
        self.spawn([nvcc, *archs, "-shared", "-o", out, *objects, f"-L{libs}", "-ltorch_cpu", "-ltorch_cuda"])


class BdistWheel(bdist_wheel):
    """Tags the wheel for any Python on this platform, since the libraries do not use Python."""

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2])


PATHS = "FASTKD_BUILD=0" if os.environ.get("FASTKD_BUILD") == "0" else torch_paths()
if isinstance(PATHS, str):
    if "1" in (os.environ.get("FASTKD_BUILD"), os.environ.get("FASTKD_CUDA")):
        sys.exit(f"fastkd: cannot build the C++ kernels: {PATHS}")
    print(f"fastkd: installing without the C++ and CUDA kernels: {PATHS}", file=sys.stderr)
    setup()
else:
    headers = [str(path) for path in CSRC.rglob("*.h")]
    sources = [str(path) for folder in (CSRC, CSRC / "cpu") for path in folder.glob("*.cpp")]
    extensions = [Extension("fastkd._cpu", sources, depends=headers)]
    CUDA = cuda_compiler()
    if isinstance(CUDA, str):
        if os.environ.get("FASTKD_CUDA") == "1":
            sys.exit(f"fastkd: cannot build the CUDA kernels: {CUDA}")
        print(f"fastkd: installing without the CUDA kernels: {CUDA}", file=sys.stderr)
    else:
        cuda_sources = [str(path) for path in sorted((CSRC / "cuda").glob("*.cu"))]
        extensions.append(
            Extension("fastkd._cuda", [*cuda_sources, str(CSRC / "cuda" / "registration.cpp")], depends=headers)
        )
    setup(ext_modules=extensions, cmdclass={"build_ext": BuildExt, "bdist_wheel": BdistWheel})

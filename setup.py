"""The C++ part of the build: fastkd/_cpu.so, the operators torch.ops.fastkd_cpu.*. Everything else is in pyproject.toml.

The library uses LibTorch's stable ABI and no Python, so one file serves every Python and every torch from 2.10 on.
FASTKD_BUILD=0 leaves it out; FASTKD_BUILD=1 makes it an error that it cannot be built; otherwise a package without it
is built, and says so. The kernels in csrc/cpu are compiled once per instruction set and chosen when the library runs.
"""

from __future__ import annotations

import os
import platform
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # setuptools < 70.1
    from wheel.bdist_wheel import bdist_wheel

CSRC = Path("csrc")
KERNELS = ["nfd", "kd", "cwd", "resized_cross_entropy", "resized_kd", "rdd", "exp"]
FLAGS = [
    "-std=c++17",
    "-O3",
    "-g0",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fvisibility=hidden",
    "-Wall",
    "-Wno-psabi",
]
STABLE_ABI = "0x020a000000000000"  # torch 2.10
X86 = platform.machine().lower() in ("x86_64", "amd64")
ISAS = {"baseline": []}
if X86:
    ISAS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    ISAS["avx512"] = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"]


def torch_paths() -> tuple[list[str], str] | str:
    """Include directories and library directory of torch, or why there are none."""
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


class BuildExt(build_ext):
    """Compiles the kernels once per instruction set, in parallel, and links one library without a Python tag."""

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", os.sep) + ".so"

    def run(self) -> None:
        try:
            super().run()
        except Exception as error:
            if os.environ.get("FASTKD_BUILD") == "1":
                raise
            print(f"fastkd: installed without the C++ kernels, because they did not compile: {error}", file=sys.stderr)
            self.extensions = []  # no file to copy in place, none to list

    def build_extension(self, ext: Extension) -> None:
        includes, libs = PATHS
        units = [
            ("registration", CSRC / "registration.cpp", ["-DTORCH_TARGET_VERSION=" + STABLE_ABI]),
            ("dispatch", CSRC / "cpu" / "dispatch.cpp", []),
        ]
        for isa, flags in ISAS.items():
            units += [
                (f"{isa}_{name}", CSRC / "cpu" / f"{name}.cpp", [f"-DFASTKD_ISA={isa}", *flags]) for name in KERNELS
            ]

        def compile_unit(unit: tuple[str, Path, list[str]]) -> str:
            name, source, flags = unit
            # A directory of its own each: the object file is named after the source.
            return self.compiler.compile(
                [str(source)],
                output_dir=os.path.join(self.build_temp, name),
                include_dirs=includes if name == "registration" else [],
                extra_postargs=[*FLAGS, *flags],
                depends=ext.depends,
            )[0]

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compile_unit, units))
        self.compiler.link_shared_object(
            objects, self.get_ext_fullpath(ext.name), libraries=["torch_cpu"], library_dirs=[libs], target_lang="c++"
        )


class BdistWheel(bdist_wheel):
    """Tags the wheel for any Python on this platform: the library does not touch Python."""

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2])


PATHS = "FASTKD_BUILD=0" if os.environ.get("FASTKD_BUILD") == "0" else torch_paths()
if isinstance(PATHS, str):
    if os.environ.get("FASTKD_BUILD") == "1":
        sys.exit(f"fastkd: cannot build the C++ kernels: {PATHS}")
    print(f"fastkd: installing without the C++ kernels: {PATHS}", file=sys.stderr)
    setup()
else:
    headers = [str(path) for path in CSRC.rglob("*.h")]
    sources = [str(path) for path in CSRC.rglob("*.cpp")]
    setup(
        ext_modules=[Extension("fastkd._cpu", sources, depends=headers)],
        cmdclass={"build_ext": BuildExt, "bdist_wheel": BdistWheel},
    )

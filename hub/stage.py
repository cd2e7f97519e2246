"""Lays this repository out as two projects for the Kernel Hub's builder, `fastkd` and `fastkd-triton`.

    python hub/stage.py build/hub
    cd build/hub/fastkd && kernel-builder check-config && kernel-builder build

The Hub loads several versions of a kernel into one process. So each build has its own operator namespace, named by the
builder (`_ops.py`), and its Python uses only relative imports of itself. `hub/*/build.toml` lists what is built.
"""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# The builder compiles each file once, with the same flags for every architecture, so pragmas select the instruction
# set. GCC 12 does not define its macros (__AVX2__) then, so the vector width in bits replaces them. setup.py has the
# same sets as flags.
ISAS = {
    "baseline": (0, None),
    "avx2": (256, "avx2,fma,f16c"),
    "avx512": (512, "avx512f,avx512bw,avx512dq,avx512vl,fma,f16c"),
}
WIDTHS = {"defined(__AVX512F__)": "FASTKD_VECTOR == 512", "defined(__AVX2__)": "FASTKD_VECTOR >= 256"}
WIDTHS["defined(__F16C__)"] = WIDTHS["defined(__AVX2__)"]

NAMESPACE = '''"""The names of what this build brings; the builder writes _ops.py."""

from ._ops import add_op_namespace_prefix

_NAME = add_op_namespace_prefix("").removesuffix("::")
KERNELS = f"{__package__}.kernels"
'''
COMPILED = f"""{NAMESPACE}
# Compiled operators are the build's own; those of Triton, which have the same names, are beside them.
_BACKEND = _NAME.removeprefix("_fastkd_").partition("_")[0]
NAMESPACES = {{"cpu": _NAME, "cuda": _NAME, "triton": f"{{_NAME}}_triton"}}
LIBRARIES = {{backend: f"{{_NAME}}.abi3.so" if backend == _BACKEND else "not built" for backend in ("cpu", "cuda")}}
"""
TRITON_ALONE = f"""{NAMESPACE}
NAMESPACES = {{"cpu": f"{{_NAME}}_cpu", "cuda": f"{{_NAME}}_cuda", "triton": _NAME}}
LIBRARIES = {{"cpu": "not built", "cuda": "not built"}}
"""
BINDING = """#include "registration.h"

#define FASTKD_LIBRARY_IMPL(key, m) STABLE_TORCH_LIBRARY_IMPL_EXPAND(TORCH_EXTENSION_NAME, key, m)
#if defined(CPU_KERNEL)
#include "cpu_operators.h"
#elif defined(CUDA_KERNEL)
#include "cuda_operators.h"
#endif

REGISTER_EXTENSION(TORCH_EXTENSION_NAME)
"""


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def python(package: Path, namespace: str) -> None:
    """The losses, their operators and Triton kernels, without trainer and commands."""
    for folder, inside in (
        ("fastkd", ""),
        ("fastkd/ops", "ops"),
        ("kernels", "kernels"),
        ("kernels/resize", "kernels/resize"),
    ):
        for path in (ROOT / folder).glob("*.py"):
            if path.stem not in ("cli", "ranges"):
                text = path.read_text().replace("from fastkd.ops import", "from ..ops import")
                write(package / inside / path.name, text)
    write(package / "_namespace.py", namespace)
    for path in package.rglob("*.py"):
        if absolute := re.findall(r"^\s*(?:from|import) fastkd\b.*", path.read_text(), re.MULTILINE):
            sys.exit(f"{path}: imports itself by an absolute name: {absolute[0].strip()}")


def cpp(project: Path) -> None:
    """Files that are included but not compiled are renamed to headers: the builder compiles every other listed file."""
    for path in (ROOT / "csrc").rglob("*.h"):
        text = path.read_text()
        for macro, width in WIDTHS.items():
            text = text.replace(macro, width)
        if unknown := re.findall(r"__(?:AVX|F16C|FMA|SSE)\w*__", text):
            sys.exit(f"{path.relative_to(ROOT)}: no width takes the place of {unknown[0]}")
        write(project / path.relative_to(ROOT), text)
    for path in (ROOT / "csrc" / "cuda").glob("*.cu"):
        write(project / path.relative_to(ROOT), path.read_text())
    for path in (ROOT / "csrc" / "cpu").glob("*.cpp"):
        if path.stem == "dispatch":
            write(project / path.relative_to(ROOT), path.read_text())
            continue
        write(project / "csrc" / "cpu" / f"{path.stem}.cpp.h", path.read_text())
        for isa, (width, target) in ISAS.items():
            lines = [
                f"#define FASTKD_ISA {isa}",
                f"#define FASTKD_VECTOR {width}",
                f'#include "../csrc/cpu/{path.stem}.cpp.h"',
            ]
            if target:
                lines = ["#if defined(__x86_64__)", f'#pragma GCC target("{target}")', *lines, "#endif"]
            write(project / f"cpu_{isa}" / path.name, "\n".join(lines) + "\n")
    binding = project / "torch-ext"
    write(binding / "torch_binding.cpp", BINDING)
    for backend, path in {"cpu": Path("csrc"), "cuda": Path("csrc/cuda")}.items():
        text = (ROOT / path / "registration.cpp").read_text()
        # In torch-ext the file includes the headers of its former folder by their path from csrc.
        text = text.replace('#include "../checks.h"', '#include "checks.h"')
        text = text.replace('#include "kernels.h"', f'#include "{backend}/kernels.h"')
        write(binding / f"{backend}_operators.h", text)


def expand(project: Path, text: str) -> str:
    """Expands the patterns of build.toml to lists of files."""

    def files(pattern: re.Match[str]) -> str:
        found = sorted(str(path.relative_to(project)) for path in project.glob(pattern[1]))
        if not found:
            sys.exit(f"{project.name}/build.toml: no file matches {pattern[1]}")
        return ", ".join(f'"{name}"' for name in found)

    return re.sub(r'"([^"\n]*\*[^"\n]*)"', files, text)


def stage(folder: Path) -> list[Path]:
    """Writes both projects."""
    projects = []
    for source in sorted(path.parent for path in (ROOT / "hub").glob("*/build.toml")):
        project = folder / source.name
        shutil.rmtree(project, ignore_errors=True)
        package = project / "torch-ext" / source.name.replace("-", "_")
        text = (source / "build.toml").read_text()
        if "[torch-noarch]" in text:
            python(package, TRITON_ALONE)
        else:
            python(package, COMPILED)
            cpp(project)
        write(project / "build.toml", expand(project, text))
        for shared in (ROOT / "hub" / "flake.nix", ROOT / "LICENSE"):
            write(project / shared.name, shared.read_text())
        projects.append(project)
    return projects


if __name__ == "__main__":
    print(*stage(Path(sys.argv[1])), sep="\n")

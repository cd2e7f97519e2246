"""The projects that hub/stage.py creates for the Kernel Hub's builder: their layout, and two builds in one process.

The builder itself runs under Nix and is not used here. The tests write the files that it generates (`_ops.py`,
`registration.h`) and compile its list of files with its definitions.
"""

import ast
import os
import re
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
# Keys allowed in a build.toml of edition 5, by section.
KEYS = {
    "general": {"name", "version", "edition", "license", "backends"},
    "torch": {"stable-abi", "include", "src", "cxx-flags", "pyext", "minver", "maxver"},
    "torch-noarch": {"pyext", "cuda_capabilities", "rocm_archs"},
    "cpu": {"backend", "depends", "src", "include", "cxx-flags"},
    "cuda": {
        "backend", "depends", "src", "include", "cxx-flags", "cuda-capabilities", "cuda-flags", "cuda-minver",
    },
}  # fmt: skip
OPS = """import torch
ops = torch.ops.{name}

def add_op_namespace_prefix(op_name):
    return f"{name}::{{op_name}}"
"""
REGISTRATION = """#pragma once
#include <Python.h>
#include <torch/csrc/stable/library.h>
#define FASTKD_JOIN(a, b) a##b
#define FASTKD_JOINED(a, b) FASTKD_JOIN(a, b)
#define FASTKD_TEXT(a) #a
#define FASTKD_AS_TEXT(a) FASTKD_TEXT(a)
#define STABLE_TORCH_LIBRARY_IMPL_EXPAND(ns, key, m) STABLE_TORCH_LIBRARY_IMPL(ns, key, m)
#define REGISTER_EXTENSION(name)                                                                 \\
    PyMODINIT_FUNC FASTKD_JOINED(PyInit_, name)() {                                              \\
        static PyModuleDef module = {PyModuleDef_HEAD_INIT, FASTKD_AS_TEXT(name), nullptr, -1}; \\
        return PyModule_Create(&module);                                                         \\
    }
"""
# Loads each folder as the package `kernels` does, under a separate name, and compares its losses with its reference.
USE = """
import importlib.util, sys
import torch
backend, *folders = sys.argv[1:]
for i, folder in enumerate(folders):
    spec = importlib.util.spec_from_file_location(f"hub_{i}", folder + "/__init__.py")
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    g = torch.Generator().manual_seed(0)
    logits, teacher = (torch.randn(1, 5, 4, 6, generator=g, requires_grad=k == 0) for k in range(2))
    labels = torch.randint(0, 5, (1, 9, 13), generator=g)
    def losses():
        return torch.stack([
            module.nfd_loss(logits, teacher), module.kd_loss(logits, teacher), module.cwd_loss(logits, teacher),
            module.resized_cross_entropy(logits, labels),
        ])
    with module.use_backend("reference"):
        expected = losses()
        (slope,) = torch.autograd.grad(expected.sum(), logits)
    with module.use_backend(backend):
        got = losses()
        (gradient,) = torch.autograd.grad(got.sum(), logits)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(gradient, slope)
    print(module.backends.NAMESPACES[backend], module.backend_info()["backends"][backend]["detail"], sep=": ")
assert "fastkd" not in sys.modules
"""


@pytest.fixture(scope="module")
def projects(tmp_path_factory):
    out = tmp_path_factory.mktemp("hub")
    listed = subprocess.check_output([sys.executable, str(ROOT / "hub" / "stage.py"), str(out)], text=True)
    assert [Path(line).name for line in listed.split()] == ["fastkd", "fastkd-triton"]
    return out


def use(backend: str, *folders: Path, **env: str) -> list[str]:
    command = [sys.executable, "-c", USE, backend, *map(str, folders)]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, **env}, cwd=folders[0], check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def build(project: Path, name: str, out: Path) -> Path:
    """The Python files of a build whose operator namespace is ``name``."""
    (package,) = (path for path in (project / "torch-ext").iterdir() if path.is_dir())
    for path in package.rglob("*.py"):
        copy = out / path.relative_to(package)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(path.read_text())
    (out / "_ops.py").write_text(OPS.format(name=name))
    return out


def settings(project: Path) -> dict:
    tomllib = pytest.importorskip("tomllib", reason="tomllib came with Python 3.11")
    return tomllib.loads((project / "build.toml").read_text())


@pytest.mark.parametrize("name", ["fastkd", "fastkd-triton"])
def test_build_toml(projects, name):
    project = projects / name
    config = settings(project)
    kernels = config.pop("kernel", {})
    sections = {**config, **{kernel["backend"]: kernel for kernel in kernels.values()}}
    for section, values in sections.items():
        assert set(values) <= KEYS[section], section
    assert config["general"]["edition"] == 5
    assert re.fullmatch("[a-z][-a-z0-9]*[a-z0-9]", name)
    assert config["general"]["name"] == name
    if not kernels:
        assert "torch-noarch" in config
        return
    assert {kernel["backend"] for kernel in kernels.values()} == set(config["general"]["backends"])
    listed = {file for values in sections.values() for file in values.get("src", ())}
    there = {str(path.relative_to(project)) for end in ("cpp", "cu", "h") for path in project.rglob(f"*.{end}")}
    assert listed == there  # the builder ignores unlisted files


@pytest.mark.parametrize("name", ["fastkd", "fastkd-triton"])
def test_imports_torch_triton_and_itself_alone(projects, name):
    for path in (projects / name).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            for imported in names:
                top = imported.partition(".")[0]
                assert top in ("torch", "triton") or top in sys.stdlib_module_names, (path, imported)


@pytest.mark.promise("hub")
def test_two_triton_builds_in_one_process(projects, tmp_path):
    pytest.importorskip("triton", reason="Triton has no wheel for this platform")
    names = ["_fastkd_triton_cuda_1a2b3c4", "_fastkd_triton_cuda_5d6e7f8"]
    folders = [build(projects / "fastkd-triton", name, tmp_path / name) for name in names]
    used = use("triton", *folders, TRITON_INTERPRET="1")
    assert [line.partition(": ")[0] for line in used] == names


@pytest.mark.promise("hub")
@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="GCC or Clang")
def test_two_compiled_builds_in_one_process(projects, tmp_path):
    """The CPU part of `fastkd`, compiled from the builder's file list into one library for each of two names."""
    from torch.utils.cpp_extension import include_paths

    project = projects / "fastkd"
    config = settings(project)
    (project / "torch-ext" / "registration.h").write_text(REGISTRATION)
    common = ["g++", "-std=c++17", "-fPIC", "-DCPU_KERNEL", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    includes = [f"-I{path}" for path in (*include_paths(), sysconfig.get_paths()["include"])]

    def compile_kernel(source: str) -> str:
        out = tmp_path / (source.replace("/", "_") + ".o")
        flags = config["kernel"]["cpu"]["cxx-flags"]
        subprocess.run([*common, *flags, "-c", str(project / source), "-o", str(out)], check=True)
        return str(out)

    def compile_build(name: str) -> Path:
        folder = build(project, name, tmp_path / name)
        own = [f"-I{project / path}" for path in config["torch"]["include"]]
        source = project / "torch-ext" / "torch_binding.cpp"
        flags = [*config["torch"]["cxx-flags"], f"-DTORCH_EXTENSION_NAME={name}", *own, *includes]
        libraries = [f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch_cpu"]
        out = str(folder / f"{name}.abi3.so")
        subprocess.run([*common, *flags, "-shared", str(source), *objects, *libraries, "-o", out], check=True)
        ops = folder / "_ops.py"
        ops.write_text(f"from . import {name}\n" + ops.read_text())
        return folder

    sources = [source for source in config["kernel"]["cpu"]["src"] if source.endswith(".cpp")]
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", "2"))) as pool:
        objects = list(pool.map(compile_kernel, sources))
        names = ["_fastkd_cpu_1a2b3c4", "_fastkd_cpu_5d6e7f8_dirty"]
        folders = list(pool.map(compile_build, names))
    here = torch.backends.cpu.get_cpu_capability()
    isas = ["baseline", *(["avx2"] if "AVX" in here else []), *(["avx512"] if here == "AVX512" else [])]
    assert use("cpu", *folders) == [f"{name}: C++, {isas[-1]}, {torch.get_num_threads()} threads" for name in names]
    for isa in isas:
        (used,) = use("cpu", folders[0], FASTKD_CPU_ISA=isa)
        assert f" {isa}," in used

"""The package builds with and without a compiler, contains the right files, and requires only what it declares.
Slow: each build takes a minute."""

import os
import platform
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import fastkd

from . import suites
from .tools.environment import clean

ROOT = Path(__file__).parents[1]
LIBRARY = Path(fastkd.__file__).with_name("_cpu.so")
# The symbols that torch keeps stable: C functions of its stable headers (torch/csrc/stable/c, inductor/aoti_torch/c).
STABLE = re.compile(r"^(aoti_torch|torch)_[a-z0-9_]+$")
SYSTEM = re.compile(r"@(GLIBC|GLIBCXX|CXXABI|GCC)_[0-9.]+$|^_ITM_\w+$|^__gmon_start__$")

needs_library = pytest.mark.skipif(not LIBRARY.exists(), reason="the C++ library is not built (pip install -e .)")


def needs(program: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(shutil.which(program) is None, reason=f"needs {program} (binutils)")


@pytest.mark.promise("stable-abi")
@needs_library
@needs("nm")
def test_library_uses_stable_symbols_alone():
    """No C++ symbols of torch and none of Python, so that one file works with every Python and torch from 2.10 on."""
    lines = subprocess.check_output(["nm", "-D", "--undefined-only", str(LIBRARY)], text=True).splitlines()
    names = [line.split()[-1] for line in lines]
    used = [name for name in names if STABLE.match(name)]
    assert "torch_library_impl" in used
    assert [name for name in names if not STABLE.match(name) and not SYSTEM.search(name)] == []
    needed = subprocess.check_output(["readelf", "-d", str(LIBRARY)], text=True)
    linked = set(re.findall(r"NEEDED.*\[(.*)\]", needed))
    assert linked <= {
        "libtorch_cpu.so",
        "libstdc++.so.6",
        "libm.so.6",
        "libgcc_s.so.1",
        "libc.so.6",
        "ld-linux-x86-64.so.2",
    }


@pytest.mark.promise("wide-instructions")
@needs_library
@needs("objdump")
@pytest.mark.skipif(platform.machine() != "x86_64", reason="registers of x86")
def test_wide_instructions_stay_in_their_namespace():
    """AVX instructions outside the functions selected at run time (e.g. in an inline function that the linker
    shares) would crash an older processor."""
    code = subprocess.check_output(["objdump", "-d", "--no-show-raw-insn", str(LIBRARY)], text=True)
    functions = re.split(r"\n\n[0-9a-f]+ <", code)
    wide = {f.partition(">")[0] for f in functions[1:] if re.search(r"%[yz]mm", f)}
    assert any("avx512" in name for name in wide)
    assert [name for name in wide if "avx2" not in name and "avx512" not in name] == []


USE = """
import sys, warnings
sys.path.insert(0, sys.argv[1])
import torch, fastkd
assert fastkd.__file__.startswith(sys.argv[1]), fastkd.__file__
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        student = torch.randn(1, 3, 4, 4, requires_grad=True)
        fastkd.kd_loss(student, torch.randn(1, 3, 4, 4)).backward()
print(fastkd.backend_info()["operators"]["kd"]["cpu"], [str(w.message) for w in caught if "fastkd" in str(w.message)])
"""


def sources(folder: str, inside: str, *suffixes: str) -> set[str]:
    """Files of a folder in git, by their name in the package."""
    listed = subprocess.check_output(["git", "ls-files", folder], cwd=ROOT, text=True).split()
    found = {inside + name.removeprefix(folder) for name in listed if name.endswith(suffixes or "")}
    assert found
    return found


def build(out: Path, *options: str, **env: str) -> zipfile.ZipFile:
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", *options, "-w", str(out), str(ROOT)],
        check=True,
        capture_output=True,
        env={**os.environ, **env},
    )
    (wheel,) = out.glob("*.whl")
    return zipfile.ZipFile(wheel)


def use(wheel: zipfile.ZipFile, folder: Path) -> str:
    wheel.extractall(folder)
    out = subprocess.run(
        [sys.executable, "-c", USE, str(folder)], capture_output=True, text=True, cwd=folder, check=False
    )
    assert out.returncode == 0, out.stderr
    return out.stdout


@pytest.mark.promise("pure-python")
@pytest.mark.slow
def test_wheel_without_torch_at_build_time(tmp_path):
    """Build isolation: no torch, so no C++; the package works and warns once about the missing library."""
    wheel = build(tmp_path, FASTKD_BUILD="")
    assert wheel.filename.endswith("-py3-none-any.whl")
    assert not [name for name in wheel.namelist() if name.endswith(".so")]
    said = use(wheel, tmp_path / "installed")
    assert said.startswith("reference ")
    assert said.count("the C++ kernels were not built") == 1


@pytest.mark.promise("wheel")
@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="manylinux")
@needs("make")
def test_make_wheel(tmp_path):
    """The source archive; from it a pure wheel, and one for every Python and torch, each with all files of the
    package."""
    here = Path(sys.executable).parent
    command = [
        "make",
        "-o",
        ".venv/.built",
        "wheel",
        f"BIN={here}",
        f"DIST={tmp_path}",
    ]  # uses the present environment
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT, env={**os.environ, "FASTKD_CUDA": "0"})
    archive, pure, wheel = sorted(
        tmp_path.iterdir(), key=lambda path: (path.suffix == ".whl", "manylinux" in path.name)
    )
    assert archive.name == f"fastkd-{fastkd.__version__}.tar.gz"
    assert pure.name == f"fastkd-{fastkd.__version__}-py3-none-any.whl"
    assert re.fullmatch(
        rf"fastkd-{fastkd.__version__}-py3-none-manylinux_[\d_]+_{platform.machine()}.*\.whl", wheel.name
    )
    files = {"fastkd/_cpu.so", *sources("fastkd", "fastkd"), *sources("kernels", "fastkd/kernels")}
    files |= sources("benchmarks", "fastkd/benchmarks", ".py")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert files <= names
    assert not [name for name in names if name.startswith(("tests", "benchmarks", "csrc", "fastkd.libs"))]
    assert files - {"fastkd/_cpu.so"} <= set(zipfile.ZipFile(pure).namelist())
    assert use(zipfile.ZipFile(wheel), tmp_path / "installed").strip() == "cpu []"


@pytest.mark.promise("sdist")
@pytest.mark.slow
def test_from_source_archive_to_tests_with_torch_alone(tmp_path):
    """The archive contains everything to build a wheel. In an environment with only torch and the test requirements,
    the wheel passes the core tests."""
    code = "import setuptools.build_meta as b, sys; print(b.build_sdist(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, capture_output=True, cwd=ROOT)
    (archive,) = tmp_path.glob("*.tar.gz")
    listing = subprocess.check_output(["tar", "tzf", str(archive)], text=True)
    for needed in {"LICENSE", "setup.py", *sources("csrc", "csrc"), *sources("kernels", "kernels")}:
        assert f"/{needed}\n" in listing, needed
    python = clean(tmp_path / "builder", ("torch", "setuptools", "ninja", "numpy"))
    subprocess.run(
        [python, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), str(archive)],
        check=True,
        env={**os.environ, "FASTKD_BUILD": "1", "FASTKD_CUDA": "0"},  # nvcc would take a quarter of an hour
    )
    (wheel,) = tmp_path.glob("*.whl")
    python = clean(tmp_path / "user", ("torch", "pytest", "hypothesis", "expecttest"))
    subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", str(wheel)], check=True)
    tests = tmp_path / "elsewhere" / "tests"
    shutil.copytree(ROOT / "tests", tests, ignore=shutil.ignore_patterns("train", "__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tests.parent)
    done = subprocess.run(
        [python, "-m", "pytest", "-q", "-m", "not slow", *suites.files("core")],
        cwd=tests.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]


def first(pattern: str, name: str) -> str:
    found = re.search(pattern, (ROOT / name).read_text(), re.MULTILINE)
    assert found, f"{name} has no {pattern}"
    return found[1]


def test_files_name_the_same_version():
    assert first(r"^version: (.+)$", "CITATION.cff") == fastkd.__version__
    assert first(r"^## (\S+) \(", "CHANGELOG.md") == fastkd.__version__


@pytest.mark.parametrize("tool", ["ruff", "mypy"])
def test_a_linter_has_one_version(tool):
    """`make lint` takes its version from the constraints; commits and CI take it from pre-commit."""
    pinned = {first(rf"^{tool}==(.+)$", name) for name in ("constraints.txt", "constraints-oldest.txt")}
    hooks = set(re.findall(rf"\[{tool}==(.+)\]", (ROOT / ".pre-commit-config.yaml").read_text()))
    assert pinned == hooks
    assert len(pinned) == 1


def test_workflows_call_targets_that_exist():
    targets = set(re.findall(r"^([\w -]+):(?!=)", (ROOT / "Makefile").read_text(), re.MULTILINE))
    targets = {target for line in targets for target in line.split()}
    for path in (ROOT / ".github" / "workflows").glob("*.yml"):
        assert set(re.findall(r"\bmake ([a-z-]+) ", path.read_text())) <= targets, path.name


def test_an_old_setuptools_says_what_to_install(tmp_path):
    stub = tmp_path / "setuptools"
    (stub / "command").mkdir(parents=True)
    (stub / "__init__.py").write_text("__version__ = '65.5.0'\nExtension = setup = None\n")
    (stub / "command" / "__init__.py").touch()
    (stub / "command" / "build_ext.py").write_text("build_ext = object\n")
    command, env = [sys.executable, "setup.py", "--version"], {**os.environ, "PYTHONPATH": str(tmp_path)}
    out = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert out.returncode == 1
    assert "got 65.5.0: pip install 'setuptools>=77'" in out.stderr

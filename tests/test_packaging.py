"""The package builds with and without a compiler, and holds what it should. Slow: each build takes a minute."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

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


@pytest.mark.slow
def test_wheel_without_torch_at_build_time(tmp_path):
    """Build isolation: no torch, so no C++; the package works and says once what it lacks."""
    wheel = build(tmp_path, FASTKD_BUILD="")
    assert wheel.filename.endswith("-py3-none-any.whl")
    assert not [name for name in wheel.namelist() if name.endswith(".so")]
    said = use(wheel, tmp_path / "installed")
    assert said.startswith("reference ")
    assert said.count("the C++ kernels were not built") == 1


@pytest.mark.slow
def test_wheel_with_kernels(tmp_path):
    """One library for every Python of the platform, and every file the package needs."""
    wheel = build(tmp_path, "--no-build-isolation", FASTKD_BUILD="1")
    assert "-py3-none-linux" in wheel.filename
    names = set(wheel.namelist())
    for needed in (
        "fastkd/_cpu.so",
        "fastkd/py.typed",
        "fastkd/kernels/nfd.py",
        "fastkd/train/demo.yaml",
        "fastkd/train/recipes/camvid-lite0-student.yaml",
        "fastkd/train/data/street_scenes.py",
        "fastkd/train/data/classes/ade20k.txt",
    ):
        assert needed in names
    assert not [name for name in names if name.startswith(("tests", "benchmarks", "csrc"))]
    assert use(wheel, tmp_path / "installed").strip() == "cpu []"


@pytest.mark.slow
def test_sdist_holds_the_sources(tmp_path):
    code = "import setuptools.build_meta as b, sys; print(b.build_sdist(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, capture_output=True, cwd=ROOT)
    (archive,) = tmp_path.glob("*.tar.gz")
    listing = subprocess.check_output(["tar", "tzf", str(archive)], text=True)
    for needed in ("csrc/registration.cpp", "csrc/cpu/vec.h", "kernels/nfd.py", "LICENSE", "setup.py"):
        assert f"/{needed}\n" in listing

"""Every C++ kernel on small inputs under the sanitizers. ``python -m tests.tools.sanitize`` runs all operator tests
under them."""

import os
import shutil
import subprocess
import sys

import pytest

from .tools.sanitize import ASAN, TSAN
from .tools.stage import ROOT

COMPILER = os.environ.get("CXX", "g++")
pytestmark = pytest.mark.skipif(not shutil.which(COMPILER), reason=f"there is no C++ compiler {COMPILER}")


@pytest.fixture(params=["asan", "tsan"])
def tool(request, tmp_path):
    """Name of a tool that this compiler can link."""
    source = tmp_path / "empty.cpp"
    source.write_text("int main() {}")
    flags = {"asan": ASAN, "tsan": TSAN}[request.param]
    tried = subprocess.run(
        [COMPILER, *flags, str(source), "-o", str(tmp_path / "empty")], capture_output=True, text=True
    )
    if tried.returncode:
        pytest.skip(f"{COMPILER} has no {request.param}: {tried.stderr.strip()[-200:]}")
    return request.param


def sanitize(tool: str, folder, *options: str) -> str:
    """The end of the script's output, after checking its exit status."""
    command = [
        sys.executable,
        "-m",
        "tests.tools.sanitize",
        "--tool",
        tool,
        "--harness",
        "--folder",
        str(folder),
        *options,
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]
    return done.stdout.strip().splitlines()[-1]


@pytest.mark.promise("sanitizers")
def test_nothing_is_found(tool, tmp_path):
    assert sanitize(tool, tmp_path / "stage").endswith("nothing found")


@pytest.mark.slow
def test_a_bug_is_found(tool, tmp_path):
    assert sanitize(tool, tmp_path / "stage", "--self-check") == "the bug was found"

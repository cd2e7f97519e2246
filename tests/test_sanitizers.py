"""Every C++ kernel, small, under the sanitizers; all operator tests under them: ``python -m tests.tools.sanitize``."""

import os
import shutil
import subprocess
import sys

import pytest

from .tools.stage import ROOT

COMPILER = os.environ.get("CXX", "g++")
pytestmark = pytest.mark.skipif(not shutil.which(COMPILER), reason=f"there is no C++ compiler {COMPILER}")


def sanitize(tool: str, folder, *options: str) -> str:
    """The end of what the script printed; it must have ended well."""
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


@pytest.mark.parametrize("tool", ["asan", "tsan"])
def test_nothing_is_found(tool, tmp_path):
    assert sanitize(tool, tmp_path).endswith("nothing found")


@pytest.mark.slow
@pytest.mark.parametrize("tool", ["asan", "tsan"])
def test_a_bug_is_found(tool, tmp_path):
    assert sanitize(tool, tmp_path, "--self-check") == "the bug was found"

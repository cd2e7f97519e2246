"""Tests one library under several versions of torch (and of Python, if they are installed).

    python -m tests.tools.versions 2.10.0 2.12.1 2.14.1
    python -m tests.tools.versions newest --python python3.10 python3.13
    python -m tests.tools.versions 2.10.0 --wheel dist/fastkd-0.2.0-py3-none-any.whl

The library is built once with this environment's torch, unless a wheel is given. For each version, that torch (from the
package index), the wheel and the test requirements are installed in a fresh environment, and the core tests run.
Versions that cannot be installed are reported. The exit status is 1 if a version fails or is missing. An environment
with CUDA libraries takes about 7 GB and is removed before the next one is created.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from .. import suites

ROOT = Path(__file__).parents[2]


def call(command: list[str], **options) -> subprocess.CompletedProcess:
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


def tests_of(python: str, tests: Path, pure: bool) -> tuple[bool, str]:
    """Whether the tests passed; the last line of pytest, preceded by the lines of failures."""
    shutil.rmtree(tests, ignore_errors=True)
    shutil.copytree(ROOT / "tests", tests, ignore=shutil.ignore_patterns("train", "__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tests.parent)
    # Few examples: the kernels' results depend on the library, which is the same everywhere.
    options = ["-q", "-m", "not slow", "-p", "no:cacheprovider", "--hypothesis-profile=interpreter"]
    command = [python, "-m", "pytest", *options, *suites.files("core")]
    # With a pure wheel, tests of kernels skip, and so does the test that requires them.
    done = call(command, cwd=tests.parent, env={**os.environ, **({"FASTKD_BUILD": "0"} if pure else {})})
    lines = done.stdout.strip().splitlines()
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return done.returncode == 0, "\n".join(failed + lines[-1:])


def check(folder: Path, wheel: Path, python: str, torch: str, keep: bool) -> tuple[bool, str]:
    environment = folder / f"{Path(python).name}-{torch}"
    if not environment.exists():
        if (made := call([python, "-m", "venv", str(environment)])).returncode:
            return False, f"no such Python: {made.stderr.strip().splitlines()[-1:]}"
        packages = [
            "torch" if torch == "newest" else f"torch=={torch}",
            "pytest",
            "hypothesis",
            "expecttest",
            "numpy",
            "setuptools",
        ]
        installed = call([str(environment / "bin" / "pip"), "install", "-q", *packages])
        if installed.returncode:
            shutil.rmtree(environment)
            return False, "not installed: " + " ".join(re.findall("ERROR: (.*)", installed.stderr)[:1])
    inside = str(environment / "bin" / "python")
    installed = call([inside, "-m", "pip", "install", "-q", "--no-deps", "--force-reinstall", str(wheel.resolve())])
    if installed.returncode:
        return False, f"{wheel.name} not installed: {installed.stderr[-500:]}"
    passed, said = tests_of(inside, folder / "elsewhere" / "tests", wheel.name.endswith("-none-any.whl"))
    found = call(
        [inside, "-c", "import fastkd, torch; print(torch.__version__, fastkd.backend_info()['backends']['cpu'])"],
        cwd=folder / "elsewhere",  # in the checkout, `import fastkd` would import that
    )
    if not keep:
        shutil.rmtree(environment)
    return passed, found.stdout.strip() + found.stderr.strip()[-500:] + "\n" + said


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("torch", nargs="+", help="versions of torch, or newest")
    parser.add_argument("--python", nargs="+", default=[sys.executable])
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "fastkd-versions")
    parser.add_argument("--wheel", type=Path, help="the wheel, if it is built already")
    parser.add_argument("--keep", action="store_true", help="leave the environments for another run")
    args = parser.parse_args()
    args.folder.mkdir(exist_ok=True)
    if args.wheel is None:
        options = ["-q", "--no-deps", "--no-build-isolation", "-w", str(args.folder), str(ROOT)]
        # Compiling the CUDA kernels would take longer than all tests, and none of them uses these.
        environment = {"FASTKD_CUDA": "0", **os.environ, "FASTKD_BUILD": "1"}
        subprocess.run([sys.executable, "-m", "pip", "wheel", *options], check=True, env=environment)
    wheel = args.wheel or max(args.folder.glob("fastkd-*.whl"), key=lambda path: path.stat().st_mtime)
    failed = False
    for python in args.python:
        for torch in args.torch:
            passed, said = check(args.folder, wheel, python, torch, args.keep)
            failed |= not passed
            print(f"== {python}, torch {torch}\n{said}", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())

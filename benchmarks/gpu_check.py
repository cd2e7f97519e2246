"""Everything a GPU is needed for, in one command on a bare machine: build, GPU tests, benchmarks.

    python3 benchmarks/gpu_check.py --out DIR

Needs torch >= 2.10 with CUDA, a C++ compiler and what the tests import (pytest, hypothesis, numpy), already installed. A
step whose log ends well is skipped when the command is repeated with the same DIR. No step can take the time of the
others: each has a limit of its own.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PYTHON = sys.executable
STEPS = {
    "build": (120, [PYTHON, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "-e", "."]),
    "tests": (
        210,
        [PYTHON, "-m", "pytest", "-q", "-m", "not slow", *(f"tests/test_{name}.py" for name in (
            "nfd", "kd", "cwd", "resized", "rdd", "functional", "losses", "compile"))],
    ),
    "bench": (120, [PYTHON, "-m", "benchmarks"]),
}  # fmt: skip
DONE = "== exit 0"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the logs and cuda.csv")
    out = parser.parse_args().out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    summary = []
    for name, (limit, command) in STEPS.items():
        log = out / f"{name}.log"
        if log.exists() and log.read_text().rstrip().endswith(DONE):
            summary.append(f"{name}: done before")
            continue
        begin = time.monotonic()
        env = {
            **os.environ,
            "FASTKD_BUILD": "1",
            "PIP_BREAK_SYSTEM_PACKAGES": "1",
            "FASTKD_RESULTS": str(out),
            "PYTHONUNBUFFERED": "1",
        }
        with log.open("w") as file:
            try:
                code = subprocess.run(
                    command, cwd=ROOT, env=env, stdout=file, stderr=subprocess.STDOUT, timeout=limit
                ).returncode
            except subprocess.TimeoutExpired:
                code = 124
            file.write(f"\n== exit {code}\n")
        summary.append(f"{name}: exit {code}, {time.monotonic() - begin:.0f} s, {log}")
        if code and name == "build":
            break
    print("\n".join(summary))
    bench = out / "bench.log"
    if bench.exists():
        print(bench.read_text())
    return 0 if all("exit 0" in line or "done before" in line for line in summary) else 1


if __name__ == "__main__":
    sys.exit(main())

"""All checks that need a GPU, in one command on a bare machine: build, compile, GPU tests, benchmarks, summary.

    python3 benchmarks/gpu_check.py --out DIR [--wheels FOLDER] [--minutes 14]

Needs Python >= 3.10, torch >= 2.11 with CUDA, Triton >= 3.6 and a C++ compiler. Other packages can be given as wheels
in FOLDER, which are installed beside the environment, not into it. A step with a missing package is skipped, and the
summary says what to install.

Steps, the most informative first: Triton's kernels are compiled in parallel, then tests (two minutes), ours against
eager in both layouts with kernel times, then the other rivals and the training step.

A second run with the same DIR and checkout resumes: it skips finished steps, and the benchmarks skip the cases they
have. DIR holds log.txt, summary.md, cuda*.csv, kernels.txt and losses-cuda.png.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
SITE = ROOT / "build" / "gpu_check"  # packages from the wheels
PYTHON = sys.executable
TESTS = (
    *("gpu", "triton", "nfd", "kd", "cwd", "resized", "resized_kernels", "rdd", "rdd_kernels"),
    *("cuda", "functional", "losses", "backends", "compile"),
    *("kd_sigmoid", "resized_shaped_cross_entropy", "resized_dice", "resized_binary_cross_entropy"),
    *("resized_ohem_cross_entropy", "ranks"),
)


# Only the GPU's architecture is compiled: a third of the build.
ARCHS = (80, 90, 100)


class Step(NamedTuple):
    """A command, its time limit in seconds, the modules it needs, and whether later steps depend on it."""

    name: str
    seconds: int
    command: list[str]
    needs: tuple[str, ...] = ()
    vital: bool = False


def steps(out: Path) -> list[Step]:
    pytest = [PYTHON, "-m", "pytest", "-q", "-m", "not slow", "--hypothesis-profile=quick", "-p", "no:cacheprovider"]
    if importlib.util.find_spec("xdist"):  # most of the time is kernel compilation on the host
        pytest += ["-n", str(min(os.cpu_count() or 1, 14))]
    if missing(["expecttest"]):
        pytest += ["-k", "not opcheck"]
    return [
        Step(
            "build",
            100,
            [PYTHON, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "-e", "."],
            ("setuptools",),
            vital=True,
        ),
        Step("compile", 100, [PYTHON, "-m", "benchmarks.gpu_kernels", "--compile"]),
        Step(
            "tests",
            150,
            pytest + [f"tests/test_{name}.py" for name in TESTS],
            ("pytest", "hypothesis", "numpy"),
        ),
        Step("kernels", 120, [PYTHON, "-m", "benchmarks.gpu_kernels", "--resume", "--out", str(out)]),
        Step("host", 30, [PYTHON, "-m", "benchmarks.host", "--rounds", "1000", "--out", str(out)]),
        Step("losses", 250, [PYTHON, "-m", "benchmarks", "--resume", "--out", str(out)]),
        Step("step", 80, [PYTHON, "-m", "benchmarks.bench_step", "--resume", "--out", str(out)], ("torchvision",)),
        Step("numbers", 20, [PYTHON, "-m", "benchmarks.publish", "--gpu", str(out)], ("matplotlib",)),
    ]


def libraries_are_new() -> bool:
    """Whether both libraries exist (possibly copied from another machine) and no source is newer."""
    sources = [ROOT / "setup.py", *(path for path in (ROOT / "csrc").rglob("*") if path.is_file())]
    newest = max(path.stat().st_mtime for path in sources)
    return all(
        path.is_file() and path.stat().st_mtime >= newest
        for path in (ROOT / "fastkd" / name for name in ("_cpu.so", "_cuda.so"))
    )


def missing(needs: Sequence[str]) -> list[str]:
    return [name for name in needs if importlib.util.find_spec(name) is None]


def machine() -> tuple[list[str], str | None]:
    """A description of the machine in lines, and the reason if nothing can run."""
    lines = [f"Python {sys.version.split()[0]}"]
    if lacking := missing(("torch", "triton")):
        return lines, f"{' and '.join(lacking)} cannot be imported; pip install torch>=2.11 (it brings Triton on Linux)"
    import torch
    import triton

    lines += [f"torch {torch.__version__}, CUDA {torch.version.cuda}", f"Triton {triton.__version__}"]
    lines.append(f"nvcc: {shutil.which('nvcc') or 'none'}; C++: {shutil.which('c++') or shutil.which('g++') or 'none'}")
    if not torch.cuda.is_available():
        return lines, "torch finds no GPU"
    lines.append(torch.cuda.get_device_name())
    if torch.version.cuda:
        capability = 10 * torch.cuda.get_device_capability()[0] + torch.cuda.get_device_capability()[1]
        os.environ.setdefault("FASTKD_CUDA_ARCHS", str(max((a for a in ARCHS if a <= capability), default=ARCHS[0])))
    if missing(["expecttest"]):
        lines.append("no expecttest: tests without opcheck")
    return lines, None


def commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    try:
        out = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False).stdout.strip()
    except OSError:  # no git
        out = ""
    return out or os.environ.get("FASTKD_COMMIT", "unknown")


def ending(step: str, code: int, seconds: float) -> str:
    return f"=== {step}: exit {code} after {seconds:.0f} s at {commit()}"


def sections(log: Path) -> dict[str, tuple[str, int, float]]:
    """{step: (output, exit status, seconds)} of the last finished run of every step at this commit."""
    found: dict[str, tuple[str, int, float]] = {}
    text = log.read_text(errors="replace") if log.exists() else ""
    pattern = r"^=== (\w+) begins\n((?:(?!=== \w+ begins\n).*\n)*?)=== \1: exit (\d+) after (\d+) s at (.*)$"
    for name, printed, code, seconds, at in re.findall(pattern, text, re.MULTILINE):
        if at == commit():
            found[name] = (printed, int(code), float(seconds))
    return found


def run(step: Step, limit: float, log: Path) -> None:
    """Appends a step's output and exit status to the log; 124 if it exceeded ``limit`` seconds."""
    env = {"FASTKD_BUILD": "0" if libraries_are_new() else "1", **os.environ}
    env |= {"PIP_BREAK_SYSTEM_PACKAGES": "1", "PYTHONUNBUFFERED": "1"}
    env["PYTHONPATH"] = os.pathsep.join(
        p for p in (str(SITE) if SITE.exists() else "", os.environ.get("PYTHONPATH")) if p
    )
    begin = time.monotonic()
    with log.open("a") as file:
        file.write(f"=== {step.name} begins\n")
        file.flush()
        # A separate process group, so that its children end with it.
        child = subprocess.Popen(
            step.command, cwd=ROOT, env=env, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = child.wait(limit)
        except subprocess.TimeoutExpired:
            code = 124
            os.killpg(child.pid, signal.SIGINT)  # lets the step report partial results
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(5)
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
    with log.open("a") as file:
        file.write(f"\n{ending(step.name, code, time.monotonic() - begin)}\n")


def summary(all_steps: Sequence[Step], log: Path, left_out: dict[str, str], lines: Sequence[str]) -> str:
    """The result of every step, the test failures, and the tables of the last step."""
    found = sections(log)
    table = ["| step | result | seconds |", "|---|---|---:|"]
    for step in all_steps:
        if step.name in left_out:
            table.append(f"| {step.name} | {left_out[step.name]} | |")
        elif step.name in found:
            _, code, seconds = found[step.name]
            words = {0: "done", 124: "out of time; run again to go on"}.get(code, f"failed, exit {code}: see log.txt")
            table.append(f"| {step.name} | {words} | {seconds:.0f} |")
        else:
            table.append(f"| {step.name} | not run | |")
    parts = [f"# GPU check at {commit()}", "; ".join(lines), "\n".join(table)]
    if "tests" in found:
        told = [
            line for line in found["tests"][0].splitlines() if re.match(r"(FAILED|ERROR)|\d+ (passed|failed)", line)
        ]
        parts.append("\n".join(f"    {line}" for line in told[-30:]))
    if "kernels" in found:
        parts.append("\n".join(f"    {line}" for line in found["kernels"][0].strip().splitlines()))
    if "numbers" in found:
        parts.append(found["numbers"][0].strip())
    return "\n\n".join(parts) + "\n"


def check(all_steps: Sequence[Step], out: Path, minutes: float, lines: Sequence[str]) -> int:
    """Runs the unfinished steps and writes the summary; returns 0 if every step is done."""
    out.mkdir(parents=True, exist_ok=True)
    log, stop = out / "log.txt", time.monotonic() + 60 * minutes
    left_out: dict[str, str] = {}
    broken = None
    for step in all_steps:
        done = sections(log).get(step.name)
        # The last step depends on the others' results and always runs.
        if done and done[1] == 0 and step is not all_steps[-1]:
            print(f"{step.name}: done before", flush=True)
            continue
        left = stop - time.monotonic()
        if lacking := missing(step.needs):
            left_out[step.name] = f"left out: no {', '.join(lacking)}; pip install {' '.join(lacking)}, or --wheels"
        elif broken:
            left_out[step.name] = f"left out: {broken} failed"
        elif left < 5:
            left_out[step.name] = "no time left; run again to go on"
        else:
            print(f"{step.name}: at most {min(step.seconds, left):.0f} s", flush=True)
            run(step, min(step.seconds, left), log)
            if step.vital and sections(log)[step.name][1]:
                broken = step.name
        if step.name in left_out:
            print(f"{step.name}: {left_out[step.name]}", flush=True)
    text = summary(all_steps, log, left_out, lines)
    (out / "summary.md").write_text(text)
    print(f"{text.partition('### Losses on a GPU')[0]}\nthe tables: {out / 'summary.md'}")
    found = sections(log)
    return 0 if all(step.name in found and found[step.name][1] == 0 for step in all_steps) else 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for the log, the rows, the plot and the summary"
    )
    parser.add_argument("--wheels", type=Path, help="folder of wheels that the machine lacks")
    parser.add_argument("--minutes", type=float, default=14, help="for everything (default: %(default)s)")
    args = parser.parse_args()
    if args.wheels:
        wheels = sorted(map(str, args.wheels.glob("*.whl")))
        command = [
            PYTHON,
            "-m",
            "pip",
            "install",
            "-q",
            "--no-index",
            "--no-deps",
            "--upgrade",
            "--target",
            str(SITE),
            *wheels,
        ]
        subprocess.run(command, check=True)
    if SITE.exists():
        sys.path.insert(0, str(SITE))
    lines, obstacle = machine()
    if obstacle:
        print("\n".join(lines))
        print(f"gpu_check: {obstacle}", file=sys.stderr)
        return 2
    out = args.out.resolve()
    return check(steps(out), out, args.minutes, lines)


if __name__ == "__main__":
    sys.exit(main())

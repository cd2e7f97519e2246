"""Runs the C++ kernels under sanitizers and Valgrind.

    python -m tests.tools.sanitize --tool asan                # address + undefined behaviour: the operator tests
    python -m tests.tools.sanitize --tool asan --fuzz 60      # the same library under an hour of tests/tools/fuzz.py
    python -m tests.tools.sanitize --tool tsan                # races: the operator tests
    python -m tests.tools.sanitize --tool valgrind            # uninitialised memory: every kernel on small inputs
    ... --harness                                             # asan, tsan: every kernel on small inputs, as for valgrind
    ... --isa baseline|avx2|avx512                            # default: FASTKD_CPU_ISA, or the widest supported
    ... --self-check                                          # inserts a bug, which the tool must find

Builds go to ``--folder`` (by default in the system's temporary folder); the checkout is unchanged. Exit status 0: no
errors found. ``make test`` runs the harness. ThreadSanitizer does not understand OpenMP, which the library uses through
torch, so the library is built with :data:`THREADS` instead.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from .. import suites
from . import stage

# -g1: reports need lines only, and this compiles faster.
TSAN = ("-g1", "-fsanitize=thread")
ASAN = ("-g1", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")
TESTS = suites.files("core")
# Excluded tests, which do not concern this library with its single instruction set: the compiler's messages, imports of
# other processes, memory measured from outside.
DESELECTED = (
    "not compile and not export and not process and not import_is_light and not environment and not says_once and not leak "
    "and not writes_nothing and not instruction_sets"
)
# ThreadSanitizer's parallel loop: up to three threads for any grain.
THREADS = (
    "torch::stable::parallel_for(begin, end, grain, [&](int64_t b, int64_t e) { body(b, e, context); });",
    """(void)grain;
    std::vector<std::thread> threads;
    const int64_t chunk = (end - begin + 2) / 3;
    for (int64_t b = begin; b < end; b += chunk)
        threads.emplace_back(body, b, b + chunk < end ? b + chunk : end, context);
    for (std::thread& thread : threads) thread.join();""",
)
# Bugs for --self-check: (file, original text, replacement).
BUGS = {
    "asan": ("cpu/rdd.cpp", "j < min(n, (i + 1) * chunk)", "j < (i + 1) * chunk + 1"),
    "tsan": ("cpu/cwd.cpp", "partial[item] = m;", "partial[0] = m, partial[item] = m;"),
    "valgrind": ("cpu/resize.h", "for (int64_t i = 0; i < phases * padded; ++i) right[i] = 0;", ""),
}


def preload(*names: str) -> str:
    return " ".join(subprocess.check_output(["gcc", f"-print-file-name={name}"], text=True).strip() for name in names)


def asan_options(fill: int = 0xFF) -> str:
    """Leak detection is off: Python frees some memory only at exit (test_adversarial.py tests for leaks).

    Fresh memory is filled with a byte; the default makes it NaN, so that results that depend on it show.
    """
    filled = f"malloc_fill_byte={fill}:max_malloc_fill_size={1 << 30}"
    return f"detect_leaks=0:abort_on_error=1:allocator_may_return_null=1:{filled}"


def asan(folder: Path, isa: str, command: list[str], optimise: str) -> int:
    """Runs a Python command in the stage with the library under both sanitizers."""
    stage.build(folder, isa, (optimise, *ASAN))
    environment = stage.environment(
        isa,
        LD_PRELOAD=preload("libasan.so", "libstdc++.so"),
        ASAN_OPTIONS=asan_options(),
        UBSAN_OPTIONS="print_stacktrace=1",
    )
    return subprocess.run([sys.executable, *command], cwd=folder, env=environment, check=False).returncode


def tsan(folder: Path, isa: str, command: list[str], optimise: str) -> int:
    """Runs a Python command in the stage with the library under ThreadSanitizer."""
    replace(folder / "csrc" / "checks.h", *THREADS)
    replace(folder / "csrc" / "checks.h", "#include <string>", "#include <string>\n#include <thread>")
    stage.build(folder, isa, (optimise, *TSAN))
    # torch and Python are not instrumented: their locks and threads are tracked, their memory accesses are ignored.
    environment = stage.environment(
        isa,
        LD_PRELOAD=preload("libtsan.so"),
        TSAN_OPTIONS="ignore_interceptors_accesses=1:halt_on_error=1:report_signal_unsafe=0",
        OMP_NUM_THREADS="1",
    )
    return subprocess.run(
        [*unrandomised(), sys.executable, *command], cwd=folder, env=environment, check=False
    ).returncode


def unrandomised() -> list[str]:
    """Disables address randomisation, which ThreadSanitizer requires, if the system allows it."""
    command = ["setarch", "-R"]
    allowed = shutil.which(command[0]) and subprocess.run([*command, "true"], capture_output=True, check=False)
    return command if allowed and allowed.returncode == 0 else []


def replace(path: Path, there: str, becomes: str) -> None:
    text = path.read_text()
    assert text.count(there) == 1, f"{path.name} no longer has {there!r}"
    path.write_text(text.replace(there, becomes))


def harness(folder: Path, isa: str, flags: tuple[str, ...], runner: list[str], *environments: dict[str, str]) -> int:
    """Builds harness.cpp with the kernels and runs it in each environment; all outputs must be equal."""
    stage.build(folder, isa, flags, units=(*stage.KERNELS, "dispatch", "others"), link=False)
    program = folder / "harness"
    objects = [str(folder / "objects" / f"{name}.o") for name in (*stage.KERNELS, "dispatch", "others")]
    source = str(Path(__file__).with_name("harness.cpp"))
    include = f"-I{folder / 'csrc' / 'cpu'}"
    compiler = [os.environ.get("CXX", "g++"), "-std=c++17", *flags, include]
    stage.run([*compiler, source, *objects, "-pthread", "-o", str(program)])
    printed = set()
    for environment in environments:
        done = subprocess.run(
            [*runner, str(program)],
            env=stage.environment(isa, **environment),
            stdout=subprocess.PIPE,
            text=True,
            check=False,
        )
        print(done.stdout, end="")
        if done.returncode:
            return done.returncode
        printed.add(done.stdout)
    if len(printed) > 1:
        print("what fresh memory is filled with changes a result")
    return int(len(printed) > 1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tool", choices=("asan", "tsan", "valgrind"), required=True)
    parser.add_argument("--isa", choices=tuple(stage.ISA_FLAGS), default=None)
    parser.add_argument(
        "--fuzz", type=float, metavar="MINUTES", help="asan, tsan: fuzz for so long instead of the tests"
    )
    parser.add_argument("--first", type=int, default=0, help="the first seed of --fuzz")
    parser.add_argument("--tests", nargs="*", default=TESTS, help="asan, tsan: test files, or any words for pytest")
    parser.add_argument("--harness", action="store_true", help="asan, tsan: harness.cpp instead of the tests")
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument("--self-check", action="store_true")
    args = parser.parse_args()
    isa = args.isa or os.environ.get("FASTKD_CPU_ISA") or stage.widest()
    if args.tool == "valgrind":
        isa = isa.replace("512", "2")
    folder = args.folder or Path(tempfile.gettempdir()) / f"fastkd-{args.tool}-{isa}"
    stage.copy(folder)
    if args.self_check:
        name, there, becomes = BUGS[args.tool]
        replace(folder / "csrc" / name, there, becomes)
    # Few examples, since this tests memory and threads; --fuzz runs many more. Reports are not captured.
    options = ["-q", "--capture=sys", "-p", "no:cacheprovider", "-m", "not slow", "--hypothesis-profile=interpreter"]
    command = ["-m", "pytest", *options, "-k", DESELECTED, *args.tests]
    if args.fuzz:
        log = ["--log", str(folder / "seed")]
        command = ["-m", "tests.tools.fuzz", "--minutes", str(args.fuzz), "--first", str(args.first), *log]
    optimise = "-O1" if args.fuzz else "-O0"  # -O1 would take longer to compile than the tests take to run
    if args.tool == "asan":
        if args.harness:
            fills = [{"ASAN_OPTIONS": asan_options(fill)} for fill in (0xFF, 0x11)]
            status = harness(folder, isa, (optimise, *ASAN), [], *fills)
        else:
            status = asan(folder, isa, command, optimise)
    elif args.tool == "tsan":
        if args.harness:
            status = harness(folder, isa, (optimise, *TSAN), unrandomised(), {"TSAN_OPTIONS": "halt_on_error=1"})
        else:
            status = tsan(folder, isa, command, optimise)
    else:
        runner = [shutil.which("valgrind") or sys.exit("valgrind is not installed"), "--error-exitcode=9", "-q"]
        status = harness(folder, isa, ("-O1", "-g"), runner, {})
    if args.self_check:
        print("the bug was found" if status else "THE BUG WAS NOT FOUND")
        return not status
    print(f"{args.tool}, {isa}: {'nothing found' if status == 0 else f'exit status {status}'}")
    return status


if __name__ == "__main__":
    sys.exit(main())

"""The C++ kernels under tools that see what tests do not.

    python -m tests.tools.sanitize --tool asan                # address + undefined behaviour: the operator tests
    python -m tests.tools.sanitize --tool asan --fuzz 60      # the same library under an hour of tests/tools/fuzz.py
    python -m tests.tools.sanitize --tool tsan                # races: every kernel, threads and concurrent callers
    python -m tests.tools.sanitize --tool valgrind            # uninitialised memory: every kernel, small
    ... --isa baseline|avx2|avx512                            # default: the widest of this processor
    ... --self-check                                          # with a bug put in first: the tool must find it

Each builds what it needs in ``--folder`` (under the system's temporary folder); nothing of the checkout changes. Exit
status 0: nothing found. TSan and valgrind run ``harness.cpp``: OpenMP, which the library uses through torch, is not
instrumented and would hide races or invent them, and valgrind has no AVX-512.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from . import stage

ASAN = ("-O1", "-g", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")
OPERATORS = ["nfd", "kd", "cwd", "resized", "resized_kernels", "rdd", "rdd_kernels"]
TESTS = [f"tests/test_{name}.py" for name in ("adversarial", "csrc", *OPERATORS, "functional", "losses", "backends")]
# Of those, what is not about this library: what other processes import, memory measured from outside.
DESELECTED = "not import_is_light and not environment and not says_once and not leak"
# Bugs for --self-check: (file, what is there, what it becomes).
BUGS = {
    "asan": ("cpu/rdd.cpp", "j < min(n, (i + 1) * chunk)", "j < (i + 1) * chunk + 1"),
    "tsan": ("cpu/cwd.cpp", "partial[item] = m;", "partial[0] = m, partial[item] = m;"),
    "valgrind": ("cpu/resize.h", "for (int64_t i = 0; i < phases * padded; ++i) right[i] = 0;", ""),
}


def preload() -> str:
    libraries = ("libasan.so", "libstdc++.so")
    return " ".join(
        subprocess.check_output(["gcc", f"-print-file-name={name}"], text=True).strip() for name in libraries
    )


def asan(folder: Path, isa: str, command: list[str]) -> int:
    """Runs a Python command in the stage, with the library under both sanitizers."""
    stage.build(folder, isa, ASAN)
    # Leaks are not looked for: Python itself leaves memory to the end of the process. test_adversarial.py measures them.
    environment = stage.environment(
        isa,
        LD_PRELOAD=preload(),
        ASAN_OPTIONS="detect_leaks=0:abort_on_error=1:allocator_may_return_null=1",
        UBSAN_OPTIONS="print_stacktrace=1",
    )
    return subprocess.run([sys.executable, *command], cwd=folder, env=environment, check=False).returncode


def harness(folder: Path, isa: str, flags: tuple[str, ...], runner: list[str], **environment: str) -> int:
    """Builds harness.cpp with the kernels into one program, and runs it."""
    stage.build(folder, isa, flags, units=(*stage.KERNELS, "dispatch", "others"), link=False)
    program = folder / "harness"
    objects = [str(folder / "objects" / f"{name}.o") for name in (*stage.KERNELS, "dispatch", "others")]
    source = str(Path(__file__).with_name("harness.cpp"))
    compiler = os.environ.get("CXX", "g++")
    stage.run(
        [
            compiler,
            "-std=c++17",
            *flags,
            f"-I{folder / 'csrc' / 'cpu'}",
            source,
            *objects,
            "-pthread",
            "-o",
            str(program),
        ]
    )
    return subprocess.run([*runner, str(program)], env=stage.environment(isa, **environment), check=False).returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tool", choices=("asan", "tsan", "valgrind"), required=True)
    parser.add_argument("--isa", choices=tuple(stage.ISA_FLAGS), default=None)
    parser.add_argument("--fuzz", type=float, metavar="MINUTES", help="asan: fuzz for so long instead of the tests")
    parser.add_argument("--first", type=int, default=0, help="the first seed of --fuzz")
    parser.add_argument("--tests", nargs="*", default=TESTS, help="asan: test files, or any words for pytest")
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument("--self-check", action="store_true")
    args = parser.parse_args()
    isa = args.isa or (stage.widest() if args.tool != "valgrind" else stage.widest().replace("512", "2"))
    folder = args.folder or Path(tempfile.gettempdir()) / f"fastkd-{args.tool}-{isa}"
    stage.copy(folder)
    if args.self_check:
        name, there, becomes = BUGS[args.tool]
        path = folder / "csrc" / name
        assert path.read_text().count(there) == 1, f"{name} no longer has {there!r}"
        path.write_text(path.read_text().replace(there, becomes))
    if args.tool == "asan":
        # Few examples each: it is memory that is looked at, and --fuzz draws many more.
        options = ["-q", "-p", "no:cacheprovider", "-m", "not slow", "--hypothesis-profile=interpreter"]
        command = ["-m", "pytest", *options, "-k", DESELECTED, *args.tests]
        if args.fuzz:
            log = ["--log", str(folder / "seed")]
            command = ["-m", "tests.tools.fuzz", "--minutes", str(args.fuzz), "--first", str(args.first), *log]
        status = asan(folder, isa, command)
    elif args.tool == "tsan":
        flags = ("-O1", "-g", "-fsanitize=thread")
        status = harness(folder, isa, flags, [], TSAN_OPTIONS="halt_on_error=1")
    else:
        runner = [shutil.which("valgrind") or sys.exit("valgrind is not installed"), "--error-exitcode=9", "-q"]
        status = harness(folder, isa, ("-O1", "-g"), runner)
    if args.self_check:
        print("the bug was found" if status else "THE BUG WAS NOT FOUND")
        return not status
    print(f"{args.tool}, {isa}: {'nothing found' if status == 0 else f'exit status {status}'}")
    return status


if __name__ == "__main__":
    sys.exit(main())

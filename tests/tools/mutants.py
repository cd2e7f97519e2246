"""Mutation testing: changes one sign, constant, bound or word of kernels or reference at a time and runs the tests.

    python -m tests.tools.mutants --minutes 60 --log mutants.jsonl     # a random sample; continues from the log
    python -m tests.tools.mutants --part 1/2 --log part1.jsonl         # half of the sample, for two processes
    python -m tests.tools.mutants --only csrc/cpu/kd.cpp:120           # the mutants of one line
    python -m tests.tools.mutants --summary mutants.jsonl

For each mutant the affected units are compiled for one instruction set, and their tests run until one fails: first with
few examples, which are usually enough, then with as many as `make test`, then, for C++, under the sanitizers. CUDA C++
runs on the emulated GPU. A mutant that survives needs a test, or it is equivalent, and :data:`EQUIVALENT` gives the
reason. A mutant that makes a test crash, hang or use more than 10 GB is noticed.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from .. import suites
from . import stage

SEED = 20
FLAGS = ("-O1",)
PROCESSOR_TIME = 400  # seconds over all threads, against infinite loops

# Header -> units that are recompiled.
HEADERS = {
    "moments.h": ("nfd",),
    "softmax.h": ("kd", "cwd", "rdd"),
    "sigmoid.h": ("kd", "resized_kd"),
    "resize.h": ("resized_cross_entropy", "resized_kd", "resized_dice", "resized_binary_cross_entropy", "rdd"),
}
# Tests of a family outside the file of its name. The operators' table and test_csrc.py apply to all.
TESTS = {
    "kd": ["kd", "kd_sigmoid"],
    "resized_cross_entropy": ["resized_kernels", "resized", "resized_shaped_cross_entropy"],
    "resized_kd": ["resized_kernels", "resized", "kd_sigmoid"],
    "rdd": ["rdd_kernels", "rdd"],
    "rescale": ["autograd"],
    "labels": ["functional"],
    "exp": [],
}
# Keywords for tests/test_adversarial.py besides the family's name.
WORDS = {
    "nfd": "equal_to or half",
    "kd": "weights or out_of_range or ignored or equal_to",
    "cwd": "equal_to",
    "rdd": "out_of_range",
    "resized_cross_entropy": "resized_ce or smooth or focal or weights or out_of_range or lowest",
    "resized_dice": "dice",
    "resized_binary_cross_entropy": "bce",
    "resized_kd": "weights or out_of_range or lowest or equal_to",
    "exp": "half",
}
PYTHON = {
    "fastkd/reference.py": [f"tests/test_{name}.py" for name in (*suites.FAMILIES, "functional")],
    **{
        f"fastkd/{stem}.py": [
            f"tests/test_{name}.py" for name in ("functional", *suites.FAMILIES, "losses", "autograd")
        ]
        for stem in ("functional", "_operators", "_dice")
    },
    "fastkd/ops/_autograd.py": [
        f"tests/test_{name}.py" for name in ("autograd", "integration", "functional", *suites.FAMILIES)
    ],
    **{
        path.relative_to(stage.ROOT).as_posix(): suites.files("interpreted")
        for path in sorted((stage.ROOT / "kernels").glob("*.py"))
        if path.stem != "__init__"
    },
}

SWAPS = [
    (r" \+ ", " - "),
    (r" - ", " + "),
    (r" \* ", " / "),
    (r" / ", " * "),
    (r" \+= ", " -= "),
    (r" <= ", " < "),
    (r" < ", " <= "),
    (r" >= ", " > "),
    (r" > ", " >= "),
    (r" == ", " != "),
    (r" != ", " == "),
    (r" && ", " || "),
    (r" \|\| ", " && "),
    (r"\bmin\(", "max("),
    (r"\bmax\(", "min("),
    (r"\btrue\b", "false"),
    (r"\bfalse\b", "true"),
    (r"\bTrue\b", "False"),
    (r"\bFalse\b", "True"),
]
NUMBER = re.compile(r"(?<![\w.\"'])(\d+)(?![\w.\"'])")
# Not code, or code that affects only speed.
SKIP = re.compile(
    r"^\s*(//|#|\*|\"\"\"|import |from |using |template|typedef)|prefetch|fetch\(|static_assert|Error\(|_CHECK"
)
# Mutants that no test of results can notice: (file, old, new, a part of the line, why). These are skipped.
EQUIVALENT = [
    (
        "cpu/cwd.cpp",
        "<=",
        "<",
        "i + W <= n; i += W) store(out + i, gradient",
        "the last vector takes the remainder path",
    ),
    ("cpu/cwd.cpp", "32", "33", "kRows = 32", "rows per tile: rounding and speed"),
    ("cpu/cwd.cpp", "0", "1", "load_part(t + i, left, Acc(0)), inv_tau", "lanes that are not stored"),
    ("cpu/exp.cpp", "<", "<=", "if (i < last)", "an empty remainder"),
    ("cpu/kd.cpp", "+", "-", "TileAddress next_", "the address of a prefetch"),
    ("cpu/kd.cpp", "256", "257", "Acc factor[256]", "the size of a buffer"),
    ("cpu/moments.h", "<=", "<", "for (i = 0; i + 2 * W <= n;", "the last step takes the remainder path: rounding"),
    ("cpu/nfd.cpp", ">", ">=", "st > most ? most", "the two are equal"),
    ("cpu/rdd.cpp", "64", "65", "kRows = 64", "rows per partial sum: rounding"),
    (
        "cpu/rdd.cpp",
        "-",
        "+",
        "min(W, count - l); ++i) total +=",
        "lanes past the end hold 0, whose loss is exactly 0",
    ),
    ("cpu/rdd.cpp", "+=", "-=", "student_hard[item] +=", "the k-th smallest is then always searched: speed only"),
    ("cpu/rdd.cpp", "0", "1", "shift > 0;)", "subtracting 11 from 32 or 64 repeatedly never gives 1"),
    (
        "cpu/resize.h",
        "0",
        "1",
        "RowGradient<Acc> one(to.gradient ? map.c : 0",
        "the size of an unused buffer",
    ),
    ("cpu/resize.h", "true", "false", "have_plain_ = true", "the row is then recomputed: speed"),
    (
        "cpu/resize.h",
        "false",
        "true",
        "run<kStore, kMost, kBlend, false>",
        "the careful path without pixels to recompute: speed",
    ),
    ("cpu/resize.h", "1", "2", "int64_t n = 1;", "one more phase, with empty cells"),
    ("cpu/resize.h", "65536", "65537", "int64_t{65536}", "number of phases kept: speed"),
    ("cpu/resize.h", "<", "<=", "gradient.spill(item, *top)", "a row that is never added"),
    ("cpu/resized_cross_entropy.cpp", "false", "true", "compute<true, false, kBlend>", "a maximum that is not used"),
    ("cpu/resized_kd.cpp", "false", "true", "compute<true, false, kBlend>", "a maximum that is not used"),
    ("cpu/tile.h", "<=", "<", "for (; l + 4 <= lanes; l += 4)", "the last four take the remainder path"),
    ("cpu/tile.h", "*", "/", "row_ = bytes * (", "the address of a prefetch"),
    ("cpu/vec.h", "0", "1", "return bits != 0;", "always true: the careful path gives the same result up to rounding"),
    ("cpu/vec.h", "64", "65", "operator delete(data_", "the alignment passed to delete"),
    ("cpu/vec.h", "-", "+", "set1(0.5f)) - 0x3f000000", "only the low 16 bits are kept, and they are 0"),
    (
        "cuda/kd.h",
        "false",
        "true",
        "kOneRead = false",
        "not on the emulated GPU; for sm_80 the kernel is then empty, and tests/test_cuda_build.py finds 4 registers, not 40",
    ),
    ("cuda/plan.h", "*", "/", "bool short_ones", "whether a warp or a block processes a short group: speed"),
    (
        "cuda/plan.h",
        "*",
        "/",
        "round_up(ceil_div(share, kStages)",
        "the size of a stage, still whole vectors: speed",
    ),
    ("kernels/rdd.py", "1", "2", "mask=inside, other=1) <=", "pixels past the end are not selected"),
    ("kernels/tiles.py", "1", "2", "tile = TILE // (1 if", "the size of a block"),
    (
        "kernels/tiles.py",
        "min(",
        "max(",
        "block_reduced = min(most_reduced, tile // block_inner)",
        "the size of a block",
    ),
    (
        "fastkd/reference.py",
        "1",
        "2",
        "torch.where(valid, probability.amax(1), 1)",
        "an ignored pixel is not selected, and sorts last either way",
    ),
    ("fastkd/reference.py", "2", "3", "if x.shape[-2:] == size", "torch's interpolation to the same size is a copy"),
]


@dataclass(frozen=True)
class Mutant:
    file: str
    line: int
    column: int
    old: str
    new: str

    def apply(self, text: str) -> str:
        lines = text.split("\n")
        line = lines[self.line - 1]
        assert line[self.column :].startswith(self.old), self
        lines[self.line - 1] = line[: self.column] + self.new + line[self.column + len(self.old) :]
        return "\n".join(lines)

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column} {self.old.strip()!r} -> {self.new.strip()!r}"


def mutants_of(file: str) -> Iterator[Mutant]:
    inside = False  # within a docstring
    for number, line in enumerate((stage.ROOT / file).read_text().split("\n"), 1):
        quotes = line.count('"""')
        if file.endswith(".py") and (inside or quotes):
            inside ^= quotes % 2 == 1
            continue
        if SKIP.search(line):
            continue
        code = line.split("//" if not file.endswith(".py") else "  #")[0]
        for pattern, new in SWAPS:
            for match in re.finditer(pattern, code):
                yield Mutant(file, number, match.start(), match.group(), new)
        for match in NUMBER.finditer(code):
            yield Mutant(file, number, match.start(), match.group(), str(int(match.group()) + 1))


def why_equivalent(m: Mutant) -> str | None:
    code = (stage.ROOT / m.file).read_text().split("\n")[m.line - 1]
    known = (m.old.strip(), m.new.strip())
    return next(
        (why for file, *swap, part, why in EQUIVALENT if m.file.endswith(file) and (*swap,) == known and part in code),
        None,
    )


def sample(share: dict[str, int]) -> list[Mutant]:
    """This many mutants of each file, in one random order."""
    chosen = []
    for file, count in share.items():
        found = list(mutants_of(file))
        chosen += random.Random(f"{SEED} {file}").sample(found, min(count, len(found)))
    random.Random(SEED).shuffle(chosen)
    return chosen


def default_share() -> dict[str, int]:
    sources = sorted(p.relative_to(stage.ROOT).as_posix() for p in (stage.ROOT / "csrc" / "cpu").glob("*.*"))
    share = {file: 12 for file in sources if not file.endswith(("dispatch.cpp", "kernels.h"))}
    return (
        share
        | {"csrc/cpu/resize.h": 24, "csrc/cpu/rdd.cpp": 24, "csrc/cpu/exp.cpp": 3}
        | {file: 2 if file.startswith("kernels") else 20 for file in PYTHON}
        | {f"csrc/cuda/{name}.h": 4 for name in ("kd", "moments", "pixels", "plan")}
        | {f"csrc/cuda/{name}.h": 8 for name in ("nfd", "cells")}
    )


def units_of(file: str) -> tuple[str, ...]:
    name = Path(file).name
    return stage.KERNELS if name in ("tile.h", "vec.h", "reduce.h") else HEADERS.get(name, (Path(file).stem,))


def isa_of(mutant: Mutant) -> str:
    """The widest instruction set that compiles the mutant's line, considering #elif and #else."""
    branches: list[str] = []
    for line in (stage.ROOT / mutant.file).read_text().split("\n")[: mutant.line - 1]:
        if line.startswith("#if"):
            branches.append("avx512" if "AVX512" in line else "")
        elif line.startswith("#elif"):
            branches[-1] = "avx2"
        elif line.startswith("#else"):
            branches[-1] = "baseline" if branches[-1] else ""
        elif line.startswith("#endif"):
            branches.pop()
    return next((isa for isa in branches if isa), stage.widest())


def runs_of(file: str) -> list[list[str]]:
    """Argument lists for pytest, run in order until one fails."""
    if file in PYTHON:
        return [PYTHON[file]]
    if file.startswith("csrc/cuda"):
        return [suites.files("emulated")]
    units = units_of(file)
    adversarial = " or ".join(f"{unit} or {WORDS.get(unit, unit)}" for unit in units)
    stems = dict.fromkeys(stem for unit in units for stem in (*TESTS.get(unit, [unit]), "operators", "csrc"))
    return [
        [f"tests/test_{stem}.py" for stem in stems],
        ["tests/test_adversarial.py", "-k", f"({adversarial}) and not leak"],
    ]


def judge(folder: Path, file: str) -> str:
    """Returns "noticed" or "survived".

    Raises:
        subprocess.CalledProcessError: CUDA code does not compile.
    """
    noticed = fails(folder, file, "interpreter")  # 8 examples; interpreted and emulated tests never run more
    if not noticed and not file.startswith(("kernels", "csrc/cuda")):
        noticed = fails(folder, file, "default")
    if not noticed and file.startswith("csrc/cpu"):
        noticed = fails_sanitized(folder)
    return "noticed" if noticed else "survived"


def fails(folder: Path, file: str, profile: str) -> bool:
    """Whether a test of the file fails, in a forked child that has torch and the test libraries already loaded."""
    if file.startswith("csrc/cuda"):
        return fails_emulated(folder)
    child = os.fork()
    if child == 0:
        os.chdir(folder)
        sink = os.open(os.devnull, os.O_WRONLY)
        os.dup2(sink, 1)
        os.dup2(sink, 2)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_AS, (10 << 30, 10 << 30))
        resource.setrlimit(resource.RLIMIT_CPU, (PROCESSOR_TIME, PROCESSOR_TIME))
        if file.startswith("kernels"):
            os.environ["TRITON_INTERPRET"] = "1"
        os._exit(run_tests(folder, file, profile))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0


def fails_emulated(folder: Path) -> bool:
    """Whether a test of the CUDA kernels fails on the emulated GPU, or times out."""
    build = [sys.executable, "-m", "tests.emulation"]
    library = subprocess.run(build, cwd=folder, check=True, capture_output=True, text=True).stdout.strip()
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-m",
        "not slow",
        "-p",
        "no:cacheprovider",
        *suites.files("emulated"),
    ]
    environment = {**os.environ, "FASTKD_CUDA_EMULATION": library}
    try:
        done = subprocess.run(command, cwd=folder, env=environment, timeout=2 * PROCESSOR_TIME, capture_output=True)
    except subprocess.TimeoutExpired:
        return True
    finally:
        Path(library).unlink()
    return done.returncode != 0


def fails_sanitized(folder: Path) -> bool:
    """Whether the sanitizers report an error in the kernels. They need more address space than the tests' limit
    allows."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not slow", "tests/test_sanitizers.py"]
    return subprocess.run(command, cwd=folder, capture_output=True, check=False).returncode != 0


def run_tests(folder: Path, file: str, profile: str) -> int:
    import pytest

    sys.path.insert(0, str(folder))
    for name in [name for name in sys.modules if name.split(".")[0] in ("fastkd", "tests")]:
        del sys.modules[name]
    importlib.invalidate_caches()
    for words in runs_of(file):
        options = ["-q", "-x", "-m", "not slow", "-p", "no:cacheprovider", f"--hypothesis-profile={profile}"]
        if status := pytest.main([*options, "--rootdir", str(folder), *words]):
            return int(status)
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--log", type=Path, help="results, a line each; what is in it already is not done again")
    parser.add_argument(
        "--part", default="1/1", help="K/N: the K-th of every N mutants; each part has its own log and folder"
    )
    parser.add_argument("--checked", action="store_true", help="the tests are known to pass without a mutant")
    parser.add_argument("--only", help="a file, or file:line")
    parser.add_argument("--summary", type=Path, nargs="+", help="print what logs hold, and do nothing else")
    parser.add_argument("--folder", type=Path)
    args = parser.parse_args()
    args.folder = args.folder or Path(tempfile.gettempdir()) / f"fastkd-mutants-{args.part.replace('/', '-of-')}"
    if args.summary:
        return summarise([json.loads(line) for log in args.summary for line in log.read_text().splitlines()])
    if args.only:
        file, _, line = args.only.partition(":")
        todo = [m for m in mutants_of(file) if not line or m.line == int(line)]
    else:
        todo = sample(default_share())
    part, parts = map(int, args.part.split("/"))
    todo = [m for m in todo if not why_equivalent(m)][part - 1 :: parts]
    results = [json.loads(line) for line in args.log.read_text().splitlines()] if args.log and args.log.exists() else []
    done = {(r["file"], r["line"], r["column"], r["old"]) for r in results}
    import hypothesis  # noqa: F401  (loaded once, for all children)
    import pytest  # noqa: F401

    stage.copy(args.folder)
    isa = os.environ["FASTKD_CPU_ISA"] = stage.widest()
    stage.build(args.folder, isa, FLAGS)
    whole = stage.keep(args.folder)
    unmutated = {str(runs_of(m.file)): m.file for m in todo}
    for file in () if args.checked else unmutated.values():
        if fails(args.folder, file, "interpreter"):
            sys.exit(f"the tests of {file} fail without a mutant")
    if not args.checked and any(m.file.startswith("csrc/cpu") for m in todo) and fails_sanitized(args.folder):
        sys.exit("the sanitizers' test fails without a mutant")
    end = time.monotonic() + 60 * args.minutes
    for mutant in todo:
        if time.monotonic() > end:
            break
        if (mutant.file, mutant.line, mutant.column, mutant.old) in done:
            continue
        path = args.folder / mutant.file
        original = path.read_text()
        path.write_text(mutant.apply(original))
        compiled = mutant.file.startswith("csrc/cpu")
        try:
            if compiled:
                os.environ["FASTKD_CPU_ISA"] = isa_of(mutant)
                units = units_of(mutant.file) if isa_of(mutant) == isa else None
                stage.build(args.folder, isa_of(mutant), FLAGS, units)
            verdict = judge(args.folder, mutant.file)
        except subprocess.CalledProcessError:
            verdict = "does not compile"
        path.write_text(original)
        if compiled:
            os.environ["FASTKD_CPU_ISA"] = isa
            stage.restore(args.folder, whole)
        results.append({**asdict(mutant), "verdict": verdict, "code": original.split("\n")[mutant.line - 1].strip()})
        print(f"{verdict:16} {mutant}", flush=True)
        if args.log:
            with args.log.open("a") as log:
                log.write(json.dumps(results[-1]) + "\n")
    return summarise(results)


def summarise(results: list[dict]) -> int:
    print(f"{'':40} noticed  survived  not compiled")
    total: Counter[str] = Counter()
    for file in sorted({r["file"] for r in results}):
        counts: Counter[str] = Counter()
        for r in (r for r in results if r["file"] == file):
            counts[r["verdict"]] += 1
        total += counts
        print(f"{file:40} {counts['noticed']:7} {counts['survived']:9} {counts['does not compile']:13}")
    real = total["noticed"] + total["survived"]
    print(
        f"noticed {total['noticed']} of {real} mutants that change a result: {100 * total['noticed'] / max(real, 1):.1f} %"
    )
    for r in results:
        if r["verdict"] == "survived":
            print(f"survived: {r['file']}:{r['line']} {r['old'].strip()!r} -> {r['new'].strip()!r}   {r['code']}")
    return total["survived"] > 0


if __name__ == "__main__":
    sys.exit(main())

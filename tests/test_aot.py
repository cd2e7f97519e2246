"""Compiles every Triton kernel ahead of time for each GPU generation, without a GPU, and compares its resources with a
table.

No kernel may spill. The kernels at label resolution have no ``convert_layout``, no shared memory, and in loops over
classes few loads per exponential and no 64-bit multiplication. Every kernel has a row in tests/aot_table.csv; registers
etc. are compared with it if the Triton version is the table's. A new kernel needs a line in CASES of
tests/compilation.py and its rows. To update the table:

    python -m tests.test_aot [CASE ...] [TARGET ...]        # compiles these, or everything, and writes their rows
"""

from __future__ import annotations

import csv
import os
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels cannot be compiled in the interpreter", allow_module_level=True)

import triton
from fastkd.kernels import tiles

from .compilation import CASES, CODE, TARGETS, Loop, Usage, by_cells, class_loops, compile_all

TABLE = Path(__file__).with_name("aot_table.csv")
REWRITE = "if this is meant, `python -m tests.test_aot` with the case and the target writes its rows"
JOBS = [(case, target) for case in CASES for target in TARGETS]
COLUMNS = Usage._fields[:-1]


def read_table() -> tuple[str, dict[tuple[str, str, str], Usage]]:
    """The table's Triton version, and {(case, target, kernel): usage}."""
    with TABLE.open(newline="") as file:
        version = file.readline().removeprefix("# triton").strip()
        rows = list(csv.DictReader(file))
    return version, {
        (r["case"], r["target"], r["kernel"]): Usage(
            r["kernel"], *(int(r[f]) for f in COLUMNS[1:-2]), *(float(r[f]) for f in COLUMNS[-2:])
        )
        for r in rows
    }


def write_table(jobs: list[tuple[str, str]]) -> None:
    """Recompiles the jobs and replaces their rows; rows of another Triton version are dropped."""
    version, table = read_table()
    if version != triton.__version__ and set(jobs) != set(JOBS):
        sys.exit(f"the table is of Triton {version} and this is {triton.__version__}: write all of it")
    os.environ["TRITON_ALWAYS_COMPILE"] = "1"  # so that the seconds are those of a first call
    rows = {job: kernels for job, kernels in zip(jobs, compile_all(jobs), strict=True)}
    for (case, target, _), kernel in table.items():
        if (case, target) in JOBS and (case, target) not in jobs:
            rows.setdefault((case, target), []).append(kernel)
    with TABLE.open("w", newline="") as file:
        file.write(f"# triton {triton.__version__}\n")
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("case", "target", *COLUMNS))
        for job in JOBS:
            for kernel in rows.get(job, []):
                writer.writerow((*job, *kernel[: len(COLUMNS) - 1], f"{kernel.seconds:.1f}"))


def worse(got: Usage, want: Usage) -> list[str]:
    """Where ``got`` uses more resources than ``want``. Registers are allocated in groups of eight; smaller increases
    are free."""
    out = []
    if -(-got.registers // 8) > -(-want.registers // 8):
        out.append(f"{got.registers} registers a thread where the table has {want.registers}")
    if got.shared > want.shared:
        out.append(f"{got.shared} bytes of shared memory where the table has {want.shared}")
    if got.wide * want.loads < want.wide * got.loads:
        out.append(
            f"{got.wide} of {got.loads} global loads are of 128 bits where the table has {want.wide} of {want.loads}"
        )
    return out


# Loads per exponential in a class loop. A teacher of another size has four separate corners per label pixel. Binary
# cross-entropy has a target and possibly a weight, the gradient of Dice's sums up to four numbers per class.
MOST_LOADS = {
    "resized-kd-19-elsewhere": 4.1,
    "resized-kd-sigmoid-19-elsewhere": 2.6,
    "resized-bce-150": 1.3,
    "resized-bce-150-forward": 1.3,
    "resized-bce-19-weighted": 1.4,
    "resized-dice-150-backward": 0.45,
    "resized-dice-19-square-backward": 0.45,
}
# Limit on the processor time, in seconds, to compile the kernels of a first call on a busy machine. On an idle 2.5 GHz
# core: cross-entropy 2.3, KD 2.7, RDD's mask 3.6, KD with labels and weights 4.6 including Triton's own startup.
FIRST_CALL = 5.0


def faults(got: Usage, case: str) -> list[str]:
    """Faults under any Triton version."""
    out = []
    if got.spilled:
        out.append(f"{got.kernel} spills {got.spilled} bytes a thread (it has {got.registers} registers)")
    if by_cells(got.kernel):
        if got.converts:
            out.append(f"{got.kernel} converts layouts {got.converts} times")
        if got.shared:
            out.append(f"{got.kernel} takes {got.shared} bytes of shared memory")
        if not 0 < got.loop_loads < MOST_LOADS.get(case, 0.3):
            out.append(f"{got.kernel} has {got.loop_loads} loads for an exponential in a class loop")
        if got.loops:
            out.append(f"{got.kernel} has in a class loop: {got.loops}")
    return out


def complaints(case: str, target: str, kernels: list[Usage]) -> list[str]:
    """Faults of the kernels of a case, and regressions from a table of this Triton version."""
    version, table = read_table()
    out = []
    for got in kernels:
        out += faults(got, case)
        want = table.get((case, target, got.kernel))
        if want is None:
            out.append(f"{got.kernel} has no row in the table; {REWRITE}")
        elif version == triton.__version__:
            out += [f"{got.kernel} takes {what}; {REWRITE}" for what in worse(got, want)]
    return out


@pytest.mark.parametrize("target", [t if t == "sm_90" else pytest.param(t, marks=pytest.mark.slow) for t in TARGETS])
def test_kernels_keep_what_they_have(target):
    """All cases in one test, so that the compilers run in parallel."""
    jobs = [job for job in JOBS if job[1] == target]
    found = []
    for (case, _), kernels in zip(jobs, compile_all(jobs), strict=True):
        assert kernels
        assert all(kernel.registers > 0 for kernel in kernels)
        assert any(kernel.loads > 0 for kernel in kernels)
        found += [f"{case}: {text}" for text in complaints(case, target, kernels)]
    assert not found, f"{target}:\n" + "\n".join(found)


def test_loop_gate_fails():
    """A loop with each fault, in both kinds of code, and one without faults."""
    for kind, load, exponential, store, multiply, label, branch in (
        ("ptx", "ld.global.b32 %r1, [%rd1];", "ex2.approx.ftz.f32 %f1, %f2;", "st.shared.b32 [%r1], %r2;",
         "mul.lo.s64 %rd1, %rd2, %rd3;", "$L1:", "@%p1 bra $L1;"),
        ("amdgcn", "global_load_dword v1, v[2:3], off", "v_exp_f32_e32 v1, v2", "ds_write_b32 v1, v2",
         "v_mad_u64_u32 v[0:1], s[2:3], v4, v5, v[6:7]", ".LBB0_1:", "s_cbranch_scc1 .LBB0_1"),
    ):  # fmt: skip

        def loop(*body: str, label=label, branch=branch, kind=kind) -> Loop:
            (found,) = class_loops("\n".join((label, *body, branch)), CODE[kind], 16)
            return found

        lean = [load] * 4 + [exponential] * 16
        assert loop(*lean) == Loop(4, 16, True, [])
        assert loop(*lean, store).faults == ["shared memory"]
        assert loop(*lean, multiply).faults == ["64-bit multiplications"]
        assert not loop(load, exponential).several
    one = Usage("resized_kd._kd", 100, 0, 0, 40, 0, 66, 0, 0.25, 1.0)
    assert not faults(one, "resized-kd-150")
    assert len(faults(one._replace(loop_loads=0.3), "resized-kd-150")) == 1
    assert len(faults(one._replace(loop_loads=0.0), "resized-kd-150")) == 1  # no class loop was found
    assert len(faults(one._replace(loops="shared memory"), "resized-kd-150")) == 1


def test_every_kernel_has_a_row():
    _, table = read_table()
    assert {(case, target) for case, target, _ in table} == set(JOBS), REWRITE
    (case, target, _), want = next(iter(table.items()))
    assert not complaints(case, target, [want])
    (complaint,) = complaints(case, target, [want._replace(kernel=f"{want.kernel}#9")])
    assert "has no row" in complaint


def first_calls(table: dict[tuple[str, str, str], Usage]) -> dict[tuple[str, str], float]:
    """(case, target) -> seconds to compile its kernels."""
    out: dict[tuple[str, str], float] = {}
    for (case, target, _), kernel in table.items():
        out[case, target] = out.get((case, target), 0.0) + kernel.seconds
    return out


def test_a_first_call_compiles_in_seconds():
    """According to the table, and the slowest sm_90 case measured again."""
    _, table = read_table()
    seconds = first_calls(table)
    assert {job: time for job, time in seconds.items() if time > FIRST_CALL} == {}
    slowest = max((job for job in seconds if job[1] == "sm_90"), key=seconds.__getitem__)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_ALWAYS_COMPILE", "1")
        (kernels,) = compile_all([slowest])
    now = sum(kernel.seconds for kernel in kernels)
    print(f"{slowest[0]}: {now:.1f} s, in the table {seconds[slowest]:.1f} s")
    assert now < 1.5 * FIRST_CALL


@pytest.fixture(scope="module")
def spoilt() -> list[list[Usage]]:
    """Tiles 8 times too large; few and many label pixels per lane."""
    forward = ("resized-ce-150-forward", "sm_90", None)
    return compile_all([("cwd-split", "sm_90", 8 * tiles.TILE), (*forward, (1, 4)), (*forward, (8, 9))])


def test_gate_fails_on_a_spill(spoilt, monkeypatch):
    """The table's kernel does not spill: under this Triton version and under another."""
    job = ("cwd-split", "sm_90")
    spills = [text for text in complaints(*job, spoilt[0]) if "cwd._forward spills" in text]
    assert len(spills) == 1
    monkeypatch.setattr(triton, "__version__", "0.0")
    assert spills[0] in complaints(*job, spoilt[0])


def test_gate_fails_on_other_parts_of_a_cell(spoilt):
    """Few label pixels per lane mean too many loads per exponential; many exceed the registers."""
    for kernels, what in zip(spoilt[1:], ("loads for an exponential", "spills"), strict=True):
        assert any(what in text for kernel in kernels for text in faults(kernel, "resized-ce-150-forward"))


def test_gate_names_the_number_that_moved(monkeypatch):
    version, table = read_table()
    monkeypatch.setattr(triton, "__version__", version)
    job, want = ("cwd-split", "sm_90"), table["cwd-split", "sm_90", "cwd._forward"]
    assert want.wide > 0
    assert not worse(want, want)
    for change, text in (
        (
            {"registers": want.registers + 8},
            f"{want.registers + 8} registers a thread where the table has {want.registers}",
        ),
        ({"shared": want.shared + 1}, f"{want.shared + 1} bytes of shared memory where the table has {want.shared}"),
        ({"wide": 0}, f"0 of {want.loads} global loads are of 128 bits where the table has {want.wide} of"),
    ):
        (complaint,) = worse(want._replace(**change), want)
        assert text in complaint
    assert "python -m tests.test_aot" in complaints(*job, [want._replace(shared=want.shared + 1)])[0]
    cells = want._replace(kernel="resized_kd._kd#2", converts=1, shared=4, loop_loads=0.25)
    assert len(faults(cells, "resized-kd-150")) == 2


if __name__ == "__main__":
    if unknown := set(sys.argv[1:]) - CASES.keys() - TARGETS.keys():
        sys.exit(f"neither a case nor a target: {', '.join(sorted(unknown))}")
    cases, targets = (list(filter(sys.argv[1:].__contains__, names)) or list(names) for names in (CASES, TARGETS))
    write_table([(case, target) for case in cases for target in targets])

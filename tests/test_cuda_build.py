"""Inspects the CUDA library without a GPU: machine code per architecture, registers, stack, expected instructions.

``python -m tests.test_cuda_build > tests/cuda_registers.txt`` rewrites the table of registers for the installed
toolkit. Another version may need different numbers; the test for spills holds for any.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from bisect import bisect_left, bisect_right
from collections import Counter
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import pytest

import fastkd

LIBRARY = Path(fastkd.__file__).with_name("_cuda.so")
TABLE = Path(__file__).with_name("cuda_registers.txt")
ARCHS = os.environ.get("FASTKD_CUDA_ARCHS", "80 90 100").split()
FIRST = "90" if "90" in ARCHS else ARCHS[0]

pytestmark = [
    pytest.mark.skipif(
        os.environ.get("FASTKD_CUDA") == "0" or os.environ.get("FASTKD_BUILD") == "0",
        reason="FASTKD_CUDA=0 or FASTKD_BUILD=0: built without the CUDA kernels",
    ),
    pytest.mark.skipif(not LIBRARY.is_file() and shutil.which("nvcc") is None, reason="there is no nvcc to build them"),
]


def cuobjdump(*options: str) -> str:
    knobs = pytest.importorskip("triton.knobs", reason="Triton's wheel has the disassembler")
    return subprocess.check_output([knobs.nvidia.cuobjdump.path, *options, str(LIBRARY)], text=True)


def readable(symbol: str) -> str:
    """A kernel's body and type from its mangled name, e.g. ``NfdMerge<f>``."""
    body, arguments = re.search(r"3runINS0_\d+([A-Za-z]+?)(?:I(.*?))?E+vT_", symbol).groups()
    if body == "Cells":  # loss, its type, shape, and whether it computes the gradient
        loss, flags = re.search(r"\d+([A-Za-z]+?)(?:Loss)?I[fd](.*?)E+Li", arguments).groups()
        rows, columns, gradient = re.search(r"Li(\d)ELi(\d)ELb(\d)", arguments).groups()
        marks = "".join({"Lb1": "+", "Lb0": "-"}.get(flag, "") for flag in re.findall(r"Lb\d", flags))
        kind = "fp64" if re.search(r"I[d]", arguments) else "fp32"
        return f"{loss}{marks}{rows}x{columns}{'-gradient' if gradient == '1' else ''}-{kind}"
    if cells := re.fullmatch(r"([fd])((?:Lb\dE)*)Li(\d)ELi(\d)E?(?:Lb(\d))?", arguments or ""):  # own parameters
        kind, flags, rows, columns, gradient = cells.groups()
        marks = "".join("+" if flag == "1" else "-" for flag in re.findall(r"Lb(\d)", flags))
        end = f"{'-gradient' if gradient == '1' else ''}-{'fp64' if kind == 'd' else 'fp32'}"
        return f"{body.removeprefix('Cells')}{marks}{rows}x{columns}{end}"
    plain = {"KdTiles": "0", "CellsPrepare": "1"}  # flag value whose kernel has the plain name
    if body in plain:
        arguments, flag = re.fullmatch(r"(.*?)E?Lb(\d)", arguments).groups()
        if flag != plain[body]:
            body += "Sigmoid" if body == "KdTiles" else "Each"
    kinds = {"f": "fp32", "d": "fp64", "6__half": "fp16", "13__nv_bfloat16": "bf16", "NS0_3AnyE": "any"}
    kind = next((name for mark, name in kinds.items() if arguments and arguments.startswith(mark)), "")
    return f"{body}-{kind}" if kind else body


@lru_cache
def resources() -> dict[tuple[str, str], tuple[int, int]]:
    """(kernel, architecture) -> (registers, bytes of stack and local memory)."""
    out, arch = {}, ""
    for line in cuobjdump("-res-usage").splitlines():
        if found := re.match(r"arch = (sm_\d+)", line):
            arch = found[1]
        elif found := re.match(r" Function (\S+):", line):
            name = found[1]
        elif "REG:" in line and "3runI" in name:
            registers, stack, local = (int(re.search(rf"{what}:(\d+)", line)[1]) for what in ("REG", "STACK", "LOCAL"))
            out[readable(name), arch] = (registers, stack + local)
    return out


@pytest.fixture(
    scope="module",
    params=[pytest.param(f"sm_{a}", marks=() if a == FIRST else pytest.mark.slow) for a in ARCHS],
)
def arch(request):
    """Orders tests by architecture, so that each is disassembled once; `make test` disassembles one."""
    return request.param


@lru_cache(maxsize=1)
def disassembled(arch: str) -> dict[str, str]:
    """kernel -> its SASS."""
    parts = cuobjdump("-sass", "-arch", arch).split("Function : ")[1:]
    return {readable(name): part for part in parts if "3runI" in (name := part.split(None, 1)[0])}


def instructions(arch: str, kernel: str) -> Counter:
    """Number of occurrences of each SASS instruction in a kernel."""
    return Counter(INSTRUCTION_NAME.findall(disassembled(arch)[kernel]))


class Loop(NamedTuple):
    """An innermost loop with exponentials: its number of instructions per kind."""

    exponentials: int
    instructions: int
    loads: int
    shared: int
    local: int
    shuffles: int


INSTRUCTION_NAME = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\d+ )?([A-Z0-9_.]+)", re.M)
INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]*)([^;]*);", re.M)


def class_loops(sass: str) -> list[Loop]:
    """Loops over the classes of a kernel: backward branches over at least 8 ``MUFU.EX2`` with no such loop inside."""
    code = [(int(at, 16), name, rest) for at, name, rest in INSTRUCTION.findall(sass)]
    exponentials = [at for at, name, _ in code if name.startswith("MUFU.EX2")]

    def within(begin: int, end: int) -> int:
        return bisect_right(exponentials, end) - bisect_left(exponentials, begin)

    spans = []
    for at, name, rest in code:
        if name.startswith("BRA") and (target := re.search(r"0x([0-9a-f]+)", rest)) and int(target[1], 16) <= at:
            spans.append((int(target[1], 16), at))
    out = []
    for begin, end in spans:
        if within(begin, end) < 4:
            continue
        if any(begin <= a and b <= end and (a, b) != (begin, end) and within(a, b) for a, b in spans):
            continue
        names = [name for at, name, _ in code if begin <= at <= end]

        def counted(*starts: str, names: list[str] = names) -> int:
            return sum(name.startswith(starts) for name in names)

        out.append(
            Loop(
                counted("MUFU.EX2"), len(names), counted("LDG"), counted("LDS", "STS"), counted("LDL", "STL"),
                counted("SHFL"),
            )
        )  # fmt: skip
    return out


def cells_code(arch: str) -> dict[str, str]:
    """kernel -> SASS, for the losses at label resolution."""
    return {kernel: sass for kernel, sass in disassembled(arch).items() if re.search(r"\dx\d.*-fp32", kernel)}


# Limits per exponential in the class loops: loads (the four corners, and weights or upstream gradients of a class) and,
# for large shapes, instructions (the exponential unit hides 8). A sigmoid also evaluates the polynomial of a logarithm,
# in one loop for loss and gradient. Binary cross-entropy's loop includes the resize of per-class weights, which other
# calls do not run: it has no limit.
LEAN = {"Dice": (0.35, 13.0), "ShapedCrossEntropy": (0.35, 9.5), "KdSigmoid": (0.3, 32.0), "Binary": (99.0, 999.0)}
ONE_LOOP = ("KdSigmoid", "Binary")


def loop_faults(kernel: str, sass: str) -> list[str]:
    """Faults in the class loops of a kernel at label resolution."""
    loops, faults = class_loops(sass), []
    loss, rows, columns = re.match(r"([A-Za-z]+)[+-]*(\d)x(\d)", kernel).groups()
    pixels, (loads, instructions) = int(rows) * int(columns), LEAN.get(loss, (0.3, 9.5))
    wanted = 2 if "gradient" in kernel and loss not in ONE_LOOP else 1
    if len(loops) < wanted:
        faults.append(f"{len(loops)} class loops, expected {wanted}")
    for loop in loops:
        if pixels >= 16 and loop.loads >= loads * loop.exponentials:
            faults.append(f"{loop.loads} loads for {loop.exponentials} exponentials")
        if loop.shared or loop.local:
            faults.append(f"{loop.shared} accesses to shared and {loop.local} to local memory")
        if pixels >= 32 and loop.instructions > instructions * loop.exponentials:
            faults.append(f"{loop.instructions} instructions for {loop.exponentials} exponentials")
    return faults


def toolkit() -> str | None:
    nvcc = shutil.which("nvcc")
    return nvcc and re.search(r"release \S+", subprocess.check_output([nvcc, "--version"], text=True))[0].strip(",")


def registers_table() -> str:
    kernels = sorted({kernel for kernel, _ in resources()})
    lines = [f"nvcc {toolkit()}", f"{'kernel':<37}" + "".join(f"{'sm_' + arch:>8}" for arch in ARCHS)]
    for kernel in kernels:
        lines.append(f"{kernel:<37}" + "".join(f"{resources()[kernel, 'sm_' + arch][0]:>8}" for arch in ARCHS))
    return "\n".join(lines) + "\n"


def test_is_built():
    """With nvcc installed, the other tests here must not pass vacuously without the library."""
    assert LIBRARY.is_file(), "nvcc is installed but the CUDA kernels were not built: see the build's output"


def test_every_architecture_has_code_and_the_last_one_ptx():
    listing = cuobjdump("-lelf", "-lptx")
    assert {f"sm_{arch}" for arch in ARCHS} <= set(re.findall(r"ELF file.*(sm_\d+)\.cubin", listing))
    assert f"sm_{ARCHS[-1]}" in re.findall(r"PTX file.*(sm_\d+)\.ptx", listing)
    kernels = {kernel for kernel, _ in resources()}
    assert len(kernels) >= 70
    assert set(resources()) == {(kernel, f"sm_{arch}") for kernel in kernels for arch in ARCHS}


def test_nothing_is_spilled():
    """Spilled registers and dynamically indexed arrays use the stack."""
    spilled = {key: stack for key, (_, stack) in resources().items() if stack}
    assert not spilled


def test_registers_are_those_of_the_table():
    """Shows the effect of a kernel change on its registers, for every architecture."""
    first, header, *lines = TABLE.read_text().splitlines()
    if first != f"nvcc {toolkit()}":
        pytest.skip(f"the table is of {first}, installed is {toolkit()}")
    archs = header.split()[1:]
    table = {(row[0], arch): n for row in map(str.split, lines) for arch, n in zip(archs, row[1:], strict=True)}
    now = {key: registers for key, (registers, _) in resources().items() if key[1] in archs}
    expected = {key: int(n) for key, n in table.items() if key[1][3:] in ARCHS}
    assert now == expected, "to accept them: python -m tests.test_cuda_build > tests/cuda_registers.txt"


def test_one_read_uses_the_copy_engine_and_clusters(arch):
    if int(arch[3:]) < 90:
        assert count(instructions(arch, "NfdOneReadRows-bf16"), "LDG") == 0  # an empty kernel: no clusters
        return
    for kind in ("fp32", "fp16", "bf16"):
        rows = instructions(arch, f"NfdOneReadRows-{kind}")
        assert rows["UBLKCP.S.G"] == 2, "bulk copies of S and of T"
        assert 1 <= count(rows, "SYNCS.PHASECHK") <= 2, "a wait for an mbarrier, and its retry"
        assert count(rows, "UCGABAR_ARV") == count(rows, "UCGABAR_WAIT") == 2
        assert count(rows, "LDS.128") >= 4, "shared memory is read 16 bytes at a time"
        assert count(rows, "STG.E.128") >= 1, "the gradient is written 16 bytes at a time"


def test_class_loops_are_lean(arch):
    """Fewer than 0.3 loads per exponential, no shared or local memory, instructions within what exponentials hide."""
    kernels = cells_code(arch)
    assert len(kernels) >= 30
    faults = {kernel: faults for kernel, sass in kernels.items() if (faults := loop_faults(kernel, sass))}
    assert not faults


def test_class_loops_are_found_and_faults_are_seen():
    def sass(*body: str) -> str:
        lines = ["MOV R1, c[0x0][0x28]", *body, "BRA 0x10", "EXIT"]
        return "\n".join(f"        /*{16 * i:04x}*/                   {line} ;" for i, line in enumerate(lines))

    lean = ["LDG.E R2, [R4.64]"] * 4 + ["FFMA R3, R3, R3, R3", "MUFU.EX2 R3, R3", "FADD R5, R5, R3"] * 32
    assert class_loops(sass(*lean)) == [Loop(32, 4 + 96 + 1, 4, 0, 0, 0)]
    assert loop_faults("KdLoss4x8-fp32", sass(*lean)) == []
    assert loop_faults("KdLoss4x8-gradient-fp32", sass(*lean)) == ["1 class loops, expected 2"]
    for fault in ("LDS R2, [R3]", "STL [R1], R2"):
        assert "local memory" in loop_faults("KdLoss4x8-fp32", sass(*lean, fault))[0]
    assert "loads" in loop_faults("KdLoss4x8-fp32", sass(*lean, *["LDG.E R2, [R4.64]"] * 8))[0]
    assert "instructions" in loop_faults("KdLoss4x8-fp32", sass(*lean, *["IADD3 R2, R3, R4, R5"] * 250))[0]


def test_vectors_are_16_bytes(arch):
    for kind in ("fp32", "fp16", "bf16"):
        for kernel in ("NfdForwardRows", "NfdForwardColumns", "NfdBackwardRows", "NfdBackwardColumns"):
            code = instructions(arch, f"{kernel}-{kind}")
            loads = count(code, "LDG.E.128")
            assert loads >= 4, f"{kernel}: 16-byte loads of S and T, tiles and remainders: {loads}"
            if "Backward" in kernel:
                assert count(code, "STG.E.128") >= 2
        tiles = instructions(arch, f"KdTiles-{kind}")
        assert count(tiles, "LDGSTS.E.BYPASS.128") >= 4, "16-byte copies of S and T to shared memory, both layouts"
        assert count(tiles, "STG.E.128") >= 2, "16-byte stores of the gradient, for any unrolling"
    for kernel in ("KthCount-fp32", "KthCount-fp64", "BinaryCodes"):
        assert count(instructions(arch, kernel), "LDG.E.128") >= 4, f"{kernel}: loads in flight together"


@pytest.mark.skipif("100" not in ARCHS, reason="FASTKD_CUDA_ARCHS is without 100")
def test_ptx_has_the_instructions_meant():
    ptx = cuobjdump("-ptx")
    for instruction in (
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes",
        "mbarrier.init.shared::cta.b64",
        "mbarrier.arrive.expect_tx.shared::cta.b64",
        "mbarrier.try_wait.parity.shared::cta.b64",
        "barrier.cluster.arrive.release.aligned",
        "barrier.cluster.wait.acquire.aligned",
        "mapa.u64",
        "cp.async.cg.shared.global",
    ):
        assert instruction in ptx
    assert not atomic_faults(ptx)


def atomic_faults(ptx: str) -> list[str]:
    """Atomics other than additions of integers in the counts of the k-th smallest: sums of values would vary between
    runs."""
    return [
        f"{kernel.split('(')[0]}: {name}"
        for kernel in re.split(r"\.entry\s+", ptx)[1:]
        for name in re.findall(r"\b(?:atom|red)\.\S+", kernel)
        if "KthCount" not in kernel.split("(")[0] or not re.search(r"\.shared\.add\.u32$|\.global\.add\.u64$", name)
    ]


def test_atomics_on_values_are_seen():
    def ptx(kernel: str, instruction: str) -> str:
        return f".visible .entry {kernel}(\n.param .u64 p\n)\n{{\n{instruction} [%rd1], %r1;\nret;\n}}\n"

    counts = ptx("run_KthCount", "red.shared.add.u32") + ptx("run_KthCount", "atom.global.add.u64 \t%rd2,")
    assert atomic_faults(counts) == []
    for kernel, instruction in (
        ("run_KthCount", "red.global.add.f32"),
        ("run_KthCount", "red.shared.add.f64"),
        ("run_KthCount", "atom.global.cas.b64"),
        ("run_Total", "red.shared.add.u32"),
        ("run_Total", "atom.global.add.u64"),
    ):
        assert atomic_faults(counts + ptx(kernel, instruction)) == [f"{kernel}: {instruction}"]


def count(code: Counter, prefix: str) -> int:
    return sum(n for name, n in code.items() if name.startswith(prefix))


if __name__ == "__main__":
    print(registers_table(), end="")

"""The CUDA library, read without a GPU: machine code for every architecture, registers, stack, the instructions meant.

``python -m tests.test_cuda_build > tests/cuda_registers.txt`` writes the table of registers anew, for the toolkit that is
installed. A toolkit of another version may use others; that nothing is spilled holds for any.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from functools import lru_cache
from pathlib import Path

import pytest

import fastkd

LIBRARY = Path(fastkd.__file__).with_name("_cuda.so")
TABLE = Path(__file__).with_name("cuda_registers.txt")
ARCHS = os.environ.get("FASTKD_CUDA_ARCHS", "80 86 89 90 100").split()

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
    """A kernel's body and type from its mangled name: ``NfdMerge<f>``."""
    body, arguments = re.search(r"3runINS0_\d+([A-Za-z]+?)(?:I(.*?))?E+vT_", symbol).groups()
    kinds = {"f": "fp32", "d": "fp64", "6__half": "fp16", "13__nv_bfloat16": "bf16", "NS0_3AnyE": "any"}
    kind = next((name for mark, name in kinds.items() if arguments and arguments.startswith(mark)), "")
    if resized := re.search(r"Li(\d)ELb(\d)", arguments or ""):  # sides, and whether it holds the logits
        body += resized[1] + ("" if resized[2] == "1" else "Afar")
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


@lru_cache
def instructions(arch: str) -> dict[str, Counter]:
    """kernel -> how often each SASS instruction stands in it."""
    out: dict[str, Counter] = {}
    for part in cuobjdump("-sass", "-arch", arch).split("Function : ")[1:]:
        if "3runI" in (name := part.split(None, 1)[0]):
            out[readable(name)] = Counter(re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\d+ )?([A-Z0-9_.]+)", part, re.M))
    return out


def toolkit() -> str | None:
    nvcc = shutil.which("nvcc")
    return nvcc and re.search(r"release \S+", subprocess.check_output([nvcc, "--version"], text=True))[0].strip(",")


def registers_table() -> str:
    kernels = sorted({kernel for kernel, _ in resources()})
    lines = [f"nvcc {toolkit()}", f"{'kernel':<28}" + "".join(f"{'sm_' + arch:>8}" for arch in ARCHS)]
    for kernel in kernels:
        lines.append(f"{kernel:<28}" + "".join(f"{resources()[kernel, 'sm_' + arch][0]:>8}" for arch in ARCHS))
    return "\n".join(lines) + "\n"


def test_is_built():
    """Where nvcc is there, everything else here would pass in vain without the library."""
    assert LIBRARY.is_file(), "nvcc is there and the CUDA kernels were not built: see the build's output"


def test_every_architecture_has_code_and_the_last_one_ptx():
    listing = cuobjdump("-lelf", "-lptx")
    assert {f"sm_{arch}" for arch in ARCHS} <= set(re.findall(r"ELF file.*(sm_\d+)\.cubin", listing))
    assert f"sm_{ARCHS[-1]}" in re.findall(r"PTX file.*(sm_\d+)\.ptx", listing)
    kernels = {kernel for kernel, _ in resources()}
    assert len(kernels) >= 48
    assert set(resources()) == {(kernel, f"sm_{arch}") for kernel in kernels for arch in ARCHS}


def test_nothing_is_spilled():
    """A spilled register, or an array that is indexed while running, lives on the stack."""
    spilled = {key: stack for key, (_, stack) in resources().items() if stack}
    assert not spilled


def test_registers_are_those_of_the_table():
    """A change of a kernel shows here what it does to its registers, on every architecture."""
    first, header, *lines = TABLE.read_text().splitlines()
    if first != f"nvcc {toolkit()}":
        pytest.skip(f"the table is of {first}, installed is {toolkit()}")
    archs = header.split()[1:]
    table = {(row[0], arch): int(n) for row in map(str.split, lines) for arch, n in zip(archs, row[1:], strict=True)}
    now = {key: registers for key, (registers, _) in resources().items()}
    expected = {key: n for key, n in table.items() if key[1][3:] in ARCHS}
    assert now == expected, "to accept them: python -m tests.test_cuda_build > tests/cuda_registers.txt"


@pytest.mark.skipif("90" not in ARCHS, reason="FASTKD_CUDA_ARCHS is without 90")
@pytest.mark.parametrize("arch", [arch for arch in ("sm_90", "sm_100") if arch[3:] in ARCHS])
def test_one_read_uses_the_copy_engine_and_clusters(arch):
    code = instructions(arch)
    for kind in ("fp32", "fp16", "bf16"):
        rows, columns = code[f"NfdOneReadRows-{kind}"], code[f"NfdOneReadColumns-{kind}"]
        assert rows["UBLKCP.S.G"] == 2, "bulk copies of S and of T"
        assert 1 <= count(rows, "SYNCS.PHASECHK") <= 2, "a wait for an mbarrier, and its retry"
        assert count(columns, "LDGSTS.E.BYPASS.128") == 2
        for one_read in (rows, columns):
            assert count(one_read, "UCGABAR_ARV") == count(one_read, "UCGABAR_WAIT") == 2
            assert count(one_read, "LDS.128") >= 4, "shared memory is read 16 bytes at a time"
            assert count(one_read, "STG.E.128") >= 1, "and so is the gradient written"


@pytest.mark.parametrize("arch", [f"sm_{arch}" for arch in ARCHS])
def test_vectors_are_16_bytes(arch):
    code = instructions(arch)
    for kind in ("fp32", "fp16", "bf16"):
        for kernel in ("NfdForwardRows", "NfdForwardColumns", "NfdBackwardRows", "NfdBackwardColumns"):
            loads = count(code[f"{kernel}-{kind}"], "LDG.E.128")
            assert loads >= 4, f"{kernel} loads tiles of S and T, and what is left, in 16 bytes: {loads}"
            if "Backward" in kernel:
                assert count(code[f"{kernel}-{kind}"], "STG.E.128") >= 2
        tiles = code[f"KdTiles-{kind}"]
        assert count(tiles, "LDGSTS.E.BYPASS.128") >= 4, "S and T of both layouts go to shared memory in 16 bytes"
        assert count(tiles, "STG.E.128") >= 2, "and the gradient out of it, however often the loop is unrolled"
    for sides in (1, 2):
        held, afar = (code[f"ResizedTiles{sides}{where}-any"] for where in ("", "Afar"))
        assert count(held, "LDG") < count(afar, "LDG"), "logits are loaded in one place, into shared memory"
        assert not any(count(kernel, atomic) for kernel in (held, afar) for atomic in ("ATOM", "RED."))
    if int(arch[3:]) < 90:
        assert all(count(code[f"{name}-bf16"], "LDG") == 0 for name in ("NfdOneReadRows", "NfdOneReadColumns"))


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
    assert not re.search(r"\b(atom|red)\.", ptx), "atomics would make the order of sums a matter of luck"


def count(code: Counter, prefix: str) -> int:
    return sum(n for name, n in code.items() if name.startswith(prefix))


def test_schemas_are_those_of_python():
    """The library loads beside a CUDA build of torch even where there is no GPU."""
    code = f"""
import torch
from fastkd.ops._registry import families, schemas
torch.ops.load_library({str(LIBRARY)!r})
names = [schema for family in families() for schema, _ in schemas(family, "cuda")]
assert len(names) == 17
for schema in names:
    got = str(getattr(torch.ops.fastkd_cuda, schema.partition("(")[0]).default._schema)
    assert got == f"fastkd_cuda::{{schema}}", got
print("same")
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout.strip() == "same", run.stderr


if __name__ == "__main__":
    print(registers_table(), end="")

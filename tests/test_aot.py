"""Every Triton kernel, compiled ahead of time for each GPU generation with no GPU, must keep what it has.

The launchers run on meta tensors with a stand-in for ``launch`` that compiles: so what is compiled is what they would
run, at the blocks, types and argument specialisations they pick. Registers, shared memory and the share of 128-bit global
loads are compared with tests/aot_table.csv, and nothing may spill; under another Triton than the table's only the spills
are checked. A new kernel is one line in CASES. Where a change of the table is meant:

    python -m tests.test_aot        # compiles everything and writes the table
"""

from __future__ import annotations

import csv
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels cannot be compiled in the interpreter", allow_module_level=True)

import triton
from fastkd.kernels import cwd, kd, nfd, rdd, resized_cross_entropy, resized_kd, tiles
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

TABLE = Path(__file__).with_name("aot_table.csv")
REWRITE = "if this is meant, `python -m tests.test_aot` writes the table anew"
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
NCHW, NHWC = torch.contiguous_format, torch.channels_last
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


class Usage(NamedTuple):
    """What one compiled kernel takes. A case may compile a kernel more than once; ``kernel`` is numbered then."""

    kernel: str
    registers: int  # a thread
    shared: int  # bytes a program
    spilled: int  # bytes a thread
    loads: int  # global load instructions
    wide: int  # those of 128 bits and more


class Target:
    """As much of a Triton driver as compiling needs."""

    def __init__(self, name: str):
        self.name = name

    def get_current_device(self) -> str:
        return self.name

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return TARGETS[self.name]


def maps(shape, layout, student, teacher):
    """Student and teacher of ``shape`` that hold no memory."""
    return tuple(torch.empty(shape, dtype=d, device="meta").to(memory_format=layout) for d in (student, teacher))


def run_nfd(dims, *map_):
    s, t = maps(*map_)
    loss, stats = nfd.forward(s, t, dims, 1e-5)
    nfd.backward(loss, s, t, stats, dims)


def run_kd(per_pixel, target, weight, *map_):
    s, t = maps(*map_)
    shape = (s.shape[0], *s.shape[2:])
    target = target and torch.empty(shape, dtype=target, device="meta")
    weight = torch.empty(shape, device="meta") if weight else None
    loss, _ = kd.forward(s, t, target, weight, 2.0, 255, per_pixel)
    kd.backward(loss, s, t, target, weight, 2.0, 255)


def run_cwd(*map_):
    s, t = maps(*map_)
    loss, stats = cwd.forward(s, t, 4.0)
    cwd.backward(loss, s, t, stats, 4.0)


def run_cross_entropy(shape, layout, dtype, size, label, class_weight=False, pixel_weight=None, mask=False):
    """Forward per pixel, and the gradient."""
    logits, _ = maps(shape, layout, dtype, dtype)
    n, c, _, _ = shape
    meta = {"device": "meta"}
    args = (
        torch.empty((n, *size), dtype=label, **meta),
        torch.empty(c, **meta) if class_weight else None,
        torch.empty((n, *pixel_weight), **meta) if pixel_weight else None,
        torch.empty((n, *size), dtype=torch.bool, **meta) if mask else None,
    )
    resized_cross_entropy.forward(logits, *args, 255, False, True)
    resized_cross_entropy.gradient(logits, *args, 255, False)


def run_resized_kd(shape, teacher_size, layout, dtype, size, label=None, pixel_weight=False):
    """Forward per pixel, and the gradient."""
    n, c, _, _ = shape
    student, _ = maps(shape, layout, dtype, dtype)
    teacher, _ = maps((n, c, *teacher_size), layout, dtype, dtype)
    target = torch.empty((n, *size), dtype=label, device="meta") if label else None
    weight = torch.empty((n, *size), device="meta") if pixel_weight else None
    args = (student, teacher, target, weight, *size, 2.0, 255, False)
    resized_kd.forward(*args, True)
    resized_kd.gradient(*args)


def run_heads(shape, layout, dtype):
    """TFE's KD and confidence of the teacher's heads, and the confidence alone."""
    student, teacher = maps(shape, layout, dtype, dtype)
    rdd.kd_with_confidence(student, teacher, teacher, "aux_main")
    rdd.teacher_confidence(student, teacher, "main_aux")


def run_mask(shape, layout, dtype, size, label, confidence, min_kept):
    student, teacher = maps(shape, layout, dtype, dtype)
    target = torch.empty((shape[0], *size), dtype=label, device="meta")
    rdd.difficulty_mask(student, teacher, target, 0.7, min_kept, confidence, "xor", 255, True)


I64, U8 = torch.int64, torch.uint8
CASES: dict[str, Callable[[], None]] = {
    # Few large planes (split), many small ones, the groups that span the batch, a pixel or a sample; odd sizes.
    "nfd-hw-split": lambda: run_nfd("hw", (1, 512, 256, 512), NCHW, BF16, BF16),
    "nfd-hw-fp32": lambda: run_nfd("hw", (8, 512, 64, 128), NCHW, F32, F32),
    "nfd-hw-odd": lambda: run_nfd("hw", (2, 19, 45, 45), NCHW, F16, F32),
    "nfd-hw-nhwc": lambda: run_nfd("hw", (8, 512, 64, 128), NHWC, BF16, BF16),
    "nfd-nhw-nhwc-fp32": lambda: run_nfd("nhw", (8, 512, 64, 128), NHWC, F32, F32),
    "nfd-c": lambda: run_nfd("c", (8, 512, 64, 128), NCHW, F32, F32),
    "nfd-c-nhwc": lambda: run_nfd("c", (8, 512, 64, 128), NHWC, F16, F16),
    "nfd-chw": lambda: run_nfd("chw", (8, 512, 64, 128), NCHW, BF16, F32),
    # Cityscapes and ADE20K logits, with and without labels and weights; 4096 classes.
    "kd-19-fp32": lambda: run_kd(False, None, False, (8, 19, 64, 128), NCHW, F32, F32),
    "kd-19-label": lambda: run_kd(False, torch.int64, True, (8, 19, 512, 1024), NCHW, F16, F16),
    "kd-150-nhwc": lambda: run_kd(True, torch.uint8, False, (16, 150, 64, 64), NHWC, BF16, BF16),
    "kd-4096": lambda: run_kd(False, torch.int32, False, (2, 4096, 32, 32), NCHW, BF16, F32),
    "kd-4096-nhwc-fp32": lambda: run_kd(False, None, True, (2, 4096, 32, 32), NHWC, F32, F32),
    "cwd-19": lambda: run_cwd((8, 19, 64, 128), NCHW, BF16, BF16),
    "cwd-split": lambda: run_cwd((1, 512, 256, 512), NCHW, F32, F32),
    "cwd-nhwc": lambda: run_cwd((8, 512, 64, 128), NHWC, F16, F32),
    # Cityscapes and ADE20K at label resolution, with RDD's weights and mask.
    "resized-ce-19": lambda: run_cross_entropy((8, 19, 64, 128), NCHW, BF16, (512, 1024), I64),
    "resized-ce-19-tfe": lambda: run_cross_entropy(
        (8, 19, 64, 128), NCHW, F32, (512, 1024), U8, pixel_weight=(64, 128)
    ),
    "resized-ce-19-tse": lambda: run_cross_entropy((8, 19, 64, 128), NCHW, F16, (512, 1024), I64, True, mask=True),
    "resized-ce-150-nhwc": lambda: run_cross_entropy((16, 150, 64, 64), NHWC, BF16, (512, 512), I64),
    "resized-kd-19": lambda: run_resized_kd((8, 19, 64, 128), (64, 128), NCHW, BF16, (512, 1024)),
    "resized-kd-19-label": lambda: run_resized_kd((8, 19, 64, 128), (128, 256), NCHW, F32, (512, 1024), I64, True),
    "resized-kd-150-nhwc": lambda: run_resized_kd((16, 150, 64, 64), (64, 64), NHWC, BF16, (512, 512)),
    "rdd-heads-19": lambda: run_heads((8, 19, 64, 128), NCHW, BF16),
    "rdd-heads-150-nhwc": lambda: run_heads((16, 150, 64, 64), NHWC, F32),
    "rdd-mask-19": lambda: run_mask((8, 19, 64, 128), NCHW, BF16, (512, 1024), I64, "label", 100_000),
    "rdd-mask-19-paper": lambda: run_mask((8, 19, 64, 128), NCHW, F32, (512, 1024), U8, "max", 0),
    "rdd-mask-150-nhwc": lambda: run_mask((16, 150, 64, 64), NHWC, BF16, (512, 512), I64, "label", 100_000),
}


def usage(kernel: str, compiled) -> Usage:
    """Read off a compiled kernel."""
    if "amdgcn" in compiled.asm:
        text = compiled.asm["amdgcn"]
        count = dict(re.findall(r"\.(\w+):\s+(\d+)\n", text.partition("amdhsa.kernels")[2]))
        widths = re.findall(r"^\s+(?:global|buffer|flat)_load_(\w+)", text, re.MULTILINE)
        # Scalar registers that do not fit go to lanes of a vector register and not to memory.
        spilled = max(4 * int(count["vgpr_spill_count"]), int(count["private_segment_fixed_size"]))
        wide = sum(width == "dwordx4" for width in widths)
        return Usage(kernel, int(count["vgpr_count"]), compiled.metadata.shared, spilled, len(widths), wide)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        text = subprocess.check_output([knobs.nvidia.cuobjdump.path, "-res-usage", cubin.name], text=True)
    # A spilled register lives on the stack; the kernels keep nothing else there.
    registers, stack, local = (int(re.search(rf"{what}:(\d+)", text)[1]) for what in ("REG", "STACK", "LOCAL"))
    # ptxas keeps the widths of PTX.
    widths = re.findall(r"\bld\.global(?:\.\w+)*?(?:\.v(\d))?\.[a-z](\d+)\s", compiled.asm["ptx"])
    wide = sum(int(vector or 1) * int(bits) >= 128 for vector, bits in widths)
    return Usage(kernel, registers, compiled.metadata.shared, stack + local, len(widths), wide)


def compile_case(case: str, target: str, tile: int | None = None) -> list[Usage]:
    """What the kernels take that a case launches. In a process of its own: it replaces ``launch`` and the driver.

    ``tile``: instead of the launchers' own size of a tile.
    """
    out: dict[str, Usage] = {}

    def compile_only(kernel, grid, like, *args, num_warps=4, **constants):
        assert all(0 < size < 2**31 for size in grid)
        compiled = kernel.warmup(*args, grid=grid, num_warps=num_warps, **constants)
        if compiled.hash not in out:
            name = f"{kernel.fn.__module__.rpartition('.')[2]}.{kernel.__name__}"
            again = sum(u.kernel.partition("#")[0] == name for u in out.values())
            out[compiled.hash] = usage(f"{name}#{again + 1}" if again else name, compiled)

    for name, module in list(sys.modules.items()):
        if name.startswith("fastkd.kernels.") and hasattr(module, "launch"):
            module.launch = compile_only
    tiles.TILE = tile or tiles.TILE
    # Not set_active: the driver before may be none at all, where there is no GPU.
    driver._active = Target(target)
    CASES[case]()
    return list(out.values())


def compile_all(jobs: list[tuple]) -> list[list[Usage]]:
    """:func:`compile_case` of every job, in fresh processes."""
    workers = min(os.cpu_count() or 1, 8, len(jobs))
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(compile_case, *zip(*jobs, strict=True), chunksize=4))


# Bytes. To be removed from the kernels, and then from here.
KNOWN_SPILLS = {("resized-kd-150-nhwc", "sm_100", "resized_kd._gradient"): 32}
JOBS = [(case, target) for case in CASES for target in TARGETS]


def read_table() -> tuple[str, dict[tuple[str, str, str], Usage]]:
    """The Triton version the table is of, and {(case, target, kernel): usage}."""
    with TABLE.open(newline="") as file:
        version = file.readline().removeprefix("# triton").strip()
        rows = list(csv.DictReader(file))
    return version, {
        (r["case"], r["target"], r["kernel"]): Usage(r["kernel"], *(int(r[f]) for f in Usage._fields[1:])) for r in rows
    }


def write_table() -> None:
    measured = compile_all(JOBS)
    with TABLE.open("w", newline="") as file:
        file.write(f"# triton {triton.__version__}\n")
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("case", "target", *Usage._fields))
        for job, kernels in zip(JOBS, measured, strict=True):
            writer.writerows((*job, *kernel) for kernel in kernels)


def worse(got: Usage, want: Usage) -> list[str]:
    """What ``got`` takes more of than ``want``. Registers are given out by eights, so less than that costs nothing."""
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


def complaints(case: str, target: str, kernels: list[Usage]) -> list[str]:
    """What is wrong with the kernels of a case: any spill, and what is worse than in a table of this Triton."""
    version, table = read_table()
    out = []
    for got in kernels:
        key = (case, target, got.kernel)
        if got.spilled > KNOWN_SPILLS.get(key, 0):
            out.append(f"{got.kernel} spills {got.spilled} bytes a thread (it has {got.registers} registers)")
        if version != triton.__version__:
            continue
        if (want := table.get(key)) is None:
            out.append(f"{got.kernel} is not in the table; {REWRITE}")
        else:
            out += [f"{got.kernel} takes {what}; {REWRITE}" for what in worse(got, want)]
    return out


@pytest.fixture(scope="module")
def compiled() -> dict[tuple[str, str], list[Usage]]:
    return dict(zip(JOBS, compile_all(JOBS), strict=True))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("case", CASES)
def test_kernels_keep_what_they_have(case, target, compiled):
    kernels = compiled[case, target]
    assert len(kernels) >= 2
    assert all(kernel.registers > 0 for kernel in kernels)
    assert any(kernel.loads > 0 for kernel in kernels)
    found = complaints(case, target, kernels)
    assert not found, f"{case} on {target}:\n" + "\n".join(found)


def test_table_has_no_rows_of_the_past(compiled):
    version, table = read_table()
    if version == triton.__version__:
        found = {(*job, kernel.kernel): kernel for job, kernels in compiled.items() for kernel in kernels}
        assert not set(table) - set(found), f"in the table and no longer compiled; {REWRITE}"
        mended = {key for key in KNOWN_SPILLS if key not in found or not found[key].spilled}
        assert not mended, "take these out of KNOWN_SPILLS"


def test_gate_fails_on_a_spill(monkeypatch):
    """Tiles 8 times too large, which the table's kernel does not have: under this Triton and under another."""
    job = ("cwd-split", "sm_90")
    (kernels,) = compile_all([(*job, 8 * tiles.TILE)])
    spills = [text for text in complaints(*job, kernels) if "cwd._forward spills" in text]
    assert len(spills) == 1
    monkeypatch.setattr(triton, "__version__", "0.0")
    assert spills[0] in complaints(*job, kernels)


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
    assert "python -m tests.test_aot" in complaints(*job, [want._replace(kernel="cwd._new")])[0]


if __name__ == "__main__":
    write_table()

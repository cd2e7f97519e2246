"""Compiles Triton's kernels for GPUs that are not there, and reads what the machine code uses.

The launchers run on meta tensors, and ``launch`` is replaced by a function that compiles. So the kernels are compiled
with the launchers' tiles, types and argument specialisations. A new kernel needs a line in CASES.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple

import torch
import triton
from fastkd.kernels import (
    cwd,
    kd,
    kd_sigmoid,
    launch,
    nfd,
    rdd,
    rescale,
    resized_binary_cross_entropy,
    resized_cross_entropy,
    resized_dice,
    resized_kd,
    resized_kd_sigmoid,
    resized_shaped_cross_entropy,
    tiles,
)
from fastkd.kernels.resize import planning
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
NCHW, NHWC = torch.contiguous_format, torch.channels_last
F32, F16, BF16, F64 = torch.float32, torch.float16, torch.bfloat16, torch.float64
U8, I32, I64 = torch.uint8, torch.int32, torch.int64
# Kernels tiled by kernels/resize, in these modules:
CELLS = (
    "_cross_entropy", "_kd", "_confidence", "_shaped_cross_entropy", "_dice", "_dice_gradient", "_binary_cross_entropy",
    "_kd_sigmoid",
)  # fmt: skip
CELL_MODULES = (
    "resized_cross_entropy", "resized_kd", "rdd", "resized_shaped_cross_entropy", "resized_dice",
    "resized_binary_cross_entropy", "resized_kd_sigmoid",
)  # fmt: skip


class Usage(NamedTuple):
    """Resources of one compiled kernel. If a case compiles a kernel several times, ``kernel`` is numbered."""

    kernel: str
    registers: int  # per thread
    shared: int  # bytes per program
    spilled: int  # bytes per thread
    loads: int  # global load instructions
    wide: int  # of 128 bits or more
    exponentials: int
    converts: int  # layout conversions
    loop_loads: float  # per exponential, in the class loop with the most; 0 for kernels without one
    seconds: float  # processor time of the compilation
    loops: str = ""  # faults in its class loops; not in the table


class Target:
    """The part of a Triton driver that compilation needs."""

    def __init__(self, name: str):
        self.name = name

    def get_current_device(self) -> str:
        return self.name

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return TARGETS[self.name]


def empty(*shape: int, dtype: torch.dtype = F32, layout: torch.memory_format = NCHW) -> torch.Tensor:
    """A tensor without memory."""
    return torch.empty(shape, dtype=dtype, device="meta").to(memory_format=layout)


def run_nfd(dims, shape, layout, student, teacher):
    s, t = empty(*shape, dtype=student, layout=layout), empty(*shape, dtype=teacher, layout=layout)
    loss, stats = nfd.forward(s, t, dims, 1e-5, "sum", 1.0)
    nfd.backward(loss, s, t, dims, 1e-5, "sum", 1.0, stats)


def run_cwd(shape, layout, student, teacher):
    s, t = empty(*shape, dtype=student, layout=layout), empty(*shape, dtype=teacher, layout=layout)
    loss, stats = cwd.forward(s, t, 4.0, "sum", 1.0)
    cwd.backward(loss, s, t, 4.0, "sum", 1.0, stats)


def run_kd(shape, layout, student, teacher, label=None, weight=False, reduction="mean", module=kd):
    s, t = empty(*shape, dtype=student, layout=layout), empty(*shape, dtype=teacher, layout=layout)
    pixels = (shape[0], *shape[2:])
    acc = F64 if student == F64 else F32
    args = (s, t, label and empty(*pixels, dtype=label), empty(*pixels, dtype=acc) if weight else None, 2.0, 255)
    module.gradient(*args, reduction, 1.0)
    module.forward(*args, "none", 1.0)


def run_cross_entropy(
    shape, size, layout, dtype, label, class_weight=False, pixel_weight=None, selected=None, align=False, forward=False
):
    """Loss and gradient, or the loss per label pixel."""
    n, c, _, _ = shape
    acc = F64 if dtype == F64 else F32
    args = (
        empty(*shape, dtype=dtype, layout=layout),
        empty(n, *size, dtype=label),
        empty(c, dtype=acc) if class_weight else None,
        empty(n, *pixel_weight, dtype=acc) if pixel_weight else None,
        empty(n, *size, dtype=acc if selected == "lse" else torch.bool) if selected else None,
        255,
        align,
    )
    if forward:
        resized_cross_entropy.forward(*args, "none", 1.0)
    else:
        resized_cross_entropy.gradient(*args, "mean", 1.0)


def run_shaped(
    shape, size, layout, dtype, label, options, class_weight=False, pixel_weight=None, align=False, forward=False
):
    """``options``: label smoothing and the focal exponent."""
    n, c, _, _ = shape
    acc = F64 if dtype == F64 else F32
    args = (
        empty(*shape, dtype=dtype, layout=layout),
        empty(n, *size, dtype=label),
        empty(c, dtype=acc) if class_weight else None,
        empty(n, *pixel_weight, dtype=acc) if pixel_weight else None,
        255,
        align,
        *options,
    )
    if forward:
        resized_shaped_cross_entropy.forward(*args, "none", 1.0)
    else:
        resized_shaped_cross_entropy.gradient(*args, "mean", 1.0)


def run_dice(shape, size, layout, dtype, label, square=False, columns=4, align=False, backward=False):
    args = (empty(*shape, dtype=dtype, layout=layout), empty(shape[0], *size, dtype=label), 255, align, square, columns)
    if backward:
        grad = empty(*shape[:2], columns, dtype=F64)
        resized_dice.backward(grad, *args, "none", 1.0, empty(0))
    else:
        resized_dice.forward(*args, "none", 1.0)


def run_binary(shape, size, layout, dtype, label, pos_weight=False, pixel_weight=None, forward=False):
    n, c, _, _ = shape
    acc = F64 if dtype == F64 else F32
    args = (
        empty(*shape, dtype=dtype, layout=layout),
        empty(n, c, *size, dtype=label),
        empty(c, dtype=acc) if pos_weight else None,
        empty(n, *pixel_weight, dtype=acc) if pixel_weight else None,
        255,
        False,
    )
    if forward:
        resized_binary_cross_entropy.forward(*args, "none", 1.0)
    else:
        resized_binary_cross_entropy.gradient(*args, "mean", 1.0)


def run_resized_kd(
    shape, teacher_size, size, layout, dtype, label=None, pixel_weight=False, forward=False, module=resized_kd
):
    n, c, _, _ = shape
    acc = F64 if dtype == F64 else F32
    s, t = empty(*shape, dtype=dtype, layout=layout), empty(n, c, *teacher_size, dtype=dtype, layout=layout)
    weight = empty(n, *size, dtype=acc) if pixel_weight else None
    args = (s, t, label and empty(n, *size, dtype=label), weight, size, 2.0, 255, False)
    if forward:
        module.forward(*args, "none", 1.0)
    else:
        module.gradient(*args, "mean", 1.0)


def run_heads(shape, layout, dtype):
    """KD and confidence of the teacher's heads (TFE), and the confidence alone."""
    maps = [empty(*shape, dtype=dtype, layout=layout) for _ in range(3)]
    rdd.kd_confidence_gradient(*maps, "aux_main", "sum", 1.0)
    rdd.teacher_confidence(*maps[:2], "main_aux")


def run_difficulty(shape, size, layout, dtype, label, confidence, min_kept, lse=True):
    maps = [empty(*shape, dtype=dtype, layout=layout) for _ in range(2)]
    run = rdd.difficulty_lse if lse else rdd.difficulty_mask
    run(*maps, empty(shape[0], *size, dtype=label), 0.7, min_kept, confidence, "xor", 255, True)


ADE20K, CITYSCAPES = ((16, 150, 64, 64), (512, 512)), ((8, 19, 64, 128), (512, 1024))
CASES: dict[str, Callable[[], None]] = {
    # Few large planes (split), many small ones; groups that are the batch, a pixel or a sample; odd sizes.
    "nfd-hw-split": lambda: run_nfd("hw", (1, 512, 256, 512), NCHW, BF16, BF16),
    "nfd-hw-fp32": lambda: run_nfd("hw", (8, 512, 64, 128), NCHW, F32, F32),
    "nfd-hw-odd": lambda: run_nfd("hw", (2, 19, 45, 45), NCHW, F16, F32),
    "nfd-hw-nhwc": lambda: run_nfd("hw", (8, 512, 64, 128), NHWC, BF16, BF16),
    "nfd-nhw-nhwc-fp32": lambda: run_nfd("nhw", (8, 512, 64, 128), NHWC, F32, F32),
    "nfd-c": lambda: run_nfd("c", (8, 512, 64, 128), NCHW, F32, F32),
    "nfd-c-nhwc": lambda: run_nfd("c", (8, 512, 64, 128), NHWC, F16, F16),
    "nfd-chw": lambda: run_nfd("chw", (8, 512, 64, 128), NCHW, BF16, F32),
    "cwd-19": lambda: run_cwd((8, 19, 64, 128), NCHW, BF16, BF16),
    "cwd-split": lambda: run_cwd((1, 512, 256, 512), NCHW, F32, F32),
    "cwd-nhwc": lambda: run_cwd((8, 512, 64, 128), NHWC, F16, F32),
    # Cityscapes and ADE20K logits, with and without labels and weights; 4096 classes.
    "kd-19-fp32": lambda: run_kd((8, 19, 64, 128), NCHW, F32, F32),
    "kd-19-label": lambda: run_kd((8, 19, 512, 1024), NCHW, F16, F16, I64, True),
    "kd-150": lambda: run_kd((16, 150, 64, 64), NCHW, BF16, BF16),
    "kd-150-nhwc": lambda: run_kd((16, 150, 64, 64), NHWC, BF16, BF16, U8),
    "kd-4096": lambda: run_kd((2, 4096, 32, 32), NCHW, BF16, F32, I32),
    "kd-4096-nhwc-fp32": lambda: run_kd((2, 4096, 32, 32), NHWC, F32, F32, None, True),
    "kd-sigmoid-150-nhwc": lambda: run_kd((16, 150, 64, 64), NHWC, BF16, BF16, U8, True, "mean", kd_sigmoid),
    "kd-sigmoid-19": lambda: run_kd((8, 19, 64, 128), NCHW, F32, F16, None, False, "sum", kd_sigmoid),
    # Cityscapes and ADE20K at label resolution, with RDD's weights and log-sum-exps.
    "resized-ce-150": lambda: run_cross_entropy(*ADE20K, NCHW, BF16, I64),
    "resized-ce-150-forward": lambda: run_cross_entropy(*ADE20K, NCHW, BF16, I64, forward=True),
    "resized-ce-19-tfe": lambda: run_cross_entropy(*CITYSCAPES, NHWC, F32, U8, pixel_weight=(64, 128)),
    "resized-ce-19-tse": lambda: run_cross_entropy(*CITYSCAPES, NCHW, F16, I64, True, None, "lse", True),
    "resized-kd-150": lambda: run_resized_kd(ADE20K[0], (64, 64), ADE20K[1], NCHW, BF16),
    "resized-kd-150-forward": lambda: run_resized_kd(ADE20K[0], (64, 64), ADE20K[1], NCHW, BF16, forward=True),
    "resized-kd-19-label": lambda: run_resized_kd(CITYSCAPES[0], (64, 128), CITYSCAPES[1], NHWC, BF16, I64, True),
    "resized-kd-19-elsewhere": lambda: run_resized_kd(CITYSCAPES[0], (32, 64), CITYSCAPES[1], NCHW, BF16, U8),
    "resized-smooth-150": lambda: run_shaped(*ADE20K, NCHW, BF16, I64, (0.1, 0.0)),
    "resized-smooth-19-weighted": lambda: run_shaped(*CITYSCAPES, NHWC, F16, U8, (0.1, 0.0), True, (64, 128), True),
    "resized-smooth-150-forward": lambda: run_shaped(*ADE20K, NCHW, BF16, I64, (0.1, 0.0), True, forward=True),
    "resized-focal-19": lambda: run_shaped(*CITYSCAPES, NCHW, F32, I64, (0.0, 2.0), True),
    "resized-dice-150": lambda: run_dice(*ADE20K, NCHW, BF16, I64),
    "resized-dice-150-backward": lambda: run_dice(*ADE20K, NCHW, BF16, I64, backward=True),
    "resized-dice-19-square": lambda: run_dice(*CITYSCAPES, NHWC, F32, U8, True, 5, True),
    "resized-dice-19-square-backward": lambda: run_dice(*CITYSCAPES, NHWC, F32, U8, True, 5, True, True),
    "resized-bce-150": lambda: run_binary(*ADE20K, NCHW, BF16, U8),
    "resized-bce-150-forward": lambda: run_binary(*ADE20K, NCHW, BF16, U8, forward=True),
    "resized-bce-19-weighted": lambda: run_binary(*CITYSCAPES, NHWC, F16, I64, True, (1, 64, 128)),
    "resized-kd-sigmoid-150": lambda: run_resized_kd(
        ADE20K[0], (64, 64), ADE20K[1], NCHW, BF16, module=resized_kd_sigmoid
    ),
    "resized-kd-sigmoid-19-elsewhere": lambda: run_resized_kd(
        CITYSCAPES[0], (32, 64), CITYSCAPES[1], NHWC, F16, I64, True, module=resized_kd_sigmoid
    ),
    "rdd-heads-19": lambda: run_heads((8, 19, 64, 128), NCHW, BF16),
    "rdd-heads-150-nhwc": lambda: run_heads((16, 150, 64, 64), NHWC, F32),
    "rdd-lse-19": lambda: run_difficulty(*CITYSCAPES, NCHW, BF16, I64, "label", 100_000),
    "rdd-mask-150-nhwc": lambda: run_difficulty(*ADE20K, NHWC, BF16, U8, "max", 0, False),
    "rescale": lambda: rescale.rescale_(empty(16, 150, 64, 64, dtype=BF16), empty()),
}


class Code(NamedTuple):
    """Regular expressions for one kind of machine code."""

    label: str
    branch: str
    load: str
    exponential: str
    shared: str  # not used by exchanges between neighbouring lanes
    multiply: str  # 64-bit


CODE = {
    "ptx": Code(
        r"(\$\w+):", r"\bbra(?:\.uni)?\s+(\$\w+)", r"\bld\.global", r"\bex2\.", r"\b(?:ld|st)\.shared|\bbar\.|\bbarrier\.",
        r"\b(?:mul|mad)\.(?:wide|lo|hi)\.[su]64|\b(?:mul|mad)\.wide\.[su]32",
    ),
    "amdgcn": Code(
        r"(\.LBB\w+):", r"\bs_c?branch\w*\s+(\.LBB\w+)", r"\b(?:global|buffer|flat)_load", r"\bv_exp_f32",
        r"\bds_(?:read|write|load|store)|\bs_barrier", r"\b(?:v_mad_[iu]64|v_mul_hi|s_mul_hi)_?",
    ),
}  # fmt: skip


class Loop(NamedTuple):
    """An innermost loop with exponentials."""

    loads: int
    exponentials: int
    several: bool  # label pixels at once; those far below their bound are recomputed singly, with four loads each
    faults: list[str]


def class_loops(text: str, code: Code, pixels: int) -> list[Loop]:
    """The loops of a kernel whose lanes process ``pixels`` label pixels per iteration."""
    lines = text.splitlines()
    labels = {m[1]: i for i, line in enumerate(lines) if (m := re.match(code.label, line))}
    spans = set()
    for i, line in enumerate(lines):
        if (m := re.search(code.branch, line)) and labels.get(m[1], i) < i:
            spans.add((labels[m[1]], i))
    bodies = {(a, b): "\n".join(lines[a : b + 1]) for a, b in spans}
    bodies = {span: body for span, body in bodies.items() if re.search(code.exponential, body)}
    out = []
    for (a, b), body in sorted(bodies.items()):
        if any(a <= c and d <= b and (a, b) != (c, d) for c, d in bodies):
            continue
        loads, exponentials = (len(re.findall(what, body)) for what in (code.load, code.exponential))
        faults = []
        if re.search(code.shared, body):
            faults.append("shared memory")
        if re.search(code.multiply, body):
            faults.append("64-bit multiplications")
        out.append(Loop(loads, exponentials, exponentials >= pixels, faults))
    return out


def by_cells(kernel: str) -> bool:
    """Whether each lane processes a cell."""
    module, _, name = kernel.partition("#")[0].partition(".")
    return module in CELL_MODULES and name in CELLS


def usage(kernel: str, compiled, seconds: float, pixels: int = 0) -> Usage:
    """Resources of a compiled kernel; ``pixels``: label pixels per lane and iteration."""
    converts = compiled.asm["ttgir"].count("convert_layout")
    kind = "amdgcn" if "amdgcn" in compiled.asm else "ptx"
    text = compiled.asm[kind]
    code = CODE[kind]
    if kind == "amdgcn":
        count = dict(re.findall(r"\.(\w+):\s+(\d+)\n", text.partition("amdhsa.kernels")[2]))
        # Scalar registers spill to lanes of a vector register, not to memory.
        spilled = max(4 * int(count["vgpr_spill_count"]), int(count["private_segment_fixed_size"]))
        registers = int(count["vgpr_count"])
        wide = len(re.findall(r"^\s+(?:global|buffer|flat)_load_dwordx4", text, re.MULTILINE))
    else:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
            cubin.write(compiled.asm["cubin"])
            cubin.flush()
            told = subprocess.check_output([knobs.nvidia.cuobjdump.path, "-res-usage", cubin.name], text=True)
        # A spilled register lives on the stack, which the kernels do not use otherwise.
        registers, stack, local = (int(re.search(rf"{what}:(\d+)", told)[1]) for what in ("REG", "STACK", "LOCAL"))
        spilled = stack + local
        widths = re.findall(r"\bld\.global(?:\.\w+)*?(?:\.v(\d))?\.[a-z](\d+)\s", text)  # ptxas does not change them
        wide = sum(int(vector or 1) * int(bits) >= 128 for vector, bits in widths)
    found = class_loops(text, code, pixels) if by_cells(kernel) else []
    loads = max((loop.loads / loop.exponentials for loop in found if loop.several), default=0.0)
    faults = sorted({fault for loop in found for fault in loop.faults})
    return Usage(
        kernel, registers, compiled.metadata.shared, spilled, len(re.findall(code.load, text, re.MULTILINE)), wide,
        len(re.findall(code.exponential, text, re.MULTILINE)), converts, round(loads, 2), seconds, "; ".join(faults),
    )  # fmt: skip


def processor_time() -> float:
    """Of this process and its assemblers, excluding other processes."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def replace_launch(by: Callable[..., None]) -> None:
    for name, module in list(sys.modules.items()):
        if name.startswith("fastkd.kernels.") and module is not launch and hasattr(module, "launch"):
            module.launch = by


def stand_in(target: str) -> dict[str, Usage]:
    """Replaces the driver, and ``launch`` by a function that compiles and appends to the result."""
    out: dict[str, Usage] = {}

    def compile_only(kernel, grid, like, *args, num_warps=4, registers=None, **constants):
        assert all(0 < size < 2**31 for size in grid)
        if registers is not None and TARGETS[target].backend == "cuda":
            constants["maxnreg"] = registers
        start = processor_time()
        compiled = kernel.warmup(*args, grid=grid, num_warps=num_warps, **constants)
        seconds = processor_time() - start
        if compiled.hash not in out:
            name = f"{kernel.fn.__module__.rpartition('.')[2]}.{kernel.__name__}"
            again = sum(u.kernel.partition("#")[0] == name for u in out.values())
            pixels = args[-1].ROWS.value * args[-1].COLUMNS.value if by_cells(name) else 0
            out[compiled.hash] = usage(f"{name}#{again + 1}" if again else name, compiled, seconds, pixels)

    replace_launch(compile_only)
    for name, module in list(sys.modules.items()):
        if name.startswith("fastkd.kernels."):
            for kernel in vars(module).values():
                if isinstance(kernel, triton.JITFunction):
                    kernel.device_caches.clear()  # so that each case compiles what a first call does
    planning.lanes = lambda: TARGETS[target].warp_size
    # Not set_active: without a GPU the previous driver may be None.
    driver._active = Target(target)
    return out


TILE, PIXELS = tiles.TILE, resized_cross_entropy.TILE


def compile_case(case: str, target: str, tile: int | None = None, pixels: tuple[int, int] | None = None) -> list[Usage]:
    """Resources of the kernels that a case launches. Runs in a separate process, since it replaces ``launch`` and the
    driver.

    ``tile``, ``pixels``: override the launchers' tile size of losses at logit size, and the label pixels per lane and
    iteration in cross-entropy.
    """
    out = stand_in(target)
    tiles.TILE = tile or TILE
    resized_cross_entropy.TILE = pixels or PIXELS
    CASES[case]()
    return list(out.values())


def compile_all(jobs: list[tuple]) -> list[list[Usage]]:
    """:func:`compile_case` of every job, in fresh processes."""
    most = max(map(len, jobs))
    jobs = [(*job, *[None] * (most - len(job))) for job in jobs]
    workers = min(os.cpu_count() or 1, 8, len(jobs))
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(compile_case, *zip(*jobs, strict=True), chunksize=4))

"""KD: loss[p] = weight * tau^2 * KL(softmax(T[p] / tau) || softmax(S[p] / tau)) over classes; derived in docs/kd.md.

The forward reads S and T once and writes two numbers a tile of pixels. The backward keeps nothing from it: it reads
both for the softmaxes, again (from cache) for the difference, and writes the gradient: 3 * bytes(S) + 2 * bytes(T) in
all.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .softmax import START, divergence, grow, grow_cross
from .tiles import accumulator, cut, launch, locate

# The sum of the tiles is one program's work: few and wide steps.
TOTAL_BLOCK = 8192
TOTAL_WARPS = 16


@triton.jit
def _counted(target, pixel, inside, ignore_index, classes):
    """Pixels that count. A label outside [0, classes) is ignored; labels are compared, never used as an offset."""
    if target is not None:
        label = tl.load(target + pixel, mask=inside, other=0).to(tl.int64)
        inside = inside & (label != ignore_index) & (label >= 0) & (label < classes)
    return inside


@triton.jit
def _forward(
    student,  # map, any float dtype
    teacher,  # map, any float dtype
    target,  # (N, H, W) uint8, int32 or int64, or None
    weight,  # (N, H, W) ACC, or None
    loss,  # (N, H, W) ACC, or None
    part,  # (programs,) ACC
    part_count,  # (programs,) int32
    tau: tl.float64,
    ignore_index,
    inner,
    length,
    stride_outer,
    stride_inner,
    stride_reduced,
    chunk,
    chunks,
    ACC: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
    BLOCK_REDUCED: tl.constexpr,
):
    """Loss of a tile of pixels: online softmax over the classes."""
    outer, i, _ = locate(inner, chunks, BLOCK_INNER)
    inside = i < inner
    base = outer * stride_outer + i * stride_inner
    tau = tl.full((), tau, tl.float64)
    inv_tau = (1 / tau).to(ACC)
    peak_s = tl.full([BLOCK_INNER], START, ACC)
    peak_t = tl.full([BLOCK_INNER], START, ACC)
    total_s = tl.zeros([BLOCK_INNER], ACC)
    total_t = tl.zeros([BLOCK_INNER], ACC)
    cross = tl.zeros([BLOCK_INNER], ACC)
    for start in range(0, length, BLOCK_REDUCED):
        r = start + tl.arange(0, BLOCK_REDUCED).to(tl.int64)
        mask = inside[:, None] & (r < length)[None, :]
        offset = base[:, None] + r[None, :] * stride_reduced
        s = tl.load(student + offset, mask=mask, other=-float("inf")).to(ACC)
        t = tl.load(teacher + offset, mask=mask, other=-float("inf")).to(ACC)
        higher_s, total_s = grow(s, inv_tau, peak_s, total_s, 1)
        higher_t, more_t = grow(t, inv_tau, peak_t, total_t, 1)
        cross = grow_cross(s, t, inv_tau, cross, total_t, peak_s, peak_t, higher_s, higher_t, 1)
        peak_s, peak_t, total_t = higher_s, higher_t, more_t
    pixel = outer * inner + i
    counted = _counted(target, pixel, inside, ignore_index, length)
    value = divergence(inv_tau, total_s, total_t, cross) * (tau * tau).to(ACC)
    if weight is not None:
        value *= tl.load(weight + pixel, mask=inside, other=0)
    value = tl.where(counted, value, 0)
    if loss is not None:
        tl.store(loss + pixel, value, mask=inside)
    program = tl.program_id(0).to(tl.int64)
    tl.store(part + program, tl.sum(value))
    tl.store(part_count + program, tl.sum(counted.to(tl.int32)))


@triton.jit
def _total(
    part,  # (parts,) ACC
    part_count,  # (parts,) int32
    loss,  # () ACC, or None
    count,  # () int64
    parts,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sums the tiles in a fixed order, by one program."""
    value = tl.zeros([BLOCK], tl.float64)
    pixels = tl.zeros([BLOCK], tl.int64)
    for start in range(0, parts, BLOCK):
        k = start + tl.arange(0, BLOCK).to(tl.int64)
        value += tl.load(part + k, mask=k < parts, other=0)
        pixels += tl.load(part_count + k, mask=k < parts, other=0)
    if loss is not None:
        tl.store(loss, tl.sum(value).to(ACC))
    tl.store(count, tl.sum(pixels))


@triton.jit
def _backward(
    grad,  # () or (N, H, W) ACC
    student,  # map, any float dtype
    teacher,  # map, any float dtype
    target,  # (N, H, W) uint8, int32 or int64, or None
    weight,  # (N, H, W) ACC, or None
    out,  # map, dtype of student
    tau: tl.float64,
    ignore_index,
    inner,
    length,
    stride_outer,
    stride_inner,
    stride_reduced,
    chunk,
    chunks,
    PER_PIXEL: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
    BLOCK_REDUCED: tl.constexpr,
):
    """grad * weight * tau * (softmax(s / tau) - softmax(t / tau)), 0 where ignored."""
    outer, i, _ = locate(inner, chunks, BLOCK_INNER)
    inside = i < inner
    base = outer * stride_outer + i * stride_inner
    tau = tl.full((), tau, tl.float64)
    inv_tau = (1 / tau).to(ACC)
    peak_s = tl.full([BLOCK_INNER], START, ACC)
    peak_t = tl.full([BLOCK_INNER], START, ACC)
    total_s = tl.zeros([BLOCK_INNER], ACC)
    total_t = tl.zeros([BLOCK_INNER], ACC)
    for start in range(0, length, BLOCK_REDUCED):
        r = start + tl.arange(0, BLOCK_REDUCED).to(tl.int64)
        mask = inside[:, None] & (r < length)[None, :]
        offset = base[:, None] + r[None, :] * stride_reduced
        s = tl.load(student + offset, mask=mask, other=-float("inf")).to(ACC)
        t = tl.load(teacher + offset, mask=mask, other=-float("inf")).to(ACC)
        peak_s, total_s = grow(s, inv_tau, peak_s, total_s, 1)
        peak_t, total_t = grow(t, inv_tau, peak_t, total_t, 1)
    pixel = outer * inner + i
    counted = _counted(target, pixel, inside, ignore_index, length)
    scale = tl.load(grad + pixel, mask=inside, other=0) if PER_PIXEL else tl.load(grad)
    scale *= tau.to(ACC)
    if weight is not None:
        scale *= tl.load(weight + pixel, mask=inside, other=0)
    for start in range(0, length, BLOCK_REDUCED):
        r = start + tl.arange(0, BLOCK_REDUCED).to(tl.int64)
        mask = inside[:, None] & (r < length)[None, :]
        offset = base[:, None] + r[None, :] * stride_reduced
        s = tl.load(student + offset, mask=mask, other=0).to(ACC)
        t = tl.load(teacher + offset, mask=mask, other=0).to(ACC)
        p_s = tl.exp((s - peak_s[:, None]) * inv_tau) / total_s[:, None]
        p_t = tl.exp((t - peak_t[:, None]) * inv_tau) / total_t[:, None]
        d = tl.where(counted[:, None], (p_s - p_t) * scale[:, None], 0)
        tl.store(out + offset, d.to(out.dtype.element_ty), mask=mask)


def forward(
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None,
    weight: Tensor | None,
    temperature: float,
    ignore_index: int,
    per_pixel: bool,
) -> tuple[Tensor, Tensor]:
    """Loss and number of valid pixels: see ``fastkd.ops.kd``.

    Args:
        student, teacher: (N, C, H, W) of one layout, NCHW-contiguous or channels_last.
        target: (N, H, W) contiguous uint8, int32 or int64, or None: all pixels are valid.
        weight: (N, H, W) contiguous fp32 (fp64 for fp64 maps), or None.

    Returns:
        loss: fp32 (fp64 for fp64 maps), (N, H, W) if ``per_pixel``, otherwise its sum, 0-d. count: int64, 0-d.
    """
    n, _, h, w = student.shape
    acc, ACC = accumulator(student)
    tiles = cut(student, "channels", split=False)
    parts = tiles.grid[0]
    loss = student.new_empty((n, h, w) if per_pixel else (), dtype=acc)
    count = student.new_empty((), dtype=torch.int64)
    part = student.new_empty(parts, dtype=acc)
    part_count = student.new_empty(parts, dtype=torch.int32)
    launch(
        _forward, tiles.grid, student, student, teacher, target, weight, loss if per_pixel else None, part, part_count,
        temperature, ignore_index, *tiles.runtime, ACC=ACC, **tiles.blocks,
    )  # fmt: skip
    launch(
        _total, (1,), student, part, part_count, None if per_pixel else loss, count, parts,
        ACC=ACC, BLOCK=TOTAL_BLOCK, num_warps=TOTAL_WARPS,
    )  # fmt: skip
    return loss, count


def backward(
    grad: Tensor,
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None,
    weight: Tensor | None,
    temperature: float,
    ignore_index: int,
) -> Tensor:
    """Gradient of ``sum(grad * loss per pixel)`` with respect to the student, in its dtype and layout.

    Args:
        grad: 0-d or (N, H, W) contiguous, of the dtype of the loss. The others as in :func:`forward`.
    """
    tiles = cut(student, "channels", split=False)
    out = torch.empty_like(student)
    launch(
        _backward, tiles.grid, student, grad, student, teacher, target, weight, out, temperature, ignore_index,
        *tiles.runtime, PER_PIXEL=grad.dim() > 0, ACC=accumulator(student)[1], **tiles.blocks,
    )  # fmt: skip
    return out

"""KD: loss[p] = weight * tau^2 * KL(softmax(T[p] / tau) || softmax(S[p] / tau)) over classes; derived in docs/kd.md.

One kernel computes loss and gradient: it reads S and T for the softmaxes, reads them again (from cache) for the
difference, and writes the gradient: 2 * bytes(S) + bytes(T). A mean over labels first counts them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import accumulator, launch
from .softmax import LOG2E, START, difference, divergence, grow, grow_cross
from .tiles import cut, locate, tile_of
from .total import gather_parts, reduced, total

COUNT_BLOCK = 4096  # labels per program


class Labels(NamedTuple):
    """Per-pixel inputs."""

    target: Any  # (N, H, W) uint8, int32 or int64, or None
    weight: Any  # (N, H, W) ACC, or None
    ignore_index: Any


class Out(NamedTuple):
    """Outputs of the kernel."""

    loss: Any  # (N, H, W) ACC, or None
    part: Any  # (2, programs) ACC: summed loss, counted pixels
    gradient: Any  # map, dtype of the student, or None


@triton.jit
def counted_pixels(labels, pixel, inside, classes):
    """Mask of counted pixels. Labels outside [0, classes) are ignored; labels are never used as offsets."""
    if labels.target is not None:
        label = tl.load(labels.target + pixel, mask=inside, other=0).to(tl.int64)
        inside = inside & (label != labels.ignore_index) & (label >= 0) & (label < classes)
    return inside


@triton.jit
def gradient_scale(scale, counts, parts, BLOCK: tl.constexpr):
    """``scale`` (fp64), divided by the number of counted labels for a mean."""
    if counts is not None:
        k = tl.arange(0, BLOCK)
        count = tl.sum(tl.load(counts + k, mask=k < parts, other=0).to(tl.float64))
        scale = tl.where(count == 0, 0.0, scale / count)
    return scale


@triton.jit
def _count(
    labels,  # Labels
    part,  # (1, programs) ACC
    pixels,
    classes,
    BLOCK: tl.constexpr,
):
    """Counts the valid labels of one block."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    counted = counted_pixels(labels, i, i < pixels, classes)
    tl.store(part + tl.program_id(0), tl.sum(counted.to(tl.int32)).to(part.dtype.element_ty))


@triton.jit
def _kd(
    student,  # map, any float dtype
    teacher,  # map, any float dtype
    labels,  # Labels
    out,  # Out
    tau: tl.float64,
    scale: tl.float64,  # of the stored value: the loss for "none", else the gradient
    counts,  # (1, parts) ACC: counted labels, for a mean; or None
    parts,
    BLOCK: tl.constexpr,  # for ``counts``
    g,  # tiles.Tiles
):
    """One tile of pixels: online softmax over the classes, then the gradient."""
    at = locate(g)
    tau = tl.full((), tau, tl.float64)
    scale = tl.full((), scale, tl.float64)
    inv_tau = (1 / tau).to(g.ACC)
    zero = tl.zeros([g.BLOCK_INNER], g.ACC)
    peak_s, peak_t = zero + START, zero + START
    total_s, total_t, cross = zero, zero, zero
    for start in range(0, at.length, g.BLOCK_REDUCED):
        offset, mask = tile_of(g, at, start)
        s = tl.load(student + offset, mask=mask, other=-float("inf")).to(g.ACC)
        t = tl.load(teacher + offset, mask=mask, other=-float("inf")).to(g.ACC)
        higher_s, total_s = grow(s, inv_tau, peak_s, total_s, 1)
        higher_t, more_t = grow(t, inv_tau, peak_t, total_t, 1)
        cross = grow_cross(s, t, inv_tau, cross, total_t, (peak_s, peak_t, higher_s, higher_t), 1)
        peak_s, peak_t, total_t = higher_s, higher_t, more_t
    pixel = at.outer * g.inner + at.inner
    counted = counted_pixels(labels, pixel, at.inside, at.length)
    weight = zero + 1
    if labels.weight is not None:
        weight = tl.load(labels.weight + pixel, mask=at.inside, other=0)
    value = tl.where(counted, divergence(inv_tau, total_s, total_t, cross) * weight, 0)
    if out.loss is not None:
        tl.store(out.loss + pixel, value * (scale * tau * tau).to(g.ACC), mask=at.inside)
    program = tl.program_id(0).to(tl.int64)
    tl.store(out.part + program, tl.sum(value))
    tl.store(out.part + tl.num_programs(0) + program, tl.sum(counted.to(tl.int32)).to(g.ACC))
    if out.gradient is not None:
        scale = gradient_scale(scale * tau, counts, parts, BLOCK)
        norms = (peak_s, tl.log2(total_s), peak_t, tl.log2(total_t))
        factor = weight * scale.to(g.ACC)
        for start in range(0, at.length, g.BLOCK_REDUCED):
            offset, mask = tile_of(g, at, start)
            s = tl.load(student + offset, mask=mask, other=0).to(g.ACC)
            t = tl.load(teacher + offset, mask=mask, other=0).to(g.ACC)
            d = difference(s, t, (1 / tau * LOG2E).to(g.ACC), norms) * factor[:, None]
            d = tl.where(counted[:, None], d, 0)
            tl.store(out.gradient + offset, d.to(out.gradient.dtype.element_ty), mask=mask)


def _launch(kernel: Any, args: tuple[Any, ...], reduction: str, scale: float, with_gradient: bool) -> Out:
    student, teacher, target, weight, temperature, ignore_index = args
    n, c, h, w = student.shape
    acc, _ = accumulator(student)
    tiled = cut(student, "channels", split=False)
    labels = Labels(target, weight, ignore_index)
    counts, parts = None, 1
    if with_gradient and reduction == "mean":
        if target is None:
            scale /= n * h * w
        else:
            counts = student.new_empty((1, triton.cdiv(target.numel(), COUNT_BLOCK)), dtype=acc)
            launch(
                _count, (counts.shape[1],), student, labels, counts, target.numel(), c,
                BLOCK=COUNT_BLOCK, registers=128,
            )  # fmt: skip
            counts = gather_parts(counts)
            parts = counts.shape[1]
    loss = student.new_empty((n, h, w), dtype=acc) if reduction == "none" else None
    gradient = torch.empty_like(student) if with_gradient else None
    out = Out(loss, student.new_empty((2, tiled.programs), dtype=acc), gradient)
    launch(
        kernel, (tiled.programs,), student, student, teacher, labels, out, temperature, scale, counts, parts,
        triton.next_power_of_2(parts), tiled.tiles,
    )  # fmt: skip
    return out


def forward(
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None,
    weight: Tensor | None,
    temperature: float,
    ignore_index: int,
    reduction: str,
    scale: float,
    *,
    kernel: Any = _kd,
) -> tuple[Tensor, Tensor]:
    """The loss and the number of counted pixels; see ``fastkd.ops.kd``.

    Args:
        student, teacher: (N, C, H, W) in the same layout, NCHW-contiguous or channels_last.
        target: (N, H, W) contiguous, or None: all pixels count. weight: (N, H, W) contiguous in the accumulator's
            dtype.
        kernel: KD's own, or that of :mod:`kernels.kd_sigmoid`.
    """
    out = _launch(kernel, (student, teacher, target, weight, temperature, ignore_index), reduction, scale, False)
    loss, count = total(out.part, reduction, scale * temperature**2)
    return (out.loss if loss is None else loss), count


def gradient(
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None,
    weight: Tensor | None,
    temperature: float,
    ignore_index: int,
    reduction: str,
    scale: float,
    *,
    kernel: Any = _kd,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, count, and the student's gradient in its dtype and layout; arguments as for :func:`forward`."""
    out = _launch(kernel, (student, teacher, target, weight, temperature, ignore_index), reduction, scale, True)
    return (*reduced(out.part, reduction == "mean", scale * temperature**2), out.gradient)

"""CWD: loss[n, c] = tau^2 * KL(softmax over H*W of T[n, c] / tau || the same of S[n, c]); derived in docs/cwd.md.

The forward reads S and T once and writes 5 numbers a channel (and 5 a part where channels are split); the backward
reads both once more and writes the gradient: 3 * bytes(S) + 2 * bytes(T) in all.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .softmax import START, divergence, grow, grow_cross
from .tiles import accumulator, cut, cut_parts, launch, locate


@triton.jit
def _finish(
    loss,  # (groups,) ACC
    stats,  # (groups, 4) ACC
    group,
    inside,
    tau,
    inv_tau,
    peak_s,
    total_s,
    peak_t,
    total_t,
    cross,
    ACC: tl.constexpr,
):
    """Loss and backward numbers of channels from their peaks and sums."""
    tl.store(loss + group, divergence(inv_tau, total_s, total_t, cross) * (tau * tau).to(ACC), mask=inside)
    stats += group * 4
    tl.store(stats, peak_s * inv_tau, mask=inside)
    tl.store(stats + 1, tl.log(total_s), mask=inside)
    tl.store(stats + 2, peak_t * inv_tau, mask=inside)
    tl.store(stats + 3, tl.log(total_t), mask=inside)


@triton.jit
def _forward(
    student,  # map, any float dtype
    teacher,  # map, any float dtype
    part,  # (5, outer, chunks, inner) ACC, or None where a channel is one chunk
    loss,  # (groups,) ACC
    stats,  # (groups, 4) ACC
    tau: tl.float64,
    plane,  # outer * chunks * inner
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
    """Online softmax over one chunk."""
    outer, i, c = locate(inner, chunks, BLOCK_INNER)
    inside = i < inner
    base = outer * stride_outer + i * stride_inner
    first = c * chunk
    tau = tl.full((), tau, tl.float64)
    inv_tau = (1 / tau).to(ACC)
    peak_s = tl.full([BLOCK_INNER], START, ACC)
    peak_t = tl.full([BLOCK_INNER], START, ACC)
    total_s = tl.zeros([BLOCK_INNER], ACC)
    total_t = tl.zeros([BLOCK_INNER], ACC)
    cross = tl.zeros([BLOCK_INNER], ACC)
    for start in range(first, tl.minimum(first + chunk, length), BLOCK_REDUCED):
        r = start + tl.arange(0, BLOCK_REDUCED).to(tl.int64)
        mask = inside[:, None] & (r < length)[None, :]
        offset = base[:, None] + r[None, :] * stride_reduced
        s = tl.load(student + offset, mask=mask, other=-float("inf")).to(ACC)
        t = tl.load(teacher + offset, mask=mask, other=-float("inf")).to(ACC)
        higher_s, total_s = grow(s, inv_tau, peak_s, total_s, 1)
        higher_t, more_t = grow(t, inv_tau, peak_t, total_t, 1)
        cross = grow_cross(s, t, inv_tau, cross, total_t, peak_s, peak_t, higher_s, higher_t, 1)
        peak_s, peak_t, total_t = higher_s, higher_t, more_t
    if part is None:
        group = outer * inner + i
        _finish(loss, stats, group, inside, tau, inv_tau, peak_s, total_s, peak_t, total_t, cross, ACC)
    else:
        plane = tl.cast(plane, tl.int64)
        part += (outer * chunks + c) * inner + i
        tl.store(part, peak_s, mask=inside)
        tl.store(part + plane, total_s, mask=inside)
        tl.store(part + 2 * plane, peak_t, mask=inside)
        tl.store(part + 3 * plane, total_t, mask=inside)
        tl.store(part + 4 * plane, cross, mask=inside)


@triton.jit
def _merge(
    part,  # (5, outer, parts, inner) ACC
    loss,  # (groups,) ACC
    stats,  # (groups, 4) ACC
    tau: tl.float64,
    plane,  # outer * parts * inner
    inner,
    parts,  # chunks of one channel
    ACC: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
):
    """Merges the chunks of each channel in two passes: the peaks, then the sums about them."""
    outer, i, _ = locate(inner, 1, BLOCK_INNER)
    inside = i < inner
    plane = tl.cast(plane, tl.int64)
    base = part + outer * parts * inner + i
    tau = tl.full((), tau, tl.float64)
    inv_tau = (1 / tau).to(ACC)
    peaks_s = tl.full([BLOCK_INNER, BLOCK_PARTS], START, ACC)
    peaks_t = tl.full([BLOCK_INNER, BLOCK_PARTS], START, ACC)
    for start in range(0, parts, BLOCK_PARTS):
        k = start + tl.arange(0, BLOCK_PARTS).to(tl.int64)
        mask = inside[:, None] & (k < parts)[None, :]
        at = base[:, None] + k[None, :] * inner
        peaks_s = tl.maximum(peaks_s, tl.load(at, mask=mask, other=START))
        peaks_t = tl.maximum(peaks_t, tl.load(at + 2 * plane, mask=mask, other=START))
    peak_s = tl.max(peaks_s, 1)
    peak_t = tl.max(peaks_t, 1)
    total_s = tl.zeros([BLOCK_INNER, BLOCK_PARTS], ACC)
    total_t = tl.zeros([BLOCK_INNER, BLOCK_PARTS], ACC)
    cross = tl.zeros([BLOCK_INNER, BLOCK_PARTS], ACC)
    for start in range(0, parts, BLOCK_PARTS):
        k = start + tl.arange(0, BLOCK_PARTS).to(tl.int64)
        mask = inside[:, None] & (k < parts)[None, :]
        at = base[:, None] + k[None, :] * inner
        lower_s = tl.load(at, mask=mask, other=START) - peak_s[:, None]
        lower_t = tl.load(at + 2 * plane, mask=mask, other=START) - peak_t[:, None]
        scale_t = tl.exp(lower_t * inv_tau)
        more_t = tl.load(at + 3 * plane, mask=mask, other=0)
        more = tl.load(at + 4 * plane, mask=mask, other=0)
        total_s += tl.exp(lower_s * inv_tau) * tl.load(at + plane, mask=mask, other=0)
        total_t += scale_t * more_t
        cross += scale_t * (more + more_t * (lower_t - lower_s))
    total_s = tl.sum(total_s, 1)
    total_t = tl.sum(total_t, 1)
    cross = tl.sum(cross, 1)
    _finish(loss, stats, outer * inner + i, inside, tau, inv_tau, peak_s, total_s, peak_t, total_t, cross, ACC)


@triton.jit
def _backward(
    grad,  # (groups,) ACC
    student,  # map, any float dtype
    teacher,  # map, any float dtype
    stats,  # (groups, 4) ACC
    out,  # map, dtype of student
    tau: tl.float64,
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
    """grad * tau * (softmax(s / tau) - softmax(t / tau))."""
    outer, i, c = locate(inner, chunks, BLOCK_INNER)
    inside = i < inner
    base = outer * stride_outer + i * stride_inner
    group = outer * inner + i
    tau = tl.full((), tau, tl.float64)
    inv_tau = (1 / tau).to(ACC)
    scale = tl.load(grad + group, mask=inside, other=0) * tau.to(ACC)
    stats += group * 4
    peak_s = tl.load(stats, mask=inside, other=0)
    log_s = tl.load(stats + 1, mask=inside, other=0)
    peak_t = tl.load(stats + 2, mask=inside, other=0)
    log_t = tl.load(stats + 3, mask=inside, other=0)
    first = c * chunk
    for start in range(first, tl.minimum(first + chunk, length), BLOCK_REDUCED):
        r = start + tl.arange(0, BLOCK_REDUCED).to(tl.int64)
        mask = inside[:, None] & (r < length)[None, :]
        offset = base[:, None] + r[None, :] * stride_reduced
        s = tl.load(student + offset, mask=mask, other=0).to(ACC)
        t = tl.load(teacher + offset, mask=mask, other=0).to(ACC)
        p_s = tl.exp((s * inv_tau - peak_s[:, None]) - log_s[:, None])
        p_t = tl.exp((t * inv_tau - peak_t[:, None]) - log_t[:, None])
        d = (p_s - p_t) * scale[:, None]
        tl.store(out + offset, d.to(out.dtype.element_ty), mask=mask)


def forward(student: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Loss of each channel and the four numbers its backward needs: see ``fastkd.ops.cwd``.

    Args:
        student, teacher: (N, C, H, W) of one layout, NCHW-contiguous or channels_last.

    Returns:
        loss (N, C), stats (N, C, 4): fp32, or fp64 for fp64 maps.
    """
    n, c = student.shape[:2]
    acc, ACC = accumulator(student)
    tiles = cut(student, "pixels")
    loss = student.new_empty((n, c), dtype=acc)
    stats = student.new_empty((n, c, 4), dtype=acc)
    plane = n * tiles.chunks * c
    part = None if tiles.chunks == 1 else student.new_empty((5, plane), dtype=acc)
    launch(
        _forward, tiles.grid, student, student, teacher, part, loss, stats, temperature, plane, *tiles.runtime,
        ACC=ACC, **tiles.blocks,
    )  # fmt: skip
    if part is not None:
        blocks = cut_parts(c, tiles.chunks)
        grid = (n * triton.cdiv(c, blocks["BLOCK_INNER"]),)
        launch(
            _merge, grid, student, part, loss, stats, temperature, plane, c, tiles.chunks,
            ACC=ACC, **blocks,
        )  # fmt: skip
    return loss, stats


def backward(grad: Tensor, student: Tensor, teacher: Tensor, stats: Tensor, temperature: float) -> Tensor:
    """Gradient of ``sum(grad * loss)`` with respect to the student, in its dtype and layout.

    Args:
        grad: like the loss of :func:`forward`, contiguous.
        stats: of :func:`forward`.
    """
    tiles = cut(student, "pixels")
    out = torch.empty_like(student)
    launch(
        _backward, tiles.grid, student, grad, student, teacher, stats, out, temperature, *tiles.runtime,
        ACC=accumulator(student)[1], **tiles.blocks,
    )  # fmt: skip
    return out

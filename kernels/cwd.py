"""CWD: loss[n, c] = tau^2 * KL(softmax_HW(T[n, c] / tau) || softmax_HW(S[n, c] / tau)); derived in docs/cwd.md.

The forward reads S and T once and writes 5 numbers per channel (and 5 per chunk if channels are split). The backward
reads both again and writes the gradient. Total: 3 * bytes(S) + 2 * bytes(T).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import accumulator, launch
from .softmax import LOG2E, START, difference, divergence, grow, grow_cross, grow_lanes, merge_lanes
from .tiles import block_of, cut, cut_parts, locate, tile_of
from .total import scaled_sum


class Softmaxes(NamedTuple):
    """Per channel: peak and sum of both softmaxes, and sum exp((t - peak_t) / tau) * ((t - peak_t) - (s - peak_s))."""

    peak_s: Any
    total_s: Any
    peak_t: Any
    total_t: Any
    cross: Any


@triton.jit
def _finish(out, group, inside, x, tau, scale, ACC: tl.constexpr):
    """Writes the loss and the numbers for the backward; ``out``: (loss, stats)."""
    inv_tau = (1 / tau).to(ACC)
    loss = divergence(inv_tau, x.total_s, x.total_t, x.cross) * (tau * tau * scale).to(ACC)
    tl.store(out[0] + group, loss, mask=inside)
    stats = out[1] + group * 4
    tl.store(stats, x.peak_s, mask=inside)
    tl.store(stats + 1, tl.log2(x.total_s), mask=inside)
    tl.store(stats + 2, x.peak_t, mask=inside)
    tl.store(stats + 3, tl.log2(x.total_t), mask=inside)


@triton.jit
def _forward(
    student,  # map, any float dtype
    teacher,  # map, any float dtype
    part,  # (5, outer, chunks, inner) ACC, or None if a channel is one chunk
    out,  # loss (groups,) ACC, stats (groups, 4) ACC
    tau: tl.float64,
    scale: tl.float64,
    plane,  # outer * chunks * inner
    LANES: tl.constexpr,  # one softmax per element of the tile, merged at the end
    g,  # tiles.Tiles
):
    """Online softmax over one chunk."""
    at = locate(g)
    first = at.chunk * g.chunk
    tau = tl.full((), tau, tl.float64)
    inv_tau = (1 / tau).to(g.ACC)
    last = tl.minimum(first + g.chunk, at.length)
    if LANES:
        zero = tl.zeros([g.BLOCK_INNER, g.BLOCK_REDUCED], g.ACC)
        state = (zero + START, zero, zero + START, zero, zero)
        for start in range(first, last, g.BLOCK_REDUCED):
            offset, mask = tile_of(g, at, start)
            s = tl.load(student + offset, mask=mask, other=-float("inf")).to(g.ACC)
            t = tl.load(teacher + offset, mask=mask, other=-float("inf")).to(g.ACC)
            state = grow_lanes(s, t, inv_tau, state)
        peak_s, total_s, peak_t, total_t, cross = merge_lanes(state, inv_tau, 1)
    else:
        zero = tl.zeros([g.BLOCK_INNER], g.ACC)
        peak_s, peak_t = zero + START, zero + START
        total_s, total_t, cross = zero, zero, zero
        for start in range(first, last, g.BLOCK_REDUCED):
            offset, mask = tile_of(g, at, start)
            s = tl.load(student + offset, mask=mask, other=-float("inf")).to(g.ACC)
            t = tl.load(teacher + offset, mask=mask, other=-float("inf")).to(g.ACC)
            higher_s, total_s = grow(s, inv_tau, peak_s, total_s, 1)
            higher_t, more_t = grow(t, inv_tau, peak_t, total_t, 1)
            cross = grow_cross(s, t, inv_tau, cross, total_t, (peak_s, peak_t, higher_s, higher_t), 1)
            peak_s, peak_t, total_t = higher_s, higher_t, more_t
    if part is None:
        group = at.outer * g.inner + at.inner
        x = Softmaxes(peak_s, total_s, peak_t, total_t, cross)
        _finish(out, group, at.inside, x, tau, tl.full((), scale, tl.float64), g.ACC)
    else:
        plane = tl.cast(plane, tl.int64)
        part += (at.outer * g.chunks + at.chunk) * g.inner + at.inner
        tl.store(part, peak_s, mask=at.inside)
        tl.store(part + plane, total_s, mask=at.inside)
        tl.store(part + 2 * plane, peak_t, mask=at.inside)
        tl.store(part + 3 * plane, total_t, mask=at.inside)
        tl.store(part + 4 * plane, cross, mask=at.inside)


@triton.jit
def _merge(
    part,  # (5, outer, parts, inner) ACC
    out,  # loss (groups,) ACC, stats (groups, 4) ACC
    tau: tl.float64,
    scale: tl.float64,
    size,  # (plane: outer * parts * inner, inner, parts: chunks per channel)
    T,  # (ACC, BLOCK_INNER, BLOCK_PARTS)
):
    """Merges the chunks of each channel in two passes: peaks, then sums rescaled to them."""
    ACC: tl.constexpr = T[0]
    inner, parts = size[1], size[2]
    outer, i = block_of(tl.program_id(0), inner, T[1])
    inside = i < inner
    plane = tl.cast(size[0], tl.int64)
    base = part + outer * parts * inner + i
    tau = tl.full((), tau, tl.float64)
    inv_tau = (1 / tau).to(ACC)
    peaks_s = tl.full([T[1], T[2]], START, ACC)
    peaks_t = tl.full([T[1], T[2]], START, ACC)
    for start in range(0, parts, T[2]):
        k = start + tl.arange(0, T[2]).to(tl.int64)
        mask = inside[:, None] & (k < parts)[None, :]
        at = base[:, None] + k[None, :] * inner
        peaks_s = tl.maximum(peaks_s, tl.load(at, mask=mask, other=START))
        peaks_t = tl.maximum(peaks_t, tl.load(at + 2 * plane, mask=mask, other=START))
    peak_s = tl.max(peaks_s, 1)
    peak_t = tl.max(peaks_t, 1)
    total_s = tl.zeros([T[1], T[2]], ACC)
    total_t = tl.zeros([T[1], T[2]], ACC)
    cross = tl.zeros([T[1], T[2]], ACC)
    for start in range(0, parts, T[2]):
        k = start + tl.arange(0, T[2]).to(tl.int64)
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
    x = Softmaxes(peak_s, tl.sum(total_s, 1), peak_t, tl.sum(total_t, 1), tl.sum(cross, 1))
    _finish(out, outer * inner + i, inside, x, tau, tl.full((), scale, tl.float64), ACC)


@triton.jit
def _backward(
    grad,  # () or (groups,) ACC
    student,  # map, any float dtype
    teacher,  # map, any float dtype
    stats,  # (groups, 4) ACC
    out,  # map, dtype of student
    tau: tl.float64,
    scale: tl.float64,
    PER_GROUP: tl.constexpr,
    g,  # tiles.Tiles
):
    """grad * scale * tau * (softmax(s / tau) - softmax(t / tau))."""
    at = locate(g)
    group = at.outer * g.inner + at.inner
    tau = tl.full((), tau, tl.float64)
    to_log2 = (1 / tau * LOG2E).to(g.ACC)
    factor = (tl.load(grad + group, mask=at.inside, other=0) if PER_GROUP else tl.load(grad)) + tl.zeros(
        [g.BLOCK_INNER], g.ACC
    )
    factor *= (tau * tl.full((), scale, tl.float64)).to(g.ACC)
    stats += group * 4
    peak_s = tl.load(stats, mask=at.inside, other=0)
    log_s = tl.load(stats + 1, mask=at.inside, other=0)
    peak_t = tl.load(stats + 2, mask=at.inside, other=0)
    log_t = tl.load(stats + 3, mask=at.inside, other=0)
    first = at.chunk * g.chunk
    for start in range(first, tl.minimum(first + g.chunk, at.length), g.BLOCK_REDUCED):
        offset, mask = tile_of(g, at, start)
        s = tl.load(student + offset, mask=mask, other=0).to(g.ACC)
        t = tl.load(teacher + offset, mask=mask, other=0).to(g.ACC)
        d = difference(s, t, to_log2, (peak_s, log_s, peak_t, log_t)) * factor[:, None]
        tl.store(out + offset, d.to(out.dtype.element_ty), mask=mask)


def forward(
    student: Tensor, teacher: Tensor, temperature: float, reduction: str, scale: float
) -> tuple[Tensor, Tensor]:
    """The loss and the four numbers per channel for the backward; see ``fastkd.ops.cwd``.

    Args:
        student, teacher: (N, C, H, W) in the same layout, NCHW-contiguous or channels_last.
    """
    n, c = student.shape[:2]
    acc, ACC = accumulator(student)
    # In channels_last a reduction of every tile would cross warps; per-element softmaxes need registers, so smaller tiles.
    lanes = not student.is_contiguous()
    tiled = cut(student, "pixels", maps=3 if lanes else 2)
    terms = student.new_empty((n, c), dtype=acc)
    stats = student.new_empty((n, c, 4), dtype=acc)
    plane = n * tiled.chunks * c
    part = None if tiled.chunks == 1 else student.new_empty((5, plane), dtype=acc)
    inner_scale = scale if reduction == "none" else 1.0
    launch(
        _forward, (tiled.programs,), student, student, teacher, part, (terms, stats), temperature, inner_scale, plane,
        lanes, tiled.tiles,
    )  # fmt: skip
    if part is not None:
        blocks = cut_parts(c, tiled.chunks)
        T = tuple(map(tl.constexpr, (ACC, *blocks)))
        grid = (n * triton.cdiv(c, blocks[0]),)
        launch(_merge, grid, student, part, (terms, stats), temperature, inner_scale, (plane, c, tiled.chunks), T)
    return (terms if reduction == "none" else scaled_sum(terms, scale)), stats


def backward(
    grad: Tensor, student: Tensor, teacher: Tensor, temperature: float, reduction: str, scale: float, stats: Tensor
) -> Tensor:
    """Gradient of ``sum(grad * loss)`` with respect to the student, in its dtype and layout.

    Args:
        grad: shaped like the loss of :func:`forward`, contiguous.
        stats: from :func:`forward`.
    """
    tiled = cut(student, "pixels")
    out = torch.empty_like(student)
    launch(
        _backward, (tiled.programs,), student, grad, student, teacher, stats, out, temperature, scale,
        reduction == "none", tiled.tiles,
    )  # fmt: skip
    return out

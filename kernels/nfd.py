"""NFD: loss[g] = mean over group g of (z(S) - z(T))^2, z(x) = (x - mean) / sqrt(var + eps); derived in docs/nfd.md.

The forward reads S and T once and writes 7 numbers per group (and 7 per chunk if groups are split). The backward reads
both again and writes the gradient. Total: 3 * bytes(S) + 2 * bytes(T).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import accumulator, launch
from .tiles import block_of, cut, cut_parts, locate, tile_of
from .total import scaled_sum

REDUCED = {"hw": "pixels", "nhw": "pixels", "c": "channels", "chw": "sample"}


class Moments(NamedTuple):
    """Per group, in fp64: close to convergence the loss is a small difference of large numbers."""

    count: Any
    mean_s: Any
    mean_t: Any
    square_s: Any  # centred sums
    square_t: Any
    product: Any


@triton.jit
def _finish(out, group, inside, x, eps, scale, ACC: tl.constexpr):
    """Writes the loss and the numbers for the backward from the moments; ``out``: (loss, stats)."""
    inv_s = 1 / tl.sqrt(x.square_s / x.count + eps)
    inv_t = 1 / tl.sqrt(x.square_t / x.count + eps)
    part_s = x.square_s / x.count * inv_s * inv_s
    part_t = x.square_t / x.count * inv_t * inv_t
    cross = x.product / x.count * inv_s * inv_t
    tl.store(out[0] + group, (((part_s - cross) + (part_t - cross)) * scale).to(ACC), mask=inside)
    stats = out[1] + group * 6
    shift_s = x.mean_s.to(ACC)
    shift_t = x.mean_t.to(ACC)
    tl.store(stats, shift_s, mask=inside)
    tl.store(stats + 1, (x.mean_s - shift_s.to(tl.float64)).to(ACC), mask=inside)
    tl.store(stats + 2, shift_t, mask=inside)
    tl.store(stats + 3, (x.mean_t - shift_t.to(tl.float64)).to(ACC), mask=inside)
    tl.store(stats + 4, (2 / x.count * inv_s * inv_s * (1 - (part_s - cross))).to(ACC), mask=inside)
    tl.store(stats + 5, (2 / x.count * inv_s * inv_t).to(ACC), mask=inside)


@triton.jit
def _forward(
    student,  # map, any float dtype
    teacher,  # map, any float dtype
    part,  # (7, outer, chunks, inner) ACC, or None if a group is one chunk
    out,  # loss (groups,) ACC, stats (groups, 6) ACC
    eps: tl.float64,
    scale: tl.float64,
    plane,  # outer * chunks * inner
    g,  # tiles.Tiles
):
    """Moments of one chunk: each tile about its own mean, merged by Chan's rule."""
    at = locate(g)
    first = at.chunk * g.chunk
    # Means are relative to the chunk's first element: fp32 cannot hold the mean itself when |mean| >> std.
    shift_s = tl.load(student + at.base + first * g.stride_reduced, mask=at.inside, other=0).to(g.ACC)
    shift_t = tl.load(teacher + at.base + first * g.stride_reduced, mask=at.inside, other=0).to(g.ACC)
    zero = tl.zeros([g.BLOCK_INNER], g.ACC)
    rest_s, rest_t, square_s, square_t, product = zero, zero, zero, zero, zero
    for start in range(first, tl.minimum(first + g.chunk, at.length), g.BLOCK_REDUCED):
        offset, mask = tile_of(g, at, start)
        s = tl.load(student + offset, mask=mask, other=0).to(g.ACC)
        t = tl.load(teacher + offset, mask=mask, other=0).to(g.ACC)
        s = tl.where(mask, s - shift_s[:, None], 0)
        t = tl.where(mask, t - shift_t[:, None], 0)
        n = tl.minimum(at.length - start, g.BLOCK_REDUCED).to(g.ACC)
        before = (start - first).to(g.ACC)
        mean_s = tl.sum(s, 1) / n
        mean_t = tl.sum(t, 1) / n
        s = tl.where(mask, s - mean_s[:, None], 0)
        t = tl.where(mask, t - mean_t[:, None], 0)
        share = n / (before + n)
        step_s = mean_s - rest_s
        step_t = mean_t - rest_t
        rest_s += step_s * share
        rest_t += step_t * share
        square_s += tl.sum(s * s, 1) + step_s * step_s * (before * share)
        square_t += tl.sum(t * t, 1) + step_t * step_t * (before * share)
        product += tl.sum(s * t, 1) + step_s * step_t * (before * share)
    if part is None:
        mean_s = shift_s.to(tl.float64) + rest_s.to(tl.float64)
        mean_t = shift_t.to(tl.float64) + rest_t.to(tl.float64)
        squares = (square_s.to(tl.float64), square_t.to(tl.float64), product.to(tl.float64))
        x = Moments(tl.cast(at.length, tl.float64), mean_s, mean_t, squares[0], squares[1], squares[2])
        eps, scale = tl.full((), eps, tl.float64), tl.full((), scale, tl.float64)
        _finish(out, at.outer * g.inner + at.inner, at.inside, x, eps, scale, g.ACC)
    else:
        plane = tl.cast(plane, tl.int64)
        part += (at.outer * g.chunks + at.chunk) * g.inner + at.inner
        tl.store(part, shift_s, mask=at.inside)
        tl.store(part + plane, rest_s, mask=at.inside)
        tl.store(part + 2 * plane, shift_t, mask=at.inside)
        tl.store(part + 3 * plane, rest_t, mask=at.inside)
        tl.store(part + 4 * plane, square_s, mask=at.inside)
        tl.store(part + 5 * plane, square_t, mask=at.inside)
        tl.store(part + 6 * plane, product, mask=at.inside)


@triton.jit
def _merge(
    part,  # (7, outer, parts, inner) ACC
    out,  # loss (groups,) ACC, stats (groups, 6) ACC
    eps: tl.float64,
    scale: tl.float64,
    size,  # (plane: outer * parts * inner, inner, length, parts, chunk, chunks)
    T,  # (ACC, BLOCK_INNER, BLOCK_PARTS)
):
    """Merges the parts of each group in fp64 in two passes: the mean, then the moments about it. A group has one part
    per chunk, times N if the batch is reduced too."""
    inner, length, parts, chunk, chunks = size[1], size[2], size[3], size[4], size[5]
    outer, i = block_of(tl.program_id(0), inner, T[1])
    inside = i < inner
    plane = tl.cast(size[0], tl.int64)
    base = part + outer * parts * inner + i
    count = tl.cast(length, tl.float64) * (parts // chunks)
    sum_s = tl.zeros([T[1], T[2]], tl.float64)
    sum_t = tl.zeros([T[1], T[2]], tl.float64)
    for start in range(0, parts, T[2]):
        k = start + tl.arange(0, T[2]).to(tl.int64)
        mask = inside[:, None] & (k < parts)[None, :]
        at = base[:, None] + k[None, :] * inner
        n = tl.minimum(length - k % chunks * chunk, chunk).to(tl.float64)
        s = tl.load(at, mask=mask, other=0).to(tl.float64) + tl.load(at + plane, mask=mask, other=0)
        t = tl.load(at + 2 * plane, mask=mask, other=0).to(tl.float64) + tl.load(at + 3 * plane, mask=mask, other=0)
        sum_s += n[None, :] * s
        sum_t += n[None, :] * t
    mean_s = tl.sum(sum_s, 1) / count
    mean_t = tl.sum(sum_t, 1) / count
    square_s = tl.zeros([T[1], T[2]], tl.float64)
    square_t = tl.zeros([T[1], T[2]], tl.float64)
    product = tl.zeros([T[1], T[2]], tl.float64)
    for start in range(0, parts, T[2]):
        k = start + tl.arange(0, T[2]).to(tl.int64)
        mask = inside[:, None] & (k < parts)[None, :]
        at = base[:, None] + k[None, :] * inner
        n = tl.minimum(length - k % chunks * chunk, chunk).to(tl.float64)
        s = tl.load(at, mask=mask, other=0).to(tl.float64) + tl.load(at + plane, mask=mask, other=0)
        t = tl.load(at + 2 * plane, mask=mask, other=0).to(tl.float64) + tl.load(at + 3 * plane, mask=mask, other=0)
        s = tl.where(mask, s - mean_s[:, None], 0)
        t = tl.where(mask, t - mean_t[:, None], 0)
        square_s += n[None, :] * s * s + tl.load(at + 4 * plane, mask=mask, other=0)
        square_t += n[None, :] * t * t + tl.load(at + 5 * plane, mask=mask, other=0)
        product += n[None, :] * s * t + tl.load(at + 6 * plane, mask=mask, other=0)
    x = Moments(count, mean_s, mean_t, tl.sum(square_s, 1), tl.sum(square_t, 1), tl.sum(product, 1))
    _finish(
        out, outer * inner + i, inside, x, tl.full((), eps, tl.float64), tl.full((), scale, tl.float64), T[0]
    )  # fmt: skip


@triton.jit
def _backward(
    grad,  # () or (groups,) ACC
    student,  # map, any float dtype
    teacher,  # map, any float dtype
    stats,  # (groups, 6) ACC
    out,  # map, dtype of student
    scale: tl.float64,
    groups,  # stride between outer indices: inner, or 0 if the batch is reduced too
    PER_GROUP: tl.constexpr,
    g,  # tiles.Tiles
):
    """grad * scale * (A * (s - mean_s) - B * (t - mean_t)); both means as shift + remainder."""
    at = locate(g)
    group = at.outer * groups + at.inner
    factor = tl.zeros([g.BLOCK_INNER], g.ACC) + tl.full((), scale, tl.float64).to(g.ACC)
    factor *= tl.load(grad + group, mask=at.inside, other=0) if PER_GROUP else tl.load(grad)
    stats += group * 6
    shift_s = tl.load(stats, mask=at.inside, other=0)
    rest_s = tl.load(stats + 1, mask=at.inside, other=0)
    shift_t = tl.load(stats + 2, mask=at.inside, other=0)
    rest_t = tl.load(stats + 3, mask=at.inside, other=0)
    scale_s = factor * tl.load(stats + 4, mask=at.inside, other=0)
    scale_t = factor * tl.load(stats + 5, mask=at.inside, other=0)
    first = at.chunk * g.chunk
    for start in range(first, tl.minimum(first + g.chunk, at.length), g.BLOCK_REDUCED):
        offset, mask = tile_of(g, at, start)
        s = tl.load(student + offset, mask=mask, other=0).to(g.ACC)
        t = tl.load(teacher + offset, mask=mask, other=0).to(g.ACC)
        s = (s - shift_s[:, None]) - rest_s[:, None]
        t = (t - shift_t[:, None]) - rest_t[:, None]
        d = scale_s[:, None] * s - scale_t[:, None] * t
        tl.store(out + offset, d.to(out.dtype.element_ty), mask=mask)


def forward(
    student: Tensor, teacher: Tensor, dims: str, eps: float, reduction: str, scale: float
) -> tuple[Tensor, Tensor]:
    """The loss and the six numbers per group for the backward; see ``fastkd.ops.nfd``.

    Args:
        student, teacher: (N, C, H, W) in the same layout, NCHW-contiguous or channels_last.
        dims: ``"hw"``, ``"nhw"``, ``"c"`` or ``"chw"``.
    """
    n, c, h, w = student.shape
    acc, ACC = accumulator(student)
    tiled = cut(student, REDUCED[dims])
    groups = {"hw": (n, c), "nhw": (c,), "c": (n, h, w), "chw": (n,)}[dims]
    terms = student.new_empty(groups, dtype=acc)
    stats = student.new_empty((*groups, 6), dtype=acc)
    outer, parts = (1, n * tiled.chunks) if dims == "nhw" else (tiled.outer, tiled.chunks)
    plane = outer * parts * tiled.inner
    part = None if parts == 1 else student.new_empty((7, plane), dtype=acc)
    term_scale = scale if reduction == "none" else 1.0
    launch(
        _forward,
        (tiled.programs,),
        student,
        student,
        teacher,
        part,
        (terms, stats),
        eps,
        term_scale,
        plane,
        tiled.tiles,
    )
    if part is not None:
        blocks = cut_parts(tiled.inner, parts)
        size = (plane, tiled.inner, tiled.length, parts, tiled.tiles.chunk, tiled.chunks)
        T = tuple(map(tl.constexpr, (ACC, *blocks)))
        grid = (outer * triton.cdiv(tiled.inner, blocks[0]),)
        launch(_merge, grid, student, part, (terms, stats), eps, term_scale, size, T)
    return (terms if reduction == "none" else scaled_sum(terms, scale)), stats


def backward(
    grad: Tensor,
    student: Tensor,
    teacher: Tensor,
    dims: str,
    eps: float,
    reduction: str,
    scale: float,
    stats: Tensor,
) -> Tensor:
    """Gradient of ``sum(grad * loss)`` with respect to the student, in its dtype and layout.

    Args:
        grad: shaped like the loss of :func:`forward`, contiguous.
        stats: from :func:`forward`.
    """
    tiled = cut(student, REDUCED[dims])
    out = torch.empty_like(student)
    groups = 0 if dims == "nhw" else tiled.inner
    launch(
        _backward, (tiled.programs,), student, grad, student, teacher, stats, out, scale, groups, reduction == "none",
        tiled.tiles,
    )  # fmt: skip
    return out

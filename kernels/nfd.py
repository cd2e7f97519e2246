"""NFD: loss[g] = mean over group g of (z(S) - z(T))^2, z(x) = (x - mean) / sqrt(var + eps); derived in docs/nfd.md.

The forward reads S and T once and writes 7 numbers a group (and 7 a part where groups are split); the backward reads
both once more and writes the gradient: 3 * bytes(S) + 2 * bytes(T) in all.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tiles import accumulator, cut, cut_parts, launch, locate

REDUCED = {"hw": "pixels", "nhw": "pixels", "c": "channels", "chw": "sample"}


@triton.jit
def _finish(
    loss,  # (groups,) ACC
    stats,  # (groups, 6) ACC
    group,
    inside,
    count,  # all that follow are fp64: close to convergence the loss is a small difference of large numbers
    mean_s,
    mean_t,
    square_s,
    square_t,
    product,
    eps,
    ACC: tl.constexpr,
):
    """Loss and backward numbers of groups from their means and their centred sums of squares and products."""
    inv_s = 1 / tl.sqrt(square_s / count + eps)
    inv_t = 1 / tl.sqrt(square_t / count + eps)
    part_s = square_s / count * inv_s * inv_s
    part_t = square_t / count * inv_t * inv_t
    cross = product / count * inv_s * inv_t
    tl.store(loss + group, ((part_s - cross) + (part_t - cross)).to(ACC), mask=inside)
    stats += group * 6
    shift_s = mean_s.to(ACC)
    shift_t = mean_t.to(ACC)
    tl.store(stats, shift_s, mask=inside)
    tl.store(stats + 1, (mean_s - shift_s.to(tl.float64)).to(ACC), mask=inside)
    tl.store(stats + 2, shift_t, mask=inside)
    tl.store(stats + 3, (mean_t - shift_t.to(tl.float64)).to(ACC), mask=inside)
    tl.store(stats + 4, (2 / count * inv_s * inv_s * (1 - (part_s - cross))).to(ACC), mask=inside)
    tl.store(stats + 5, (2 / count * inv_s * inv_t).to(ACC), mask=inside)


@triton.jit
def _forward(
    student,  # map, any float dtype
    teacher,  # map, any float dtype
    part,  # (7, outer, chunks, inner) ACC, or None where a group is one chunk
    loss,  # (groups,) ACC
    stats,  # (groups, 6) ACC
    eps: tl.float64,
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
    """Moments of one chunk: each tile about its own mean, merged by Chan's rule."""
    outer, i, c = locate(inner, chunks, BLOCK_INNER)
    inside = i < inner
    base = outer * stride_outer + i * stride_inner
    first = c * chunk
    # All means are kept relative to the chunk's first element: fp32 cannot hold the mean itself when |mean| >> std.
    shift_s = tl.load(student + base + first * stride_reduced, mask=inside, other=0).to(ACC)
    shift_t = tl.load(teacher + base + first * stride_reduced, mask=inside, other=0).to(ACC)
    rest_s = tl.zeros([BLOCK_INNER], ACC)
    rest_t = tl.zeros([BLOCK_INNER], ACC)
    square_s = tl.zeros([BLOCK_INNER], ACC)
    square_t = tl.zeros([BLOCK_INNER], ACC)
    product = tl.zeros([BLOCK_INNER], ACC)
    for start in range(first, tl.minimum(first + chunk, length), BLOCK_REDUCED):
        r = start + tl.arange(0, BLOCK_REDUCED).to(tl.int64)
        mask = inside[:, None] & (r < length)[None, :]
        offset = base[:, None] + r[None, :] * stride_reduced
        s = tl.load(student + offset, mask=mask, other=0).to(ACC)
        t = tl.load(teacher + offset, mask=mask, other=0).to(ACC)
        s = tl.where(mask, s - shift_s[:, None], 0)
        t = tl.where(mask, t - shift_t[:, None], 0)
        n = tl.minimum(length - start, BLOCK_REDUCED).to(ACC)
        before = (start - first).to(ACC)
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
        count = tl.cast(length, tl.float64)
        square_s = square_s.to(tl.float64)
        square_t = square_t.to(tl.float64)
        product = product.to(tl.float64)
        eps = tl.full((), eps, tl.float64)
        group = outer * inner + i
        _finish(loss, stats, group, inside, count, mean_s, mean_t, square_s, square_t, product, eps, ACC)
    else:
        plane = tl.cast(plane, tl.int64)
        part += (outer * chunks + c) * inner + i
        tl.store(part, shift_s, mask=inside)
        tl.store(part + plane, rest_s, mask=inside)
        tl.store(part + 2 * plane, shift_t, mask=inside)
        tl.store(part + 3 * plane, rest_t, mask=inside)
        tl.store(part + 4 * plane, square_s, mask=inside)
        tl.store(part + 5 * plane, square_t, mask=inside)
        tl.store(part + 6 * plane, product, mask=inside)


@triton.jit
def _merge(
    part,  # (7, outer, parts, inner) ACC
    loss,  # (groups,) ACC
    stats,  # (groups, 6) ACC
    eps: tl.float64,
    plane,  # outer * parts * inner
    inner,
    length,
    parts,  # to merge for one group: its chunks, times N where the batch is reduced too
    chunk,
    chunks,
    ACC: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
):
    """Merges the chunks of each group in fp64, in two passes: the mean, then the moments about it."""
    outer, i, _ = locate(inner, 1, BLOCK_INNER)
    inside = i < inner
    plane = tl.cast(plane, tl.int64)
    base = part + outer * parts * inner + i
    count = tl.cast(length, tl.float64) * (parts // chunks)
    sum_s = tl.zeros([BLOCK_INNER, BLOCK_PARTS], tl.float64)
    sum_t = tl.zeros([BLOCK_INNER, BLOCK_PARTS], tl.float64)
    for start in range(0, parts, BLOCK_PARTS):
        k = start + tl.arange(0, BLOCK_PARTS).to(tl.int64)
        mask = inside[:, None] & (k < parts)[None, :]
        at = base[:, None] + k[None, :] * inner
        n = tl.minimum(length - k % chunks * chunk, chunk).to(tl.float64)
        s = tl.load(at, mask=mask, other=0).to(tl.float64) + tl.load(at + plane, mask=mask, other=0)
        t = tl.load(at + 2 * plane, mask=mask, other=0).to(tl.float64) + tl.load(at + 3 * plane, mask=mask, other=0)
        sum_s += n[None, :] * s
        sum_t += n[None, :] * t
    mean_s = tl.sum(sum_s, 1) / count
    mean_t = tl.sum(sum_t, 1) / count
    square_s = tl.zeros([BLOCK_INNER, BLOCK_PARTS], tl.float64)
    square_t = tl.zeros([BLOCK_INNER, BLOCK_PARTS], tl.float64)
    product = tl.zeros([BLOCK_INNER, BLOCK_PARTS], tl.float64)
    for start in range(0, parts, BLOCK_PARTS):
        k = start + tl.arange(0, BLOCK_PARTS).to(tl.int64)
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
    square_s = tl.sum(square_s, 1)
    square_t = tl.sum(square_t, 1)
    product = tl.sum(product, 1)
    eps = tl.full((), eps, tl.float64)
    _finish(loss, stats, outer * inner + i, inside, count, mean_s, mean_t, square_s, square_t, product, eps, ACC)


@triton.jit
def _backward(
    grad,  # (groups,) ACC
    student,  # map, any float dtype
    teacher,  # map, any float dtype
    stats,  # (groups, 6) ACC
    out,  # map, dtype of student
    groups,  # from one outer index to the next: inner, or 0 where the batch is reduced too
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
    """grad * (A * (s - mean_s) - B * (t - mean_t)), with both means as shift + rest."""
    outer, i, c = locate(inner, chunks, BLOCK_INNER)
    inside = i < inner
    base = outer * stride_outer + i * stride_inner
    group = outer * groups + i
    scale = tl.load(grad + group, mask=inside, other=0)
    stats += group * 6
    shift_s = tl.load(stats, mask=inside, other=0)
    rest_s = tl.load(stats + 1, mask=inside, other=0)
    shift_t = tl.load(stats + 2, mask=inside, other=0)
    rest_t = tl.load(stats + 3, mask=inside, other=0)
    scale_s = scale * tl.load(stats + 4, mask=inside, other=0)
    scale_t = scale * tl.load(stats + 5, mask=inside, other=0)
    first = c * chunk
    for start in range(first, tl.minimum(first + chunk, length), BLOCK_REDUCED):
        r = start + tl.arange(0, BLOCK_REDUCED).to(tl.int64)
        mask = inside[:, None] & (r < length)[None, :]
        offset = base[:, None] + r[None, :] * stride_reduced
        s = tl.load(student + offset, mask=mask, other=0).to(ACC)
        t = tl.load(teacher + offset, mask=mask, other=0).to(ACC)
        s = (s - shift_s[:, None]) - rest_s[:, None]
        t = (t - shift_t[:, None]) - rest_t[:, None]
        d = scale_s[:, None] * s - scale_t[:, None] * t
        tl.store(out + offset, d.to(out.dtype.element_ty), mask=mask)


def forward(student: Tensor, teacher: Tensor, dims: str, eps: float) -> tuple[Tensor, Tensor]:
    """Loss of each group and the six numbers its backward needs: see ``fastkd.ops.nfd``.

    Args:
        student, teacher: (N, C, H, W) of one layout, NCHW-contiguous or channels_last.
        dims: the group: ``"hw"``, ``"nhw"``, ``"c"`` or ``"chw"``.

    Returns:
        loss (groups), stats (groups, 6): fp32, or fp64 for fp64 maps.
    """
    n, c, h, w = student.shape
    acc, ACC = accumulator(student)
    tiles = cut(student, REDUCED[dims])
    groups = {"hw": (n, c), "nhw": (c,), "c": (n, h, w), "chw": (n,)}[dims]
    loss = student.new_empty(groups, dtype=acc)
    stats = student.new_empty((*groups, 6), dtype=acc)
    outer, parts = (1, n * tiles.chunks) if dims == "nhw" else (tiles.outer, tiles.chunks)
    part = None if parts == 1 else student.new_empty((7, outer * parts * tiles.inner), dtype=acc)
    plane = outer * parts * tiles.inner
    launch(
        _forward, tiles.grid, student, student, teacher, part, loss, stats, eps, plane, *tiles.runtime,
        ACC=ACC, **tiles.blocks,
    )  # fmt: skip
    if part is not None:
        blocks = cut_parts(tiles.inner, parts)
        grid = (outer * triton.cdiv(tiles.inner, blocks["BLOCK_INNER"]),)
        launch(
            _merge, grid, student, part, loss, stats, eps, plane, tiles.inner, tiles.length, parts,
            tiles.chunk, tiles.chunks, ACC=ACC, **blocks,
        )  # fmt: skip
    return loss, stats


def backward(grad: Tensor, student: Tensor, teacher: Tensor, stats: Tensor, dims: str) -> Tensor:
    """Gradient of ``sum(grad * loss)`` with respect to the student, in its dtype and layout.

    Args:
        grad: like the loss of :func:`forward`, contiguous.
        stats: of :func:`forward`.
    """
    tiles = cut(student, REDUCED[dims])
    out = torch.empty_like(student)
    groups = 0 if dims == "nhw" else tiles.inner
    launch(
        _backward, tiles.grid, student, grad, student, teacher, stats, out, groups, *tiles.runtime,
        ACC=accumulator(student)[1], **tiles.blocks,
    )  # fmt: skip
    return out

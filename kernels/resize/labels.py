"""Labels and weights of label pixels, and stores at label resolution."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..launch import launch
from .cells import cell_of, right_weight
from .interpolation import INV_LN2, advance
from .tuples import fill


class Labels(NamedTuple):
    """Per-pixel inputs."""

    target: Any  # (N, H, W) uint8, int32 or int64, or None
    class_weight: Any  # (C,) ACC, or None
    pixel_weight: Any  # (N, H, W) ACC, or None
    selected: Any  # (N, H, W) bool, or ACC: log-sum-exp, NaN where a pixel does not count; or None
    ignore_index: Any


class Worth(NamedTuple):
    """Label and weight of label pixels: tuples with one entry each."""

    # As floats: for integers LLVM would re-evaluate ``counted`` in every class. -1 where a label pixel does not count.
    label: Any
    counted: Any
    share: Any  # class weight, summed for the mean; 0 where it does not count
    known: Any  # log-sum-exp from ``selected``, base 2, inf where it does not count; or ()


@triton.jit
def in_row(to, grid, place, pixels):
    """Pointers to the label pixels of a part's first row. Offsets from the first pointer: 64-bit positions would hold
    two registers each outside the loop over parts."""
    out = ()
    first = to + ((place.sample.to(tl.int64) * grid.height + pixels.y[0]) * grid.width + pixels.x[0])
    for j in tl.static_range(len(pixels.x)):
        out = out + (first + j,)
    return out


@triton.jit
def of_row(values, i, j: tl.constexpr, columns: tl.constexpr):
    """Column ``j`` of row ``i``; ``i`` is a runtime value."""
    out = values[j]
    for r in tl.static_range(1, len(values) // columns):
        out = tl.where(i == r, values[r * columns + j], out)
    return out


@triton.jit
def put_row(values, i, row):
    """``values`` with row ``i``, a runtime value, replaced."""
    out = ()
    for k in tl.static_range(len(values)):
        out = out + (tl.where(i == k // len(row), row[k % len(row)], values[k]),)
    return out


@triton.jit
def read_labels(labels, grid, place, pixels, classes, T):
    """The :class:`Worth` of a part's label pixels. The loop over rows carries the pointers, see :func:`begin`."""
    columns: tl.constexpr = len(pixels.x)
    zero = tl.zeros([T.CELLS], T.ACC)
    label = fill(tl.zeros([T.CELLS], tl.float32) - 1, len(pixels.exist))
    share = fill(zero, len(pixels.exist)) if labels.class_weight is not None else ()
    known = ()
    targets = in_row(labels.target, grid, place, pixels) if labels.target is not None else ()
    chosen = in_row(labels.selected, grid, place, pixels) if labels.selected is not None else ()
    if len(chosen) > 0:
        if labels.selected.dtype.element_ty.is_floating():
            known = fill(zero + float("inf"), len(pixels.exist))
    for i in range(len(pixels.y)):
        row_label, row_share, row_known = (), (), ()
        for j in tl.static_range(columns):
            ok = of_row(pixels.exist, i, j, columns)
            own = tl.zeros([T.CELLS], tl.int32)
            if len(targets) > 0:
                given = tl.load(targets[j], mask=ok, other=0).to(tl.int64)
                ok = ok & (given != labels.ignore_index) & (given >= 0) & (given < classes)
                own = given.to(tl.int32)
            if len(chosen) > 0:
                found = tl.load(chosen[j], mask=ok, other=0)
                if found.dtype.is_floating():
                    ok = ok & (found == found)
                    row_known = row_known + (tl.where(ok, found * INV_LN2, float("inf")),)
                else:
                    ok = ok & (found != 0)
            if len(share) > 0:
                row_share = row_share + (tl.load(labels.class_weight + own, mask=ok, other=0),)
            row_label = row_label + (tl.where(ok, own.to(tl.float32), -1.0),)
        label = put_row(label, i, row_label)
        if len(share) > 0:
            share = put_row(share, i, row_share)
        if len(known) > 0:
            known = put_row(known, i, row_known)
        targets, chosen = advance(targets, grid.width), advance(chosen, grid.width)
    counted = ()
    for k in tl.static_range(len(label)):
        counted = counted + (label[k] >= 0,)
    if len(share) == 0:
        for k in tl.static_range(len(label)):
            share = share + (counted[k].to(T.ACC),)
    return Worth(label, counted, share, known)


@triton.jit
def weigh(labels, grid, place, pixels, worth):
    """Each label pixel's share times its pixel weight. Called after the sums over classes, which need the registers."""
    columns: tl.constexpr = len(pixels.x)
    factor = worth.share
    if labels.pixel_weight is not None:
        at = in_row(labels.pixel_weight, grid, place, pixels)
        read = factor
        for i in range(len(pixels.y)):
            row = ()
            for j in tl.static_range(columns):
                row = row + (tl.load(at[j], mask=of_row(worth.counted, i, j, columns), other=0),)
            read = put_row(read, i, row)
            at = advance(at, grid.width)
        factor = ()
        for k in tl.static_range(len(read)):
            factor = factor + (worth.share[k] * read[k],)
    return factor


@triton.jit
def write_pixels(to, grid, place, pixels, given):
    """Stores one number per label pixel of a part in ``to`` (N, H, W)."""
    columns: tl.constexpr = len(pixels.x)
    at = in_row(to, grid, place, pixels)
    for i in range(len(pixels.y)):
        for j in tl.static_range(columns):
            tl.store(at[j], of_row(given, i, j, columns), mask=of_row(pixels.exist, i, j, columns))
        at = advance(at, grid.width)


@triton.jit
def _resize_weight(
    weight,  # (N, height, width) ACC
    out,  # (N, H, W) ACC
    size,  # (elements of out, height, width, H, W)
    T,  # (ALIGN, INT, BLOCK)
):
    """Resizes pixel weights to label size. Neighbours of weight 0 are not read: 0 * inf would be NaN."""
    ACC: tl.constexpr = out.dtype.element_ty
    at = tl.program_id(0).to(tl.int64) * T[2] + tl.arange(0, T[2])
    inside = at < size[0]
    height, width = size[1], size[2]
    x = (at % size[4]).to(T[1])
    y = (at // size[4] % size[3]).to(T[1])
    given = weight + at // size[4] // size[3] * height * width
    top, left = cell_of(y, height, size[3], T[0]), cell_of(x, width, size[4], T[0])
    down = right_weight(y, top, height, size[3], T[0], ACC)
    right = right_weight(x, left, width, size[4], T[0], ACC)
    below = tl.where(down == 0, top, tl.minimum(top + 1, height - 1)).to(tl.int64) * width
    above = tl.where(down == 1, 0, tl.maximum(top, 0)).to(tl.int64) * width
    beside = tl.where(right == 0, left, tl.minimum(left + 1, width - 1))
    left = tl.where(right == 1, 0, tl.maximum(left, 0))
    a = tl.load(given + above + left, mask=inside, other=0)
    a += right * (tl.load(given + above + beside, mask=inside, other=0) - a)
    b = tl.load(given + below + left, mask=inside, other=0)
    b += right * (tl.load(given + below + beside, mask=inside, other=0) - b)
    tl.store(out + at, a + down * (b - a), mask=inside)


def resize_weight(weight: Tensor | None, size: Sequence[int], align_corners: bool) -> Tensor | None:
    """Pixel weights (N, any height, any width) at label size."""
    if weight is None or weight.shape[1:] == tuple(size):
        return weight
    n, h, w = weight.shape
    out = weight.new_empty((n, *size))
    wide = 4 * (max(size) + 1) * (max(h, w) + 1) >= 2**31
    T = tuple(map(tl.constexpr, (align_corners, tl.int64 if wide else tl.int32, 512)))
    launch(_resize_weight, (triton.cdiv(out.numel(), 512),), out, weight, out, (out.numel(), h, w, *size), T)
    return out

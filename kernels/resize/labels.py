"""What label pixels are worth, and numbers written for each of them."""

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
    """What each label pixel is worth."""

    target: Any  # (N, H, W) uint8, int32 or int64, or None
    class_weight: Any  # (C,) ACC, or None
    pixel_weight: Any  # (N, H, W) ACC, or None
    selected: Any  # (N, H, W) bool, or ACC: the log-sum-exp, NaN where a pixel does not count; or None
    ignore_index: Any


class Worth(NamedTuple):
    """What each label pixel is worth: tuples of one entry a label pixel."""

    label: (
        Any  # as floats: of integers LLVM would look up class by class whether they count; -1 where one does not count
    )
    counted: Any
    share: Any  # class weight, which the mean counts; 0 where it does not count
    factor: Any  # that times pixel weight
    known: Any  # the log-sum-exp that ``selected`` has, base 2, inf where it does not count; or ()


@triton.jit
def in_row(to, grid, place, pixels):
    """Pointers to the label pixels of a part's first row."""
    out = ()
    row = (place.sample * grid.height + pixels.y[0]) * grid.width
    for j in tl.static_range(len(pixels.x)):
        out = out + (to + (row + pixels.x[j]),)
    return out


@triton.jit
def put_row(values, i, row):
    """``values`` with row ``i``, which is known at run time, replaced."""
    out = ()
    for k in tl.static_range(len(values)):
        out = out + (tl.where(i == k // len(row), row[k % len(row)], values[k]),)
    return out


@triton.jit
def read_labels(labels, grid, place, pixels, classes, T):
    """The :class:`Worth` of a part's label pixels; rows in a loop that carries the pointers, see :func:`begin`."""
    columns: tl.constexpr = len(pixels.x)
    zero = tl.zeros([T.CELLS], T.ACC)
    label = fill(tl.zeros([T.CELLS], tl.float32) - 1, len(pixels.exist))
    share = fill(zero, len(pixels.exist))
    factor = share
    known = ()
    targets = in_row(labels.target, grid, place, pixels) if labels.target is not None else ()
    weights = in_row(labels.pixel_weight, grid, place, pixels) if labels.pixel_weight is not None else ()
    chosen = in_row(labels.selected, grid, place, pixels) if labels.selected is not None else ()
    if len(chosen) > 0:
        if labels.selected.dtype.element_ty.is_floating():
            known = fill(zero + float("inf"), len(pixels.exist))
    for i in range(len(pixels.y)):
        row_label, row_share, row_factor, row_known = (), (), (), ()
        for j in tl.static_range(columns):
            ok = pixels.exist[j]
            for r in tl.static_range(1, len(pixels.y)):
                ok = tl.where(i == r, pixels.exist[r * columns + j], ok)
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
            worth = ok.to(T.ACC)
            if labels.class_weight is not None:
                worth = tl.load(labels.class_weight + own, mask=ok, other=0)
            row_share = row_share + (worth,)
            if len(weights) > 0:
                worth *= tl.load(weights[j], mask=ok, other=0)
            row_factor = row_factor + (worth,)
            row_label = row_label + (tl.where(ok, own.to(tl.float32), -1.0),)
        label, share, factor = (
            put_row(label, i, row_label),
            put_row(share, i, row_share),
            put_row(factor, i, row_factor),
        )
        if len(known) > 0:
            known = put_row(known, i, row_known)
        targets, weights = advance(targets, grid.width), advance(weights, grid.width)
        chosen = advance(chosen, grid.width)
    counted = ()
    for k in tl.static_range(len(label)):
        counted = counted + (label[k] >= 0,)
    return Worth(label, counted, share, factor, known)


@triton.jit
def write_pixels(to, grid, place, pixels, given):
    """Stores a number a label pixel of a part in ``to`` (N, H, W)."""
    columns: tl.constexpr = len(pixels.x)
    at = in_row(to, grid, place, pixels)
    for i in range(len(pixels.y)):
        for j in tl.static_range(columns):
            ok, value = pixels.exist[j], given[j]
            for r in tl.static_range(1, len(pixels.y)):
                ok = tl.where(i == r, pixels.exist[r * columns + j], ok)
                value = tl.where(i == r, given[r * columns + j], value)
            tl.store(at[j], value, mask=ok)
        at = advance(at, grid.width)


@triton.jit
def _resize_weight(
    weight,  # (N, height, width) ACC
    out,  # (N, H, W) ACC
    size,  # (elements of out, height, width, H, W)
    T,  # (ALIGN, INT, BLOCK)
):
    """A map of weights at label size. A neighbour of weight 0 is not looked at: 0 * inf would be NaN."""
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

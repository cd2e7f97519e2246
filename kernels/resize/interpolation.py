"""Interpolated values of a cell's label pixels, class by class, and their upper bounds."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .cells import Cell, Pixels, cell_of, right_weight
from .preparation import LOW32, LOW64
from .tuples import fill, pick

LN2 = tl.constexpr(0.6931471805599453)
INV_LN2 = tl.constexpr(1.4426950408889634)
# Below this a sum of exponentials has lost terms: fp32 goes down to 2**-126, so terms down to 2**-60 of the largest
# survive.
FAR = tl.constexpr(2.0**-66)


class Taps(NamedTuple):
    """Sampling positions in a map of another size than the one whose cells define the lanes; tuples."""

    above: Any  # ROWS: offsets of the logits above
    left: Any  # COLUMNS
    down: Any  # ROWS: weights
    right: Any  # COLUMNS


class View(NamedTuple):
    """A map, and how label pixels sample it."""

    logits: Any  # Logits
    taps: Any  # or () for the map whose cells define the lanes


class Shift(NamedTuple):
    """Subtracted from interpolated values."""

    lane: Any  # one number per lane
    each: Any  # tuple with one number per label pixel, or empty


@triton.jit
def plane_of(logits):
    """Elements between classes."""
    return tl.cast(logits.height + 2, tl.int64) * (logits.width + 2)


@triton.jit
def taps_of(logits, grid, pixels, T):
    """Sampling positions of a cell's label pixels in a map of another size."""
    above, down, left, right = (), (), (), ()
    for i in tl.static_range(len(pixels.y)):
        cell = cell_of(pixels.y[i], logits.height, grid.height, T.ALIGN)
        above = above + ((cell + 1) * (logits.width + 2),)
        down = down + (right_weight(pixels.y[i], cell, logits.height, grid.height, T.ALIGN, T.ACC),)
    for j in tl.static_range(len(pixels.x)):
        cell = cell_of(pixels.x[j], logits.width, grid.width, T.ALIGN)
        left = left + (cell + 1,)
        right = right + (right_weight(pixels.x[j], cell, logits.width, grid.width, T.ALIGN, T.ACC),)
    return Taps(above, left, down, right)


@triton.jit
def begin(view, cell):
    """Pointers to class 0, a tuple that loops over classes carry: to the four logits of each lane's cell, or to the
    sample if the map has taps.

    Four pointers and not one with three offsets: Triton's Coalesce pass walks the whole kernel for every pointer
    computed at its use, which took most of the compile time.
    """
    at = view.logits.data + cell.place.sample.to(tl.int64) * view.logits.classes * plane_of(view.logits)
    if len(view.taps) == 0:
        at += (cell.place.y + 1).to(tl.int64) * (view.logits.width + 2) + (cell.place.x + 1)
        return around(at, view.logits)
    else:
        return (at,)


@triton.jit
def around(at, logits):
    """Pointers to four neighbouring logits from that of the first."""
    return at, at + logits.right, at + logits.below, at + logits.below + logits.right


@triton.jit
def advance(at, step):
    out = ()
    for i in tl.static_range(len(at)):
        out = out + (at[i] + step,)
    return out


@triton.jit
def load_each(at):
    out = ()
    for i in tl.static_range(len(at)):
        out = out + (tl.load(at[i]),)
    return out


@triton.jit
def corners(at, mask, shift):
    """Four neighbouring logits minus ``shift``: upper left, step to the right, and how much each changes downwards."""
    above = tl.load(at[0], mask=mask, other=0) - shift
    right = tl.load(at[1], mask=mask, other=0) - shift
    below = tl.load(at[2], mask=mask, other=0) - shift
    across = tl.load(at[3], mask=mask, other=0) - shift
    step = right - above
    return above, step, below - above, (across - below) - step


@triton.jit
def values(view, at, cell, shift):
    """One class's interpolated values, row by row, minus ``shift``."""
    taps, out = view.taps, ()
    if len(taps) == 0:
        corner = corners(at, cell.mask, shift.lane)
        for i in tl.static_range(len(cell.pixels.down)):
            left = corner[0] + cell.pixels.down[i] * corner[2]
            step = corner[1] + cell.pixels.down[i] * corner[3]
            for j in tl.static_range(len(cell.pixels.right)):
                out = out + (left + cell.pixels.right[j] * step,)
    else:
        for i in tl.static_range(len(taps.down)):
            for j in tl.static_range(len(taps.right)):
                mask = cell.mask & cell.pixels.exist[i * len(taps.right) + j]
                corner = corners(around(at[0] + (taps.above[i] + taps.left[j]), view.logits), mask, shift.lane)
                left = corner[0] + taps.down[i] * corner[2]
                out = out + (left + taps.right[j] * (corner[1] + taps.down[i] * corner[3]),)
    if len(shift.each) > 0:
        less = ()
        for k in tl.static_range(len(out)):
            less = less + (out[k] - shift.each[k],)
        out = less
    return out


@triton.jit
def _largest_corner(logits, at, mask):
    a = tl.maximum(tl.load(at, mask=mask, other=0), tl.load(at + logits.right, mask=mask, other=0))
    at += logits.below
    b = tl.maximum(tl.load(at, mask=mask, other=0), tl.load(at + logits.right, mask=mask, other=0))
    return tl.maximum(a, b)


@triton.jit
def bound(view, cell):
    """Largest corner over all classes, which bounds every interpolated value: per lane, or with taps per label pixel."""
    logits = view.logits
    at = logits.peak + cell.place.sample.to(tl.int64) * plane_of(logits)
    out = ()
    if len(view.taps) == 0:
        at += (cell.place.y + 1).to(tl.int64) * (logits.width + 2) + (cell.place.x + 1)
        shift = Shift(_largest_corner(logits, at, cell.mask), ())
    else:
        for i in tl.static_range(len(view.taps.down)):
            for j in tl.static_range(len(view.taps.right)):
                mask = cell.mask & cell.pixels.exist[i * len(view.taps.right) + j]
                out = out + (_largest_corner(logits, at + (view.taps.above[i] + view.taps.left[j]), mask),)
        shift = Shift(0, out)
    return shift


@triton.jit
def each(shift, COUNT: tl.constexpr):
    """The shift per label pixel."""
    return shift.each if len(shift.each) > 0 else fill(shift.lane, COUNT)


@triton.jit
def far_below(total, counted):
    """Counted label pixels whose sum of exponentials has lost terms, as bits of one integer per lane: a tuple of masks
    would hold a register each."""
    bits = tl.where(counted[0] & (total[0] < FAR), 1, 0)
    for k in tl.static_range(1, len(total)):
        bits |= tl.where(counted[k] & (total[k] < FAR), 1 << k, 0)
    return bits


@triton.jit
def has(bits, k):
    """Mask of lanes whose bit ``k`` is set; ``k`` is a runtime value."""
    return ((bits >> k) & 1) != 0


@triton.jit
def any_lane(mask):
    return tl.max(mask.to(tl.int32)) > 0


@triton.jit
def one_pixel(cell, k):
    """The cell reduced to label pixel ``k``, a runtime value."""
    pixels = cell.pixels
    across = len(pixels.right)
    y, x = k // across, k % across
    one = Pixels(
        (pick(pixels.y, y),), (pick(pixels.x, x),), (pick(pixels.down, y),), (pick(pixels.right, x),),
        (pick(pixels.exist, k),),
    )  # fmt: skip
    return Cell(cell.place, one, cell.mask)


@triton.jit
def one_view(view, grid, cell, T):
    """``view`` for a cell of one label pixel."""
    return View(view.logits, () if len(view.taps) == 0 else taps_of(view.logits, grid, cell.pixels, T))


@triton.jit
def largest(view, cell, T):
    """The largest value of a cell's only label pixel."""
    low: tl.constexpr = LOW64 if tl.float64 == T.ACC else LOW32
    peak = tl.zeros([T.CELLS], T.ACC) + low
    at = begin(view, cell)
    for _ in range(view.logits.classes):
        peak = tl.maximum(peak, values(view, at, cell, Shift(0, ()))[0])
        at = advance(at, plane_of(view.logits))
    return peak

"""What every loss at label resolution shares: one thread owns a cell (docs/full-resolution.md).

A cell is the space between four neighbouring logits; the borders are cells too. The label pixels in a cell are
interpolated from those four logits alone, and their gradients go to those four alone. Lanes run along cells, and the
label pixels of a cell, ROWS x COLUMNS at a time, are tuples in a lane's registers. A loop over the classes loads four
corners, blends them once a row, and spends one FMA and one exponential a label pixel. Cells are numbered in one line over
samples, rows and columns, so that small maps fill the lanes too.

Three kernels make a gradient. :func:`prepare` copies the logits to an accumulator plane that is scaled by log2(e) / tau,
with -inf made finite, edges repeated and the largest class of each logit beside it, whatever their layout and dtype. The
loss's own kernel computes loss and gradient, and adds the cells' shares in two planes: what each logit gets from the cells
below it, and from the cells above it. :func:`join` adds the planes, scales, casts, and writes in the student's layout.

The softmax needs no pass for its maximum: the largest corner bounds every interpolated value. Where a label pixel is so
far below its bound that terms would underflow, it is done again about its true maximum.

Taps are exact integers: x * (in - 1) / (out - 1) with aligned corners, ((2 x + 1) * in - out) / (2 out) without.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import accumulator, lanes, launch
from .total import finish, gather_parts

LOG2E = 1.4426950408889634
LN2 = tl.constexpr(0.6931471805599453)
INV_LN2 = tl.constexpr(1.4426950408889634)
# -inf becomes so low that its exponential is 0 whatever it is blended with, and a weight of 0 removes it.
LOW32 = tl.constexpr(-1e37)
LOW64 = tl.constexpr(-1e300)
# A sum of exponentials below this has lost terms: fp32 keeps 2**-126, so that terms of 2**-60 of the largest remain.
FAR = tl.constexpr(2.0**-66)
# Programs a large GPU holds at a time, three times over. Fewer, and a cell's parts go to several programs.
PROGRAMS = 4096


class Logits(NamedTuple):
    """A map as :func:`prepare` leaves it."""

    data: Any  # (N, C, h + 2, w + 2) ACC
    peak: Any  # (N, h + 2, w + 2) ACC: the largest class
    classes: Any
    height: Any  # of the logits
    width: Any
    right: Any  # steps to the neighbouring logits: 0 along an axis that is not resized
    below: Any


class Source(NamedTuple):
    """A map as it came."""

    data: Any  # (N, C, h, w), any float dtype
    stride_n: Any
    stride_c: Any
    stride_x: Any


class Labels(NamedTuple):
    """What each label pixel is worth."""

    target: Any  # (N, H, W) uint8, int32 or int64, or None
    class_weight: Any  # (C,) ACC, or None
    pixel_weight: Any  # (N, H, W) ACC, or None
    selected: Any  # (N, H, W) bool, or ACC: the log-sum-exp, NaN where a pixel does not count; or None
    ignore_index: Any


class Grid(NamedTuple):
    """The line of cells and the label pixels in them."""

    samples: Any
    cells: Any  # in the line
    height: Any  # of the labels
    width: Any
    column_parts: Any  # of a cell
    parts: Any
    split: Any  # programs that share a cell's parts


class Tile(NamedTuple):
    """What a kernel is compiled for, all ``tl.constexpr``."""

    ROWS: Any  # label pixels a lane takes at a time, down and across
    COLUMNS: Any
    CELLS: Any  # lanes
    HALO: Any  # 1 where lanes hand shares to their neighbour: each program recomputes one cell
    ALIGN: Any
    INT: Any  # what taps are computed in: 32 bits where their products fit
    ACC: Any


class Plan(NamedTuple):
    """How label pixels are cut for one map."""

    grid: Grid
    tile: Tile
    programs: int
    split: int


def plan(
    logits: Tensor, size: Sequence[int], align_corners: bool, most: tuple[int, int], halo: int, acc: torch.dtype
) -> Plan:
    """The cut of ``logits`` (N, C, h, w) for labels of ``size``.

    Args:
        most: the most label pixels a lane takes at a time, down and across.
    """
    return _plan(logits.shape, tuple(size), align_corners, most, halo, acc == torch.float64, lanes())


@lru_cache(maxsize=1024)
def _plan(
    shape: tuple[int, ...],
    size: tuple[int, ...],
    align: bool,
    most: tuple[int, int],
    halo: int,
    double: bool,
    cells: int,
) -> Plan:
    n, c, h, w = shape
    line = n * (h + (not align)) * (w + (not align))
    parts, tile = [], []
    for into, out, limit in ((h, size[0], most[0]), (w, size[1], most[1])):
        count = _phases(into, out, align)
        parts.append(triton.cdiv(count, limit))
        tile.append(triton.cdiv(count, parts[-1]))
    programs = triton.cdiv(line, cells - halo)
    split = min(parts[0] * parts[1], max(1, PROGRAMS // programs))
    if halo and n * c * h * w > 2**16:  # each split has planes of its own
        split = min(split, 2)
    largest = 4 * (max(size) + 1) * (max(h, w) + 1)
    constants = (*tile, cells, halo, align, tl.int32 if largest < 2**31 else tl.int64)
    constants = (*constants, tl.float64 if double else tl.float32)
    grid = Grid(n, line, size[0], size[1], parts[1], parts[0] * parts[1], split)
    return Plan(grid, Tile(*map(tl.constexpr, constants)), programs * split, split)


def _phases(into: int, out: int, align: bool) -> int:
    """The most outputs that lie in one cell."""
    if align:
        return out if into == 1 else max(1, triton.cdiv(out - 1, into - 1))
    return triton.cdiv(out, max(into, 2))


# ---- the copy -------------------------------------------------------------------------------------------------------


@triton.jit
def _copy(
    source,  # Source
    to,  # Logits
    block,
    samples,
    k: tl.float64,
    ACC: tl.constexpr,
    BLOCK_CLASSES: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
):
    low: tl.constexpr = LOW64 if tl.float64 == ACC else LOW32
    scale = tl.full((), k, tl.float64).to(ACC)
    row = to.width + 2
    plane = tl.cast(to.height + 2, tl.int64) * row
    at = block.to(tl.int64) * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
    inside = at < samples * plane
    n = at // plane
    p = (at % plane).to(tl.int32)
    y = tl.minimum(tl.maximum(p // row - 1, 0), to.height - 1)
    x = tl.minimum(tl.maximum(p % row - 1, 0), to.width - 1)
    given = source.data + n * source.stride_n + (y * to.width + x).to(tl.int64) * source.stride_x
    kept = to.data + n * to.classes * plane + p
    peak = tl.full([BLOCK_PIXELS], low, ACC)
    for first in range(0, to.classes, BLOCK_CLASSES):
        c = (first + tl.arange(0, BLOCK_CLASSES)).to(tl.int64)
        mask = (c < to.classes)[:, None] & inside[None, :]
        value = tl.load(given[None, :] + c[:, None] * source.stride_c, mask=mask, other=low).to(ACC) * scale
        value = tl.maximum(value, low, propagate_nan=tl.PropagateNan.ALL)
        tl.store(kept[None, :] + c[:, None] * plane, value, mask=mask)
        peak = tl.maximum(peak, tl.max(value, 0))
    tl.store(to.peak + at, peak, mask=inside)


@triton.jit
def _prepare(
    first, first_to, second, second_to, samples, blocks, k: tl.float64,
    ACC: tl.constexpr, BLOCK_CLASSES: tl.constexpr, BLOCK_PIXELS: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    if second is None:
        _copy(first, first_to, block, samples, k, ACC, BLOCK_CLASSES, BLOCK_PIXELS)
    else:
        if block < blocks:
            _copy(first, first_to, block, samples, k, ACC, BLOCK_CLASSES, BLOCK_PIXELS)
        else:
            _copy(second, second_to, block - blocks, samples, k, ACC, BLOCK_CLASSES, BLOCK_PIXELS)


def prepare(size: Sequence[int], scale: float, *maps: Tensor) -> list[Logits]:
    """Copies one or two dense maps (N, C, h, w), times ``scale`` * log2(e), in one launch."""
    acc, ACC = accumulator(*maps)
    to, sources, blocks = [], [], []
    for x in maps:
        n, c, h, w = x.shape
        plane = (h + 2) * (w + 2)
        memory = x.new_empty(n * (c + 1) * plane, dtype=acc)
        to.append(Logits(memory[n * plane :], memory, c, h, w, int(size[1] != w), (w + 2) * (size[0] != h)))
        nchw = x.is_contiguous()
        sources.append(Source(x, c * h * w, h * w if nchw else 1, 1 if nchw else c))
        blocks.append(triton.cdiv(n * plane, 64))
    second, second_to = (sources[1], to[1]) if len(maps) > 1 else (None, None)
    launch(
        _prepare, (sum(blocks),), maps[0], sources[0], to[0], second, second_to, maps[0].shape[0], blocks[0],
        scale * LOG2E, ACC=ACC, BLOCK_CLASSES=16, BLOCK_PIXELS=64,
    )  # fmt: skip
    return to


# ---- tuples: one entry a label pixel --------------------------------------------------------------------------------


@triton.jit
def nothing():
    """An empty tuple, to be added to."""
    return ()


@triton.jit
def fill(value, COUNT: tl.constexpr):
    """A tuple of one value."""
    out = nothing()
    for _ in tl.static_range(COUNT):
        out = out + (value,)
    return out


@triton.jit
def any_of(masks):
    out = masks[0]
    for i in tl.static_range(1, len(masks)):
        out = out | masks[i]
    return out


@triton.jit
def pick(values, k):
    """Entry ``k``, which is known at run time."""
    out = values[0]
    for i in tl.static_range(1, len(values)):
        out = tl.where(k == i, values[i], out)
    return out


@triton.jit
def put(values, k, mask, value):
    """``values`` with entry ``k``, which is known at run time, replaced where ``mask`` is set."""
    out = ()
    for i in tl.static_range(len(values)):
        out = out + (tl.where(mask & (k == i), value, values[i]),)
    return out


# ---- a lane's cell --------------------------------------------------------------------------------------------------


@triton.jit
def first_output(cell, into, out, ALIGN: tl.constexpr):
    """The first output that lies in ``cell`` or a later one; ``out`` past the last cell."""
    if ALIGN:
        x = tl.cdiv(cell * tl.maximum(out - 1, 1), tl.maximum(into - 1, 1))
    else:
        x = tl.cdiv(tl.maximum((2 * cell + 1) * out - into, 0), 2 * into)
    first: tl.constexpr = 0 if ALIGN else -1
    x = tl.where(cell <= first, 0, tl.minimum(x, out))
    return tl.where(cell >= into, out, x)


@triton.jit
def right_weight(x, cell, into, out, ALIGN: tl.constexpr, ACC: tl.constexpr):
    """The weight of the neighbour to the right of output x in ``cell``; a border cell has one neighbour alone."""
    if ALIGN:
        under = tl.maximum(out - 1, 1)
        over = x * (into - 1) - cell * under
    else:
        under = 2 * out
        over = (2 * x + 1) * into - out - cell * under
    weight = over.to(ACC) / tl.cast(under, ACC)
    return tl.where(cell >= into - 1, 0, tl.where(cell < 0, 1, weight)).to(ACC)


@triton.jit
def cell_of(x, into, out, ALIGN: tl.constexpr):
    """The cell of output x."""
    if ALIGN:
        return tl.minimum(x * (into - 1) // tl.maximum(out - 1, 1), into - 1)
    return tl.minimum(((2 * x + 1) * into + out) // (2 * out) - 1, into - 1)


class Place(NamedTuple):
    """Where a lane is."""

    inside: Any  # the lane has a cell,
    own: Any  # which no other program writes
    sample: Any  # int64
    y: Any  # the cell, from -1 (0 with aligned corners)
    x: Any


class Pixels(NamedTuple):
    """A part of a cell's label pixels; tuples."""

    y: Any  # ROWS: places
    x: Any  # COLUMNS
    down: Any  # ROWS: weight of the logits below
    right: Any  # COLUMNS: weight of the logits to the right
    exist: Any  # ROWS * COLUMNS


class Cell(NamedTuple):
    """A lane's cell, and the part of its label pixels at hand."""

    place: Place
    pixels: Pixels
    mask: Any  # a label pixel of the part counts


class Taps(NamedTuple):
    """Where label pixels lie in a map of another size than the one whose cells lanes own; tuples."""

    above: Any  # ROWS: offsets of the logits above
    left: Any  # COLUMNS
    down: Any  # ROWS: weights
    right: Any  # COLUMNS


class View(NamedTuple):
    """A map as label pixels see it."""

    logits: Any  # Logits
    taps: Any  # Taps, or () where lanes own the map's cells


class Shift(NamedTuple):
    """What is subtracted from interpolated values."""

    lane: Any  # a number a lane
    each: Any  # tuple: one a label pixel; empty for none


@triton.jit
def locate(logits, grid, T):
    """The lanes' cells."""
    border: tl.constexpr = 0 if T.ALIGN else 1
    lane = tl.arange(0, T.CELLS)
    block = (tl.program_id(0) // grid.split).to(tl.int64)
    at = block * (T.CELLS - T.HALO) - T.HALO + lane
    inside = (at >= 0) & (at < grid.cells)
    at = tl.where(inside, at, 0)
    row = at // (logits.width + border)
    y = (row % (logits.height + border)).to(T.INT) - border
    x = (at % (logits.width + border)).to(T.INT) - border
    return Place(inside, inside & (lane >= T.HALO), row // (logits.height + border), y, x)


@triton.jit
def axis(cell, k, into, out, COUNT: tl.constexpr, T):
    """Outputs k to k + COUNT of a cell along one axis: their places, whether they exist, the neighbour's weight."""
    start = first_output(cell, into, out, T.ALIGN)
    end = first_output(cell + 1, into, out, T.ALIGN)
    at, exist, weight = nothing(), nothing(), nothing()
    for i in tl.static_range(COUNT):
        x = start + k + i
        at = at + (x,)
        exist = exist + (x < end,)
        weight = weight + (right_weight(x, cell, into, out, T.ALIGN, T.ACC),)
    return at, exist, weight


@triton.jit
def part_of(place, logits, grid, part, T):
    """The label pixels of a part of each lane's cell."""
    y, exist_y, down = axis(place.y, part // grid.column_parts * T.ROWS, logits.height, grid.height, T.ROWS, T)
    x, exist_x, right = axis(place.x, part % grid.column_parts * T.COLUMNS, logits.width, grid.width, T.COLUMNS, T)
    exist = ()
    for i in tl.static_range(T.ROWS):
        for j in tl.static_range(T.COLUMNS):
            exist = exist + (place.inside & exist_y[i] & exist_x[j],)
    return Pixels(y, x, down, right, exist)


@triton.jit
def parts_of(grid):
    """The parts this program takes: the first, and one past the last."""
    which = tl.program_id(0) % grid.split
    return which * grid.parts // grid.split, (which + 1) * grid.parts // grid.split


# ---- interpolated values --------------------------------------------------------------------------------------------


@triton.jit
def plane_of(logits):
    """Elements from one class to the next."""
    return tl.cast(logits.height + 2, tl.int64) * (logits.width + 2)


@triton.jit
def taps_of(logits, grid, pixels, T):
    """Where the label pixels of a cell lie in a map of another size."""
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
    """Pointers to class 0, a tuple that loops over classes carry: of the four logits of each lane's cell, or of the sample
    where the map has taps.

    Four and not one with three offsets, because Triton's Coalesce pass walks the whole kernel for every pointer that is
    computed where it is used: most of the time of a compile.
    """
    at = view.logits.data + cell.place.sample * view.logits.classes * plane_of(view.logits)
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
def corners(at, mask, shift):
    """Four neighbouring logits less ``shift``: the left one above, the step to the right above, and how much each changes
    downwards."""
    above = tl.load(at[0], mask=mask, other=0) - shift
    right = tl.load(at[1], mask=mask, other=0) - shift
    below = tl.load(at[2], mask=mask, other=0) - shift
    across = tl.load(at[3], mask=mask, other=0) - shift
    step = right - above
    return above, step, below - above, (across - below) - step


@triton.jit
def values(view, at, cell, shift):
    """One class's interpolated values, row by row, less ``shift``."""
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
    """The largest corner over all classes, which no interpolated value exceeds: of each lane's cell, or of each label pixel
    where the map has taps."""
    logits = view.logits
    at = logits.peak + cell.place.sample * plane_of(logits)
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
    """A shift, label pixel by label pixel."""
    return shift.each if len(shift.each) > 0 else fill(shift.lane, COUNT)


@triton.jit
def far_below(total, counted):
    """Whether any counted label pixel's sum of exponentials has lost terms."""
    least = tl.where(counted[0], total[0], 1)
    for k in tl.static_range(1, len(total)):
        least = tl.minimum(least, tl.where(counted[k], total[k], 1))
    return tl.min(least) < FAR


@triton.jit
def one_pixel(cell, k):
    """The cell with label pixel ``k`` alone, which is known at run time."""
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
    """``view`` of a cell of one label pixel."""
    return View(view.logits, () if len(view.taps) == 0 else taps_of(view.logits, grid, cell.pixels, T))


@triton.jit
def largest(view, cell, T):
    """The largest value of a cell's one label pixel."""
    low: tl.constexpr = LOW64 if tl.float64 == T.ACC else LOW32
    peak = tl.zeros([T.CELLS], T.ACC) + low
    at = begin(view, cell)
    for _ in range(view.logits.classes):
        peak = tl.maximum(peak, values(view, at, cell, Shift(0, ()))[0])
        at = advance(at, plane_of(view.logits))
    return peak


# ---- labels ---------------------------------------------------------------------------------------------------------


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


# ---- the gradient at logit size -------------------------------------------------------------------------------------


class Shares(NamedTuple):
    """Where a lane's shares of class 0 go in the planes (split, 2, N, C, h, w), and which lanes have them.

    The first plane takes what a logit gets from the cell below it, the second what it gets from the cell above.
    """

    upper: Any
    lower: Any
    has_upper: Any
    has_lower: Any
    from_left: Any  # the lane before is the cell to the left


@triton.jit
def shares_of(planes, logits, grid, place, T):
    size = tl.cast(logits.height, tl.int64) * logits.width
    every = grid.samples * logits.classes * size
    which = (tl.program_id(0) % grid.split).to(tl.int64)
    at = planes + which * 2 * every + place.sample * logits.classes * size + place.x
    has = place.own & (place.x >= 0)
    below = place.y + 1
    has_lower = has & (below < logits.height)
    if T.ALIGN:  # no cell is above the first row: it gets the last row's, which is 0
        below = tl.where(below < logits.height, below, 0)
        has_lower = has
    upper = at + place.y.to(tl.int64) * logits.width
    lower = at + every + below.to(tl.int64) * logits.width
    return Shares(upper, lower, has & (place.y >= 0), has_lower, place.x > (0 if T.ALIGN else -1))


@triton.jit
def spread(to, value, pixels, again, T):
    """Adds one class's gradient at label pixels, transposed to the cell's corners, to what earlier parts left there."""
    zero = tl.zeros([T.CELLS], T.ACC)
    every, to_right, to_lower, to_lower_right = zero, zero, zero, zero
    for i in tl.static_range(len(pixels.down)):
        row, right = zero, zero
        for j in tl.static_range(len(pixels.right)):
            one = value[i * len(pixels.right) + j]
            row += one
            right += one * pixels.right[j]
        every += row
        to_right += right
        to_lower += row * pixels.down[i]
        to_lower_right += right * pixels.down[i]
    lower_left = to_lower - to_lower_right
    upper_right = to_right - to_lower_right
    upper_left = (every - to_right) - lower_left
    before = tl.maximum(tl.arange(0, T.CELLS) - 1, 0)
    upper = upper_left + tl.where(to.from_left, tl.gather(upper_right, before, 0), 0)
    lower = lower_left + tl.where(to.from_left, tl.gather(to_lower_right, before, 0), 0)
    # One lane alone adds to an address, in its program's order: the sum is the same in every run. A load and a store would
    # wait for the load in every class.
    tl.store(to.upper, upper, mask=to.has_upper & (not again))
    tl.store(to.lower, lower, mask=to.has_lower & (not again))
    tl.atomic_add(to.upper, upper, mask=to.has_upper & again, sem="relaxed")
    tl.atomic_add(to.lower, lower, mask=to.has_lower & again, sem="relaxed")


@triton.jit
def write_gradient(planes, grid, cell, student, teacher, state, kept, FORMULA: tl.constexpr, again, T):
    """The gradient of each label pixel and class, transposed to logit size.

    Args:
        student: its view. teacher: a tuple of its view, or ().
        state: what FORMULA(k, class, student's value, teacher's value, kept, state) makes the gradient with, of label
            pixel k; it returns what it ``kept`` of the pixel too.
        kept: tuple of a number a label pixel; may be empty.
        again: whether an earlier part has written its shares.

    Returns:
        kept.
    """
    logits = student.logits
    at = begin(student, cell)
    if len(teacher) > 0:
        teacher_at = begin(teacher[0], cell)
    to = shares_of(planes, logits, grid, cell.place, T)
    size = tl.cast(logits.height, tl.int64) * logits.width
    for c in range(logits.classes):
        number = tl.cast(c, tl.float32)
        value = values(student, at, cell, Shift(0, ()))
        at = advance(at, plane_of(logits))
        other = value
        if len(teacher) > 0:
            other = values(teacher[0], teacher_at, cell, Shift(0, ()))
            teacher_at = advance(teacher_at, plane_of(teacher[0].logits))
        gradient, keep = nothing(), nothing()
        for k in tl.static_range(len(value)):
            if len(kept) > 0:
                one, more = FORMULA(k, number, value[k], other[k], kept[k], state)
                keep = keep + (more,)
            else:
                one, more = FORMULA(k, number, value[k], other[k], None, state)
            gradient = gradient + (one,)
        kept = keep
        spread(to, gradient, cell.pixels, again, T)
        to = Shares(to.upper + size, to.lower + size, to.has_upper, to.has_lower, to.from_left)
    return kept


@triton.jit
def _join(
    planes,  # (split, 2, N, C, h * w) ACC
    out,  # (N, C, h, w), any float dtype
    sums,  # (2, parts) ACC: losses, counts
    loss,  # () ACC
    count,  # () ACC
    size,  # (split, parts, elements of the map, C, h * w)
    stride,  # of out: (n, c, pixel)
    scale: tl.float64,  # of the loss
    gradient_scale: tl.float64,
    T,  # (ACC, MEAN, BLOCK_PARTS, BLOCK_CLASSES, BLOCK_PIXELS)
):
    """Adds the planes, scales and casts; reduces the loss too."""
    ACC: tl.constexpr = T[0]
    factor = finish(sums, size[1], loss, count, tl.full((), scale, tl.float64), T[1], T[2])
    factor *= tl.full((), gradient_scale, tl.float64)
    classes, pixels = size[3], size[4]
    blocks = tl.cdiv(pixels, T[4])
    program = tl.program_id(0)
    p = (program % blocks).to(tl.int64) * T[4] + tl.arange(0, T[4])
    row = program // blocks
    c = (row % tl.cdiv(classes, T[3])).to(tl.int64) * T[3] + tl.arange(0, T[3])
    n = (row // tl.cdiv(classes, T[3])).to(tl.int64)
    mask = (c < classes)[:, None] & (p < pixels)[None, :]
    at = planes + (n * classes + c)[:, None] * pixels + p[None, :]
    value = tl.load(at, mask=mask, other=0)
    value += tl.load(at + size[2], mask=mask, other=0)
    for _ in range(1, size[0]):
        at += 2 * size[2]
        value += tl.load(at, mask=mask, other=0)
        value += tl.load(at + size[2], mask=mask, other=0)
    value *= factor.to(ACC)
    to = out + n * stride[0] + c[:, None] * stride[1] + p[None, :] * stride[2]
    tl.store(to, value.to(out.dtype.element_ty), mask=mask)


def join(
    planes: Tensor, like: Tensor, part: Tensor, split: int, reduction: str, scale: float, gradient_scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The reduced loss, the count, and the gradient in the dtype and layout of ``like``."""
    _, ACC = accumulator(planes)
    n, c, h, w = like.shape
    out = torch.empty_like(like)
    loss, count = part.new_empty(()), part.new_empty(())
    part = gather_parts(part)
    nchw = like.is_contiguous()
    if nchw:  # every plane of every sample in a row
        rows, classes, pixels, blocks, stride = 1, 1, n * c * h * w, (1, 1024), (0, 0, 1)
    else:
        rows, classes, pixels, blocks, stride = n, c, h * w, (32, 32), (c * h * w, 1, c)
    programs = rows * triton.cdiv(classes, blocks[0]) * triton.cdiv(pixels, blocks[1])
    T = tuple(map(tl.constexpr, (ACC, reduction == "mean", triton.next_power_of_2(part.shape[1]), *blocks)))
    launch(
        _join, (programs,), like, planes, out, part, loss, count,
        (split, part.shape[1], like.numel(), classes, pixels), stride, scale, gradient_scale, T,
    )  # fmt: skip
    return loss, count, out

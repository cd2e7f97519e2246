"""A lane's cell and its label pixels."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .tuples import nothing


@triton.jit
def first_output(cell, into, out, ALIGN: tl.constexpr):
    """The first output in ``cell`` or a later one; ``out`` past the last cell."""
    if ALIGN:
        x = tl.cdiv(cell * tl.maximum(out - 1, 1), tl.maximum(into - 1, 1))
    else:
        x = tl.cdiv(tl.maximum((2 * cell + 1) * out - into, 0), 2 * into)
    first: tl.constexpr = 0 if ALIGN else -1
    x = tl.where(cell <= first, 0, tl.minimum(x, out))
    return tl.where(cell >= into, out, x)


@triton.jit
def right_weight(x, cell, into, out, ALIGN: tl.constexpr, ACC: tl.constexpr):
    """Weight of the right neighbour for output x in ``cell``; border cells have one neighbour only."""
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
    """A lane's position."""

    inside: Any  # the lane has a cell
    own: Any  # no other program writes that cell
    sample: Any
    y: Any  # cell index, from -1 (0 with align_corners)
    x: Any


class Pixels(NamedTuple):
    """Label pixels of one part of a cell; tuples."""

    y: Any  # ROWS: positions
    x: Any  # COLUMNS
    down: Any  # ROWS: weight of the logits below
    right: Any  # COLUMNS: weight of the logits to the right
    exist: Any  # ROWS * COLUMNS


class Cell(NamedTuple):
    """A lane's cell and the current part of its label pixels."""

    place: Place
    pixels: Pixels
    mask: Any  # whether any label pixel of the part counts


@triton.jit
def locate(logits, grid, T):
    border: tl.constexpr = 0 if T.ALIGN else 1
    lane = tl.arange(0, T.CELLS)
    block = (tl.program_id(0) // grid.split).to(tl.int64)
    at = block * (T.CELLS - T.HALO) - T.HALO + lane
    inside = (at >= 0) & (at < grid.cells)
    at = tl.where(inside, at, 0)
    row = at // (logits.width + border)
    y = (row % (logits.height + border)).to(T.INT) - border
    x = (at % (logits.width + border)).to(T.INT) - border
    return Place(inside, inside & (lane >= T.HALO), (row // (logits.height + border)).to(tl.int32), y, x)


@triton.jit
def locate_apart(logits, grid, T):
    """:func:`locate` for :func:`kernels.resize.planning.plan_apart`: a program's cells belong to one sample."""
    border: tl.constexpr = 0 if T.ALIGN else 1
    block, blocks = tl.program_id(0) // grid.split, tl.cdiv(grid.cells, T.CELLS)
    at = (block % blocks).to(tl.int64) * T.CELLS + tl.arange(0, T.CELLS)
    inside = at < grid.cells
    at = tl.where(inside, at, 0)
    y = (at // (logits.width + border)).to(T.INT) - border
    x = (at % (logits.width + border)).to(T.INT) - border
    return Place(inside, inside, block // blocks, y, x)


@triton.jit
def axis(cell, k, into, out, COUNT: tl.constexpr, T):
    """Outputs k to k + COUNT of a cell along one axis: positions, existence, neighbour's weight."""
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
    """Label pixels of one part of each lane's cell."""
    y, exist_y, down = axis(place.y, part // grid.column_parts * T.ROWS, logits.height, grid.height, T.ROWS, T)
    x, exist_x, right = axis(place.x, part % grid.column_parts * T.COLUMNS, logits.width, grid.width, T.COLUMNS, T)
    exist = ()
    for i in tl.static_range(T.ROWS):
        for j in tl.static_range(T.COLUMNS):
            exist = exist + (place.inside & exist_y[i] & exist_x[j],)
    return Pixels(y, x, down, right, exist)


@triton.jit
def parts_of(grid):
    """First and one-past-last part of this program. No intermediate exceeds the number of parts."""
    which = tl.program_id(0) % grid.split
    share, more = grid.parts // grid.split, grid.parts % grid.split
    first = which * share + tl.minimum(which, more)
    return first, first + share + (which < more).to(tl.int32)

"""The sums for Dice at label resolution; formulas in ``fastkd.ops.resized_dice``.

Tiled as in :mod:`kernels.resize`, with one sample per program. Forward: one loop over the classes for the log-sum-exps,
one for the sums of p. Sums over the labelled class only are added label by label, since a program sees few labels. A
program writes fp32 sums of a few thousand label pixels; :func:`_collect` adds programs in fp64 in a fixed order.
Backward: one loop for the log-sum-exps and sum_c B_c p_c, one for the gradient. Nothing of label size is stored.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import accumulator, launch
from .resize import (
    LN2,
    Cell,
    Labels,
    Shift,
    View,
    advance,
    any_lane,
    any_of,
    begin,
    bound,
    each,
    far_below,
    fill,
    has,
    join_planes,
    largest,
    locate,
    locate_apart,
    nothing,
    one_pixel,
    one_view,
    part_of,
    parts_of,
    pick,
    plan,
    plan_apart,
    plane_of,
    prepare,
    put,
    read_labels,
    sum_of,
    values,
    write_gradient,
)
from .resized_cross_entropy import softmax

TILE = (2, 9)  # label pixels per lane
# Maximum parts of cells that a program sums in fp32: a few thousand label pixels.
PARTS = 8
NONE = tl.constexpr(2.0**24)  # above any label


@triton.jit
def _next_label(label, after):
    """The smallest label above ``after`` in any lane, else NONE."""
    least = tl.where(label[0] > after, label[0], NONE)
    for k in tl.static_range(1, len(label)):
        least = tl.minimum(least, tl.where(label[k] > after, label[k], NONE))
    return tl.min(least)


@triton.jit
def _add_labelled(to, label, distance, COLUMNS: tl.constexpr, T):
    """Adds the labelled class's terms to this program's sums (C, COLUMNS)."""
    p = nothing()
    for k in tl.static_range(len(label)):
        p = p + (tl.exp2(-distance[k]),)
    c = _next_label(label, -1.0)
    while c < NONE:
        both, count, entropy = nothing(), nothing(), nothing()
        for k in tl.static_range(len(label)):
            mine = label[k] == c
            both = both + (tl.where(mine, p[k], 0),)
            count = count + (mine.to(T.ACC),)
            if COLUMNS >= 4:
                entropy = entropy + (tl.where(mine, distance[k], 0),)
        # Only this program adds here, in program order, so sums are reproducible.
        at = to + c.to(tl.int32) * COLUMNS
        tl.atomic_add(at, tl.sum(sum_of(both)), sem="relaxed")
        tl.atomic_add(at + 2, tl.sum(sum_of(count)), sem="relaxed")
        if COLUMNS >= 4:
            tl.atomic_add(at + 3, tl.sum(sum_of(entropy)) * LN2, sem="relaxed")
        c = _next_label(label, c)


@triton.jit
def _dice(
    logits,  # resize.Logits
    labels,  # resize.Labels
    grid,  # resize.Grid, of one sample
    sums,  # (N, programs per sample, C, COLUMNS) ACC, zeroed
    SQUARE: tl.constexpr,
    COLUMNS: tl.constexpr,
    T,  # resize.Tile
):
    place = locate_apart(logits, grid, T)
    to = sums + tl.program_id(0).to(tl.int64) * logits.classes * COLUMNS
    first, last = parts_of(grid)
    for part in range(first, last):
        pixels = part_of(place, logits, grid, part, T)
        worth = read_labels(labels, grid, place, pixels, logits.classes, T)
        counted = worth.counted
        cell, view = Cell(place, pixels, any_of(counted)), View(logits, ())
        norm, distance = softmax(view, grid, cell, counted, worth.label, T)
        _add_labelled(to, worth.label, distance, COLUMNS, T)
        at, to_class = begin(view, cell), to
        for _ in range(logits.classes):
            value = values(view, at, cell, Shift(0, ()))
            at = advance(at, plane_of(logits))
            probability, entropy = nothing(), nothing()
            for k in tl.static_range(len(value)):
                log_p = value[k] - norm[k]
                p = tl.exp2(log_p)
                probability = probability + (tl.where(counted[k], p * p if SQUARE else p, 0),)
                if COLUMNS >= 5:
                    entropy = entropy + (tl.where(counted[k], -log_p, 0),)
            tl.atomic_add(to_class + 1, tl.sum(sum_of(probability)), sem="relaxed")
            if COLUMNS >= 5:
                tl.atomic_add(to_class + 4, tl.sum(sum_of(entropy)) * LN2, sem="relaxed")
            to_class += COLUMNS


@triton.jit
def _collect(
    parts,  # (N, rows, numbers) ACC
    out,  # (N, chunks, numbers) fp64
    rows,
    numbers,
    chunk,  # rows per program
    BLOCK_ROWS: tl.constexpr,
    BLOCK_NUMBERS: tl.constexpr,
):
    blocks, chunks = tl.cdiv(numbers, BLOCK_NUMBERS), tl.cdiv(rows, chunk)
    program = tl.program_id(0)
    k = (program % blocks) * BLOCK_NUMBERS + tl.arange(0, BLOCK_NUMBERS)
    line = (program // blocks).to(tl.int64)
    begin = line % chunks * chunk
    end = tl.minimum(begin + chunk, rows)
    parts += line // chunks * rows * numbers
    total = tl.zeros([BLOCK_ROWS, BLOCK_NUMBERS], tl.float64)
    for start in range(begin, end, BLOCK_ROWS):
        r = start + tl.arange(0, BLOCK_ROWS)
        mask = (r < end)[:, None] & (k < numbers)[None, :]
        total += tl.load(parts + r[:, None] * numbers + k[None, :], mask=mask, other=0).to(tl.float64)
    tl.store(out + line * numbers + k, tl.sum(total, 0), mask=k < numbers)


def _add_programs(parts: Tensor) -> Tensor:
    """(N, programs, numbers) summed over the programs in fp64."""
    while parts.shape[1] > 1 or parts.dtype != torch.float64:
        n, rows, numbers = parts.shape
        chunk = 256 if rows > 512 else rows
        out = parts.new_empty((n, triton.cdiv(rows, chunk), numbers), dtype=torch.float64)
        programs = n * out.shape[1] * triton.cdiv(numbers, 32)
        launch(_collect, (programs,), parts, parts, out, rows, numbers, chunk, BLOCK_ROWS=32, BLOCK_NUMBERS=32)
        parts = out
    return parts[:, 0]


def forward(
    logits: Tensor,
    target: Tensor,
    ignore_index: int,
    align_corners: bool,
    square: bool,
    columns: int,
    reduction: str,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The sums (N, C, columns) in fp64, and nothing kept; see ``fastkd.ops.resized_dice``.

    Args:
        logits: (N, C, h, w), NCHW-contiguous or channels_last. target: (N, H, W), contiguous.
    """
    n, classes = logits.shape[:2]
    acc, _ = accumulator(logits)
    cut = plan_apart(logits, target.shape[1:], align_corners, TILE, PARTS, acc)
    (prepared,) = prepare(target.shape[1:], 1.0, logits)
    labels = Labels(target, None, None, None, ignore_index)
    sums = logits.new_zeros((n, cut.programs // n, classes * columns), dtype=acc)
    launch(
        _dice, (cut.programs,), logits, prepared, labels, cut.grid, sums, square, columns, cut.tile,
        num_warps=1, registers=168,
    )  # fmt: skip
    return _add_programs(sums).view(n, classes, columns), logits.new_empty((0,), dtype=acc)


class Upstream(NamedTuple):
    """Gradient of the sums, (N, C) ACC each; names as in ``fastkd.ops.resized_dice``."""

    i: Any
    b: Any
    a: Any  # or None
    s: Any  # or None
    every_s: Any  # (N,): s summed over the classes, or None


@triton.jit
def _products(view, cell, shift, label, of_i, of_b, SQUARE: tl.constexpr, T):
    """Per label pixel: the sum of exponentials e about ``shift``, and sum_c b_c e_c + i_y e_y; if SQUARE, sum_c b_c
    e_c^2 and i_y e_y."""
    zero = tl.zeros([T.CELLS], T.ACC)
    total = fill(zero, len(label))
    mixed = total
    own = fill(zero, len(label) if SQUARE else 0)
    at = begin(view, cell)
    for c in range(view.logits.classes):
        number = tl.cast(c, tl.float32)
        value = values(view, at, cell, shift)
        at = advance(at, plane_of(view.logits))
        i, b = tl.load(of_i), tl.load(of_b)
        of_i, of_b = of_i + 1, of_b + 1
        more, more_mixed, more_own = nothing(), nothing(), nothing()
        for k in tl.static_range(len(value)):
            e = tl.exp2(value[k])
            more = more + (total[k] + e,)
            mine = label[k] == number
            if SQUARE:
                more_mixed = more_mixed + (mixed[k] + b * (e * e),)
                more_own = more_own + (tl.where(mine, i * e, own[k]),)
            else:
                more_mixed = more_mixed + (mixed[k] + tl.where(mine, b + i, b) * e,)
        total, mixed, own = more, more_mixed, more_own
    return total, mixed, own


@triton.jit
def _squares(x):
    out = nothing()
    for k in tl.static_range(len(x)):
        out = out + (x[k] * x[k],)
    return out


@triton.jit
def _dots(total, mixed, own):
    """i_y p_y + sum_c B_c p_c per label pixel."""
    out = nothing()
    for k in tl.static_range(len(total)):
        dot = mixed[k] / total[k]
        if len(own) > 0:
            dot = 2 * (dot / total[k]) + own[k] / total[k]
        out = out + (dot,)
    return out


@triton.jit
def _mixtures(view, grid, cell, counted, label, of_i, of_b, SQUARE: tl.constexpr, T):
    """Per label pixel: the log-sum-exp, base 2, and i_y p_y + sum_c B_c p_c.

    ``counted`` pixels whose sum about the bound has lost terms are recomputed about the true maximum, see
    :func:`kernels.resized_cross_entropy.softmax`. Squares lose terms earlier.
    """
    shift = bound(view, cell)
    total, mixed, own = _products(view, cell, shift, label, of_i, of_b, SQUARE, T)
    base, norm = each(shift, len(counted)), nothing()
    for k in tl.static_range(len(counted)):
        norm = norm + (base[k] + tl.log2(total[k]),)
    dot = _dots(total, mixed, own)
    least = _squares(total) if SQUARE else total
    below = far_below(least, counted)
    if any_lane(below != 0):
        for j in range(len(counted)):
            far = has(below, j)
            if any_lane(far):
                one = one_pixel(cell, j)
                seen = one_view(view, grid, one, T)
                peak = largest(seen, one, T)
                right = _products(seen, one, Shift(peak, ()), (pick(label, j),), of_i, of_b, SQUARE, T)
                norm = put(norm, j, far, peak + tl.log2(right[0][0]))
                dot = put(dot, j, far, _dots(right[0], right[1], right[2])[0])
    ends = nothing()
    for k in tl.static_range(len(counted)):
        ends = ends + (tl.where(counted[k], norm[k], float("inf")),)
    return ends, dot


@triton.jit
def _mixture(p, mine, by, label, numbers):
    """p * by, plus i_y and a_y for the label, minus s. ``by``: B_c and the terms common to all classes."""
    out = p * tl.where(mine, by + numbers[0], by)
    if len(numbers) >= 3:
        out -= tl.where(mine, numbers[2], 0)
    if len(numbers) >= 4:
        out -= tl.where(label >= 0, numbers[3], 0)
    return out


@triton.jit
def _gradient(k: tl.constexpr, c, value, numbers, kept, state):
    """``numbers``: i, b, a, s of the class; ``state``: label, log-sum-exp, terms common to all classes."""
    p = tl.exp2(value - state[1][k])
    out = _mixture(p, state[0][k] == c, state[2][k] + numbers[1], state[0][k], numbers)
    return out, out


@triton.jit
def _square_gradient(k: tl.constexpr, c, value, numbers, kept, state):
    p = tl.exp2(value - state[1][k])
    out = _mixture(p, state[0][k] == c, state[2][k] + 2 * numbers[1] * p, state[0][k], numbers)
    return out, out


@triton.jit
def _dice_gradient(
    logits,  # resize.Logits
    labels,  # resize.Labels
    upstream,  # Upstream
    grid,  # resize.Grid
    planes,  # as in resize.Shares
    SQUARE: tl.constexpr,
    T,  # resize.Tile
):
    place = locate(logits, grid, T)
    row = place.sample.to(tl.int64) * logits.classes
    first, last = parts_of(grid)
    for part in range(first, last):
        pixels = part_of(place, logits, grid, part, T)
        worth = read_labels(labels, grid, place, pixels, logits.classes, T)
        label, counted = worth.label, worth.counted
        cell, view = Cell(place, pixels, any_of(counted)), View(logits, ())
        of_i, of_b = upstream.i + row, upstream.b + row
        norm, dot = _mixtures(view, grid, cell, counted, label, of_i, of_b, SQUARE, T)
        constant = nothing()
        for k in tl.static_range(len(counted)):
            one = -dot[k]
            if upstream.a is not None:
                one += tl.load(upstream.a + row + tl.maximum(label[k], 0).to(tl.int32))
            if upstream.s is not None:
                one += tl.load(upstream.every_s + place.sample)
            constant = constant + (one,)
        numbers = nothing() + (of_i, of_b)
        if upstream.a is not None:
            numbers = numbers + (upstream.a + row,)
        if upstream.s is not None:
            numbers = numbers + (upstream.s + row,)
        formula: tl.constexpr = _square_gradient if SQUARE else _gradient
        state = (label, norm, constant)
        write_gradient(planes, grid, cell, view, (), state, (), formula, part > first, T, numbers)


def backward(
    grad: Tensor,
    logits: Tensor,
    target: Tensor,
    ignore_index: int,
    align_corners: bool,
    square: bool,
    columns: int,
    reduction: str,
    scale: float,
    kept: Tensor,
) -> Tensor:
    """The gradient in the dtype and layout of ``logits``; arguments as for :func:`forward`.

    Args:
        grad: (N, C, columns) in fp64.
    """
    acc, _ = accumulator(logits)
    cut = plan(logits, target.shape[1:], align_corners, TILE, 1, acc)
    (prepared,) = prepare(target.shape[1:], 1.0, logits)
    i, b, _, a, s = (*grad.unbind(2), None, None)[:5]
    every_s = None if s is None else s.sum(1).to(acc)
    i, b, a, s = (x if x is None else x.to(acc).contiguous() for x in (i, b, a, s))
    planes = logits.new_empty((2 * cut.split, *logits.shape), dtype=acc)
    labels = Labels(target, None, None, None, ignore_index)
    upstream = Upstream(i, b, a, s, every_s)
    launch(
        _dice_gradient, (cut.programs,), logits, prepared, labels, upstream, cut.grid, planes, square, cut.tile,
        num_warps=1, registers=224 if square else None,
    )  # fmt: skip
    return join_planes(planes, logits, cut.split)

"""KD at label resolution with a sigmoid per class: the formula of :mod:`kernels.kd_sigmoid` on interpolated S and T.

Tiled as in :mod:`kernels.resized_kd`. Classes are independent, so one loop over them computes loss and gradient.
"""

from __future__ import annotations

from functools import partial

import triton
import triton.language as tl

from . import resized_kd
from .resize import (
    Cell,
    Shift,
    View,
    advance,
    any_of,
    begin,
    fill,
    locate,
    nothing,
    part_of,
    parts_of,
    plane_of,
    read_labels,
    sum_of,
    taps_of,
    values,
    weigh,
    write_gradient,
    write_pixels,
)
from .sigmoid import bernoulli, unbounded
from .total import add


@triton.jit
def _terms(student, teacher, cell, T):
    """Each label pixel's divergence, summed over the classes."""
    total = fill(tl.zeros([T.CELLS], T.ACC), len(cell.pixels.exist))
    at_s, at_t = begin(student, cell), begin(teacher, cell)
    for _ in range(student.logits.classes):
        s, t = values(student, at_s, cell, Shift(0, ())), values(teacher, at_t, cell, Shift(0, ()))
        at_s, at_t = advance(at_s, plane_of(student.logits)), advance(at_t, plane_of(teacher.logits))
        more = ()
        for k in tl.static_range(len(s)):
            divergence, _ = bernoulli(s[k], t[k], True)
            more = more + (total[k] + divergence,)
        total = more
    return total


@triton.jit
def _gradient(k: tl.constexpr, c, value_s, value_t, total, state):
    """factor * (sigmoid(S) - sigmoid(T)); ``state``: the factor. Keeps the sum of the divergences."""
    divergence, difference = bernoulli(value_s, value_t, True)
    return difference * state[0][k], total + divergence


@triton.jit
def _kd_sigmoid(
    student,  # resize.Logits, times log2(e) / tau
    teacher,  # resize.Logits
    labels,  # resize.Labels
    grid,  # resize.Grid
    out,  # resized_kd.Out
    scale: tl.float64,
    SAME: tl.constexpr,  # student and teacher have the same size
    T,  # resize.Tile
):
    place = locate(student, grid, T)
    zero = tl.zeros([T.CELLS], T.ACC)
    losses, lost, counts = zero, zero, zero
    first, last = parts_of(grid)
    for part in range(first, last):
        pixels = part_of(place, student, grid, part, T)
        worth = read_labels(labels, grid, place, pixels, student.classes, T)
        counted = worth.counted
        for k in tl.static_range(len(counted)):
            counts += tl.where(place.own, worth.share[k], 0)
        factor = weigh(labels, grid, place, pixels, worth)
        cell = Cell(place, pixels, any_of(counted))
        views = (View(student, ()), View(teacher, () if SAME else taps_of(teacher, grid, pixels, T)))
        if out.planes is not None:
            state, none = (factor,), fill(zero, len(factor))
            total = write_gradient(
                out.planes, grid, cell, views[0], (views[1],), state, none, _gradient, part > first, T, ()
            )
        else:
            total = _terms(views[0], views[1], cell, T)
        terms = nothing()
        for k in tl.static_range(len(counted)):
            terms = terms + (tl.where(counted[k], factor[k] * unbounded(total[k]), 0),)
        losses, lost = add(losses, lost, tl.where(place.own, sum_of(terms), 0))
        if out.loss is not None:
            scaled = nothing()
            for k in tl.static_range(len(counted)):
                scaled = scaled + (terms[k] * tl.full((), scale, tl.float64).to(T.ACC),)
            write_pixels(out.loss, grid, place, pixels, scaled)
    tl.store(out.part + tl.program_id(0), tl.sum(losses))
    tl.store(out.part + tl.num_programs(0) + tl.program_id(0), tl.sum(counts))


SIGMOID = resized_kd.Kind(_kd_sigmoid, bounded=True)
forward = partial(resized_kd.forward, kind=SIGMOID)
gradient = partial(resized_kd.gradient, kind=SIGMOID)

"""Cross-entropy at label resolution: loss[p] = weight * -log softmax(bilinear(logits)[p])[y]; docs/full-resolution.md.

One kernel computes loss and gradient, tiled as in :mod:`kernels.resize`. It reads the prepared logits twice (from
cache) and the labels once, and writes two planes of gradient contributions. Each exponential is computed twice, or once
if the log-sum-exps are given.
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
    LOW32,
    LOW64,
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
    join,
    largest,
    locate,
    nothing,
    one_pixel,
    one_view,
    part_of,
    parts_of,
    pick,
    plan,
    plane_of,
    prepare,
    put,
    read_labels,
    resize_weight,
    sum_of,
    values,
    weigh,
    write_gradient,
    write_pixels,
)
from .total import add, total

# Label pixels per lane. Each also needs a log-sum-exp, a label and, if any, a weight. Larger tiles cost more compile time
# than they save.
TILE = (2, 9)
# Per thread, for 16 label pixels without weights; see kernels.launch. By default ptxas for sm_100 takes 128 and spills
# two.
REGISTERS = 168


class Out(NamedTuple):
    """Outputs of the kernel."""

    loss: Any  # (N, H, W) ACC, or None
    part: Any  # (2, programs) ACC: losses, class weights
    planes: Any  # as in resize.Shares, or None


@triton.jit
def sums(view, cell, shift, label, T):
    """Per label pixel: the sum of exponentials about ``shift``, and a value minus ``shift``: that of ``label``, the
    largest if ``label`` is None, none if it is an empty tuple."""
    low: tl.constexpr = LOW64 if tl.float64 == T.ACC else LOW32
    zero = tl.zeros([T.CELLS], T.ACC)
    total = fill(zero, len(cell.pixels.exist))
    own = fill(zero + low, len(total)) if label is None else fill(zero, len(label))
    at = begin(view, cell)
    for c in range(view.logits.classes):
        number = tl.cast(c, tl.float32)
        value = values(view, at, cell, shift)
        at = advance(at, plane_of(view.logits))
        more, kept = (), ()
        for k in tl.static_range(len(value)):
            more = more + (total[k] + tl.exp2(value[k]),)
            if label is None:
                kept = kept + (tl.maximum(own[k], value[k]),)
            elif len(label) > 0:
                kept = kept + (tl.where(label[k] == number, value[k], own[k]),)
        total, own = more, kept
    return total, own


@triton.jit
def softmax(view, grid, cell, counted, label, T):
    """Per label pixel: the log-sum-exp, base 2, and its distance to the value that ``label`` selects in :func:`sums`.

    ``counted`` pixels whose sum about the bound has lost terms are recomputed about the true maximum. This is rare, so
    they are done in a loop: unrolled, this code would double the compile time.
    """
    shift = bound(view, cell)
    total, own = sums(view, cell, shift, label, T)
    base, norm, distance = each(shift, len(counted)), (), ()
    for k in tl.static_range(len(counted)):
        log = tl.log2(total[k])
        norm = norm + (base[k] + log,)
        distance = distance + (log - own[k],)
    below = far_below(total, counted)
    if any_lane(below != 0):
        for j in range(len(counted)):
            far = has(below, j)
            if any_lane(far):
                one = one_pixel(cell, j)
                seen = one_view(view, grid, one, T)
                peak = largest(seen, one, T)
                right, right_own = sums(seen, one, Shift(peak, ()), None if label is None else (pick(label, j),), T)
                log = tl.log2(right[0])
                norm = put(norm, j, far, peak + log)
                distance = put(distance, j, far, log - right_own[0])
    return norm, distance


@triton.jit
def _gradient(k: tl.constexpr, c, value, _, own, state):
    """factor * (p - onehot), and the label's value if wanted. ``state``: label, log-sum-exp, and the factor if not 1."""
    mine = state[0][k] == c
    out = tl.exp2(value - state[1][k]) - tl.where(mine, 1.0, 0.0)
    if len(state) == 3:
        out *= state[2][k]
    kept = out
    if own is not None:
        kept = tl.where(mine, value, own)
    return out, kept


@triton.jit
def _cross_entropy(
    logits,  # resize.Logits
    labels,  # resize.Labels
    grid,  # resize.Grid
    out,  # Out
    scale: tl.float64,
    T,  # resize.Tile
):
    place = locate(logits, grid, T)
    zero = tl.zeros([T.CELLS], T.ACC)
    losses, lost, counts, missed = zero, zero, zero, zero
    first, last = parts_of(grid)
    for part in range(first, last):
        pixels = part_of(place, logits, grid, part, T)
        worth = read_labels(labels, grid, place, pixels, logits.classes, T)
        label, counted, known = worth.label, worth.counted, worth.known
        share = tl.where(place.own, sum_of(worth.share), 0)  # here, to end the live range of each pixel's share
        if labels.class_weight is None:
            counts += share
        else:
            counts, missed = add(counts, missed, share)
        cell, view = Cell(place, pixels, any_of(counted)), View(logits, ())
        distance = nothing()  # from the log-sum-exp to the label's value
        norm, own = known, fill(zero, len(known))
        if len(known) == 0 or out.planes is None:
            found, distance = softmax(view, grid, cell, counted, label, T)
            norm, own = nothing(), nothing()
            for k in tl.static_range(len(counted)):
                norm = norm + (tl.where(counted[k], found[k], float("inf")),)
        factor = weigh(labels, grid, place, pixels, worth)
        if out.planes is not None:
            weighted: tl.constexpr = (labels.class_weight is not None) or (labels.pixel_weight is not None)
            state = (label, norm, factor) if weighted else (label, norm)
            own = write_gradient(out.planes, grid, cell, view, (), state, own, _gradient, part > first, T, ())
            for k in tl.static_range(len(own)):
                distance = distance + (norm[k] - own[k],)
        terms = nothing()
        for k in tl.static_range(len(counted)):
            terms = terms + (tl.where(counted[k], factor[k] * (distance[k] * LN2), 0),)
        losses, lost = add(losses, lost, tl.where(place.own, sum_of(terms), 0))
        if out.loss is not None:
            scaled = nothing()
            for k in tl.static_range(len(counted)):
                scaled = scaled + (terms[k] * tl.full((), scale, tl.float64).to(T.ACC),)
            write_pixels(out.loss, grid, place, pixels, scaled)
    tl.store(out.part + tl.program_id(0), tl.sum(losses))
    tl.store(out.part + tl.num_programs(0) + tl.program_id(0), tl.sum(counts))


def _launch(args: tuple[Any, ...], gradient: bool, per_pixel: bool, scale: float) -> tuple[Any, Out]:
    logits, target, class_weight, pixel_weight, selected, ignore_index, align_corners = args
    acc, _ = accumulator(logits)
    cut = plan(logits, target.shape[1:], align_corners, TILE, int(gradient), acc)
    (prepared,) = prepare(target.shape[1:], 1.0, logits)
    loss = torch.empty_like(target, dtype=acc) if per_pixel else None
    planes = logits.new_empty((2 * cut.split, *logits.shape), dtype=acc) if gradient else None
    out = Out(loss, logits.new_empty((2, cut.programs), dtype=acc), planes)
    pixel_weight = resize_weight(pixel_weight, target.shape[1:], align_corners)
    labels = Labels(target, class_weight, pixel_weight, selected, ignore_index)
    weighted = class_weight is not None or pixel_weight is not None
    registers = None if weighted or cut.tile.ROWS.value * cut.tile.COLUMNS.value > 16 else REGISTERS
    launch(
        _cross_entropy, (cut.programs,), logits, prepared, labels, cut.grid, out, scale, cut.tile,
        num_warps=1, registers=registers,
    )  # fmt: skip
    return cut, out


def forward(
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    pixel_weight: Tensor | None,
    selected: Tensor | None,
    ignore_index: int,
    align_corners: bool,
    reduction: str,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The loss and the count; see ``fastkd.ops.resized_cross_entropy``.

    Args:
        logits: (N, C, h, w), NCHW-contiguous or channels_last. target: (N, H, W), contiguous.
        class_weight: (C,), pixel_weight: (N, any height, any width), both contiguous in the accumulator's dtype.
        selected: bool (N, H, W), or in the accumulator's dtype: log-sum-exps, NaN where a pixel does not count.
    """
    args = (logits, target, class_weight, pixel_weight, selected, ignore_index, align_corners)
    _, out = _launch(args, False, reduction == "none", scale)
    loss, count = total(out.part, reduction, scale)
    return (out.loss if loss is None else loss), count


def gradient(
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    pixel_weight: Tensor | None,
    selected: Tensor | None,
    ignore_index: int,
    align_corners: bool,
    reduction: str,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, count, and the gradient in the dtype and layout of ``logits``; arguments as for :func:`forward`."""
    args = (logits, target, class_weight, pixel_weight, selected, ignore_index, align_corners)
    cut, out = _launch(args, True, False, scale)
    return join(out.planes, logits, out.part, cut.split, reduction, scale, scale)

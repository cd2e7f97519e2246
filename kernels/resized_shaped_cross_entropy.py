"""Cross-entropy at label resolution with label smoothing or a focal factor; formulas in
``fastkd.ops.resized_cross_entropy``.

Tiling and traffic are those of :mod:`kernels.resized_cross_entropy`. Smoothing needs sum_c w_c (lse - z_c) per label
pixel. The sum over the classes is linear in the logits: it is computed at logit size, about the largest class, and
interpolated as one more map, at no cost per class.
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
    Logits,
    Shift,
    View,
    Worth,
    any_of,
    begin,
    join,
    locate,
    nothing,
    part_of,
    parts_of,
    plan,
    plane_of,
    prepare,
    read_labels,
    resize_weight,
    sum_of,
    values,
    weigh,
    write_gradient,
    write_pixels,
)
from .resized_cross_entropy import TILE, Out, softmax
from .resized_cross_entropy import _gradient as _focal
from .total import add, total


class Depth(NamedTuple):
    """Inputs of smoothing besides the logits."""

    map: Any  # (N, h + 2, w + 2) ACC: sum_c w_c (peak - z_c), base 2
    weight: Any  # () ACC: sum_c w_c


@triton.jit
def _depths(
    logits,  # resize.Logits
    class_weight,  # (C,) ACC, or None
    out,  # Depth
    pixels,  # of the map
    ACC: tl.constexpr,
    BLOCK_CLASSES: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
):
    highest: tl.constexpr = -LOW64 if tl.float64 == ACC else -LOW32
    plane = plane_of(logits)
    at = tl.program_id(0).to(tl.int64) * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
    inside = at < pixels
    data = logits.data + at // plane * logits.classes * plane + at % plane
    peak = tl.load(logits.peak + at, mask=inside, other=0)
    depth, every = tl.zeros([BLOCK_PIXELS], ACC), tl.zeros([BLOCK_CLASSES], ACC)
    for first in range(0, logits.classes, BLOCK_CLASSES):
        c = first + tl.arange(0, BLOCK_CLASSES)
        exists = c < logits.classes
        weight = exists.to(ACC)
        if class_weight is not None:
            weight = tl.load(class_weight + c, mask=exists, other=0)
        mask = exists[:, None] & inside[None, :]
        value = tl.load(data[None, :] + c.to(tl.int64)[:, None] * plane, mask=mask, other=0)
        depth += tl.sum(weight[:, None] * (peak[None, :] - value), 0)
        every += weight
    # Several masked classes may add up to inf, which a weight of 0 would not remove.
    tl.store(out.map + at, tl.minimum(depth, highest, propagate_nan=tl.PropagateNan.ALL), mask=inside)
    if tl.program_id(0) == 0:
        tl.store(out.weight, tl.sum(every))


def _depth(logits: Logits, samples: int, class_weight: Tensor | None) -> Depth:
    pixels = samples * (logits.height + 2) * (logits.width + 2)
    out = Depth(logits.peak.new_empty(pixels), logits.peak.new_empty(()))
    _, ACC = accumulator(logits.peak)
    launch(
        _depths, (triton.cdiv(pixels, 64),), logits.peak, logits, class_weight, out, pixels,
        ACC=ACC, BLOCK_CLASSES=16, BLOCK_PIXELS=64,
    )  # fmt: skip
    return out


@triton.jit
def _interpolated(data, logits, cell):
    """A map shaped like ``logits.peak``, interpolated at label pixels."""
    view = View(Logits(data, data, 1, logits.height, logits.width, logits.right, logits.below), ())
    return values(view, begin(view, cell), cell, Shift(0, ()))


@triton.jit
def _smooth(k: tl.constexpr, c, value, _, kept, state):
    """factor * (p - (1 - e) onehot - e / C); ``state``: label, log-sum-exp, factor, offsets of the label and the others."""
    out = tl.exp2(value - state[1][k]) + tl.where(state[0][k] == c, state[3], state[4])
    out *= state[2][k]
    return out, out


@triton.jit
def _smooth_weighted(k: tl.constexpr, c, value, weight, kept, state):
    """first * (p - onehot) + second * (W onehot - w_c); ``state``: label, log-sum-exp, first, second, W."""
    mine = state[0][k] == c
    out = state[2][k] * (tl.exp2(value - state[1][k]) - tl.where(mine, 1.0, 0.0))
    out += state[3][k] * (tl.where(mine, state[4], 0.0) - weight[0])
    return out, out


@triton.jit
def _smooth_state(label, norm, own_weight, factor, labels, smoothing, classes, weight):
    if labels.class_weight is None:
        state = (label, norm, factor, smoothing - smoothing / classes - 1, -smoothing / classes)
    else:
        first, second = (), ()
        for k in tl.static_range(len(label)):
            share = factor[k] * (smoothing / classes)
            first = first + (factor[k] * (1 - smoothing) * own_weight[k] + share * weight,)
            second = second + (share,)
        state = (label, norm, first, second, weight)
    return state


@triton.jit
def _focused(distance, gamma):
    """Focal loss at ``distance`` (base 2) from the log-sum-exp, and its factor of p - onehot."""
    loss = tl.maximum(distance, 0, propagate_nan=tl.PropagateNan.ALL)  # powers of a rounding error below 0 are NaN
    p = tl.exp2(-loss)
    loss *= LN2
    sure = p == 1
    rest = tl.where(sure, 1, 1 - p)
    power = tl.where(sure, 0, tl.exp2(gamma * tl.log2(rest)))
    return power * loss, power * (1 + gamma * p * (loss / rest))


@triton.jit
def _shaped_cross_entropy(
    logits,  # resize.Logits
    depth,  # Depth for smoothing; None for focal
    labels,  # resize.Labels
    grid,  # resize.Grid
    out,  # resized_cross_entropy.Out
    amount: tl.float64,  # of smoothing, or the focal exponent
    scale: tl.float64,
    T,  # resize.Tile
):
    place = locate(logits, grid, T)
    amount = tl.full((), amount, tl.float64).to(T.ACC)
    classes = tl.cast(logits.classes, T.ACC)
    zero = tl.zeros([T.CELLS], T.ACC)
    losses, lost, counts, missed = zero, zero, zero, zero
    first, last = parts_of(grid)
    for part in range(first, last):
        pixels = part_of(place, logits, grid, part, T)
        worth = read_labels(labels, grid, place, pixels, logits.classes, T)
        label, counted = worth.label, worth.counted
        share = tl.where(place.own, sum_of(worth.share), 0)  # here, to end the live range of each pixel's share
        if labels.class_weight is None:
            counts += share
        else:
            counts, missed = add(counts, missed, share)
        cell, view = Cell(place, pixels, any_of(counted)), View(logits, ())
        found, distance = softmax(view, grid, cell, counted, label, T)
        norm = nothing()
        for k in tl.static_range(len(counted)):
            norm = norm + (tl.where(counted[k], found[k], float("inf")),)
        terms = nothing()
        if depth is not None:
            weight, share, ones = classes, worth.share, nothing()
            if labels.class_weight is not None:
                weight = tl.load(depth.weight)
            for k in tl.static_range(len(counted)):
                ones = ones + (counted[k].to(T.ACC),)
            # Pixel weights only: class weights enter term by term.
            factor = weigh(labels, grid, place, pixels, Worth(label, counted, ones, ()))
            peak, deep = _interpolated(logits.peak, logits, cell), _interpolated(depth.map, logits, cell)
            state = _smooth_state(label, norm, share, factor, labels, amount, classes, weight)
            for k in tl.static_range(len(counted)):
                term = (1 - amount) * share[k] * distance[k]
                term += amount / classes * (weight * (found[k] - peak[k]) + deep[k])
                terms = terms + (tl.where(counted[k], factor[k] * (term * LN2), 0),)
        else:
            factor = weigh(labels, grid, place, pixels, worth)
            weighted = nothing()
            for k in tl.static_range(len(counted)):
                term, more = _focused(distance[k], amount)
                terms = terms + (tl.where(counted[k], factor[k] * term, 0),)
                weighted = weighted + (tl.where(counted[k], factor[k] * more, 0),)
            state = (label, norm, weighted)
        if out.planes is not None:
            formula: tl.constexpr = (
                _focal if depth is None else _smooth if labels.class_weight is None else _smooth_weighted
            )
            numbers = (labels.class_weight,) if formula is _smooth_weighted else ()
            write_gradient(out.planes, grid, cell, view, (), state, (), formula, part > first, T, numbers)
        losses, lost = add(losses, lost, tl.where(place.own, sum_of(terms), 0))
        if out.loss is not None:
            scaled = nothing()
            for k in tl.static_range(len(counted)):
                scaled = scaled + (terms[k] * tl.full((), scale, tl.float64).to(T.ACC),)
            write_pixels(out.loss, grid, place, pixels, scaled)
    tl.store(out.part + tl.program_id(0), tl.sum(losses))
    tl.store(out.part + tl.num_programs(0) + tl.program_id(0), tl.sum(counts))


def _launch(args: tuple[Any, ...], gradient: bool, per_pixel: bool, scale: float) -> tuple[Any, Out]:
    logits, target, class_weight, pixel_weight, ignore_index, align_corners, smoothing, gamma = args
    acc, _ = accumulator(logits)
    cut = plan(logits, target.shape[1:], align_corners, TILE, int(gradient), acc)
    (prepared,) = prepare(target.shape[1:], 1.0, logits)
    depth = None if gamma else _depth(prepared, logits.shape[0], class_weight)
    loss = torch.empty_like(target, dtype=acc) if per_pixel else None
    planes = logits.new_empty((2 * cut.split, *logits.shape), dtype=acc) if gradient else None
    out = Out(loss, logits.new_empty((2, cut.programs), dtype=acc), planes)
    pixel_weight = resize_weight(pixel_weight, target.shape[1:], align_corners)
    labels = Labels(target, class_weight, pixel_weight, None, ignore_index)
    launch(
        _shaped_cross_entropy, (cut.programs,), logits, prepared, depth, labels, cut.grid, out, gamma or smoothing, scale,
        cut.tile, num_warps=1,
    )  # fmt: skip
    return cut, out


def forward(
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    pixel_weight: Tensor | None,
    ignore_index: int,
    align_corners: bool,
    label_smoothing: float,
    focal_gamma: float,
    reduction: str,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The loss and the count; see ``fastkd.ops.resized_cross_entropy``.

    Args:
        logits: (N, C, h, w), NCHW-contiguous or channels_last. target: (N, H, W), contiguous.
        class_weight: (C,), pixel_weight: (N, any height, any width), both contiguous in the accumulator's dtype.
        label_smoothing, focal_gamma: at most one is nonzero.
    """
    args = (logits, target, class_weight, pixel_weight, ignore_index, align_corners, label_smoothing, focal_gamma)
    _, out = _launch(args, False, reduction == "none", scale)
    loss, count = total(out.part, reduction, scale)
    return (out.loss if loss is None else loss), count


def gradient(
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    pixel_weight: Tensor | None,
    ignore_index: int,
    align_corners: bool,
    label_smoothing: float,
    focal_gamma: float,
    reduction: str,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, count, and the gradient in the dtype and layout of ``logits``; arguments as for :func:`forward`."""
    args = (logits, target, class_weight, pixel_weight, ignore_index, align_corners, label_smoothing, focal_gamma)
    cut, out = _launch(args, True, False, scale)
    return join(out.planes, logits, out.part, cut.split, reduction, scale, scale)

"""Binary cross-entropy at label resolution, one class against the rest; formulas in
``fastkd.ops.resized_binary_cross_entropy``.

Tiled as in :mod:`kernels.resize`. Classes are independent, so one loop over them computes loss and gradient. Most of
the traffic is one read of the target: N * C * H * W labels.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import accumulator, launch
from .resize import (
    Cell,
    Labels,
    Shift,
    View,
    advance,
    any_of,
    begin,
    join,
    locate,
    next_class,
    nothing,
    part_of,
    parts_of,
    plan,
    plane_of,
    prepare,
    read_labels,
    resize_weight,
    shares_of,
    spread,
    sum_of,
    values,
    weigh,
)
from .sigmoid import softplus_and_sigmoid, unbounded
from .total import add, total

TILE = (2, 9)  # label pixels per lane


class Elements(NamedTuple):
    """Per-element inputs."""

    target: Any  # (N, C, H, W) uint8, int32 or int64
    pos_weight: Any  # (C,) ACC, or None
    pixel_weight: Any  # (N, H, W) ACC, or None
    element_weight: Any  # (N, C, H, W) ACC, or None
    ZERO: Any  # whether zeros count, and ones
    ONE: Any


class Out(NamedTuple):
    """Outputs of the kernel."""

    loss: Any  # (N, C, H, W) ACC, or None
    part: Any  # (2, programs) ACC: losses, counted elements
    planes: Any  # as in resize.Shares, or None


@triton.jit
def _of_class(to, classes, grid, place, pixels):
    """Pointers to a part's label pixels in class 0 of ``to`` (N, C, H, W); empty for None."""
    out = ()
    if to is not None:
        first = to + ((place.sample.to(tl.int64) * classes * grid.height + pixels.y[0]) * grid.width + pixels.x[0])
        for _ in tl.static_range(len(pixels.y)):
            for j in tl.static_range(len(pixels.x)):
                out = out + (first + j,)
            first += grid.width
    return out


@triton.jit
def _element(x, label, weight, positive, elements):
    """Loss and gradient of an element, and whether it counts."""
    one, zero = label == 1, label == 0
    counted = one if not elements.ZERO else zero if not elements.ONE else one | zero
    if positive is not None:
        weight = tl.where(one, weight * positive, weight)
    softplus, p = softplus_and_sigmoid(tl.where(one, -x, x))  # of a one, p is 1 - sigmoid(x)
    term = tl.where(counted, weight * unbounded(softplus), 0)
    return term, tl.where(counted, tl.where(one, -weight, weight) * p, 0), counted


@triton.jit
def _binary_cross_entropy(
    logits,  # resize.Logits
    elements,  # Elements
    grid,  # resize.Grid
    out,  # Out
    scale: tl.float64,
    T,  # resize.Tile
):
    place = locate(logits, grid, T)
    zero = tl.zeros([T.CELLS], T.ACC)
    losses, lost, counts = zero, zero, tl.zeros([T.CELLS], tl.int32)
    size = tl.cast(grid.height, tl.int64) * grid.width
    first, last = parts_of(grid)
    for part in range(first, last):
        pixels = part_of(place, logits, grid, part, T)
        labels = Labels(None, None, elements.pixel_weight, None, 0)
        weight = weigh(labels, grid, place, pixels, read_labels(labels, grid, place, pixels, 1, T))
        cell, view = Cell(place, pixels, any_of(pixels.exist)), View(logits, ())
        at = begin(view, cell)
        targets = _of_class(elements.target, logits.classes, grid, place, pixels)
        weights = _of_class(elements.element_weight, logits.classes, grid, place, pixels)
        terms_to = _of_class(out.loss, logits.classes, grid, place, pixels)
        if out.planes is not None:
            to = shares_of(out.planes, logits, grid, place, T)
        for c in range(logits.classes):
            x = values(view, at, cell, Shift(0, ()))
            at = advance(at, plane_of(logits))
            positive = None
            if elements.pos_weight is not None:
                positive = tl.load(elements.pos_weight + c)
            terms, gradient = nothing(), nothing()
            for k in tl.static_range(len(x)):
                label = tl.load(targets[k], mask=pixels.exist[k], other=2)
                worth = weight[k]
                if len(weights) > 0:
                    worth *= tl.load(weights[k], mask=pixels.exist[k], other=0)
                term, more, counted = _element(x[k], label, worth, positive, elements)
                counts += (counted & place.own).to(tl.int32)
                terms, gradient = terms + (term,), gradient + (more,)
                if out.loss is not None:
                    scaled = term * tl.full((), scale, tl.float64).to(T.ACC)
                    tl.store(terms_to[k], scaled, mask=pixels.exist[k])
            losses, lost = add(losses, lost, tl.where(place.own, sum_of(terms), 0))
            targets, weights, terms_to = advance(targets, size), advance(weights, size), advance(terms_to, size)
            if out.planes is not None:
                spread(to, gradient, pixels, part > first, T)
                to = next_class(to, logits)
    tl.store(out.part + tl.program_id(0), tl.sum(losses))
    tl.store(out.part + tl.num_programs(0) + tl.program_id(0), tl.sum(counts.to(tl.int64)).to(T.ACC))


def _launch(args: tuple[Any, ...], gradient: bool, per_pixel: bool, scale: float) -> tuple[Any, Out]:
    logits, target, pos_weight, pixel_weight, ignore_index, align_corners = args
    acc, _ = accumulator(logits)
    size = target.shape[2:]
    cut = plan(logits, size, align_corners, TILE, int(gradient), acc)
    (prepared,) = prepare(size, 1.0, logits, bounded=True)
    loss = torch.empty_like(target, dtype=acc) if per_pixel else None
    planes = logits.new_empty((2 * cut.split, *logits.shape), dtype=acc) if gradient else None
    out = Out(loss, logits.new_empty((2, cut.programs), dtype=acc), planes)
    of_pixels = of_elements = None
    if pixel_weight is not None:
        every = resize_weight(pixel_weight.flatten(0, 1), size, align_corners)
        if pixel_weight.shape[1] == 1:
            of_pixels = every
        else:
            of_elements = every
    count = map(tl.constexpr, (ignore_index != 0, ignore_index != 1))
    elements = Elements(target, pos_weight, of_pixels, of_elements, *count)
    launch(
        _binary_cross_entropy, (cut.programs,), logits, prepared, elements, cut.grid, out, scale, cut.tile, num_warps=1
    )
    return cut, out


def forward(
    logits: Tensor,
    target: Tensor,
    pos_weight: Tensor | None,
    pixel_weight: Tensor | None,
    ignore_index: int,
    align_corners: bool,
    reduction: str,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The loss and the number of counted elements; see ``fastkd.ops.resized_binary_cross_entropy``.

    Args:
        logits: (N, C, h, w), NCHW-contiguous or channels_last. target: (N, C, H, W), contiguous.
        pos_weight: (C,), pixel_weight: (N, 1 or C, any height, any width), both contiguous in the accumulator's dtype.
    """
    args = (logits, target, pos_weight, pixel_weight, ignore_index, align_corners)
    _, out = _launch(args, False, reduction == "none", scale)
    loss, count = total(out.part, reduction, scale)
    return (out.loss if loss is None else loss), count


def gradient(
    logits: Tensor,
    target: Tensor,
    pos_weight: Tensor | None,
    pixel_weight: Tensor | None,
    ignore_index: int,
    align_corners: bool,
    reduction: str,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, count, and the gradient in the dtype and layout of ``logits``; arguments as for :func:`forward`."""
    args = (logits, target, pos_weight, pixel_weight, ignore_index, align_corners)
    cut, out = _launch(args, True, False, scale)
    return join(out.planes, logits, out.part, cut.split, reduction, scale, scale)

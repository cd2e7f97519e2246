"""The gradient at logit size: cells' contributions in two planes, and the kernel that adds them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import accumulator, launch
from ..total import finish, gather_parts
from .interpolation import Shift, advance, begin, load_each, plane_of, values
from .tuples import nothing


class Shares(NamedTuple):
    """Where a lane's contributions to class 0 go in the planes (split, 2, N, C, h, w), and which lanes write.

    The first plane holds what a logit gets from the cell below it, the second from the cell above.
    """

    upper: Any
    lower: Any
    has_upper: Any
    has_lower: Any
    from_left: Any  # the previous lane holds the cell to the left, which contributes to this lane's logit
    down: Any  # whether a cell contributes to the logit below


@triton.jit
def shares_of(planes, logits, grid, place, T):
    size = tl.cast(logits.height, tl.int64) * logits.width
    every = grid.samples * logits.classes * size
    which = (tl.program_id(0) % grid.split).to(tl.int64)
    at = planes + which * 2 * every + place.sample.to(tl.int64) * logits.classes * size + place.x
    has = place.own & (place.x >= 0)
    below = place.y + 1
    has_lower = has & (below < logits.height)
    if T.ALIGN:  # no cell is above the first row: its slot takes the last row's, which is 0
        below = tl.where(below < logits.height, below, 0)
        has_lower = has
    upper = at + place.y.to(tl.int64) * logits.width
    lower = at + every + below.to(tl.int64) * logits.width
    from_left = (place.x > (0 if T.ALIGN else -1)) & (logits.right != 0)
    return Shares(upper, lower, has & (place.y >= 0), has_lower, from_left, logits.below != 0)


@triton.jit
def next_class(to, logits):
    size = tl.cast(logits.height, tl.int64) * logits.width
    return Shares(to.upper + size, to.lower + size, to.has_upper, to.has_lower, to.from_left, to.down)


@triton.jit
def spread(to, value, pixels, again, T):
    """Adds one class's gradient at label pixels, transposed to the cell's corners, to that of earlier parts."""
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
    lower = tl.where(to.down, lower, 0)  # not resized along this axis: weight 0 times NaN is NaN
    # One lane adds to each address, in program order, so sums are reproducible. A load and a store would stall on the
    # load in every class.
    tl.store(to.upper, upper, mask=to.has_upper & (not again))
    tl.store(to.lower, lower, mask=to.has_lower & (not again))
    tl.atomic_add(to.upper, upper, mask=to.has_upper & again, sem="relaxed")
    tl.atomic_add(to.lower, lower, mask=to.has_lower & again, sem="relaxed")


@triton.jit
def write_gradient(planes, grid, cell, student, teacher, state, kept, FORMULA: tl.constexpr, again, T, numbers):
    """The gradient of each label pixel and class, transposed to logit size.

    Args:
        student: a view. teacher: a tuple with a view, or ().
        state: passed to FORMULA(k, class, student's value, teacher's value, kept, state), which returns the gradient
            and the new ``kept`` of label pixel k.
        kept: tuple with one number per label pixel, or empty.
        again: whether an earlier part has written its contributions.
        numbers: tuple of pointers to one number per class, at class 0. FORMULA gets those of its class, as a tuple, in
            place of the teacher's value.

    Returns:
        kept.
    """
    logits = student.logits
    at = begin(student, cell)
    if len(teacher) > 0:
        teacher_at = begin(teacher[0], cell)
    to = shares_of(planes, logits, grid, cell.place, T)
    for c in range(logits.classes):
        number = tl.cast(c, tl.float32)
        value = values(student, at, cell, Shift(0, ()))
        at = advance(at, plane_of(logits))
        other = value
        if len(teacher) > 0:
            other = values(teacher[0], teacher_at, cell, Shift(0, ()))
            teacher_at = advance(teacher_at, plane_of(teacher[0].logits))
        own = load_each(numbers)
        numbers = advance(numbers, 1)
        gradient, keep = nothing(), nothing()
        for k in tl.static_range(len(value)):
            second = other[k] if len(own) == 0 else own
            if len(kept) > 0:
                one, more = FORMULA(k, number, value[k], second, kept[k], state)
                keep = keep + (more,)
            else:
                one, more = FORMULA(k, number, value[k], second, None, state)
            gradient = gradient + (one,)
        kept = keep
        spread(to, gradient, cell.pixels, again, T)
        to = next_class(to, logits)
    return kept


@triton.jit
def _join(
    planes,  # (split, 2, N, C, h * w) ACC
    out,  # (N, C, h, w), any float dtype
    sums,  # (2, parts) ACC: summed losses, counts; or None
    loss,  # () ACC, or None
    count,  # () ACC, or None
    size,  # (split, parts, elements of the map, C, h * w)
    stride,  # of out: (n, c, pixel)
    scale: tl.float64,  # of the loss
    gradient_scale: tl.float64,
    T,  # (ACC, MEAN, BLOCK_PARTS, BLOCK_CLASSES, BLOCK_PIXELS)
):
    """Adds the planes, scales and casts; also reduces the loss."""
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


def _add_planes(
    planes: Tensor, like: Tensor, sums: tuple[Any, ...], split: int, mean: bool, scale: float, gradient_scale: float
) -> Tensor:
    """``sums``: (partial sums of loss and count, their number, loss, count); see :func:`_join`."""
    _, ACC = accumulator(planes)
    n, c, h, w = like.shape
    out = torch.empty_like(like)
    part, parts, loss, count = sums
    nchw = like.is_contiguous()
    if nchw:  # all planes are contiguous
        rows, classes, pixels, blocks, stride = 1, 1, n * c * h * w, (1, 1024), (0, 0, 1)
    else:
        rows, classes, pixels, blocks, stride = n, c, h * w, (32, 32), (c * h * w, 1, c)
    programs = rows * triton.cdiv(classes, blocks[0]) * triton.cdiv(pixels, blocks[1])
    T = tuple(map(tl.constexpr, (ACC, mean, triton.next_power_of_2(parts), *blocks)))
    launch(
        _join, (programs,), like, planes, out, part, loss, count, (split, parts, like.numel(), classes, pixels), stride,
        scale, gradient_scale, T,
    )  # fmt: skip
    return out


def join(
    planes: Tensor, like: Tensor, part: Tensor, split: int, reduction: str, scale: float, gradient_scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The reduced loss, the count, and the gradient in the dtype and layout of ``like``."""
    loss, count = part.new_empty(()), part.new_empty(())
    part = gather_parts(part)
    sums = (part, part.shape[1], loss, count)
    return loss, count, _add_planes(planes, like, sums, split, reduction == "mean", scale, gradient_scale)


def join_planes(planes: Tensor, like: Tensor, split: int) -> Tensor:
    """The gradient only."""
    return _add_planes(planes, like, (None, 1, None, None), split, False, 1.0, 1.0)

"""KD at label resolution: weight * tau^2 * KL(softmax(T[p] / tau) || softmax(S[p] / tau)) of interpolated logits S[p], T[p];
docs/full-resolution.md.

As in resized_cross_entropy, with two sides: the forward reads both logits and keeps both log-sum-exps of each label pixel,
8 bytes (4 more with a pixel weight); the gradient reads the logits and those. The teacher's logits may be of another size:
their cells are not the student's then, and four of them are gathered for each label pixel.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .resize import (
    blend,
    cells_of,
    corners,
    counted_labels,
    first_output,
    interpolate,
    join,
    left_of,
    phase,
    pixel_weights,
    plan,
    right_weight,
    rows_of,
    shares,
    spread,
    total,
)
from .softmax import START, divergence, grow, grow_cross
from .tiles import accumulator, launch


@triton.jit
def _values(
    top, bottom, down, c, classes, cell, x, weight, inside, width, out_width, stride_c, stride_x, scale,
    ALIGN: tl.constexpr, BLEND: tl.constexpr, BY_CELLS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Interpolated logits (classes, cells, phases) of a map; not BY_CELLS: one whose cells are not those of the tile."""
    if BY_CELLS:
        left, right = corners(top, bottom, down, c, classes, cell, width, stride_c, stride_x, scale, ACC)
        value = interpolate(left, right, weight, BLEND)
    else:
        at = left_of(x, width, out_width, ALIGN)
        share = right_weight(x, at, width, out_width, ALIGN, ACC)[None, :, :]
        mask = (c < classes)[:, None, None] & inside[None, :, :]
        offset = c[:, None, None] * stride_c
        here, there = at.to(tl.int64), tl.minimum(at + 1, width - 1).to(tl.int64)
        left = blend(top, bottom, down, offset + here[None, :, :] * stride_x, mask, scale, ACC)
        right = blend(top, bottom, down, offset + there[None, :, :] * stride_x, mask, scale, ACC)
        value = tl.where(share == 0, left, (1 - share) * left + share * right)
        value = tl.where((c < classes)[:, None, None], value, -float("inf"))
    return value


@triton.jit
def _losses(
    target, pixel_weight, lse_s, lse_t, factor, loss, ignore_index, classes,
    top_s, bottom_s, down_s, width, stride_c, stride_x,
    top_t, bottom_t, down_t, teacher_width, teacher_stride_c, teacher_stride_x,
    out_height, out_width, weight_height, weight_width, sample, row, start, end, cell, k, scale, tau,
    ALIGN: tl.constexpr, BLEND: tl.constexpr, SAME: tl.constexpr, ACC: tl.constexpr, BLOCK_CLASSES: tl.constexpr,
    PHASES: tl.constexpr,
):  # fmt: skip
    """The loss of PHASES phases of a row of cells, stored, its sum, and how many pixels count."""
    x, inside, weight = phase(start, end, cell, k, width, out_width, ALIGN, PHASES, ACC)
    offset = (sample * out_height + row) * out_width
    _, counted = counted_labels(target, None, offset, x, inside, ignore_index, classes)
    total_s = tl.zeros_like(weight)
    total_t = tl.zeros_like(weight)
    cross = tl.zeros_like(weight)
    peak_s = total_s + START
    peak_t = total_t + START
    for first in range(0, classes, BLOCK_CLASSES):
        c = first + tl.arange(0, BLOCK_CLASSES).to(tl.int64)
        s = _values(
            top_s, bottom_s, down_s, c, classes, cell, x, weight, inside, width, out_width, stride_c, stride_x, scale,
            ALIGN, BLEND, True, ACC,
        )  # fmt: skip
        t = _values(
            top_t, bottom_t, down_t, c, classes, cell, x, weight, inside, teacher_width, out_width, teacher_stride_c,
            teacher_stride_x, scale, ALIGN, BLEND, SAME, ACC,
        )  # fmt: skip
        higher_s, total_s = grow(s, 1.0, peak_s, total_s, 0)
        higher_t, more_t = grow(t, 1.0, peak_t, total_t, 0)
        cross = grow_cross(s, t, 1.0, cross, total_t, peak_s, peak_t, higher_s, higher_t, 0)
        peak_s, peak_t, total_t = higher_s, higher_t, more_t
    value = divergence(1.0, total_s, total_t, cross) * (tau * tau)
    if pixel_weight is not None:
        pixel = pixel_weights(
            pixel_weight, sample, row, x, counted, weight_height, weight_width, out_height, out_width, ALIGN, ACC
        )
        value *= pixel
        if factor is not None:
            tl.store(factor + offset + x, pixel, mask=inside)
    value = tl.where(counted, value, 0)
    if loss is not None:
        tl.store(loss + offset + x, value, mask=inside)
    if lse_s is not None:
        tl.store(lse_s + offset + x, peak_s + tl.log(total_s), mask=inside)
        tl.store(lse_t + offset + x, peak_t + tl.log(total_t), mask=inside)
    return tl.sum(value), tl.sum(counted.to(ACC))


@triton.jit
def _forward(
    student,  # map (N, C, h, w), any float dtype
    teacher,  # map (N, C, teacher_height, teacher_width), any float dtype
    target,  # (N, H, W) uint8, int32 or int64, or None
    pixel_weight,  # (N, weight_height, weight_width) ACC, or None
    lse_s,  # (N, H, W) ACC, or None
    lse_t,  # (N, H, W) ACC, or None
    factor,  # (N, H, W) ACC, or None: pixel weight
    loss,  # (N, H, W) ACC, or None
    part,  # (2, programs) ACC: losses, counted pixels
    tau: tl.float64,
    ignore_index,
    classes,
    height,
    width,
    out_height,
    out_width,
    teacher_height,
    teacher_width,
    weight_height,
    weight_width,
    stride_n,
    stride_c,
    stride_y,
    stride_x,
    teacher_stride_n,
    teacher_stride_c,
    teacher_stride_y,
    teacher_stride_x,
    blocks,
    whole,
    SAME: tl.constexpr,
    ALIGN: tl.constexpr,
    BLEND: tl.constexpr,
    INT: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_CLASSES: tl.constexpr,
    BLOCK_CELLS: tl.constexpr,
    PHASES: tl.constexpr,
):
    """One label row of a block of the student's cells."""
    program = tl.program_id(0)
    row = (program // blocks % out_height).to(INT)
    n = (program // blocks // out_height).to(tl.int64)
    tau = tl.full((), tau, tl.float64)
    scale = (1 / tau).to(ACC)
    tau = tau.to(ACC)
    top_s, bottom_s, down_s = rows_of(student, n, row, height, out_height, stride_n, stride_y, ALIGN, ACC)
    top_t, bottom_t, down_t = rows_of(
        teacher, n, row, teacher_height, out_height, teacher_stride_n, teacher_stride_y, ALIGN, ACC
    )
    cell, start, end = cells_of(program % blocks, width, out_width, ALIGN, INT, BLOCK_CELLS)
    losses = tl.zeros([], ACC)
    counts = tl.zeros([], ACC)
    for k in range(0, whole, PHASES):
        more, count = _losses(
            target, pixel_weight, lse_s, lse_t, factor, loss, ignore_index, classes,
            top_s, bottom_s, down_s, width, stride_c, stride_x,
            top_t, bottom_t, down_t, teacher_width, teacher_stride_c, teacher_stride_x,
            out_height, out_width, weight_height, weight_width, n, row, start, end, cell, k, scale, tau,
            ALIGN, BLEND, SAME, ACC, BLOCK_CLASSES, PHASES,
        )  # fmt: skip
        losses += more
        counts += count
    for k in range(whole, tl.max(end - start).to(tl.int32)):
        more, count = _losses(
            target, pixel_weight, lse_s, lse_t, factor, loss, ignore_index, classes,
            top_s, bottom_s, down_s, width, stride_c, stride_x,
            top_t, bottom_t, down_t, teacher_width, teacher_stride_c, teacher_stride_x,
            out_height, out_width, weight_height, weight_width, n, row, start, end, cell, k, scale, tau,
            ALIGN, BLEND, SAME, ACC, BLOCK_CLASSES, 1,
        )  # fmt: skip
        losses += more
        counts += count
    tl.store(part + program, losses)
    tl.store(part + tl.num_programs(0) + program, counts)


@triton.jit
def _shares(
    target, lse_s, lse_t, factor, ignore_index, classes,
    top_s, bottom_s, height, width, stride_c, stride_x,
    teacher, teacher_height, teacher_width, teacher_stride_c, teacher_stride_y, teacher_stride_x,
    out_height, out_width, sample, y, c, start, end, cell, k, inv_tau, tau,
    ALIGN: tl.constexpr, BLEND: tl.constexpr, SAME: tl.constexpr, ACC: tl.constexpr, PHASES: tl.constexpr,
):  # fmt: skip
    """What PHASES phases of a row of cells give to the cells' four corners: factor * tau * (p_s - p_t), spread."""
    x, inside, weight = phase(start, end, cell, k, width, out_width, ALIGN, PHASES, ACC)
    to_top = tl.zeros_like(c[:, None, None].to(ACC) + weight[None, :, :])
    to_bottom = to_top
    for row in tl.range(
        first_output(y, height, out_height, ALIGN), first_output(y + 1, height, out_height, ALIGN), loop_unroll_factor=1
    ):
        offset = (sample * out_height + row) * out_width
        _, counted = counted_labels(target, None, offset, x, inside, ignore_index, classes)
        down = right_weight(row, y, height, out_height, ALIGN, ACC)
        # The sample's offset is in the pointer already.
        top_t, bottom_t, down_t = rows_of(teacher, 0, row, teacher_height, out_height, 0, teacher_stride_y, ALIGN, ACC)
        s = _values(
            top_s, bottom_s, down, c, classes, cell, x, weight, inside, width, out_width, stride_c, stride_x, inv_tau,
            ALIGN, BLEND, True, ACC,
        )  # fmt: skip
        t = _values(
            top_t, bottom_t, down_t, c, classes, cell, x, weight, inside, teacher_width, out_width, teacher_stride_c,
            teacher_stride_x, inv_tau, ALIGN, BLEND, SAME, ACC,
        )  # fmt: skip
        p_s = tl.exp(s - tl.load(lse_s + offset + x, mask=counted, other=0)[None, :, :])
        p_t = tl.exp(t - tl.load(lse_t + offset + x, mask=counted, other=0)[None, :, :])
        d = tl.where(counted[None, :, :], p_s - p_t, 0)
        scale = tl.zeros_like(weight) + tau
        if factor is not None:
            scale *= tl.load(factor + offset + x, mask=counted, other=0)
        to_top += d * (scale * (1 - down))[None, :, :]
        to_bottom += d * (scale * down)[None, :, :]
    return spread(to_top, to_bottom, weight)


@triton.jit
def _gradient(
    student,  # map (N, C, h, w), any float dtype
    teacher,  # map (N, C, teacher_height, teacher_width), any float dtype
    target,  # (N, H, W) uint8, int32 or int64, or None
    lse_s,  # (N, H, W) ACC
    lse_t,  # (N, H, W) ACC
    factor,  # (N, H, W) ACC, or None
    out,  # as in resize._join
    out_right,
    spill,
    tau: tl.float64,
    ignore_index,
    classes,
    height,
    width,
    out_height,
    out_width,
    teacher_height,
    teacher_width,
    stride_n,
    stride_c,
    stride_y,
    stride_x,
    teacher_stride_n,
    teacher_stride_c,
    teacher_stride_y,
    teacher_stride_x,
    blocks,
    whole,
    band,
    bands,
    SAME: tl.constexpr,
    ALIGN: tl.constexpr,
    BLEND: tl.constexpr,
    INT: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_CLASSES: tl.constexpr,
    BLOCK_CELLS: tl.constexpr,
    PHASES: tl.constexpr,
):
    """A band of rows of a block of the student's cells, some classes."""
    program = tl.program_id(0)
    which = program // blocks % bands
    sample = (program // blocks // bands).to(tl.int64)
    c = tl.program_id(1).to(tl.int64) * BLOCK_CLASSES + tl.arange(0, BLOCK_CLASSES)
    cell, start, end = cells_of(program % blocks, width, out_width, ALIGN, INT, BLOCK_CELLS)
    most = tl.max(end - start).to(tl.int32)
    inside = (c < classes)[:, None] & (cell < width)[None, :]
    student += sample * stride_n
    teacher += sample * teacher_stride_n
    offset = sample * stride_n + c[:, None] * stride_c + cell.to(tl.int64)[None, :] * stride_x
    tau = tl.full((), tau, tl.float64)
    inv_tau = (1 / tau).to(ACC)
    tau = tau.to(ACC)
    carry_left = tl.zeros([BLOCK_CLASSES, BLOCK_CELLS], ACC)
    carry_right = tl.zeros([BLOCK_CLASSES, BLOCK_CELLS], ACC)
    for y in range(which * band, tl.minimum((which + 1) * band, height)):
        y = tl.cast(y, INT)
        at = y.to(tl.int64) * stride_y
        top_s = student + at
        bottom_s = student + tl.minimum(y + 1, height - 1).to(tl.int64) * stride_y
        left, right = carry_left, carry_right
        carry_left = tl.zeros([BLOCK_CLASSES, BLOCK_CELLS], ACC)
        carry_right = tl.zeros([BLOCK_CLASSES, BLOCK_CELLS], ACC)
        for k in range(0, whole, PHASES):
            top_left, top_right, bottom_left, bottom_right = _shares(
                target, lse_s, lse_t, factor, ignore_index, classes,
                top_s, bottom_s, height, width, stride_c, stride_x,
                teacher, teacher_height, teacher_width, teacher_stride_c, teacher_stride_y, teacher_stride_x,
                out_height, out_width, sample, y, c, start, end, cell, k, inv_tau, tau,
                ALIGN, BLEND, SAME, ACC, PHASES,
            )  # fmt: skip
            left += top_left
            right += top_right
            carry_left += bottom_left
            carry_right += bottom_right
        for k in range(whole, most):
            top_left, top_right, bottom_left, bottom_right = _shares(
                target, lse_s, lse_t, factor, ignore_index, classes,
                top_s, bottom_s, height, width, stride_c, stride_x,
                teacher, teacher_height, teacher_width, teacher_stride_c, teacher_stride_y, teacher_stride_x,
                out_height, out_width, sample, y, c, start, end, cell, k, inv_tau, tau,
                ALIGN, BLEND, SAME, ACC, 1,
            )  # fmt: skip
            left += top_left
            right += top_right
            carry_left += bottom_left
            carry_right += bottom_right
        tl.store(out + offset + at, left, mask=inside)
        tl.store(out_right + offset + at, right, mask=inside)
    if spill is not None:
        plane = tl.cast(classes, tl.int64) * width
        below = spill + (sample * bands + which) * 2 * plane + c[:, None] * width + cell[None, :]
        tl.store(below, carry_left, mask=inside)
        tl.store(below + plane, carry_right, mask=inside)


def _run(
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None,
    pixel_weight: Tensor | None,
    size: tuple[int, int],
    temperature: float,
    ignore_index: int,
    align_corners: bool,
    per_pixel: bool,
    with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The loss (per pixel or summed), the count, and the gradient of the summed loss."""
    n, c, _, _ = student.shape
    acc, ACC = accumulator(student)
    weight_size = (1, 1) if pixel_weight is None else pixel_weight.shape[1:]
    # The larger of each side bounds all taps.
    other = tuple(max(a, b) for a, b in zip(weight_size, teacher.shape[2:], strict=True))
    cut = plan(student, size, align_corners, other, sides=2)
    strides = (*cut.strides, *plan(teacher, size, align_corners).strides)
    constants = {"SAME": student.shape[3] == teacher.shape[3], "ACC": ACC, **cut.constants}

    def map_of(wanted: bool) -> Tensor | None:
        return student.new_empty((n, *size), dtype=acc) if wanted else None

    loss = map_of(per_pixel)
    lse_s, lse_t = map_of(with_gradient), map_of(with_gradient)
    factor = map_of(with_gradient and pixel_weight is not None)
    programs = n * size[0] * cut.blocks
    part = student.new_empty((2, programs), dtype=acc)
    launch(
        _forward, (programs,), student, student, teacher, target, pixel_weight, lse_s, lse_t, factor, loss, part,
        temperature, ignore_index, c, *cut.size, *teacher.shape[2:], *weight_size, *strides, cut.blocks, cut.whole,
        **constants,
    )  # fmt: skip
    summed, count = total(part)
    if not with_gradient:
        return summed if loss is None else loss, count, None
    to = shares(student, cut)
    launch(
        _gradient, (n * to.bands * cut.blocks, to.class_blocks), student, student, teacher, target, lse_s, lse_t, factor,
        to.out, to.right, to.spill, temperature, ignore_index, c, *cut.size, *teacher.shape[2:], *strides, cut.blocks,
        cut.whole, to.band, to.bands, **constants,
    )  # fmt: skip
    return summed, count, join(to, cut)


def forward(
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None,
    pixel_weight: Tensor | None,
    height: int,
    width: int,
    temperature: float,
    ignore_index: int,
    align_corners: bool,
    per_pixel: bool,
) -> tuple[Tensor, Tensor]:
    """The loss per pixel (N, H, W) or summed (0-d), and the number of pixels that count.

    Args:
        student, teacher: (N, C, h, w), (N, C, h', w'), each NCHW-contiguous or channels_last.
        target: (N, H, W) or None. pixel_weight: (N, h'', w'') fp32 (fp64) or None. All contiguous.
    """
    options = ((height, width), temperature, ignore_index, align_corners, per_pixel, False)
    loss, count, _ = _run(student, teacher, target, pixel_weight, *options)
    return loss, count


def gradient(
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None,
    pixel_weight: Tensor | None,
    height: int,
    width: int,
    temperature: float,
    ignore_index: int,
    align_corners: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The summed loss, the count, and the gradient of the summed loss in fp32 (fp64), in the student's layout."""
    options = ((height, width), temperature, ignore_index, align_corners, False, True)
    return _run(student, teacher, target, pixel_weight, *options)

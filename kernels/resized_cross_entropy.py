"""Cross-entropy at label resolution: loss[p] = weight * -log softmax(bilinear(logits)[p])[y]; docs/full-resolution.md.

The forward reads the logits and the labels and keeps the log-sum-exp of each label pixel: 4 bytes (4 more with a pixel
weight). The gradient needs no softmax then: its programs own cells and a few classes, read the logits, the labels and
that number, and write the gradient at logit size. Each exponential is taken twice, as in any implementation that keeps
nothing of N*C*H*W elements.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from .resize import (
    Plan,
    cells_of,
    corners,
    counted_labels,
    first_output,
    interpolate,
    join,
    of_label,
    phase,
    pixel_weights,
    plan,
    right_weight,
    rows_of,
    shares,
    softmax,
    spread,
    total,
)
from .tiles import accumulator, launch


@triton.jit
def _losses(
    logits, target, class_weight, pixel_weight, mask, lse, factor, loss, ignore_index, classes,
    height, width, out_height, out_width, weight_height, weight_width, stride_c, stride_x,
    sample, row, top, bottom, down, start, end, cell, k,
    ALIGN: tl.constexpr, BLEND: tl.constexpr, ACC: tl.constexpr, BLOCK_CLASSES: tl.constexpr, PHASES: tl.constexpr,
):  # fmt: skip
    """The loss of PHASES phases of a row of cells, stored, and the sums of the losses and of the class weights."""
    x, inside, weight = phase(start, end, cell, k, width, out_width, ALIGN, PHASES, ACC)
    offset = (sample * out_height + row) * out_width
    label, counted = counted_labels(target, mask, offset, x, inside, ignore_index, classes)
    peak, sums = softmax(
        top, bottom, down, classes, cell, weight, width, stride_c, stride_x, 1.0, BLEND, BLOCK_CLASSES, ACC
    )
    own = of_label(
        top, bottom, down, label, counted, cell, weight, width, stride_c, stride_x, 1.0, BLEND, ACC
    )  # fmt: skip
    share = counted.to(ACC)
    if class_weight is not None:
        share = tl.load(class_weight + label, mask=counted, other=0)
    scale = share
    if pixel_weight is not None:
        scale *= pixel_weights(
            pixel_weight, sample, row, x, counted, weight_height, weight_width, out_height, out_width, ALIGN, ACC
        )
    if factor is not None:
        tl.store(factor + offset + x, scale, mask=inside)
    log_sum = tl.log(sums)
    value = tl.where(counted, scale * ((peak - own) + log_sum), 0)
    if loss is not None:
        tl.store(loss + offset + x, value, mask=inside)
    if lse is not None:
        tl.store(lse + offset + x, peak + log_sum, mask=inside)
    return tl.sum(value), tl.sum(share)


@triton.jit
def _forward(
    logits,  # map (N, C, h, w), any float dtype
    target,  # (N, H, W) uint8, int32 or int64
    class_weight,  # (C,) ACC, or None
    pixel_weight,  # (N, weight_height, weight_width) ACC, or None
    mask,  # (N, H, W) bool, or None
    lse,  # (N, H, W) ACC, or None
    factor,  # (N, H, W) ACC, or None: class weight times pixel weight
    loss,  # (N, H, W) ACC, or None
    part,  # (2, programs) ACC: losses, class weights
    ignore_index,
    classes,
    height,
    width,
    out_height,
    out_width,
    weight_height,
    weight_width,
    stride_n,
    stride_c,
    stride_y,
    stride_x,
    blocks,
    whole,
    ALIGN: tl.constexpr,
    BLEND: tl.constexpr,
    INT: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_CLASSES: tl.constexpr,
    BLOCK_CELLS: tl.constexpr,
    PHASES: tl.constexpr,
):
    """One label row of a block of cells."""
    program = tl.program_id(0)
    row = (program // blocks % out_height).to(INT)
    sample = (program // blocks // out_height).to(tl.int64)
    top, bottom, down = rows_of(logits, sample, row, height, out_height, stride_n, stride_y, ALIGN, ACC)
    cell, start, end = cells_of(program % blocks, width, out_width, ALIGN, INT, BLOCK_CELLS)
    losses = tl.zeros([], ACC)
    counts = tl.zeros([], ACC)
    for k in range(0, whole, PHASES):
        more, count = _losses(
            logits, target, class_weight, pixel_weight, mask, lse, factor, loss, ignore_index, classes,
            height, width, out_height, out_width, weight_height, weight_width, stride_c, stride_x,
            sample, row, top, bottom, down, start, end, cell, k, ALIGN, BLEND, ACC, BLOCK_CLASSES, PHASES,
        )  # fmt: skip
        losses += more
        counts += count
    for k in range(whole, tl.max(end - start).to(tl.int32)):
        more, count = _losses(
            logits, target, class_weight, pixel_weight, mask, lse, factor, loss, ignore_index, classes,
            height, width, out_height, out_width, weight_height, weight_width, stride_c, stride_x,
            sample, row, top, bottom, down, start, end, cell, k, ALIGN, BLEND, ACC, BLOCK_CLASSES, 1,
        )  # fmt: skip
        losses += more
        counts += count
    tl.store(part + program, losses)
    tl.store(part + tl.num_programs(0) + program, counts)


@triton.jit
def _shares(
    target, class_weight, mask, lse, factor, ignore_index, classes,
    height, width, out_height, out_width, stride_c, stride_x,
    sample, y, top, bottom, c, start, end, cell, k,
    ALIGN: tl.constexpr, BLEND: tl.constexpr, ACC: tl.constexpr, PHASES: tl.constexpr,
):  # fmt: skip
    """What PHASES phases of a row of cells give to the cells' four corners: factor * (p - onehot), spread."""
    x, inside, weight = phase(start, end, cell, k, width, out_width, ALIGN, PHASES, ACC)
    to_top = tl.zeros_like(c[:, None, None].to(ACC) + weight[None, :, :])
    to_bottom = to_top
    for row in range(first_output(y, height, out_height, ALIGN), first_output(y + 1, height, out_height, ALIGN)):
        offset = (sample * out_height + row) * out_width
        label, counted = counted_labels(target, mask, offset, x, inside, ignore_index, classes)
        down = right_weight(row, y, height, out_height, ALIGN, ACC)
        left, right = corners(top, bottom, down, c, classes, cell, width, stride_c, stride_x, 1.0, ACC)
        log_sum = tl.load(lse + offset + x, mask=counted, other=0)
        if factor is not None:
            scale = tl.load(factor + offset + x, mask=counted, other=0)
        elif class_weight is not None:
            scale = tl.load(class_weight + label, mask=counted, other=0)
        else:
            scale = counted.to(ACC)
        p = tl.exp(interpolate(left, right, weight, BLEND) - log_sum[None, :, :])
        p = tl.where(counted[None, :, :], p - (c.to(tl.int32)[:, None, None] == label[None, :, :]).to(ACC), 0)
        to_top += p * (scale * (1 - down))[None, :, :]
        to_bottom += p * (scale * down)[None, :, :]
    return spread(to_top, to_bottom, weight)


@triton.jit
def _gradient(
    logits,  # map (N, C, h, w), any float dtype
    target,  # (N, H, W) uint8, int32 or int64
    class_weight,  # (C,) ACC, or None
    mask,  # (N, H, W) bool, or None
    lse,  # (N, H, W) ACC
    factor,  # (N, H, W) ACC, or None
    out,  # as in resize._join
    out_right,
    spill,
    ignore_index,
    classes,
    height,
    width,
    out_height,
    out_width,
    stride_n,
    stride_c,
    stride_y,
    stride_x,
    blocks,
    whole,
    band,
    bands,
    ALIGN: tl.constexpr,
    BLEND: tl.constexpr,
    INT: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_CLASSES: tl.constexpr,
    BLOCK_CELLS: tl.constexpr,
    PHASES: tl.constexpr,
):
    """A band of rows of a block of cells, some classes."""
    program = tl.program_id(0)
    which = program // blocks % bands
    sample = (program // blocks // bands).to(tl.int64)
    c = tl.program_id(1).to(tl.int64) * BLOCK_CLASSES + tl.arange(0, BLOCK_CLASSES)
    cell, start, end = cells_of(program % blocks, width, out_width, ALIGN, INT, BLOCK_CELLS)
    most = tl.max(end - start).to(tl.int32)
    inside = (c < classes)[:, None] & (cell < width)[None, :]
    logits += sample * stride_n
    offset = sample * stride_n + c[:, None] * stride_c + cell.to(tl.int64)[None, :] * stride_x
    carry_left = tl.zeros([BLOCK_CLASSES, BLOCK_CELLS], ACC)
    carry_right = tl.zeros([BLOCK_CLASSES, BLOCK_CELLS], ACC)
    for y in range(which * band, tl.minimum((which + 1) * band, height)):
        y = tl.cast(y, INT)
        at = y.to(tl.int64) * stride_y
        top = logits + at
        bottom = logits + tl.minimum(y + 1, height - 1).to(tl.int64) * stride_y
        left, right = carry_left, carry_right
        carry_left = tl.zeros([BLOCK_CLASSES, BLOCK_CELLS], ACC)
        carry_right = tl.zeros([BLOCK_CLASSES, BLOCK_CELLS], ACC)
        for k in range(0, whole, PHASES):
            top_left, top_right, bottom_left, bottom_right = _shares(
                target, class_weight, mask, lse, factor, ignore_index, classes,
                height, width, out_height, out_width, stride_c, stride_x,
                sample, y, top, bottom, c, start, end, cell, k, ALIGN, BLEND, ACC, PHASES,
            )  # fmt: skip
            left += top_left
            right += top_right
            carry_left += bottom_left
            carry_right += bottom_right
        for k in range(whole, most):
            top_left, top_right, bottom_left, bottom_right = _shares(
                target, class_weight, mask, lse, factor, ignore_index, classes,
                height, width, out_height, out_width, stride_c, stride_x,
                sample, y, top, bottom, c, start, end, cell, k, ALIGN, BLEND, ACC, 1,
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


def _size(weight: Tensor | None) -> Sequence[int]:
    return (1, 1) if weight is None else weight.shape[1:]


def _losses_of(
    cut: Plan,
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    pixel_weight: Tensor | None,
    mask: Tensor | None,
    ignore_index: int,
    per_pixel: bool,
    for_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """The loss (per pixel or summed), the count, and per label pixel what the gradient needs: lse and factor."""
    n, c, _, _ = logits.shape
    acc, ACC = accumulator(logits)
    programs = n * target.shape[1] * cut.blocks
    part = logits.new_empty((2, programs), dtype=acc)
    lse = target.new_empty(target.shape, dtype=acc) if for_gradient else None
    factor = target.new_empty(target.shape, dtype=acc) if for_gradient and pixel_weight is not None else None
    loss = target.new_empty(target.shape, dtype=acc) if per_pixel else None
    launch(
        _forward, (programs,), logits, logits, target, class_weight, pixel_weight, mask, lse, factor, loss, part,
        ignore_index, c, *cut.size, *_size(pixel_weight), *cut.strides, cut.blocks, cut.whole, ACC=ACC, **cut.constants,
    )  # fmt: skip
    summed, count = total(part)
    return summed if loss is None else loss, count, lse, factor


def forward(
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    pixel_weight: Tensor | None,
    mask: Tensor | None,
    ignore_index: int,
    align_corners: bool,
    per_pixel: bool,
) -> tuple[Tensor, Tensor]:
    """The loss per pixel (N, H, W) or summed (0-d), and the summed class weights of the counted pixels.

    Args:
        logits: (N, C, h, w), NCHW-contiguous or channels_last.
        target: (N, H, W). class_weight: (C,) or None. pixel_weight: (N, h', w') or None; both fp32 (fp64).
        mask: bool (N, H, W) or None. All contiguous.
    """
    cut = plan(logits, target.shape[1:], align_corners, _size(pixel_weight))
    return _losses_of(cut, logits, target, class_weight, pixel_weight, mask, ignore_index, per_pixel, False)[:2]


def gradient(
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    pixel_weight: Tensor | None,
    mask: Tensor | None,
    ignore_index: int,
    align_corners: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The summed loss, the count, and the gradient of the summed loss in fp32 (fp64), in the layout of the logits."""
    cut = plan(logits, target.shape[1:], align_corners, _size(pixel_weight))
    loss, count, lse, factor = _losses_of(
        cut, logits, target, class_weight, pixel_weight, mask, ignore_index, False, True
    )
    to = shares(logits, cut)
    n, c, _, _ = logits.shape
    launch(
        _gradient, (n * to.bands * cut.blocks, to.class_blocks), logits, logits, target, class_weight, mask, lse, factor,
        to.out, to.right, to.spill, ignore_index, c, *cut.size, *cut.strides, cut.blocks, cut.whole, to.band, to.bands,
        ACC=accumulator(logits)[1], **cut.constants,
    )  # fmt: skip
    return loss, count, join(to, cut)

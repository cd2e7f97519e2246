"""Bilinear interpolation as the kernels at label resolution see it: by cells (docs/full-resolution.md).

A cell is the space between a logit and its neighbour to the right. The label pixels of a row that fall into one cell are
its phases. A tile is (classes, cells, phases): two logits a class and cell, loaded once, give all its phases, and label
pixels that are neighbours in memory are neighbours in the tile. The softmax reduces the first axis, which a thread has to
itself; the transpose of the interpolation reduces the last one, once a row of cells. No atomics, no label-resolution
logits.

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

from .softmax import START, grow
from .tiles import accumulator, launch

# A tile is CLASSES x LANES label pixels, a pixel a thread: the gradient kernel holds three such tiles and what they come
# down to at the cells, some 120 registers, so that 16 warps fit an SM. Phases come PHASES at a time, so that what is
# loaded and blended for a cell serves many of them.
# Half the classes where there are two sides.
CLASSES = 8
LANES = 128
PHASES = 8
# The gradient kernel takes bands of up to BAND rows of cells, which halves what it writes beside the gradient, as long as
# PROGRAMS are left, some three times what one big GPU holds at a time.
BAND = 4
PROGRAMS = 2048


class Plan(NamedTuple):
    """How one map (N, C, h, w) is cut for labels (N, H, W)."""

    classes: int
    size: tuple[int, int, int, int]  # h, w, H, W
    strides: tuple[int, int, int, int]  # of n, c, y, x, in elements
    blocks: int  # of cells in a row
    whole: int  # phases of a cell taken PHASES at a time; what some cells have beyond them comes one by one
    constants: dict[str, Any]  # ALIGN, BLEND, INT, BLOCK_CLASSES, BLOCK_CELLS, PHASES


def plan(
    logits: Tensor, size: Sequence[int], align_corners: bool, other: Sequence[int] = (1, 1), sides: int = 1
) -> Plan:
    """The cut of dense ``logits``, NCHW-contiguous or channels_last.

    Args:
        other: size of a further map that is resized too.
        sides: how many maps' logits a tile holds.
    """
    lanes = LANES // 2 if logits.dtype == torch.float64 else LANES
    (height, width), (h, w) = size, other
    return _plan(logits.shape, logits.is_contiguous(), (height, width), align_corners, (h, w), lanes, CLASSES // sides)


@lru_cache(maxsize=1024)
def _plan(
    shape: tuple[int, ...],
    nchw: bool,
    size: tuple[int, int],
    align_corners: bool,
    other: tuple[int, int],
    lanes: int,
    classes: int,
) -> Plan:
    _, c, h, w = shape
    strides = (c * h * w, h * w, w, 1) if nchw else (c * h * w, 1, w * c, c)
    ratio = max(1, size[1] // w)
    phases = min((p for p in (8, 4, 2, 1) if p <= min(ratio, PHASES)), key=lambda p: ratio // p + ratio % p)
    # Four sums a cell are held too: where a cell is one pixel there are as many of them as there are pixels.
    cells = min(triton.next_power_of_2(w), lanes // max(phases, 2))
    constants = {
        "ALIGN": align_corners,
        "BLEND": size[1] != w,
        # What taps are computed in: 32 bits where their products fit.
        "INT": tl.int32 if 4 * (max(size) + 1) * (max(h, w, *other) + 1) < 2**31 else tl.int64,
        "BLOCK_CLASSES": min(triton.next_power_of_2(c), classes),
        "BLOCK_CELLS": cells,
        "PHASES": phases,
    }
    return Plan(c, (h, w, *size), strides, triton.cdiv(w, cells), ratio // phases * phases, constants)


@triton.jit
def first_output(cell, size_in, size_out, ALIGN: tl.constexpr):
    """The first output that lies in ``cell`` or a later one; ``size_out`` past the last cell."""
    if ALIGN:
        x = tl.cdiv(cell * tl.maximum(size_out - 1, 1), tl.maximum(size_in - 1, 1))
    else:
        x = tl.cdiv(tl.maximum((2 * cell + 1) * size_out - size_in, 0), 2 * size_in)
    x = tl.where(cell <= 0, 0, tl.minimum(x, size_out))
    return tl.where(cell >= size_in, size_out, x)


@triton.jit
def right_weight(x, left, size_in, size_out, ALIGN: tl.constexpr, ACC: tl.constexpr):
    """The weight of the neighbour to the right of output x, whose left neighbour is ``left``, which has the rest."""
    if ALIGN:
        under = tl.maximum(size_out - 1, 1)
        over = x * (size_in - 1) - left * under
    else:
        under = 2 * size_out
        over = (2 * x + 1) * size_in - size_out - left * under
    weight = tl.maximum(over, 0).to(ACC) / tl.cast(under, ACC)
    return tl.where(left >= size_in - 1, 0, weight).to(ACC)


@triton.jit
def left_of(x, size_in, size_out, ALIGN: tl.constexpr):
    """The left neighbour of output x, which is its cell."""
    if ALIGN:
        left = x * (size_in - 1) // tl.maximum(size_out - 1, 1)
    else:
        left = tl.maximum((2 * x + 1) * size_in - size_out, 0) // (2 * size_out)
    return tl.minimum(left, size_in - 1)


@triton.jit
def rows_of(logits, sample, row, height, out_height, stride_n, stride_y, ALIGN: tl.constexpr, ACC: tl.constexpr):
    """Pointers to the two rows of logits that a label row lies between, and the weight of the second."""
    y = left_of(row, height, out_height, ALIGN)
    top = logits + sample * stride_n + y.to(tl.int64) * stride_y
    bottom = logits + sample * stride_n + tl.minimum(y + 1, height - 1).to(tl.int64) * stride_y
    return top, bottom, right_weight(row, y, height, out_height, ALIGN, ACC)


@triton.jit
def cells_of(block, width, out_width, ALIGN: tl.constexpr, INT: tl.constexpr, BLOCK_CELLS: tl.constexpr):
    """A block's cells, their first output and the one past their last; cells beyond the row are empty."""
    cell = block.to(INT) * BLOCK_CELLS + tl.arange(0, BLOCK_CELLS)
    start = first_output(cell, width, out_width, ALIGN)
    return cell, start, first_output(cell + 1, width, out_width, ALIGN)


@triton.jit
def phase(start, end, cell, k, width, out_width, ALIGN: tl.constexpr, PHASES: tl.constexpr, ACC: tl.constexpr):
    """Phases k to k + PHASES of cells: the label columns (cells, phases), which exist, the right neighbour's weight."""
    x = start[:, None] + k + tl.arange(0, PHASES)[None, :]
    return x, x < end[:, None], right_weight(x, cell[:, None], width, out_width, ALIGN, ACC)


@triton.jit
def blend(top, bottom, down, offset, inside, scale, ACC: tl.constexpr):
    """Elements ``offset`` of two rows of logits, blended by the weight ``down`` of the second, times ``scale``; 0 where
    not ``inside``. A row of weight 0 is not looked at: 0 * inf would be NaN."""
    above = tl.load(top + offset, mask=inside, other=0).to(ACC)
    below = tl.load(bottom + offset, mask=inside, other=0).to(ACC)
    return tl.where(down == 0, above, (1 - down) * above + down * below) * scale


@triton.jit
def corners(
    top,  # a row of logits: pointer to class 0 of the first
    bottom,  # the row below it
    down,  # its weight
    c,  # (classes,)
    classes,
    cell,  # (cells,)
    width,
    stride_c,
    stride_x,
    scale,
    ACC: tl.constexpr,
):
    """The logits to the left and to the right of each cell, (classes, cells), blended from two rows, times ``scale``.

    Finite, so that a neighbour of weight 0 has no say: -inf, and a class beyond the last, are so low that their
    exponential is 0 whatever they are blended with. NaN and inf stay.
    """
    low: tl.constexpr = -1e300 if tl.float64 == ACC else -1e37
    inside = (c < classes)[:, None] & (cell < width)[None, :]
    cell = cell.to(tl.int64)
    offset = c[:, None] * stride_c
    left = blend(top, bottom, down, offset + cell[None, :] * stride_x, inside, scale, ACC)
    right = blend(top, bottom, down, offset + tl.minimum(cell + 1, width - 1)[None, :] * stride_x, inside, scale, ACC)
    left = tl.where((c < classes)[:, None], tl.maximum(left, low, propagate_nan=tl.PropagateNan.ALL), low)
    right = tl.where((c < classes)[:, None], tl.maximum(right, low, propagate_nan=tl.PropagateNan.ALL), low)
    return left, right


@triton.jit
def interpolate(left, right, weight, BLEND: tl.constexpr):
    """(classes, cells, phases) from the cells' two logits (classes, cells) and the right one's weight (cells, phases)."""
    if BLEND:
        return left[:, :, None] * (1 - weight)[None, :, :] + right[:, :, None] * weight[None, :, :]
    return left[:, :, None] + tl.zeros_like(weight)[None, :, :]


@triton.jit
def softmax(
    top, bottom, down, classes, cell, weight, width, stride_c, stride_x, scale,
    BLEND: tl.constexpr, BLOCK_CLASSES: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The peak and the sum of exponentials over the classes of interpolated logits, (cells, phases) each."""
    total = tl.zeros_like(weight)
    peak = total + START
    for first in range(0, classes, BLOCK_CLASSES):
        c = first + tl.arange(0, BLOCK_CLASSES).to(tl.int64)
        left, right = corners(top, bottom, down, c, classes, cell, width, stride_c, stride_x, scale, ACC)
        peak, total = grow(interpolate(left, right, weight, BLEND), 1.0, peak, total, 0)
    return peak, total


@triton.jit
def of_label(
    top, bottom, down, label, counted, cell, weight, width, stride_c, stride_x, scale,
    BLEND: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The interpolated logit of each label pixel's own class, (cells, phases); 0 where not ``counted``."""
    offset = label.to(tl.int64) * stride_c
    cell = cell.to(tl.int64)
    value = blend(top, bottom, down, offset + cell[:, None] * stride_x, counted, scale, ACC)
    if BLEND:
        right = offset + tl.minimum(cell + 1, width - 1)[:, None] * stride_x
        beside = blend(top, bottom, down, right, counted, scale, ACC)
        value = tl.where(weight == 0, value, (1 - weight) * value + weight * beside)
    return value


@triton.jit
def counted_labels(
    target,  # (N, H, W) uint8, int32 or int64, or None
    mask,  # (N, H, W) bool, or None
    offset,  # of the row
    x,  # (cells, phases) label columns
    inside,
    ignore_index,
    classes,
):
    """Each pixel's label (0 where there are none), and whether it counts. Labels are compared before they are an offset."""
    label = tl.zeros_like(x)
    counted = inside
    if target is not None:
        given = tl.load(target + offset + x, mask=inside, other=0).to(tl.int64)
        counted = inside & (given != ignore_index) & (given >= 0) & (given < classes)
        label = tl.where(counted, given, 0).to(tl.int32)
    if mask is not None:
        counted = counted & (tl.load(mask + offset + x, mask=inside, other=0) != 0)
    return label, counted


@triton.jit
def pixel_weights(
    weight,  # (N, weight_height, weight_width) ACC
    sample,
    row,  # of the labels, INT
    x,  # (cells, phases) label columns
    counted,
    weight_height,
    weight_width,
    height,
    width,
    ALIGN: tl.constexpr,
    ACC: tl.constexpr,
):
    """A map of any size, resized bilinearly, at each label pixel of a row; 0 where not ``counted``."""
    plane = tl.cast(weight_height, tl.int64) * weight_width
    top, bottom, down = rows_of(weight, sample, row, weight_height, height, plane, weight_width, ALIGN, ACC)
    left = left_of(x, weight_width, width, ALIGN)
    share = right_weight(x, left, weight_width, width, ALIGN, ACC)
    here = blend(top, bottom, down, left, counted, 1.0, ACC)
    there = blend(top, bottom, down, tl.minimum(left + 1, weight_width - 1), counted, 1.0, ACC)
    return tl.where(share == 0, here, (1 - share) * here + share * there)


# ---- the gradient at logit size -------------------------------------------------------------------------------------


@triton.jit
def spread(to_top, to_bottom, weight):
    """What phases (classes, cells, phases) give to the left and the right logit above, and to those below."""
    left, right = (1 - weight)[None, :, :], weight[None, :, :]
    return (
        tl.sum(to_top * left, 2), tl.sum(to_top * right, 2), tl.sum(to_bottom * left, 2), tl.sum(to_bottom * right, 2)
    )  # fmt: skip


@triton.jit
def _join(
    out,  # gradient ACC: holds what each logit got from its own cell
    right,  # like out: what each logit's right neighbour got from the logit's cell
    spill,  # (N, bands, 2, C, w) ACC: the same two from each band's last row of cells for the row below; or None
    classes,
    height,
    width,
    stride_n,
    stride_c,
    stride_y,
    stride_x,
    blocks,
    band,
    bands,
    BLOCK_CLASSES: tl.constexpr,
    BLOCK_CELLS: tl.constexpr,
):
    """Adds the shares of the neighbouring cells, in this order: own cell, cell to the left, and both of the band above."""
    program = tl.program_id(0)
    row = program // blocks
    x = (program % blocks).to(tl.int64) * BLOCK_CELLS + tl.arange(0, BLOCK_CELLS)
    c = tl.program_id(1).to(tl.int64) * BLOCK_CLASSES + tl.arange(0, BLOCK_CLASSES)
    y = row % height
    n = (row // height).to(tl.int64)
    inside = (c < classes)[:, None] & (x < width)[None, :]
    has_left = inside & (x > 0)[None, :]
    offset = n * stride_n + y.to(tl.int64) * stride_y + c[:, None] * stride_c + x[None, :] * stride_x
    value = tl.load(out + offset, mask=inside, other=0)
    value += tl.load(right + offset - stride_x, mask=has_left, other=0)
    if spill is not None:
        begins = (y % band == 0) & (y > 0)
        plane = tl.cast(classes, tl.int64) * width
        above = spill + (n * bands + y // band - 1) * 2 * plane + c[:, None] * width + x[None, :]
        value += tl.load(above, mask=inside & begins, other=0)
        value += tl.load(above + plane - 1, mask=has_left & begins, other=0)
    tl.store(out + offset, value, mask=inside)


class Shares(NamedTuple):
    """Where a gradient kernel writes: the gradient itself, and what :func:`join` adds to it."""

    out: Tensor
    right: Tensor
    spill: Tensor | None
    band: int  # rows of cells a program takes
    bands: int  # of them in a sample
    class_blocks: int


def shares(logits: Tensor, cut: Plan) -> Shares:
    """Fresh memory for the gradient of ``logits``, in its layout, in fp32 (fp64)."""
    n, c, h, w = logits.shape
    class_blocks = triton.cdiv(c, cut.constants["BLOCK_CLASSES"])
    band = max(1, min(BAND, h, n * h * cut.blocks * class_blocks // PROGRAMS))
    bands = triton.cdiv(h, band)
    out = torch.empty_like(logits, dtype=accumulator(logits)[0])
    spill = None if bands == 1 else out.new_empty((n, bands, 2, c, w))
    return Shares(out, torch.empty_like(out), spill, band, bands, class_blocks)


def join(shares: Shares, cut: Plan) -> Tensor:
    """The gradient from its shares."""
    n, c, h, w = shares.out.shape
    blocks = {name: cut.constants[name] for name in ("BLOCK_CLASSES", "BLOCK_CELLS")}
    launch(
        _join, (n * h * cut.blocks, shares.class_blocks), shares.out, shares.out, shares.right, shares.spill, c, h, w,
        *cut.strides, cut.blocks, shares.band, shares.bands, **blocks,
    )  # fmt: skip
    return shares.out


# ---- sums over programs ---------------------------------------------------------------------------------------------

# One program's work: few and wide steps.
TOTAL_BLOCK = 8192
TOTAL_WARPS = 16


@triton.jit
def _total(
    part,  # (2, parts) ACC
    first,  # () ACC
    second,  # () ACC
    parts,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sums both rows in a fixed order, in fp64, by one program."""
    a = tl.zeros([BLOCK], tl.float64)
    b = tl.zeros([BLOCK], tl.float64)
    for start in range(0, parts, BLOCK):
        k = start + tl.arange(0, BLOCK).to(tl.int64)
        a += tl.load(part + k, mask=k < parts, other=0)
        b += tl.load(part + parts + k, mask=k < parts, other=0)
    tl.store(first, tl.sum(a).to(ACC))
    tl.store(second, tl.sum(b).to(ACC))


def total(part: Tensor) -> tuple[Tensor, Tensor]:
    """Both rows of ``part`` (2, parts), summed, 0-d each."""
    first, second = part.new_empty(()), part.new_empty(())
    block = min(TOTAL_BLOCK, triton.next_power_of_2(part.shape[1]))
    launch(
        _total, (1,), part, part, first, second, part.shape[1],
        ACC=accumulator(part)[1], BLOCK=block, num_warps=TOTAL_WARPS if block == TOTAL_BLOCK else 4,
    )  # fmt: skip
    return first, second

"""RDD's maps (docs/rdd.md, docs/full-resolution.md): the teacher's confidence exp(-KL) between its heads, with KD and its
gradient from the same read; the mask of relatively difficult pixels; the exact k-th smallest its threshold may need.

The mask: one kernel a network reads its logits and the labels and writes a confidence a label pixel; one compares. The
k-th smallest: a radix select, 8 bits a round, of which each reads the map once and keeps 256 counts a program. It is at most
the threshold exactly when k confidences are, which the first kernel has counted; then the rounds read nothing. The host
never waits and no branch depends on a value.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .resize import (
    cells_of,
    counted_labels,
    of_label,
    phase,
    plan,
    rows_of,
    softmax,
    total,
)
from .softmax import START, divergence, grow, grow_cross
from .tiles import accumulator, cut, launch, locate

# ---- heads ----------------------------------------------------------------------------------------------------------


@triton.jit
def _heads(
    student,  # map, any float dtype, or None
    main,  # map, any float dtype
    aux,  # map, any float dtype
    confidence,  # (N, h, w) ACC
    gradient,  # map ACC, or None
    part,  # (2, programs) ACC, or None: KD's loss; its second row is not used
    inner,
    length,
    stride_outer,
    stride_inner,
    stride_reduced,
    chunk,
    chunks,
    AUX_MAIN: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
    BLOCK_REDUCED: tl.constexpr,
):
    """A tile of pixels: online softmaxes over the classes; the gradient reads the student and the main head again, from
    cache."""
    outer, i, _ = locate(inner, chunks, BLOCK_INNER)
    inside = i < inner
    base = outer * stride_outer + i * stride_inner
    total_m = tl.zeros([BLOCK_INNER], ACC)
    total_a = tl.zeros([BLOCK_INNER], ACC)
    total_s = tl.zeros([BLOCK_INNER], ACC)
    heads = tl.zeros([BLOCK_INNER], ACC)
    cross = tl.zeros([BLOCK_INNER], ACC)
    peak_m = total_m + START
    peak_a = total_m + START
    peak_s = total_m + START
    for start in range(0, length, BLOCK_REDUCED):
        r = start + tl.arange(0, BLOCK_REDUCED).to(tl.int64)
        mask = inside[:, None] & (r < length)[None, :]
        offset = base[:, None] + r[None, :] * stride_reduced
        m = tl.load(main + offset, mask=mask, other=-float("inf")).to(ACC)
        a = tl.load(aux + offset, mask=mask, other=-float("inf")).to(ACC)
        higher_m, more_m = grow(m, 1.0, peak_m, total_m, 1)
        higher_a, more_a = grow(a, 1.0, peak_a, total_a, 1)
        if AUX_MAIN:
            heads = grow_cross(m, a, 1.0, heads, total_a, peak_m, peak_a, higher_m, higher_a, 1)
        else:
            heads = grow_cross(a, m, 1.0, heads, total_m, peak_a, peak_m, higher_a, higher_m, 1)
        if student is not None:
            s = tl.load(student + offset, mask=mask, other=-float("inf")).to(ACC)
            higher_s, total_s = grow(s, 1.0, peak_s, total_s, 1)
            cross = grow_cross(s, m, 1.0, cross, total_m, peak_s, peak_m, higher_s, higher_m, 1)
            peak_s = higher_s
        peak_m, total_m = higher_m, more_m
        peak_a, total_a = higher_a, more_a
    d = divergence(1.0, total_m, total_a, heads) if AUX_MAIN else divergence(1.0, total_a, total_m, heads)
    tl.store(confidence + outer * inner + i, tl.exp(-tl.maximum(d, 0, propagate_nan=tl.PropagateNan.ALL)), mask=inside)
    if student is not None:
        program = tl.program_id(0)
        loss = tl.where(inside, divergence(1.0, total_s, total_m, cross), 0)
        tl.store(part + program, tl.sum(loss))
        tl.store(part + tl.num_programs(0) + program, tl.zeros([], ACC))
        log_s = tl.log(total_s)
        log_m = tl.log(total_m)
        for start in range(0, length, BLOCK_REDUCED):
            r = start + tl.arange(0, BLOCK_REDUCED).to(tl.int64)
            mask = inside[:, None] & (r < length)[None, :]
            offset = base[:, None] + r[None, :] * stride_reduced
            s = tl.load(student + offset, mask=mask, other=0).to(ACC)
            m = tl.load(main + offset, mask=mask, other=0).to(ACC)
            p_s = tl.exp((s - peak_s[:, None]) - log_s[:, None])
            p_m = tl.exp((m - peak_m[:, None]) - log_m[:, None])
            tl.store(gradient + offset, p_s - p_m, mask=mask)


def _run_heads(
    student: Tensor | None, main: Tensor, aux: Tensor, direction: str
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    n, _, h, w = main.shape
    acc, ACC = accumulator(main)
    tiles = cut(main, "channels", split=False, maps=3)
    confidence = main.new_empty((n, h, w), dtype=acc)
    gradient = part = None
    if student is not None:
        gradient = torch.empty_like(student, dtype=acc)
        part = main.new_empty((2, *tiles.grid), dtype=acc)
    launch(
        _heads, tiles.grid, main, student, main, aux, confidence, gradient, part, *tiles.runtime,
        AUX_MAIN=direction == "aux_main", ACC=ACC, **tiles.blocks,
    )  # fmt: skip
    return None if part is None else total(part)[0], gradient, confidence


def teacher_confidence(main: Tensor, aux: Tensor, direction: str) -> Tensor:
    """exp(-KL) between the heads, (N, h, w) fp32 (fp64); see ``fastkd.ops.rdd``.

    Args:
        main, aux: (N, C, h, w) of one layout, NCHW-contiguous or channels_last.
    """
    return _run_heads(None, main, aux, direction)[2]


def kd_with_confidence(
    student: Tensor, teacher: Tensor, aux: Tensor, direction: str
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """KD's summed loss, its gradient in fp32 (fp64), and the map above; all three maps of one layout."""
    return _run_heads(student, teacher, aux, direction)


# ---- difficulty -----------------------------------------------------------------------------------------------------


@triton.jit
def _confidences(
    target, confidence, ignore_index, classes, out_height, out_width, width, stride_c, stride_x,
    top, bottom, down, sample, row, start, end, cell, k, threshold,
    BY_LABEL: tl.constexpr, ALIGN: tl.constexpr, BLEND: tl.constexpr, ACC: tl.constexpr, BLOCK_CLASSES: tl.constexpr,
    PHASES: tl.constexpr,
):  # fmt: skip
    """The confidence of PHASES phases of a row of cells, stored, and how many are at most the threshold."""
    x, inside, weight = phase(start, end, cell, k, width, out_width, ALIGN, PHASES, ACC)
    offset = (sample * out_height + row) * out_width
    label, counted = counted_labels(target, None, offset, x, inside, ignore_index, classes)
    peak, sums = softmax(
        top, bottom, down, classes, cell, weight, width, stride_c, stride_x, 1.0, BLEND, BLOCK_CLASSES, ACC
    )
    if BY_LABEL:
        own = of_label(
            top, bottom, down, label, counted, cell, weight, width, stride_c, stride_x, 1.0, BLEND, ACC
        )  # fmt: skip
        p = tl.exp(own - peak) / sums
    else:
        p = 1 / sums
    p = tl.where(counted, p, 1)
    tl.store(confidence + offset + x, p, mask=inside)
    return tl.sum((inside & (p <= threshold)).to(tl.int32))


@triton.jit
def _confidence(
    logits,  # map (N, C, h, w), any float dtype
    target,  # (N, H, W) uint8, int32 or int64
    confidence,  # (N, H, W) ACC
    part,  # (programs,) int32: hard pixels
    threshold: tl.float64,
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
    BY_LABEL: tl.constexpr,
    ALIGN: tl.constexpr,
    BLEND: tl.constexpr,
    INT: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_CLASSES: tl.constexpr,
    BLOCK_CELLS: tl.constexpr,
    PHASES: tl.constexpr,
):
    """One label row of a block of cells of one network: the probability of the largest or of the labelled class."""
    program = tl.program_id(0)
    row = (program // blocks % out_height).to(INT)
    sample = (program // blocks // out_height).to(tl.int64)
    threshold = tl.full((), threshold, tl.float64).to(ACC)
    top, bottom, down = rows_of(logits, sample, row, height, out_height, stride_n, stride_y, ALIGN, ACC)
    cell, start, end = cells_of(program % blocks, width, out_width, ALIGN, INT, BLOCK_CELLS)
    hard = tl.zeros([], tl.int32)
    for k in range(0, whole, PHASES):
        hard += _confidences(
            target, confidence, ignore_index, classes, out_height, out_width, width, stride_c, stride_x,
            top, bottom, down, sample, row, start, end, cell, k, threshold,
            BY_LABEL, ALIGN, BLEND, ACC, BLOCK_CLASSES, PHASES,
        )  # fmt: skip
    for k in range(whole, tl.max(end - start).to(tl.int32)):
        hard += _confidences(
            target, confidence, ignore_index, classes, out_height, out_width, width, stride_c, stride_x,
            top, bottom, down, sample, row, start, end, cell, k, threshold,
            BY_LABEL, ALIGN, BLEND, ACC, BLOCK_CLASSES, 1,
        )  # fmt: skip
    tl.store(part + program, hard)


@triton.jit
def _select(
    student,  # (pixels,) ACC: confidences
    teacher,  # (pixels,) ACC
    limits,  # (2,) ACC: a confidence at most this is hard
    target,  # (pixels,) uint8, int32 or int64
    mask,  # (pixels,) uint8
    part,  # (2, programs) ACC: selected, valid
    ignore_index,
    classes,
    pixels,
    SELECT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Combines both networks' hard pixels; only valid ones are selected."""
    program = tl.program_id(0)
    offset = program.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offset < pixels
    label = tl.load(target + offset, mask=inside, other=0).to(tl.int64)
    valid = inside & (label != ignore_index) & (label >= 0) & (label < classes)
    s = tl.load(student + offset, mask=inside, other=1) <= tl.load(limits)
    t = tl.load(teacher + offset, mask=inside, other=1) <= tl.load(limits + 1)
    if SELECT == "xor":
        chosen = s != t
    elif SELECT == "or":
        chosen = s | t
    elif SELECT == "and":
        chosen = s & t
    elif SELECT == "student":
        chosen = s
    else:
        chosen = s & (t == 0)
    chosen = valid & chosen
    tl.store(mask + offset, chosen.to(tl.uint8), mask=inside)
    ACC = part.dtype.element_ty
    tl.store(part + program, tl.sum(chosen.to(tl.int32)).to(ACC))
    tl.store(part + tl.num_programs(0) + program, tl.sum(valid.to(tl.int32)).to(ACC))


SELECT_BLOCK = 2048  # pixels a program compares: 16 a thread


def difficulty_mask(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    threshold: float,
    min_kept: int,
    confidence: str,
    select: str,
    ignore_index: int,
    align_corners: bool,
) -> tuple[Tensor, Tensor]:
    """The mask, bool (N, H, W), and int64 (2,): the number of selected and of valid pixels; see ``fastkd.ops.rdd``.

    Args:
        student, teacher: (N, C, h, w), (N, C, h', w'), each NCHW-contiguous or channels_last.
        target: (N, H, W) contiguous.
    """
    n, c, _, _ = student.shape
    acc, ACC = accumulator(student)
    maps = student.new_empty((2, *target.shape), dtype=acc)
    hard = []
    for logits, to in ((student, maps[0]), (teacher, maps[1])):
        cut = plan(logits, target.shape[1:], align_corners)
        programs = n * target.shape[1] * cut.blocks
        part = target.new_empty((programs,), dtype=torch.int32)
        launch(
            _confidence, (programs,), logits, logits, target, to, part, threshold, ignore_index, c, *cut.size, *cut.strides,
            cut.blocks, cut.whole, BY_LABEL=confidence == "label", ACC=ACC, **cut.constants,
        )  # fmt: skip
        hard.append(part)
    k = min(min_kept, target.numel())
    limits = kth_or_threshold(maps.view(2, -1), k, hard, threshold) if k else maps.new_full((2,), threshold)
    mask = torch.empty_like(target, dtype=torch.bool)
    programs = triton.cdiv(target.numel(), SELECT_BLOCK)
    part = maps.new_empty((2, programs))
    launch(
        _select, (programs,), student, maps[0], maps[1], limits, target, mask.view(torch.uint8), part, ignore_index, c,
        target.numel(), SELECT=select, BLOCK=SELECT_BLOCK,
    )  # fmt: skip
    return mask, torch.stack(total(part)).long()


# ---- k-th smallest --------------------------------------------------------------------------------------------------

DIGIT = 8  # bits a round
HISTOGRAM_BLOCK = 4096  # elements a program takes at a time
HISTOGRAM_PROGRAMS = 512  # and how many of them there are at most


@triton.jit
def _keys(x):
    """Unsigned integers in the order of floats; NaN, of any sign, is the largest."""
    if x.dtype == tl.float64:
        bits = x.to(tl.uint64, bitcast=True)
        sign = tl.full((), 1, tl.uint64) << 63
    else:
        bits = x.to(tl.uint32, bitcast=True)
        sign = tl.full((), 1, tl.uint32) << 31
    every = sign | (sign - 1)
    return tl.where(x == x, bits ^ tl.where((bits & sign) != 0, every, sign), every)


@triton.jit
def _start(
    hard,  # (programs,) int32, or None: how many elements are at most the threshold
    state,  # (3,) int64: the digits found so far; the rank in what they leave; whether the threshold will do
    k,
    programs,
    BLOCK: tl.constexpr,
):
    """The state before the first round."""
    count = tl.zeros([BLOCK], tl.int64)
    if hard is not None:
        for start in range(0, programs, BLOCK):
            i = start + tl.arange(0, BLOCK).to(tl.int64)
            count += tl.load(hard + i, mask=i < programs, other=0)
    done = (tl.sum(count) >= k) & (hard is not None)
    tl.store(state, tl.zeros([], tl.int64))
    tl.store(state + 1, tl.zeros([], tl.int64) + k)
    tl.store(state + 2, done.to(tl.int64))


@triton.jit
def _histogram(
    x,  # (n,) ACC
    state,  # (3,) int64
    part,  # (programs, BINS) int32
    n,
    chunk,
    SHIFT: tl.constexpr,
    FIRST: tl.constexpr,
    BINS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Counts, by the digit at SHIFT, of a chunk's elements whose higher digits are those found; none if done."""
    program = tl.program_id(0).to(tl.int64)
    prefix = tl.load(state)
    begin = program * chunk
    end = tl.where(tl.load(state + 2) != 0, begin, tl.minimum(begin + chunk, n))
    counts = tl.zeros([BINS], tl.int32)
    for start in range(begin, end, BLOCK):
        i = start + tl.arange(0, BLOCK)
        inside = i < end
        keys = _keys(tl.load(x + i, mask=inside, other=0))
        digits = keys >> SHIFT
        if not FIRST:
            inside = inside & ((digits >> 8).to(tl.int64) == prefix)
        counts += tl.histogram((digits & (BINS - 1)).to(tl.int32), BINS, mask=inside)
    tl.store(part + program * BINS + tl.arange(0, BINS), counts)


@triton.jit
def _pick(
    part,  # (programs, BINS) int32
    state,  # (3,) int64
    programs,
    BINS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Finds the digit of the k-th smallest, and its rank among the elements that have it."""
    bins = tl.arange(0, BINS)
    counts = tl.zeros([BINS], tl.int64)
    for start in range(0, programs, BLOCK):
        p = start + tl.arange(0, BLOCK).to(tl.int64)
        tile = tl.load(part + p[:, None] * BINS + bins[None, :], mask=(p < programs)[:, None], other=0)
        counts += tl.sum(tile.to(tl.int64), 0)
    rank = tl.load(state + 1)
    below = tl.cumsum(counts, 0) < rank
    digit = tl.sum(below.to(tl.int64))
    tl.store(state, tl.load(state) * BINS + digit)
    tl.store(state + 1, rank - tl.sum(tl.where(below, counts, 0)))


@triton.jit
def _limit(
    state,  # (3,) int64
    out,  # () ACC
    threshold: tl.float64,
    CLAMP: tl.constexpr,
):
    """The k-th smallest, or with CLAMP the larger of it and the threshold; NaN stays."""
    key = tl.load(state)
    if out.dtype.element_ty == tl.float64:
        bits = key.to(tl.uint64, bitcast=True)
        sign = tl.full((), 1, tl.uint64) << 63
    else:
        bits = key.to(tl.uint32)
        sign = tl.full((), 1, tl.uint32) << 31
    bits ^= tl.where((bits & sign) != 0, sign, sign | (sign - 1))
    value = bits.to(out.dtype.element_ty, bitcast=True)
    if CLAMP:
        least = tl.full((), threshold, tl.float64).to(out.dtype.element_ty)
        value = tl.where((tl.load(state + 2) != 0) | (value <= least), least, value)
    tl.store(out, value)


def _kth(x: Tensor, out: Tensor, k: int, hard: Tensor | None, threshold: float | None) -> None:
    n, bits = x.numel(), 8 * x.element_size()
    state = x.new_empty((3,), dtype=torch.int64)
    count = 0 if hard is None else hard.numel()
    launch(_start, (1,), x, hard, state, k, count, BLOCK=1024)
    block = min(HISTOGRAM_BLOCK, triton.next_power_of_2(n))
    chunk = triton.cdiv(triton.cdiv(n, block), HISTOGRAM_PROGRAMS) * block
    programs = triton.cdiv(n, chunk)
    part = x.new_empty((programs, 2**DIGIT), dtype=torch.int32)
    for shift in range(bits - DIGIT, -1, -DIGIT):
        launch(
            _histogram, (programs,), x, x, state, part, n, chunk,
            SHIFT=shift, FIRST=shift == bits - DIGIT, BINS=2**DIGIT, BLOCK=block,
        )  # fmt: skip
        launch(_pick, (1,), x, part, state, programs, BINS=2**DIGIT, BLOCK=min(32, triton.next_power_of_2(programs)))
    launch(_limit, (1,), x, state, out, threshold or 0.0, CLAMP=threshold is not None)


def kth_or_threshold(maps: Tensor, k: int, hard: list[Tensor], threshold: float) -> Tensor:
    """(2,): max(threshold, k-th smallest) of each row of ``maps`` (2, pixels); ``hard``: how many are at most the threshold."""
    limits = maps.new_empty((2,))
    for x, out, count in zip(maps.unbind(), limits.unbind(), hard, strict=True):
        _kth(x, out, k, count, threshold)
    return limits


def kth_smallest(x: Tensor, k: int) -> Tensor:
    """The k-th smallest element of a contiguous fp32 or fp64 tensor, 0-d; k is clamped to [1, n]; NaN is the largest."""
    out = x.new_empty(())
    _kth(x.flatten(), out, max(1, min(k, x.numel())), None, None)
    return out

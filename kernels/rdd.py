"""RDD's maps (docs/rdd.md, docs/full-resolution.md): the teacher's confidence exp(-KL) between its heads, with KD and
its gradient from the same read; the mask of relatively difficult pixels; the exact k-th smallest for its threshold.

Mask: one kernel per network, tiled as in :mod:`kernels.resize`, writes a confidence per label pixel, and the student's
log-sum-exp if cross-entropy follows. A second kernel compares them. For "student" (OHEM) the teacher is not read.

k-th smallest: a radix select of 11 bits per round; each round reads the maps once. The result is at most the threshold
exactly if at least k confidences are. The confidence kernels count those, and then the rounds skip their reads. The
host never synchronises.
"""

from __future__ import annotations

from functools import partial
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
    View,
    any_of,
    locate,
    nothing,
    part_of,
    parts_of,
    plan,
    prepare,
    read_labels,
    write_pixels,
)
from .resized_cross_entropy import softmax
from .softmax import LOG2E, START, difference, divergence, grow, grow_cross
from .tiles import cut, tile_of
from .tiles import locate as locate_tile
from .total import gather_parts, reduced, scaled_sum

# Heads


class Heads(NamedTuple):
    """Outputs of the heads kernel."""

    confidence: Any  # (N, h, w) ACC
    part: Any  # (1, programs) ACC: KD loss, or None
    gradient: Any  # map, dtype of the student, or None


@triton.jit
def _heads(
    student,  # map, any float dtype, or None
    main,  # map, any float dtype
    aux,  # map, any float dtype
    out,  # Heads
    scale: tl.float64,
    AUX_MAIN: tl.constexpr,
    g,  # tiles.Tiles
):
    """One tile of pixels: online softmaxes over the classes; the gradient reads student and main again from cache."""
    at = locate_tile(g)
    zero = tl.zeros([g.BLOCK_INNER], g.ACC)
    total_m, total_a, total_s, heads, cross = zero, zero, zero, zero, zero
    peak_m, peak_a, peak_s = zero + START, zero + START, zero + START
    for start in range(0, at.length, g.BLOCK_REDUCED):
        offset, mask = tile_of(g, at, start)
        m = tl.load(main + offset, mask=mask, other=-float("inf")).to(g.ACC)
        a = tl.load(aux + offset, mask=mask, other=-float("inf")).to(g.ACC)
        higher_m, more_m = grow(m, 1.0, peak_m, total_m, 1)
        higher_a, more_a = grow(a, 1.0, peak_a, total_a, 1)
        if AUX_MAIN:
            heads = grow_cross(m, a, 1.0, heads, total_a, (peak_m, peak_a, higher_m, higher_a), 1)
        else:
            heads = grow_cross(a, m, 1.0, heads, total_m, (peak_a, peak_m, higher_a, higher_m), 1)
        if student is not None:
            s = tl.load(student + offset, mask=mask, other=-float("inf")).to(g.ACC)
            higher_s, total_s = grow(s, 1.0, peak_s, total_s, 1)
            cross = grow_cross(s, m, 1.0, cross, total_m, (peak_s, peak_m, higher_s, higher_m), 1)
            peak_s = higher_s
        peak_m, total_m = higher_m, more_m
        peak_a, total_a = higher_a, more_a
    d = divergence(1.0, total_m, total_a, heads) if AUX_MAIN else divergence(1.0, total_a, total_m, heads)
    p = tl.exp(-tl.maximum(d, 0, propagate_nan=tl.PropagateNan.ALL))
    tl.store(out.confidence + at.outer * g.inner + at.inner, p, mask=at.inside)
    if student is not None:
        loss = tl.where(at.inside, divergence(1.0, total_s, total_m, cross), 0)
        tl.store(out.part + tl.program_id(0), tl.sum(loss))
    if out.gradient is not None:
        factor = tl.full((), scale, tl.float64).to(g.ACC)
        norms = (peak_s, tl.log2(total_s), peak_m, tl.log2(total_m))
        to_log2 = tl.full((), LOG2E, g.ACC)
        for start in range(0, at.length, g.BLOCK_REDUCED):
            offset, mask = tile_of(g, at, start)
            s = tl.load(student + offset, mask=mask, other=0).to(g.ACC)
            m = tl.load(main + offset, mask=mask, other=0).to(g.ACC)
            difference_s_m = difference(s, m, to_log2, norms) * factor
            tl.store(out.gradient + offset, difference_s_m.to(out.gradient.dtype.element_ty), mask=mask)


def _run_heads(
    student: Tensor | None, main: Tensor, aux: Tensor, direction: str, scale: float, gradient: Tensor | None
) -> Heads:
    n, _, h, w = main.shape
    acc, _ = accumulator(main)
    tiled = cut(main, "channels", split=False, maps=3)
    part = None if student is None else main.new_empty((1, tiled.programs), dtype=acc)
    out = Heads(main.new_empty((n, h, w), dtype=acc), part, gradient)
    launch(_heads, (tiled.programs,), main, student, main, aux, out, scale, direction == "aux_main", tiled.tiles)
    return out


def teacher_confidence(main: Tensor, aux: Tensor, direction: str) -> Tensor:
    """exp(-KL) between the heads, (N, h, w) in the accumulator's dtype; see ``fastkd.ops.rdd``.

    Args:
        main, aux: (N, C, h, w) in the same layout, NCHW-contiguous or channels_last.
    """
    return _run_heads(None, main, aux, direction, 1.0, None).confidence


def kd_confidence_forward(
    student: Tensor, teacher: Tensor, aux: Tensor, direction: str, reduction: str, scale: float
) -> tuple[Tensor, Tensor]:
    """KD's summed loss and the confidence map; the three maps share one layout."""
    out = _run_heads(student, teacher, aux, direction, scale, None)
    return scaled_sum(out.part, scale), out.confidence


def kd_confidence_gradient(
    student: Tensor, teacher: Tensor, aux: Tensor, direction: str, reduction: str, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`kd_confidence_forward` with KD's gradient."""
    gradient = torch.empty_like(student)
    out = _run_heads(student, teacher, aux, direction, scale, gradient)
    return scaled_sum(out.part, scale), out.confidence, gradient


# Difficulty

TILE = (2, 9)  # label pixels per lane
SELECT_BLOCK = 2048  # pixels per program


class Maps(NamedTuple):
    """Outputs of one network's confidence kernel."""

    confidence: Any  # (N, H, W) ACC
    lse: Any  # (N, H, W) ACC: log-sum-exp, or None
    hard: Any  # (programs,) fp64: number of confidences <= threshold


@triton.jit(do_not_specialize=["keep_lse"])
def _confidence(
    logits,  # resize.Logits
    labels,  # resize.Labels
    grid,  # resize.Grid
    out,  # Maps
    threshold: tl.float64,
    keep_lse,  # for the student only; a runtime argument, so that both networks share one compiled kernel
    BY_LABEL: tl.constexpr,
    T,  # resize.Tile
):
    """Probability of the largest or of the labelled class per label pixel; 1 where ignored."""
    place = locate(logits, grid, T)
    limit = tl.full((), threshold, tl.float64).to(T.ACC)
    hard = tl.zeros([T.CELLS], tl.int32)
    first, last = parts_of(grid)
    for part in range(first, last):
        pixels = part_of(place, logits, grid, part, T)
        worth = read_labels(labels, grid, place, pixels, logits.classes, T)
        cell = Cell(place, pixels, any_of(worth.counted))
        norm, distance = softmax(View(logits, ()), grid, cell, worth.counted, worth.label if BY_LABEL else None, T)
        if out.lse is not None:
            if keep_lse != 0:
                lse = nothing()
                for k in tl.static_range(len(norm)):
                    lse = lse + (norm[k] * LN2,)
                write_pixels(out.lse, grid, place, pixels, lse)
        confidence = nothing()
        for k in tl.static_range(len(norm)):
            p = tl.where(worth.counted[k], tl.exp2(-distance[k]), 1)
            hard += (pixels.exist[k] & (p <= limit)).to(tl.int32)
            confidence = confidence + (p,)
        write_pixels(out.confidence, grid, place, pixels, confidence)
    tl.store(out.hard + tl.program_id(0), tl.sum(hard).to(tl.float64))


@triton.jit
def _select(
    maps,  # (2, pixels) ACC: confidences of student and teacher; the student's alone for "student"
    limits,  # (2,) or (1,) ACC: confidences up to this are hard; None: use the threshold
    labels,  # resize.Labels
    out,  # (pixels,) uint8: the mask; or ACC: log-sum-exps, set to NaN where the mask is False
    part,  # (2, programs) ACC: selected, valid
    size,  # (classes, pixels)
    threshold: tl.float64,
    SELECT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Combines both networks' hard pixels; only valid pixels are selected."""
    ACC: tl.constexpr = maps.dtype.element_ty
    program = tl.program_id(0)
    at = program.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size[1]
    label = tl.load(labels.target + at, mask=inside, other=0).to(tl.int64)
    valid = inside & (label != labels.ignore_index) & (label >= 0) & (label < size[0])
    limit_s = tl.full((), threshold, tl.float64).to(ACC)
    limit_t = limit_s
    if limits is not None:
        limit_s = tl.load(limits)
    chosen = tl.load(maps + at, mask=inside, other=1) <= limit_s
    if SELECT != "student":
        if limits is not None:
            limit_t = tl.load(limits + 1)
        t = tl.load(maps + size[1] + at, mask=inside, other=1) <= limit_t
        if SELECT == "xor":
            chosen = chosen != t
        elif SELECT == "or":
            chosen = chosen | t
        elif SELECT == "and":
            chosen = chosen & t
        else:
            chosen = chosen & (t == 0)
    chosen = valid & chosen
    if out.dtype.element_ty == tl.uint8:
        tl.store(out + at, chosen.to(tl.uint8), mask=inside)
    else:
        tl.store(out + at, float("nan"), mask=inside & (chosen == 0))
    tl.store(part + program, tl.sum(chosen.to(tl.int32)).to(ACC))
    tl.store(part + tl.num_programs(0) + program, tl.sum(valid.to(tl.int32)).to(ACC))


def _difficulty(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    threshold: float,
    min_kept: int,
    confidence: str,
    select: str,
    ignore_index: int,
    align_corners: bool,
    keep_lse: bool,
) -> tuple[Tensor, Tensor]:
    """The mask, and the selected share of the valid pixels, 0-d; see ``fastkd.ops.rdd``.

    Args:
        student, teacher: (N, C, h, w), (N, C, h', w'), each NCHW-contiguous or channels_last.
        target: (N, H, W) contiguous.
        keep_lse: return the student's log-sum-exp, NaN where not selected, instead of the mask.
    """
    acc, _ = accumulator(student, teacher)
    pixels, size = target.numel(), target.shape[1:]
    networks = (student,) if select == "student" else (student, teacher)
    maps = student.new_empty((len(networks), pixels), dtype=acc)
    lse = torch.empty_like(target, dtype=acc) if keep_lse else None
    labels = Labels(target, None, None, None, ignore_index)
    cuts = [plan(logits, size, align_corners, TILE, 0, acc) for logits in networks]
    hard = student.new_zeros((len(networks), max(fit.programs for fit in cuts)), dtype=torch.float64)
    for i, (logits, fit) in enumerate(zip(networks, cuts, strict=True)):
        (prepared,) = prepare(size, 1.0, logits)
        out = Maps(maps[i], lse, hard[i])
        launch(
            _confidence, (fit.programs,), logits, prepared, labels, fit.grid, out, threshold, int(i == 0),
            confidence == "label", fit.tile, num_warps=1, registers=168,
        )  # fmt: skip
        del prepared  # its memory serves the next network's copy, or the k-th smallest
    k = min(min_kept, pixels)
    limits = kth_or_threshold(maps, k, gather_parts(hard), threshold) if k else None
    selected = torch.empty_like(target, dtype=torch.bool) if lse is None else lse
    programs = triton.cdiv(pixels, SELECT_BLOCK)
    part = maps.new_empty((2, programs))
    launch(
        _select, (programs,), maps, maps, limits, labels, selected.view(torch.uint8) if lse is None else selected, part,
        (student.shape[1], pixels), threshold, SELECT=select, BLOCK=SELECT_BLOCK,
    )  # fmt: skip
    share, _ = reduced(part, True, 1.0)
    return selected, share


difficulty_mask = partial(_difficulty, keep_lse=False)
difficulty_lse = partial(_difficulty, keep_lse=True)


# k-th smallest

DIGIT = tl.constexpr(11)  # bits per round; the last round takes the rest
BINS = tl.constexpr(2048)
HISTOGRAM_BLOCK = 4096  # elements per program and iteration
HISTOGRAM_ITERATIONS = 2  # at least: a program writes 8 KiB
HISTOGRAM_PROGRAMS = 256  # at most, per map
COLUMNS = 32  # bins per program


@triton.jit
def _keys(x):
    """Unsigned integers that sort like the floats; any NaN is the largest."""
    if x.dtype == tl.float64:
        bits = x.to(tl.uint64, bitcast=True)
        sign = tl.full((), 1, tl.uint64) << 63
    else:
        bits = x.to(tl.uint32, bitcast=True)
        sign = tl.full((), 1, tl.uint32) << 31
    every = sign | (sign - 1)
    return tl.where(x == x, bits ^ tl.where((bits & sign) != 0, every, sign), every)


@triton.jit
def _pick(counts, state, BITS: tl.constexpr):
    """Appends one digit to those in ``state`` (2,) int64; also returns the rank among the elements with these digits.

    Args:
        counts: (2 ** BITS,) int64: histogram of the next digit over elements that match the digits so far.
    """
    count = tl.load(counts + tl.arange(0, 2**BITS))
    rank = tl.load(state + 1)
    below = tl.cumsum(count, 0) < rank
    digits = (tl.load(state) << BITS) + tl.sum(below.to(tl.int64))
    return digits, tl.where(rank == 0, 0, rank - tl.sum(tl.where(below, count, 0)))


@triton.jit
def _histogram(
    x,  # (maps, n) ACC
    hard,  # (maps, parts) fp64, or None: number of elements <= threshold
    state,  # (rounds, maps, 2) int64: digits found before the round, and the rank; rank 0: skip
    counts,  # (rounds, maps, BINS) int64
    part,  # (maps, programs, BINS) int32
    size,  # (n, chunk, parts, k)
    ROUND: tl.constexpr,
    SHIFT: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,  # (elements, parts)
):
    """Histogram of the digit at SHIFT over the elements of a chunk that match the digits found so far."""
    program = tl.program_id(0).to(tl.int64)
    which = tl.program_id(1)
    maps = tl.num_programs(1)
    if ROUND == 0:
        prefix = tl.zeros([], tl.int64)
        rank = prefix + size[3]
        if hard is not None:
            k = tl.arange(0, BLOCK[1])
            enough = tl.sum(tl.load(hard + which * size[2] + k, mask=k < size[2], other=0))
            rank = tl.where(enough >= size[3], 0, rank)
    else:
        before = (ROUND - 1) * maps + which
        prefix, rank = _pick(counts + before * BINS, state + before * 2, DIGIT)
    if program == 0:
        tl.store(state + (ROUND * maps + which) * 2, prefix)
        tl.store(state + (ROUND * maps + which) * 2 + 1, rank)
    first = program * size[1]
    end = tl.where(rank == 0, first, tl.minimum(first + size[1], size[0]))
    found = tl.zeros([2**BITS], tl.int32)
    for start in range(first, end, BLOCK[0]):
        i = start + tl.arange(0, BLOCK[0])
        inside = i < end
        digits = _keys(tl.load(x + which.to(tl.int64) * size[0] + i, mask=inside, other=0)) >> SHIFT
        if ROUND > 0:
            inside = inside & ((digits >> BITS).to(tl.int64) == prefix)
        found += tl.histogram((digits & (2**BITS - 1)).to(tl.int32), 2**BITS, mask=inside)
    tl.store(part + (which * tl.num_programs(0) + program) * BINS + tl.arange(0, 2**BITS), found)


@triton.jit
def _columns(
    part,  # (maps, programs, BINS) int32
    counts,  # (maps, BINS) int64
    programs,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Sums the programs' histograms, COLUMNS bins per program."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    which = tl.program_id(1)
    count = tl.zeros([COLUMNS], tl.int64)
    for start in range(0, programs, BLOCK):
        p = (start + tl.arange(0, BLOCK)).to(tl.int64)
        at = (which * programs + p)[:, None] * BINS + column[None, :]
        count += tl.sum(tl.load(part + at, mask=(p < programs)[:, None], other=0).to(tl.int64), 0)
    tl.store(counts + which * BINS + column, count)


@triton.jit
def _limit(
    counts,  # (maps, BINS) int64, of the last round
    state,  # (maps, 2) int64
    out,  # (maps,) ACC
    threshold: tl.float64,
    CLAMP: tl.constexpr,
    BITS: tl.constexpr,
):
    """The k-th smallest, or with CLAMP its maximum with the threshold; NaN propagates."""
    which = tl.program_id(0)
    key, _ = _pick(counts + which * BINS, state + which * 2, BITS)
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
        value = tl.where((tl.load(state + which * 2 + 1) == 0) | (value <= least), least, value)
    tl.store(out + which, value)


def kth_or_threshold(x: Tensor, k: int, hard: Tensor | None, threshold: float | None) -> Tensor:
    """max(threshold, k-th smallest) of each row of ``x`` (maps, n); 3 rounds for fp32, 6 for fp64.

    Args:
        hard: (maps, parts) fp64: number of elements <= threshold. Rows with at least k of them are not read.
    """
    maps, n = x.shape
    total_bits = 8 * x.element_size()
    block = min(HISTOGRAM_BLOCK, triton.next_power_of_2(n))
    chunk = max(HISTOGRAM_ITERATIONS, triton.cdiv(triton.cdiv(n, block), HISTOGRAM_PROGRAMS)) * block
    programs = triton.cdiv(n, chunk)
    rounds = triton.cdiv(total_bits, DIGIT.value)
    state = x.new_empty((rounds, maps, 2), dtype=torch.int64)
    counts = x.new_empty((rounds, maps, BINS.value), dtype=torch.int64)
    part = x.new_empty((maps, programs, BINS.value), dtype=torch.int32)
    parts = 1 if hard is None else hard.shape[1]
    bits = DIGIT.value
    for i in range(rounds):
        shift = max(0, total_bits - bits * (i + 1))
        bits = total_bits - DIGIT.value * i - shift
        launch(
            _histogram, (programs, maps), x, x, hard, state, counts, part, (n, chunk, parts, k),
            ROUND=i, SHIFT=shift, BITS=bits, BLOCK=(block, triton.next_power_of_2(parts)),
        )  # fmt: skip
        launch(_columns, (2**bits // COLUMNS, maps), x, part, counts[i], programs, BLOCK=32, COLUMNS=COLUMNS)
    out = x.new_empty(maps)
    launch(_limit, (maps,), x, counts[-1], state[-1], out, threshold or 0.0, CLAMP=threshold is not None, BITS=bits)
    return out


def kth_smallest(x: Tensor, k: int) -> Tensor:
    """The k-th smallest element of a contiguous fp32 or fp64 tensor, 0-d; k is clamped to [1, n]; NaN sorts last."""
    return kth_or_threshold(x.reshape(1, -1), max(1, min(k, x.numel())), None, None)[0]

"""KD at label resolution: loss[p] = weight * tau^2 * KL(softmax(T[p] / tau) || softmax(S[p] / tau)), interpolated.

One kernel computes loss and gradient, tiled as in :mod:`kernels.resize`. A teacher of another size has other cells: its
four corners are loaded per label pixel, from cache. Student and teacher go through identical operations, and the
gradient is a difference of two exponentials, so equal maps give exactly 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .launch import accumulator, launch
from .resize import (
    LN2,
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
    plan,
    plane_of,
    prepare,
    put,
    read_labels,
    resize_weight,
    sum_of,
    taps_of,
    values,
    weigh,
    write_gradient,
    write_pixels,
)
from .total import add, total

# Label pixels per lane. Each needs two sums and a cross term.
TILE = (2, 9)
# With a teacher of another size: also four pointers.
ELSEWHERE_TILE = (1, 4)


class Out(NamedTuple):
    """Outputs of the kernel."""

    loss: Any  # (N, H, W) ACC, or None
    part: Any  # (2, programs) ACC: losses, counted pixels
    planes: Any  # as in resize.Shares, or None


@triton.jit
def _sums(student, teacher, cell, shift_s, shift_t, T):
    """Per label pixel: both sums of exponentials about the shifts, and sum exp2(t) * (t - s)."""
    zero = tl.zeros([T.CELLS], T.ACC)
    sum_s = fill(zero, len(cell[1].exist))
    sum_t, cross = sum_s, sum_s
    at_s, at_t = begin(student, cell), begin(teacher, cell)
    for _ in range(student.logits.classes):
        s, t = values(student, at_s, cell, shift_s), values(teacher, at_t, cell, shift_t)
        at_s, at_t = advance(at_s, plane_of(student.logits)), advance(at_t, plane_of(teacher.logits))
        more_s, more_t, more = (), (), ()
        for k in tl.static_range(len(s)):
            e = tl.exp2(t[k])
            more_s = more_s + (sum_s[k] + tl.exp2(s[k]),)
            more_t = more_t + (sum_t[k] + e,)
            more = more + (cross[k] + e * (t[k] - s[k]),)
        sum_s, sum_t, cross = more_s, more_t, more
    return sum_s, sum_t, cross


@triton.jit
def _ends(sum_s, sum_t, cross):
    """Per label pixel: the logarithms of both sums, and the divergence, base 2."""
    # Logarithm of the ratio, exactly 0 for equal maps; approximate division may give x / x != 1.
    ratio = tl.where(sum_s == sum_t, 0, tl.log2(sum_s / sum_t))
    return tl.log2(sum_s), tl.log2(sum_t), cross / sum_t + ratio


@triton.jit
def _softmaxes(student, teacher, grid, cell, counted, T):
    """Per label pixel: both log-sum-exps and the divergence, base 2.

    ``counted`` pixels whose sum about the bound has lost terms are recomputed about the true maxima, see
    :func:`kernels.resized_cross_entropy.softmax`.
    """
    shift_s, shift_t = bound(student, cell), bound(teacher, cell)
    sum_s, sum_t, cross = _sums(student, teacher, cell, shift_s, shift_t, T)
    base_s, base_t = each(shift_s, len(counted)), each(shift_t, len(counted))
    norm_s, norm_t, divergence = (), (), ()
    for k in tl.static_range(len(counted)):
        log_s, log_t, d = _ends(sum_s[k], sum_t[k], cross[k])
        norm_s = norm_s + (base_s[k] + log_s,)
        norm_t = norm_t + (base_t[k] + log_t,)
        divergence = divergence + (d,)
    below = far_below(sum_s, counted) | far_below(sum_t, counted)
    if any_lane(below != 0):
        for j in range(len(counted)):
            far = has(below, j)
            if any_lane(far):
                one = one_pixel(cell, j)
                seen_s, seen_t = one_view(student, grid, one, T), one_view(teacher, grid, one, T)
                peak_s, peak_t = largest(seen_s, one, T), largest(seen_t, one, T)
                right_s, right_t, right = _sums(seen_s, seen_t, one, Shift(peak_s, ()), Shift(peak_t, ()), T)
                log_s, log_t, d = _ends(right_s[0], right_t[0], right[0])
                norm_s, norm_t = put(norm_s, j, far, peak_s + log_s), put(norm_t, j, far, peak_t + log_t)
                divergence = put(divergence, j, far, d)
    ends_s, ends_t = (), ()
    for k in tl.static_range(len(counted)):
        ends_s = ends_s + (tl.where(counted[k], norm_s[k], float("inf")),)
        ends_t = ends_t + (tl.where(counted[k], norm_t[k], float("inf")),)
    return ends_s, ends_t, divergence


@triton.jit
def _gradient(k: tl.constexpr, c, value_s, value_t, kept, state):
    """factor * (p_S - p_T); ``state``: both log-sum-exps, and the factor unless it is 1."""
    out = tl.exp2(value_s - state[0][k]) - tl.exp2(value_t - state[1][k])
    if len(state) == 3:
        out *= state[2][k]
    return out, out


@triton.jit
def _kd(
    student,  # resize.Logits, times log2(e) / tau
    teacher,  # resize.Logits
    labels,  # resize.Labels
    grid,  # resize.Grid
    out,  # Out
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
        for k in tl.static_range(len(counted)):  # here, to end the live range of each share
            counts += tl.where(place.own, worth.share[k], 0)
        cell = Cell(place, pixels, any_of(counted))
        views = (View(student, ()), View(teacher, () if SAME else taps_of(teacher, grid, pixels, T)))
        norm_s, norm_t, divergence = _softmaxes(views[0], views[1], grid, cell, counted, T)
        factor = weigh(labels, grid, place, pixels, worth)
        terms = nothing()
        for k in tl.static_range(len(counted)):
            terms = terms + (tl.where(counted[k], factor[k] * (divergence[k] * LN2), 0),)
        losses, lost = add(losses, lost, tl.where(place.own, sum_of(terms), 0))
        if out.loss is not None:
            scaled = nothing()
            for k in tl.static_range(len(counted)):
                scaled = scaled + (terms[k] * tl.full((), scale, tl.float64).to(T.ACC),)
            write_pixels(out.loss, grid, place, pixels, scaled)
        if out.planes is not None:
            state = (norm_s, norm_t) if labels.pixel_weight is None else (norm_s, norm_t, factor)
            write_gradient(out.planes, grid, cell, views[0], (views[1],), state, (), _gradient, part > first, T, ())
    tl.store(out.part + tl.program_id(0), tl.sum(losses))
    tl.store(out.part + tl.num_programs(0) + tl.program_id(0), tl.sum(counts))


class Kind(NamedTuple):
    """A kernel with the signature of :func:`_kd`."""

    kernel: Any
    bounded: bool  # as in resize.prepare


SOFTMAX = Kind(_kd, bounded=False)


def _launch(kind: Kind, args: tuple[Any, ...], gradient: bool, per_pixel: bool, scale: float) -> tuple[Any, Out]:
    student, teacher, target, pixel_weight, size, temperature, ignore_index, align_corners = args
    acc, _ = accumulator(student, teacher)
    same = student.shape == teacher.shape
    cut = plan(student, size, align_corners, TILE if same else ELSEWHERE_TILE, int(gradient), acc)
    prepared = prepare(size, 1 / temperature, student, teacher, bounded=kind.bounded)
    loss = student.new_empty((student.shape[0], *size), dtype=acc) if per_pixel else None
    planes = student.new_empty((2 * cut.split, *student.shape), dtype=acc) if gradient else None
    out = Out(loss, student.new_empty((2, cut.programs), dtype=acc), planes)
    labels = Labels(target, None, resize_weight(pixel_weight, size, align_corners), None, ignore_index)
    # Small tiles need fewer registers; without the limit ptxas spills two when there are weights.
    registers = 168 if same and cut.tile.ROWS.value * cut.tile.COLUMNS.value <= 8 else None
    launch(
        kind.kernel, (cut.programs,), student, *prepared, labels, cut.grid, out, scale, same, cut.tile,
        num_warps=1, registers=registers,
    )  # fmt: skip
    return cut, out


def forward(
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None,
    pixel_weight: Tensor | None,
    size: Sequence[int],
    temperature: float,
    ignore_index: int,
    align_corners: bool,
    reduction: str,
    scale: float,
    *,
    kind: Kind = SOFTMAX,
) -> tuple[Tensor, Tensor]:
    """The loss and the number of counted pixels; see ``fastkd.ops.resized_kd``.

    Args:
        student: (N, C, h, w), teacher: (N, C, h', w'), each NCHW-contiguous or channels_last.
        target: (N, H, W) contiguous, or None. pixel_weight: (N, any height, any width) in the accumulator's dtype.
    """
    args = (student, teacher, target, pixel_weight, size, temperature, ignore_index, align_corners)
    _, out = _launch(kind, args, False, reduction == "none", scale * temperature**2)
    loss, count = total(out.part, reduction, scale * temperature**2)
    return (out.loss if loss is None else loss), count


def gradient(
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None,
    pixel_weight: Tensor | None,
    size: Sequence[int],
    temperature: float,
    ignore_index: int,
    align_corners: bool,
    reduction: str,
    scale: float,
    *,
    kind: Kind = SOFTMAX,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, count, and the student's gradient in its dtype and layout; arguments as for :func:`forward`."""
    args = (student, teacher, target, pixel_weight, size, temperature, ignore_index, align_corners)
    cut, out = _launch(kind, args, True, False, 1.0)
    return join(out.planes, student, out.part, cut.split, reduction, scale * temperature**2, scale * temperature)

"""Sums over programs in a fixed order in fp64: the loss and its count.

Each program writes a column of partial sums. :func:`gather_parts` reduces thousands of them to hundreds; the kernel
that needs the sums adds the rest in :func:`finish`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .launch import launch

# Partial sums per program. Up to this many need no kernel of their own.
PARTS = 1024


@triton.jit
def add(total, lost, more):
    """Kahan summation: ``total`` + ``more`` and the rounding error ``lost``; sums of equal terms do not drift."""
    more -= lost
    higher = total + more
    lost = (higher - total) - more
    return higher, tl.where(tl.abs(lost) < float("inf"), lost, 0)  # inf stays inf


@triton.jit
def _gather(
    part,  # (rows, parts) ACC
    out,  # (rows, programs) ACC
    parts,
    chunk,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    begin = program.to(tl.int64) * chunk
    end = tl.minimum(begin + chunk, parts)
    part += tl.program_id(1).to(tl.int64) * parts
    value = tl.zeros([BLOCK], tl.float64)
    for start in range(begin, end, BLOCK):
        k = start + tl.arange(0, BLOCK)
        value += tl.load(part + k, mask=k < end, other=0)
    tl.store(out + tl.program_id(1) * tl.num_programs(0) + program, tl.sum(value).to(out.dtype.element_ty))


def gather_parts(part: Tensor) -> Tensor:
    """Reduces ``part`` (rows, parts) to at most (rows, PARTS)."""
    rows, parts = part.shape
    if parts <= PARTS:
        return part
    chunk = max(PARTS, triton.cdiv(parts, PARTS))
    programs = triton.cdiv(parts, chunk)
    out = part.new_empty((rows, programs))
    launch(_gather, (programs, rows), part, part, out, parts, chunk, BLOCK=PARTS, registers=64)
    return out


@triton.jit
def finish(part, parts, loss, count, scale, MEAN: tl.constexpr, BLOCK: tl.constexpr):
    """The first program stores the reduced loss and the count. Returns a mean's factor for the sum's gradient.

    Args:
        part: (2, parts), or (1, parts) without ``count``.
        scale: of the loss, fp64.
    """
    k = tl.arange(0, BLOCK)
    factor = tl.full((), 1, tl.float64)
    if count is not None:
        counted = tl.sum(tl.load(part + parts + k, mask=k < parts, other=0).to(tl.float64))
        if MEAN:
            factor = tl.where(counted == 0, 0.0, 1 / counted)
        if tl.program_id(0) == 0:
            tl.store(count, counted.to(count.dtype.element_ty))
    if loss is not None:
        if tl.program_id(0) == 0:
            value = tl.sum(tl.load(part + k, mask=k < parts, other=0).to(tl.float64))
            tl.store(loss, (tl.where(factor == 0, 0.0, value * factor) * scale).to(loss.dtype.element_ty))
    return factor


@triton.jit
def _finish(
    part,  # (2, parts) ACC, or (1, parts)
    loss,  # () ACC, or None
    count,  # () ACC, or None
    parts,
    scale: tl.float64,
    MEAN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    finish(part, parts, loss, count, tl.full((), scale, tl.float64), MEAN, BLOCK)


def _reduce(part: Tensor, loss: Tensor | None, count: Tensor | None, mean: bool, scale: float) -> None:
    part = gather_parts(part)
    parts = part.shape[1]
    launch(_finish, (1,), part, part, loss, count, parts, scale, MEAN=mean, BLOCK=triton.next_power_of_2(parts))


def reduced(part: Tensor, mean: bool, scale: float) -> tuple[Tensor, Tensor]:
    """The loss and the count from partial sums (2, parts)."""
    loss, count = part.new_empty(()), part.new_empty(())
    _reduce(part, loss, count, mean, scale)
    return loss, count


def total(part: Tensor, reduction: str, scale: float) -> tuple[Tensor | None, Tensor]:
    """:func:`reduced`, without a loss for "none"."""
    if reduction != "none":
        return reduced(part, reduction == "mean", scale)
    count = part.new_empty(())
    _reduce(part, None, count, False, scale)
    return None, count


def scaled_sum(terms: Tensor, scale: float) -> Tensor:
    """scale * sum of a contiguous tensor, 0-d."""
    loss = terms.new_empty(())
    _reduce(terms.view(1, -1), loss, None, False, scale)
    return loss

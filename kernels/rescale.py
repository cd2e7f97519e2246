"""Multiplies an early gradient by the upstream gradient; returns at once if that is exactly 1."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .launch import launch

BLOCK = 4096
PROGRAMS = 2048


@triton.jit
def _rescale(
    gradient,  # (elements,) any float dtype
    factor,  # () ACC
    elements,
    BLOCK: tl.constexpr,
):
    by = tl.load(factor)
    begin = tl.program_id(0).to(tl.int64) * BLOCK
    end = tl.where(by == 1, begin, elements)
    for start in range(begin, end, tl.num_programs(0) * BLOCK):
        i = start + tl.arange(0, BLOCK)
        value = tl.load(gradient + i, mask=i < elements, other=0)
        tl.store(gradient + i, (value * by).to(value.dtype), mask=i < elements)


def rescale_(gradient: Tensor, factor: Tensor) -> None:
    """``gradient`` (dense) *= ``factor`` (0-d, in the accumulator's dtype), in place."""
    programs = min(PROGRAMS, triton.cdiv(gradient.numel(), BLOCK))
    launch(_rescale, (programs,), gradient, gradient, factor, gradient.numel(), BLOCK=BLOCK)

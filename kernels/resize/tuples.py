"""Tuples with one entry per label pixel, kept in a lane's registers."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def nothing():
    """An empty tuple."""
    return ()


@triton.jit
def fill(value, COUNT: tl.constexpr):
    out = nothing()
    for _ in tl.static_range(COUNT):
        out = out + (value,)
    return out


@triton.jit
def sum_of(values):
    """The sum, in pairs: half as many roundings."""
    out = values[0]
    for i in tl.static_range(1, len(values) - 1, 2):
        out += values[i] + values[i + 1]
    if len(values) % 2 == 0:
        out += values[len(values) - 1]
    return out


@triton.jit
def any_of(masks):
    out = masks[0]
    for i in tl.static_range(1, len(masks)):
        out = out | masks[i]
    return out


@triton.jit
def pick(values, k):
    """Entry ``k``, a runtime value."""
    out = values[0]
    for i in tl.static_range(1, len(values)):
        out = tl.where(k == i, values[i], out)
    return out


@triton.jit
def put(values, k, mask, value):
    """Replaces entry ``k``, a runtime value, where ``mask`` is set."""
    out = ()
    for i in tl.static_range(len(values)):
        out = out + (tl.where(mask & (k == i), value, values[i]),)
    return out

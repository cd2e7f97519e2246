"""The online softmax of all losses on logits: one read of a row gives peak, sum, and a KL in log space.

Peaks stay in units of the logits and are subtracted before dividing by the temperature, so the exponent has no rounding
error of a large logit. An empty row has peak START and sum 0.
"""

from __future__ import annotations

import triton
import triton.language as tl

# The lowest fp32, not -inf: -inf - -inf would be NaN for a row that begins with masked classes.
START = tl.constexpr(-3.4028234663852886e38)
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def grow(x, inv_tau, peak, total, AXIS: tl.constexpr):
    """Updates ``peak`` = max x and ``total`` = sum exp((x - peak) / tau) over ``AXIS`` with x, -inf where masked."""
    higher = tl.maximum(peak, tl.max(x, AXIS))
    more = tl.sum(tl.exp((x - tl.expand_dims(higher, AXIS)) * inv_tau), AXIS)
    return higher, total * tl.exp((peak - higher) * inv_tau) + more


@triton.jit
def grow_cross(s, t, inv_tau, cross, total_t, peaks, AXIS: tl.constexpr):
    """Updates ``cross`` = sum exp((t - peak_t) / tau) * ((t - peak_t) - (s - peak_s)) with a block of s and t.

    ``total_t``: before the block. ``peaks``: of s and t before the block, and after it. exp = 0 contributes 0 for any
    s.
    """
    peak_s, peak_t, higher_s, higher_t = peaks
    moved = (peak_t - higher_t) - (peak_s - higher_s)
    s = s - tl.expand_dims(higher_s, AXIS)
    t = t - tl.expand_dims(higher_t, AXIS)
    e = tl.exp(t * inv_tau)
    more = tl.sum(tl.where(e == 0, 0, e * (t - s)), AXIS)
    return tl.exp((peak_t - higher_t) * inv_tau) * (cross + total_t * moved) + more


@triton.jit
def grow_lanes(s, t, inv_tau, state):
    """:func:`grow` of s and t and :func:`grow_cross` without a reduction: one softmax per element of the block.

    ``state``: peak and sum of s, peak and sum of t, and the cross term, each shaped like the block.
    """
    peak_s, total_s, peak_t, total_t, cross = state
    higher_s, higher_t = tl.maximum(peak_s, s), tl.maximum(peak_t, t)
    scale_t = tl.exp((peak_t - higher_t) * inv_tau)
    moved = (peak_t - higher_t) - (peak_s - higher_s)
    from_s, from_t = s - higher_s, t - higher_t
    e = tl.exp(from_t * inv_tau)
    total_s = total_s * tl.exp((peak_s - higher_s) * inv_tau) + tl.exp(from_s * inv_tau)
    cross = scale_t * (cross + total_t * moved) + tl.where(e == 0, 0, e * (from_t - from_s))
    return higher_s, total_s, higher_t, total_t * scale_t + e, cross


@triton.jit
def merge_lanes(state, inv_tau, AXIS: tl.constexpr):
    """The softmaxes over ``AXIS`` of those of :func:`grow_lanes`."""
    peaks_s, totals_s, peaks_t, totals_t, crosses = state
    peak_s, peak_t = tl.max(peaks_s, AXIS), tl.max(peaks_t, AXIS)
    lower_s, lower_t = peaks_s - tl.expand_dims(peak_s, AXIS), peaks_t - tl.expand_dims(peak_t, AXIS)
    scale_t = tl.exp(lower_t * inv_tau)
    total_s = tl.sum(totals_s * tl.exp(lower_s * inv_tau), AXIS)
    cross = tl.sum(tl.where(scale_t == 0, 0, scale_t * (crosses + totals_t * (lower_t - lower_s))), AXIS)
    return peak_s, total_s, peak_t, tl.sum(totals_t * scale_t, AXIS), cross


@triton.jit
def divergence(inv_tau, total_s, total_t, cross):
    """KL(softmax(t / tau) || softmax(s / tau)); exactly 0 for equal s and t.

    Uses the logarithm of the ratio: a difference of logarithms near log(H*W) loses digits. Approximate division may
    give x / x != 1. The fused multiply-add is explicit, since ptxas otherwise fuses a division's last product in some of
    the kernels only: a loss would then depend on whether its gradient is computed with it.
    """
    return tl.fma(cross * inv_tau, 1 / total_t, tl.where(total_s == total_t, 0, tl.log(total_s / total_t)))


@triton.jit
def difference(s, t, to_log2, norms):
    """softmax(s) - softmax(t) of a tile [inner, reduced]; exactly 0 where s, t and their norms are equal.

    Each is one exponential. With a normalising factor, a fused multiply-add would round only one side.

    Args:
        to_log2: log2(e) / tau.
        norms: (inner,) each: the peak of s and log2 of its sum, the same for t.
    """
    p_s = tl.exp2((s - tl.expand_dims(norms[0], 1)) * to_log2 - tl.expand_dims(norms[1], 1))
    p_t = tl.exp2((t - tl.expand_dims(norms[2], 1)) * to_log2 - tl.expand_dims(norms[3], 1))
    return p_s - p_t

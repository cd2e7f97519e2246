"""Sigmoid, softplus and the KL of Bernoulli distributions, stable at any logit.

Arguments are logits times log2(e), so that an exponential is one instruction; softplus and KL are in nats. Everything
is computed from exp(-|x|) <= 1, with the relative accuracy of the accumulator.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .resize.preparation import BOUND32, BOUND64

LN2 = tl.constexpr(0.6931471805599453)
INFINITY = tl.constexpr(float("inf"))


@triton.jit
def log1p(x):
    """log(1 + x) for x in [0, 1], as 2 atanh(x / (2 + x)); each term of the series is at most 1/9 of the previous."""
    TERMS: tl.constexpr = 15 if x.dtype == tl.float64 else 6
    ratio = x / (2 + x)
    square = ratio * ratio
    series = square * (1.0 / (2 * TERMS + 1))
    for i in tl.static_range(1, TERMS):
        series = (series + 1.0 / (2 * (TERMS - i) + 1)) * square
    return 2 * ratio + 2 * ratio * series


@triton.jit
def softplus_and_sigmoid(x):
    small = tl.exp2(-tl.abs(x))
    softplus = tl.maximum(x, 0, propagate_nan=tl.PropagateNan.ALL) * LN2 + log1p(small)
    return softplus, tl.where(x >= 0, 1, small) / (1 + small)


@triton.jit
def unbounded(loss):
    """``loss``, set to inf where interpolated logits include +-inf, which :func:`kernels.resize.prepare` bounds."""
    return tl.where(loss > (BOUND64 if loss.dtype == tl.float64 else BOUND32), INFINITY, loss)


@triton.jit
def bernoulli(s, t, BOUNDED: tl.constexpr):
    """KL(Bernoulli(sigmoid(t)) || Bernoulli(sigmoid(s))), and sigmoid(s) - sigmoid(t); exactly 0 for equal s and t.

    Uses the outcome, class or complement, that t finds less likely; probability 0 contributes 0 for any s.
    BOUNDED: s has no infinities.
    """
    mirrored = t > 0
    s = tl.where(mirrored, -s, s)
    t = -tl.abs(t)
    soft_s, p_s = softplus_and_sigmoid(s)
    soft_t, p_t = softplus_and_sigmoid(t)
    divergence = tl.where(p_t == 0, 0, p_t * (t - s)) * LN2 + (soft_s - soft_t)
    if not BOUNDED:
        divergence = tl.where(s == INFINITY, INFINITY, divergence)  # not inf - inf
    return divergence, tl.where(mirrored, p_t - p_s, p_s - p_t)

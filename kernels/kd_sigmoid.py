"""KD with a sigmoid per class: loss[p] = weight * tau^2 * sum_c KL(sigmoid(T[c, p] / tau) || sigmoid(S[c, p] / tau)).

Loss and gradient come from one read of S and T: 2 * bytes(S) + bytes(T). Tiling, labels and reductions are those of
:mod:`kernels.kd`.
"""

from __future__ import annotations

from functools import partial

import triton
import triton.language as tl

from . import kd
from .kd import counted_pixels, gradient_scale
from .sigmoid import bernoulli
from .softmax import LOG2E
from .tiles import locate, tile_of


@triton.jit
def _kd_sigmoid(
    student,  # map, any float dtype
    teacher,  # map, any float dtype
    labels,  # kd.Labels
    out,  # kd.Out
    tau: tl.float64,
    scale: tl.float64,  # of the stored value: the loss for "none", else the gradient
    counts,  # (1, parts) ACC: counted labels, for a mean; or None
    parts,
    BLOCK: tl.constexpr,  # for ``counts``
    g,  # tiles.Tiles
):
    at = locate(g)
    tau = tl.full((), tau, tl.float64)
    scale = tl.full((), scale, tl.float64)
    to_log2 = (1 / tau * LOG2E).to(g.ACC)
    pixel = at.outer * g.inner + at.inner
    counted = counted_pixels(labels, pixel, at.inside, at.length)
    weight = tl.full([g.BLOCK_INNER], 1, g.ACC)
    if labels.weight is not None:
        weight = tl.load(labels.weight + pixel, mask=at.inside, other=0)
    factor = weight * gradient_scale(scale * tau, counts, parts, BLOCK).to(g.ACC)
    total = tl.zeros([g.BLOCK_INNER], g.ACC)
    for start in range(0, at.length, g.BLOCK_REDUCED):
        offset, mask = tile_of(g, at, start)
        s = tl.load(student + offset, mask=mask, other=0).to(g.ACC) * to_log2
        t = tl.load(teacher + offset, mask=mask, other=0).to(g.ACC) * to_log2
        divergence, difference = bernoulli(s, t, False)
        total += tl.sum(divergence, 1)
        if out.gradient is not None:
            d = tl.where(counted[:, None], difference * factor[:, None], 0)
            tl.store(out.gradient + offset, d.to(out.gradient.dtype.element_ty), mask=mask)
    value = tl.where(counted, total * weight, 0)
    if out.loss is not None:
        tl.store(out.loss + pixel, value * (scale * tau * tau).to(g.ACC), mask=at.inside)
    program = tl.program_id(0).to(tl.int64)
    tl.store(out.part + program, tl.sum(value))
    tl.store(out.part + tl.num_programs(0) + program, tl.sum(counted.to(tl.int32)).to(g.ACC))


forward = partial(kd.forward, kernel=_kd_sigmoid)
gradient = partial(kd.gradient, kernel=_kd_sigmoid)

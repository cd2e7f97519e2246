"""The copy of the logits, at their size, that every loss at label resolution reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..launch import accumulator, launch

LOG2E = 1.4426950408889634
# Replaces -inf: its exponential is 0 after any interpolation, and a weight of 0 removes it.
LOW32 = tl.constexpr(-1e37)
LOW64 = tl.constexpr(-1e300)
# Bounds if +inf is replaced too: a sum over 4096 classes of finite logits stays below, one infinite logit with weight
# 1e-11 is above.
BOUND32 = tl.constexpr(1e25)
BOUND64 = tl.constexpr(1e288)


class Logits(NamedTuple):
    """Output of :func:`prepare`."""

    data: Any  # (N, C, h + 2, w + 2) ACC
    peak: Any  # (N, h + 2, w + 2) ACC: maximum over classes
    classes: Any
    height: Any  # of the logits
    width: Any
    right: Any  # steps to the neighbouring logits: 0 along an axis that is not resized
    below: Any


class Source(NamedTuple):
    """An input map."""

    data: Any  # (N, C, h, w), any float dtype
    stride_n: Any
    stride_c: Any
    stride_x: Any


@triton.jit
def _copy(
    source,  # Source
    to,  # Logits
    block,
    samples,
    k: tl.float64,
    BOUNDED: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_CLASSES: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
):
    low: tl.constexpr = LOW64 if tl.float64 == ACC else LOW32
    scale = tl.full((), k, tl.float64).to(ACC)
    row = to.width + 2
    plane = tl.cast(to.height + 2, tl.int64) * row
    at = block.to(tl.int64) * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
    inside = at < samples * plane
    n = at // plane
    p = (at % plane).to(tl.int32)
    y = tl.minimum(tl.maximum(p // row - 1, 0), to.height - 1)
    x = tl.minimum(tl.maximum(p % row - 1, 0), to.width - 1)
    given = source.data + n * source.stride_n + (y * to.width + x).to(tl.int64) * source.stride_x
    kept = to.data + n * to.classes * plane + p
    peak = tl.full([BLOCK_PIXELS], low, ACC)
    for first in range(0, to.classes, BLOCK_CLASSES):
        c = (first + tl.arange(0, BLOCK_CLASSES)).to(tl.int64)
        mask = (c < to.classes)[:, None] & inside[None, :]
        logit = tl.load(given[None, :] + c[:, None] * source.stride_c, mask=mask, other=low).to(ACC)
        value = tl.maximum(logit * scale, low, propagate_nan=tl.PropagateNan.ALL)
        if BOUNDED:
            most = tl.where(tl.abs(logit) == float("inf"), -low, (BOUND64 if tl.float64 == ACC else BOUND32) * 1e-5)
            value = tl.minimum(value, most, propagate_nan=tl.PropagateNan.ALL)
            value = tl.maximum(value, -most, propagate_nan=tl.PropagateNan.ALL)
        tl.store(kept[None, :] + c[:, None] * plane, value, mask=mask)
        peak = tl.maximum(peak, tl.max(value, 0))
    tl.store(to.peak + at, peak, mask=inside)


@triton.jit
def _prepare(
    first, first_to, second, second_to, samples, blocks, k: tl.float64,
    BOUNDED: tl.constexpr, ACC: tl.constexpr, BLOCK_CLASSES: tl.constexpr, BLOCK_PIXELS: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    if second is None:
        _copy(first, first_to, block, samples, k, BOUNDED, ACC, BLOCK_CLASSES, BLOCK_PIXELS)
    else:
        if block < blocks:
            _copy(first, first_to, block, samples, k, BOUNDED, ACC, BLOCK_CLASSES, BLOCK_PIXELS)
        else:
            _copy(second, second_to, block - blocks, samples, k, BOUNDED, ACC, BLOCK_CLASSES, BLOCK_PIXELS)


def prepare(size: Sequence[int], scale: float, *maps: Tensor, bounded: bool = False) -> list[Logits]:
    """Copies one or two dense maps (N, C, h, w), times ``scale`` * log2(e), in one launch.

    Args:
        bounded: also make +inf finite: its softmax is NaN, but its sigmoid is 1.
    """
    acc, ACC = accumulator(*maps)
    to, sources, blocks = [], [], []
    for x in maps:
        n, c, h, w = x.shape
        plane = (h + 2) * (w + 2)
        memory = x.new_empty(n * (c + 1) * plane, dtype=acc)
        to.append(Logits(memory[n * plane :], memory, c, h, w, int(size[1] != w), (w + 2) * (size[0] != h)))
        nchw = x.is_contiguous()
        sources.append(Source(x, c * h * w, h * w if nchw else 1, 1 if nchw else c))
        blocks.append(triton.cdiv(n * plane, 64))
    second, second_to = (sources[1], to[1]) if len(maps) > 1 else (None, None)
    launch(
        _prepare, (sum(blocks),), maps[0], sources[0], to[0], second, second_to, maps[0].shape[0], blocks[0],
        scale * LOG2E, BOUNDED=bounded, ACC=ACC, BLOCK_CLASSES=16, BLOCK_PIXELS=64,
    )  # fmt: skip
    return to

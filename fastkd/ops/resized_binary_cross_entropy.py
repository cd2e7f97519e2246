"""Fused bilinear resize and binary cross-entropy, each class against the rest.

    z = bilinear(logits)[n, c, p];  softplus(x) = max(x, 0) + log(1 + exp(-|x|))
    loss[n, c, p] = pixel_weight[p] * pos_weight[c] * softplus(-z)   where target[n, c, p] is 1
                    pixel_weight[p] * softplus(z)                    where it is 0
    d / dz        = pixel_weight[p] * pos_weight[c] * (sigmoid(z) - 1), pixel_weight[p] * sigmoid(z)

``target`` is (N, C, H, W); elements that are ``ignore_index`` or neither 0 nor 1 do not count. The count is of
elements. ``pixel_weight`` is (N, 1, h', w') or (N, C, h', w') of any size, resized like the logits. Loss and gradient
(at logit size) are computed together; besides the target, no tensor of N*C*H*W elements exists.
"""

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from ._operator import Draw, Loss, accumulator


def _fake(
    logits: Tensor,
    target: Tensor,
    pos_weight: Tensor | None,
    pixel_weight: Tensor | None,
    ignore_index: int,
    align_corners: bool,
    reduction: str,
    scale: float,
):
    acc = accumulator(logits)
    return logits.new_empty(target.shape if reduction == "none" else (), dtype=acc), logits.new_empty((), dtype=acc)


def _samples(draw: Draw) -> Iterator[tuple[Any, ...]]:
    n, classes, _, _ = draw.shape
    target = draw.elements()
    for pos_weight in (None, draw.weight(classes)):
        for pixel_weight in (None, draw.weight(n, 1, 3, 2), draw.weight(n, classes, *draw.size)):
            for align_corners in (False, True):
                yield draw.map(0), target, pos_weight, pixel_weight, 255, align_corners


def _unit(logits: Tensor, target: Tensor, *rest: Any) -> float:
    return logits.shape[2] * logits.shape[3] / (target.shape[2] * target.shape[3])


RESIZED_BINARY_CROSS_ENTROPY = Loss(
    "resized_binary_cross_entropy",
    "Tensor logits, Tensor target, Tensor? pos_weight, Tensor? pixel_weight, int ignore_index, bool align_corners",
    _fake,
    _samples,
    early=("cpu", "triton", "cuda"),
    unit=_unit,
    pixel_weight=3,
    any_weight=lambda logits, target, pos_weight, pixel_weight, *rest: (
        pos_weight is not None or pixel_weight is not None
    ),
    one_weight=lambda logits, *rest: (logits.shape[0], 1, 1, 1),
)
OPERATORS = RESIZED_BINARY_CROSS_ENTROPY.operators()

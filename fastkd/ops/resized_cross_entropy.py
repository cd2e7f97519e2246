"""Cross-entropy at label resolution of logits at their own (docs/full-resolution.md).

    loss[p] = class_weight[y] * pixel_weight[p] * -log softmax(bilinear(logits)[p])[y]

The loss and its gradient at logit size are made together; nothing of N*C*H*W elements exists.
"""

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from ._operator import Draw, Loss, accumulator


def _fake(
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    pixel_weight: Tensor | None,
    selected: Tensor | None,
    ignore_index: int,
    align_corners: bool,
    reduction: str,
    scale: float,
):
    acc = accumulator(logits)
    return logits.new_empty(target.shape if reduction == "none" else (), dtype=acc), logits.new_empty((), dtype=acc)


def _samples(draw: Draw) -> Iterator[tuple[Any, ...]]:
    n, classes, _, _ = draw.shape
    for class_weight in (None, draw.weight(classes)):
        for pixel_weight in (None, draw.weight(n, *draw.size), draw.weight(n, 3, 2)):
            for selected in (None, draw.mask()):
                for align_corners in (False, True):
                    yield draw.map(0), draw.labels(), class_weight, pixel_weight, selected, 255, align_corners


def _unit(logits: Tensor, target: Tensor, *rest: Any) -> float:
    return logits.shape[2] * logits.shape[3] / (target.shape[1] * target.shape[2])


RESIZED_CROSS_ENTROPY = Loss(
    "resized_cross_entropy",
    # selected: bool (N, H, W), the pixels that count; for CUDA and Triton also their log-sum-exp where it is known, NaN
    # where a pixel does not count.
    "Tensor logits, Tensor target, Tensor? class_weight, Tensor? pixel_weight, Tensor? selected, int ignore_index, "
    "bool align_corners",
    _fake,
    _samples,
    early=("cpu", "triton", "cuda"),
    unit=_unit,
    pixel_weight=3,
    any_weight=lambda logits, target, class_weight, pixel_weight, *rest: (
        class_weight is not None or pixel_weight is not None
    ),
    returns_kept=True,
)
OPERATORS = RESIZED_CROSS_ENTROPY.operators()

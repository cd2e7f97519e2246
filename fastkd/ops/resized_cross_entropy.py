"""Fused bilinear resize and cross-entropy (docs/full-resolution.md).

    loss[p] = class_weight[y] * pixel_weight[p] * -log softmax(bilinear(logits)[p])[y]

Loss and gradient (at logit size) are computed together; no tensor of N*C*H*W elements exists.
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
    # selected: bool (N, H, W), the pixels that count; for CUDA and Triton alternatively their log-sum-exp, NaN where a
    # pixel does not count.
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


def _shaped_fake(
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    pixel_weight: Tensor | None,
    ignore_index: int,
    align_corners: bool,
    label_smoothing: float,
    focal_gamma: float,
    reduction: str,
    scale: float,
):
    return _fake(logits, target, None, None, None, ignore_index, align_corners, reduction, scale)


def _shaped_samples(draw: Draw) -> Iterator[tuple[Any, ...]]:
    n, classes, _, _ = draw.shape
    for class_weight in (None, draw.weight(classes)):
        for pixel_weight in (None, draw.weight(n, *draw.size), draw.weight(n, 3, 2)):
            for align_corners, smoothing, gamma in ((False, 0.1, 0.0), (True, 0.0, 2.0), (False, 0.0, 0.5)):
                yield draw.map(0), draw.labels(), class_weight, pixel_weight, 255, align_corners, smoothing, gamma


# With label smoothing or a focal factor; at most one is nonzero. With w = class_weight (else 1),
# W = sum_c w_c, l_c = -log p_c, m = pixel_weight, a counted pixel p with label y has
#
#     smoothing e:  loss = m ((1 - e) w_y l_y + e / C sum_c w_c l_c)
#                   d loss / d z_c = m (((1 - e) w_y + e W / C) p_c - (1 - e) w_y [c = y] - e w_c / C)
#     focal g:      loss = m w_y (1 - p_y)^g l_y
#                   d loss / d z_c = m w_y f (p_c - [c = y]),  f = q^g (1 + g p_y l_y / q), q = 1 - p_y
#
# l_y / q goes to 1 as q goes to 0. Both count the sum of w_y over the counted pixels. sum_c w_c z_c is linear in the
# logits, so it is interpolated as one more channel.
RESIZED_SHAPED_CROSS_ENTROPY = Loss(
    "resized_shaped_cross_entropy",
    "Tensor logits, Tensor target, Tensor? class_weight, Tensor? pixel_weight, int ignore_index, bool align_corners, "
    "float label_smoothing, float focal_gamma",
    _shaped_fake,
    _shaped_samples,
    early=("cpu", "triton", "cuda"),
    unit=_unit,
    pixel_weight=3,
    any_weight=lambda logits, target, class_weight, pixel_weight, *rest: (
        class_weight is not None or pixel_weight is not None
    ),
    returns_kept=True,
)
OPERATORS = (*RESIZED_CROSS_ENTROPY.operators(), *RESIZED_SHAPED_CROSS_ENTROPY.operators())

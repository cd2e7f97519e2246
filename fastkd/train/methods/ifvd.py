"""IFVD: intra-class feature variation (Wang et al., ECCV 2020).

Per image, a class's prototype is the mean feature of its pixels. The variation map M is the cosine of each pixel's
feature with its class's prototype. The loss is the mean of (M(S) − M(T))²: over labelled pixels in variant "paper";
over all pixels in variant "published", the code behind the published tables, where an ignored pixel is its own
prototype and contributes 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastkd.ranges import NonNegative
from fastkd.train.methods.base import (
    Distiller,
    FeatureConfig,
    OnFeatures,
    Pair,
    Variant,
    check_variant,
    no_autocast,
    precise,
    unit,
)


@dataclass
class IFVDConfig(FeatureConfig):
    """Intra-class feature variation.

    Args:
        variant: mean over all pixels ("published") or over labelled ones ("paper").
    """

    weight: NonNegative = 20.0
    variant: Variant = "published"

    def build(self, pair: Pair) -> Distiller:
        loss = IFVDLoss(
            pair.student.classes, variant=self.variant, ignore_index=pair.ignore_index, loss_weight=self.weight
        )
        return OnFeatures(loss, self, pair, labelled=True, over_valid=self.variant == "paper")


class IFVDLoss(nn.Module):
    """forward(student (N, C, h, w), teacher (N, C', h, w), target (N, H, W)) -> 0-d; 0 if no pixel has a label.

    Labels are resized to the features' size by nearest neighbour; labels outside [0, K) do not count.
    """

    def __init__(
        self,
        classes: int,
        *,
        variant: Variant = "published",
        ignore_index: int = 255,
        loss_weight: float = 20.0,
    ):
        super().__init__()
        check_variant(variant)
        self.variant = variant
        self.classes, self.ignore_index, self.loss_weight = classes, ignore_index, loss_weight

    def forward(self, student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
        member = membership(target, (student.shape[-2], student.shape[-1]), self.classes, self.ignore_index)
        member = member.to(precise(student).dtype)
        with no_autocast(student):
            difference = variation(student, member) - variation(teacher, member.to(precise(teacher).dtype))
        valid = member.sum(1)
        total = (difference.square() * valid).sum()
        count = valid.sum().clamp(min=1) if self.variant == "paper" else max(valid.numel(), 1)
        return self.loss_weight * total / count


def membership(target: Tensor, size: tuple[int, int], classes: int, ignore_index: int) -> Tensor:
    """Labels (N, H, W) -> bool (N, K, h·w), the class of each pixel of the smaller map; all False where ignored."""
    label = F.interpolate(target[:, None].float(), size, mode="nearest").long().flatten(2)
    kinds = torch.arange(classes, device=target.device).view(1, -1, 1)
    return (label == kinds) & (label != ignore_index)


def variation(feature: Tensor, member: Tensor) -> Tensor:
    """(N, C, h, w) and membership (N, K, P) -> cosine of each pixel with its class's mean, (N, P); 0 where ignored."""
    x = precise(feature).flatten(2)
    mean = member @ x.mT / member.sum(2, keepdim=True).clamp(min=1)
    norm = torch.linalg.vector_norm(x, dim=1)
    # Compute all classes, then select each pixel's own: K numbers per pixel instead of a C-channel prototype.
    own = (unit(mean, 2) @ x * member).sum(1)
    return own / torch.where(norm == 0, torch.inf, norm)

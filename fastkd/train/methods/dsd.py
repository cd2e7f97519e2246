"""DSD: double similarity distillation (Feng et al., TIP 2021, arXiv 2107.08591).

With q_l the normalised attention map of layer l (see AT), two variants:

"published", the code behind the published tables. Pixel term: R = (q_m − q_n) / ‖q_m − q_n‖ for each pair of layers
n < m, the logits being the last; the mean over pairs of the mean of (R(S) − R(T))². Category term: with z the logits
averaged over 2×2 pixels, and p the softmax of z/τ over the pixels of each class, G = p pᵀ is (K, K); the mean of
(G(S) − G(T))².

"paper", the paper as restated by later work. Pixel term: R_l = q_{l+1} − q_l of consecutive layers without the logits;
the sum over l of the mean of (R_l(S) − R_l(T))². Category term: with p the softmax over classes, each class's plane
divided by its norm, the mean of (G(S) − G(T))².

If sizes differ, the deeper map is resized to the shallower.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastkd.ranges import NonNegative, Positive
from fastkd.train.methods.at import attention
from fastkd.train.methods.base import (
    Distiller,
    FeatureConfig,
    Pair,
    Variant,
    check_variant,
    compared_features,
    mean,
    no_autocast,
    precise,
    resize,
    unit,
)
from fastkd.train.models import Feature, Output


@dataclass
class DSDConfig(FeatureConfig):
    """Double similarity.

    Args:
        weight: weight of the pixel term; 0 leaves it out.
        features: names of the taps, from shallow to deep; None: all that both share.
        category_weight: weight of the category term; 0 leaves it out.
        temperature: temperature of its softmax; None: 4 in variant "published", 1 in "paper".
        variant: "published" compares every pair of layers, logits included; "paper" consecutive ones (docs/methods.md).
    """

    weight: NonNegative = 1000.0
    category_weight: NonNegative = 10.0
    temperature: Positive | None = None
    variant: Variant = "published"

    def build(self, pair: Pair) -> Distiller:
        names: tuple[str, ...] = ()
        if self.weight > 0:
            names = compared_features(pair, self.features)
            if self.variant == "paper" and len(names) < 2:
                raise ValueError(
                    f"DSD's pixel term compares consecutive layers, but only {list(names)} is tapped in both networks; tap "
                    'two or more from shallow to deep, e.g. --model.features \'{low: "encoder[-2]", high: "encoder[-1]"}\' '
                    "in student and teacher, or leave the term out with --loss.dsd.weight 0"
                )
        loss = DSDLoss(
            variant=self.variant,
            loss_weight=self.weight,
            category_weight=self.category_weight,
            temperature=self.temperature,
        )
        return _DSD(loss, names)


class DSDLoss(nn.Module):
    """forward(student logits, teacher logits (N, K, h, w), student features, teacher features) -> 0-d.

    Features are sequences of (N, C, H, W), from shallow to deep; sizes and channels may differ between layers, and
    channels between student and teacher.
    """

    def __init__(
        self,
        *,
        variant: Variant = "published",
        loss_weight: float = 1000.0,
        category_weight: float = 10.0,
        temperature: float | None = None,
    ):
        super().__init__()
        check_variant(variant)
        self.published = variant == "published"
        self.temperature = temperature or (4.0 if self.published else 1.0)
        self.loss_weight, self.category_weight = loss_weight, category_weight

    def forward(
        self, student: Tensor, teacher: Tensor, student_features: Sequence[Tensor], teacher_features: Sequence[Tensor]
    ) -> Tensor:
        total = precise(student).new_zeros(())
        if student_features and self.loss_weight > 0:
            layers = [
                [*f, z] if self.published else f for f, z in ((student_features, student), (teacher_features, teacher))
            ]
            total = total + self.loss_weight * (published_pixel if self.published else paper_pixel)(*layers)
        if self.category_weight > 0:
            similarity = class_similarity if self.published else correlation
            with no_autocast(student):
                s, t = (similarity(x, self.temperature) for x in (student, teacher))
                total = total + self.category_weight * mean((s - t).square())
        return total


def published_pixel(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Mean over the pairs of at least two layers."""
    pairs = zip(combinations(maps(student), 2), combinations(maps(teacher), 2), strict=True)
    terms = [mean((_direction(*s) - _direction(*t)).square()) for s, t in pairs]
    return torch.stack(terms).mean()


def _direction(shallow: Tensor, deep: Tensor) -> Tensor:
    return unit((resize(deep, shallow) - shallow).flatten(1), 1)


def class_similarity(logits: Tensor, temperature: float) -> Tensor:
    """Inner products (N, K, K) of the classes' softmaxes over pixels."""
    pooled = F.avg_pool2d(precise(logits), 2, ceil_mode=True, count_include_pad=False)
    p = F.softmax(pooled.flatten(2) / temperature, 2)
    return torch.bmm(p, p.mT)


def paper_pixel(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Sum over consecutive layers."""
    pairs = zip(residuals(student), residuals(teacher), strict=True)
    return torch.stack([mean((s - t).square()) for s, t in pairs]).sum()


def maps(features: Sequence[Tensor]) -> list[Tensor]:
    """Attention maps (N, 1, H, W)."""
    return [attention(x).view(x.shape[0], 1, *x.shape[2:]) for x in features]


def residuals(features: Sequence[Tensor]) -> list[Tensor]:
    """Differences (N, 1, H, W) of the attention maps of consecutive features."""
    return [resize(deep, shallow) - shallow for shallow, deep in pairwise(maps(features))]


def correlation(logits: Tensor, temperature: float) -> Tensor:
    """Cosines (N, K, K) between the probability maps of the classes of an image."""
    p = unit(F.softmax(precise(logits) / temperature, 1).flatten(2), 2)
    return torch.bmm(p, p.mT)


class _DSD(Distiller):
    def __init__(self, loss: DSDLoss, names: tuple[str, ...]):
        super().__init__(loss.loss_weight, {name: Feature(name, None) for name in names})
        self.loss, self.names = loss, names

    def forward(self, student: Output, teacher: Output, labels: Tensor) -> Tensor:
        s = [student.features[name] for name in self.names]
        t = [resize(teacher.features[name], mine) for name, mine in zip(self.names, s, strict=True)]
        return self.loss(student.logits, teacher.logits, s, t)

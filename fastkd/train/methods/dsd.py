"""DSD: double similarity distillation (Feng et al., TIP 2021, arXiv 2107.08591), as restated by later work.

Pixel term: with q_l the normalised attention map of layer l (see AT), R_l = q_{l+1} − q_l is the residual between consecutive
layers, the deeper map resized to the shallower's size; the term is the sum over l of the mean of (R_l(S) − R_l(T))².
Category term: with p = softmax(z/τ), each class's plane divided by its Euclidean norm, G = p̂ p̂ᵀ is the (K, K) correlation of the
classes of an image; the term is the mean of (G(S) − G(T))².
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastkd.ranges import NonNegative, Positive
from fastkd.train.methods.at import attention
from fastkd.train.methods.base import (
    Distiller,
    FeatureConfig,
    Pair,
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
        weight: of the pixel term; 0 leaves it out.
        features: names of the taps in the order of the network, from shallow to deep; None: all that both share.
        category_weight: of the category term; 0 leaves it out.
        temperature: of the softmax over classes.
    """

    weight: NonNegative = 1000.0
    category_weight: NonNegative = 10.0
    temperature: Positive = 1.0

    def build(self, pair: Pair) -> Distiller:
        names: tuple[str, ...] = ()
        if self.weight > 0:
            names = compared_features(pair, self.features)
            if len(names) < 2:
                raise ValueError(
                    f"DSD's pixel term compares consecutive layers, but only {list(names)} is tapped in both networks; tap "
                    'two or more from shallow to deep, e.g. --model.features \'{low: "encoder[-2]", high: "encoder[-1]"}\' '
                    "in student and teacher, or leave the term out with --loss.dsd.weight 0"
                )
        loss = DSDLoss(loss_weight=self.weight, category_weight=self.category_weight, temperature=self.temperature)
        return _DSD(loss, names)


class DSDLoss(nn.Module):
    """forward(student logits, teacher logits (N, K, h, w), student features, teacher features) -> 0-d.

    The features are sequences of (N, C, H, W), from shallow to deep; sizes and channels may differ between layers, and channels
    between student and teacher.
    """

    def __init__(self, *, loss_weight: float = 1000.0, category_weight: float = 10.0, temperature: float = 1.0):
        super().__init__()
        self.loss_weight, self.category_weight, self.temperature = loss_weight, category_weight, temperature

    def forward(
        self, student: Tensor, teacher: Tensor, student_features: Sequence[Tensor], teacher_features: Sequence[Tensor]
    ) -> Tensor:
        total = precise(student).new_zeros(())
        for s, t in zip(residuals(student_features), residuals(teacher_features), strict=True):
            total = total + self.loss_weight * mean((s - t).square())
        if self.category_weight > 0:
            with no_autocast(student):
                s, t = (correlation(x, self.temperature) for x in (student, teacher))
                total = total + self.category_weight * mean((s - t).square())
        return total


def residuals(features: Sequence[Tensor]) -> list[Tensor]:
    """Differences (N, 1, H, W) of the attention maps of consecutive features."""
    maps = [attention(x).view(x.shape[0], 1, *x.shape[2:]) for x in features]
    return [resize(deep, shallow) - shallow for shallow, deep in pairwise(maps)]


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

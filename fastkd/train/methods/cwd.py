"""CWD: channel-wise distillation of logits, features or both (Shu et al., ICCV 2021, arXiv 2011.13256)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

import fastkd
from fastkd.ranges import NonNegative, Positive
from fastkd.train.methods.base import Distiller, FeatureConfig, OnFeatures, OnLogits, Pair
from fastkd.train.models import Output


@dataclass
class CWDConfig(FeatureConfig):
    """Channel-wise distillation.

    Args:
        weight: weight of the logits' term.
        feature_weight: weight of the mean over the compared features.
        temperature: temperature of the softmax over pixels.
        compare: "logits", "features" or "both".
    """

    weight: NonNegative = 3.0
    feature_weight: NonNegative = 50.0
    temperature: Positive = 4.0
    compare: Literal["logits", "features", "both"] = "logits"

    def build(self, pair: Pair) -> Distiller:
        parts: list[Distiller] = []
        if self.compare != "features":
            parts.append(OnLogits(fastkd.CWDLoss(temperature=self.temperature, loss_weight=self.weight)))
        if self.compare != "logits":
            loss = fastkd.CWDLoss(temperature=self.temperature, loss_weight=self.feature_weight)
            parts.append(OnFeatures(loss, self, pair, adapt="cwd"))
        return parts[0] if len(parts) == 1 else _Both(*parts)


class _Both(Distiller):
    def __init__(self, logits: Distiller, features: Distiller):
        super().__init__(logits.weight, features.features)
        self.on_logits, self.on_features = logits, features

    def forward(self, student: Output, teacher: Output, labels: Tensor) -> Tensor:
        return self.on_logits(student, teacher, labels) + self.on_features(student, teacher, labels)

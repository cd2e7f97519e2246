"""KD: pixel-wise KL divergence of the logits (Hinton, Vinyals, Dean, arXiv 1503.02531)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

import fastkd
from fastkd.ranges import NonNegative, Positive
from fastkd.train.methods.base import Distiller, OnLogits, Pair
from fastkd.train.models import Output


@dataclass
class KDConfig:
    """Pixel-wise KD on the logits, over all pixels, unlabelled ones included.

    Args:
        weight: weight of the term.
        temperature: temperature of the softmax over classes.
        resized: at label resolution instead of logit resolution.
    """

    weight: NonNegative = 1.0
    temperature: Positive = 1.0
    resized: bool = False

    def build(self, pair: Pair) -> Distiller:
        if not self.resized:
            return OnLogits(fastkd.KDLoss(temperature=self.temperature, loss_weight=self.weight))
        return _Resized(self.temperature, self.weight, pair.align_corners)


class _Resized(Distiller):
    def __init__(self, temperature: float, weight: float, align_corners: bool):
        super().__init__(weight)
        self.temperature, self.align_corners = temperature, align_corners

    def forward(self, student: Output, teacher: Output, labels: Tensor) -> Tensor:
        return self.weight * fastkd.resized_kd_loss(
            student.logits,
            teacher.logits,
            size=(labels.shape[-2], labels.shape[-1]),
            temperature=self.temperature,
            align_corners=self.align_corners,
        )

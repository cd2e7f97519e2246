"""FitNet: hints (Romero et al., ICLR 2015, arXiv 1412.6550, Eq. 3).

Mean squared difference between the teacher's features and the student's after a regressor: a 1x1 convolution if the
channels differ, otherwise the identity. The ½ of Eq. 3 is in the weight.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from fastkd.ranges import NonNegative
from fastkd.train.methods.base import Distiller, FeatureConfig, OnFeatures, Pair, mean, precise


@dataclass
class FitNetConfig(FeatureConfig):
    """Hints: mean squared difference of features."""

    weight: NonNegative = 10.0

    def build(self, pair: Pair) -> Distiller:
        return OnFeatures(FitNetLoss(loss_weight=self.weight), self, pair, adapt="fitnet")


class FitNetLoss(nn.Module):
    """forward(student, teacher), both (N, C, H, W) -> 0-d: mean over all elements of (S − T)²."""

    def __init__(self, *, loss_weight: float = 10.0):
        super().__init__()
        self.loss_weight = loss_weight

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        if student.shape != teacher.shape:
            raise ValueError(
                f"FitNet compares elements: got a student feature {tuple(student.shape)} and a teacher feature "
                f"{tuple(teacher.shape)}; put a 1x1 convolution on the student where C differs (the trainer does)"
            )
        return self.loss_weight * mean((precise(student) - precise(teacher)).square())

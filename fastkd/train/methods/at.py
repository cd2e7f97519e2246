"""AT: attention transfer (Zagoruyko and Komodakis, ICLR 2017, arXiv 1612.03928, Eq. 2 with F_sum^2).

The attention map is the sum of squares over channels, flattened and normalised: q(x) = vec(Σ_c x_c²) / ‖vec(Σ_c x_c²)‖.
The loss is the mean over samples and pixels of (q(S) − q(T))²; Eq. 2 of the paper has the norm of the difference. The
published weight 1e4 is for the mean of squares.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastkd.ranges import NonNegative
from fastkd.train.methods.base import Distiller, FeatureConfig, OnFeatures, Pair, mean, precise, unit


@dataclass
class ATConfig(FeatureConfig):
    """Attention transfer."""

    weight: NonNegative = 1e4

    def build(self, pair: Pair) -> Distiller:
        return OnFeatures(ATLoss(loss_weight=self.weight), self, pair)


class ATLoss(nn.Module):
    """forward(student (N, C, H, W), teacher (N, C', H, W)) -> 0-d; the channels may differ."""

    def __init__(self, *, loss_weight: float = 1e4):
        super().__init__()
        self.loss_weight = loss_weight

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        difference = attention(student) - attention(teacher)
        return self.loss_weight * mean(difference.square())


def attention(x: Tensor) -> Tensor:
    """(N, C, H, W) -> (N, H·W) with unit norm; 0 where the features are 0."""
    # The norm reduces without a squared copy of the features.
    energy = torch.linalg.vector_norm(precise(x), dim=1).square()
    return unit(energy.flatten(1), 1)

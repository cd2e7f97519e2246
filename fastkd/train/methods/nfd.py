"""NFD: mean squared difference of normalised features (arXiv 2207.05256)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import fastkd
from fastkd.ranges import NonNegative
from fastkd.train.methods.base import Distiller, FeatureConfig, OnFeatures, Pair


@dataclass
class NFDConfig(FeatureConfig):
    """Normalised feature distillation.

    Args:
        dims: axes of the z-score (see fastkd.nfd_loss).
    """

    weight: NonNegative = 5.0
    dims: Literal["hw", "nhw", "c", "chw"] = "hw"

    def build(self, pair: Pair) -> Distiller:
        return OnFeatures(fastkd.NFDLoss(dims=self.dims, loss_weight=self.weight), self, pair, adapt="nfd")

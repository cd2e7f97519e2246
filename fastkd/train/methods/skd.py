"""SKD, pair-wise: similarity of pixels (Liu et al., CVPR 2019 and TPAMI 2020, arXiv 1903.04197).

Features are pooled over patches of `pool` × `pool` pixels, the nodes of a graph (granularity β = pool², connection
range: all). a_ij is the cosine of the features of nodes i and j; the loss is the mean over images and all pairs of
(a_ij(S) − a_ij(T))². The paper uses average pooling, the code behind the published tables (variant "published") max
pooling. SKD's pixel-wise term is KD (`kd+skd`); its adversarial term is not included.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from fastkd.ranges import Count, NonNegative
from fastkd.train.methods.base import (
    Distiller,
    FeatureConfig,
    OnFeatures,
    Pair,
    Variant,
    check_variant,
    no_autocast,
    precise,
    sum_of_rows,
    unit,
)


@dataclass
class SKDConfig(FeatureConfig):
    """Pair-wise similarity.

    Args:
        pool: side of the pooled patches; 1 compares every pixel.
        variant: max pooling ("published") or average pooling ("paper").
    """

    weight: NonNegative = 10.0
    pool: Count = 2
    variant: Variant = "published"

    def build(self, pair: Pair) -> Distiller:
        return OnFeatures(SKDLoss(variant=self.variant, pool=self.pool, loss_weight=self.weight), self, pair)


class SKDLoss(nn.Module):
    """forward(student (N, C, H, W), teacher (N, C', H, W)) -> 0-d; the channels may differ."""

    def __init__(self, *, variant: Variant = "published", pool: int = 2, loss_weight: float = 10.0):
        super().__init__()
        check_variant(variant)
        if pool < 1:
            raise ValueError(f"pool: got {pool}, expected the side of a patch in pixels, at least 1")
        self.variant, self.pool, self.loss_weight = variant, pool, loss_weight

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        with no_autocast(student):
            s, t = (nodes(x, self.pool, maximum=self.variant == "published") for x in (student, teacher))
            count = s.shape[2]

            def term(start: int, stop: int) -> Tensor:
                a, b = (x[:, :, start:stop].mT @ x for x in (s, t))
                return F.mse_loss(a, b, reduction="sum")

            total = sum_of_rows(s, count, s.shape[0] * count, term)
            return self.loss_weight * total / max(s.shape[0] * count**2, 1)


def nodes(x: Tensor, pool: int, *, maximum: bool = False) -> Tensor:
    """(N, C, H, W) -> (N, C, P): features pooled over patches (clipped at the border), with unit norm."""
    x = precise(x)
    if pool > 1 and maximum:
        x = F.max_pool2d(x, pool, ceil_mode=True)
    elif pool > 1:
        x = F.avg_pool2d(x, pool, ceil_mode=True, count_include_pad=False)
    return unit(x.flatten(2), 1)

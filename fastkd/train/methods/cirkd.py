"""CIRKD, mini-batch pixel-to-pixel: similarity of pixels across images (Yang et al., CVPR 2022, arXiv 2204.06986).

With F_n (P, C) the unit-norm features of image n, S_ij = F_i F_jᵀ (P, P) holds the similarities of the pixels of images
i and j. Each row becomes a distribution, softmax(S_ij[a]/τ); the loss is the mean of KL(teacher ‖ student) over all
pairs of images (i = j too) and all rows. The paper's memory bank is not included.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

import fastkd
from fastkd.ranges import Count, NonNegative, Positive
from fastkd.train.methods.base import Distiller, FeatureConfig, OnFeatures, Pair, no_autocast, sum_of_rows
from fastkd.train.methods.skd import nodes


@dataclass
class CIRKDConfig(FeatureConfig):
    """Cross-image pixel-to-pixel similarity.

    Args:
        temperature: temperature of the softmax over similarities.
        pool: side of the patches that are averaged first; 1 compares every pixel.
    """

    weight: NonNegative = 1.0
    temperature: Positive = 0.1
    pool: Count = 1

    def build(self, pair: Pair) -> Distiller:
        loss = CIRKDLoss(temperature=self.temperature, pool=self.pool, loss_weight=self.weight)
        return OnFeatures(loss, self, pair)


class CIRKDLoss(nn.Module):
    """forward(student (N, C, H, W), teacher (N, C', H, W)) -> 0-d; the channels may differ.

    Time grows with (N·H·W)², memory does not: similarities are computed a span of rows at a time.
    """

    def __init__(self, *, temperature: float = 0.1, pool: int = 1, loss_weight: float = 1.0):
        super().__init__()
        if temperature <= 0 or pool < 1:
            raise ValueError(f"got temperature {temperature} and pool {pool}, expected temperature > 0 and pool >= 1")
        self.temperature, self.pool, self.loss_weight = temperature, pool, loss_weight

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        with no_autocast(student):
            s, t = (nodes(x, self.pool) for x in (student, teacher))
            images, _, pixels = s.shape
            flat = [x.transpose(1, 2).flatten(0, 1) for x in (s, t)]  # rows of all images, (N·P, C)

            def term(start: int, stop: int) -> Tensor:
                # (images j, rows, pixels of j): CWD's kernel takes the softmax over the pixels of each row.
                rows = [(f[start:stop] @ x).unsqueeze(2) for f, x in zip(flat, (s, t), strict=True)]
                return fastkd.cwd_loss(*rows, temperature=self.temperature, reduction="sum")

            total = sum_of_rows(s, images * pixels, images * pixels, term)
            pairs = images * images * pixels
            return self.loss_weight * total / (self.temperature**2 * max(pairs, 1))

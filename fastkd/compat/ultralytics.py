"""The loss of Ultralytics' semantic segmentation, implemented from its description.

Cross-entropy with class weights, Dice over the batch with smooth 1, and 0.4 times the cross-entropy of an auxiliary
head, times the batch size. Nothing of Ultralytics is imported or copied.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastkd._dice import DiceOptions
from fastkd._operators import Labels
from fastkd.functional import _resized_cross_entropy_dice_loss, resized_cross_entropy


class SemanticSegmentationLoss(nn.Module):
    """(cross-entropy + Dice + aux_weight · auxiliary cross-entropy) · N, and its parts for logging.

    Args:
        class_weight: (C,), for both cross-entropies.
        aux_weight: weight of the auxiliary head.
        ignore_index: label that does not count.
        align_corners: convention of the resize.
    """

    class_weight: Tensor | None

    def __init__(
        self,
        class_weight: Sequence[float] | Tensor | None = None,
        *,
        aux_weight: float = 0.4,
        ignore_index: int = 255,
        align_corners: bool = False,
    ):
        super().__init__()
        weight = None if class_weight is None else torch.as_tensor(class_weight, dtype=torch.float32)
        self.register_buffer("class_weight", weight, persistent=False)
        self.aux_weight, self.ignore_index, self.align_corners = aux_weight, ignore_index, align_corners

    def forward(self, logits: Tensor, target: Tensor, aux: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """
        Args:
            logits: (N, C, h, w). target: labels (N, H, W).
            aux: logits of the auxiliary head, or None.

        Returns:
            the loss, and the detached parts (3,): cross-entropy, Dice, auxiliary cross-entropy before its weight.
        """
        labels = Labels(target, self.class_weight, self.ignore_index, self.align_corners)
        weights = (1.0, 1.0, 0.0)
        out = _resized_cross_entropy_dice_loss(logits, labels, DiceOptions(), weights, 1.0, dice_class_weight=False)
        total, side = out.loss, torch.zeros_like(out.ce)
        if aux is not None:
            side = resized_cross_entropy(
                aux,
                target,
                class_weight=self.class_weight,
                ignore_index=self.ignore_index,
                align_corners=self.align_corners,
            )
            total = total + self.aux_weight * side
        return total * logits.shape[0], torch.stack([out.ce, out.dice, side]).detach()

"""Losses of CIRKD's training scripts, from what is published about them (that code has no licence and was not read).

Not here: its mini-batch and memory losses. The formula of the former, as the paper has it, is
`fastkd.train.methods.cirkd.CIRKDLoss`.
"""

from __future__ import annotations

from torch import Tensor, nn

from fastkd.functional import cwd_loss, kd_loss, resized_cross_entropy


class CriterionKD(nn.Module):
    """Pixel-wise KD of logits (N, C, h, w): the mean over pixels, times temperature²."""

    def __init__(self, temperature: float = 1):
        super().__init__()
        self.temperature = temperature

    def forward(self, pred: Tensor, soft: Tensor) -> Tensor:
        return kd_loss(pred, soft.detach(), temperature=self.temperature)


class CriterionCWD(nn.Module):
    """CWD (arXiv 2011.13256) of features or logits (N, C, h, w), times temperature².

    Args:
        norm_type: "channel", a softmax over the pixels of each channel, averaged over N and C; or "spatial", a softmax over the
            channels of each pixel, averaged over pixels.
        divergence: "kl".
        temperature: of the softmax.

    Raises:
        ValueError: another norm_type or divergence, whose normalisation is not published.
    """

    def __init__(self, norm_type: str, divergence: str, temperature: float = 1.0):
        super().__init__()
        if norm_type not in ("channel", "spatial") or divergence != "kl":
            raise ValueError(
                f"CriterionCWD: got norm_type {norm_type!r} and divergence {divergence!r}, expected 'channel' or 'spatial' with "
                "'kl'; keep the class you have for other combinations"
            )
        self.norm_type, self.divergence, self.temperature = norm_type, divergence, temperature

    def forward(self, preds_S: Tensor, preds_T: Tensor) -> Tensor:
        loss = cwd_loss if self.norm_type == "channel" else kd_loss
        return loss(preds_S, preds_T.detach(), temperature=self.temperature)


class SegCrossEntropyLoss(nn.Module):
    """Cross-entropy, the mean over pixels that are not `ignore_index`.

    `inputs` may be logits of the labels' size (N, C, H, W), as there, or of their own (N, C, h, w): then they are resized inside,
    bilinearly with align_corners=True, and the line that upsampled them can go.
    """

    def __init__(self, ignore_index: int = -1):
        super().__init__()
        self.ignore_index = ignore_index

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        return resized_cross_entropy(inputs, targets, ignore_index=self.ignore_index, align_corners=True)

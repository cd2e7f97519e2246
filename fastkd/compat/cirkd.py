"""Losses of CIRKD's training scripts, with their names, arguments and numerical results.

Implemented from the formulas and compared numerically with the originals. The memory bank and the adversarial loss are
not included.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from fastkd.functional import cwd_loss, kd_loss, resized_cross_entropy
from fastkd.train.methods.at import ATLoss
from fastkd.train.methods.base import mean, no_autocast, precise
from fastkd.train.methods.cirkd import CIRKDLoss
from fastkd.train.methods.dsd import class_similarity, published_pixel
from fastkd.train.methods.fitnet import FitNetLoss
from fastkd.train.methods.ifvd import IFVDLoss
from fastkd.train.methods.skd import SKDLoss


class CriterionKD(nn.Module):
    """Pixel-wise KD of logits (N, C, h, w): mean over pixels, times temperature²."""

    def __init__(self, temperature: float = 1):
        super().__init__()
        self.temperature = temperature

    def forward(self, pred: Tensor, soft: Tensor) -> Tensor:
        return kd_loss(pred, soft.detach(), temperature=self.temperature)


class CriterionCWD(nn.Module):
    """CWD (arXiv 2011.13256) of features or logits (N, C, h, w), times temperature².

    Args:
        s_channels, t_channels: channels of student and teacher; if they differ the student goes through `conv`, a 1x1
            convolution without bias.
        norm_type: "channel": softmax over the pixels of each channel, divided by N·C. "spatial": softmax over the
            channels of each pixel, divided by N·h·w. "none": the raw values, divided by N·h·w.
        divergence: "kl" (needs a softmax), or "mse", the sum of squared differences.
        temperature: of the softmax.

    Raises:
        ValueError: "kl" without a softmax, or an unknown option.
    """

    def __init__(
        self,
        s_channels: int,
        t_channels: int,
        norm_type: str = "none",
        divergence: str = "mse",
        temperature: float = 1.0,
    ):
        super().__init__()
        norms = ("channel", "spatial") if divergence == "kl" else ("channel", "spatial", "none")
        if divergence not in ("kl", "mse") or norm_type not in norms:
            raise ValueError(
                f"CriterionCWD: got norm_type {norm_type!r} and divergence {divergence!r}, expected 'channel' or 'spatial' with "
                "'kl', or these or 'none' with 'mse'"
            )
        self.norm_type, self.divergence, self.temperature = norm_type, divergence, temperature
        self.conv = nn.Conv2d(s_channels, t_channels, kernel_size=1, bias=False)

    def forward(self, preds_S: Tensor, preds_T: Tensor) -> Tensor:
        if preds_S.shape[1] != preds_T.shape[1]:
            preds_S = self.conv(preds_S)
        preds_T = preds_T.detach()
        if self.divergence == "kl":
            loss = cwd_loss if self.norm_type == "channel" else kd_loss
            return loss(preds_S, preds_T, temperature=self.temperature)
        s, t = (self._normalised(precise(x)) for x in (preds_S, preds_T))
        n, c, h, w = preds_S.shape
        return (
            (s - t).square().sum() * self.temperature**2 / max(n * c if self.norm_type == "channel" else n * h * w, 1)
        )

    def _normalised(self, x: Tensor) -> Tensor:
        if self.norm_type == "none":
            return x
        x = x / self.temperature
        return x.flatten(2).softmax(2) if self.norm_type == "channel" else x.softmax(1)


class CriterionAT(nn.Module):
    """AT (arXiv 1612.03928): mean squared difference of attention maps."""

    def __init__(self) -> None:
        super().__init__()
        self.loss = ATLoss(loss_weight=1)

    def forward(self, feat_S: Tensor, feat_T: Tensor) -> Tensor:
        return self.loss(feat_S, feat_T.detach())


class CriterionFitNet(nn.Module):
    """FitNet (arXiv 1412.6550): mean squared difference after `conv`, a 1x1 convolution without bias on the student."""

    def __init__(self, s_channels: int, t_channels: int):
        super().__init__()
        self.conv = nn.Conv2d(s_channels, t_channels, kernel_size=1, bias=False)
        self.loss = FitNetLoss(loss_weight=1)

    def forward(self, feat_S: Tensor, feat_T: Tensor) -> Tensor:
        return self.loss(self.conv(feat_S), feat_T.detach())


class CriterionStructuralKD(nn.Module):
    """SKD, pair-wise (arXiv 1903.04197), with 2×2 max-pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.loss = SKDLoss(loss_weight=1)

    def forward(self, feat_S: Tensor, feat_T: Tensor) -> Tensor:
        return self.loss(feat_S, feat_T.detach())


class CriterionDoubleSimKD(nn.Module):
    """DSD (arXiv 2107.08591): pixel loss and category loss of lists of layers of one size; the last are the logits."""

    def forward(self, feat_S_list: Sequence[Tensor], feat_T_list: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        student, teacher = list(feat_S_list), [x.detach() for x in feat_T_list]
        if not len(student) == len(teacher) >= 2:
            raise ValueError(
                f"CriterionDoubleSimKD: got {len(student)} and {len(teacher)} layers, expected two or more of each"
            )
        with no_autocast(student[-1]):
            s, t = (class_similarity(layers[-1], 4.0) for layers in (student, teacher))
        return published_pixel(student, teacher), mean((s - t).square())


class CriterionIFV(nn.Module):
    """IFVD (ECCV 2020), mean over all pixels; labels outside 0 to classes − 1 are ignored."""

    def __init__(self, classes: int):
        super().__init__()
        self.loss = IFVDLoss(classes, loss_weight=1)

    def forward(self, feat_S: Tensor, feat_T: Tensor, target: Tensor) -> Tensor:
        return self.loss(feat_S, feat_T.detach(), target)


class CriterionMiniBatchCrossImagePair(nn.Module):
    """CIRKD's mini-batch loss (arXiv 2204.06986).

    Args:
        temperature: of the softmax over similarities.
        pooling: first average the features over 2×2.
    """

    def __init__(self, temperature: float, pooling: bool = False):
        super().__init__()
        self.loss = CIRKDLoss(temperature=temperature, pool=2 if pooling else 1, loss_weight=1)

    def forward(self, feat_S: Tensor, feat_T: Tensor) -> Tensor:
        return self.loss(feat_S, feat_T.detach())


class SegCrossEntropyLoss(nn.Module):
    """Cross-entropy, mean over pixels that are not `ignore_index`.

    `inputs` have the labels' size (N, C, H, W), as in CIRKD, or another size (N, C, h, w) and are then resized
    bilinearly with align_corners=True.
    """

    def __init__(self, ignore_index: int = -1):
        super().__init__()
        self.ignore_index = ignore_index

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        return resized_cross_entropy(inputs, targets, ignore_index=self.ignore_index, align_corners=True)

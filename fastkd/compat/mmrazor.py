"""Losses of mmrazor 1.0. In a configuration: `type="fastkd.compat.mmrazor.KLDivergence"`."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from fastkd._arguments import check_word
from fastkd.compat._kl import REDUCTIONS, kl_div
from fastkd.functional import cwd_loss, nfd_loss


class ChannelWiseDivergence(nn.Module):
    """CWD of (N, C, H, W): tau² / (N·C) times the sum over channels of the KL between softmaxes over pixels."""

    def __init__(self, tau: float = 1.0, loss_weight: float = 1.0):
        super().__init__()
        self.tau, self.loss_weight = tau, loss_weight

    def forward(self, preds_S: Tensor, preds_T: Tensor) -> Tensor:
        return self.loss_weight * cwd_loss(preds_S, preds_T, temperature=self.tau)


class KLDivergence(nn.Module):
    """tau² times the KL over dimension 1 of (N, C) or (N, C, H, W).

    Args:
        tau: temperature.
        reduction: as in torch: "batchmean" divides by N, "mean" by the number of elements (N·C·H·W, not by pixels).
        loss_weight: factor.
        teacher_detach: False propagates a gradient to the teacher, in plain PyTorch.
    """

    def __init__(
        self, tau: float = 1.0, reduction: str = "batchmean", loss_weight: float = 1.0, teacher_detach: bool = True
    ):
        super().__init__()
        check_word("reduction", reduction, REDUCTIONS)
        self.tau, self.reduction, self.loss_weight, self.teacher_detach = tau, reduction, loss_weight, teacher_detach

    def forward(self, preds_S: Tensor, preds_T: Tensor) -> Tensor:
        if self.teacher_detach:
            preds_T = preds_T.detach()
        return self.loss_weight * self.tau**2 * kl_div(preds_S, preds_T, self.tau, self.reduction)


class PKDLoss(nn.Module):
    """PKD (arXiv 2207.02039): half the mean squared difference of features normalised per channel over the batch.

    The variance is unbiased. mmrazor adds 1e-6 to the standard deviation, this class adds its square to the variance:
    the loss differs by a relative error of about 1e-6 / deviation.

    Args:
        loss_weight: factor.
        resize_stu: if sizes differ, resize (bilinearly) the student to the teacher; False: the teacher to the student.

    forward(preds_S, preds_T): (N, C, H, W), or a sequence of those, whose losses are summed.
    """

    def __init__(self, loss_weight: float = 1.0, resize_stu: bool = True):
        super().__init__()
        self.loss_weight, self.resize_stu = loss_weight, resize_stu

    def forward(self, preds_S: Tensor | Sequence[Tensor], preds_T: Tensor | Sequence[Tensor]) -> Tensor:
        if isinstance(preds_S, Tensor):
            preds_S, preds_T = (preds_S,), (preds_T,)  # type: ignore[assignment]
        terms = [self._one(s, t) for s, t in zip(preds_S, preds_T, strict=True)]
        return self.loss_weight * sum(terms[1:], terms[0])

    def _one(self, student: Tensor, teacher: Tensor) -> Tensor:
        if student.shape[2:] != teacher.shape[2:]:
            if self.resize_stu:
                student = F.interpolate(student, teacher.shape[2:], mode="bilinear")
            else:
                teacher = F.interpolate(teacher, student.shape[2:], mode="bilinear")
        count = student.numel() // max(student.shape[1], 1)
        unbiased = (count - 1) / max(count, 1)
        return unbiased / 2 * nfd_loss(student, teacher, dims="nhw", eps=1e-12)

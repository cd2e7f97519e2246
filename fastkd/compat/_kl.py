"""`F.kl_div` of two softmaxes, with its reductions, on the KD kernel."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from fastkd._arguments import check_word
from fastkd.functional import kd_loss

REDUCTIONS = ("none", "batchmean", "sum", "mean")


def kl_div(student: Tensor, teacher: Tensor, temperature: float, reduction: str) -> Tensor:
    """KL(softmax(T / tau) || softmax(S / tau)) over dimension 1, not multiplied by tau^2.

    Args:
        student, teacher: logits (N, C) or (N, C, ...).
        reduction: as in torch: "mean" divides by the number of elements, not of pixels; "batchmean" by N. "none" is
            elementwise and has no kernel.
    """
    check_word("reduction", reduction, REDUCTIONS)
    if reduction == "none" or teacher.requires_grad:  # no kernel has an elementwise result or a teacher gradient
        log_s = F.log_softmax(student / temperature, 1)
        return F.kl_div(log_s, F.softmax(teacher / temperature, 1), reduction=reduction)
    student, teacher = (_four_dimensions(x) for x in (student, teacher))
    kind = "mean_all" if reduction == "mean" else reduction
    loss = kd_loss(student, teacher, temperature=temperature, reduction=kind) / temperature**2
    return loss / student.shape[1] if reduction == "mean" else loss


def _four_dimensions(x: Tensor) -> Tensor:
    if x.dim() == 4:
        return x
    return x[:, :, None, None] if x.dim() == 2 else x.flatten(2)[..., None]

"""`KDLoss` of torchdistill 1.1. To use it by name in its YAML, register it: docs/drop-in.md."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastkd._arguments import check_word
from fastkd.compat._kl import REDUCTIONS, kl_div
from fastkd.functional import resized_cross_entropy


class KDLoss(nn.Module):
    """alpha · CE + beta · temperature² · KL; without alpha or targets, KL alone, not times temperature².

    Args:
        student_module_path, student_module_io: the student's logits are io_dict[path][io].
        teacher_module_path, teacher_module_io: the same for the teacher.
        temperature: of both softmaxes.
        alpha: weight of the cross-entropy; None or 0 leaves it out.
        beta: weight of the KL; None: 1 − alpha.
        reduction: as in torch's KLDivLoss ("batchmean" divides by N, "mean" by the number of elements). The
            cross-entropy uses the same, but "mean" for "batchmean".
        kwargs: of torch's CrossEntropyLoss (weight, ignore_index, label_smoothing).
    """

    def __init__(
        self,
        student_module_path: str,
        student_module_io: str,
        teacher_module_path: str,
        teacher_module_io: str,
        temperature: float,
        alpha: float | None = None,
        beta: float | None = None,
        reduction: str = "batchmean",
        **kwargs: Any,
    ):
        super().__init__()
        check_word("reduction", reduction, REDUCTIONS)
        self.student_module_path, self.student_module_io = student_module_path, student_module_io
        self.teacher_module_path, self.teacher_module_io = teacher_module_path, teacher_module_io
        self.temperature, self.alpha, self.reduction = temperature, alpha, reduction
        self.beta = 1 - (alpha or 0) if beta is None else beta
        self.cross_entropy_loss = nn.CrossEntropyLoss(
            reduction="mean" if reduction == "batchmean" else reduction, **kwargs
        )

    def forward(
        self,
        student_io_dict: Mapping,
        teacher_io_dict: Mapping,
        targets: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        student = _find("student", student_io_dict, self.student_module_path, self.student_module_io)
        teacher = _find("teacher", teacher_io_dict, self.teacher_module_path, self.teacher_module_io)
        soft = kl_div(student, teacher, self.temperature, self.reduction)
        if not self.alpha or targets is None:
            return soft
        return self.alpha * self._hard(student, targets) + self.beta * self.temperature**2 * soft

    def _hard(self, logits: Tensor, targets: Tensor) -> Tensor:
        plain = self.cross_entropy_loss
        if logits.dim() != 4 or targets.dim() != 3 or plain.label_smoothing > 0 or plain.reduction == "none":
            return plain(logits, targets)
        return resized_cross_entropy(
            logits, targets, class_weight=plain.weight, ignore_index=plain.ignore_index, reduction=plain.reduction
        )


def _find(who: str, io_dict: Mapping, path: str, io: str) -> Tensor:
    if path not in io_dict or io not in io_dict[path]:
        raise KeyError(
            f"KDLoss: no {who} output [{path!r}][{io!r}]; recorded are "
            f"{ {name: list(entry) for name, entry in io_dict.items()} }: set {who}_module_path and {who}_module_io, and the "
            "forward hooks of the configuration"
        )
    found = io_dict[path][io]
    if not isinstance(found, torch.Tensor):
        raise TypeError(
            f"KDLoss: the {who}'s [{path!r}][{io!r}] is a {type(found).__name__}, expected a tensor of logits"
        )
    return found

"""Losses of segmentation-models-pytorch 0.5 and 0.6 in mode "multiclass": same names, arguments and results.

Logits (N, C, h, w) may be smaller than the labels (N, H, W): they are resized inside. If no pixel counts the loss is 0,
where the original may be NaN.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastkd._arguments import check_float, check_target, check_word
from fastkd._dice import dice_sums
from fastkd._operators import Labels
from fastkd.functional import resized_cross_entropy
from fastkd.ops import accumulator
from fastkd.reference import resize, valid_pixels

NO_LABEL = -(1 << 31)  # ignore_index that ignores nothing


class DiceLoss(nn.Module):
    """Dice over the batch; mean over all classes, to which classes without a pixel contribute 0.

    Args:
        mode: "multiclass".
        classes: only these.
        log_loss: -log(dice) instead of 1 - dice.
        smooth: added to the numerator and, as often as in the mean of both sums, to the denominator.
        eps: minimum of the denominator.
        ignore_index: label that does not count.
        class_weights: for all classes; the mean is then weighted.
    """

    class_weights: Tensor | None

    def __init__(
        self,
        mode: str,
        classes: Sequence[int] | None = None,
        log_loss: bool = False,
        from_logits: bool = True,
        smooth: float = 0.0,
        ignore_index: int | None = None,
        eps: float = 1e-7,
        class_weights: Sequence[float] | None = None,
    ):
        super().__init__()
        _only_multiclass(mode, from_logits)
        self.mode, self.log_loss, self.smooth, self.eps = mode, log_loss, smooth, eps
        self.classes = None if classes is None else [int(c) for c in classes]
        self.ignore_index = ignore_index
        self.register_buffer("class_weights", _weights(class_weights), persistent=False)

    def forward(self, y_pred: Tensor, y_true: Tensor) -> Tensor:
        ignored = _check(y_pred, y_true, self.ignore_index)
        sums = dice_sums(y_pred, Labels(y_true, None, ignored, False), False, 3).sum(0)
        labelled = sums[:, 2]
        score = (sums[:, 0] + self.smooth) / ((sums[:, 1] + labelled) / 2 + self.smooth).clamp_min(self.eps)
        terms = -score.clamp_min(self.eps).log() if self.log_loss else 1 - score
        terms = torch.where(labelled > 0, terms, 0)
        weights = None if self.class_weights is None else self.class_weights.double()
        if self.classes is not None:
            terms = terms[self.classes]
            weights = None if weights is None else weights[self.classes]
        loss = terms.mean() if weights is None else (terms * weights).sum() / weights.sum()
        return loss.to(accumulator(y_pred))


class FocalLoss(nn.Module):
    """Focal loss of each class against the rest, from a sigmoid; mean over the classes.

    There is no kernel: classes are resized and computed one after another, and recomputed in the backward, so that only
    one at a time is at label size.

    Args:
        mode: "multiclass".
        alpha: weight of the class, 1 - alpha that of the rest; None: no weights.
        gamma: exponent.
        reduction: per class: "mean" or "sum" over the pixels that count.
        normalized: divide by the sum of the focal factors.
        reduced_threshold: the factor is 1 where the probability p of the right answer is below it, else ((1 - p) /
            threshold)^gamma.
        class_weights: the mean over the classes is then weighted.
    """

    class_weights: Tensor | None

    def __init__(
        self,
        mode: str,
        alpha: float | None = None,
        gamma: float | None = 2.0,
        ignore_index: int | None = None,
        from_logits: bool = True,
        eps: float = 1e-7,
        reduction: str | None = "mean",
        normalized: bool = False,
        reduced_threshold: float | None = None,
        class_weights: Sequence[float] | None = None,
    ):
        super().__init__()
        _only_multiclass(mode, from_logits)
        check_word("reduction", str(reduction), ("mean", "sum"))
        self.mode, self.alpha, self.gamma, self.reduction = mode, alpha, 2.0 if gamma is None else gamma, reduction
        self.normalized, self.reduced_threshold, self.ignore_index = normalized, reduced_threshold, ignore_index
        self.register_buffer("class_weights", _weights(class_weights), persistent=False)

    def forward(self, y_pred: Tensor, y_true: Tensor) -> Tensor:
        ignored = _check(y_pred, y_true, self.ignore_index)
        valid = valid_pixels(y_true, y_pred.shape[1], ignored)
        terms = torch.stack(
            [
                checkpoint(self._one, y_pred[:, c : c + 1], y_true == c, valid, use_reentrant=False)
                for c in range(y_pred.shape[1])
            ]
        )
        if self.class_weights is None:
            return terms.mean()
        weights = self.class_weights.to(terms.dtype)
        return (terms * weights).sum() / weights.sum()

    def _one(self, logits: Tensor, target: Tensor, valid: Tensor) -> Tensor:
        x = resize(logits, (valid.shape[-2], valid.shape[-1]), False)[:, 0]
        loss = -F.logsigmoid(torch.where(target, x, -x))
        rest = -torch.expm1(-loss)  # 1 - probability of the right answer
        factor = rest.clamp(min=torch.finfo(loss.dtype).tiny) ** self.gamma
        if self.reduced_threshold is not None:
            reduced = factor / self.reduced_threshold**self.gamma
            factor = torch.where(rest > 1 - self.reduced_threshold, 1, reduced)
        terms = factor * loss
        if self.alpha is not None:
            terms = terms * torch.where(target, self.alpha, 1 - self.alpha)
        total = torch.where(valid, terms, 0).sum()
        if self.normalized:
            total = total / torch.where(valid, factor, 0).sum().clamp_min(1e-6)
        return total / valid.sum().clamp(min=1) if self.reduction == "mean" else total


class SoftCrossEntropyLoss(nn.Module):
    """Cross-entropy with label smoothing; "mean" is over all pixels, ignored ones too.

    Args:
        reduction: "mean", "sum" or "none".
        smooth_factor: label smoothing; None for 0.
        ignore_index: label that contributes 0; None: every pixel counts.
        dim: 1.
    """

    def __init__(
        self,
        reduction: str = "mean",
        smooth_factor: float | None = None,
        ignore_index: int | None = -100,
        dim: int = 1,
    ):
        super().__init__()
        check_word("reduction", reduction, ("mean", "sum", "none"))
        if dim != 1:
            raise ValueError(f"dim: got {dim}, expected 1, that of the classes of logits (N, C, h, w)")
        self.reduction, self.smooth_factor, self.ignore_index, self.dim = reduction, smooth_factor, ignore_index, dim

    def forward(self, y_pred: Tensor, y_true: Tensor) -> Tensor:
        loss = resized_cross_entropy(
            y_pred,
            y_true,
            ignore_index=NO_LABEL if self.ignore_index is None else self.ignore_index,
            reduction="mean_all" if self.reduction == "mean" else self.reduction,
            label_smoothing=self.smooth_factor or 0.0,
        )
        return loss[:, None] if self.reduction == "none" and self.ignore_index is not None else loss


def _only_multiclass(mode: str, from_logits: Any) -> None:
    if mode != "multiclass":
        raise ValueError(
            f"mode: got {mode!r}, expected 'multiclass'; keep segmentation_models_pytorch's class for others"
        )
    if not from_logits:
        raise ValueError("from_logits: got False, expected True: the kernels take logits")


def _check(logits: Tensor, target: Tensor, ignore_index: int | None) -> int:
    check_float("y_pred", logits)
    if logits.shape[1] == 1:
        raise ValueError(f"y_pred: got shape {tuple(logits.shape)}, expected at least 2 classes in mode multiclass")
    ignored = NO_LABEL if ignore_index is None else ignore_index
    check_target(target, logits, (logits.shape[0], None, None), ignored)
    return ignored


def _weights(weights: Sequence[float] | None) -> Tensor | None:
    return None if weights is None else torch.as_tensor(weights, dtype=torch.float32)

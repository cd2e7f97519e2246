"""`DiceLoss` and `DiceCELoss` of MONAI 1.4 to 1.6 with ``softmax=True, to_onehot_y=True``: same arguments and results.

Logits (N, C, h, w) may be smaller than the labels (N, 1, H, W): they are resized inside. Volumes (N, C, D, H, W) must
have the size of their labels (N, 1, D, H, W).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastkd._arguments import as_map, check_float, check_number, check_target, check_word
from fastkd._dice import cross_entropy_of, dice_sums
from fastkd._operators import Labels
from fastkd.ops import accumulator

NO_LABEL = -(1 << 31)  # ignore_index that ignores nothing


class DiceLoss(nn.Module):
    """Dice per image and class, or per class over the batch, averaged.

    Args:
        include_background: False leaves class 0 out.
        to_onehot_y, softmax: must be True.
        squared_pred: squared terms in the denominator.
        jaccard: the Jaccard index instead.
        reduction: "mean" over images and classes, "sum" or "none".
        smooth_nr, smooth_dr: added to the numerator and the denominator.
        batch: sum over the batch.
        weight: per class (without class 0 if it is left out); a factor that does not enter the mean's denominator.
        ignore_index: label of voxels that do not count.
    """

    class_weight: Tensor | None

    def __init__(
        self,
        include_background: bool = True,
        to_onehot_y: bool = False,
        sigmoid: bool = False,
        softmax: bool = False,
        other_act: Callable | None = None,
        squared_pred: bool = False,
        jaccard: bool = False,
        reduction: str = "mean",
        smooth_nr: float = 1e-5,
        smooth_dr: float = 1e-5,
        batch: bool = False,
        weight: Sequence[float] | float | Tensor | None = None,
        soft_label: bool = False,
        ignore_index: int | None = None,
    ):
        super().__init__()
        _only_softmax(softmax, to_onehot_y, sigmoid, other_act, soft_label)
        self.reduction = _reduction(reduction)
        self.include_background, self.squared_pred, self.jaccard = include_background, squared_pred, jaccard
        self.smooth_nr, self.smooth_dr, self.batch, self.ignore_index = smooth_nr, smooth_dr, batch, ignore_index
        weight = None if weight is None else torch.as_tensor(weight, dtype=torch.float32)
        self.register_buffer("class_weight", weight, persistent=False)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        sums = _sums(input, target, self.ignore_index, self.squared_pred, 3)
        terms = self.of_sums(sums).to(accumulator(input))
        return terms.reshape(*terms.shape, *[1] * (input.dim() - 2)) if self.reduction == "none" else terms

    def of_sums(self, sums: Tensor) -> Tensor:
        """Dice from the sums of :mod:`fastkd.ops.resized_dice`, in fp64."""
        sums = sums if self.include_background else sums[:, 1:]
        if self.batch:
            sums = sums.sum(0)
        both = sums[..., 1] + sums[..., 2]
        below = 2 * (both - sums[..., 0]) if self.jaccard else both
        terms = 1 - (2 * sums[..., 0] + self.smooth_nr) / (below + self.smooth_dr)
        if self.class_weight is not None:
            if self.class_weight.dim() and self.class_weight.shape[0] != terms.shape[-1]:
                raise ValueError(
                    f"weight: got {self.class_weight.shape[0]} weights, expected {terms.shape[-1]}, one a class"
                )
            terms = terms * self.class_weight.double()
        return terms.mean() if self.reduction == "mean" else terms.sum() if self.reduction == "sum" else terms


class DiceCELoss(nn.Module):
    """lambda_dice · Dice + lambda_ce · torch's cross-entropy, in shared passes over the logits.

    Args:
        weight: class weights of the cross-entropy and of Dice.
        label_smoothing: of the cross-entropy.
        The rest: as in :class:`DiceLoss`; reduction "mean" or "sum".
    """

    weight: Tensor | None

    def __init__(
        self,
        include_background: bool = True,
        to_onehot_y: bool = False,
        sigmoid: bool = False,
        softmax: bool = False,
        other_act: Callable | None = None,
        squared_pred: bool = False,
        jaccard: bool = False,
        reduction: str = "mean",
        smooth_nr: float = 1e-5,
        smooth_dr: float = 1e-5,
        batch: bool = False,
        weight: Tensor | None = None,
        lambda_dice: float = 1.0,
        lambda_ce: float = 1.0,
        label_smoothing: float = 0.0,
    ):
        super().__init__()
        check_word("reduction", _reduction(reduction), ("mean", "sum"))
        check_number("lambda_dice", lambda_dice, minimum=0)
        check_number("lambda_ce", lambda_ce, minimum=0)
        check_number("label_smoothing", label_smoothing, minimum=0, maximum=1)
        weight = None if weight is None else torch.as_tensor(weight, dtype=torch.float32)
        self.dice = DiceLoss(
            include_background,
            to_onehot_y,
            sigmoid,
            softmax,
            other_act,
            squared_pred,
            jaccard,
            reduction,
            smooth_nr,
            smooth_dr,
            batch,
            weight if weight is None or include_background else weight[1:],
        )
        self.register_buffer("weight", weight, persistent=False)
        self.lambda_dice, self.lambda_ce, self.label_smoothing = lambda_dice, lambda_ce, label_smoothing

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        sums = _sums(input, target, None, self.dice.squared_pred, 5 if self.label_smoothing else 4)
        ce = cross_entropy_of(sums, self.weight, self.label_smoothing, self.dice.reduction)
        return (self.lambda_dice * self.dice.of_sums(sums) + self.lambda_ce * ce).to(accumulator(input))


def _sums(input: Tensor, target: Tensor, ignore_index: int | None, square: bool, columns: int) -> Tensor:
    check_float("input", input, (4, 5))
    if input.shape[1] == 1:
        raise ValueError(f"input: got shape {tuple(input.shape)}, expected at least 2 channels for a softmax")
    if target.dim() != input.dim() or target.shape[1] != 1:
        raise ValueError(
            f"target: got shape {tuple(target.shape)}, expected labels of shape {(input.shape[0], 1)} and the spatial axes"
        )
    if input.dim() == 5 and target.shape[2:] != input.shape[2:]:
        raise ValueError(
            f"target: got shape {tuple(target.shape)}, expected the size of the input {tuple(input.shape)}; volumes are not "
            "resized"
        )
    input, labels = as_map(input), as_map(target)[:, 0]
    if labels.is_floating_point():  # MONAI's transforms return floating-point labels
        labels = labels.long()
    ignored = NO_LABEL if ignore_index is None else ignore_index
    check_target(labels, input, (input.shape[0], None, None), ignored)
    return dice_sums(input, Labels(labels, None, ignored, False), square, columns)


def _reduction(word: Any) -> str:
    word = getattr(word, "value", word)  # MONAI's enum
    check_word("reduction", word, ("mean", "sum", "none"))
    return word


def _only_softmax(softmax: bool, to_onehot_y: bool, *others: Any) -> None:
    if not softmax or not to_onehot_y or any(others):
        raise ValueError(
            "expected softmax=True and to_onehot_y=True, and none of sigmoid, other_act and soft_label; keep monai's class for "
            "others"
        )

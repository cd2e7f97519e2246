"""Dice and cross-entropy from per-sample and per-class sums over label pixels, in fp64, differentiated by autograd."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import backends, reference
from ._arguments import dense, dense_each
from ._operators import Labels, nothing
from .ops import evaluate
from .ops.resized_dice import RESIZED_DICE


class DiceOptions(NamedTuple):
    """Variants of Dice, see `resized_dice_loss`."""

    batch: bool = True
    smooth: float = 1.0
    square: bool = False
    background: bool = True
    present: bool = False


def dice_sums(logits: Tensor, labels: Labels, square: bool, columns: int) -> Tensor:
    """The sums of `fastkd.ops.resized_dice`, (N, C, columns) in fp64; a single logit becomes class 1 of two."""
    target, _, ignore_index, align_corners = labels
    if logits.shape[1] == 1:
        logits = torch.cat([torch.zeros_like(logits), logits], 1)  # softmax of (0, z) is sigmoid(z)
    backend = backends.choose("resized_dice", logits.device)
    if logits.numel() == 0 or target.numel() == 0:
        return nothing(logits, (), "sum").double().expand(*logits.shape[:2], columns)
    if backend == "reference":
        size = (target.shape[-2], target.shape[-1])
        return reference.dice_sums(reference.resize(logits, size, align_corners), target, ignore_index, square, columns)
    (logits,) = dense_each(logits)
    options = (ignore_index, align_corners, square, columns)
    return evaluate(RESIZED_DICE, backend, "none", 1, logits, dense(target), *options)


def dice_of(sums: Tensor, classes: int, class_weight: Tensor | None, options: DiceOptions, reduction: str) -> Tensor:
    """The Dice loss from the sums of `dice_sums`, in fp64."""
    sums = sums[:, -classes:]  # for a single logit, the second of its two classes
    if options.batch:
        sums = sums.sum(0)
    labelled = sums[..., 2]
    above, below = 2 * sums[..., 0] + options.smooth, sums[..., 1] + labelled + options.smooth
    empty = below == 0
    terms = 1 - torch.where(empty, 1, above / torch.where(empty, 1, below))
    weight = torch.ones_like(labelled) if class_weight is None else class_weight.double().expand_as(labelled)
    if not options.background and classes > 1:
        weight = torch.cat([torch.zeros_like(weight[..., :1]), weight[..., 1:]], -1)
    if options.present:
        weight = weight * (labelled > 0)
    terms = torch.where(weight == 0, 0, terms * weight)
    if reduction == "none":
        return terms
    count = weight.sum()
    return terms.sum() / torch.where(count == 0, 1, count) if reduction == "mean" else terms.sum()


def cross_entropy_of(sums: Tensor, class_weight: Tensor | None, label_smoothing: float, reduction: str) -> Tensor:
    """The "mean" or "sum" of the cross-entropy from the sums of :func:`dice_sums`, in fp64."""
    sums = sums.sum(0)
    if class_weight is not None:
        sums = sums * class_weight.double()[:, None]
    ce = sums[:, 3].sum()
    if label_smoothing:
        ce = (1 - label_smoothing) * ce + label_smoothing * sums[:, 4].mean()
    if reduction == "sum":
        return ce
    count = sums[:, 2].sum()
    return ce / torch.where(count == 0, 1, count)

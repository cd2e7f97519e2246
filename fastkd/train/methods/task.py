"""The task loss: labels at label resolution, alone or with a method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

import fastkd
from fastkd.ranges import CountOrZero, NonNegative, Share

Task = Literal["ce", "ce+dice", "ohem", "focal", "bce"]


@dataclass
class DiceConfig:
    """Dice of the task "ce+dice".

    Args:
        weight: weight of Dice; that of the cross-entropy is 1.
        batch: sum over a process's part of the batch; false: per image.
        smooth: added to numerator and denominator.
        square: squared probabilities in the denominator.
        background: whether class 0 counts.
        present: whether only classes with a labelled pixel count.
    """

    weight: NonNegative = 1.0
    batch: bool = True
    smooth: NonNegative = 1.0
    square: bool = False
    background: bool = True
    present: bool = False


@dataclass
class OHEMConfig:
    """Online hard example mining, the task "ohem".

    Args:
        threshold: pixels whose label has at most this probability are hard.
        min_kept: minimum number of hard pixels in a process's part of the batch.
    """

    threshold: Share = 0.7
    min_kept: CountOrZero = 100_000


class TaskLoss(nn.Module):
    """The task loss by parts: forward(logits, labels) -> {"task": 0-d, and "dice" for the task "ce+dice"}.

    ``over_valid`` names the parts that are means over valid pixels.
    """

    def __init__(
        self,
        task: str,
        *,
        label_smoothing: float = 0.0,
        focal_gamma: float = 2.0,
        dice: DiceConfig | None = None,
        ohem: OHEMConfig | None = None,
        ignore_index: int = 255,
        align_corners: bool = False,
    ):
        super().__init__()
        dice, ohem = dice or DiceConfig(), ohem or OHEMConfig()
        where: dict[str, Any] = {"ignore_index": ignore_index, "align_corners": align_corners}
        self.kind, self.ignore_index = task, ignore_index
        self.weights = {"task": 1.0}
        self.over_valid = frozenset({"task"}) if task != "ohem" else frozenset()
        self.loss: nn.Module
        if task == "ce":
            self.loss = fastkd.ResizedCrossEntropyLoss(label_smoothing=label_smoothing, **where)
        elif task == "focal":
            self.loss = fastkd.ResizedCrossEntropyLoss(focal_gamma=focal_gamma, **where)
        elif task == "ohem":
            self.loss = fastkd.ResizedOHEMCrossEntropyLoss(threshold=ohem.threshold, min_kept=ohem.min_kept, **where)
        elif task == "bce":
            self.loss = fastkd.ResizedBinaryCrossEntropyLoss(**where)
        elif task == "ce+dice":
            self.weights["dice"] = dice.weight
            self.loss = fastkd.ResizedCrossEntropyDiceLoss(
                dice_weight=dice.weight,
                label_smoothing=label_smoothing,
                batch=dice.batch,
                smooth=dice.smooth,
                square=dice.square,
                background=dice.background,
                present=dice.present,
                **where,
            )
        else:
            raise ValueError(f"loss.task: got {task!r}, expected one of {', '.join(get_args(Task))}")

    def forward(self, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        if self.kind == "ce+dice":
            out = self.loss(logits, labels)
            return {"task": out.ce, "dice": self.weights["dice"] * out.dice}
        if self.kind == "bce":
            labels = one_against_the_rest(labels, logits.shape[1], self.ignore_index)
        return {"task": self.loss(logits, labels)}


def one_against_the_rest(labels: Tensor, classes: int, ignore_index: int) -> Tensor:
    """Labels (N, H, W) -> (N, C, H, W) of 0 and 1, ``ignore_index`` where ignored; one byte per element."""
    dtype = torch.uint8 if 0 <= ignore_index < 256 else torch.int32
    each = torch.arange(classes, device=labels.device)[:, None, None]
    return (labels[:, None] == each).to(dtype).masked_fill(labels[:, None] == ignore_index, ignore_index)

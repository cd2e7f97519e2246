"""RDD: the task term weighted by relative difficulty (arXiv 2407.03719). It replaces the task's cross-entropy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

import fastkd
from fastkd.losses import CITYSCAPES_CLASS_WEIGHTS
from fastkd.ranges import CountOrZero, NonNegative, Positive, Share
from fastkd.train.methods.base import Pair


@dataclass
class RDDConfig:
    """Relative difficulty distillation; None: the preset's value (see fastkd.RDDLoss).

    Args:
        weight: weight of the whole loss.
        preset: "paper", or "official" for the released code.
        tfe_steps: length of the TFE stage; 0 skips it; the teacher then needs no auxiliary head.
        kd_weight: weight of the KD term.
        temperature: temperature of the KD term.
        threshold: pixels up to this confidence are hard.
        min_kept: minimum number of hard pixels.
        select: which pixels contribute to the task loss in TSE.
        class_weight: one number per class, "cityscapes" for those of the released code, or None. Used in TSE only.
        align_corners: convention of the bilinear resize.
        blend: fade TFE out over the run, as in the released code.
    """

    weight: NonNegative = 1.0
    preset: Literal["paper", "official"] = "paper"
    tfe_steps: CountOrZero | None = None
    kd_weight: NonNegative = 1.0
    temperature: Positive = 1.0
    threshold: Share | None = None
    min_kept: CountOrZero | None = None
    select: Literal["xor", "or", "and", "student", "student_only"] = "xor"
    class_weight: tuple[NonNegative, ...] | Literal["cityscapes"] | None = None
    align_corners: bool | None = None
    blend: bool = False

    def build(self, pair: Pair, total_steps: int, aux_weight: float) -> fastkd.RDDLoss:
        """Raises ValueError if the teacher lacks an auxiliary head that a stage needs, or class weights do not fit."""
        loss = fastkd.RDDLoss(
            total_steps,
            preset=self.preset,
            tfe_steps=self.tfe_steps,
            kd_weight=self.kd_weight,
            temperature=self.temperature,
            threshold=self.threshold,
            min_kept=self.min_kept,
            select=self.select,
            class_weight=self._class_weight(pair.student.classes),
            aux_weight=aux_weight,
            ignore_index=pair.ignore_index,
            align_corners=self.align_corners,
            blend=self.blend,
            loss_weight=self.weight,
        )
        if pair.teacher.has_aux:
            return loss
        if loss.tfe_steps > 0:
            raise ValueError(
                f"RDD's TFE stage ({loss.tfe_steps} steps) compares the teacher's main and auxiliary heads, but the teacher "
                "has no auxiliary head: train it with one (--model.aux 'encoder[-2]'), or leave TFE out with "
                "--loss.rdd.tfe_steps 0 (tfe_steps=0)"
            )
        if self.blend:
            raise ValueError(
                "loss.rdd.blend keeps the TFE term to the end, which needs the teacher's auxiliary head, and the teacher "
                "has none: train it with one (--model.aux), or set loss.rdd.blend false"
            )
        if aux_weight > 0:
            raise ValueError(
                "RDD's auxiliary term compares the auxiliary heads of student and teacher, but the teacher has none: train it "
                "with one (--model.aux), or the student without"
            )
        return loss

    def _class_weight(self, classes: int) -> torch.Tensor | None:
        if self.class_weight is None:
            return None
        values = CITYSCAPES_CLASS_WEIGHTS if self.class_weight == "cityscapes" else self.class_weight
        if len(values) != classes:
            raise ValueError(f"loss.rdd.class_weight has {len(values)} numbers, expected {classes}, one a class")
        return torch.tensor(values)

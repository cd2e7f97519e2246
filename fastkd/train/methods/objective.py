"""The objective of a run: the task loss and any sum of methods.

Without RDD the task is a loss at label resolution (task.py), plus `aux_weight` times the same on the student's
auxiliary head. With RDD the task term is RDD's (including its auxiliary term). Other terms are added.

The last images of a batch may be unlabelled. Task terms use only the labelled images, also in their denominators (valid
pixels, all pixels, class weights). Distillation terms use all images.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

import fastkd
from fastkd.train.methods.base import Distiller, Pair, first, resize
from fastkd.train.methods.registry import LossConfig, parse_method
from fastkd.train.methods.task import TaskLoss
from fastkd.train.models import Feature, Output, SegmentationModel

_AUX = {"task": "aux", "dice": "aux_dice"}  # parts of the task -> names on an auxiliary head


class Terms(NamedTuple):
    """total: 0-d. parts: its weighted summands. Both differentiable. info: other 0-d values to log, detached."""

    total: Tensor
    parts: dict[str, Tensor]
    info: dict[str, Tensor]


class Objective(nn.Module):
    """The losses of a method over a run of `total_steps`; no parameters.

    Args:
        method: "none" or a sum such as "nfd+rdd".
        config: weights and options.
        total_steps: length of the run, for RDD's stages.
        student: the student's network.
        teacher: the teacher, or None with method "none".
        ignore_index: label that is ignored.

    Raises:
        ValueError: the method cannot compare teacher and student: no teacher, different classes, no auxiliary head for
            RDD, or no feature tapped under the same name in both.
    """

    # Parts that use labels; the others use the teacher.
    task = frozenset({"task", "dice", "aux", "aux_dice", "rdd_task"})

    def __init__(
        self,
        method: str,
        config: LossConfig,
        *,
        total_steps: int,
        student: SegmentationModel,
        teacher: SegmentationModel | None,
        ignore_index: int = 255,
    ):
        super().__init__()
        words = parse_method(method)
        self.aux_weight = config.aux_weight if student.has_aux else 0.0
        self.labels: TaskLoss | None = None
        self.rdd: fastkd.RDDLoss | None = None
        if "rdd" not in words:
            self.labels = config.build_task(ignore_index)
        if teacher is None:
            if words:
                raise ValueError(f"method {method!r} needs a teacher, got none")
        elif "rdd" in words:
            pair = _pair(config, student, teacher, ignore_index)
            self.rdd = config.rdd.build(pair, total_steps, self.aux_weight)
            self.rdd_kd = fastkd.KDLoss(temperature=config.rdd.temperature, loss_weight=config.rdd.weight)
        self.distillers = nn.ModuleDict(_distillers(method, config, student, teacher, ignore_index))

    def forward(self, student: Output, teacher: Output | None, labels: Tensor, step: int) -> Terms:
        """Loss of one batch. labels: (L, H, W) of its first L images; step counts from 0."""
        info: dict[str, Tensor] = {}
        if teacher is not None:
            aux = None if teacher.aux is None else resize(teacher.aux, student.logits)
            teacher = Output(resize(teacher.logits, student.logits), teacher.features, aux)
        count = labels.shape[0]
        s = first(student, count)
        if self.labels is not None:
            terms = self.labels(s.logits, labels)
            if self.aux_weight > 0:
                aux = self.labels(s.aux, labels)
                terms |= {_AUX[name]: self.aux_weight * part for name, part in aux.items()}
            total = functools.reduce(operator.add, terms.values())
        elif self.rdd is not None and teacher is not None:
            t = first(teacher, count)
            aux = s.aux if self.aux_weight > 0 else None
            out = self.rdd(s.logits, t.logits, labels, step=step, teacher_aux=t.aux, student_aux=aux)
            total = out.loss
            terms = {"rdd_task": out.task, "rdd_kd": self.rdd.kd_weight * out.kd}
            info["rdd_selected"] = out.selected.detach()
            if (
                images := student.logits.shape[0]
            ) > count:  # RDD's KD is a mean over all pixels; add the unlabelled images
                rest = self.rdd_kd(student.logits[count:], teacher.logits[count:])
                terms["rdd_kd"] = self.rdd.kd_weight * (count * out.kd + (images - count) * rest) / images
                total = out.task + terms["rdd_kd"]
        if teacher is not None:
            for name, distil in self.distillers.items():
                terms[name] = distil(student, teacher, labels)
                total = total + terms[name]
        return Terms(total, terms, info)

    @property
    def valid_means(self) -> frozenset[str]:
        """Parts that are means over valid pixels, whose number differs between shares of a batch."""
        task = set() if self.labels is None else {*self.labels.over_valid, *(_AUX[n] for n in self.labels.over_valid)}
        return frozenset(task | {name for name, distil in self.distillers.items() if distil.over_valid})

    @property
    def weights(self) -> dict[str, float]:
        """The weight of each part."""
        if self.labels is not None:
            own = self.labels.weights
            task = own | {_AUX[name]: self.aux_weight * weight for name, weight in own.items()}
        elif self.rdd is not None:
            task = {"rdd_task": self.rdd.loss_weight}
        kd = {} if self.rdd is None else {"rdd_kd": self.rdd.loss_weight * self.rdd.kd_weight}
        return task | kd | {name: cast(float, distil.weight) for name, distil in self.distillers.items()}


def student_features(
    method: str, config: LossConfig, student: SegmentationModel, teacher: SegmentationModel | None
) -> dict[str, Feature]:
    """The features that a `Student` must return for this method, by name."""
    needed: dict[str, Feature] = {}
    for distiller in _distillers(method, config, student, teacher).values():
        needed |= distiller.features
    return needed


def _distillers(
    method: str,
    config: LossConfig,
    student: SegmentationModel,
    teacher: SegmentationModel | None,
    ignore_index: int = 255,
) -> dict[str, Distiller]:
    """The distillation terms."""
    if teacher is None:
        return {}
    pair = _pair(config, student, teacher, ignore_index)
    return {word: getattr(config, word).build(pair) for word in parse_method(method) if word != "rdd"}


def _pair(config: LossConfig, student: SegmentationModel, teacher: SegmentationModel, ignore_index: int) -> Pair:
    if student.classes != teacher.classes:
        raise ValueError(
            f"the teacher predicts {teacher.classes} classes and the student {student.classes}; train both on the same classes"
        )
    return Pair(student, teacher, ignore_index, config.align_corners)


@torch.no_grad()
def teacher_forward(teacher: Callable[[Tensor], Output], images: Tensor) -> Output:
    """The teacher's output, computed in inference mode, as tensors that autograd can save.

    Autograd cannot save inference tensors. The result is an ordinary tensor on the same memory (no copy).
    """
    with torch.inference_mode():
        out = teacher(images)
    features = {name: _ordinary(feature) for name, feature in out.features.items()}
    return Output(_ordinary(out.logits), features, None if out.aux is None else _ordinary(out.aux))


def _ordinary(x: Tensor) -> Tensor:
    alias = torch.empty(0, dtype=x.dtype, device=x.device)
    return alias.set_(x.untyped_storage(), x.storage_offset(), x.shape, x.stride())

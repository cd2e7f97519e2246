"""What a run minimises: the task loss and any sum of KD, NFD, CWD and RDD.

Without RDD the task is cross-entropy at label resolution, plus `aux_weight` times the same on the student's auxiliary head.
With RDD the task term is RDD's own (its auxiliary term included). The other terms stand beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastkd
from fastkd.train.config import LossConfig, parse_method
from fastkd.train.models import Output, SegmentationModel


class Terms(NamedTuple):
    """total: 0-d, differentiable. parts: its weighted summands, detached. info: other 0-d values to log, detached."""

    total: Tensor
    parts: dict[str, Tensor]
    info: dict[str, Tensor]


class Objective(nn.Module):
    """The losses of a method over a run of `total_steps`; it has no parameters.

    Args:
        method: "none" or a sum such as "nfd+rdd".
        config: weights and options.
        total_steps: length of the run (RDD's stages depend on it).
        student: the student's network.
        teacher: the teacher, or None with method "none".
        ignore_index: label that counts nowhere.

    Raises:
        ValueError: teacher and student cannot be compared by this method: no teacher, no auxiliary head where RDD needs one,
            no feature tapped under the same name in both.
    """

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
        self.ce: fastkd.ResizedCrossEntropyLoss | None = None
        self.rdd: fastkd.RDDLoss | None = None
        self.distillers: dict[str, Distiller] = {}  # the terms beside the task
        if teacher is None:
            if words:
                raise ValueError(f"method {method!r} needs a teacher, got none")
            self.ce = fastkd.ResizedCrossEntropyLoss(ignore_index=ignore_index)
            return
        if "rdd" in words:
            self.rdd = fastkd.RDDLoss(
                total_steps,
                preset=config.rdd.preset,
                tfe_steps=config.rdd.tfe_steps,
                kd_weight=config.rdd.kd_weight,
                temperature=config.rdd.temperature,
                threshold=config.rdd.threshold,
                min_kept=config.rdd.min_kept,
                select=config.rdd.select,
                aux_weight=self.aux_weight,
                ignore_index=ignore_index,
                loss_weight=config.rdd.weight,
            )
            _check_heads(self.rdd, teacher, self.aux_weight)
        else:
            self.ce = fastkd.ResizedCrossEntropyLoss(ignore_index=ignore_index)
        if "kd" in words:
            self.distillers["kd"] = _kd(config)
        if "nfd" in words:
            names = compared_features(student, teacher)
            nfd = fastkd.NFDLoss(dims=config.nfd.dims, loss_weight=config.nfd.weight / len(names))
            self.distillers["nfd"] = _on_features(nfd, names)
        if "cwd" in words:
            names = compared_features(student, teacher) if config.cwd.on == "features" else ()
            weight = config.cwd.weight / max(len(names), 1)
            cwd = fastkd.CWDLoss(temperature=config.cwd.temperature, loss_weight=weight)
            self.distillers["cwd"] = _on_features(cwd, names) if names else _on_logits(cwd)

    def forward(self, student: Output, teacher: Output | None, labels: Tensor, step: int) -> Terms:
        """Loss of one batch; labels (N, H, W); step counts from 0."""
        info: dict[str, Tensor] = {}
        if teacher is not None:
            teacher = _match(teacher, student.logits)
        if self.ce is not None:
            total = self.ce(student.logits, labels)
            terms = {"task": total}
            if self.aux_weight > 0:
                terms["aux"] = self.aux_weight * self.ce(student.aux, labels)
                total = total + terms["aux"]
        elif self.rdd is not None and teacher is not None:
            aux = student.aux if self.aux_weight > 0 else None
            out = self.rdd(student.logits, teacher.logits, labels, step=step, teacher_aux=teacher.aux, student_aux=aux)
            total = out.loss
            terms = {"rdd_task": out.task, "rdd_kd": self.rdd.kd_weight * out.kd}
            info["rdd_selected"] = out.selected.detach()
        if teacher is not None:
            for name, distil in self.distillers.items():
                terms[name] = distil(student, teacher, labels)
                total = total + terms[name]
        return Terms(total, {name: term.detach() for name, term in terms.items()}, info)


Distiller = Callable[[Output, Output, Tensor], Tensor]


def _kd(config: LossConfig) -> Distiller:
    """Over all pixels: the teacher has an opinion on unlabelled ones too."""
    temperature, weight = config.kd.temperature, config.kd.weight
    if not config.kd.resized:
        return _on_logits(fastkd.KDLoss(temperature=temperature, loss_weight=weight))

    def distil(student: Output, teacher: Output, labels: Tensor) -> Tensor:
        loss = fastkd.ResizedKDLoss(size=_size(labels), temperature=temperature, loss_weight=weight)
        return loss(student.logits, teacher.logits)

    return distil


def _on_logits(loss: nn.Module) -> Distiller:
    return lambda student, teacher, labels: loss(student.logits, teacher.logits)


def _on_features(loss: nn.Module, names: tuple[str, ...]) -> Distiller:
    def distil(student: Output, teacher: Output, labels: Tensor) -> Tensor:
        terms = [loss(student.features[n], _resize(teacher.features[n], student.features[n])) for n in names]
        return torch.stack(terms).sum()

    return distil


def _check_heads(rdd: fastkd.RDDLoss, teacher: SegmentationModel, aux_weight: float) -> None:
    if teacher.has_aux:
        return
    if rdd.tfe_steps > 0:
        raise ValueError(
            f"RDD's TFE stage ({rdd.tfe_steps} steps) compares the teacher's main and auxiliary heads, but the teacher has no "
            "auxiliary head: train it with one (--model.aux 'encoder[-2]'), or leave TFE out with --loss.rdd.tfe_steps 0 "
            "(tfe_steps=0)"
        )
    if aux_weight > 0:
        raise ValueError(
            "RDD's auxiliary term compares the auxiliary heads of student and teacher, but the teacher has none: train it "
            "with one (--model.aux), or the student without"
        )


def compared_features(student: SegmentationModel, teacher: SegmentationModel) -> tuple[str, ...]:
    """Names of the features that both networks tap. ValueError if there are none."""
    shared = tuple(name for name in student.feature_names if name in teacher.feature_names)
    if not shared:
        raise ValueError(
            f"student taps the features {list(student.feature_names)} and the teacher {list(teacher.feature_names)}: no name in "
            "common; tap what is to be compared under one name (model.features)"
        )
    return shared


def teacher_channels(
    method: str, config: LossConfig, student: SegmentationModel, teacher: SegmentationModel | None
) -> dict[str, int]:
    """Feature name -> teacher channels of what the student must return, adapted, for this method."""
    words = parse_method(method)
    if teacher is None or not ("nfd" in words or ("cwd" in words and config.cwd.on == "features")):
        return {}
    return {name: teacher.channels[name] for name in compared_features(student, teacher)}


def _match(teacher: Output, logits: Tensor) -> Output:
    """The teacher's logits at the size of the student's."""
    aux = None if teacher.aux is None else _resize(teacher.aux, logits)
    return Output(_resize(teacher.logits, logits), teacher.features, aux)


def _size(x: Tensor) -> tuple[int, int]:
    return x.shape[-2], x.shape[-1]


def _resize(x: Tensor, like: Tensor) -> Tensor:
    return x if _size(x) == _size(like) else F.interpolate(x, _size(like), mode="bilinear", align_corners=False)


@torch.no_grad()
def teacher_forward(teacher: SegmentationModel, images: Tensor) -> Output:
    """The teacher's output, computed in inference mode, as tensors that autograd may save.

    An inference tensor cannot be saved for a backward pass. The result is an ordinary tensor on the same memory (no copy).
    """
    with torch.inference_mode():
        out = teacher(images)
    features = {name: _ordinary(feature) for name, feature in out.features.items()}
    return Output(_ordinary(out.logits), features, None if out.aux is None else _ordinary(out.aux))


def _ordinary(x: Tensor) -> Tensor:
    alias = torch.empty(0, dtype=x.dtype, device=x.device)
    return alias.set_(x.untyped_storage(), x.storage_offset(), x.shape, x.stride())

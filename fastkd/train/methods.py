"""What a run minimises: the task loss and any sum of KD, NFD, CWD and RDD.

Without RDD the task is cross-entropy at label resolution, plus `aux_weight` times the same on the student's auxiliary head.
With RDD the task term is RDD's own (its auxiliary term included). The other terms stand beside it.
"""

from __future__ import annotations

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
        if words and teacher is None:
            raise ValueError(f"method {method!r} needs a teacher, got none")
        self.aux_weight = config.aux_weight if student.has_aux else 0.0
        self.cwd_on, self.kd_resized = config.cwd.on, config.kd.resized
        wants_features = "nfd" in words or ("cwd" in words and config.cwd.on == "features")
        self.features = compared_features(student, teacher) if wants_features else ()
        self.ce = self.kd = self.nfd = self.cwd = self.rdd = None
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
            self._check_heads(teacher)
        else:
            self.ce = fastkd.ResizedCrossEntropyLoss(ignore_index=ignore_index)
        if "kd" in words:
            kind = fastkd.ResizedKDLoss if config.kd.resized else fastkd.KDLoss
            self.kd = kind(temperature=config.kd.temperature, ignore_index=ignore_index, loss_weight=config.kd.weight)
        if "nfd" in words:
            self.nfd = fastkd.NFDLoss(dims=config.nfd.dims, loss_weight=config.nfd.weight / max(len(self.features), 1))
        if "cwd" in words:
            count = len(self.features) if config.cwd.on == "features" else 1
            self.cwd = fastkd.CWDLoss(temperature=config.cwd.temperature, loss_weight=config.cwd.weight / count)

    def _check_heads(self, teacher: SegmentationModel) -> None:
        if teacher.has_aux:
            return
        if self.rdd.tfe_steps > 0:
            raise ValueError(
                f"RDD's TFE stage ({self.rdd.tfe_steps} steps) compares the teacher's main and auxiliary heads, but the teacher has "
                "no auxiliary head: train it with one (--model.aux 'encoder[-2]'), or leave TFE out with --loss.rdd.tfe_steps 0 "
                "(tfe_steps=0)"
            )
        if self.aux_weight > 0:
            raise ValueError(
                "RDD's auxiliary term compares the auxiliary heads of student and teacher, but the teacher has none: train it "
                "with one (--model.aux), or the student without"
            )

    def forward(self, student: Output, teacher: Output | None, labels: Tensor, step: int) -> Terms:
        """Loss of one batch; labels (N, H, W); step counts from 0."""
        if teacher is not None:
            teacher = _match(teacher, student.logits.shape[-2:])
        terms: dict[str, Tensor] = {}
        info: dict[str, Tensor] = {}
        if self.rdd is not None:
            aux = student.aux if self.aux_weight > 0 else None
            out = self.rdd(
                student.logits, teacher.logits, labels, step=step, teacher_aux=teacher.aux, student_aux=aux
            )
            total = out.loss
            terms |= {"rdd_task": out.task, "rdd_kd": self.rdd.kd_weight * out.kd}
            info["rdd_selected"] = out.selected.detach()
        else:
            total = terms["task"] = self.ce(student.logits, labels)
            if self.aux_weight > 0:
                terms["aux"] = self.aux_weight * self.ce(student.aux, labels)
                total = total + terms["aux"]
        if self.kd is not None:
            # Distillation is over all pixels: the teacher has an opinion on unlabelled ones too.
            if self.kd_resized:
                self.kd.size = tuple(labels.shape[-2:])
            terms["kd"] = self.kd(student.logits, teacher.logits)
        if self.nfd is not None:
            terms["nfd"] = sum(self.nfd(student.features[name], teacher.features[name]) for name in self.features)
        if self.cwd is not None:
            if self.cwd_on == "logits":
                terms["cwd"] = self.cwd(student.logits, teacher.logits)
            else:
                pairs = ((student.features[n], teacher.features[n]) for n in self.features)
                terms["cwd"] = sum(self.cwd(s, _resize(t, s.shape[-2:])) for s, t in pairs)
        for name in ("kd", "nfd", "cwd"):
            if name in terms:
                total = total + terms[name]
        return Terms(total, {name: term.detach() for name, term in terms.items()}, info)


def compared_features(student: SegmentationModel, teacher: SegmentationModel) -> tuple[str, ...]:
    """Names of the features that both networks tap. ValueError if there are none."""
    shared = tuple(name for name in student.feature_names if name in teacher.feature_names)
    if not shared:
        raise ValueError(
            f"student taps the features {list(student.feature_names)} and the teacher {list(teacher.feature_names)}: no name in "
            "common; tap what is to be compared under one name (model.features)"
        )
    return shared


def teacher_channels(method: str, config: LossConfig, student: SegmentationModel, teacher: SegmentationModel | None) -> dict[str, int]:
    """Feature name -> teacher channels of what the student must return, adapted, for this method."""
    words = parse_method(method)
    if not ("nfd" in words or ("cwd" in words and config.cwd.on == "features")):
        return {}
    return {name: teacher.channels[name] for name in compared_features(student, teacher)}


def _match(teacher: Output, size: tuple[int, int]) -> Output:
    """The teacher's logits at the student's logit size."""
    aux = None if teacher.aux is None else _resize(teacher.aux, size)
    return Output(_resize(teacher.logits, size), teacher.features, aux)


def _resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    return x if x.shape[-2:] == size else F.interpolate(x, size, mode="bilinear", align_corners=False)


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

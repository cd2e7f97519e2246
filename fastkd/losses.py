"""The losses as ``nn.Module``s; they hold options and adapters and call `fastkd.functional`.

Constructor keywords are those of the function, plus ``loss_weight``, which multiplies the result.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn, tensor

from . import functional
from ._arguments import as_map, check_number, check_word
from .functional import (
    ACTIVATIONS,
    CLASS_REDUCTIONS,
    FEATURE_REDUCTIONS,
    PIXEL_REDUCTIONS,
    PRESETS,
    CEDiceOutput,
    DiceOptions,
    Heads,
    Labels,
    RDDOptions,
    RDDOutput,
)
from .ops.nfd import DIMS
from .ops.rdd import SELECTIONS

CITYSCAPES_CLASS_WEIGHTS = (
    0.8373, 0.918, 0.866, 1.0345, 1.0166, 0.9969, 0.9754, 1.0489, 0.8786, 1.0023, 0.9539, 0.9843, 1.1116, 0.9037, 1.0865,
    1.0955, 1.0865, 1.1529, 1.0507,
)  # fmt: skip
"""Weights of the 19 Cityscapes classes that the released RDD code uses in TSE."""


class NFDLoss(nn.Module):
    """`fastkd.nfd_loss` of feature maps that may differ in channels and size.

    With ``in_channels`` and ``teacher_channels`` the student first goes through a trainable 1x1 convolution,
    ``adapter``; pass its parameters to the optimiser. It has no bias, which the z-score would cancel. A teacher of
    another size is resized bilinearly to the student's. Tokens and volumes: as in `fastkd.nfd_loss`.
    """

    def __init__(
        self,
        in_channels: int | None = None,
        teacher_channels: int | None = None,
        *,
        dims: str = "hw",
        eps: float = 1e-5,
        reduction: str = "mean",
        loss_weight: float = 1.0,
    ):
        super().__init__()
        if (in_channels is None) != (teacher_channels is None):
            raise ValueError(
                f"NFDLoss: got in_channels={in_channels}, teacher_channels={teacher_channels}; give both for an adapter, or "
                "neither"
            )
        check_word("dims", dims, DIMS)
        check_word("reduction", reduction, FEATURE_REDUCTIONS)
        check_number("eps", eps, minimum=0)
        self.adapter: nn.Module = nn.Identity()
        if in_channels is not None and teacher_channels is not None:
            self.adapter = nn.Conv2d(in_channels, teacher_channels, kernel_size=1, bias=False)
        self.dims, self.eps, self.reduction, self.loss_weight = dims, eps, reduction, loss_weight

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        if isinstance(self.adapter, nn.Conv2d):
            spatial = student.shape[2:]
            student = self.adapter(as_map(student))
            student = student.reshape(*student.shape[:2], *spatial)
        if teacher.dim() == student.dim() and teacher.shape[2:] != student.shape[2:]:
            mode = {3: "linear", 4: "bilinear", 5: "trilinear"}.get(student.dim(), "nearest")
            teacher = F.interpolate(teacher, student.shape[2:], mode=mode, align_corners=False)
        return functional._nfd_loss(student, teacher, self.dims, self.eps, self.reduction, self.loss_weight)

    def extra_repr(self) -> str:
        return f"dims={self.dims!r}, eps={self.eps}, reduction={self.reduction!r}, loss_weight={self.loss_weight}"


class CWDLoss(nn.Module):
    """`fastkd.cwd_loss`."""

    def __init__(self, *, temperature: float = 4.0, reduction: str = "mean", loss_weight: float = 1.0):
        super().__init__()
        check_number("temperature", temperature, above=0)
        check_word("reduction", reduction, FEATURE_REDUCTIONS)
        self.temperature, self.reduction, self.loss_weight = temperature, reduction, loss_weight

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return functional._cwd_loss(student, teacher, self.temperature, self.reduction, self.loss_weight)

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, reduction={self.reduction!r}, loss_weight={self.loss_weight}"


class KDLoss(nn.Module):
    """`fastkd.kd_loss`."""

    def __init__(
        self,
        *,
        temperature: float = 1.0,
        ignore_index: int = 255,
        reduction: str = "mean",
        activation: str = "softmax",
        loss_weight: float = 1.0,
    ):
        super().__init__()
        check_number("temperature", temperature, above=0)
        check_word("reduction", reduction, PIXEL_REDUCTIONS)
        check_word("activation", activation, ACTIVATIONS)
        self.temperature, self.ignore_index, self.activation = temperature, ignore_index, activation
        self.reduction, self.loss_weight = reduction, loss_weight

    def forward(
        self, student: Tensor, teacher: Tensor, target: Tensor | None = None, *, weight: Tensor | None = None
    ) -> Tensor:
        options = (self.temperature, self.ignore_index, self.activation)
        return functional._kd_loss(student, teacher, target, weight, options, self.reduction, self.loss_weight)

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, reduction={self.reduction!r}, loss_weight={self.loss_weight}"


class ResizedCrossEntropyLoss(nn.Module):
    """`fastkd.resized_cross_entropy`; ``class_weight`` (a tensor or a sequence) becomes a buffer."""

    class_weight: Tensor | None

    def __init__(
        self,
        *,
        class_weight: Tensor | None = None,
        ignore_index: int = 255,
        align_corners: bool = False,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        focal_gamma: float = 0.0,
        loss_weight: float = 1.0,
    ):
        super().__init__()
        check_word("reduction", reduction, PIXEL_REDUCTIONS)
        functional.check_shape_options(label_smoothing, focal_gamma)
        self.register_buffer("class_weight", _buffer(class_weight), persistent=False)
        self.ignore_index, self.align_corners = ignore_index, align_corners
        self.label_smoothing, self.focal_gamma = label_smoothing, focal_gamma
        self.reduction, self.loss_weight = reduction, loss_weight

    def forward(self, logits: Tensor, target: Tensor, *, pixel_weight: Tensor | None = None) -> Tensor:
        labels = Labels(target, self.class_weight, self.ignore_index, self.align_corners)
        shape = (self.label_smoothing, self.focal_gamma)
        return functional._resized_cross_entropy(logits, labels, pixel_weight, shape, self.reduction, self.loss_weight)

    def extra_repr(self) -> str:
        return (
            f"align_corners={self.align_corners}, reduction={self.reduction!r}, label_smoothing={self.label_smoothing}, "
            f"focal_gamma={self.focal_gamma}, loss_weight={self.loss_weight}"
        )


class ResizedOHEMCrossEntropyLoss(nn.Module):
    """`fastkd.resized_ohem_cross_entropy`; ``class_weight`` (a tensor or a sequence) becomes a buffer."""

    class_weight: Tensor | None

    def __init__(
        self,
        *,
        threshold: float = 0.7,
        min_kept: int = 100_000,
        class_weight: Tensor | None = None,
        ignore_index: int = 255,
        align_corners: bool = False,
        reduction: str = "mean",
        loss_weight: float = 1.0,
    ):
        super().__init__()
        check_word("reduction", reduction, PIXEL_REDUCTIONS)
        check_number("threshold", threshold, minimum=0, maximum=1)
        check_number("min_kept", min_kept, minimum=0)
        self.register_buffer("class_weight", _buffer(class_weight), persistent=False)
        self.threshold, self.min_kept = threshold, min_kept
        self.ignore_index, self.align_corners = ignore_index, align_corners
        self.reduction, self.loss_weight = reduction, loss_weight

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        labels = Labels(target, self.class_weight, self.ignore_index, self.align_corners)
        return functional._resized_ohem_cross_entropy(
            logits, labels, self.threshold, self.min_kept, self.reduction, self.loss_weight
        )

    def extra_repr(self) -> str:
        return (
            f"threshold={self.threshold}, min_kept={self.min_kept}, reduction={self.reduction!r}, "
            f"loss_weight={self.loss_weight}"
        )


class ResizedDiceLoss(nn.Module):
    """`fastkd.resized_dice_loss`; ``class_weight`` (a tensor or a sequence) becomes a buffer."""

    class_weight: Tensor | None

    def __init__(
        self,
        *,
        batch: bool = True,
        smooth: float = 1.0,
        square: bool = False,
        background: bool = True,
        present: bool = False,
        class_weight: Tensor | None = None,
        ignore_index: int = 255,
        align_corners: bool = False,
        reduction: str = "mean",
        loss_weight: float = 1.0,
    ):
        super().__init__()
        check_word("reduction", reduction, CLASS_REDUCTIONS)
        check_number("smooth", smooth, minimum=0)
        self.register_buffer("class_weight", _buffer(class_weight), persistent=False)
        self.options = DiceOptions(batch, smooth, square, background, present)
        self.ignore_index, self.align_corners = ignore_index, align_corners
        self.reduction, self.loss_weight = reduction, loss_weight

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        labels = Labels(target, self.class_weight, self.ignore_index, self.align_corners)
        return functional._resized_dice_loss(logits, labels, self.options, self.reduction, self.loss_weight)

    def extra_repr(self) -> str:
        return f"{_words(self.options)}, reduction={self.reduction!r}, loss_weight={self.loss_weight}"


class ResizedCrossEntropyDiceLoss(nn.Module):
    """`fastkd.resized_cross_entropy_dice_loss`; ``class_weight`` (a tensor or a sequence) becomes a buffer.

    ``loss_weight`` multiplies ``loss``, ``ce`` and ``dice``.
    """

    class_weight: Tensor | None

    def __init__(
        self,
        *,
        ce_weight: float = 1.0,
        dice_weight: float = 1.0,
        class_weight: Tensor | None = None,
        label_smoothing: float = 0.0,
        batch: bool = True,
        smooth: float = 1.0,
        square: bool = False,
        background: bool = True,
        present: bool = False,
        ignore_index: int = 255,
        align_corners: bool = False,
        loss_weight: float = 1.0,
    ):
        super().__init__()
        check_number("ce_weight", ce_weight, minimum=0)
        check_number("dice_weight", dice_weight, minimum=0)
        check_number("label_smoothing", label_smoothing, minimum=0, below=1)
        check_number("smooth", smooth, minimum=0)
        self.register_buffer("class_weight", _buffer(class_weight), persistent=False)
        self.ce_weight, self.dice_weight, self.label_smoothing = ce_weight, dice_weight, label_smoothing
        self.options = DiceOptions(batch, smooth, square, background, present)
        self.ignore_index, self.align_corners, self.loss_weight = ignore_index, align_corners, loss_weight

    def forward(self, logits: Tensor, target: Tensor) -> CEDiceOutput:
        labels = Labels(target, self.class_weight, self.ignore_index, self.align_corners)
        weights = (self.ce_weight, self.dice_weight, self.label_smoothing)
        return functional._resized_cross_entropy_dice_loss(logits, labels, self.options, weights, self.loss_weight)

    def extra_repr(self) -> str:
        return (
            f"ce_weight={self.ce_weight}, dice_weight={self.dice_weight}, label_smoothing={self.label_smoothing}, "
            f"{_words(self.options)}, loss_weight={self.loss_weight}"
        )


class ResizedBinaryCrossEntropyLoss(nn.Module):
    """`fastkd.resized_binary_cross_entropy`; ``pos_weight`` (a tensor or a sequence) becomes a buffer."""

    pos_weight: Tensor | None

    def __init__(
        self,
        *,
        pos_weight: Tensor | None = None,
        ignore_index: int = 255,
        align_corners: bool = False,
        reduction: str = "mean",
        loss_weight: float = 1.0,
    ):
        super().__init__()
        check_word("reduction", reduction, PIXEL_REDUCTIONS)
        self.register_buffer("pos_weight", _buffer(pos_weight), persistent=False)
        self.ignore_index, self.align_corners = ignore_index, align_corners
        self.reduction, self.loss_weight = reduction, loss_weight

    def forward(self, logits: Tensor, target: Tensor, *, pixel_weight: Tensor | None = None) -> Tensor:
        weights, options = (self.pos_weight, pixel_weight), (self.ignore_index, self.align_corners)
        return functional._resized_binary_cross_entropy(
            logits, target, weights, *options, self.reduction, self.loss_weight
        )

    def extra_repr(self) -> str:
        return f"align_corners={self.align_corners}, reduction={self.reduction!r}, loss_weight={self.loss_weight}"


class ResizedKDLoss(nn.Module):
    """`fastkd.resized_kd_loss`; ``size`` defaults to that of the labels given to ``forward``."""

    def __init__(
        self,
        *,
        size: tuple[int, int] | None = None,
        temperature: float = 1.0,
        ignore_index: int = 255,
        align_corners: bool = False,
        reduction: str = "mean",
        activation: str = "softmax",
        loss_weight: float = 1.0,
    ):
        super().__init__()
        check_number("temperature", temperature, above=0)
        check_word("reduction", reduction, PIXEL_REDUCTIONS)
        check_word("activation", activation, ACTIVATIONS)
        self.size, self.temperature, self.ignore_index = size, temperature, ignore_index
        self.activation = activation
        self.align_corners, self.reduction, self.loss_weight = align_corners, reduction, loss_weight

    def forward(
        self, student: Tensor, teacher: Tensor, target: Tensor | None = None, *, pixel_weight: Tensor | None = None
    ) -> Tensor:
        size = self.size
        if size is None:
            if target is None:
                raise ValueError(
                    "ResizedKDLoss: got neither size nor target; pass size=(H, W) to the constructor or labels"
                )
            size = (target.shape[-2], target.shape[-1])
        options = (self.temperature, self.ignore_index, self.align_corners, self.activation)
        return functional._resized_kd_loss(
            student, teacher, target, pixel_weight, size, options, self.reduction, self.loss_weight
        )

    def extra_repr(self) -> str:
        return f"size={self.size}, temperature={self.temperature}, loss_weight={self.loss_weight}"


class RDDLoss(nn.Module):
    """`fastkd.rdd_loss` over a run: TFE for the first ``tfe_steps`` steps, then TSE.

    Args:
        total_steps: optimiser steps of the run, > 0.
        preset: ``"paper"`` or ``"official"`` (the released code).
        tfe_steps: default: 10 % of the run (the released code: 4000 of 40 000). 0 skips TFE; the teacher then needs no
            auxiliary head.
        blend: after TFE, task = (1 - l) * TSE + l * TFE with l = (total - step) / (total - tfe_steps), as in the
            released code. Needs ``teacher_aux`` at every step.
        loss_weight: multiplies ``loss``, ``task`` and ``kd``.
        The rest: as in `fastkd.rdd_loss`; ``class_weight`` may be a sequence and becomes a buffer.
    """

    class_weight: Tensor | None

    def __init__(
        self,
        total_steps: int,
        *,
        preset: str = "paper",
        tfe_steps: int | None = None,
        kd_weight: float = 1.0,
        temperature: float = 1.0,
        threshold: float | None = None,
        min_kept: int | None = None,
        select: str = "xor",
        class_weight: Tensor | None = None,
        aux_weight: float | None = None,
        ignore_index: int = 255,
        align_corners: bool | None = None,
        blend: bool = False,
        loss_weight: float = 1.0,
    ):
        super().__init__()
        check_word("preset", preset, tuple(PRESETS))
        check_word("select", select, SELECTIONS)
        check_number("total_steps", total_steps, minimum=1)
        check_number("temperature", temperature, above=0)
        self.tfe_steps = round(0.1 * total_steps) if tfe_steps is None else tfe_steps
        check_number("tfe_steps", self.tfe_steps, minimum=0, maximum=total_steps)
        if min_kept is not None:
            check_number("min_kept", min_kept, minimum=0)
        if threshold is not None:
            check_number("threshold", threshold, minimum=0)
        self.register_buffer("class_weight", _buffer(class_weight), persistent=False)
        self.total_steps, self.preset, self.select, self.blend = total_steps, preset, select, blend
        self.kd_weight, self.temperature, self.threshold, self.min_kept = kd_weight, temperature, threshold, min_kept
        self.aux_weight, self.ignore_index, self.align_corners = aux_weight, ignore_index, align_corners
        self.loss_weight = loss_weight

    def stage(self, step: int) -> str:
        """The stage of optimiser step ``step`` (from 0): ``"tfe"`` or ``"tse"``."""
        return "tfe" if step < self.tfe_steps else "tse"

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        target: Tensor,
        *,
        step: int,
        teacher_aux: Tensor | None = None,
        student_aux: Tensor | None = None,
    ) -> RDDOutput:
        stage = self.stage(step)
        blend = None
        if self.blend and stage == "tse":
            blend = max(0.0, (self.total_steps - step) / max(self.total_steps - self.tfe_steps, 1))
        heads = Heads(student, teacher, student_aux, teacher_aux)
        options = RDDOptions(
            self.preset,
            self.kd_weight,
            self.temperature,
            self.threshold,
            self.min_kept,
            self.select,
            self.aux_weight,
            self.align_corners,
            self.loss_weight,
        )
        return functional._rdd_loss(heads, target, self.class_weight, self.ignore_index, options, stage, blend)

    def extra_repr(self) -> str:
        return (
            f"preset={self.preset!r}, tfe_steps={self.tfe_steps} of {self.total_steps}, select={self.select!r}, "
            f"kd_weight={self.kd_weight}, loss_weight={self.loss_weight}"
        )


def _words(options: DiceOptions) -> str:
    return ", ".join(f"{name}={value}" for name, value in options._asdict().items())


def _buffer(class_weight) -> Tensor | None:
    if class_weight is None or isinstance(class_weight, Tensor):
        return class_weight
    return tensor(class_weight)

"""The operators on validated arguments: choose a backend, make tensors dense, call.

RDD calls several of them with the same arguments, which are validated once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import backends, reference
from ._arguments import dense, dense_each, dense_together
from .ops import accumulator, evaluate, operator
from .ops.kd import KD, KD_SIGMOID
from .ops.rdd import KD_CONFIDENCE
from .ops.resized_cross_entropy import RESIZED_CROSS_ENTROPY, RESIZED_SHAPED_CROSS_ENTROPY


class Labels(NamedTuple):
    """The labels of a loss and how they count."""

    target: Tensor
    class_weight: Tensor | None
    ignore_index: int
    align_corners: bool


class Heads(NamedTuple):
    """RDD's logits; auxiliary heads are optional."""

    student: Tensor
    teacher: Tensor
    student_aux: Tensor | None
    teacher_aux: Tensor | None


class Hard(NamedTuple):
    """Options of `difficulty_mask`."""

    threshold: float
    min_kept: int
    confidence: str
    select: str


def reduction_of(word: str, terms: int, batch: int, *, counted: bool = False, weight: float = 1.0) -> tuple[str, float]:
    """Translates a public reduction to that of the operators (`fastkd.ops.Loss`): "sum", "mean" or "none", and a scale.

    Args:
        word: one of `PIXEL_REDUCTIONS`.
        terms: number of terms. batch: N.
        counted: whether the labels decide which terms count.
        weight: ``loss_weight`` of a module.
    """
    if word == "mean" and counted:
        return "mean", weight
    if word in ("mean", "mean_all"):
        return "sum", weight / max(terms, 1)
    return ("none" if word == "none" else "sum"), weight / max(batch, 1) if word == "batchmean" else weight


def nothing(logits: Tensor, pixels: tuple[int, ...], reduction: str) -> Tensor:
    """The loss of empty input: 0, with a gradient of 0."""
    zero = (logits * 0).nan_to_num(0).to(accumulator(logits)).sum()
    return zero.expand(pixels) if reduction == "none" else zero


def kd_of(
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None,
    weight: Tensor | None,
    options: tuple[float, int, str],
    how: tuple[str, float],
) -> Tensor:
    temperature, ignore_index, activation = options
    loss = KD if activation == "softmax" else KD_SIGMOID
    backend = backends.choose(loss.name, student.device)
    if backend == "reference" or student.numel() == 0:
        plain = reference.kd if loss is KD else reference.kd_sigmoid
        terms = plain(student, constant(teacher), temperature)
        terms, count = reference.count_pixels(terms, target, weight, student.shape[1], ignore_index)
        return reference.reduce(terms, *how, count)
    student, teacher = dense_together(student, teacher)
    weight = dense(weight, accumulator(student))
    return evaluate(loss, backend, *how, student, teacher, dense(target), weight, temperature, ignore_index)


def cross_entropy(
    logits: Tensor,
    labels: Labels,
    pixel_weight: Tensor | None,
    selected: Tensor | None,
    reduction: str,
    loss_weight: float,
    shape: tuple[float, float] = (0.0, 0.0),
) -> tuple[Tensor, Tensor]:
    """`resized_cross_entropy` over the selected pixels, and their number or summed class weights.

    Args:
        selected: bool (N, H, W); or their log-sum-exp, NaN where not selected (`difficulty`).
        shape: label smoothing and focal gamma; with either, ``selected`` must be None.
    """
    target, class_weight, ignore_index, align_corners = labels
    n, height, width = target.shape
    how = reduction_of(reduction, n * height * width, n, counted=True, weight=loss_weight)
    shaped = shape != (0, 0)
    backend = backends.choose("resized_shaped_cross_entropy" if shaped else "resized_cross_entropy", logits.device)
    if logits.numel() == 0 or target.numel() == 0:
        loss = nothing(logits, target.shape, reduction)
        return loss, loss.new_zeros(())
    acc = accumulator(logits)
    pixel_weight = dense(pixel_weight, acc)
    if pixel_weight is not None and (reduction == "none" or backend == "reference"):
        pixel_weight = reference.resize(pixel_weight, (height, width), align_corners)
    if backend == "reference":
        if selected is not None:
            target = torch.where(selected, target.long(), ignore_index)
        resized = reference.resize(logits, (height, width), align_corners)
        terms, valid, weight = reference.cross_entropy(resized, target, class_weight, ignore_index, *shape)
        if pixel_weight is not None:
            terms = terms * torch.where(valid, pixel_weight.to(terms.dtype), 0)
        count = weight.sum()
        return reference.reduce(terms, *how, count), count
    (logits,) = dense_each(logits)
    tensors = (logits, dense(target), dense(class_weight, acc), pixel_weight)
    if shaped:
        assert selected is None
        return evaluate(RESIZED_SHAPED_CROSS_ENTROPY, backend, *how, *tensors, ignore_index, align_corners, *shape)
    return evaluate(RESIZED_CROSS_ENTROPY, backend, *how, *tensors, selected, ignore_index, align_corners)


def selected_cross_entropy(
    student: Tensor, teacher: Tensor, labels: Labels, hard: Hard, reduction: str, loss_weight: float
) -> tuple[Tensor, Tensor]:
    """Cross-entropy over the pixels of relative difficulty, and their share of the valid pixels."""
    # On a GPU keeping the student's log-sum-exp saves the cross-entropy a pass; on a CPU it saves nothing.
    selected, share = difficulty(student, teacher, labels, hard, keep_lse=student.device.type != "cpu")
    return cross_entropy(student, labels, None, selected, reduction, loss_weight)[0], share


def confidence_of(main: Tensor, aux: Tensor, direction: str) -> Tensor:
    backend = backends.choose("teacher_confidence", main.device)
    if backend == "reference" or main.numel() == 0:
        return reference.teacher_confidence(main, aux, direction)
    return operator(backend, "teacher_confidence")(*dense_together(main, aux), direction)


def kd_and_confidence(heads: Heads, direction: str, temperature: float, loss_weight: float) -> tuple[Tensor, Tensor]:
    """KD and the TFE map, from one read at temperature 1, the default."""
    student, teacher, _, teacher_aux = heads
    assert teacher_aux is not None
    backend = backends.choose("kd_confidence", student.device)
    if backend == "reference" or temperature != 1 or student.numel() == 0:
        with torch.no_grad():
            confidence = confidence_of(teacher, teacher_aux, direction)
        options = (temperature, 255, "softmax")
        return kd_of(student, teacher, None, None, options, mean_of(student, loss_weight)), confidence
    how = mean_of(student, loss_weight)
    return evaluate(KD_CONFIDENCE, backend, *how, *dense_together(student, teacher, teacher_aux), direction)


def mean_of(logits: Tensor, loss_weight: float) -> tuple[str, float]:
    """The reduction "mean" over all pixels of ``logits``."""
    n, _, h, w = logits.shape
    return reduction_of("mean", n * h * w, n, weight=loss_weight)


@torch.no_grad()
def difficulty(student: Tensor, teacher: Tensor, labels: Labels, hard: Hard, keep_lse: bool) -> tuple[Tensor, Tensor]:
    """`difficulty_mask`, and the selected share of the valid pixels.

    Args:
        keep_lse: if the backend can, return the student's log-sum-exp, NaN where not selected, instead of the mask.
    """
    target, _, ignore_index, align_corners = labels
    backend = backends.choose("difficulty_mask", student.device)
    acc = accumulator(student, teacher)
    if student.numel() == 0 or target.numel() == 0:
        return torch.zeros_like(target, dtype=torch.bool), student.new_zeros((), dtype=acc)
    if backend == "reference":
        mask = reference.difficulty_mask(student, teacher, target, *hard, ignore_index, align_corners)
        valid = reference.valid_pixels(target, student.shape[1], ignore_index)
        return mask, (mask.sum() / valid.sum().clamp(min=1)).to(acc)
    name = "difficulty_lse" if keep_lse and backend in backends.implementations("difficulty_lse") else "difficulty_mask"
    student, teacher = dense_each(student.detach(), teacher)
    return operator(backend, name)(student, teacher, dense(target), *hard, ignore_index, align_corners)


def constant(teacher: Tensor) -> Tensor:
    """A copy of inference tensors, which autograd cannot save."""
    if torch.compiler.is_compiling():  # tracing has no is_inference()
        return teacher
    return teacher.clone() if teacher.is_inference() else teacher

"""The losses as functions: check the arguments, call the operator, reduce.

Feature maps and logits are (N, C, H, W) in fp32, fp16, bf16 or fp64; student and teacher dtypes may differ. Arithmetic
is fp32 (fp64 if an input is), and a loss is returned in that dtype; the gradient comes back in the student's dtype and
memory format. The teacher is a constant. Labels are (N, H, W) of uint8, int32 or int64. The words for
``reduction``: ``"mean"`` (over what is counted), ``"mean_all"`` (over all pixels), ``"sum"``, ``"batchmean"`` (sum / N)
and ``"none"``. Where nothing is counted the loss and its gradient are 0.

Raises, all functions:
    ValueError: wrong rank or shape, devices that differ, an unknown word, a bad number, a teacher that requires grad.
    TypeError: integer logits, labels that are not integers.
    IndexError: a label outside [0, C) other than ``ignore_index`` (CPU; on a GPU only with FASTKD_CHECK_LABELS=1, else
        such a pixel is ignored).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import backends, reference
from ._arguments import (
    check_class_weight,
    check_float,
    check_number,
    check_pair,
    check_pixel_weight,
    check_same,
    check_target,
    check_teacher,
    check_word,
    dense_each,
    dense_together,
)
from .ops.cwd import cwd as _cwd
from .ops.kd import kd as _kd
from .ops.nfd import nfd as _nfd
from .ops.rdd import difficulty_mask as _difficulty_mask
from .ops.rdd import kd_with_confidence as _kd_with_confidence
from .ops.rdd import teacher_confidence as _teacher_confidence
from .ops.resized_cross_entropy import resized_cross_entropy as _resized_cross_entropy
from .ops.resized_cross_entropy import resized_cross_entropy_per_pixel as _resized_cross_entropy_per_pixel
from .ops.resized_kd import resized_kd as _resized_kd

PIXEL_REDUCTIONS = ("mean", "mean_all", "sum", "batchmean", "none")
FEATURE_REDUCTIONS = ("mean", "sum", "batchmean", "none")
SELECTIONS = ("xor", "or", "and", "student", "student_only")


class RDDOutput(NamedTuple):
    """What one RDD step gives.

    ``loss`` = ``task`` + kd_weight * ``kd``, all 0-d and differentiable; ``stage`` is ``"tfe"`` or ``"tse"``;
    ``selected`` is 0-d, the share of valid pixels that carry task loss, without gradient.
    """

    loss: Tensor
    task: Tensor
    kd: Tensor
    stage: str
    selected: Tensor


class _Preset(NamedTuple):
    """Where the paper and the released code disagree (docs/rdd.md)."""

    direction: str  # of TFE's divergence
    confidence: str
    threshold: float
    min_kept: int
    tse_reduction: str
    aux_weight: float
    align_corners: bool


PRESETS = {
    "paper": _Preset("main_aux", "max", 0.7, 0, "mean_all", 0.0, False),
    "official": _Preset("aux_main", "label", 0.7, 100_000, "mean", 0.4, True),
}


def nfd_loss(
    student: Tensor, teacher: Tensor, *, dims: str = "hw", eps: float = 1e-5, reduction: str = "mean"
) -> Tensor:
    """Normalised feature distillation: mean of (z(S) - z(T))^2 (arXiv 2207.05256, NFD as restated by later work).

    Args:
        student: (N, C, H, W).
        teacher: the same shape; another C needs an adapter, another size a resize (:class:`fastkd.NFDLoss` does both).
        dims: what a z-score is taken over: ``"hw"`` per sample and channel, ``"nhw"`` per channel over the batch,
            ``"c"`` per pixel over the channels, ``"chw"`` per sample.
        eps: added to the (biased) variance, >= 0.
        reduction: ``"mean"`` over all elements, ``"sum"``, ``"batchmean"``, or ``"none"``: one mean per group, of shape
            (N, C), (C,), (N, H, W), (N,) in the order of ``dims`` above.
    """
    check_pair(student, teacher)
    check_word("dims", dims, ("hw", "nhw", "c", "chw"))
    check_word("reduction", reduction, FEATURE_REDUCTIONS)
    check_number("eps", eps, minimum=0)
    backend = backends.choose("nfd", student.device)
    if backend == "reference" or student.numel() == 0:
        loss = reference.nfd(student, _constant(teacher), dims, eps)
        if student.numel() == 0:
            loss = torch.where(torch.isfinite(loss), loss, 0)
    else:
        student, teacher = dense_together(student, teacher)
        loss = _nfd(student, teacher, dims, eps, backend)
    return _reduce_groups(loss, student, reduction)


def cwd_loss(student: Tensor, teacher: Tensor, *, temperature: float = 4.0, reduction: str = "mean") -> Tensor:
    """Channel-wise distillation: tau^2 / (N C) * sum of KL(softmax_HW(T / tau) || softmax_HW(S / tau)) (arXiv 2011.13256).

    Args:
        student, teacher: (N, C, H, W).
        temperature: tau > 0.
        reduction: ``"mean"`` over (N, C), ``"sum"``, ``"batchmean"``, or ``"none"``: (N, C).
    """
    check_pair(student, teacher)
    check_word("reduction", reduction, FEATURE_REDUCTIONS)
    check_number("temperature", temperature, above=0)
    backend = backends.choose("cwd", student.device)
    if backend == "reference" or student.numel() == 0:
        loss = reference.cwd(student, _constant(teacher), temperature)
    else:
        student, teacher = dense_together(student, teacher)
        loss = _cwd(student, teacher, temperature, backend)
    return loss if reduction == "none" else _reduce_cwd(loss, reduction)


def kd_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float = 1.0,
    target: Tensor | None = None,
    weight: Tensor | None = None,
    ignore_index: int = 255,
    reduction: str = "mean",
) -> Tensor:
    """Pixel-wise KL(softmax(T / tau) || softmax(S / tau)) * tau^2 over the classes (Hinton, arXiv 1503.02531).

    Args:
        student, teacher: logits (N, C, H, W).
        temperature: tau > 0.
        target: labels (N, H, W); pixels labelled ``ignore_index`` do not count. None: every pixel counts.
        weight: (N, H, W), scales each pixel's term, never the count.
        reduction: ``"mean"`` over valid pixels, ``"mean_all"``, ``"sum"``, ``"batchmean"``, ``"none"``: (N, H, W).
    """
    check_pair(student, teacher)
    check_word("reduction", reduction, PIXEL_REDUCTIONS)
    check_number("temperature", temperature, above=0)
    n, classes, h, w = student.shape
    if target is not None:
        check_target(target, student, (n, h, w), ignore_index)
    if weight is not None:
        check_pixel_weight("weight", weight, student, (n, h, w))
    backend = backends.choose("kd", student.device)
    if backend == "reference" or student.numel() == 0:
        loss = reference.kd(student, _constant(teacher), temperature)
        return _reduce_reference(loss, target, weight, classes, ignore_index, reduction)
    student, teacher = dense_together(student, teacher)
    target, weight = _dense(target), _dense(weight, reference.accumulate_in(student))
    return _kd(student, teacher, target, weight, temperature, ignore_index, reduction, backend)


def resized_cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    class_weight: Tensor | None = None,
    pixel_weight: Tensor | None = None,
    ignore_index: int = 255,
    align_corners: bool = False,
    reduction: str = "mean",
) -> Tensor:
    """Cross-entropy at label resolution of logits at their own: bilinear resize, then cross-entropy.

    Args:
        logits: (N, C, h, w).
        target: labels (N, H, W).
        class_weight: (C,); ``"mean"`` then divides by the summed weights of the counted pixels.
        pixel_weight: (N, H, W), or (N, h', w') of another size, which is resized the same way; scales the terms only.
        align_corners: the convention of the resize (True in CIRKD and RDD, False in torchvision).
        reduction: ``"mean"`` over valid pixels, ``"mean_all"``, ``"sum"``, ``"batchmean"``, ``"none"``: (N, H, W).
    """
    check_float("logits", logits)
    n = logits.shape[0]
    check_word("reduction", reduction, PIXEL_REDUCTIONS)
    check_target(target, logits, (n, None, None), ignore_index)
    if class_weight is not None:
        check_class_weight(class_weight, logits)
    if pixel_weight is not None:
        check_pixel_weight("pixel_weight", pixel_weight, logits, (n, None, None))
    loss, _ = _cross_entropy(logits, target, class_weight, pixel_weight, None, ignore_index, align_corners, reduction)
    return loss


def resized_kd_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    size: tuple[int, int],
    temperature: float = 1.0,
    target: Tensor | None = None,
    pixel_weight: Tensor | None = None,
    ignore_index: int = 255,
    align_corners: bool = False,
    reduction: str = "mean",
) -> Tensor:
    """:func:`kd_loss` at ``size`` of logits at their own: both sides are resized bilinearly, then compared.

    Args:
        student: logits (N, C, h, w).
        teacher: logits (N, C, h', w').
        size: (H, W) of the labels.
        target: labels (N, H, W) or None; pixel_weight: (N, H, W), or of another size, which is resized the same way.
        temperature, ignore_index, align_corners, reduction: as in :func:`kd_loss` and :func:`resized_cross_entropy`.
    """
    check_pair(student, teacher, same_size=False)
    check_word("reduction", reduction, PIXEL_REDUCTIONS)
    check_number("temperature", temperature, above=0)
    n, classes = student.shape[:2]
    size = _size(size)
    if target is not None:
        check_target(target, student, (n, *size), ignore_index)
    if pixel_weight is not None:
        check_pixel_weight("pixel_weight", pixel_weight, student, (n, None, None))
    backend = backends.choose("resized_kd", student.device)
    if backend == "cuda" and student.shape != teacher.shape:
        # CUDA C++ holds rows of both networks that lie between the same label rows
        backend = backends.without_cuda("resized_kd", student.device)
    if student.numel() == 0 or teacher.numel() == 0 or size[0] * size[1] == 0:
        return _nothing(student, (n, *size), reduction)
    pixel_weight = _dense(pixel_weight, reference.accumulate_in(student, teacher))
    if pixel_weight is not None and (reduction == "none" or backend == "reference"):
        pixel_weight = reference.resize(pixel_weight, size, align_corners)
    if backend == "reference":
        student, teacher = (reference.resize(x, size, align_corners) for x in (student, _constant(teacher)))
        loss = reference.kd(student, teacher, temperature)
        return _reduce_reference(loss, target, pixel_weight, classes, ignore_index, reduction)
    student, teacher = dense_each(student, teacher)
    return _resized_kd(
        student,
        teacher,
        _dense(target),
        pixel_weight,
        size,
        temperature,
        ignore_index,
        align_corners,
        reduction,
        backend,
    )


@torch.no_grad()
def teacher_confidence(main: Tensor, aux: Tensor, *, direction: str = "aux_main") -> Tensor:
    """RDD's TFE map: exp(-D), D the per-pixel KL between the teacher's own two heads (arXiv 2407.03719).

    Args:
        main, aux: the teacher's logits (N, C, h, w).
        direction: ``"aux_main"`` for D = KL(aux || main) (released code), ``"main_aux"`` for KL(main || aux) (paper).

    Returns:
        (N, h, w) in (0, 1], without gradient.
    """
    check_float("main", main)
    check_float("aux", aux)
    check_same("aux", aux, "main", main)
    check_teacher("main", main)
    check_teacher("aux", aux)
    check_word("direction", direction, ("aux_main", "main_aux"))
    return _confidence(main, aux, direction)


@torch.no_grad()
def difficulty_mask(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    *,
    threshold: float = 0.7,
    min_kept: int = 0,
    confidence: str = "max",
    select: str = "xor",
    ignore_index: int = 255,
    align_corners: bool = False,
) -> Tensor:
    """RDD's TSE mask: valid pixels that are hard for one network and easy for the other (arXiv 2407.03719).

    Hard means confidence <= max(threshold, the k-th smallest confidence of the batch), k = min(min_kept, pixels).

    Args:
        student, teacher: logits (N, C, h, w), resized to the labels inside.
        target: labels (N, H, W).
        threshold: in [0, 1]. min_kept: >= 0; 0 leaves the threshold as it is.
        confidence: probability of the largest (``"max"``) or of the labelled class (``"label"``); 1 where ignored.
        select: ``"xor"``, ``"or"``, ``"and"``, ``"student"`` (plain OHEM), ``"student_only"`` (student hard, teacher easy).

    Returns:
        bool (N, H, W), False where ignored, without gradient.
    """
    check_pair(student, teacher, same_size=False)
    n, _, _, _ = student.shape
    check_target(target, student, (n, None, None), ignore_index)
    check_number("threshold", threshold, minimum=0)
    check_number("min_kept", min_kept, minimum=0)
    check_word("confidence", confidence, ("max", "label"))
    check_word("select", select, SELECTIONS)
    mask, _ = _mask(student, teacher, target, threshold, min_kept, confidence, select, ignore_index, align_corners)
    return mask


def rdd_loss(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    *,
    stage: str,
    teacher_aux: Tensor | None = None,
    student_aux: Tensor | None = None,
    preset: str = "paper",
    kd_weight: float = 1.0,
    temperature: float = 1.0,
    threshold: float | None = None,
    min_kept: int | None = None,
    select: str = "xor",
    class_weight: Tensor | None = None,
    aux_weight: float | None = None,
    ignore_index: int = 255,
    align_corners: bool | None = None,
    blend: float | None = None,
) -> RDDOutput:
    """Relative difficulty distillation (arXiv 2407.03719): task loss weighted by relative difficulty, plus KD.

    TFE: mean over all pixels of exp(-D) * CE(S), D the KL between the teacher's two heads. TSE: CE(S) over the pixels
    :func:`difficulty_mask` selects. KD is :func:`kd_loss` at logit size over all pixels.

    Args:
        student, teacher: main logits (N, C, h, w).
        target: labels (N, H, W).
        stage: ``"tfe"`` or ``"tse"``.
        teacher_aux: the teacher's auxiliary logits (N, C, h, w); needed by TFE, by ``blend`` and by ``student_aux`` in TSE.
        student_aux: the student's auxiliary logits; gets ``aux_weight`` times the same term, with its own mask.
        preset: ``"paper"`` or ``"official"`` (the released code); gives every argument left at None.
        class_weight: (C,), used in TSE only.
        blend: in TSE, the share of the TFE term: task = (1 - blend) * TSE + blend * TFE.

    Raises:
        ValueError: as in this module, and: TFE without ``teacher_aux``; an auxiliary term without both auxiliary heads.
    """
    check_word("stage", stage, ("tfe", "tse"))
    check_word("preset", preset, tuple(PRESETS))
    check_word("select", select, SELECTIONS)
    p = PRESETS[preset]
    align = p.align_corners if align_corners is None else align_corners
    if aux_weight is None:
        aux_weight = p.aux_weight if student_aux is not None else 0.0
    check_number("aux_weight", aux_weight, minimum=0)
    check_number("kd_weight", kd_weight, minimum=0)
    if blend is not None:
        check_number("blend", blend, minimum=0, maximum=1)
    if aux_weight > 0 and student_aux is None:
        raise ValueError(
            f"rdd_loss: aux_weight is {aux_weight} but student_aux is None; pass the student's auxiliary logits or "
            "aux_weight=0"
        )

    check_pair(student, teacher)
    check_target(target, student, (student.shape[0], None, None), ignore_index)
    if class_weight is not None:
        check_class_weight(class_weight, student)
    if student_aux is not None:
        check_float("student_aux", student_aux)
        check_same("student_aux", student_aux, "student", student, same_size=False)
    if teacher_aux is not None:
        check_float("teacher_aux", teacher_aux)
        check_same("teacher_aux", teacher_aux, "teacher", teacher, same_size=False)
        check_teacher("teacher_aux", teacher_aux)

    def tfe(weight: Tensor) -> tuple[Tensor, Tensor]:
        def term(logits: Tensor) -> tuple[Tensor, Tensor]:
            return _cross_entropy(logits, target, None, weight, None, ignore_index, align, "mean_all")

        task, count = term(student)
        if student_aux is not None and aux_weight > 0:
            task = task + aux_weight * term(student_aux)[0]
        return task, (count > 0).to(task.dtype)

    def tse() -> tuple[Tensor, Tensor]:
        def term(s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
            limit = p.threshold if threshold is None else threshold
            kept = p.min_kept if min_kept is None else min_kept
            mask, counts = _mask(s, t, target, limit, kept, p.confidence, select, ignore_index, align)
            loss, _ = _cross_entropy(s, target, class_weight, None, mask, ignore_index, align, p.tse_reduction)
            return loss, counts[0] / counts[1].clamp(min=1)

        task, selected = term(student, teacher)
        if student_aux is not None and aux_weight > 0:
            if teacher_aux is None:
                raise ValueError(
                    "rdd_loss: the mask of the auxiliary term compares both auxiliary heads, but teacher_aux is None; pass "
                    "it or aux_weight=0"
                )
            task = task + aux_weight * term(student_aux, teacher_aux)[0]
        return task, selected.to(task.dtype)

    if stage == "tse" and blend is None:
        kd = kd_loss(student, teacher, temperature=temperature)
        task, selected = tse()
        return RDDOutput(task + kd_weight * kd, task, kd, stage, selected)
    if teacher_aux is None:
        raise ValueError(
            "rdd_loss: the TFE stage compares the teacher's main and auxiliary logits, but teacher_aux is None; pass "
            'teacher_aux, or leave TFE out (tfe_steps=0 in RDDLoss, stage="tse" here)'
        )
    check_same("teacher_aux", teacher_aux, "teacher", teacher)
    kd, weight = _kd_and_confidence(student, teacher, teacher_aux, p.direction, temperature)
    task, selected = tfe(weight)
    if blend is not None and stage == "tse":
        early = task
        task, selected = tse()
        task = (1 - blend) * task + blend * early
    return RDDOutput(task + kd_weight * kd, task, kd, stage, selected)


# The rest of the operators without their checks, so that RDD, which needs several on the same arguments, makes them once.


def _cross_entropy(
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    pixel_weight: Tensor | None,
    mask: Tensor | None,
    ignore_index: int,
    align_corners: bool,
    reduction: str,
) -> tuple[Tensor, Tensor]:
    """:func:`resized_cross_entropy` over the pixels where ``mask`` is True, and the summed class weights of those."""
    size = (target.shape[-2], target.shape[-1])
    backend = backends.choose("resized_cross_entropy", logits.device)
    if logits.numel() == 0 or target.numel() == 0:
        loss = _nothing(logits, (logits.shape[0], *size), reduction)
        return loss, loss.new_zeros(())
    acc = reference.accumulate_in(logits)
    pixel_weight = _dense(pixel_weight, acc)
    if pixel_weight is not None and (reduction == "none" or backend == "reference"):
        pixel_weight = reference.resize(pixel_weight, size, align_corners)
    if backend == "reference":
        if mask is not None:
            target = torch.where(mask, target.long(), ignore_index)
        resized = reference.resize(logits, size, align_corners)
        loss, valid, weight = reference.cross_entropy(resized, target, class_weight, ignore_index)
        if pixel_weight is not None:
            loss = loss * torch.where(valid, pixel_weight.to(loss.dtype), 0)
        return reference.reduce_pixels(loss, weight, reduction), weight.sum()
    (logits,) = dense_each(logits)
    tensors = (logits, target.contiguous(), _dense(class_weight, acc), _dense(pixel_weight), mask)
    if reduction == "none":
        loss = _resized_cross_entropy_per_pixel(*tensors, ignore_index, align_corners, backend)
        return loss, loss.new_zeros(())
    return _resized_cross_entropy(*tensors, ignore_index, align_corners, reduction, backend)


def _confidence(main: Tensor, aux: Tensor, direction: str) -> Tensor:
    backend = backends.choose("teacher_confidence", main.device)
    if backend == "reference" or main.numel() == 0:
        return reference.teacher_confidence(main, aux, direction)
    main, aux = dense_together(main, aux)
    return _teacher_confidence(main, aux, direction, backend)


def _kd_and_confidence(
    student: Tensor, teacher: Tensor, teacher_aux: Tensor, direction: str, temperature: float
) -> tuple[Tensor, Tensor]:
    """KD and TFE's map; at temperature 1, which RDD has unless told otherwise, from one read."""
    backend = backends.choose("teacher_confidence", student.device)
    if backend == "reference" or temperature != 1 or student.numel() == 0:
        with torch.no_grad():
            confidence = _confidence(teacher, teacher_aux, direction)
        return kd_loss(student, teacher, temperature=temperature), confidence
    student, teacher, teacher_aux = dense_together(student, teacher, teacher_aux)
    return _kd_with_confidence(student, teacher, teacher_aux, direction, backend)


@torch.no_grad()
def _mask(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    threshold: float,
    min_kept: int,
    confidence: str,
    select: str,
    ignore_index: int,
    align_corners: bool,
) -> tuple[Tensor, Tensor]:
    """:func:`difficulty_mask`, and the number of selected and of valid pixels."""
    backend = backends.choose("difficulty_mask", student.device)
    if student.numel() == 0 or target.numel() == 0:
        return torch.zeros_like(target, dtype=torch.bool), target.new_zeros(2, dtype=torch.int64)
    if backend == "reference":
        mask = reference.difficulty_mask(
            student, teacher, target, threshold, min_kept, confidence, select, ignore_index, align_corners
        )
        valid = reference.valid_pixels(target, student.shape[1], ignore_index)
        return mask, torch.stack([mask.sum(), valid.sum()])
    student, teacher = dense_each(student, teacher)
    return _difficulty_mask(
        student,
        teacher,
        target.contiguous(),
        threshold,
        min_kept,
        confidence,
        select,
        ignore_index,
        align_corners,
        backend,
    )


def _dense(x: Tensor | None, dtype: torch.dtype | None = None) -> Tensor | None:
    return None if x is None else x.to(dtype or x.dtype).contiguous()


def _constant(teacher: Tensor) -> Tensor:
    """Plain autograd cannot save an inference tensor; a copy can be saved."""
    if torch.compiler.is_compiling():  # tracing has no is_inference()
        return teacher
    return teacher.clone() if teacher.is_inference() else teacher


def _size(size: tuple[int, int]) -> tuple[int, int]:
    # int() of a symbolic size would pin compiled code to it.
    whole = [v if isinstance(v, int | torch.SymInt) else int(v) for v in size]
    if len(size) != 2 or any(a != b or a < 0 for a, b in zip(whole, size, strict=True)):
        raise ValueError(f"size: got {size!r}, expected (height, width) of the labels")
    return whole[0], whole[1]


def _nothing(logits: Tensor, pixels: tuple[int, ...], reduction: str) -> Tensor:
    """The loss where there is nothing to count: 0, with a gradient of 0."""
    zero = (logits * 0).nan_to_num(0).to(reference.accumulate_in(logits)).sum()
    return zero.expand(pixels) if reduction == "none" else zero


def _reduce_groups(loss: Tensor, student: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return loss
    if loss.numel() == 0:
        return loss.sum()
    if reduction == "mean":
        return loss.mean()
    elements = student.numel() // loss.numel()
    return loss.sum() * (elements if reduction == "sum" else elements / student.shape[0])


def _reduce_cwd(loss: Tensor, reduction: str) -> Tensor:
    if reduction == "sum" or loss.numel() == 0:
        return loss.sum()
    return loss.mean() if reduction == "mean" else loss.sum() / loss.shape[0]


def _reduce_reference(
    loss: Tensor,
    target: Tensor | None,
    weight: Tensor | None,
    classes: int,
    ignore_index: int,
    reduction: str,
) -> Tensor:
    valid = None if target is None else reference.valid_pixels(target, classes, ignore_index)
    if weight is not None:
        weight = weight.to(loss.dtype)
        loss = loss * (weight if valid is None else torch.where(valid, weight, 0))
    if valid is not None:
        loss = torch.where(valid, loss, 0)
    return reference.reduce_pixels(loss, valid, reduction)

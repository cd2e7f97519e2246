"""The losses as functions: check the arguments, call the operator, reduce.

Feature maps and logits are (N, C, H, W) in fp32, fp16, bf16 or fp64; ``nfd_loss``, ``kd_loss`` and ``cwd_loss`` take 1
to 3 spatial axes. Student and teacher dtypes may differ. Losses are computed and returned in fp32 (fp64 if an input is
fp64); the gradient has the student's dtype and memory format. The teacher is a constant. Labels are (N, H, W) of uint8,
int32 or int64.

``reduction`` is ``"mean"`` (over counted terms), ``"mean_all"`` (over all pixels), ``"sum"``, ``"batchmean"`` (sum / N)
or ``"none"``. If nothing counts, the loss and its gradient are 0.

Raises, all functions:
    ValueError: wrong rank or shape, different devices, an unknown option, a number out of range, or a teacher or other
        constant that requires grad.
    TypeError: integer logits, or labels that are not integers.
    IndexError: a label outside [0, C) other than ``ignore_index`` (on CPU; on a GPU only with FASTKD_CHECK_LABELS=1,
        else such a pixel is ignored).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import backends, reference
from ._arguments import (
    ANY_RANK,
    as_map,
    check_class_weight,
    check_elements,
    check_float,
    check_number,
    check_pair,
    check_pixel_weight,
    check_same,
    check_target,
    check_teacher,
    check_word,
    dense,
    dense_each,
    dense_together,
)
from ._dice import DiceOptions, cross_entropy_of, dice_of, dice_sums
from ._operators import (
    Hard,
    Heads,
    Labels,
    confidence_of,
    constant,
    cross_entropy,
    difficulty,
    kd_and_confidence,
    kd_of,
    mean_of,
    nothing,
    reduction_of,
    selected_cross_entropy,
)
from .ops import accumulator, evaluate
from .ops.cwd import CWD
from .ops.nfd import DIMS, NFD, fits_cuda
from .ops.rdd import DIRECTIONS, SELECTIONS
from .ops.resized_binary_cross_entropy import RESIZED_BINARY_CROSS_ENTROPY
from .ops.resized_kd import RESIZED_KD, RESIZED_KD_SIGMOID

PIXEL_REDUCTIONS = ("mean", "mean_all", "sum", "batchmean", "none")
FEATURE_REDUCTIONS = ("mean", "sum", "batchmean", "none")
CLASS_REDUCTIONS = ("mean", "sum", "none")
ACTIVATIONS = ("softmax", "sigmoid")


class RDDOutput(NamedTuple):
    """The result of one RDD step.

    ``loss`` = ``task`` + kd_weight * ``kd``, all 0-d and differentiable. ``stage`` is ``"tfe"`` or ``"tse"``.
    ``selected``, 0-d and without gradient, is the share of valid pixels that contribute to the task loss.
    """

    loss: Tensor
    task: Tensor
    kd: Tensor
    stage: str
    selected: Tensor


class _Preset(NamedTuple):
    """Where the paper and the released code differ (docs/rdd.md)."""

    direction: str  # of the TFE divergence
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
        student: (N, C, H, W), (N, C, L) or (N, C, D, H, W). Tokens (B, L, C) as ``x.transpose(1, 2)``, read in place.
            H, W below stands for all spatial axes.
        teacher: same shape. `fastkd.NFDLoss` adapts other channels and sizes.
        dims: axes of the z-score: ``"hw"`` per sample and channel, ``"nhw"`` per channel over the batch, ``"c"`` per
            pixel over the channels, ``"chw"`` per sample.
        eps: added to the (biased) variance, >= 0.
        reduction: ``"mean"`` over all elements, ``"sum"``, ``"batchmean"``, or ``"none"``: one mean per group, of shape
            (N, C), (C,), (N, H, W), (N,) in the order of ``dims`` above.
    """
    return _nfd_loss(student, teacher, dims, eps, reduction, 1.0)


def _nfd_loss(student: Tensor, teacher: Tensor, dims: str, eps: float, reduction: str, loss_weight: float) -> Tensor:
    check_pair(student, teacher, ranks=ANY_RANK)
    check_word("dims", dims, DIMS)
    check_word("reduction", reduction, FEATURE_REDUCTIONS)
    check_number("eps", eps, minimum=0)
    if student.dim() != 4:
        spatial = student.shape[2:]
        loss = _nfd_loss(as_map(student), as_map(teacher), dims, eps, reduction, loss_weight)
        return loss.reshape(-1, *spatial) if reduction == "none" and dims == "c" else loss
    n, c, h, w = student.shape
    groups = n * c if dims == "hw" else c if dims == "nhw" else n * h * w if dims == "c" else n
    if reduction in ("sum", "batchmean"):  # over elements; a term is the mean of a group
        loss_weight = loss_weight * student.numel() / max(groups, 1)
    how = reduction_of(reduction, groups, n, weight=loss_weight)
    backend = backends.choose("nfd", student.device)
    if backend == "cuda" and not fits_cuda(student, teacher, dims):
        backend = backends.choose("nfd", student.device, cuda=False)
    if backend == "reference" or student.numel() == 0:
        terms = reference.nfd(student, constant(teacher), dims, eps)
        if student.numel() == 0:
            terms = torch.where(torch.isfinite(terms), terms, 0)
        return reference.reduce(terms, *how)
    student, teacher = dense_together(student, teacher)
    return evaluate(NFD, backend, *how, student, teacher, dims, eps)


def cwd_loss(student: Tensor, teacher: Tensor, *, temperature: float = 4.0, reduction: str = "mean") -> Tensor:
    """Channel-wise distillation (arXiv 2011.13256): tau^2 / (N C) * sum of KL(softmax_HW(T / tau) || softmax_HW(S / tau)).

    Args:
        student, teacher: (N, C, H, W), (N, C, L) or (N, C, D, H, W); tokens (B, L, C) as ``x.transpose(1, 2)``.
        temperature: tau > 0.
        reduction: ``"mean"`` over (N, C), ``"sum"``, ``"batchmean"``, or ``"none"``: (N, C).
    """
    return _cwd_loss(student, teacher, temperature, reduction, 1.0)


def _cwd_loss(student: Tensor, teacher: Tensor, temperature: float, reduction: str, loss_weight: float) -> Tensor:
    check_pair(student, teacher, ranks=ANY_RANK)
    check_word("reduction", reduction, FEATURE_REDUCTIONS)
    check_number("temperature", temperature, above=0)
    student, teacher = as_map(student), as_map(teacher)
    n, c, _, _ = student.shape
    how = reduction_of(reduction, n * c, n, weight=loss_weight)
    backend = backends.choose("cwd", student.device)
    if backend == "reference" or student.numel() == 0:
        return reference.reduce(reference.cwd(student, constant(teacher), temperature), *how)
    student, teacher = dense_together(student, teacher)
    return evaluate(CWD, backend, *how, student, teacher, temperature)


def kd_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float = 1.0,
    target: Tensor | None = None,
    weight: Tensor | None = None,
    ignore_index: int = 255,
    reduction: str = "mean",
    activation: str = "softmax",
) -> Tensor:
    """Pixel-wise KL(softmax(T / tau) || softmax(S / tau)) * tau^2 over the classes (Hinton, arXiv 1503.02531).

    Args:
        student, teacher: logits (N, C, H, W), (N, C, L) or (N, C, D, H, W); ``target`` and ``weight`` have the same
            axes without C. Tokens (B, L, C) as ``x.transpose(1, 2)``, read in place.
        temperature: tau > 0.
        target: labels (N, H, W); pixels labelled ``ignore_index`` do not count. None: every pixel counts.
        weight: (N, H, W), scales each pixel's term but not the count.
        reduction: ``"mean"`` over valid pixels, ``"mean_all"``, ``"sum"``, ``"batchmean"``, ``"none"``: (N, H, W).
        activation: ``"softmax"``, or ``"sigmoid"``: each class against the rest, KL of Bernoulli distributions summed
            over the classes.
    """
    options = (temperature, ignore_index, activation)
    return _kd_loss(student, teacher, target, weight, options, reduction, 1.0)


def _kd_loss(
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None,
    weight: Tensor | None,
    options: tuple[float, int, str],
    reduction: str,
    loss_weight: float,
) -> Tensor:
    temperature, ignore_index, activation = options
    check_pair(student, teacher, ranks=ANY_RANK)
    check_word("reduction", reduction, PIXEL_REDUCTIONS)
    check_word("activation", activation, ACTIVATIONS)
    check_number("temperature", temperature, above=0)
    n, spatial = student.shape[0], student.shape[2:]
    if target is not None:
        check_target(target, student, (n, *spatial), ignore_index)
    if weight is not None:
        check_pixel_weight("weight", weight, student, (n, *spatial))
    student, teacher = as_map(student), as_map(teacher)
    _, _, h, w = student.shape
    how = reduction_of(reduction, n * h * w, n, counted=target is not None, weight=loss_weight)
    if len(spatial) == 2:
        return kd_of(student, teacher, target, weight, options, how)
    target, weight = (x if x is None else x.reshape(n, h, w) for x in (target, weight))
    loss = kd_of(student, teacher, target, weight, options, how)
    return loss.reshape(n, *spatial) if reduction == "none" else loss


def resized_cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    class_weight: Tensor | None = None,
    pixel_weight: Tensor | None = None,
    ignore_index: int = 255,
    align_corners: bool = False,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    focal_gamma: float = 0.0,
) -> Tensor:
    """Cross-entropy fused with a bilinear resize of the logits to the labels.

    Args:
        logits: (N, C, h, w).
        target: labels (N, H, W).
        class_weight: (C,); ``"mean"`` then divides by the summed weights of the counted pixels.
        pixel_weight: (N, H, W), or (N, h', w') of another size, resized like the logits; scales the terms, not the
            count.
        align_corners: convention of the resize (True in CIRKD and RDD, False in torchvision).
        reduction: ``"mean"`` over valid pixels, ``"mean_all"``, ``"sum"``, ``"batchmean"``, ``"none"``: (N, H, W).
        label_smoothing: in [0, 1), as in `torch.nn.functional.cross_entropy`.
        focal_gamma: >= 0; multiplies each term by (1 - p)^gamma, p the probability of its label (focal loss, arXiv
            1708.02002; ``class_weight`` is its alpha). Not together with ``label_smoothing``.
    """
    labels = Labels(target, class_weight, ignore_index, align_corners)
    return _resized_cross_entropy(logits, labels, pixel_weight, (label_smoothing, focal_gamma), reduction, 1.0)


def check_shape_options(label_smoothing: float, focal_gamma: float) -> None:
    """Checks `resized_cross_entropy`'s smoothing and focal options."""
    check_number("label_smoothing", label_smoothing, minimum=0, below=1)
    check_number("focal_gamma", focal_gamma, minimum=0)
    if label_smoothing and focal_gamma:
        raise ValueError(
            f"focal_gamma: got {focal_gamma} with label_smoothing {label_smoothing}, expected at most one of them; a focal "
            "loss of smoothed labels is not defined here"
        )


def _resized_cross_entropy(
    logits: Tensor,
    labels: Labels,
    pixel_weight: Tensor | None,
    shape: tuple[float, float],
    reduction: str,
    loss_weight: float,
) -> Tensor:
    check_float("logits", logits)
    n = logits.shape[0]
    check_word("reduction", reduction, PIXEL_REDUCTIONS)
    if shape != (0, 0):
        check_shape_options(*shape)
    check_target(labels.target, logits, (n, None, None), labels.ignore_index)
    if labels.class_weight is not None:
        check_class_weight(labels.class_weight, logits)
    if pixel_weight is not None:
        check_pixel_weight("pixel_weight", pixel_weight, logits, (n, None, None))
    return cross_entropy(logits, labels, pixel_weight, None, reduction, loss_weight, shape)[0]


def resized_ohem_cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    threshold: float = 0.7,
    min_kept: int = 100_000,
    class_weight: Tensor | None = None,
    ignore_index: int = 255,
    align_corners: bool = False,
    reduction: str = "mean",
) -> Tensor:
    """Online hard example mining (OHEM, arXiv 1604.03540): `resized_cross_entropy` over the hard pixels.

    A valid pixel is hard if the probability of its label is <= max(threshold, the k-th smallest of the batch),
    k = min(min_kept, pixels), with 1 for ignored pixels: the mask of `difficulty_mask` with
    ``select="student", confidence="label"``. The mask has no gradient.

    Args:
        logits: (N, C, h, w).
        target: labels (N, H, W).
        threshold: in [0, 1].
        min_kept: minimum number of hard pixels in the batch, >= 0.
        class_weight: (C,); ``"mean"`` then divides by the summed weights of the kept pixels.
        align_corners: convention of the resize.
        reduction: ``"mean"`` over the kept pixels, ``"mean_all"``, ``"sum"``, ``"batchmean"``, ``"none"``: (N, H, W).
    """
    labels = Labels(target, class_weight, ignore_index, align_corners)
    return _resized_ohem_cross_entropy(logits, labels, threshold, min_kept, reduction, 1.0)


def _resized_ohem_cross_entropy(
    logits: Tensor, labels: Labels, threshold: float, min_kept: int, reduction: str, loss_weight: float
) -> Tensor:
    check_float("logits", logits)
    check_word("reduction", reduction, PIXEL_REDUCTIONS)
    check_number("threshold", threshold, minimum=0, maximum=1)
    check_number("min_kept", min_kept, minimum=0)
    check_target(labels.target, logits, (logits.shape[0], None, None), labels.ignore_index)
    if labels.class_weight is not None:
        check_class_weight(labels.class_weight, logits)
    hard = Hard(threshold, min_kept, "label", "student")
    return selected_cross_entropy(logits, logits.detach(), labels, hard, reduction, loss_weight)[0]


class CEDiceOutput(NamedTuple):
    """``loss`` = ce_weight * ``ce`` + dice_weight * ``dice``, all 0-d and differentiable."""

    loss: Tensor
    ce: Tensor
    dice: Tensor


def resized_dice_loss(
    logits: Tensor,
    target: Tensor,
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
) -> Tensor:
    """Dice loss at label resolution: 1 - (2 sum p_c [y = c] + smooth) / (sum p_c + sum [y = c] + smooth) per class c.

    p is the softmax of the resized logits; sums are over the valid pixels; 0 / 0 is a dice of 1.

    Args:
        logits: (N, C, h, w). With C = 1, p is a sigmoid, labels are 0 and 1, and ``background`` does not apply.
        target: labels (N, H, W).
        batch: sum over the batch; False: per image.
        smooth: >= 0.
        square: sum p_c^2 instead of p_c in the denominator.
        background: False leaves class 0 out.
        present: True leaves out classes without a labelled pixel.
        class_weight: (C,), multiplies each class's loss; ``"mean"`` then divides by the summed weights of the counted
            classes.
        align_corners: convention of the resize.
        reduction: ``"mean"`` over the counted classes (and images), ``"sum"``, ``"none"``: (C,), or (N, C) per image.
    """
    labels = Labels(target, class_weight, ignore_index, align_corners)
    options = DiceOptions(batch, smooth, square, background, present)
    return _resized_dice_loss(logits, labels, options, reduction, 1.0)


def _resized_dice_loss(
    logits: Tensor, labels: Labels, options: DiceOptions, reduction: str, loss_weight: float
) -> Tensor:
    check_word("reduction", reduction, CLASS_REDUCTIONS)
    _check_dice(logits, labels, options)
    sums = dice_sums(logits, labels, options.square, 3)
    dice = dice_of(sums, logits.shape[1], labels.class_weight, options, reduction)
    return (dice * loss_weight).to(accumulator(logits))


def resized_cross_entropy_dice_loss(
    logits: Tensor,
    target: Tensor,
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
) -> CEDiceOutput:
    """The means of `resized_cross_entropy` and `resized_dice_loss`, in shared passes.

    Args:
        logits: (N, C, h, w); with C = 1 ``ce`` is the binary cross-entropy.
        target: labels (N, H, W).
        ce_weight, dice_weight: factors of the two.
        class_weight: (C,), for both; not with C = 1.
        The rest: as in the two functions.
    """
    labels = Labels(target, class_weight, ignore_index, align_corners)
    options = DiceOptions(batch, smooth, square, background, present)
    weights = (ce_weight, dice_weight, label_smoothing)
    return _resized_cross_entropy_dice_loss(logits, labels, options, weights, 1.0)


def _resized_cross_entropy_dice_loss(
    logits: Tensor,
    labels: Labels,
    options: DiceOptions,
    weights: tuple[float, float, float],
    loss_weight: float,
    dice_class_weight: bool = True,
) -> CEDiceOutput:
    """
    Args:
        weights: ce_weight, dice_weight, label_smoothing.
        dice_class_weight: whether the class weights are those of Dice as well.
    """
    ce_weight, dice_weight, label_smoothing = weights
    check_number("ce_weight", ce_weight, minimum=0)
    check_number("dice_weight", dice_weight, minimum=0)
    check_number("label_smoothing", label_smoothing, minimum=0, below=1)
    _check_dice(logits, labels, options)
    if labels.class_weight is not None and logits.shape[1] == 1:
        raise ValueError(
            "class_weight: got a weight for one logit, which is two classes to the cross-entropy; leave it out, or pass "
            "pos_weight to resized_binary_cross_entropy and add resized_dice_loss"
        )
    sums = dice_sums(logits, labels, options.square, 5 if label_smoothing else 4)
    dice = dice_of(sums, logits.shape[1], labels.class_weight if dice_class_weight else None, options, "mean")
    ce = cross_entropy_of(sums, labels.class_weight, label_smoothing, "mean")
    loss = loss_weight * (ce_weight * ce + dice_weight * dice)
    acc = accumulator(logits)
    return CEDiceOutput(loss.to(acc), (loss_weight * ce).to(acc), (loss_weight * dice).to(acc))


def _check_dice(logits: Tensor, labels: Labels, options: DiceOptions) -> None:
    check_float("logits", logits)
    check_number("smooth", options.smooth, minimum=0)
    n, classes = logits.shape[:2]
    check_target(labels.target, logits, (n, None, None), labels.ignore_index, max(classes, 2))
    if labels.class_weight is not None:
        check_class_weight(labels.class_weight, logits)


def resized_binary_cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    pos_weight: Tensor | None = None,
    pixel_weight: Tensor | None = None,
    ignore_index: int = 255,
    align_corners: bool = False,
    reduction: str = "mean",
) -> Tensor:
    """Binary cross-entropy with logits at label resolution, each class against the rest.

    Args:
        logits: (N, C, h, w).
        target: 0 and 1 of any integer dtype or bool, (N, C, H, W), or (N, H, W) for C = 1. Elements equal to
            ``ignore_index`` do not count.
        pos_weight: (C,), multiplies the terms of ones, as in `torch.nn.functional.binary_cross_entropy_with_logits`.
        pixel_weight: (N, H, W), or (N, h', w') of another size, resized like the logits; scales the terms, not the
            count.
        align_corners: convention of the resize.
        reduction: ``"mean"`` over counted elements, ``"mean_all"``, ``"sum"``, ``"batchmean"``, ``"none"``: shaped like
            ``target``.
    """
    weights = (pos_weight, pixel_weight)
    return _resized_binary_cross_entropy(logits, target, weights, ignore_index, align_corners, reduction, 1.0)


def _resized_binary_cross_entropy(
    logits: Tensor,
    target: Tensor,
    weights: tuple[Tensor | None, Tensor | None],
    ignore_index: int,
    align_corners: bool,
    reduction: str,
    loss_weight: float,
) -> Tensor:
    pos_weight, pixel_weight = weights
    check_float("logits", logits)
    check_word("reduction", reduction, PIXEL_REDUCTIONS)
    elements = check_elements(target, logits, ignore_index)
    shape, target = target.shape, elements
    n, _, height, width = target.shape
    if pos_weight is not None:
        check_class_weight(pos_weight, logits, "pos_weight")
    if pixel_weight is not None:
        check_pixel_weight("pixel_weight", pixel_weight, logits, (n, None, None))
    how = reduction_of(reduction, target.numel(), n, counted=True, weight=loss_weight)
    backend = backends.choose("resized_binary_cross_entropy", logits.device)
    if logits.numel() == 0 or target.numel() == 0:
        return nothing(logits, shape, reduction)
    acc = accumulator(logits)
    pixel_weight = dense(pixel_weight, acc)
    if pixel_weight is not None and (reduction == "none" or backend == "reference"):
        pixel_weight = reference.resize(pixel_weight, (height, width), align_corners)
    if backend == "reference":
        resized = reference.resize(logits, (height, width), align_corners)
        terms, valid = reference.binary_cross_entropy(resized, target, pos_weight, ignore_index)
        if pixel_weight is not None:
            terms = terms * torch.where(valid, pixel_weight[:, None].to(terms.dtype), 0)
        loss = reference.reduce(terms, *how, valid.sum())
    else:
        (logits,) = dense_each(logits)
        pixel_weight = None if pixel_weight is None else pixel_weight[:, None]
        tensors = (logits, dense(target), dense(pos_weight, acc), pixel_weight)
        loss = evaluate(RESIZED_BINARY_CROSS_ENTROPY, backend, *how, *tensors, ignore_index, align_corners)
    return loss.reshape(shape) if reduction == "none" else loss


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
    activation: str = "softmax",
) -> Tensor:
    """`kd_loss` fused with a bilinear resize of student and teacher to ``size``.

    Args:
        student: logits (N, C, h, w).
        teacher: logits (N, C, h', w').
        size: (H, W) of the labels.
        target: labels (N, H, W) or None.
        pixel_weight: (N, H, W), or another size, resized like the logits.
        temperature, ignore_index, align_corners, reduction, activation: as in `kd_loss` and `resized_cross_entropy`.
    """
    options = (temperature, ignore_index, align_corners, activation)
    return _resized_kd_loss(student, teacher, target, pixel_weight, size, options, reduction, 1.0)


def _resized_kd_loss(
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None,
    pixel_weight: Tensor | None,
    size: tuple[int, int],
    options: tuple[float, int, bool, str],
    reduction: str,
    loss_weight: float,
) -> Tensor:
    temperature, ignore_index, align_corners, activation = options
    check_pair(student, teacher, same_size=False)
    check_word("reduction", reduction, PIXEL_REDUCTIONS)
    check_word("activation", activation, ACTIVATIONS)
    check_number("temperature", temperature, above=0)
    n, classes = student.shape[:2]
    size = _size(size)
    if target is not None:
        check_target(target, student, (n, *size), ignore_index)
    if pixel_weight is not None:
        check_pixel_weight("pixel_weight", pixel_weight, student, (n, None, None))
    pixels = n * size[0] * size[1]
    how = reduction_of(reduction, pixels, n, counted=target is not None, weight=loss_weight)
    loss = RESIZED_KD if activation == "softmax" else RESIZED_KD_SIGMOID
    backend = backends.choose(loss.name, student.device)
    if student.numel() == 0 or teacher.numel() == 0 or pixels == 0:
        return nothing(student, (n, *size), reduction)
    pixel_weight = dense(pixel_weight, accumulator(student, teacher))
    if pixel_weight is not None and (reduction == "none" or backend == "reference"):
        pixel_weight = reference.resize(pixel_weight, size, align_corners)
    if backend == "reference":
        student, teacher = (reference.resize(x, size, align_corners) for x in (student, constant(teacher)))
        plain = reference.kd if loss is RESIZED_KD else reference.kd_sigmoid
        terms = plain(student, teacher, temperature)
        terms, count = reference.count_pixels(terms, target, pixel_weight, classes, ignore_index)
        return reference.reduce(terms, *how, count)
    student, teacher = dense_each(student, teacher)
    tensors = (student, teacher, dense(target), pixel_weight)
    return evaluate(loss, backend, *how, *tensors, size, temperature, ignore_index, align_corners)


@torch.no_grad()
def teacher_confidence(main: Tensor, aux: Tensor, *, direction: str = "aux_main") -> Tensor:
    """RDD's TFE map: exp(-D), D the per-pixel KL between the teacher's two heads (arXiv 2407.03719).

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
    check_word("direction", direction, DIRECTIONS)
    return confidence_of(main, aux, direction)


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
        student, teacher: logits (N, C, h, w), resized to the labels.
        target: labels (N, H, W).
        threshold: in [0, 1].
        min_kept: >= 0; 0 uses the threshold alone.
        confidence: probability of the largest (``"max"``) or of the labelled class (``"label"``); 1 where ignored.
        select: ``"xor"``, ``"or"``, ``"and"``, ``"student"`` (plain OHEM), ``"student_only"`` (student hard, teacher
            easy).
        align_corners: convention of the resize.

    Returns:
        bool (N, H, W), False where ignored, without gradient.
    """
    check_pair(student, teacher, same_size=False)
    check_target(target, student, (student.shape[0], None, None), ignore_index)
    check_number("threshold", threshold, minimum=0)
    check_number("min_kept", min_kept, minimum=0)
    check_word("confidence", confidence, ("max", "label"))
    check_word("select", select, SELECTIONS)
    labels = Labels(target, None, ignore_index, align_corners)
    return difficulty(student, teacher, labels, Hard(threshold, min_kept, confidence, select), keep_lse=False)[0]


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
    selected by `difficulty_mask`. KD: `kd_loss` at logit size over all pixels.

    Args:
        student, teacher: main logits (N, C, h, w).
        target: labels (N, H, W).
        stage: ``"tfe"`` or ``"tse"``.
        teacher_aux: the teacher's auxiliary logits (N, C, h, w); required by TFE, by ``blend`` and by ``student_aux``
            in TSE.
        student_aux: the student's auxiliary logits; they add ``aux_weight`` times the same term, with its own mask.
        preset: ``"paper"`` or ``"official"`` (the released code); provides every argument that is None.
        class_weight: (C,), used in TSE only.
        blend: in TSE, the share of the TFE term: task = (1 - blend) * TSE + blend * TFE.

    Raises:
        ValueError: see the module; also TFE without ``teacher_aux``, or an auxiliary term without both auxiliary heads.
    """
    options = RDDOptions(preset, kd_weight, temperature, threshold, min_kept, select, aux_weight, align_corners)
    heads = Heads(student, teacher, student_aux, teacher_aux)
    return _rdd_loss(heads, target, class_weight, ignore_index, options, stage, blend)


class RDDOptions(NamedTuple):
    """Options of `rdd_loss`; None: the preset's value."""

    preset: str
    kd_weight: float
    temperature: float
    threshold: float | None
    min_kept: int | None
    select: str
    aux_weight: float | None
    align_corners: bool | None
    loss_weight: float = 1.0


def _rdd_loss(
    heads: Heads,
    target: Tensor,
    class_weight: Tensor | None,
    ignore_index: int,
    options: RDDOptions,
    stage: str,
    blend: float | None,
) -> RDDOutput:
    check_word("stage", stage, ("tfe", "tse"))
    check_word("preset", options.preset, tuple(PRESETS))
    check_word("select", options.select, SELECTIONS)
    p = PRESETS[options.preset]
    aux_weight = options.aux_weight
    if aux_weight is None:
        aux_weight = p.aux_weight if heads.student_aux is not None else 0.0
    align = p.align_corners if options.align_corners is None else options.align_corners
    labels = Labels(target, class_weight, ignore_index, align)
    _check_rdd(heads, labels, options, aux_weight, blend)
    threshold = p.threshold if options.threshold is None else options.threshold
    min_kept = p.min_kept if options.min_kept is None else options.min_kept
    hard = Hard(threshold, min_kept, p.confidence, options.select)

    def tfe(confidence: Tensor, share: float) -> tuple[Tensor, Tensor]:
        plain = labels._replace(class_weight=None)
        task, count = cross_entropy(heads.student, plain, confidence, None, "mean_all", share)
        if heads.student_aux is not None and aux_weight > 0:
            task = task + cross_entropy(heads.student_aux, plain, confidence, None, "mean_all", share * aux_weight)[0]
        return task, count.sign()  # every valid pixel contributes to the task loss

    def tse(share: float) -> tuple[Tensor, Tensor]:
        task, selected = selected_cross_entropy(heads.student, heads.teacher, labels, hard, p.tse_reduction, share)
        if heads.student_aux is not None and aux_weight > 0:
            if heads.teacher_aux is None:
                raise ValueError(
                    "rdd_loss: the mask of the auxiliary term compares both auxiliary heads, but teacher_aux is None; pass "
                    "it or aux_weight=0"
                )
            aux = heads.student_aux, heads.teacher_aux
            task = task + selected_cross_entropy(*aux, labels, hard, p.tse_reduction, share * aux_weight)[0]
        return task, selected

    weight = options.loss_weight
    if stage == "tse" and blend is None:
        how = mean_of(heads.student, weight)
        kd = kd_of(heads.student, heads.teacher, None, None, (options.temperature, ignore_index, "softmax"), how)
        return _rdd_output(*tse(weight), kd, options.kd_weight, stage)
    if heads.teacher_aux is None:
        raise ValueError(
            "rdd_loss: the TFE stage compares the teacher's main and auxiliary logits, but teacher_aux is None; pass "
            'teacher_aux, or leave TFE out (tfe_steps=0 in RDDLoss, stage="tse" here)'
        )
    check_same("teacher_aux", heads.teacher_aux, "teacher", heads.teacher)
    kd, confidence = kd_and_confidence(heads, p.direction, options.temperature, weight)
    if blend is None or stage == "tfe":
        return _rdd_output(*tfe(confidence, weight), kd, options.kd_weight, stage)
    early, _ = tfe(confidence, weight)
    task, selected = tse(weight)
    # Multiplies tensors instead of entering the scale: it changes at every step and would recompile each time.
    return _rdd_output((1 - blend) * task + blend * early, selected, kd, options.kd_weight, stage)


def _check_rdd(heads: Heads, labels: Labels, options: RDDOptions, aux_weight: float, blend: float | None) -> None:
    check_number("aux_weight", aux_weight, minimum=0)
    check_number("kd_weight", options.kd_weight, minimum=0)
    check_number("temperature", options.temperature, above=0)
    if blend is not None:
        check_number("blend", blend, minimum=0, maximum=1)
    if aux_weight > 0 and heads.student_aux is None:
        raise ValueError(
            f"rdd_loss: aux_weight is {aux_weight} but student_aux is None; pass the student's auxiliary logits or "
            "aux_weight=0"
        )
    check_pair(heads.student, heads.teacher)
    check_target(labels.target, heads.student, (heads.student.shape[0], None, None), labels.ignore_index)
    if labels.class_weight is not None:
        check_class_weight(labels.class_weight, heads.student)
    if heads.student_aux is not None:
        check_float("student_aux", heads.student_aux)
        check_same("student_aux", heads.student_aux, "student", heads.student, same_size=False)
    if heads.teacher_aux is not None:
        check_float("teacher_aux", heads.teacher_aux)
        check_same("teacher_aux", heads.teacher_aux, "teacher", heads.teacher, same_size=False)
        check_teacher("teacher_aux", heads.teacher_aux)


def _rdd_output(task: Tensor, selected: Tensor, kd: Tensor, kd_weight: float, stage: str) -> RDDOutput:
    return RDDOutput(task + (kd if kd_weight == 1 else kd_weight * kd), task, kd, stage, selected)


def _size(size: tuple[int, int]) -> tuple[int, int]:
    # int() of a symbolic size would specialise compiled code on it.
    whole = [v if isinstance(v, int | torch.SymInt) else int(v) for v in size]
    if len(size) != 2 or any(a != b or a < 0 for a, b in zip(whole, size, strict=True)):
        raise ValueError(f"size: got {size!r}, expected (height, width) of the labels")
    return whole[0], whole[1]

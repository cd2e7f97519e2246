"""Every operator in plain PyTorch: the specification, and the fallback where there is no kernel.

Shapes and words are those of :mod:`fastkd.functional`; arguments are taken as checked. Arithmetic is fp32 (fp64 for
fp64 inputs); everything is differentiable with respect to the student by autograd. Pixel losses come back per pixel,
with what is counted; :func:`reduce` turns terms into one number.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .ops import accumulator

_GROUP_DIMS = {"hw": (2, 3), "nhw": (0, 2, 3), "c": (1,), "chw": (1, 2, 3)}


def nfd(student: Tensor, teacher: Tensor, dims: str, eps: float) -> Tensor:
    """NFD (arXiv 2207.05256): per group, mean of (z(S) - z(T))^2 with z(x) = (x - mean) / sqrt(var + eps)."""
    acc, dim = accumulator(student, teacher), _GROUP_DIMS[dims]

    def standardise(x: Tensor) -> Tensor:
        x = x.to(acc)
        x = x - x.mean(dim, keepdim=True)
        return x * (x.square().mean(dim, keepdim=True) + eps).rsqrt()

    return (standardise(student) - standardise(teacher)).square().mean(dim)


def kl(student: Tensor, teacher: Tensor, temperature: float, dim: int) -> Tensor:
    """tau^2 * KL(softmax(T / tau) || softmax(S / tau)) over ``dim``; a teacher logit of -inf adds 0."""
    acc = accumulator(student, teacher)
    log_s = F.log_softmax(student.to(acc) / temperature, dim)
    log_t = F.log_softmax(teacher.to(acc) / temperature, dim)
    p = log_t.exp()
    return torch.where(p == 0, 0, p * (log_t - log_s)).sum(dim) * temperature**2


def kd(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Pixel-wise KD (Hinton, arXiv 1503.02531): KL over the classes, (N, H, W)."""
    return kl(student, teacher, temperature, 1)


def cwd(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """CWD (arXiv 2011.13256): KL over the pixels of each channel, (N, C)."""
    return kl(student.flatten(2), teacher.flatten(2), temperature, 2)


def resize(x: Tensor, size: tuple[int, int], align_corners: bool) -> Tensor:
    """Bilinear interpolation of (N, C, h, w) or (N, h, w) to ``size``, without antialiasing; fp32 or better."""
    x = x.to(accumulator(x))
    if x.shape[-2:] == size:
        return x
    if x.dim() == 3:
        return resize(x[:, None], size, align_corners)[:, 0]
    return F.interpolate(x, size, mode="bilinear", align_corners=align_corners)


def valid_pixels(target: Tensor, classes: int, ignore_index: int) -> Tensor:
    """True where a label counts: it is not ``ignore_index`` and it is a class."""
    target = target.long()  # uint8 would wrap the numbers it is compared with
    return (target != ignore_index) & (target >= 0) & (target < classes)


def cross_entropy(
    logits: Tensor, target: Tensor, class_weight: Tensor | None, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Per pixel: the class-weighted cross-entropy (0 where ignored), the valid map, and the class weight (0 where
    ignored), all (N, H, W) and at the logits' size."""
    valid = valid_pixels(target, logits.shape[1], ignore_index)
    label = torch.where(valid, target, 0).long()
    loss = F.nll_loss(F.log_softmax(logits, 1), label, reduction="none")
    weight = valid.to(loss.dtype) if class_weight is None else class_weight.to(loss.dtype)[label] * valid
    return torch.where(valid, loss * weight, 0), valid, weight


def count_pixels(
    terms: Tensor, target: Tensor | None, weight: Tensor | None, classes: int, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """Terms (N, H, W) times ``weight``, 0 where the label does not count, and how many pixels count."""
    if target is None:
        return terms if weight is None else terms * weight.to(terms.dtype), terms.new_tensor(terms.numel())
    valid = valid_pixels(target, classes, ignore_index)
    if weight is not None:
        terms = terms * torch.where(valid, weight.to(terms.dtype), 0)
    return torch.where(valid, terms, 0), valid.sum()


def reduce(terms: Tensor, reduction: str, scale: float, count: Tensor | None = None) -> Tensor:
    """Terms of pixels or groups, 0 where ignored, reduced as every operator does it (:class:`fastkd.ops.Loss`)."""
    if reduction == "none":
        return terms * scale
    total = terms.sum() * scale
    return total / torch.where(count == 0, 1, count) if reduction == "mean" and count is not None else total


def teacher_confidence(main: Tensor, aux: Tensor, direction: str) -> Tensor:
    """RDD's TFE map (arXiv 2407.03719): exp(-KL) between the teacher's two heads, (N, h, w) in (0, 1]."""
    first, second = (aux, main) if direction == "aux_main" else (main, aux)
    return torch.exp(-kd(second, first, 1.0))


def confidence(logits: Tensor, target: Tensor, kind: str, ignore_index: int, align_corners: bool) -> Tensor:
    """Probability of the largest (``"max"``) or the labelled (``"label"``) class at label size; 1 where ignored."""
    size = (target.shape[-2], target.shape[-1])
    probability = F.softmax(resize(logits, size, align_corners), 1)
    valid = valid_pixels(target, logits.shape[1], ignore_index)
    if kind == "max":
        return torch.where(valid, probability.amax(1), 1)
    label = torch.where(valid, target, 0).long()
    return torch.where(valid, probability.gather(1, label[:, None])[:, 0], 1)


def hard_pixels(confidence: Tensor, threshold: float, min_kept: int) -> Tensor:
    """confidence <= max(threshold, the k-th smallest of the batch), k = min(min_kept, number of pixels)."""
    kept = min(min_kept, confidence.numel())
    if kept == 0:
        return confidence <= threshold
    return confidence <= confidence.flatten().kthvalue(kept).values.clamp(min=threshold)


def select_pixels(student_hard: Tensor, teacher_hard: Tensor, select: str) -> Tensor:
    """Combines the two maps of hard pixels by ``select``."""
    if select == "xor":
        return student_hard ^ teacher_hard
    if select == "or":
        return student_hard | teacher_hard
    if select == "and":
        return student_hard & teacher_hard
    return student_hard if select == "student" else student_hard & ~teacher_hard


def difficulty_mask(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    threshold: float,
    min_kept: int,
    kind: str,
    select: str,
    ignore_index: int,
    align_corners: bool,
) -> Tensor:
    """RDD's TSE mask (arXiv 2407.03719): valid pixels whose difficulty the student and the teacher see differently."""
    hard = [
        hard_pixels(confidence(z, target, kind, ignore_index, align_corners), threshold, min_kept)
        for z in (student, teacher)
    ]
    return select_pixels(hard[0], hard[1], select) & valid_pixels(target, student.shape[1], ignore_index)

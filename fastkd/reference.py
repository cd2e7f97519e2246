"""Every operator in plain PyTorch: the specification, and the fallback without a kernel.

Shapes and options are those of `fastkd.functional`, already validated. Arithmetic is fp32 (fp64 for fp64 inputs);
autograd differentiates with respect to the student. Pixel losses return one term per pixel and what counts; `reduce`
reduces them.
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
    """tau^2 * KL(softmax(T / tau) || softmax(S / tau)) over ``dim``; a teacher logit of -inf contributes 0."""
    acc = accumulator(student, teacher)
    log_s = F.log_softmax(student.to(acc) / temperature, dim)
    log_t = F.log_softmax(teacher.to(acc) / temperature, dim)
    p = log_t.exp()
    return torch.where(p == 0, 0, p * (log_t - log_s)).sum(dim) * temperature**2


def kd(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Pixel-wise KD (Hinton, arXiv 1503.02531): KL over the classes, (N, H, W)."""
    return kl(student, teacher, temperature, 1)


def kd_sigmoid(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """KD of each class against the rest: tau^2 * KL of Bernoulli distributions, summed over the classes, (N, H, W)."""
    acc = accumulator(student, teacher)
    s, t = student.to(acc) / temperature, teacher.to(acc) / temperature
    total = torch.zeros_like(s[:, 0])
    for sign in (1, -1):  # the class and its complement
        p = torch.sigmoid(sign * t)
        d = F.logsigmoid(sign * t) - F.logsigmoid(sign * s)
        total = total + torch.where(p == 0, 0, p * d).sum(1)
    return total * temperature**2


def cwd(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """CWD (arXiv 2011.13256): KL over the pixels of each channel, (N, C)."""
    return kl(student.flatten(2), teacher.flatten(2), temperature, 2)


def resize(x: Tensor, size: tuple[int, int], align_corners: bool) -> Tensor:
    """Bilinear interpolation of (N, C, h, w) or (N, h, w) to ``size``, without antialiasing, in fp32 or fp64."""
    x = x.to(accumulator(x))
    if x.shape[-2:] == size:
        return x
    if x.dim() == 3:
        return resize(x[:, None], size, align_corners)[:, 0]
    return F.interpolate(x, size, mode="bilinear", align_corners=align_corners)


def valid_pixels(target: Tensor, classes: int, ignore_index: int) -> Tensor:
    """True where the label is a class and not ``ignore_index``."""
    target = target.long()  # comparisons in uint8 would wrap the other operand
    return (target != ignore_index) & (target >= 0) & (target < classes)


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float = 0.0,
    focal_gamma: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Per pixel, (N, H, W): class-weighted cross-entropy, whether it counts, and the class weight; 0 where ignored."""
    classes = logits.shape[1]
    valid = valid_pixels(target, classes, ignore_index)
    label = torch.where(valid, target, 0).long()
    log_p = F.log_softmax(logits, 1)
    loss = F.nll_loss(log_p, label, reduction="none")
    weight = valid.to(loss.dtype) if class_weight is None else class_weight.to(loss.dtype)[label] * valid
    if focal_gamma:
        rest = -torch.expm1(-loss)  # 1 - p
        # Not 0, where the derivative of a power below 1 is infinite.
        loss = loss * rest.clamp(min=torch.finfo(loss.dtype).tiny) ** focal_gamma
    terms = loss * weight
    if label_smoothing:
        each = -log_p if class_weight is None else -log_p * class_weight.to(loss.dtype)[:, None, None]
        terms = (1 - label_smoothing) * terms + label_smoothing / classes * each.sum(1)
    return torch.where(valid, terms, 0), valid, weight


def dice_sums(logits: Tensor, target: Tensor, ignore_index: int, square: bool, columns: int) -> Tensor:
    """The sums of `fastkd.ops.resized_dice`, (N, C, columns) in fp64."""
    classes = logits.shape[1]
    valid = valid_pixels(target, classes, ignore_index)
    label = torch.where(valid, target.long(), classes)
    own = torch.stack([label == c for c in range(classes)], 1)
    log_p = F.log_softmax(logits, 1)
    p = log_p.exp()
    ones = torch.ones_like(p)
    terms = [
        (p, own),
        (p.square() if square else p, valid[:, None]),
        (ones, own),
        (-log_p, own),
        (-log_p, valid[:, None]),
    ]
    return torch.stack([torch.where(w, x, 0).sum((2, 3), dtype=torch.float64) for x, w in terms[:columns]], 2)


def binary_cross_entropy(
    logits: Tensor, target: Tensor, pos_weight: Tensor | None, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """Per element of (N, C, H, W): binary cross-entropy of one class against the rest, and whether it counts."""
    valid = valid_pixels(target, 2, ignore_index)
    positive = -F.logsigmoid(logits)
    if pos_weight is not None:
        positive = positive * pos_weight.to(logits.dtype)[:, None, None]
    return torch.where(valid, torch.where(target == 1, positive, -F.logsigmoid(-logits)), 0), valid


def count_pixels(
    terms: Tensor, target: Tensor | None, weight: Tensor | None, classes: int, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """Terms (N, H, W) times ``weight``, 0 where the label does not count, and the number of counted pixels."""
    if target is None:
        return terms if weight is None else terms * weight.to(terms.dtype), terms.new_tensor(terms.numel())
    valid = valid_pixels(target, classes, ignore_index)
    if weight is not None:
        terms = terms * torch.where(valid, weight.to(terms.dtype), 0)
    return torch.where(valid, terms, 0), valid.sum()


def reduce(terms: Tensor, reduction: str, scale: float, count: Tensor | None = None) -> Tensor:
    """Reduces terms of pixels or groups, 0 where ignored, like the operators (`fastkd.ops.Loss`)."""
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
    """RDD's TSE mask (arXiv 2407.03719): valid pixels selected by ``select`` from the hard pixels of both networks."""
    hard = [
        hard_pixels(confidence(z, target, kind, ignore_index, align_corners), threshold, min_kept)
        for z in ((student,) if select == "student" else (student, teacher))
    ]
    return select_pixels(hard[0], hard[-1], select) & valid_pixels(target, student.shape[1], ignore_index)

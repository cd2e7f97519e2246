"""One RDD step per stage, official preset, no student auxiliary head; forward and backward.

Plain PyTorch follows the released code: logits upsampled with align_corners=True, the k-th smallest confidence by a
full sort; its data-dependent branch is written as a maximum, so that it compiles to one graph.

The work in bytes: every logit map read once for the part at logit size and once for the part at label size, the
gradient written, 8 bytes per label, and TSE's mask (a byte per pixel, written and read). Exponentials per class and
label pixel: 2 for cross-entropy with its gradient, in TSE one more per network for the confidences; those at logit size
are ignored.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import fastkd
from fastkd.losses import CITYSCAPES_CLASS_WEIGHTS

from .bench_kd import plain as kd
from .bench_nfd import accumulated, nbytes
from .bench_resized_cross_entropy import labels, upsample
from .harness import Case, Loss, Shape
from .roofline import Work

THRESHOLD, MIN_KEPT = 0.7, 100_000


def divergence(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    """KL(p || q) per pixel."""
    log_q, p = F.log_softmax(accumulated(q_logits), 1), F.softmax(accumulated(p_logits), 1)
    return F.kl_div(log_q, p, reduction="none").sum(1)


def hard(logits: Tensor, target: Tensor) -> Tensor:
    valid = target != 255
    confidence = F.softmax(logits, 1).gather(1, torch.where(valid, target, 0)[:, None])[:, 0].masked_fill(~valid, 1.0)
    flat = confidence.flatten()
    k = min(MIN_KEPT, flat.numel())
    kth = flat.gather(0, flat.argsort()[k - 1 : k])
    return confidence <= kth.clamp(min=THRESHOLD)


def tfe(student: Tensor, teacher: Tensor, teacher_aux: Tensor, target: Tensor) -> Tensor:
    """Weighted cross-entropy and KD."""
    size = (target.shape[1], target.shape[2])
    weight = torch.exp(-divergence(teacher_aux, teacher))
    loss = F.cross_entropy(upsample(student, size, True), target, ignore_index=255, reduction="none")
    return (upsample(weight[:, None], size, True)[:, 0] * loss).mean() + kd(student, teacher)


def tse(student: Tensor, teacher: Tensor, target: Tensor, class_weight: Tensor | None) -> Tensor:
    """The task term: cross-entropy of pixels that are hard for one network and easy for the other."""
    size = (target.shape[1], target.shape[2])
    logits = upsample(student, size, True)
    with torch.no_grad():
        mask = hard(logits, target) ^ hard(upsample(teacher, size, True), target)
    label = torch.where(mask, target, 255)
    weight = None if class_weight is None else class_weight.to(logits.dtype)
    return F.cross_entropy(logits, label, weight, ignore_index=255)


def class_weights(classes: int, device: str) -> Tensor | None:
    return torch.tensor(CITYSCAPES_CLASS_WEIGHTS, device=device) if classes == len(CITYSCAPES_CLASS_WEIGHTS) else None


def case(stage: str, shape: Shape, size: tuple[int, int], dtype: torch.dtype, **targets: float) -> Case:
    pixels = shape[0] * size[0] * size[1]

    def rivals(device: str, shape: Shape) -> dict[str, Loss | str]:
        target, class_weight = labels(shape, size, device), class_weights(shape[1], device)
        aux = torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(device, dtype)
        options = {"stage": stage, "preset": "official", "class_weight": class_weight, "teacher_aux": aux}
        return {
            "ours": lambda s, t: fastkd.rdd_loss(s, t, target, **options).loss,
            "eager": lambda s, t: (
                tfe(s, t, aux.to(t.dtype), target) if stage == "tfe" else tse(s, t, target, class_weight) + kd(s, t)
            ),
        }

    maps = {"tfe": 3 + 1 + 1, "tse": 2 + 2 + 1}[stage]
    work = Work(
        maps * nbytes(shape, dtype) + (8 if stage == "tfe" else 10) * pixels,
        {"tfe": 2, "tse": 4}[stage] * shape[1] * pixels,
    )
    # In TSE, rounding can move a pixel with a confidence near the threshold into or out of the mask.
    max_error = 2e-2 if stage == "tse" else None
    return Case(f"RDD {stage.upper()}", shape, dtype, rivals, work, size, targets, max_error)


tfe_case, tse_case = partial(case, "tfe"), partial(case, "tse")

"""One step of RDD in each stage, official preset, no auxiliary head of the student; forward and backward.

Plain PyTorch is the released code's way: logits upsampled with align_corners=True, the k-th smallest confidence by
sorting all of them, its data-dependent branch written as a maximum so that it compiles in one graph. The floor counts
exponentials a class and label pixel: 2 for cross-entropy with its gradient in TFE; in TSE one a side more for the
confidences.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

import fastkd
from fastkd.losses import CITYSCAPES_CLASS_WEIGHTS

from .bench_nfd import acc
from .bench_resized_cross_entropy import labels, upsample
from .harness import DEVICE, Case, exponentials, main

SHAPE, SIZE = (2, 19, 64, 128), (512, 1024)
THRESHOLD, MIN_KEPT = 0.7, 100_000


def kl(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    """KL(p || q) per pixel."""
    p, q = (x.to(acc(x)) for x in (p_logits, q_logits))
    return F.kl_div(F.log_softmax(q, 1), F.softmax(p, 1), reduction="none").sum(1)


def hard(logits: Tensor, target: Tensor) -> Tensor:
    valid = target != 255
    confidence = F.softmax(logits, 1).gather(1, torch.where(valid, target, 0)[:, None])[:, 0].masked_fill(~valid, 1.0)
    flat = confidence.flatten()
    k = min(MIN_KEPT, flat.numel())
    kth = flat.gather(0, flat.argsort()[k - 1 : k])
    return confidence <= kth.clamp(min=THRESHOLD)


def case(stage: str, dtype: torch.dtype) -> Case:
    n, classes = SHAPE[:2]
    target = labels(n, classes, SIZE)
    class_weight = torch.tensor(CITYSCAPES_CLASS_WEIGHTS, device=DEVICE)
    g = torch.Generator().manual_seed(2)
    teacher_aux = torch.randn(SHAPE, generator=g).to(DEVICE, dtype)
    options = {"stage": stage, "preset": "official", "class_weight": class_weight}

    def ours(student: Tensor, teacher: Tensor) -> Tensor:
        return fastkd.rdd_loss(student, teacher, target, teacher_aux=teacher_aux, **options).loss

    def tfe(student: Tensor, teacher: Tensor) -> Tensor:
        weight = torch.exp(-kl(teacher_aux.to(teacher.dtype), teacher))
        loss = F.cross_entropy(upsample(student, SIZE, True), target, ignore_index=255, reduction="none")
        return (upsample(weight[:, None], SIZE, True)[:, 0] * loss).mean() + kl(teacher, student).mean()

    def tse(student: Tensor, teacher: Tensor) -> Tensor:
        logits = upsample(student, SIZE, True)
        with torch.no_grad():
            mask = hard(logits, target) ^ hard(upsample(teacher, SIZE, True), target)
        label = torch.where(mask, target, 255)
        loss = F.cross_entropy(logits, label, class_weight.to(logits.dtype), ignore_index=255)
        return loss + kl(teacher, student).mean()

    pixels, eager = n * SIZE[0] * SIZE[1], 12 if stage == "tfe" else 18
    targets = {"eager": eager, "compile": eager, "floor": 2.5, "bytes": 8 if stage == "tfe" else 16}
    return Case(
        f"RDD {stage.upper()} at {SIZE[0]}×{SIZE[1]}",
        SHAPE,
        dtype,
        ours,
        {"tfe": tfe, "tse": tse}[stage],
        lambda s, t: {"exp": lambda: exponentials(classes * pixels)},
        lambda t: (2 if stage == "tfe" else 4) * t["exp"],
        targets if DEVICE == "cpu" and dtype == torch.float32 else {},
        label_pixels=pixels,
        # A pixel whose confidence is a rounding away from the threshold may be in one mask and not in the other.
        max_error=2e-2 if stage == "tse" else None,
    )


CASES = [case(stage, dtype) for stage in ("tfe", "tse") for dtype in (torch.float32, torch.bfloat16)]

if __name__ == "__main__":
    main(CASES)

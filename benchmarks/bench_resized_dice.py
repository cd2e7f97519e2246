"""Dice, and cross-entropy with Dice, at label resolution, forward and backward.

Plain PyTorch upsamples the logits, takes a softmax, makes the labels one-hot and sums over all pixels. The work: logits
read twice, gradient written, 16 bytes per label (read in both passes); 2 exponentials per class and label pixel, one
for the sums and one for the gradient, which depends on them. Cross-entropy adds none.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

import fastkd

from .bench_nfd import nbytes
from .bench_resized_cross_entropy import labels, upsample
from .harness import Case, Loss, Shape
from .roofline import Work


def dice(upsampled: Tensor, target: Tensor) -> Tensor:
    valid = (target != 255)[:, None]
    p = upsampled.softmax(1) * valid
    onehot = F.one_hot(target.masked_fill(~valid[:, 0], 0), p.shape[1]).movedim(3, 1) * valid
    over = (0, 2, 3)
    return (1 - (2 * (p * onehot).sum(over) + 1) / (p.sum(over) + onehot.sum(over) + 1)).mean()


def plain(logits: Tensor, target: Tensor) -> Tensor:
    return dice(upsample(logits, (target.shape[1], target.shape[2])), target)


def plain_both(logits: Tensor, target: Tensor) -> Tensor:
    upsampled = upsample(logits, (target.shape[1], target.shape[2]))
    return F.cross_entropy(upsampled, target, ignore_index=255) + dice(upsampled, target)


def work(shape: Shape, size: tuple[int, int], dtype: torch.dtype) -> Work:
    pixels = shape[0] * size[0] * size[1]
    return Work(3 * nbytes(shape, dtype) + 16 * pixels, 2 * shape[1] * pixels)


def case(shape: Shape, size: tuple[int, int], dtype: torch.dtype, **targets: float) -> Case:
    def rivals(device: str, shape: Shape) -> dict[str, Loss | str]:
        target = labels(shape, size, device)
        return {
            "ours": lambda s, t: fastkd.resized_dice_loss(s, target),
            "eager": lambda s, t: plain(s, target),
        }

    return Case("Dice", shape, dtype, rivals, work(shape, size, dtype), size, targets)


def ce_case(shape: Shape, size: tuple[int, int], dtype: torch.dtype, **targets: float) -> Case:
    def rivals(device: str, shape: Shape) -> dict[str, Loss | str]:
        target = labels(shape, size, device)
        return {
            "ours": lambda s, t: fastkd.resized_cross_entropy_dice_loss(s, target).loss,
            "eager": lambda s, t: plain_both(s, target),
        }

    return Case("CE + Dice", shape, dtype, rivals, work(shape, size, dtype), size, targets)

"""Cross-entropy at label resolution, forward and backward; with label smoothing, and as focal loss.

The work: logits and 8 bytes per label read, gradient written at logit size; 2 exponentials per class and label pixel,
one for the loss and one for a separate gradient pass. Computing the gradient in the forward can need less.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

import fastkd

from .bench_kd import rows
from .bench_nfd import accumulated, nbytes
from .harness import Case, Loss, Shape, liger
from .roofline import Work


def labels(shape: Shape, size: tuple[int, int], device: str) -> Tensor:
    """Random labels for logits of ``shape``, a tenth of them ignored."""
    n, classes, _, _ = shape
    g = torch.Generator().manual_seed(1)
    target = torch.randint(0, classes, (n, *size), generator=g)
    target[torch.rand(n, *size, generator=g) < 0.1] = 255
    return target.to(device)


def upsample(x: Tensor, size: tuple[int, int], align_corners: bool = False) -> Tensor:
    return F.interpolate(accumulated(x), size, mode="bilinear", align_corners=align_corners)


def plain(logits: Tensor, target: Tensor) -> Tensor:
    """The usual implementation: upsample the logits to the labels, then the loss."""
    return F.cross_entropy(upsample(logits, (target.shape[1], target.shape[2])), target, ignore_index=255)


def liger_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Upsampled, then one row per pixel."""
    from liger_kernel.transformers import LigerCrossEntropyLoss

    return LigerCrossEntropyLoss(ignore_index=255)(rows(upsample(logits, target.shape[-2:])), target.flatten())


def case(shape: Shape, size: tuple[int, int], dtype: torch.dtype, **targets: float) -> Case:
    pixels = shape[0] * size[0] * size[1]

    def rivals(device: str, shape: Shape) -> dict[str, Loss | str]:
        target = labels(shape, size, device)
        return {
            "ours": lambda s, t: fastkd.resized_cross_entropy(s, target),
            "eager": lambda s, t: plain(s, target),
            "liger": liger() or (lambda s, t: liger_cross_entropy(s, target)),
        }

    work = Work(2 * nbytes(shape, dtype) + 8 * pixels, 2 * shape[1] * pixels)
    return Case("resized CE", shape, dtype, rivals, work, size, targets)


def smoothing_case(shape: Shape, size: tuple[int, int], dtype: torch.dtype, **targets: float) -> Case:
    """Label smoothing of 0.1."""

    def rivals(device: str, shape: Shape) -> dict[str, Loss | str]:
        target = labels(shape, size, device)
        return {
            "ours": lambda s, t: fastkd.resized_cross_entropy(s, target, label_smoothing=0.1),
            "eager": lambda s, t: F.cross_entropy(upsample(s, size), target, ignore_index=255, label_smoothing=0.1),
        }

    return replace(case(shape, size, dtype, **targets), op="smoothed CE", rivals=rivals)


def plain_focal(logits: Tensor, target: Tensor) -> Tensor:
    loss = F.cross_entropy(upsample(logits, target.shape[-2:]), target, ignore_index=255, reduction="none")
    return ((1 - torch.exp(-loss)) ** 2 * loss).sum() / (target != 255).sum()


def focal_case(shape: Shape, size: tuple[int, int], dtype: torch.dtype, **targets: float) -> Case:
    """A focal loss with gamma 2."""

    def rivals(device: str, shape: Shape) -> dict[str, Loss | str]:
        target = labels(shape, size, device)
        return {
            "ours": lambda s, t: fastkd.resized_cross_entropy(s, target, focal_gamma=2.0),
            "eager": lambda s, t: plain_focal(s, target),
        }

    return replace(case(shape, size, dtype, **targets), op="focal CE", rivals=rivals)

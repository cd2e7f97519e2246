"""Binary cross-entropy at label resolution with labels per class, (N, C, H, W), forward and backward.

The work: logits read, gradient written, a byte per label; one exponential per class and label pixel for loss and
gradient.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

import fastkd

from .bench_nfd import nbytes
from .bench_resized_cross_entropy import upsample
from .harness import Case, Loss, Shape
from .roofline import Work


def elements(shape: Shape, size: tuple[int, int], device: str) -> Tensor:
    """Random labels per class, one byte each, as a data set's masks."""
    n, classes, _, _ = shape
    g = torch.Generator().manual_seed(1)
    return torch.randint(0, 2, (n, classes, *size), generator=g, dtype=torch.uint8).to(device)


def plain(logits: Tensor, target: Tensor) -> Tensor:
    upsampled = upsample(logits, (target.shape[2], target.shape[3]))
    return F.binary_cross_entropy_with_logits(upsampled, target.to(upsampled.dtype))


def case(shape: Shape, size: tuple[int, int], dtype: torch.dtype, **targets: float) -> Case:
    pixels = shape[0] * shape[1] * size[0] * size[1]

    def rivals(device: str, shape: Shape) -> dict[str, Loss | str]:
        target = elements(shape, size, device)
        return {
            "ours": lambda s, t: fastkd.resized_binary_cross_entropy(s, target),
            "eager": lambda s, t: plain(s, target),
        }

    return Case("BCE", shape, dtype, rivals, Work(2 * nbytes(shape, dtype) + pixels, pixels), size, targets)

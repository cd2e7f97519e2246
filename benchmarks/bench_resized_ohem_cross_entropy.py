"""OHEM at label resolution, forward and backward.

Plain PyTorch upsamples the logits and sorts the probabilities of all labels. The work: logits read once for the
probabilities and once for the loss, gradient written, 8 bytes per label and the mask (a byte per pixel, written and
read); 3 exponentials per class and label pixel, one for the probabilities and two for cross-entropy with its gradient.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

import fastkd

from .bench_nfd import nbytes
from .bench_rdd import hard
from .bench_resized_cross_entropy import labels, upsample
from .harness import Case, Loss, Shape
from .roofline import Work


def plain(logits: Tensor, target: Tensor) -> Tensor:
    upsampled = upsample(logits, (target.shape[1], target.shape[2]))
    with torch.no_grad():
        kept = torch.where(hard(upsampled, target), target, 255)
    return F.cross_entropy(upsampled, kept, ignore_index=255)


def case(shape: Shape, size: tuple[int, int], dtype: torch.dtype, **targets: float) -> Case:
    pixels = shape[0] * size[0] * size[1]

    def rivals(device: str, shape: Shape) -> dict[str, Loss | str]:
        target = labels(shape, size, device)
        return {
            "ours": lambda s, t: fastkd.resized_ohem_cross_entropy(s, target),
            "eager": lambda s, t: plain(s, target),
        }

    work = Work(3 * nbytes(shape, dtype) + 10 * pixels, 3 * shape[1] * pixels)
    # Rounding can move a pixel with a probability near the limit into or out of the mask.
    return Case("OHEM", shape, dtype, rivals, work, size, targets, max_error=2e-2)

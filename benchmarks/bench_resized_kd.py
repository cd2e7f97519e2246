"""KD at label resolution, forward and backward.

The work: both logits read, gradient written at logit size; 4 exponentials per class and label pixel, one per side for
the loss and for a separate gradient pass. Computing the gradient in the forward can need less.
"""

import torch
from torch import Tensor

import fastkd

from . import bench_kd
from .bench_nfd import nbytes
from .bench_resized_cross_entropy import upsample
from .harness import Case, Loss, Shape, liger
from .roofline import Work


def plain(student: Tensor, teacher: Tensor, size: tuple[int, int]) -> Tensor:
    return bench_kd.plain(upsample(student, size), upsample(teacher, size))


def case(shape: Shape, size: tuple[int, int], dtype: torch.dtype, **targets: float) -> Case:
    def rivals(device: str, shape: Shape) -> dict[str, Loss | str]:
        return {
            "ours": lambda s, t: fastkd.resized_kd_loss(s, t, size=size),
            "eager": lambda s, t: plain(s, t, size),
            "liger": liger() or (lambda s, t: bench_kd.liger_kl(upsample(s, size), upsample(t, size))),
        }

    work = Work(3 * nbytes(shape, dtype), 4 * shape[0] * shape[1] * size[0] * size[1])
    return Case("resized KD", shape, dtype, rivals, work, size, targets)


def sigmoid_case(shape: Shape, size: tuple[int, int], dtype: torch.dtype, **targets: float) -> Case:
    """Sigmoid per class: one exponential per side gives loss and gradient."""

    def rivals(device: str, shape: Shape) -> dict[str, Loss | str]:
        return {
            "ours": lambda s, t: fastkd.resized_kd_loss(s, t, size=size, activation="sigmoid"),
            "eager": lambda s, t: bench_kd.plain_sigmoid(upsample(s, size), upsample(t, size)),
        }

    work = Work(3 * nbytes(shape, dtype), 2 * shape[0] * shape[1] * size[0] * size[1])
    return Case("resized KD, sigmoid", shape, dtype, rivals, work, size, targets)

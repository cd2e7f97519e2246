"""Pixel-wise KD, forward and backward.

The work is that of a step which computes the gradient in a pass of its own: read S and T twice and write the gradient
(5 transfers), and 4 exponentials an element (each side, each way). Making the gradient in the forward can go below it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

import fastkd

from .bench_nfd import accumulated, nbytes
from .harness import Case, Loss, Shape, liger
from .roofline import Work


def plain(student: Tensor, teacher: Tensor) -> Tensor:
    """As segmentation code bases write it: kl_div of a log-softmax and a softmax."""
    log_s = F.log_softmax(accumulated(student), 1)
    return F.kl_div(log_s, F.softmax(accumulated(teacher), 1), reduction="sum") / (student.numel() // student.shape[1])


def rows(x: Tensor) -> Tensor:
    """(N, C, H, W) as the (pixels, C) that libraries for language models take: a copy."""
    return x.movedim(1, 3).flatten(0, 2).contiguous()


def liger_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """Liger-Kernel's KL takes log-probabilities and probabilities, one row a pixel."""
    from liger_kernel.transformers import LigerKLDIVLoss

    log_s = F.log_softmax(rows(accumulated(student)), 1)
    return LigerKLDIVLoss(reduction="batchmean")(log_s, F.softmax(rows(accumulated(teacher)), 1))


def rivals(device: str, shape: Shape) -> dict[str, Loss | str]:
    return {"ours": fastkd.kd_loss, "eager": plain, "liger": liger() or liger_kl}


def case(shape: Shape, size: tuple[int, int] | None, dtype: torch.dtype, **targets: float) -> Case:
    """``size`` plays no part."""
    work = Work(5 * nbytes(shape, dtype), 4 * torch.Size(shape).numel())
    return Case("KD", shape, dtype, rivals, work, targets=targets)


def plain_sigmoid(student: Tensor, teacher: Tensor) -> Tensor:
    """Each class against the rest: the binary cross-entropy of the teacher's probabilities, less their entropy."""
    s, p = accumulated(student), torch.sigmoid(accumulated(teacher))
    entropy = torch.special.entr(p) + torch.special.entr(1 - p)
    total = (F.binary_cross_entropy_with_logits(s, p, reduction="none") - entropy).sum()
    return total / (student.numel() // student.shape[1])


def sigmoid_case(shape: Shape, size: tuple[int, int] | None, dtype: torch.dtype, **targets: float) -> Case:
    """Read S and T, write the gradient: a class needs no other, so one read makes both. Two exponentials an element."""

    def rivals(device: str, shape: Shape) -> dict[str, Loss | str]:
        return {"ours": lambda s, t: fastkd.kd_loss(s, t, activation="sigmoid"), "eager": plain_sigmoid}

    work = Work(3 * nbytes(shape, dtype), 2 * torch.Size(shape).numel())
    return Case("KD, sigmoid", shape, dtype, rivals, work, targets=targets)

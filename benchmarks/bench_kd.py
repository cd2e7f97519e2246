"""Pixel-wise KD, forward and backward.

The work is that of a step with a separate gradient pass: read S and T twice and write the gradient (5 transfers); 4
exponentials per element (each side, each pass). Computing the gradient in the forward can need less.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

import fastkd

from .bench_nfd import accumulated, nbytes
from .harness import Case, Loss, Shape, liger
from .roofline import Work


def plain(student: Tensor, teacher: Tensor) -> Tensor:
    """As in segmentation code bases: kl_div of a log-softmax and a softmax."""
    log_s = F.log_softmax(accumulated(student), 1)
    return F.kl_div(log_s, F.softmax(accumulated(teacher), 1), reduction="sum") / (student.numel() // student.shape[1])


def rows(x: Tensor) -> Tensor:
    """(N, C, H, W) copied to (pixels, C), as language-model libraries expect."""
    return x.movedim(1, 3).flatten(0, 2).contiguous()


def liger_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """Liger-Kernel's KL takes log-probabilities and probabilities, one row per pixel."""
    from liger_kernel.transformers import LigerKLDIVLoss

    log_s = F.log_softmax(rows(accumulated(student)), 1)
    return LigerKLDIVLoss(reduction="batchmean")(log_s, F.softmax(rows(accumulated(teacher)), 1))


def rivals(device: str, shape: Shape) -> dict[str, Loss | str]:
    return {"ours": fastkd.kd_loss, "eager": plain, "liger": liger() or liger_kl}


def case(shape: Shape, size: tuple[int, int] | None, dtype: torch.dtype, **targets: float) -> Case:
    """``size`` is unused."""
    work = Work(5 * nbytes(shape, dtype), 4 * torch.Size(shape).numel())
    return Case("KD", shape, dtype, rivals, work, targets=targets)


def plain_sigmoid(student: Tensor, teacher: Tensor) -> Tensor:
    """Each class against the rest: binary cross-entropy of the teacher's probabilities minus their entropy."""
    s, p = accumulated(student), torch.sigmoid(accumulated(teacher))
    entropy = torch.special.entr(p) + torch.special.entr(1 - p)
    total = (F.binary_cross_entropy_with_logits(s, p, reduction="none") - entropy).sum()
    return total / (student.numel() // student.shape[1])


def sigmoid_case(shape: Shape, size: tuple[int, int] | None, dtype: torch.dtype, **targets: float) -> Case:
    """One read of S and T and one write of the gradient: classes are independent. Two exponentials per element."""

    def rivals(device: str, shape: Shape) -> dict[str, Loss | str]:
        return {"ours": lambda s, t: fastkd.kd_loss(s, t, activation="sigmoid"), "eager": plain_sigmoid}

    work = Work(3 * nbytes(shape, dtype), 2 * torch.Size(shape).numel())
    return Case("KD, sigmoid", shape, dtype, rivals, work, targets=targets)

"""Channel-wise distillation, forward and backward. The work is KD's: 5 transfers, 4 exponentials per element."""

import torch
import torch.nn.functional as F
from torch import Tensor

import fastkd

from .bench_nfd import accumulated, nbytes
from .harness import Case, Shape
from .roofline import Work


def plain(student: Tensor, teacher: Tensor) -> Tensor:
    """As in distillation code bases: softmax of T times the difference of log-softmaxes."""
    n, c, _, _ = student.shape
    s, t = accumulated(student).flatten(2) / 4, accumulated(teacher).flatten(2) / 4
    p_t = F.softmax(t, 2)
    return (p_t * F.log_softmax(t, 2) - p_t * F.log_softmax(s, 2)).sum() * (16 / (n * c))


def case(shape: Shape, size: tuple[int, int] | None, dtype: torch.dtype, **targets: float) -> Case:
    """``size`` is unused."""
    work = Work(5 * nbytes(shape, dtype), 4 * torch.Size(shape).numel())
    return Case(
        "CWD", shape, dtype, lambda device, shape: {"ours": fastkd.cwd_loss, "eager": plain}, work, targets=targets
    )

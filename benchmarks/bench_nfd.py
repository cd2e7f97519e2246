"""NFD, dims "hw", forward and backward.

The work is 5 transfers: the forward reads S and T; the backward reads both again and writes the gradient.
"""

import torch
from torch import Tensor

import fastkd

from .harness import Case, Shape
from .roofline import Work


def plain(student: Tensor, teacher: Tensor) -> Tensor:
    def normalise(x: Tensor) -> Tensor:
        mean = x.mean((2, 3), keepdim=True)
        var = x.var((2, 3), correction=0, keepdim=True)
        return (x - mean) / (var + 1e-5).sqrt()

    return torch.nn.functional.mse_loss(normalise(accumulated(student)), normalise(accumulated(teacher)))


def accumulated(x: Tensor) -> Tensor:
    """In fp32, as in plain code, or fp64."""
    return x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)


def case(shape: Shape, size: tuple[int, int] | None, dtype: torch.dtype, **targets: float) -> Case:
    """``size`` is unused."""
    work = Work(5 * nbytes(shape, dtype))
    return Case(
        "NFD", shape, dtype, lambda device, shape: {"ours": fastkd.nfd_loss, "eager": plain}, work, targets=targets
    )


def nbytes(shape: Shape, dtype: torch.dtype) -> int:
    return torch.Size(shape).numel() * dtype.itemsize

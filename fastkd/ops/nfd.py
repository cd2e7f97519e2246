"""Normalised feature distillation (NFD, arXiv 2207.05256): schema, fake and autograd Function.

    loss[g] = mean over group g of (z(S) - z(T))^2,   z(x) = (x - mean) / sqrt(var + eps)

The forward reads S and T once and keeps six numbers a group; the backward reads each once more and writes the gradient.
"""

import torch
from torch import Tensor

from ._registry import Saved, accumulator, operators

FORWARD = "nfd_forward(Tensor student, Tensor teacher, str dims, float eps) -> (Tensor loss, Tensor stats)"
BACKWARD = "nfd_backward(Tensor grad, Tensor student, Tensor teacher, Tensor stats, str dims) -> Tensor"


def group_shape(shape: torch.Size, dims: str) -> tuple[int, ...]:
    """Shape of one number per group for a feature map of ``shape`` (N, C, H, W)."""
    n, c, h, w = shape
    return {"hw": (n, c), "nhw": (c,), "c": (n, h, w), "chw": (n,)}[dims]


def forward_fake(student: Tensor, teacher: Tensor, dims: str, eps: float) -> tuple[Tensor, Tensor]:
    groups = group_shape(student.shape, dims)
    acc = accumulator(student)
    return student.new_empty(groups, dtype=acc), student.new_empty((*groups, 6), dtype=acc)


def backward_fake(grad: Tensor, student: Tensor, teacher: Tensor, stats: Tensor, dims: str) -> Tensor:
    return torch.empty_like(student)


OPERATORS = ((FORWARD, forward_fake), (BACKWARD, backward_fake))


class _NFD(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student: Tensor, teacher: Tensor, dims: str, eps: float, backend: str) -> Tensor:
        loss, stats = operators(backend).nfd_forward(student, teacher, dims, eps)
        ctx.saved = Saved(ctx, student, teacher, stats)
        ctx.dims, ctx.backend = dims, backend
        return loss

    @staticmethod
    def backward(ctx, grad: Tensor):
        student, teacher, stats = ctx.saved.tensors(ctx)
        out = operators(ctx.backend).nfd_backward(grad.contiguous(), student, teacher, stats, ctx.dims)
        return out, None, None, None, None


def nfd(student: Tensor, teacher: Tensor, dims: str, eps: float, backend: str) -> Tensor:
    """One mean per group; differentiable with respect to ``student``."""
    return _NFD.apply(student, teacher, dims, eps, backend)

"""Normalised feature distillation (NFD, arXiv 2207.05256): schema, fake and autograd Function.

    loss[g] = mean over group g of (z(S) - z(T))^2,   z(x) = (x - mean) / sqrt(var + eps)

The forward reads S and T once and keeps six numbers a group; the backward reads each once more and writes the gradient.
Where a group fits the shared memory of a cluster of CUDA blocks, the forward writes the gradient as well (docs/cuda.md).
"""

import torch
from torch import Tensor

from ._registry import Guess, Saved, accumulator, operators

FORWARD = "nfd_forward(Tensor student, Tensor teacher, str dims, float eps) -> (Tensor loss, Tensor stats)"
BACKWARD = "nfd_backward(Tensor grad, Tensor student, Tensor teacher, Tensor stats, str dims) -> Tensor"

FITS = "nfd_fits(Tensor student, Tensor teacher, str dims) -> bool"
"""CUDA only, as what follows: whether the forward can write the gradient, from shapes, dtypes and the device."""
FORWARD_AHEAD = (
    "nfd_forward_ahead(Tensor student, Tensor teacher, str dims, float eps, Tensor memory) "
    "-> (Tensor loss, Tensor stats, Tensor gradient, Tensor guess)"
)
"""The guess is that of ``memory`` (see :class:`Guess`); the gradient is that of the summed loss times the guess, or
uninitialised where there is none (NaN)."""
BACKWARD_AHEAD = (
    "nfd_backward_ahead(Tensor grad, Tensor student, Tensor teacher, Tensor stats, str dims, Tensor guess, "
    "Tensor(a!) gradient, Tensor(b!) memory) -> ()"
)
"""Writes the gradient of the groups whose grad is not the guess, and remembers the grad for the next one."""


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


def fits_fake(student: Tensor, teacher: Tensor, dims: str) -> bool:
    raise RuntimeError("fastkd: nfd_fits asks a device, which tracing has not")


def forward_ahead_fake(
    student: Tensor, teacher: Tensor, dims: str, eps: float, memory: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    loss, stats = forward_fake(student, teacher, dims, eps)
    return loss, stats, torch.empty_like(student), student.new_empty((), dtype=loss.dtype)


def backward_ahead_fake(
    grad: Tensor,
    student: Tensor,
    teacher: Tensor,
    stats: Tensor,
    dims: str,
    guess: Tensor,
    gradient: Tensor,
    memory: Tensor,
) -> None:
    return None


OPERATORS = ((FORWARD, forward_fake), (BACKWARD, backward_fake))
CUDA_OPERATORS = (
    *OPERATORS,
    (FITS, fits_fake),
    (FORWARD_AHEAD, forward_ahead_fake),
    (BACKWARD_AHEAD, backward_ahead_fake),
)


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


class _OneRead(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student: Tensor, teacher: Tensor, dims: str, eps: float, backend: str) -> Tensor:
        ctx.guess = Guess(("nfd", dims, student.shape, student.stride(), student.dtype), student)
        loss, stats, ctx.gradient, guess = operators(backend).nfd_forward_ahead(
            student, teacher, dims, eps, ctx.guess.memory
        )
        ctx.saved = Saved(ctx, student, teacher, stats, guess)
        ctx.dims, ctx.backend = dims, backend
        return loss

    @staticmethod
    def backward(ctx, grad: Tensor):
        student, teacher, stats, guess = ctx.saved.tensors(ctx)
        ops, grad = operators(ctx.backend), grad.contiguous()
        out, ctx.gradient = ctx.gradient, None
        if out is None:  # handed out by the first backward over this graph
            return ops.nfd_backward(grad, student, teacher, stats, ctx.dims), None, None, None, None
        ops.nfd_backward_ahead(grad, student, teacher, stats, ctx.dims, guess, out, ctx.guess.memory)
        ctx.guess.release()
        return out, None, None, None, None


def nfd(student: Tensor, teacher: Tensor, dims: str, eps: float, backend: str) -> Tensor:
    """One mean per group; differentiable with respect to ``student``."""
    ahead = (
        backend == "cuda"
        and student.requires_grad
        and torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and operators(backend).nfd_fits(student, teacher, dims)
    )
    return (_OneRead if ahead else _NFD).apply(student, teacher, dims, eps, backend)

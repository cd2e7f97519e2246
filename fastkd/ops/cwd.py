"""Channel-wise distillation (CWD, arXiv 2011.13256, eq. 2-4): schema, fake and autograd Function.

    loss[n, c] = tau^2 * KL(softmax over H*W of T[n, c] / tau || the same of S[n, c])

The forward reads S and T once (online softmax) and keeps four numbers a channel; the backward reads each once more.
"""

import torch
from torch import Tensor

from ._registry import Saved, accumulator, operators

FORWARD = "cwd_forward(Tensor student, Tensor teacher, float temperature) -> (Tensor loss, Tensor stats)"
BACKWARD = "cwd_backward(Tensor grad, Tensor student, Tensor teacher, Tensor stats, float temperature) -> Tensor"


def forward_fake(student: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    n, c = student.shape[:2]
    acc = accumulator(student)
    return student.new_empty((n, c), dtype=acc), student.new_empty((n, c, 4), dtype=acc)


def backward_fake(grad: Tensor, student: Tensor, teacher: Tensor, stats: Tensor, temperature: float) -> Tensor:
    return torch.empty_like(student)


OPERATORS = ((FORWARD, forward_fake), (BACKWARD, backward_fake))


class _CWD(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student: Tensor, teacher: Tensor, temperature: float, backend: str) -> Tensor:
        loss, stats = operators(backend).cwd_forward(student, teacher, temperature)
        ctx.saved = Saved(ctx, student, teacher, stats)
        ctx.temperature, ctx.backend = temperature, backend
        return loss

    @staticmethod
    def backward(ctx, grad: Tensor):
        student, teacher, stats = ctx.saved.tensors(ctx)
        out = operators(ctx.backend).cwd_backward(grad.contiguous(), student, teacher, stats, ctx.temperature)
        return out, None, None, None


def cwd(student: Tensor, teacher: Tensor, temperature: float, backend: str) -> Tensor:
    """One loss per sample and channel (N, C); differentiable with respect to ``student``."""
    return _CWD.apply(student, teacher, temperature, backend)

"""Pixel-wise knowledge distillation (Hinton, arXiv 1503.02531, eq. 1-2): schema, fake and autograd Function.

    loss[p] = weight[p] * tau^2 * KL(softmax(T[p] / tau) || softmax(S[p] / tau))

Forward and backward each read S and T once; nothing of the input's size is kept in between.
"""

import torch
from torch import Tensor

from ._registry import Saved, operators

FORWARD = (
    "kd_forward(Tensor student, Tensor teacher, Tensor? target, Tensor? weight, float temperature, int ignore_index, "
    "bool per_pixel) -> (Tensor loss, Tensor count)"
)
BACKWARD = (
    "kd_backward(Tensor grad, Tensor student, Tensor teacher, Tensor? target, Tensor? weight, float temperature, "
    "int ignore_index) -> Tensor"
)


def forward_fake(
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None,
    weight: Tensor | None,
    temperature: float,
    ignore_index: int,
    per_pixel: bool,
) -> tuple[Tensor, Tensor]:
    n, _, h, w = student.shape
    acc = torch.float64 if student.dtype == torch.float64 else torch.float32
    loss = student.new_empty((n, h, w) if per_pixel else (), dtype=acc)
    return loss, student.new_empty((), dtype=torch.int64)


def backward_fake(
    grad: Tensor,
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None,
    weight: Tensor | None,
    temperature: float,
    ignore_index: int,
) -> Tensor:
    return torch.empty_like(student)


class _KD(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        student: Tensor,
        teacher: Tensor,
        target: Tensor | None,
        weight: Tensor | None,
        temperature: float,
        ignore_index: int,
        reduction: str,
        backend: str,
    ) -> Tensor:
        loss, count = operators(backend).kd_forward(
            student, teacher, target, weight, temperature, ignore_index, reduction == "none"
        )
        n, _, h, w = student.shape
        scale: float | Tensor = 1.0
        if reduction == "mean" and target is not None:
            scale = count.clamp(min=1).to(loss.dtype).reciprocal()
        elif reduction in ("mean", "mean_all"):
            scale = 1.0 / (n * h * w)
        elif reduction == "batchmean":
            scale = 1.0 / n
        ctx.saved = Saved(ctx, student, teacher, target, weight)
        ctx.scale, ctx.temperature, ctx.ignore_index, ctx.backend = scale, temperature, ignore_index, backend
        return loss * scale

    @staticmethod
    def backward(ctx, grad: Tensor):
        student, teacher, target, weight = ctx.saved.tensors(ctx)
        out = operators(ctx.backend).kd_backward(
            (grad * ctx.scale).contiguous(), student, teacher, target, weight, ctx.temperature, ctx.ignore_index
        )
        return out, None, None, None, None, None, None, None


def kd(
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None,
    weight: Tensor | None,
    temperature: float,
    ignore_index: int,
    reduction: str,
    backend: str,
) -> Tensor:
    """The reduced loss, 0-d or (N, H, W) for ``"none"``; differentiable with respect to ``student``."""
    return _KD.apply(student, teacher, target, weight, temperature, ignore_index, reduction, backend)

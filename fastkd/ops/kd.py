"""Pixel-wise knowledge distillation (Hinton, arXiv 1503.02531, eq. 1-2): schema, fake and autograd Function.

    loss[p] = weight[p] * tau^2 * KL(softmax(T[p] / tau) || softmax(S[p] / tau))

Forward and backward each read S and T once; nothing of the input's size is kept in between. The C++ backend can do
both in one read (:data:`WITH_GRADIENT`): the gradient is then made in the forward, where one is needed, and handed out by
the first backward. So can CUDA's, with a guess of what the backward will bring (docs/cuda.md).
"""

import torch
from torch import Tensor

from ._registry import Guess, Saved, accumulator, operators

FORWARD = (
    "kd_forward(Tensor student, Tensor teacher, Tensor? target, Tensor? weight, float temperature, int ignore_index, "
    "bool per_pixel) -> (Tensor loss, Tensor count)"
)
BACKWARD = (
    "kd_backward(Tensor grad, Tensor student, Tensor teacher, Tensor? target, Tensor? weight, float temperature, "
    "int ignore_index) -> Tensor"
)

WITH_GRADIENT = (
    "kd_with_gradient(Tensor student, Tensor teacher, Tensor? target, Tensor? weight, float temperature, "
    "int ignore_index, float scale) -> (Tensor loss, Tensor count, Tensor gradient)"
)
"""C++ only: the summed loss, the count, and ``scale`` times the gradient of the summed loss."""
FORWARD_AHEAD = (
    "kd_forward_ahead(Tensor student, Tensor teacher, Tensor? target, Tensor? weight, float temperature, "
    "int ignore_index, float scale, bool by_count, Tensor memory) "
    "-> (Tensor loss, Tensor count, Tensor gradient, Tensor guess)"
)
"""CUDA only: the summed loss, the count, the guess of ``memory`` (see :class:`Guess`), and the gradient of the summed loss
times the guess and ``scale`` (``by_count``: and 1 / count), or uninitialised where there is no guess (NaN)."""
BACKWARD_AHEAD = (
    "kd_backward_ahead(Tensor grad, Tensor student, Tensor teacher, Tensor? target, Tensor? weight, "
    "float temperature, int ignore_index, float scale, bool by_count, Tensor count, Tensor guess, "
    "Tensor(a!) gradient, Tensor(b!) memory) -> ()"
)
"""CUDA only: writes the gradient unless the guess was right, and remembers the grad for the next one."""


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
    acc = accumulator(student)
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


def with_gradient_fake(
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None,
    weight: Tensor | None,
    temperature: float,
    ignore_index: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    loss, count = forward_fake(student, teacher, target, weight, temperature, ignore_index, False)
    return loss, count, torch.empty_like(student)


def forward_ahead_fake(
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None,
    weight: Tensor | None,
    temperature: float,
    ignore_index: int,
    scale: float,
    by_count: bool,
    memory: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    loss, count = forward_fake(student, teacher, target, weight, temperature, ignore_index, False)
    return loss, count, torch.empty_like(student), torch.empty_like(loss)


def backward_ahead_fake(
    grad: Tensor,
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None,
    weight: Tensor | None,
    temperature: float,
    ignore_index: int,
    scale: float,
    by_count: bool,
    count: Tensor,
    guess: Tensor,
    gradient: Tensor,
    memory: Tensor,
) -> None:
    return None


OPERATORS = ((FORWARD, forward_fake), (BACKWARD, backward_fake))
CPU_OPERATORS = ((WITH_GRADIENT, with_gradient_fake),)
CUDA_OPERATORS = (*OPERATORS, (FORWARD_AHEAD, forward_ahead_fake), (BACKWARD_AHEAD, backward_ahead_fake))


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
        one_read: bool,
    ) -> Tensor:
        args = (student, teacher, target, weight, temperature, ignore_index)
        n, _, h, w = student.shape
        scale: float | Tensor = {"mean": 1 / (n * h * w), "mean_all": 1 / (n * h * w), "batchmean": 1 / n}.get(
            reduction, 1.0
        )
        counted = reduction == "mean" and target is not None
        ctx.one_read, ctx.gradient = one_read, None
        if one_read:
            # The part of the scale that is known by now is in the gradient, the rest is applied in the backward. For fp16,
            # whose range ends where a gradient divided by the number of pixels begins, that part leaves p_S - p_T alone.
            ctx.known = 1.0 if counted else float(scale)
            if student.dtype == torch.float16:
                ctx.known = 1 / temperature
            loss, count, ctx.gradient = operators(backend).kd_with_gradient(*args, ctx.known)
        else:
            loss, count = operators(backend).kd_forward(*args, reduction == "none")
        if counted:
            scale = count.clamp(min=1).to(loss.dtype).reciprocal()
        ctx.saved = Saved(ctx, student, teacher, target, weight)
        ctx.scale, ctx.temperature, ctx.ignore_index, ctx.backend = scale, temperature, ignore_index, backend
        return loss * scale

    @staticmethod
    def backward(ctx, grad: Tensor):
        student, teacher, target, weight = ctx.saved.tensors(ctx)
        args = (student, teacher, target, weight, ctx.temperature, ctx.ignore_index)
        backward = operators(ctx.backend).kd_backward
        if ctx.one_read:
            # The gradient made by the forward is handed out once; a further backward over this graph makes it anew.
            out = backward(grad.new_full((), ctx.known), *args) if ctx.gradient is None else ctx.gradient
            ctx.gradient = None
            rest = ctx.scale / ctx.known  # a float, exactly 1.0 where all was known; a tensor where there are labels
            factor = float(grad * rest) if isinstance(rest, Tensor) else float(grad) * rest  # on the CPU: no wait
            if factor != 1.0:
                out.mul_(factor)
        else:
            out = backward((grad * ctx.scale).contiguous(), *args)
        return out, None, None, None, None, None, None, None, None


class _OneRead(torch.autograd.Function):
    """CUDA: as above, with a guess of grad_output."""

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
        args = (student, teacher, target, weight, temperature, ignore_index)
        n, _, h, w = student.shape
        by_count = reduction == "mean" and target is not None
        scale = {"mean": 1 / (n * h * w), "mean_all": 1 / (n * h * w), "batchmean": 1 / n}.get(reduction, 1.0)
        ctx.guess = Guess(("kd", student.shape, student.stride(), student.dtype, reduction), student)
        loss, count, ctx.gradient, guess = operators(backend).kd_forward_ahead(*args, scale, by_count, ctx.guess.memory)
        ctx.saved = Saved(ctx, student, teacher, target, weight, count, guess)
        ctx.options, ctx.backend = (temperature, ignore_index, scale, by_count), backend
        return loss * (count.clamp(min=1).to(loss.dtype).reciprocal() if by_count else scale)

    @staticmethod
    def backward(ctx, grad: Tensor):
        student, teacher, target, weight, count, guess = ctx.saved.tensors(ctx)
        out, ctx.gradient = ctx.gradient, None
        if out is None:  # handed out by the first backward over this graph
            out, guess = torch.empty_like(student), torch.full_like(guess, float("nan"))
        args = (student, teacher, target, weight, *ctx.options, count, guess, out, ctx.guess.memory)
        operators(ctx.backend).kd_backward_ahead(grad, *args)
        ctx.guess.release()
        return out, *(None,) * 7


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
    args = (student, teacher, target, weight, temperature, ignore_index, reduction, backend)
    one_read = (
        backend in ("cpu", "cuda")
        and reduction != "none"
        and student.requires_grad
        and torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
    )
    if one_read and backend == "cuda":
        return _OneRead.apply(*args)
    # Unscaled, a weighted gradient may be beyond fp16.
    one_read = one_read and (weight is None or student.dtype != torch.float16)
    return _KD.apply(*args, one_read)

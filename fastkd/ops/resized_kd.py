"""Pixel-wise KD at label resolution of logits at their own (docs/full-resolution.md): schema, fake, autograd Function.

    loss[p] = weight[p] * tau^2 * KL(softmax(bilinear(T)[p] / tau) || softmax(bilinear(S)[p] / tau))

As in ``resized_cross_entropy``, the loss and its gradient at logit size are made together, in the forward.
"""

import torch
from torch import Tensor

from ._registry import GradientAhead, Guess, Saved, accumulator, operators
from .resized_cross_entropy import fixed_scale, pixel_scale

FORWARD = (
    "resized_kd_forward(Tensor student, Tensor teacher, Tensor? target, Tensor? pixel_weight, SymInt height, "
    "SymInt width, float temperature, int ignore_index, bool align_corners, bool per_pixel) "
    "-> (Tensor loss, Tensor count)"
)
"""The loss per pixel (N, H, W), or its sum; and the number of pixels that count."""
GRADIENT = (
    "resized_kd_gradient(Tensor student, Tensor teacher, Tensor? target, Tensor? pixel_weight, SymInt height, "
    "SymInt width, float temperature, int ignore_index, bool align_corners) "
    "-> (Tensor loss, Tensor count, Tensor gradient)"
)
"""The summed loss, the count, and the gradient of the summed loss in fp32 (fp64), in the student's memory format."""
FORWARD_AHEAD = (
    "resized_kd_forward_ahead(Tensor student, Tensor teacher, Tensor? target, Tensor? pixel_weight, SymInt height, "
    "SymInt width, float temperature, int ignore_index, bool align_corners, float scale, bool by_count, "
    "Tensor memory) -> (Tensor loss, Tensor count, Tensor gradient, Tensor guess)"
)
BACKWARD_AHEAD = (
    "resized_kd_backward_ahead(Tensor grad, Tensor student, Tensor teacher, Tensor? target, Tensor? pixel_weight, "
    "SymInt height, SymInt width, float temperature, int ignore_index, bool align_corners, float scale, "
    "bool by_count, Tensor count, Tensor guess, Tensor(a!) gradient, Tensor(b!) memory) -> ()"
)
"""CUDA only, as in ``resized_cross_entropy``; student and teacher of one size."""


def forward_fake(
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None,
    pixel_weight: Tensor | None,
    height: int,
    width: int,
    temperature: float,
    ignore_index: int,
    align_corners: bool,
    per_pixel: bool,
) -> tuple[Tensor, Tensor]:
    acc = accumulator(student)
    shape = (student.shape[0], height, width) if per_pixel else ()
    return student.new_empty(shape, dtype=acc), student.new_empty((), dtype=acc)


def gradient_fake(
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None,
    pixel_weight: Tensor | None,
    height: int,
    width: int,
    temperature: float,
    ignore_index: int,
    align_corners: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    acc = accumulator(student)
    return (
        student.new_empty((), dtype=acc),
        student.new_empty((), dtype=acc),
        torch.empty_like(student, dtype=acc),
    )


def forward_ahead_fake(
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None,
    pixel_weight: Tensor | None,
    height: int,
    width: int,
    temperature: float,
    ignore_index: int,
    align_corners: bool,
    scale: float,
    by_count: bool,
    memory: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    loss = student.new_empty((), dtype=accumulator(student))
    return loss, torch.empty_like(loss), torch.empty_like(student), torch.empty_like(loss)


def backward_ahead_fake(
    grad: Tensor,
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None,
    pixel_weight: Tensor | None,
    height: int,
    width: int,
    temperature: float,
    ignore_index: int,
    align_corners: bool,
    scale: float,
    by_count: bool,
    count: Tensor,
    guess: Tensor,
    gradient: Tensor,
    memory: Tensor,
) -> None:
    return None


OPERATORS = ((FORWARD, forward_fake), (GRADIENT, gradient_fake))
CUDA_OPERATORS = (*OPERATORS, (FORWARD_AHEAD, forward_ahead_fake), (BACKWARD_AHEAD, backward_ahead_fake))


class _Reduced(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        student: Tensor,
        teacher: Tensor,
        target: Tensor | None,
        pixel_weight: Tensor | None,
        height: int,
        width: int,
        temperature: float,
        ignore_index: int,
        align_corners: bool,
        reduction: str,
        backend: str,
        needs_gradient: bool,
    ) -> Tensor:
        args = (student, teacher, target, pixel_weight, height, width, temperature, ignore_index, align_corners)
        if needs_gradient:
            loss, count, gradient = operators(backend).resized_kd_gradient(*args)
            ctx.ahead = GradientAhead(ctx, gradient, student, teacher, target, pixel_weight)
        else:
            loss, count = operators(backend).resized_kd_forward(*args, False)
        n = student.shape[0]
        ctx.options, ctx.backend = (height, width, temperature, ignore_index, align_corners), backend
        ctx.dtype, ctx.scale = student.dtype, pixel_scale(reduction, count, n * height * width, n)
        return loss * ctx.scale

    @staticmethod
    def backward(ctx, grad: Tensor):
        def make_anew(saved):
            return operators(ctx.backend).resized_kd_gradient(*saved, *ctx.options)[2]

        return ctx.ahead.scaled(ctx, grad * ctx.scale, ctx.dtype, make_anew), *(None,) * 11


class _OneRead(torch.autograd.Function):
    """CUDA: the gradient is made in the forward where grad_output was guessed, else in the backward."""

    @staticmethod
    def forward(
        ctx,
        student: Tensor,
        teacher: Tensor,
        target: Tensor | None,
        pixel_weight: Tensor | None,
        height: int,
        width: int,
        temperature: float,
        ignore_index: int,
        align_corners: bool,
        reduction: str,
        backend: str,
    ) -> Tensor:
        args, n = (student, teacher, target, pixel_weight), student.shape[0]
        kind = ("resized_kd", student.shape, student.stride(), (height, width), student.dtype, reduction)
        ctx.guess = Guess(kind, student)
        by_count = reduction == "mean" and target is not None
        scale = (
            1.0 if by_count else fixed_scale("mean_all" if reduction == "mean" else reduction, n * height * width, n)
        )
        ctx.options = (height, width, temperature, ignore_index, align_corners, scale, by_count)
        ctx.backend = backend
        loss, count, ctx.gradient, guess = operators(backend).resized_kd_forward_ahead(
            *args, *ctx.options, ctx.guess.memory
        )
        ctx.saved = Saved(ctx, *args, count, guess)
        return loss * (pixel_scale(reduction, count, n * height * width, n) if by_count else scale)

    @staticmethod
    def backward(ctx, grad: Tensor):
        *args, count, guess = ctx.saved.tensors(ctx)
        out, ctx.gradient = ctx.gradient, None
        if out is None:  # handed out by the first backward over this graph
            out, guess = torch.empty_like(args[0]), torch.full_like(guess, float("nan"))
        operators(ctx.backend).resized_kd_backward_ahead(grad, *args, *ctx.options, count, guess, out, ctx.guess.memory)
        ctx.guess.release()
        return out, *(None,) * 10


class _PerPixel(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        student: Tensor,
        teacher: Tensor,
        target: Tensor | None,
        pixel_weight: Tensor | None,
        height: int,
        width: int,
        temperature: float,
        ignore_index: int,
        align_corners: bool,
        backend: str,
    ) -> Tensor:
        ctx.saved = Saved(ctx, student, teacher, target, pixel_weight)
        ctx.options, ctx.backend = (height, width, temperature, ignore_index, align_corners), backend
        return operators(backend).resized_kd_forward(student, teacher, target, pixel_weight, *ctx.options, True)[0]

    @staticmethod
    def backward(ctx, grad: Tensor):
        student, teacher, target, pixel_weight = ctx.saved.tensors(ctx)
        weight = (grad if pixel_weight is None else grad * pixel_weight).contiguous()
        gradient = operators(ctx.backend).resized_kd_gradient(student, teacher, target, weight, *ctx.options)[2]
        return gradient.to(student.dtype), *(None,) * 9


def resized_kd(
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None,
    pixel_weight: Tensor | None,
    size: tuple[int, int],
    temperature: float,
    ignore_index: int,
    align_corners: bool,
    reduction: str,
    backend: str,
) -> Tensor:
    """The reduced loss, 0-d or (N, H, W) for ``"none"``; differentiable with respect to ``student``.

    Args:
        student, teacher: (N, C, h, w), (N, C, h', w'), each NCHW-contiguous or channels_last, both fp64 or neither.
        target: (N, H, W) contiguous or None. pixel_weight: contiguous fp32 (fp64), of size (H, W) for ``"none"``, of any
            size otherwise, or None.
    """
    args = (student, teacher, target, pixel_weight, *size, temperature, ignore_index, align_corners)
    if reduction == "none":
        return _PerPixel.apply(*args, backend)
    needs_gradient = student.requires_grad and torch.is_grad_enabled()
    if backend == "cuda" and needs_gradient and not torch.compiler.is_compiling():
        return _OneRead.apply(*args, reduction, backend)
    return _Reduced.apply(*args, reduction, backend, needs_gradient)

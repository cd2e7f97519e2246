"""Cross-entropy at label resolution of logits at their own (docs/full-resolution.md): schema, fake, autograd Function.

    loss[p] = class_weight[y] * pixel_weight[p] * -log softmax(bilinear(logits)[p])[y]

The loss and its gradient at logit size are made together, in the forward: the normaliser multiplies that gradient in the
backward. CUDA C++ knows the normaliser before and guesses what the backward will bring (docs/cuda.md). Nothing of N*C*H*W
elements exists.
"""

import torch
from torch import Tensor

from ._registry import GradientAhead, Guess, Saved, accumulator, operators

FORWARD = (
    "resized_cross_entropy_forward(Tensor logits, Tensor target, Tensor? class_weight, Tensor? pixel_weight, "
    "Tensor? mask, int ignore_index, bool align_corners, bool per_pixel) -> (Tensor loss, Tensor count)"
)
"""The loss per pixel (N, H, W), or its sum; and the summed class weights of the counted pixels (their number without)."""
GRADIENT = (
    "resized_cross_entropy_gradient(Tensor logits, Tensor target, Tensor? class_weight, Tensor? pixel_weight, "
    "Tensor? mask, int ignore_index, bool align_corners) -> (Tensor loss, Tensor count, Tensor gradient)"
)
"""The summed loss, the count, and the gradient of the summed loss in fp32 (fp64), in the logits' memory format."""
FORWARD_AHEAD = (
    "resized_cross_entropy_forward_ahead(Tensor logits, Tensor target, Tensor? class_weight, Tensor? pixel_weight, "
    "Tensor? mask, int ignore_index, bool align_corners, float scale, bool by_count, Tensor memory) "
    "-> (Tensor loss, Tensor count, Tensor gradient, Tensor guess)"
)
"""CUDA only: the summed loss, the count, the guess of ``memory`` (see :class:`Guess`), and the gradient of the summed loss
times the guess and ``scale`` (``by_count``: 1 / count instead), or uninitialised where there is no guess (NaN)."""
BACKWARD_AHEAD = (
    "resized_cross_entropy_backward_ahead(Tensor grad, Tensor logits, Tensor target, Tensor? class_weight, "
    "Tensor? pixel_weight, Tensor? mask, int ignore_index, bool align_corners, float scale, bool by_count, "
    "Tensor count, Tensor guess, Tensor(a!) gradient, Tensor(b!) memory) -> ()"
)
"""CUDA only: writes the gradient unless the guess was right, and remembers the grad for the next one."""


def forward_fake(
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    pixel_weight: Tensor | None,
    mask: Tensor | None,
    ignore_index: int,
    align_corners: bool,
    per_pixel: bool,
) -> tuple[Tensor, Tensor]:
    acc = accumulator(logits)
    return logits.new_empty(target.shape if per_pixel else (), dtype=acc), logits.new_empty((), dtype=acc)


def gradient_fake(
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    pixel_weight: Tensor | None,
    mask: Tensor | None,
    ignore_index: int,
    align_corners: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    acc = accumulator(logits)
    return (
        logits.new_empty((), dtype=acc),
        logits.new_empty((), dtype=acc),
        torch.empty_like(logits, dtype=acc),
    )


def forward_ahead_fake(
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    pixel_weight: Tensor | None,
    mask: Tensor | None,
    ignore_index: int,
    align_corners: bool,
    scale: float,
    by_count: bool,
    memory: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    loss = logits.new_empty((), dtype=accumulator(logits))
    return loss, torch.empty_like(loss), torch.empty_like(logits), torch.empty_like(loss)


def backward_ahead_fake(
    grad: Tensor,
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    pixel_weight: Tensor | None,
    mask: Tensor | None,
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
        logits: Tensor,
        target: Tensor,
        class_weight: Tensor | None,
        pixel_weight: Tensor | None,
        mask: Tensor | None,
        ignore_index: int,
        align_corners: bool,
        reduction: str,
        backend: str,
        needs_gradient: bool,
    ) -> tuple[Tensor, Tensor]:
        args = (logits, target, class_weight, pixel_weight, mask, ignore_index, align_corners)
        if needs_gradient:
            loss, count, gradient = operators(backend).resized_cross_entropy_gradient(*args)
            ctx.ahead = GradientAhead(ctx, gradient, logits, target, class_weight, pixel_weight, mask)
        else:
            loss, count = operators(backend).resized_cross_entropy_forward(*args, False)
        ctx.dtype, ctx.options, ctx.backend = logits.dtype, (ignore_index, align_corners), backend
        ctx.scale = pixel_scale(reduction, count, target.numel(), target.shape[0])
        ctx.mark_non_differentiable(count)
        return loss * ctx.scale, count

    @staticmethod
    def backward(ctx, grad: Tensor, _count):
        def make_anew(saved):
            return operators(ctx.backend).resized_cross_entropy_gradient(*saved, *ctx.options)[2]

        return ctx.ahead.scaled(ctx, grad * ctx.scale, ctx.dtype, make_anew), *(None,) * 9


class _OneRead(torch.autograd.Function):
    """CUDA: the gradient is made in the forward where grad_output was guessed, else in the backward."""

    @staticmethod
    def forward(
        ctx,
        logits: Tensor,
        target: Tensor,
        class_weight: Tensor | None,
        pixel_weight: Tensor | None,
        mask: Tensor | None,
        ignore_index: int,
        align_corners: bool,
        reduction: str,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        args = (logits, target, class_weight, pixel_weight, mask)
        kind = ("resized_cross_entropy", logits.shape, logits.stride(), target.shape, logits.dtype, reduction)
        ctx.guess = Guess(kind, logits)
        by_count = reduction == "mean"
        scale = 1.0 if by_count else fixed_scale(reduction, target.numel(), target.shape[0])
        ctx.options, ctx.backend = (ignore_index, align_corners, scale, by_count), backend
        loss, count, ctx.gradient, guess = operators(backend).resized_cross_entropy_forward_ahead(
            *args, *ctx.options, ctx.guess.memory
        )
        ctx.saved = Saved(ctx, *args, count, guess)
        ctx.mark_non_differentiable(count)
        return loss * pixel_scale(reduction, count, target.numel(), target.shape[0]), count

    @staticmethod
    def backward(ctx, grad: Tensor, _count):
        *args, count, guess = ctx.saved.tensors(ctx)
        out, ctx.gradient = ctx.gradient, None
        if out is None:  # handed out by the first backward over this graph
            out, guess = torch.empty_like(args[0]), torch.full_like(guess, float("nan"))
        operators(ctx.backend).resized_cross_entropy_backward_ahead(
            grad, *args, *ctx.options, count, guess, out, ctx.guess.memory
        )
        ctx.guess.release()
        return out, *(None,) * 8


class _PerPixel(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        logits: Tensor,
        target: Tensor,
        class_weight: Tensor | None,
        pixel_weight: Tensor | None,
        mask: Tensor | None,
        ignore_index: int,
        align_corners: bool,
        backend: str,
    ) -> Tensor:
        ctx.saved = Saved(ctx, logits, target, class_weight, pixel_weight, mask)
        ctx.ignore_index, ctx.align_corners, ctx.backend = ignore_index, align_corners, backend
        args = (logits, target, class_weight, pixel_weight, mask, ignore_index, align_corners)
        return operators(backend).resized_cross_entropy_forward(*args, True)[0]

    @staticmethod
    def backward(ctx, grad: Tensor):
        logits, target, class_weight, pixel_weight, mask = ctx.saved.tensors(ctx)
        weight = (grad if pixel_weight is None else grad * pixel_weight).contiguous()
        args = (logits, target, class_weight, weight, mask, ctx.ignore_index, ctx.align_corners)
        gradient = operators(ctx.backend).resized_cross_entropy_gradient(*args)[2]
        return gradient.to(logits.dtype), *(None,) * 7


def pixel_scale(reduction: str, count: Tensor, pixels: int, batch: int) -> float | Tensor:
    """What a summed pixel loss is multiplied by; 1 where nothing is counted, since the sum is 0 then."""
    if reduction == "mean":
        return torch.where(count == 0, 1, count).reciprocal()
    return fixed_scale(reduction, pixels, batch)


def fixed_scale(reduction: str, pixels: int, batch: int) -> float:
    """The same for reductions that no label has a say in."""
    return {"mean_all": 1 / pixels, "batchmean": 1 / batch, "sum": 1.0}[reduction]


def resized_cross_entropy(
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    pixel_weight: Tensor | None,
    mask: Tensor | None,
    ignore_index: int,
    align_corners: bool,
    reduction: str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """The reduced loss, 0-d, differentiable with respect to ``logits``, and the count it has.

    Args:
        logits: (N, C, h, w), NCHW-contiguous or channels_last. target: (N, H, W) contiguous.
        class_weight: (C,), pixel_weight: (N, h', w') of any size, both contiguous fp32 (fp64 for fp64 logits), or None.
        mask: bool (N, H, W) contiguous: pixels that are False do not count; or None.
    """
    needs_gradient = logits.requires_grad and torch.is_grad_enabled()
    args = (logits, target, class_weight, pixel_weight, mask, ignore_index, align_corners)
    if backend == "cuda" and needs_gradient and not torch.compiler.is_compiling():
        return _OneRead.apply(*args, reduction, backend)
    return _Reduced.apply(*args, reduction, backend, needs_gradient)


def resized_cross_entropy_per_pixel(
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    pixel_weight: Tensor | None,
    mask: Tensor | None,
    ignore_index: int,
    align_corners: bool,
    backend: str,
) -> Tensor:
    """The loss per pixel (N, H, W); as above, with a ``pixel_weight`` of that size."""
    return _PerPixel.apply(logits, target, class_weight, pixel_weight, mask, ignore_index, align_corners, backend)

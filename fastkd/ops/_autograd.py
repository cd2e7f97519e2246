"""The autograd Function of every loss.

The forward computes an early gradient in the read that the loss needs anyway, scaled by the reduction and the module's
``loss_weight``. The backward multiplies it by the upstream gradient, in a kernel that returns at once if that is
exactly 1. A late gradient is computed in the backward.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from .._namespace import KERNELS, NAMESPACES
from ._operator import Loss


def operator(backend: str, name: str) -> Any:
    """An operator's callable: in eager mode Triton's launcher itself, otherwise the traceable operator."""
    if backend == "triton" and not torch.compiler.is_compiling():
        return sys.modules[KERNELS].LAUNCHERS[name]
    return getattr(getattr(torch.ops, NAMESPACES[backend]), name).default


def evaluate(loss: Loss, backend: str, reduction: str, scale: float, *args: Any) -> Any:
    """The reduced loss, differentiable with respect to ``args[0]``; if ``loss.returns_kept``, also what is kept.

    Args:
        reduction, scale: as in `Loss`.
        args: the loss's arguments; tensors are dense and validated.
    """
    if torch.compiler.is_compiling() and not isinstance(scale, int):
        # A scale made of symbolic sizes would specialise the graph, so it multiplies the result instead.
        out = evaluate(loss, backend, reduction, 1, *args)
        return (out[0] * scale, out[1]) if loss.returns_kept else out * scale
    if args[0].requires_grad and torch.is_grad_enabled():
        return _Loss.apply(args[0], (loss, backend, reduction, float(scale), args))
    value, kept = operator(backend, loss.name + "_forward")(*args, reduction, float(scale))
    return (value, kept) if loss.returns_kept else value


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student: Tensor, call):
        loss, backend, reduction, scale, args = call  # one argument: each costs a microsecond
        rest = gradient = None
        half, traced = student.dtype == torch.float16, torch.compiler.is_compiling()
        early = backend in loss.early and reduction != "none" and not (half and loss.any_weight(*args))
        if half and traced and (loss.pixel_weight is not None or backend in loss.late):
            early = False  # the unit depends on symbolic sizes
        if not early:
            value, kept = operator(backend, loss.name + "_forward")(*args, reduction, scale)
        elif not half:
            value, kept, gradient = operator(backend, loss.name + "_gradient")(*args, reduction, scale)
        else:
            # In fp16 a gradient divided by the number of pixels underflows, so it is stored at a scale of about 1.
            unit = loss.unit(*args)
            value, kept, gradient = operator(backend, loss.name + "_gradient")(*args, "sum", unit)
            rest = value.new_full((), scale / unit)
            if reduction == "mean":
                rest = rest / torch.where(kept == 0, 1, kept)
            value = value * rest
        ctx.call = loss, backend, reduction, scale, args[loss.tensors :], early, traced, rest
        if early and traced:  # a traced graph must not modify saved tensors
            ctx.save_for_backward(gradient)
        else:
            ctx.gradient, ctx.held = gradient, None
            _save(ctx, traced, (*args[: loss.tensors], kept))
        if not loss.returns_kept:
            return value
        ctx.mark_non_differentiable(kept)
        return value, kept

    @staticmethod
    def backward(ctx, grad: Tensor, *_):
        loss, backend, reduction, scale, options, early, traced, rest = ctx.call
        factor = grad if rest is None else grad * rest
        if early and traced:
            (gradient,) = ctx.saved_tensors
            return (gradient * factor).to(gradient.dtype), None
        if torch.is_grad_enabled() and not traced:
            raise RuntimeError(
                "fastkd: double backward (create_graph=True) is not implemented by the kernels; use "
                '`with fastkd.use_backend("reference"):` around the forward of this loss'
            )
        *tensors, kept = _saved(ctx)  # even if unused: autograd detects that one was overwritten
        if not early:
            gradient = _late(loss, backend, (reduction, scale), tensors, options, kept, grad)
        else:
            gradient, ctx.gradient = ctx.gradient, None
            if gradient is None:  # already returned by the first backward over this graph
                how = (reduction, scale) if rest is None else ("sum", loss.unit(*tensors, *options))
                gradient = operator(backend, loss.name + "_gradient")(*tensors, *options, *how)[2]
            operator(backend, "rescale_")(gradient, factor)
        return gradient, None


def _late(
    loss: Loss,
    backend: str,
    how: tuple[str, float],
    tensors: list[Tensor | None],
    options: tuple[Any, ...],
    kept: Tensor,
    grad: Tensor,
) -> Tensor:
    """A late gradient: by the loss's own backward, or with the upstream gradient as pixel weight."""
    if backend in loss.late:
        return operator(backend, loss.name + "_backward")(grad.contiguous(), *tensors, *options, *how, kept)
    assert loss.pixel_weight is not None
    if how[0] == "mean":
        grad = grad / torch.where(kept == 0, 1, kept)
    if grad.dim() == 0:  # one pixel per sample, or a reduced loss
        grad = grad.expand(_weight_shape(loss, tensors, options))
    own = tensors[loss.pixel_weight]
    weighted = [*tensors]  # a copy: in Dynamo of torch 2.10 this is a tuple
    weighted[loss.pixel_weight] = (grad if own is None else grad * own).contiguous()
    return operator(backend, loss.name + "_gradient")(*weighted, *options, "sum", how[1])[2]


def _weight_shape(loss: Loss, tensors: list[Tensor | None], options: tuple[Any, ...]) -> tuple[int, ...]:
    """Shape to which a 0-d pixel weight expands: that of the given weight, else of the unreduced loss."""
    assert loss.pixel_weight is not None
    own = tensors[loss.pixel_weight]
    if own is None and loss.one_weight is not None:
        return loss.one_weight(*tensors, *options)
    return own.shape if own is not None else loss.fake(*tensors, *options, "none", 1.0)[0].shape


def _save(ctx, traced: bool, tensors: tuple[Tensor | None, ...]) -> None:
    """Keeps tensors for the backward.

    Autograd refuses to save inference tensors, such as a teacher's under ``torch.inference_mode``. They are constants
    and are held directly; all others go through ``save_for_backward`` and its checks.
    """
    if not traced:  # tracing has no is_inference()
        for t in tensors:
            if t is not None and t.is_inference():
                ctx.held = [t if t is not None and t.is_inference() else None for t in tensors]
                tensors = tuple(None if h is not None else t for h, t in zip(ctx.held, tensors, strict=True))
                break
    ctx.save_for_backward(*tensors)


def _saved(ctx) -> Any:
    if ctx.held is None:
        return ctx.saved_tensors
    return [s if h is None else h for h, s in zip(ctx.held, ctx.saved_tensors, strict=True)]

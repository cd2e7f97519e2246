"""What RDD needs beside cross-entropy (arXiv 2407.03719; docs/rdd.md): schemas, fakes and autograd Function.

TFE: KD, its gradient and the map of the teacher's confidence from one read of the student's and the teacher's two
logits. TSE: the mask of relatively difficult pixels, with an exact k-th smallest confidence where ``min_kept`` asks for
it.
"""

import torch
from torch import Tensor

from ._registry import GradientAhead, accumulator, operators

CONFIDENCE = "teacher_confidence(Tensor main, Tensor aux, str direction) -> Tensor"
"""exp(-KL) between the heads, (N, h, w) fp32 (fp64): KL(aux || main) for "aux_main", KL(main || aux) for "main_aux"."""
KD = (
    "kd_with_confidence(Tensor student, Tensor teacher, Tensor aux, str direction) "
    "-> (Tensor loss, Tensor gradient, Tensor confidence)"
)
"""KD at temperature 1: the summed loss and its gradient in fp32 (fp64); and the map above of the teacher's heads."""
MASK = (
    "difficulty_mask(Tensor student, Tensor teacher, Tensor target, float threshold, int min_kept, str confidence, "
    "str select, int ignore_index, bool align_corners) -> (Tensor mask, Tensor counts)"
)
"""The mask, bool (N, H, W), and int64 (2,): the number of selected and of valid pixels."""
KTH = "kth_smallest(Tensor x, int k) -> Tensor"
"""The k-th smallest element of a contiguous fp32 or fp64 tensor, 0-d; k is clamped to [1, n]; NaN is the largest."""


def confidence_fake(main: Tensor, aux: Tensor, direction: str) -> Tensor:
    n, _, h, w = main.shape
    return main.new_empty((n, h, w), dtype=accumulator(main))


def kd_fake(student: Tensor, teacher: Tensor, aux: Tensor, direction: str) -> tuple[Tensor, Tensor, Tensor]:
    n, _, h, w = student.shape
    acc = accumulator(student)
    return (
        student.new_empty((), dtype=acc),
        torch.empty_like(student, dtype=acc),
        student.new_empty((n, h, w), dtype=acc),
    )


def mask_fake(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    threshold: float,
    min_kept: int,
    confidence: str,
    select: str,
    ignore_index: int,
    align_corners: bool,
) -> tuple[Tensor, Tensor]:
    return target.new_empty(target.shape, dtype=torch.bool), target.new_empty((2,), dtype=torch.int64)


def kth_fake(x: Tensor, k: int) -> Tensor:
    return x.new_empty(())


OPERATORS = ((CONFIDENCE, confidence_fake), (KD, kd_fake), (MASK, mask_fake), (KTH, kth_fake))


def teacher_confidence(main: Tensor, aux: Tensor, direction: str, backend: str) -> Tensor:
    """(N, h, w) of two dense maps of one layout; fp32 (fp64)."""
    return operators(backend).teacher_confidence(main, aux, direction)


def difficulty_mask(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    threshold: float,
    min_kept: int,
    confidence: str,
    select: str,
    ignore_index: int,
    align_corners: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """bool (N, H, W), and int64 (2,): how many pixels are selected and valid.

    Args:
        student, teacher: (N, C, h, w), (N, C, h', w'), each NCHW-contiguous or channels_last, both fp64 or neither.
        target: (N, H, W) contiguous.
    """
    args = (threshold, min_kept, confidence, select, ignore_index, align_corners)
    return operators(backend).difficulty_mask(student.detach(), teacher, target, *args)


class _KDWithConfidence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, student: Tensor, teacher: Tensor, aux: Tensor, direction: str, backend: str
    ) -> tuple[Tensor, Tensor]:
        loss, gradient, confidence = operators(backend).kd_with_confidence(student, teacher, aux, direction)
        ctx.ahead = GradientAhead(ctx, gradient, student, teacher, aux)
        ctx.dtype, ctx.scale = student.dtype, 1 / confidence.numel()
        ctx.direction, ctx.backend = direction, backend
        ctx.mark_non_differentiable(confidence)
        return loss * ctx.scale, confidence

    @staticmethod
    def backward(ctx, grad: Tensor, _confidence):
        def make_anew(saved):
            return operators(ctx.backend).kd_with_confidence(*saved, ctx.direction)[1]

        return ctx.ahead.scaled(ctx, grad * ctx.scale, ctx.dtype, make_anew), *(None,) * 4


def kd_with_confidence(
    student: Tensor, teacher: Tensor, aux: Tensor, direction: str, backend: str
) -> tuple[Tensor, Tensor]:
    """Mean KD over all pixels at temperature 1, differentiable with respect to ``student``, and the confidence map.

    All three are dense maps of one shape and layout, all fp64 or none.
    """
    return _KDWithConfidence.apply(student, teacher, aux, direction, backend)

"""RDD's operators besides cross-entropy (arXiv 2407.03719; docs/rdd.md).

TFE: KD at temperature 1, its gradient, and the teacher's confidence map from one read of the student's and the
teacher's two logits. TSE: the mask of relatively difficult pixels, with an exact k-th smallest confidence if
``min_kept`` needs it.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ._operator import Draw, Loss, Operator, accumulator

DIRECTIONS = ("aux_main", "main_aux")
SELECTIONS = ("xor", "or", "and", "student", "student_only")


def _kd_fake(student: Tensor, teacher: Tensor, aux: Tensor, direction: str, reduction: str, scale: float):
    n, _, h, w = student.shape
    acc = accumulator(student)
    return student.new_empty((), dtype=acc), student.new_empty((n, h, w), dtype=acc)


def _kd_samples(draw: Draw) -> Iterator[tuple[Any, ...]]:
    for direction in DIRECTIONS:
        yield draw.map(0), draw.map(1), draw.map(5), direction


KD_CONFIDENCE = Loss(
    "kd_confidence",  # keeps the confidence map, exp(-KL) between the teacher's heads, (N, h, w)
    "Tensor student, Tensor teacher, Tensor aux, str direction",
    _kd_fake,
    _kd_samples,
    early=("cpu", "triton"),
    reductions=("sum",),
    returns_kept=True,
)


def _confidence_fake(main: Tensor, aux: Tensor, direction: str) -> Tensor:
    n, _, h, w = main.shape
    return main.new_empty((n, h, w), dtype=accumulator(main))


def _confidence_samples(draw: Draw) -> Iterator[tuple[Any, ...]]:
    for direction in DIRECTIONS:
        yield draw.map(0), draw.map(1), direction


def _mask_fake(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    threshold: float,
    min_kept: int,
    confidence: str,
    select: str,
    ignore_index: int,
    align_corners: bool,
):
    mask = target.new_empty(target.shape, dtype=torch.bool)
    return mask, student.new_empty((), dtype=accumulator(student))


def _lse_fake(student: Tensor, *rest: Any):
    mask, share = _mask_fake(student, *rest)
    return mask.new_empty(mask.shape, dtype=share.dtype), share


def _mask_samples(draw: Draw) -> Iterator[tuple[Any, ...]]:
    n, _, h, w = draw.shape
    for teacher in (draw.map(1), draw.map(1, (h + 1, max(1, w // 2)))):
        for min_kept in (0, n * h * w):
            for confidence in ("max", "label"):
                for select in SELECTIONS if min_kept == 0 and confidence == "max" else ("xor",):
                    yield draw.map(0), teacher, draw.labels(), 0.7, min_kept, confidence, select, 255, min_kept > 0


_MASK = (
    "(Tensor student, Tensor teacher, Tensor target, float threshold, int min_kept, str confidence, str select, "
    "int ignore_index, bool align_corners)"
)

OPERATORS = (
    *KD_CONFIDENCE.operators(),
    Operator(
        "teacher_confidence(Tensor main, Tensor aux, str direction) -> Tensor",
        _confidence_fake,
        _confidence_samples,
        ("cpu", "triton"),
    ),
    # The mask, and the selected share of valid pixels (0 if none is valid).
    Operator(
        f"difficulty_mask{_MASK} -> (Tensor mask, Tensor share)", _mask_fake, _mask_samples, ("cpu", "triton", "cuda")
    ),
    # The student's log-sum-exp, NaN where the mask is False, instead of the mask.
    Operator(f"difficulty_lse{_MASK} -> (Tensor lse, Tensor share)", _lse_fake, _mask_samples, ("triton", "cuda")),
    # The k-th smallest element of a contiguous fp32 or fp64 tensor; k is clamped to [1, n]; NaN is the largest.
    Operator(
        "kth_smallest(Tensor x, int k) -> Tensor",
        lambda x, k: x.new_empty(()),
        lambda draw: iter([(draw.weight(1000), 7)]),
        ("cpu", "triton", "cuda"),
    ),
)

"""Fused bilinear resize and KD (docs/full-resolution.md).

    loss[p] = pixel_weight[p] * tau^2 * KL(softmax(bilinear(T)[p] / tau) || softmax(bilinear(S)[p] / tau))

Student and teacher may differ in size; no tensor of N*C*H*W elements exists.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import Tensor

from ._operator import Draw, Loss, accumulator


def _fake(
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None,
    pixel_weight: Tensor | None,
    size: list[int],
    temperature: float,
    ignore_index: int,
    align_corners: bool,
    reduction: str,
    scale: float,
):
    acc = accumulator(student)
    shape = (student.shape[0], *size) if reduction == "none" else ()
    return student.new_empty(shape, dtype=acc), student.new_empty((), dtype=acc)


def _samples(draw: Draw) -> Iterator[tuple[Any, ...]]:
    n, _, h, w = draw.shape
    for teacher in (draw.map(1), draw.map(1, (h + 1, max(1, w // 2)))):
        for target in (None, draw.labels()):
            for pixel_weight in (None, draw.weight(n, *draw.size), draw.weight(n, 3, 2)):
                for align_corners in (False, True):
                    yield draw.map(0), teacher, target, pixel_weight, list(draw.size), 2.0, 255, align_corners


def _unit(student: Tensor, teacher: Tensor, target, pixel_weight, size: list[int], temperature: float, *rest) -> float:
    return student.shape[2] * student.shape[3] / (size[0] * size[1] * temperature)


RESIZED_KD = Loss(
    "resized_kd",
    "Tensor student, Tensor teacher, Tensor? target, Tensor? pixel_weight, SymInt[] size, float temperature, "
    "int ignore_index, bool align_corners",
    _fake,
    _samples,
    early=("cpu", "triton", "cuda"),
    unit=_unit,
    pixel_weight=3,
    any_weight=lambda student, teacher, target, pixel_weight, *rest: pixel_weight is not None,
)
# With a sigmoid per class: the formula of fastkd/ops/kd.py at label pixels.
RESIZED_KD_SIGMOID = replace(RESIZED_KD, name="resized_kd_sigmoid", early=("cpu", "triton", "cuda"))
OPERATORS = (*RESIZED_KD.operators(), *RESIZED_KD_SIGMOID.operators())

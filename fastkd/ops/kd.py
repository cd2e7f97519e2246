"""Pixel-wise knowledge distillation (Hinton, arXiv 1503.02531, eq. 1-2).

    loss[p] = weight[p] * tau^2 * KL(softmax(T[p] / tau) || softmax(S[p] / tau))

The loss and its gradient come from one read of S and T.
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
    weight: Tensor | None,
    temperature: float,
    ignore_index: int,
    reduction: str,
    scale: float,
):
    n, _, h, w = student.shape
    acc = accumulator(student)
    return student.new_empty((n, h, w) if reduction == "none" else (), dtype=acc), student.new_empty((), dtype=acc)


def _samples(draw: Draw) -> Iterator[tuple[Any, ...]]:
    n, _, h, w = draw.shape
    for target in (None, draw.labels((h, w))):
        for weight in (None, draw.weight(n, h, w)):
            yield draw.map(0), draw.map(1), target, weight, 2.0, 255


KD = Loss(
    "kd",
    "Tensor student, Tensor teacher, Tensor? target, Tensor? weight, float temperature, int ignore_index",
    _fake,
    _samples,
    early=("cpu", "triton", "cuda"),
    unit=lambda student, teacher, target, weight, temperature, ignore_index: 1 / temperature,
    pixel_weight=3,
    any_weight=lambda student, teacher, target, weight, *options: weight is not None,
)
# KD with a sigmoid per class, each against the rest; t = T / tau, s = S / tau:
#
#     loss[p] = weight[p] * tau^2 * sum_c KL(Bernoulli(sigmoid(t_c)) || Bernoulli(sigmoid(s_c)))
#     d / dS_c = weight[p] * tau * (sigmoid(s_c) - sigmoid(t_c))
#
# Stable form: with t' = -|t|, s' = -s if t > 0 else s, p = sigmoid(t'), a class adds
# p (t' - s') + softplus(s') - softplus(t'); for p = 0 the first term is dropped, even at infinity.
KD_SIGMOID = replace(KD, name="kd_sigmoid", early=("cpu", "triton", "cuda"))
OPERATORS = (*KD.operators(), *KD_SIGMOID.operators())

"""Channel-wise distillation (CWD, arXiv 2011.13256, eq. 2-4).

    loss[n, c] = tau^2 * KL(softmax_HW(T[n, c] / tau) || softmax_HW(S[n, c] / tau))

The forward reads S and T once (online softmax) and keeps four numbers per channel; the backward reads both again.
"""

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from ._operator import Draw, Loss, accumulator


def _fake(student: Tensor, teacher: Tensor, temperature: float, reduction: str, scale: float):
    (n, c), acc = student.shape[:2], accumulator(student)
    return student.new_empty((n, c) if reduction == "none" else (), dtype=acc), student.new_empty((n, c, 4), dtype=acc)


def _samples(draw: Draw) -> Iterator[tuple[Any, ...]]:
    yield draw.map(0), draw.map(1), 4.0


CWD = Loss(
    "cwd",
    "Tensor student, Tensor teacher, float temperature",
    _fake,
    _samples,
    early=(),
    late=("cpu", "triton"),
    reductions=("sum", "none"),
)
OPERATORS = CWD.operators()

"""Multiplies an early gradient by the upstream gradient in place, on the device; a no-op if that is exactly 1."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from ._operator import Draw, Operator


def _fake(gradient: Tensor, factor: Tensor) -> None:
    return None


def _samples(draw: Draw) -> Iterator[tuple[Any, ...]]:
    for factor in (1.0, 0.3):
        yield draw.map(0), draw.weight(1)[0] * 0 + factor


OPERATORS = (
    Operator("rescale_(Tensor(a!) gradient, Tensor factor) -> ()", _fake, _samples, ("cpu", "triton", "cuda")),
)

"""Label validation on a CPU, where it costs one read and no synchronisation."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ._operator import Draw, Operator


def _fake(target: Tensor, classes: int, ignore_index: int) -> Tensor:
    return target.new_empty((), dtype=torch.int64)


def _samples(draw: Draw) -> Iterator[tuple[Any, ...]]:
    yield draw.labels(), draw.shape[1], 255


OPERATORS = (
    # Position of the first label that is neither in [0, classes) nor ignored, else -1.
    Operator("first_bad_label(Tensor target, int classes, int ignore_index) -> Tensor", _fake, _samples, ("cpu",)),
)

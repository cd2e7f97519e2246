"""The operators: schema, fake and sample inputs, one file per family, in one table.

`evaluate` makes the losses differentiable.
"""

from . import (
    cwd,
    exp,
    kd,
    labels,
    nfd,
    rdd,
    rescale,
    resized_binary_cross_entropy,
    resized_cross_entropy,
    resized_dice,
    resized_kd,
)
from ._autograd import evaluate, operator
from ._operator import Draw, Loss, Operator, accumulator

OPERATORS: tuple[Operator, ...] = (
    *nfd.OPERATORS,
    *kd.OPERATORS,
    *cwd.OPERATORS,
    *resized_cross_entropy.OPERATORS,
    *resized_kd.OPERATORS,
    *resized_dice.OPERATORS,
    *resized_binary_cross_entropy.OPERATORS,
    *rdd.OPERATORS,
    *rescale.OPERATORS,
    *labels.OPERATORS,
    *exp.OPERATORS,
)

__all__ = ["OPERATORS", "Draw", "Loss", "Operator", "accumulator", "evaluate", "operator"]

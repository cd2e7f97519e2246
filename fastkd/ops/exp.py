"""The C++ kernels' vectorised exponential, exposed to test its error bound, and their instruction set."""

import torch

from ._operator import Operator

OPERATORS = (
    Operator(
        "exp(Tensor x) -> Tensor", lambda x: torch.empty_like(x), lambda draw: iter([(draw.weight(100),)]), ("cpu",)
    ),
    Operator("isa() -> str", lambda: "", lambda draw: iter([()]), ("cpu",)),
)

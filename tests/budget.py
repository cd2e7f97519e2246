"""The error budget: how far a result may be from float64 on the same (already rounded) inputs. Nothing else decides it.

Plain PyTorch in the same dtype computes the same formula with its sums in another order, so its error says what this
formula loses on these inputs. With u = eps of the coarser of the result's dtype and the accumulator (fp32, or fp64 for fp64
maps), in the L2 norm over all elements:

    |got - true| <= 2 |plain - true|  +  8 u (|true| + unit sqrt(n))  +  4 |moved - true|

- 2: two orders of summation have errors of the same size, not the same errors.
- 8 roundings that plain PyTorch may be spared: an exponential of 2 ulp for the student and one for the teacher
  (csrc/cpu/vec.h, tests/test_csrc.py::test_exp_error_bound), a logarithm of 2, the scale, and the cast to the result.
- ``unit``: the size of the numbers that a result is a difference of. A KL divergence near 0 is a difference of
  log-probabilities: the result may vanish, the rounding of what it is made of does not. n elements have sqrt(n) times
  the norm of one.
- ``moved``: the true result of inputs that differ by one rounding, where the problem itself magnifies it (logits of
  10^15). No algorithm that rounds once can be closer; 4 for the interpolations and the maximum, that round before it.

u is at least 1e-12: in float64 nothing truer is at hand, and two formulas need only agree far beyond fp32.

On logits as networks give them the same reasoning yields numbers, which docs/promises.md promises (:data:`LOSS`,
:data:`GRADIENT`): relative to the result, 8 roundings of the loss in fp32, 16 of its gradient (of student and teacher), and for
a gradient in half precision, where all else is small beside it, the half unit in the last place of its cast.
"""

from __future__ import annotations

import torch
from torch import Tensor

FLOOR = 1e-12
EPS = torch.finfo(torch.float32).eps

# What docs/promises.md promises of the relative error: of the loss by its dtype, of the gradient by the student's.
LOSS = {torch.float32: 8.5 * EPS, torch.float64: FLOOR}
GRADIENT = {torch.float32: 17 * EPS, torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float64: FLOOR}


def accumulator(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def rounding(*dtypes: torch.dtype) -> float:
    """u of the docstring: the coarsest of these."""
    return max(FLOOR, *(torch.finfo(dtype).eps for dtype in dtypes))


def roundings(count: float, want: Tensor, u: float, unit: float = 0.0) -> float:
    """The norm of so many roundings of a result and of what it is a difference of."""
    return count * u * (want.norm().item() + unit * want.numel() ** 0.5)


def assert_within(
    what: str,
    got: Tensor,
    plain: Tensor,
    want: Tensor,
    acc: torch.dtype,
    *,
    unit: float = 1.0,
    moved: Tensor | None = None,
) -> None:
    """``got`` against ``want`` in float64, judged by ``plain``, which is plain PyTorch's result in the same dtype.

    Args:
        acc: dtype of the accumulator.
        unit, moved: as above.
    """
    error, plain_error = ((x.double() - want).norm().item() for x in (got, plain))
    allowed = 2 * plain_error + roundings(8, want, rounding(got.dtype, acc), unit)
    if moved is not None:
        allowed += 4 * (moved - want).norm().nan_to_num().item()
    assert error <= allowed, f"{what}: error {error:.3e}, allowed {allowed:.3e}, plain PyTorch's {plain_error:.3e}"


def assert_close(got: Tensor, want: Tensor, unit: float = 1.0) -> None:
    """Element by element, where there is no plain PyTorch to ask: 64 roundings, as many as 8 and a sum's of 2^50 terms.

    Args:
        want: worked out in float64, or in the dtype of ``got`` by another way.
        unit: as above; relative to the largest element.
    """
    u = rounding(got.dtype, want.dtype)
    largest = want.abs().max().item() if want.numel() else 0.0
    torch.testing.assert_close(got.double(), want.double(), rtol=64 * u, atol=64 * u * unit * largest)


def assert_zero(x: Tensor, unit: float = 1.0) -> None:
    """Zero but for 8 roundings of numbers of size ``unit``."""
    bound = 8 * rounding(x.dtype) * unit
    assert (x.abs() <= bound).all(), f"{x.abs().max():.3e} > {bound:.3e}"

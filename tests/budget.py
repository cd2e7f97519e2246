"""The error budget: the allowed distance of a result from float64 on the same (already rounded) inputs.

Plain PyTorch in the same dtype computes the same formula with a different order of summation, so its error measures the
rounding of this formula on these inputs. With u = eps of the coarser of the result's dtype and the accumulator (fp32,
or fp64 for fp64 maps), in the L2 norm over all elements:

    |got - true| <= 2 |plain - true|  +  8 u (|true| + unit sqrt(n))  +  4 |moved - true|

- 2: two orders of summation have errors of the same size, not the same errors.
- 8 roundings that plain PyTorch may not have: an exponential of 2 ulp for the student and one for the teacher
  (csrc/cpu/vec.h, tests/test_csrc.py::test_exp_error_bound), a logarithm of 2, the scale, and the cast to the result.
- ``unit``: the size of the numbers whose difference is the result. A KL divergence near 0 is a difference of
  log-probabilities: the result may vanish, but their rounding does not. The norm of n elements is sqrt(n) times that of
  one.
- ``moved``: the true result of inputs that differ by one rounding, for ill-conditioned inputs (logits of 10^15). No
  algorithm that rounds once can be closer. The factor 4 covers the interpolations and the maximum, which round before.

u is at least 1e-12: nothing more accurate than float64 is available, and two formulas need only agree far beyond fp32.

For typical network logits the same reasoning gives the bounds in docs/promises.md (:data:`LOSS`, :data:`GRADIENT`),
relative to the result: 8 roundings of the loss in fp32 and 16 of its gradient (student and teacher). For a gradient in
half precision the cast's half ulp dominates.
"""

from __future__ import annotations

import torch
from torch import Tensor

FLOOR = 1e-12
EPS = torch.finfo(torch.float32).eps

# Bounds of the relative error in docs/promises.md: of the loss by its dtype, of the gradient by the student's dtype.
LOSS = {torch.float32: 8.5 * EPS, torch.float64: FLOOR}
GRADIENT = {torch.float32: 17 * EPS, torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float64: FLOOR}


def accumulator(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def rounding(*dtypes: torch.dtype) -> float:
    """u of the module docstring: the coarsest of these."""
    return max(FLOOR, *(torch.finfo(dtype).eps for dtype in dtypes))


def roundings(count: float, want: Tensor, u: float, unit: float = 0.0) -> float:
    """Norm of this many roundings of a result and of the numbers whose difference it is."""
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
    """Asserts that ``got`` is within the budget of ``want`` (float64); ``plain`` is plain PyTorch's result in the same
    dtype.

    Args:
        acc: dtype of the accumulator.
        unit, moved: see the module docstring.
    """
    error, plain_error = ((x.double() - want).norm().item() for x in (got, plain))
    allowed = 2 * plain_error + roundings(8, want, rounding(got.dtype, acc), unit)
    if moved is not None:
        allowed += 4 * (moved - want).norm().nan_to_num().item()
    assert error <= allowed, f"{what}: error {error:.3e}, allowed {allowed:.3e}, plain PyTorch's {plain_error:.3e}"


def assert_close(got: Tensor, want: Tensor, unit: float = 1.0) -> None:
    """Element-wise check without a plain PyTorch result: 64 roundings, that is 8 plus those of a sum of 2^50 terms.

    Args:
        want: computed in float64, or in the dtype of ``got`` by another method.
        unit: see the module docstring; relative to the largest element.
    """
    u = rounding(got.dtype, want.dtype)
    largest = want.abs().max().item() if want.numel() else 0.0
    torch.testing.assert_close(got.double(), want.double(), rtol=64 * u, atol=64 * u * unit * largest)


def assert_zero(x: Tensor, unit: float = 1.0) -> None:
    """Zero up to 8 roundings of numbers of size ``unit``."""
    bound = 8 * rounding(x.dtype) * unit
    assert (x.abs() <= bound).all(), f"{x.abs().max():.3e} > {bound:.3e}"

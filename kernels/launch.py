"""Launching kernels, and the dtype they accumulate in."""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl
from torch import Tensor


def accumulator(*maps: Tensor) -> tuple[torch.dtype, tl.dtype]:
    """Accumulator dtype for torch and for Triton: fp64 if any map is fp64, else fp32."""
    double = any(x.dtype == torch.float64 for x in maps)
    return (torch.float64, tl.float64) if double else (torch.float32, tl.float32)


def lanes() -> int:
    """Threads per warp (wavefront on AMD)."""
    return 64 if torch.version.hip else 32


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    like: Tensor,
    *args: Any,
    num_warps: int = 4,
    registers: int | None = None,
    **constants: Any,
) -> None:
    """Runs ``kernel`` on the device of ``like``, whichever device is current.

    Args:
        registers: maximum per thread. By default ptxas spills a few registers where that raises occupancy. Ignored on
            AMD.
    """
    if registers is not None and torch.version.hip is None:
        constants["maxnreg"] = registers
    if not like.is_cuda or like.get_device() == torch.cuda.current_device():
        kernel[grid](*args, num_warps=num_warps, **constants)
    else:
        with torch.cuda.device(like.device):
            kernel[grid](*args, num_warps=num_warps, **constants)

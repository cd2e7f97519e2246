"""Normalised feature distillation (NFD, arXiv 2207.05256).

    loss[g] = mean over group g of (z(S) - z(T))^2,   z(x) = (x - mean) / sqrt(var + eps)

The forward reads S and T once and keeps six numbers a group; the backward reads each once more and writes the gradient.
CUDA C++ holds a group in the shared memory of a cluster of blocks and writes the gradient in the forward (docs/cuda.md).
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ._operator import Draw, Loss, accumulator

DIMS = ("hw", "nhw", "c", "chw")


def group_shape(shape: torch.Size, dims: str) -> tuple[int, ...]:
    """Shape of one number per group for a feature map of ``shape`` (N, C, H, W)."""
    n, c, h, w = shape
    return {"hw": (n, c), "nhw": (c,), "c": (n, h, w), "chw": (n,)}[dims]


def _fake(student: Tensor, teacher: Tensor, dims: str, eps: float, reduction: str, scale: float):
    groups, acc = group_shape(student.shape, dims), accumulator(student)
    loss = student.new_empty(groups if reduction == "none" else (), dtype=acc)
    return loss, student.new_empty((*groups, 6), dtype=acc)


def _samples(draw: Draw) -> Iterator[tuple[Any, ...]]:
    for dims in DIMS:
        yield draw.map(0), draw.map(1), dims, 1e-5


def _unit(student: Tensor, teacher: Tensor, dims: str, eps: float) -> float:
    return 0.5 * student.numel() / max(1, torch.Size(group_shape(student.shape, dims)).numel())


def fits_cuda(student: Tensor, teacher: Tensor, dims: str) -> bool:
    """Whether CUDA C++ takes the call: groups that are contiguous rows of NCHW and fit a cluster's shared memory."""
    if dims not in ("hw", "chw") or not student.is_contiguous():
        return False
    _, c, h, w = student.shape
    length = c * h * w if dims == "chw" else h * w
    return length * (student.element_size() + teacher.element_size()) <= 8 * 200 * 1024


NFD = Loss(
    "nfd",
    "Tensor student, Tensor teacher, str dims, float eps",
    _fake,
    _samples,
    early=("cuda",),
    late=("cpu", "triton", "cuda"),
    unit=_unit,
    reductions=("sum", "none"),
)
OPERATORS = NFD.operators()

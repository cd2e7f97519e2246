"""Normalised feature distillation (NFD, arXiv 2207.05256).

    loss[g] = mean over group g of (z(S) - z(T))^2,   z(x) = (x - mean) / sqrt(var + eps)

The forward reads S and T once and keeps six numbers per group; the backward reads both again and writes the gradient.
CUDA C++ holds a group in the shared memory of a cluster of blocks and writes the gradient in the forward
(docs/cuda.md).
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ._operator import Draw, Loss, accumulator

DIMS = ("hw", "nhw", "c", "chw")


def group_shape(shape: torch.Size, dims: str) -> tuple[int, ...]:
    """Shape of one number per group of a feature map ``shape`` (N, C, H, W)."""
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


# For groups read once: minimum elements, and maximum bytes per map (8 blocks of 227 KiB).
_FEWEST, _MOST = 8192, 8 * 28 * 4096


def fits_cuda(student: Tensor, teacher: Tensor, dims: str) -> bool:
    """Whether CUDA C++ is the faster backend: for groups that it reads once, and for groups in columns.

    Triton takes the others. If forced, CUDA C++ takes them too, and also maps not aligned to 16 bytes, which a traced
    call cannot detect.
    """
    if student.dtype != teacher.dtype or student.dtype == torch.float64 or not _has_clusters(student.device):
        return False
    return _read_once(student, dims) or _in_columns(student, dims)


def _is_channels_last(x: Tensor) -> bool:
    return not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def _read_once(x: Tensor, dims: str) -> bool:
    """Whether a group is contiguous and fits the shared memory of a cluster (csrc/cuda/plan.h)."""
    n, c, h, w = x.shape
    if dims == "chw":
        runs, length = 1, c * h * w
    elif _is_channels_last(x):
        runs, length = 1, c if dims == "c" else 0
    else:
        runs, length = {"hw": (1, h * w), "nhw": (n, h * w), "c": (0, 0)}[dims]
    size, total = x.element_size(), runs * length
    return length * size % 16 == 0 and total >= _FEWEST and length >= _FEWEST // 16 and total * size <= _MOST


def _in_columns(x: Tensor, dims: str) -> bool:
    """Whether neighbours in memory belong to different groups, in whole 16-byte vectors."""
    if dims == "chw" or _is_channels_last(x) == (dims == "c"):
        return False
    inner = x.shape[2] * x.shape[3] if dims == "c" else x.shape[1]
    return inner * x.element_size() % 16 == 0


def _has_clusters(device: torch.device) -> bool:
    """Blocks share memory from sm_90 on. The emulated GPU has CPU tensors."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (9, 0)


_has_clusters._dynamo_marked_constant = True  # type: ignore[attr-defined]


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

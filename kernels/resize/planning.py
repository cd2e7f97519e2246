"""Tiling: a map's cells and their label pixels over programs, lanes and registers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import lanes

# Three times what a large GPU holds at a time. With fewer programs, a cell's parts are split over several.
PROGRAMS = 4096


class Grid(NamedTuple):
    """Sizes of the cells' numbering and of the labels."""

    samples: Any
    cells: Any  # in total
    height: Any  # of the labels
    width: Any
    column_parts: Any  # per cell
    parts: Any
    split: Any  # programs that share a cell's parts


class Tile(NamedTuple):
    """Compile-time constants, all ``tl.constexpr``."""

    ROWS: Any  # label pixels per lane and iteration
    COLUMNS: Any
    CELLS: Any  # lanes
    HALO: Any  # 1 if lanes pass contributions to their neighbour: each program recomputes one cell
    ALIGN: Any
    INT: Any  # integer dtype of sampling positions: 32 bits if their products fit
    ACC: Any


class Plan(NamedTuple):
    """The tiling of one map."""

    grid: Grid
    tile: Tile
    programs: int
    split: int


def plan(
    logits: Tensor, size: Sequence[int], align_corners: bool, most: tuple[int, int], halo: int, acc: torch.dtype
) -> Plan:
    """Tiles ``logits`` (N, C, h, w) for labels of ``size``.

    Args:
        most: maximum label pixels per lane and iteration: rows, columns.
    """
    return _plan(logits.shape, tuple(size), align_corners, most, halo, acc == torch.float64, lanes())


def plan_apart(
    logits: Tensor, size: Sequence[int], align_corners: bool, most: tuple[int, int], most_parts: int, acc: torch.dtype
) -> Plan:
    """:func:`plan` without a halo, with each sample's cells numbered separately.

    Args:
        most_parts: maximum parts of cells per program.
    """
    one = plan(logits[:1], size, align_corners, most, 0, acc)
    programs = logits.shape[0] * (one.programs // one.split)
    parts = one.grid.parts
    split = max(min(parts, PROGRAMS // programs), triton.cdiv(parts, most_parts))
    return Plan(one.grid._replace(split=split), one.tile, programs * split, split)


@lru_cache(maxsize=1024)
def _plan(
    shape: tuple[int, ...],
    size: tuple[int, ...],
    align: bool,
    most: tuple[int, int],
    halo: int,
    double: bool,
    cells: int,
) -> Plan:
    n, c, h, w = shape
    line = n * (h + (not align)) * (w + (not align))
    parts, tile = [], []
    for into, out, limit in ((h, size[0], most[0]), (w, size[1], most[1])):
        count = _phases(into, out, align)
        parts.append(triton.cdiv(count, limit))
        tile.append(triton.cdiv(count, parts[-1]))
    programs = triton.cdiv(line, cells - halo)
    split = min(parts[0] * parts[1], max(1, PROGRAMS // programs))
    if halo and n * c * h * w > 2**16:  # each split has its own planes
        split = min(split, 2)
    largest = 4 * (max(size) + 1) * (max(h, w) + 1)
    constants = (*tile, cells, halo, align, tl.int32 if largest < 2**31 else tl.int64)
    constants = (*constants, tl.float64 if double else tl.float32)
    grid = Grid(n, line, size[0], size[1], parts[1], parts[0] * parts[1], split)
    return Plan(grid, Tile(*map(tl.constexpr, constants)), programs * split, split)


def _phases(into: int, out: int, align: bool) -> int:
    """Maximum number of outputs in one cell."""
    if align:
        return out if into == 1 else max(1, triton.cdiv(out - 1, into - 1))
    return triton.cdiv(out, max(into, 2))

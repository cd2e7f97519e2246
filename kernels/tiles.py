"""Tiling of a dense (N, C, H, W) map.

Every loss here reduces a map along one direction, so kernels see it as (outer, inner, reduced) with three strides and
process tiles [inner, reduced]. Both layouts are read in place; only the strides differ:

    reduced "pixels"    outer N, inner C,   reduced H*W      one result per plane (nfd hw and nhw, cwd)
    reduced "channels"  outer N, inner H*W, reduced C        one result per pixel (nfd c, kd)
    reduced "sample"    outer 1, inner N,   reduced C*H*W    one result per sample (nfd chw)

Offsets are 64-bit. A program reads one chunk of the reduced axis, tile by tile. Few, long groups are split into chunks,
and a second kernel merges them in a fixed order. There are no atomics, and the tiling depends only on shape, dtype and
layout, so results are bitwise reproducible.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# Elements per tile: 16 per thread for each of S and T. At about 100 registers per thread, an SM holds 5 programs with
# over 40 KiB of bf16 in flight, enough to saturate memory bandwidth; 32 per thread spill in kd on unaligned rows.
# Halved for fp64, whose values take two registers. If the inner axis is contiguous, a tile is at least WIDTH wide: 128
# bytes of bf16.
TILE = 2048
WIDTH = 64
WARPS = 4
# Groups are split until there are this many programs, about three times what a large GPU holds at a time.
PROGRAMS = 2048


class Tiles(NamedTuple):
    """The tiling of one map as kernel arguments. Sizes and strides in elements; constants are ``tl.constexpr``."""

    inner: Any
    length: Any  # of the reduced axis: LENGTH_UNIT times this
    stride_outer: Any
    stride_inner: Any  # UNIT times this
    stride_reduced: Any
    chunk: Any  # elements of the reduced axis per program
    chunks: Any
    UNIT: Any
    LENGTH_UNIT: Any
    ACC: Any
    BLOCK_INNER: Any
    BLOCK_REDUCED: Any


class Cut(NamedTuple):
    """The tiling of one map, for the launcher."""

    outer: int
    inner: int
    length: int
    chunks: int
    programs: int
    tiles: Tiles


def cut(x: Tensor, reduced: str, split: bool = True, maps: int = 2) -> Cut:
    """Tiles ``x`` (N, C, H, W), NCHW-contiguous or channels_last, for a reduction along ``reduced`` (see the module).

    Args:
        split: whether a long reduction may be split into chunks.
        maps: number of maps read; beyond two, tiles are half as large.
    """
    double = x.dtype == torch.float64
    tile = TILE // (1 if maps <= 2 else 2) // (2 if double else 1)
    return _cut(x.shape, x.is_contiguous(), tile, reduced, split, double)


@lru_cache(maxsize=1024)  # tens of microseconds, at every call
def _cut(shape: tuple[int, int, int, int], nchw: bool, tile: int, reduced: str, split: bool, double: bool) -> Cut:
    n, c, h, w = shape
    sample, pixels = c * h * w, h * w
    channel_stride, pixel_stride = (pixels, 1) if nchw else (1, c)
    outer, inner, length, strides = {
        "pixels": (n, c, pixels, (sample, channel_stride, pixel_stride)),
        "channels": (n, pixels, c, (sample, pixel_stride, channel_stride)),
        "sample": (1, n, sample, (n * sample, sample, 1)),
    }[reduced]
    most_inner, most_reduced = triton.next_power_of_2(inner), triton.next_power_of_2(length)
    if strides[2] == 1:
        block_reduced = min(most_reduced, tile)
        block_inner = min(most_inner, tile // block_reduced)
    else:
        block_inner = min(most_inner, max(WIDTH, tile // most_reduced))
        block_reduced = min(most_reduced, tile // block_inner)
    tiles = triton.cdiv(length, block_reduced)
    programs = outer * triton.cdiv(inner, block_inner)
    chunks = min(tiles, triton.cdiv(PROGRAMS, programs)) if split else 1
    chunk = triton.cdiv(tiles, chunks) * block_reduced
    chunks = triton.cdiv(length, chunk)
    # Known divisors let the compiler vectorise loads of rows that are not a multiple of 16.
    unit, length_unit = math.gcd(strides[1], 8), math.gcd(length, 8)
    constants = map(tl.constexpr, (unit, length_unit, tl.float64 if double else tl.float32, block_inner, block_reduced))
    runtime = (inner, length // length_unit, strides[0], strides[1] // unit, strides[2], chunk, chunks)
    return Cut(outer, inner, length, chunks, programs * chunks, Tiles(*runtime, *constants))


@lru_cache(maxsize=1024)
def cut_parts(inner: int, parts: int) -> tuple[int, int]:
    """Blocks (inner, parts) for merging ``parts`` parts of each of ``inner`` groups: small, as merging is in fp64."""
    block_inner = min(triton.next_power_of_2(inner), 32)
    return block_inner, min(triton.next_power_of_2(parts), 512 // block_inner)


class Lanes(NamedTuple):
    """A program's position."""

    outer: Any  # int64
    inner: Any  # (BLOCK_INNER,) int64
    chunk: Any  # int64
    inside: Any  # (BLOCK_INNER,)
    base: Any  # (BLOCK_INNER,) offsets of the first elements
    length: Any


@triton.jit
def locate(g):
    program = tl.program_id(0)
    block = program // g.chunks
    outer, i = block_of(block, g.inner, g.BLOCK_INNER)
    base = outer * g.stride_outer + i * g.stride_inner * g.UNIT
    return Lanes(outer, i, (program % g.chunks).to(tl.int64), i < g.inner, base, g.length * g.LENGTH_UNIT)


@triton.jit
def block_of(block, inner, BLOCK_INNER: tl.constexpr):
    """The outer index of a block, and its BLOCK_INNER inner indices, int64."""
    blocks = tl.cdiv(inner, BLOCK_INNER)
    lane = tl.arange(0, BLOCK_INNER)
    # Limits inferred contiguity to 4, so each thread keeps fewer accumulators.
    i = (block % blocks).to(tl.int64) * BLOCK_INNER + (lane // 4 * 4 + lane % 4)
    return (block // blocks).to(tl.int64), i


@triton.jit
def tile_of(g, at, start):
    """Offsets and mask of a tile [inner, reduced], and which reduced indices exist."""
    r = start + tl.arange(0, g.BLOCK_REDUCED).to(tl.int64)
    mask = at.inside[:, None] & (r < at.length)[None, :]
    return at.base[:, None] + r[None, :] * g.stride_reduced, mask

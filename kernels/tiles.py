"""How the kernels see a dense (N, C, H, W) map, and how they are launched.

Every loss here reduces a map along one direction, so each kernel takes it as (outer, inner, reduced) with three strides
and works on tiles [inner, reduced]. Either layout of the map is read in place; only the strides differ:

    reduced "pixels"    outer N, inner C,   reduced H*W      one number a plane (nfd hw and nhw, cwd)
    reduced "channels"  outer N, inner H*W, reduced C        one number a pixel (nfd c, kd)
    reduced "sample"    outer 1, inner N,   reduced C*H*W    one number a sample (nfd chw)

Offsets are 64-bit. A program reads one chunk of the reduced axis, tile after tile. Where groups are few and long they
are split into chunks, and a second kernel merges the parts in a fixed order: there is no atomic, and the cut depends on
shape, dtype and layout alone, so results are bitwise the same on every run.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# Elements of a tile: 16 a thread for each of S and T. With some 100 registers a thread that is 5 programs and over 40
# KiB of bf16 in flight an SM, enough to fill the memory pipe; 32 a thread spill in kd where rows are unaligned. Half of
# it for fp64, whose values take two registers. Where the inner axis is the contiguous one, a tile reads WIDTH
# neighbours of it at once: 128 bytes of bf16.
TILE = 2048
WIDTH = 64
WARPS = 4
# Groups are split until there are this many programs, some three times what one big GPU holds at a time.
PROGRAMS = 2048


class Tiles(NamedTuple):
    """The cut of one map, as kernels take it. Sizes and strides in elements; constants are ``tl.constexpr``."""

    inner: Any
    length: Any  # of the reduced axis: LENGTH_UNIT times this
    stride_outer: Any
    stride_inner: Any  # UNIT times this
    stride_reduced: Any
    chunk: Any  # elements of the reduced axis a program reads
    chunks: Any
    UNIT: Any
    LENGTH_UNIT: Any
    ACC: Any
    BLOCK_INNER: Any
    BLOCK_REDUCED: Any


class Cut(NamedTuple):
    """How a map is cut."""

    outer: int
    inner: int
    length: int
    chunks: int
    programs: int
    tiles: Tiles


def cut(x: Tensor, reduced: str, split: bool = True, maps: int = 2) -> Cut:
    """Cuts ``x`` (N, C, H, W), NCHW-contiguous or channels_last, for a reduction along ``reduced`` (see the top).

    Args:
        split: whether a long reduction may be split into chunks.
        maps: how many are read; beyond two, tiles are half as large.
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
    # Multiples that the compiler may know, so that it loads several elements at once where rows are not of 16.
    unit, length_unit = math.gcd(strides[1], 8), math.gcd(length, 8)
    constants = map(tl.constexpr, (unit, length_unit, tl.float64 if double else tl.float32, block_inner, block_reduced))
    runtime = (inner, length // length_unit, strides[0], strides[1] // unit, strides[2], chunk, chunks)
    return Cut(outer, inner, length, chunks, programs * chunks, Tiles(*runtime, *constants))


@lru_cache(maxsize=1024)
def cut_parts(inner: int, parts: int) -> tuple[int, int]:
    """Blocks (inner, parts) for a merge of ``parts`` parts of each of ``inner`` groups: small, as it works in fp64."""
    block_inner = min(triton.next_power_of_2(inner), 32)
    return block_inner, min(triton.next_power_of_2(parts), 512 // block_inner)


class Lanes(NamedTuple):
    """A program's place."""

    outer: Any  # int64
    inner: Any  # (BLOCK_INNER,) int64
    chunk: Any  # int64
    inside: Any  # (BLOCK_INNER,)
    base: Any  # (BLOCK_INNER,) offsets of the first elements
    length: Any


@triton.jit
def locate(g):
    """This program's place in a cut."""
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

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
    """The cut of one map. Sizes and strides in elements."""

    outer: int
    inner: int
    length: int  # of the reduced axis
    strides: tuple[int, int, int]  # of outer, inner, reduced
    chunk: int  # elements of the reduced axis a program reads
    chunks: int
    blocks: dict[str, int]  # the constexpr BLOCK_INNER and BLOCK_REDUCED
    grid: tuple[int]

    @property
    def runtime(self) -> tuple[int, ...]:
        """The arguments every kernel takes in this order: inner, length, 3 strides, chunk, chunks."""
        return (self.inner, self.length, *self.strides, self.chunk, self.chunks)


def cut(x: Tensor, reduced: str, split: bool = True, maps: int = 2) -> Tiles:
    """Cuts ``x`` (N, C, H, W), NCHW-contiguous or channels_last, for a reduction along ``reduced`` (see the top).

    Args:
        split: whether a long reduction may be split into chunks.
        maps: how many are read; beyond two, tiles are half as large.
    """
    tile = TILE // (1 if maps <= 2 else 2) // (2 if x.dtype == torch.float64 else 1)
    return _cut(x.shape, x.is_contiguous(), tile, reduced, split)


@lru_cache(maxsize=1024)  # tens of microseconds, at every call
def _cut(shape: tuple[int, int, int, int], nchw: bool, tile: int, reduced: str, split: bool) -> Tiles:
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
    blocks = {"BLOCK_INNER": block_inner, "BLOCK_REDUCED": block_reduced}
    return Tiles(outer, inner, length, strides, chunk, chunks, blocks, (programs * chunks,))


@lru_cache(maxsize=1024)
def cut_parts(inner: int, parts: int) -> dict[str, int]:
    """Blocks for a merge of ``parts`` parts of each of ``inner`` groups: small tiles, as it works in fp64."""
    block_inner = min(triton.next_power_of_2(inner), 32)
    return {"BLOCK_INNER": block_inner, "BLOCK_PARTS": min(triton.next_power_of_2(parts), 512 // block_inner)}


def accumulator(x: Tensor) -> tuple[torch.dtype, tl.dtype]:
    """What a map of this dtype is computed in, for torch and for Triton: fp32, or fp64 for fp64."""
    return (torch.float64, tl.float64) if x.dtype == torch.float64 else (torch.float32, tl.float32)


def launch(
    kernel: Any, grid: tuple[int, ...], like: Tensor, *args: Any, num_warps: int = WARPS, **constants: Any
) -> None:
    """Runs ``kernel`` on the device of ``like``, whichever device is current."""
    with torch.cuda.device_of(like):
        kernel[grid](*args, num_warps=num_warps, **constants)


@triton.jit
def locate(inner, chunks, BLOCK_INNER: tl.constexpr):
    """This program's place: (outer index, its BLOCK_INNER inner indices, chunk index), int64."""
    program = tl.program_id(0)
    block = program // chunks
    blocks = tl.cdiv(inner, BLOCK_INNER)
    lane = tl.arange(0, BLOCK_INNER)
    # Written so that Triton sees runs of 4 and not of 8: a thread keeps its sums once for each inner index it loads.
    i = (block % blocks).to(tl.int64) * BLOCK_INNER + (lane // 4 * 4 + lane % 4)
    return (block // blocks).to(tl.int64), i, (program % chunks).to(tl.int64)

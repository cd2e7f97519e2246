"""The sums over label pixels for Dice and cross-entropy, fused with the bilinear resize of the logits.

With p = softmax(bilinear(logits)) and y the label, over the counted pixels of each sample and for each class c:

    sums[n, c, 0] = sum of p_c [y = c]            (the intersection)
    sums[n, c, 1] = sum of p_c, of p_c^2 if square
    sums[n, c, 2] = sum of [y = c]
    sums[n, c, 3] = sum of -log p_c [y = c]       if columns >= 4: cross-entropy
    sums[n, c, 4] = sum of -log p_c               if columns >= 5: label smoothing

The result is fp64. Partial sums are pairwise, or fp64 beyond some tens of terms: an image of 4096x8192 keeps 1e-6.
`fastkd._dice` computes Dice, cross-entropy, their weights and reductions from these (N, C) numbers with autograd. The
operator is therefore a late loss with ``sums`` as its loss, "none" as its only reduction and 1 as its scale:

    resized_dice_forward(logits, target, ..., "none", 1.0) -> (sums, kept)
    resized_dice_backward(grad, logits, target, ..., "none", 1.0, kept) -> gradient, as the logits

``grad`` is (N, C, columns) in fp64, the upstream gradient of ``sums``; i, b, a, s below are columns 0, 1, 3, 4 of the
pixel's sample (column 2 has no gradient). At a counted pixel with label y and probabilities p, B_c = b_c, or 2 b_c p_c
if square:

    dot     = i_y p_y + sum_c B_c p_c
    d / dz_c = p_c (B_c - dot + a_y + sum_k s_k) + [c = y] (i_y p_y - a_y) - s_c

``kept`` is what a backend keeps for the backward (such as the log-sum-exp of label pixels), empty if it recomputes.
Labels outside [0, C) do not count. One logit (C = 1) is passed as two, the first of them 0.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ._operator import Draw, Loss, accumulator


def _fake(
    logits: Tensor,
    target: Tensor,
    ignore_index: int,
    align_corners: bool,
    square: bool,
    columns: int,
    reduction: str,
    scale: float,
):
    n, classes = logits.shape[:2]
    sums = logits.new_empty((n, classes, columns), dtype=torch.float64)
    return sums, logits.new_empty((0,), dtype=accumulator(logits))


def _samples(draw: Draw) -> Iterator[tuple[Any, ...]]:
    for square in (False, True):
        for columns in (3, 4, 5):
            yield draw.map(0), draw.labels(), 255, columns == 4, square, columns


RESIZED_DICE = Loss(
    "resized_dice",
    "Tensor logits, Tensor target, int ignore_index, bool align_corners, bool square, int columns",
    _fake,
    _samples,
    early=(),
    late=("cpu", "triton", "cuda"),
    reductions=("none",),
    sample_scale=1.0,
)
OPERATORS = RESIZED_DICE.operators()

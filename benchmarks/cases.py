"""The measured losses and shapes: those of published recipes, small on a CPU, full size on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import NamedTuple

import torch

from . import (
    bench_cwd,
    bench_kd,
    bench_nfd,
    bench_rdd,
    bench_resized_binary_cross_entropy,
    bench_resized_cross_entropy,
    bench_resized_dice,
    bench_resized_kd,
    bench_resized_ohem_cross_entropy,
)
from .harness import Case, Shape

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16

LOSSES: dict[str, Callable[..., Case]] = {
    "nfd": bench_nfd.case,
    "kd": bench_kd.case,
    "cwd": bench_cwd.case,
    "resized_ce": bench_resized_cross_entropy.case,
    "resized_kd": bench_resized_kd.case,
    "resized_ohem_ce": bench_resized_ohem_cross_entropy.case,
    "resized_smooth_ce": bench_resized_cross_entropy.smoothing_case,
    "resized_focal_ce": bench_resized_cross_entropy.focal_case,
    "resized_dice": bench_resized_dice.case,
    "resized_ce_dice": bench_resized_dice.ce_case,
    "resized_bce": bench_resized_binary_cross_entropy.case,
    "kd_sigmoid": bench_kd.sigmoid_case,
    "resized_kd_sigmoid": bench_resized_kd.sigmoid_case,
    "rdd_tfe": bench_rdd.tfe_case,
    "rdd_tse": bench_rdd.tse_case,
}
"""Name -> a function of (shape, size, dtype) that returns the case."""
FEATURE_LOSSES = ("nfd", "cwd")


class Recipe(NamedTuple):
    """A published training: batch, classes and crop. Networks predict at 1/8; student features have 512 channels."""

    batch: int
    classes: int
    crop: tuple[int, int]

    @property
    def logits(self) -> Shape:
        return (self.batch, self.classes, self.crop[0] // 8, self.crop[1] // 8)

    @property
    def features(self) -> Shape:
        return (self.batch, 512, self.crop[0] // 8, self.crop[1] // 8)


RECIPES = {
    "ADE20K": Recipe(16, 150, (512, 512)),
    "Cityscapes": Recipe(8, 19, (512, 1024)),
    "Cityscapes, full": Recipe(8, 19, (1024, 2048)),
    "VOC": Recipe(16, 21, (512, 512)),
    "CamVid": Recipe(16, 11, (360, 360)),
}


def cpu_cases(losses: Collection[str] = tuple(LOSSES)) -> list[Case]:
    """Two samples per batch; the targets are for fp32 and two threads."""
    features, many_features = (2, 256, 64, 128), (1, 512, 128, 256)
    city, ade = ((2, 19, 64, 128), (512, 1024)), ((2, 150, 64, 64), (512, 512))
    nfd = {"eager": 10, "compile": 1.7, "floor": 1.6}
    kd = {"eager": 8, "compile": 3.5, "floor": 2}
    ce = {"eager": 12, "compile": 12, "floor": 2.5, "bytes": 8}
    dice = {"eager": 12, "compile": 12, "bytes": 8}
    table: list[tuple[str, tuple, dict[str, float], tuple[torch.dtype, ...]]] = [
        ("nfd", (features, None), nfd, (F32, BF16, F16)),
        ("nfd", (many_features, None), nfd, (F32, BF16)),
        ("kd", ((1, 19, 512, 1024), None), kd, (F32, BF16, F16)),
        ("kd", ((2, 150, 128, 128), None), kd, (F32, BF16)),
        ("cwd", (features, None), {"eager": 5, "compile": 1.5}, (F32, BF16)),
        ("resized_ce", city, ce, (F32, BF16, F16)),
        ("resized_ce", ade, ce, (F32,)),
        ("resized_kd", city, ce | {"compile": 6}, (F32, BF16)),
        ("resized_kd", ade, ce | {"compile": 6}, (F32,)),
        ("resized_ohem_ce", city, ce | {"eager": 15}, (F32,)),
        ("resized_ohem_ce", ade, ce | {"eager": 15}, (F32,)),
        ("resized_smooth_ce", city, {"bytes": 8}, (F32,)),
        ("resized_smooth_ce", ade, {"bytes": 8}, (F32,)),
        ("resized_focal_ce", city, {"bytes": 8}, (F32,)),
        ("resized_focal_ce", ade, {"bytes": 8}, (F32,)),
        ("resized_dice", city, dice, (F32,)),
        ("resized_dice", ade, dice, (F32,)),
        ("resized_ce_dice", city, dice, (F32, BF16)),
        ("resized_ce_dice", ade, dice, (F32,)),
        ("resized_bce", city, {"eager": 6, "bytes": 8}, (F32,)),
        ("resized_bce", ade, {"eager": 6, "bytes": 8}, (F32,)),
        ("rdd_tfe", city, ce, (F32, BF16)),
        ("rdd_tse", city, {"eager": 18, "compile": 18, "floor": 2.5, "bytes": 16}, (F32, BF16)),
    ]
    return [
        LOSSES[name](*shapes, dtype, **(targets if dtype == F32 else {}))
        for name, shapes, targets, dtypes in table
        if name in losses
        for dtype in dtypes
    ]


def gpu_cases(losses: Collection[str] = tuple(LOSSES)) -> list[Case]:
    """All recipes, the most informative first, in case a run is cut short."""
    table = [
        *((recipe, name, BF16) for recipe in ("ADE20K", "Cityscapes") for name in LOSSES),
        *(("Cityscapes", name, dtype) for dtype in (F32, F16) for name in LOSSES),
        *(("Cityscapes, full", name, BF16) for name in LOSSES),
        *((recipe, name, BF16) for recipe in ("VOC", "CamVid") for name in ("resized_ce", "resized_kd")),
        ("CamVid", "nfd", BF16),
    ]
    return [
        LOSSES[loss](
            RECIPES[name].features if loss in FEATURE_LOSSES else RECIPES[name].logits, RECIPES[name].crop, dtype
        )
        for name, loss, dtype in table
        if loss in losses
    ]


def cases(device: str, losses: Collection[str] = tuple(LOSSES)) -> list[Case]:
    return cpu_cases(losses) if device == "cpu" else gpu_cases(losses)

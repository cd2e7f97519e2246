"""The trainer's data sets. Every one gives pairs `(tv_tensors.Image uint8 (3, H, W), tv_tensors.Mask uint8 (H, W))`.

Each data set has `classes` (names), `palette` (uint8 (K, 3)) and `ignore_index` (255). Images are not normalised here:
mean and standard deviation belong to the model.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from fastkd.train.data.camvid import CamVid, DataError
from fastkd.train.data.street_scenes import StreetScenes
from fastkd.train.data.transforms import eval_transform, train_transform

__all__ = ["DATASETS", "CamVid", "DataError", "StreetScenes", "build_dataset", "eval_transform", "train_transform"]

DATASETS: dict[str, type[StreetScenes] | type[CamVid]] = {"street_scenes": StreetScenes, "camvid": CamVid}


def build_dataset(name: str, *, root: str | Path | None = None, split: str, **options: Any) -> Dataset:
    """The data set `name` of `DATASETS`; `root` is its folder if it reads files; `options` go to its constructor.

    `ValueError`: an unknown name, a folder given or missing where it should not be, or an unknown option.
    """
    if name not in DATASETS:
        raise ValueError(f"unknown data set {name!r}; known: {', '.join(sorted(DATASETS))}")
    kind: Any = DATASETS[name]
    parameters = inspect.signature(kind).parameters
    known = [p.name for p in parameters.values() if p.kind is p.KEYWORD_ONLY]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ValueError(f"data set {name!r} has no option {', '.join(unknown)}; its options: {', '.join(known)}")
    if "root" not in parameters:
        if root is not None:
            raise ValueError(f"data set {name!r} is generated and reads no files; leave root out (got {str(root)!r})")
        return kind(split, **options)
    if root is None:
        raise ValueError(f"data set {name!r} needs root, the folder its files are in")
    return kind(root, split, **options)

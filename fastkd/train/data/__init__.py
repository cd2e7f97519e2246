"""The trainer's data sets. Items are `(tv_tensors.Image uint8 (3, H, W), tv_tensors.Mask uint8 (H, W))`.

Each data set has `classes` (names), `palette` (uint8 (K, 3)) and `ignore_index` (255). Images are not normalised: mean
and standard deviation belong to the model.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from fastkd import ranges
from fastkd.train.data.folders import LabelledImages, Layout
from fastkd.train.data.images import DataError
from fastkd.train.data.layouts import LAYOUTS
from fastkd.train.data.street_scenes import StreetScenes
from fastkd.train.data.transforms import eval_transform, train_transform

__all__ = [
    "DATASETS", "DataError", "LabelledImages", "Layout", "StreetScenes", "build_dataset", "eval_transform",
    "evaluation_set", "train_transform",
]  # fmt: skip

KINDS: dict[str, Callable[..., Any]] = {"street_scenes": StreetScenes, **LAYOUTS}
DATASETS = tuple(KINDS)
SPLITS = ("train", "val", "test")


def build_dataset(
    name: str,
    *,
    root: str | Path | None = None,
    split: str,
    transform: Callable[..., Any] | None = None,
    **options: Any,
) -> Dataset:
    """The data set `name` of `DATASETS`; `root` is its folder if it reads files; `options` are its own (data.options).

    Raises ValueError for an unknown name or option, or a `root` that is missing or not expected.
    """
    if name not in DATASETS:
        raise ValueError(f"unknown data set {name!r};{_close(name, DATASETS)} known: {', '.join(sorted(DATASETS))}")
    if split not in SPLITS:
        raise ValueError(f"{name}: unknown split {split!r}; expected one of {', '.join(SPLITS)}")
    kind: Any = KINDS[name]
    known = [p.name for p in inspect.signature(kind).parameters.values() if p.kind is p.KEYWORD_ONLY]
    known = [option for option in known if option != "transform"]
    for option in options:
        if option not in known:
            raise ValueError(
                f"data set {name!r} has no option {option!r};{_close(option, known)} its options: {', '.join(known) or 'none'}"
            )
    ranges.check_options(kind, options, "data.options.")
    if name == "street_scenes":
        if root is not None:
            raise ValueError(f"data set {name!r} is generated and reads no files; leave root out (got {str(root)!r})")
        return StreetScenes(split, transform=transform, **options)
    if root is None:
        raise ValueError(f"data set {name!r} needs root, the folder its files are in: --data.root FOLDER")
    return LabelledImages(root, kind(split, **options), transform=transform)


def evaluation_set(data: Any, *, split: str = "val", root: str | Path | None = None) -> Any:
    """The whole images of a split, without augmentation; `data` as in `Config.data`, `root` overrides its folder."""
    options = data.options if split == "train" else data.options | data.val_options
    return build_dataset(data.name, root=root or data.root, split=split, transform=eval_transform(), **options)


def _close(word: str, known: Any) -> str:
    found = difflib.get_close_matches(word, known, n=1)
    return f" did you mean {found[0]!r}?" if found else ""

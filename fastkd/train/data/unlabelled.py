"""Few labels: a fixed part of a data set keeps its labels; unlabelled images fill a share of each batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from fastkd.train.data.images import SUFFIXES, image_files, rgb

REST = "rest"  # the training images whose labels are not used


class Part(Dataset):
    """A subset of a data set."""

    def __init__(self, dataset: Any, indices: Sequence[int]):
        self.dataset, self.indices = dataset, indices
        self.classes, self.palette, self.ignore_index = dataset.classes, dataset.palette, dataset.ignore_index

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Any:
        return self.dataset[self.indices[index]]


class Folder:
    """The images in a folder, recursively, sorted by path."""

    def __init__(self, folder: Path):
        if not folder.is_dir():
            raise FileNotFoundError(f"data.unlabelled: no folder {folder}; name one with images, or {REST!r}")
        self.files = image_files(folder)
        if not self.files:
            raise FileNotFoundError(f"data.unlabelled: no images ({', '.join(SUFFIXES)}) in {folder}")

    def image(self, index: int) -> Tensor:
        return rgb(self.files[index])


class Unlabelled(Dataset):
    """`transform(image)` of some images of `source`. Labels are not read, so augmentation cannot depend on them."""

    def __init__(self, source: Any, indices: Sequence[int], transform: Callable[..., Any] | None):
        self.source, self.indices, self.transform = source, indices, transform

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Tensor:
        image = self.source.image(self.indices[index])
        return image if self.transform is None else self.transform(image)


def split(dataset: Any, *, labelled: Fraction, seed: int, unlabelled: str | None) -> tuple[Any, Unlabelled | None]:
    """The labelled part of a training set, and the unlabelled images (None without `unlabelled`).

    Args:
        labelled: share of the images whose labels are used; their number is rounded, at least one.
        seed: selects them.
        unlabelled: "rest" for the other training images, or a folder of images.

    Raises:
        ValueError: "rest" is empty.
        FileNotFoundError: the folder does not exist or has no images.
    """
    order = list(range(len(dataset)))
    if labelled < 1:
        order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed)).tolist()
    count = max(1, round(labelled * len(dataset)))
    part = dataset if labelled == 1 else Part(dataset, order[:count])
    if unlabelled is None:
        return part, None
    if unlabelled != REST:
        folder = Folder(Path(unlabelled).expanduser())
        return part, Unlabelled(folder, range(len(folder.files)), dataset.transform)
    rest = order[count:]
    if not rest:
        raise ValueError(
            f"data.unlabelled {REST}: all {len(dataset)} training images are labelled; set data.labelled, e.g. 1/8, or name a "
            "folder of images"
        )
    return part, Unlabelled(dataset, rest, dataset.transform)

"""`fastkd data`: classes, damaged files, and loading speed."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from fastkd.train.data.images import DataError

SAMPLES = 64  # timed samples


class Contents(NamedTuple):
    """Of a split: readable images, pixels per class and (last) ignored ones, and the problems of other images."""

    images: int
    pixels: np.ndarray
    problems: list[str]


class Speed(NamedTuple):
    """Seconds per training sample in one loader process."""

    read: float
    augment: float

    @property
    def sample(self) -> float:
        return self.read + self.augment


class Seen:
    """Tracks classes with a labelled pixel in training; reports those without once, after a pass over the data set."""

    def __init__(self, classes: Sequence[str], length: int) -> None:
        self.classes, self.length = classes, length
        self.images, self.told = 0, False
        self.counts = torch.zeros(len(classes), dtype=torch.int64)

    def see(self, labels: Sequence[Tensor], images: int) -> None:
        """Labels (N, H, W) of this process in a step, on the CPU; `images` is the total over processes."""
        self.images += images
        if not self.told and not self.counts.all():
            for label in labels:
                self.counts += torch.bincount(label.flatten(), minlength=256)[: len(self.classes)]

    def due(self, last: bool) -> bool:
        return not self.told and (last or self.images >= self.length)

    def missing(self, counts: Tensor) -> str | None:
        """counts: of all processes."""
        self.told = True
        names = [name for name, count in zip(self.classes, counts.tolist(), strict=True) if count == 0]
        return without_pixels(names, f"in the {self.images} crops so far") if names else None


def without_pixels(names: Sequence[str], where: str) -> str:
    few = ", ".join(map(repr, names[:5])) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    return (
        f"no pixel {where} is labelled {few}, so the network cannot learn it. Does the class file fit the labels? Masks of 0 and "
        "255 need --data.options.values '{0: 0, 255: 1}' (data.name folders)"
    )


def contents(dataset: Any, progress: str | None = None) -> Contents:
    """Reads every item of a data set without augmentation."""
    classes, images, problems = len(dataset.classes), 0, []
    pixels = np.zeros(classes + 1, np.int64)
    for index in tqdm(range(len(dataset)), desc=progress, disable=progress is None, leave=False):
        try:
            _, label = dataset[index]
        except DataError as error:
            problems.append(str(error))
            continue
        counts = np.bincount(label.numpy().ravel(), minlength=256)
        pixels += np.append(counts[:classes], counts[dataset.ignore_index])
        images += 1
    return Contents(images, pixels, problems)


def speed(dataset: Any, augment: Callable[..., Any], samples: int = SAMPLES) -> Speed:
    """Times reading and augmentation of evenly spaced samples on one thread, as in a loader process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        count = min(samples, len(dataset))
        read = augmented = 0.0
        for i in range(-1, count):  # the first opens libraries and is not timed
            start = time.perf_counter()
            item = dataset[max(i, 0) * len(dataset) // count]
            middle = time.perf_counter()
            augment(*item)
            if i >= 0:
                read += middle - start
                augmented += time.perf_counter() - middle
        return Speed(read / count, augmented / count)
    finally:
        torch.set_num_threads(threads)


def table(classes: Any, splits: dict[str, Contents]) -> str:
    """Share of each class in the labelled pixels of each split, and of the ignored pixels in all pixels."""
    width = max(map(len, [*classes, "ignored"]))
    lines = [" " * width + "".join(f"{name:>9}" for name in splits)]
    for number, name in enumerate([*classes, "ignored"]):
        cells = []
        for found in splits.values():
            total = found.pixels.sum() if name == "ignored" else found.pixels[:-1].sum()
            share = 100 * found.pixels[number] / max(total, 1)
            cells.append("none" if found.pixels[number] == 0 else f"{share:.2f} %")
        lines.append(f"{name:<{width}}" + "".join(f"{cell:>9}" for cell in cells))
    return "\n".join(lines)

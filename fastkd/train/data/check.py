"""`fastkd data`: which classes there are, whether every file is sound, and how fast samples are loaded."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from fastkd.train.data.images import DataError

SAMPLES = 64  # that are timed


class Contents(NamedTuple):
    """Of a split: images that could be read, pixels of each class and, last, ignored ones, and what is wrong with the others."""

    images: int
    pixels: np.ndarray
    problems: list[str]


class Speed(NamedTuple):
    """Seconds of one loader process for one training sample."""

    read: float
    augment: float

    @property
    def sample(self) -> float:
        return self.read + self.augment


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
    """Times reading and augmentation on one thread, as a loader process has, of samples spread evenly over the data set."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        count = min(samples, len(dataset))
        read = augmented = 0.0
        for i in range(-1, count):  # the first, which opens libraries, does not count
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
    """Share of each class in the labelled pixels of each split, and of the ignored pixels in all."""
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

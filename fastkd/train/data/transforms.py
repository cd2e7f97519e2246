"""Augmentation and evaluation transforms of (image, mask) pairs, built on torchvision's transforms v2.

All random numbers come from torch's default generator, which the training loader seeds for each sample
(`fastkd.train.loader`): the same seed gives the same crops.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

GREY = 127  # padding of an image
TRIES = 10  # maximum crops drawn for cat_max_ratio


class RandomScaleCrop(v2.Transform):
    """Resizes the pair by a random factor and crops a window of `crop` = (height, width), padded beyond the border.

    Only the window is resized: it is cut from the original first, with sides divided by the factor and rounded to
    pixels, so that the two axes may differ by half a pixel of the window. Image: bilinear, antialiased; mask: nearest.

    Args:
        scale: range of the factor, drawn uniformly.
        step: factors are low, low + step, ... high; 0: continuous.
        cat_max_ratio: maximum share of one class in the labelled pixels of a crop. Takes the first of `TRIES` crops
            that meets it, else the last. 1: no limit.
        ignore_index: label of the padding and of ignored pixels.
    """

    def __init__(
        self,
        crop: tuple[int, int],
        *,
        scale: tuple[float, float] = (0.5, 2.0),
        step: float = 0.0,
        cat_max_ratio: float = 1.0,
        ignore_index: int = 255,
    ) -> None:
        super().__init__()
        low, high = scale
        if not 0 < low <= high:
            raise ValueError(f"scale must be (low, high) with 0 < low <= high, got {tuple(scale)}")
        if not 0 <= step <= max(high - low, 0):
            raise ValueError(f"scale_step must be between 0 and high - low = {high - low:g}, got {step}")
        if not 0 < cat_max_ratio <= 1:
            raise ValueError(f"cat_max_ratio must be in (0, 1], got {cat_max_ratio}")
        self.crop, self.scale, self.step = crop, (low, high), step
        self.cat_max_ratio, self.ignore_index = cat_max_ratio, ignore_index

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        sides = v2.functional.get_size(flat_inputs[0])
        factor = self._factor()
        wanted = [max(1, round(c / factor)) for c in self.crop]
        cut = [min(w, s) for w, s in zip(wanted, sides, strict=True)]
        size = [
            c if t == w else min(c, max(1, round(t * factor))) for c, t, w in zip(self.crop, cut, wanted, strict=True)
        ]
        mask = next((x for x in flat_inputs if isinstance(x, tv_tensors.Mask)), None)
        for _ in range(TRIES):
            top, left = (_integer(s - t + 1) for s, t in zip(sides, cut, strict=True))
            if self.cat_max_ratio == 1 or mask is None or self._mixed(mask[top : top + cut[0], left : left + cut[1]]):
                break
        above, before = (_integer(c - s + 1) for c, s in zip(self.crop, size, strict=True))
        padding = [before, above, self.crop[1] - size[1] - before, self.crop[0] - size[0] - above]
        return {"window": (top, left, *cut), "size": size, "padding": padding}

    def _factor(self) -> float:
        low, high = self.scale
        if self.step:
            return low + self.step * _integer(int((high - low) / self.step + 1e-6) + 1)
        return float(torch.empty((), dtype=torch.float64).uniform_(low, high)) if low < high else low

    def _mixed(self, labels: Tensor) -> bool:
        counts = torch.bincount(labels.reshape(-1), minlength=256)
        counts[self.ignore_index] = 0
        return 0 < int(counts.max()) <= self.cat_max_ratio * int(counts.sum())

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        out = v2.functional.resized_crop(inpt, *params["window"], size=params["size"], antialias=True)
        if any(params["padding"]):
            fill = self.ignore_index if isinstance(inpt, tv_tensors.Mask) else GREY
            out = v2.functional.pad(out, params["padding"], fill=fill)
        return out


def _integer(end: int) -> int:
    return int(torch.randint(end, ()))


def train_transform(
    crop: int | Sequence[int],
    *,
    scale: tuple[float, float] = (0.5, 2.0),
    scale_step: float = 0.0,
    cat_max_ratio: float = 1.0,
    flip: float = 0.5,
    jitter: float = 0.0,
    ignore_index: int = 255,
) -> v2.Transform:
    """`RandomScaleCrop` to `crop` = size or (height, width), then a horizontal flip with probability `flip`.

    `jitter` > 0 adds brightness, contrast and saturation changes of that relative size (hue a fifth of it). Padding is
    grey in the image and `ignore_index` in the mask. Called as `transform(image, mask)`.
    """
    size = (crop, crop) if isinstance(crop, int) else tuple(crop)
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"crop must be a size or (height, width), all at least 1, got {crop}")
    if not 0 <= flip <= 1:
        raise ValueError(f"flip must be a probability, got {flip}")
    if not 0 <= jitter < 1:
        raise ValueError(f"jitter must be in [0, 1), got {jitter}")
    steps: list[v2.Transform] = [
        RandomScaleCrop(
            (size[0], size[1]), scale=scale, step=scale_step, cat_max_ratio=cat_max_ratio, ignore_index=ignore_index
        ),
        v2.RandomHorizontalFlip(flip),
    ]
    if jitter:
        steps.append(v2.ColorJitter(jitter, jitter, jitter, min(0.5, jitter / 5)))
    return v2.Compose(steps)


def eval_transform(size: Sequence[int] | None = None) -> v2.Transform:
    """No randomness: the pair unchanged, or resized to `size` = (height, width), the mask by nearest neighbour."""
    if size is None:
        return v2.Identity()
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"size must be (height, width), both at least 1, got {size}")
    return v2.Resize(list(size), antialias=True)

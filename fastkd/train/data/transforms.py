"""Augmentation and evaluation transforms on (image, mask) pairs, built from torchvision's transforms v2.

Every random number comes from torch's default generator, which a `DataLoader` seeds per worker from its `generator`
(and `torch.manual_seed` seeds in the main process): the same seed gives the same crops.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torchvision import tv_tensors
from torchvision.transforms import v2


class RandomScale(v2.Transform):
    """Resize image and mask by one random factor in `scale`, log-uniform, so that halving is as likely as doubling."""

    def __init__(self, scale: tuple[float, float]) -> None:
        super().__init__()
        low, high = scale
        if not 0 < low <= high:
            raise ValueError(f"scale must be (low, high) with 0 < low <= high, got {scale}")
        self.range = torch.tensor([low, high], dtype=torch.float64).log()

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        height, width = v2.functional.get_size(flat_inputs[0])
        low, high = self.range.tolist()
        factor = float(torch.empty((), dtype=torch.float64).uniform_(low, high).exp())
        return {"size": [max(1, round(height * factor)), max(1, round(width * factor))]}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        # A mask is resized with nearest neighbour whatever `interpolation` says; an image is antialiased when it shrinks.
        return self._call_kernel(
            v2.functional.resize, inpt, params["size"], interpolation=v2.InterpolationMode.BILINEAR, antialias=True
        )


def train_transform(
    crop: int | Sequence[int],
    *,
    scale: tuple[float, float] = (0.5, 2.0),
    flip: float = 0.5,
    jitter: float = 0.0,
    ignore_index: int = 255,
) -> v2.Transform:
    """Random scale, pad and crop to `crop` = size or (height, width), horizontal flip with probability `flip`.

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
    fill = {tv_tensors.Image: 127, tv_tensors.Mask: ignore_index, "others": 0}
    steps: list[v2.Transform] = [
        RandomScale(scale),
        v2.RandomCrop(size, pad_if_needed=True, fill=fill),
        v2.RandomHorizontalFlip(flip),
    ]
    if jitter:
        steps.append(v2.ColorJitter(jitter, jitter, jitter, min(0.5, jitter / 5)))
    return v2.Compose(steps)


def eval_transform(size: Sequence[int] | None = None) -> v2.Transform:
    """Nothing at random: the pair as it is, or resized to `size` = (height, width), the mask by nearest neighbour."""
    if size is None:
        return v2.Identity()
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"size must be (height, width), both at least 1, got {size}")
    return v2.Resize(list(size), antialias=True)

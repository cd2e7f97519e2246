"""Colour overlays of a network's predictions on image files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from fastkd.train import checkpoint
from fastkd.train.config import Config, from_dict
from fastkd.train.evaluation import predict_logits
from fastkd.train.panels import overlay

STRIDE = 32  # sides of an input are multiples of this, which every encoder takes


def predict(
    path: Path,
    images: Sequence[Path],
    out: Path,
    *,
    size: Sequence[int] | None = None,
    alpha: float = 0.55,
    device: torch.device | None = None,
) -> list[Path]:
    """Writes `<out>/<image name>.png` for each image and returns these paths.

    Args:
        path: a checkpoint of the trainer.
        size: (height, width) the network sees; None: the one of its validation, or the image's own rounded to 32.
        alpha: opacity of the colours.

    Raises:
        ValueError: a file is no image, or two images would be written to one name.
    """
    network, state = checkpoint.load_network(path)
    device = device or torch.device("cpu")
    network = network.to(device)
    size = size or from_dict(Config, state["config"]).eval.size
    palette = np.asarray(state["palette"], dtype=np.uint8)
    targets = [out / f"{image.stem}.png" for image in images]
    if len(set(targets)) != len(targets):
        twice = next(t.name for t in targets if targets.count(t) > 1)
        raise ValueError(f"two of the images would be written to {twice}; predict their folders one by one")
    out.mkdir(parents=True, exist_ok=True)
    for image, target in zip(tqdm(images, desc="predict", disable=len(images) < 2), targets, strict=True):
        try:
            pixels = np.asarray(Image.open(image).convert("RGB"))
        except (UnidentifiedImageError, OSError) as error:
            raise ValueError(f"cannot read image {image}: {error}") from error
        batch = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].to(device)
        height, width = pixels.shape[:2]
        seen = tuple(size) if size else (_round(height), _round(width))
        label = predict_logits(network, batch, (height, width), input_size=seen).argmax(1)[0]
        Image.fromarray(overlay(pixels, label.cpu().numpy().astype(np.uint8), palette, alpha=alpha)).save(target)
    return targets


def _round(side: int) -> int:
    return max(STRIDE, round(side / STRIDE) * STRIDE)

"""Colour overlays of a network's predictions on image files."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from tqdm import tqdm

from fastkd.train import checkpoint
from fastkd.train.config import EvalConfig
from fastkd.train.data.images import SUFFIXES, DataError, open_photo
from fastkd.train.data.images import image_files as images_of
from fastkd.train.evaluation import predict_scores
from fastkd.train.files import write_whole
from fastkd.train.pictures import overlay


def predict(
    path: Path,
    images: Sequence[Path],
    out: Path,
    *,
    size: Sequence[int] | None = None,
    alpha: float = 0.55,
    device: torch.device | None = None,
) -> tuple[list[Path], list[str]]:
    """Writes `<out>/<image name>.png` for each image; returns the written files, and a message per failed image.

    Args:
        path: a checkpoint of the trainer.
        images: untrusted files; a bad one does not stop the others.
        size: (height, width) of the network's input; None: that of its validation, or the image's own.
        alpha: opacity of the colours.

    Raises:
        ValueError: two images have the same output name, or an image would be overwritten.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha is an opacity between 0 and 1, got {alpha}")
    network, state = checkpoint.load_network(path)
    device = device or torch.device("cpu")
    network = network.to(device)
    how = checkpoint.config_of(state, path).eval
    how = dataclasses.replace(how, size=(size[0], size[1])) if size else how
    palette = np.asarray(state["palette"], dtype=np.uint8)
    targets = [out / f"{image.stem}.png" for image in images]
    if len(set(targets)) != len(targets):
        twice = next(t.name for t in targets if targets.count(t) > 1)
        raise ValueError(f"two of the images would be written to {twice}; predict their folders separately")
    if over := {t.resolve() for t in targets} & {i.resolve() for i in images}:
        raise ValueError(f"{min(over)} would be overwritten; choose another --out")
    written, failed = [], []
    for image, target in zip(tqdm(images, desc="predict", disable=len(images) < 2), targets, strict=True):
        try:
            pixels = np.asarray(open_photo(image))
            label = _label(network, image, pixels, how, device)
        except DataError as error:
            failed.append(str(error))
            continue
        picture = Image.fromarray(overlay(pixels, label, palette, alpha=alpha))
        write_whole(target, partial(picture.save, format="PNG"))
        written.append(target)
    return written, failed


def _label(network: nn.Module, image: Path, pixels: np.ndarray, how: EvalConfig, device: torch.device) -> np.ndarray:
    """Predicted class numbers, uint8 (H, W)."""
    height, width = pixels.shape[:2]
    try:
        batch = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].to(device)
        return predict_scores(network, batch, (height, width), how).argmax(1)[0].byte().cpu().numpy()
    except (MemoryError, RuntimeError) as error:  # torch's out-of-memory errors are RuntimeErrors
        if "memory" not in str(error) and not isinstance(error, MemoryError):
            raise
        raise DataError(f"{image} ({width}x{height}) needs more memory than there is; give a smaller --size") from error


def image_files(paths: Sequence[Path]) -> list[Path]:
    """The given files, and the images in the given folders. FileNotFoundError: there is none."""
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = images_of(path, deep=False)
            if not inside:
                raise FileNotFoundError(f"{path} holds no image ({', '.join(SUFFIXES)})")
            files += inside
        elif path.is_file():
            files.append(path)
        else:
            raise FileNotFoundError(f"no image or folder {path}")
    return files

"""CamVid in the folder layout of the SegNet tutorial: `train/ trainannot/ val/ valannot/ test/ testannot/`.

Labels are 8-bit single-channel PNGs: 0 to 10 are the eleven classes, 11 is void and becomes `ignore_index`.
Source: Brostow, Fauqueur, Cipolla, "Semantic object classes in video", PRL 2009; layout: Badrinarayanan et al., SegNet, 2017.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from torchvision import tv_tensors

SPLITS = ("train", "val", "test")
VOID = 11
LAYOUT = (
    "expected ROOT/{train,val,test}/*.png|jpg beside ROOT/{train,val,test}annot/*.png (the SegNet tutorial's CamVid)"
)


class DataError(ValueError):
    """A data file that cannot be used. The message names the file, what was found and what to do."""


class CamVid(Dataset):
    """CamVid with 11 classes.

    Item `i` is `(tv_tensors.Image uint8 (3, H, W), tv_tensors.Mask uint8 (H, W))`, void pixels 255.

    `FileNotFoundError`: no such folder, or no images in it. `DataError`, at construction: an image without its label;
    when an item is loaded: an unreadable or truncated file, a wrong mode, a label value out of range, or an image and
    a label of different sizes.
    """

    classes = ("sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian", "bicyclist")
    palette = np.array(
        [
            (128, 128, 128), (128, 0, 0), (192, 192, 128), (128, 64, 128), (60, 40, 222), (128, 128, 0),
            (192, 128, 128), (64, 64, 128), (64, 0, 128), (64, 64, 0), (0, 128, 192),
        ],
        dtype=np.uint8,
    )  # fmt: skip
    ignore_index = 255

    def __init__(self, root: str | Path, split: str, *, transform: Callable[..., Any] | None = None) -> None:
        if split not in SPLITS:
            raise ValueError(f"CamVid: unknown split {split!r}; expected one of {', '.join(SPLITS)}")
        self.root, self.split, self.transform = Path(root).expanduser(), split, transform
        images, labels = self.root / split, self.root / f"{split}annot"
        for folder in (self.root, images, labels):
            if not folder.is_dir():
                raise FileNotFoundError(
                    f"CamVid: no folder {folder}; {LAYOUT}. Set the data set's root to that folder."
                )
        found = sorted(p for p in images.iterdir() if p.suffix.lower() in (".png", ".jpg", ".jpeg"))
        if not found:
            raise FileNotFoundError(f"CamVid: no png or jpg images in {images}; {LAYOUT}")
        known = {p.stem: p for p in labels.iterdir() if p.suffix.lower() == ".png"}
        missing = [p for p in found if p.stem not in known]
        if missing:
            more = f" ({len(missing)} images have none)" if len(missing) > 1 else ""
            raise DataError(
                f"CamVid: {missing[0]} has no label {labels / (missing[0].stem + '.png')}{more}; "
                "add the label or remove the image"
            )
        self.items = [(p, known[p.stem]) for p in found]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
        image_path, label_path = self.items[index]
        image = _decode(image_path, ("RGB",), "convert it to 8-bit RGB")
        label = _decode(label_path, ("L", "P"), "convert it to 8-bit class numbers, one channel")
        if image.shape[:2] != label.shape:
            raise DataError(
                f"CamVid: {image_path} is {image.shape[1]}x{image.shape[0]} but its label {label_path} is "
                f"{label.shape[1]}x{label.shape[0]}; they must be the same size"
            )
        wrong = (label > VOID) & (label != self.ignore_index)
        if wrong.any():
            y, x = np.argwhere(wrong)[0]
            raise DataError(
                f"CamVid: {label_path} holds the value {label[y, x]} at row {y}, column {x}; expected 0 to 10 for the "
                f"classes, {VOID} (or {self.ignore_index}) for void. Is it a colour map or another data set's label?"
            )
        label[label == VOID] = self.ignore_index
        item = (
            tv_tensors.Image(torch.from_numpy(image).permute(2, 0, 1).contiguous()),
            tv_tensors.Mask(torch.from_numpy(label)),
        )
        return item if self.transform is None else self.transform(*item)


def _decode(path: Path, modes: tuple[str, ...], remedy: str) -> np.ndarray:
    """The pixels of an image file, (H, W) or (H, W, 3) uint8; `DataError` if it is not whole or not of one of `modes`."""
    try:
        with Image.open(path) as picture:
            picture.load()
            mode, pixels = picture.mode, np.array(picture)
    except FileNotFoundError:
        raise DataError(f"CamVid: {path} is gone since the folder was listed; restore it or start again") from None
    # Pillow reports damage as OSError, SyntaxError (broken PNG chunks), ValueError or its own bomb error.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"CamVid: {path} cannot be read ({error}); replace the damaged file") from error
    if mode not in modes:
        raise DataError(f"CamVid: {path} has mode {mode}, expected {' or '.join(modes)}; {remedy}")
    return pixels

"""Each data set as a tiny tree in its usual layout on disk, with stripes of every valid label value."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

SIZE = (48, 64)
COUNTS = {"train": 3, "val": 2}


def stripes(values, seed: int = 0) -> np.ndarray:
    """A label map whose columns cycle through `values`, shifted by `seed`."""
    columns = np.arange(SIZE[1]) // max(1, SIZE[1] // len(values)) + seed
    return np.broadcast_to(np.asarray(values, np.uint8)[columns % len(values)], SIZE).copy()


def picture(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (*SIZE, 3), np.uint8)


def save(array: np.ndarray, path: Path, palette: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(array)
    if palette:
        image.putpalette(list(range(256)) * 3)
    image.save(path)


def cityscapes(root: Path) -> dict:
    for split, city in (("train", "aachen"), ("val", "lindau")):
        for i in range(COUNTS[split]):
            name = f"{city}/{city}_00000{i}_000019"
            save(picture(i), root / f"leftImg8bit/{split}/{name}_leftImg8bit.png")
            save(stripes(range(34), i), root / f"gtFine/{split}/{name}_gtFine_labelIds.png")
            save(stripes([*range(19), 255], i), root / f"gtFine/{split}/{name}_gtFine_labelTrainIds.png")
            save(picture(i), root / f"gtFine/{split}/{name}_gtFine_color.png")
    return {"root": str(root)}


def camvid(root: Path) -> dict:
    for split, count in COUNTS.items():
        for i in range(count):
            save(picture(i), root / split / f"0001TP_00{i}.png")
            save(stripes(range(12), i), root / f"{split}annot" / f"0001TP_00{i}.png")
    return {"root": str(root)}


def voc(root: Path) -> dict:
    """VOCdevkit as unpacked, with the augmented labels next to VOC's."""
    inside = root / "VOCdevkit/VOC2012"
    lists = {
        "train": ["2007_000001"],
        "trainaug": ["2007_000001", "2008_000002", "2008_000003"],
        "val": ["2007_000007"],
    }
    for name in lists["trainaug"] + lists["val"]:
        save(picture(int(name[-1])), inside / f"JPEGImages/{name}.jpg")
        save(stripes([*range(21), 255], int(name[-1])), inside / f"SegmentationClassAug/{name}.png")
    for name in lists["train"] + lists["val"]:
        save(stripes([*range(21), 255], int(name[-1])), inside / f"SegmentationClass/{name}.png", palette=True)
    (inside / "ImageSets/Segmentation").mkdir(parents=True)
    for name, lines in lists.items():
        (inside / f"ImageSets/Segmentation/{name}.txt").write_text("\n".join(lines) + "\n")
    return {"root": str(root)}


def ade20k(root: Path) -> dict:
    for split, folder in (("train", "training"), ("val", "validation")):
        for i in range(COUNTS[split]):
            name = f"ADE_{split}_0000000{i + 1}"
            save(picture(i), root / f"ADEChallengeData2016/images/{folder}/{name}.jpg")
            label = np.arange(SIZE[0] * SIZE[1]).reshape(SIZE) % 151  # all of 0 to 150
            save(label.astype(np.uint8), root / f"ADEChallengeData2016/annotations/{folder}/{name}.png")
    return {"root": str(root)}


def folders(root: Path) -> dict:
    (root / "classes.txt").parent.mkdir(parents=True, exist_ok=True)
    (root / "classes.txt").write_text("# mine\nroad 128 64 128\n\ntraffic light\nthing 1 2 3\n")
    for split, count in COUNTS.items():
        for i in range(count):
            save(picture(i), root / f"images/{split}/town {i}/{i}.jpg")
            save(stripes([0, 1, 2, 255], i), root / f"labels/{split}/town {i}/{i}.png")
    return {"root": str(root)}


TREES = {"cityscapes": cityscapes, "camvid": camvid, "voc": voc, "ade20k": ade20k, "folders": folders}

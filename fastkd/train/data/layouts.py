"""Data sets in folders: each is a function from the split and its `data.options` to a `Layout`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from fastkd.ranges import Byte, IgnoredByte
from fastkd.train.data.folders import IGNORE, Layout
from fastkd.train.data.images import SUFFIXES, DataError

CLASSES = Path(__file__).with_name("classes")
CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)  # label id of each train id


def cityscapes(split: str, *, labels: Literal["labelIds", "labelTrainIds"] = "labelIds") -> Layout:
    """Cityscapes, fine annotations, 19 classes (Cordts et al., CVPR 2016).

    labels: "labelIds", the downloaded files (ids 0 to 33), or "labelTrainIds", created by cityscapesScripts.
    """
    if labels not in ("labelIds", "labelTrainIds"):
        raise ValueError(f"cityscapes: labels must be 'labelIds' or 'labelTrainIds', got {labels!r}")
    raw = labels == "labelIds"
    return Layout(
        name="cityscapes",
        tree=(
            f"ROOT/leftImg8bit/{split}/CITY/*_leftImg8bit.png beside ROOT/gtFine/{split}/CITY/*_gtFine_{labels}.png "
            f"(for the other kind of label files set --data.options.labels {'labelTrainIds' if raw else 'labelIds'})"
        ),
        classes=CLASSES / "cityscapes.txt",
        images=f"leftImg8bit/{split}",
        labels=(f"gtFine/{split}",),
        image_suffixes=("_leftImg8bit.png",),
        label_suffix=f"_gtFine_{labels}.png",
        values={label: number for number, label in enumerate(CITYSCAPES_IDS)} if raw else None,
        ignored=(*(i for i in range(34) if i not in CITYSCAPES_IDS), IGNORE) if raw else (IGNORE,),
    )


def camvid(split: str, *, labels: Literal["numbers", "colours"] = "numbers") -> Layout:
    """CamVid, 11 classes, from the SegNet tutorial (480x360, labels 0 to 10, void 11) or at full size (960x720).

    Brostow, Fauqueur, Cipolla, "Semantic object classes in video", PRL 2009; Badrinarayanan et al., SegNet, 2017.

    labels: "numbers", the tutorial's files, or "colours", the full-size labels in colours of the 32 original classes,
    which are grouped into the 11.
    """
    if labels not in ("numbers", "colours"):
        raise ValueError(f"camvid: labels must be 'numbers' or 'colours', got {labels!r}")
    numbers = labels == "numbers"
    return Layout(
        name="camvid",
        tree=(
            f"ROOT/{split}/*.png|jpg beside ROOT/{split}annot/*.png (the SegNet tutorial's CamVid; for {split}_labels/*_L.png "
            "in colours set --data.options.labels colours)"
            if numbers
            else f"ROOT/{split}/*.png beside ROOT/{split}_labels/*_L.png in the colours of the 32 original classes"
        ),
        classes=CLASSES / "camvid.txt",
        images=split,
        labels=(f"{split}annot" if numbers else f"{split}_labels",),
        label_suffix=".png" if numbers else "_L.png",
        ignored=(11, IGNORE),
        colours=None if numbers else _camvid_colours(),
    )


def _camvid_colours() -> dict[tuple[int, int, int], int]:
    """Colour of each of the 32 original classes -> one of the 11 classes, or 255."""
    colours = {}
    for line in (CLASSES / "camvid_colours.txt").read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            _, red, green, blue, number = line.split()
            colours[int(red), int(green), int(blue)] = int(number)
    return colours


def voc(split: str, *, aug: bool = True, list: str | None = None) -> Layout:
    """PASCAL VOC 2012, 21 classes (Everingham et al.), trained on the augmented list (Hariharan et al., ICCV 2011).

    aug: train on trainaug.txt and SegmentationClassAug, otherwise on train.txt and SegmentationClass.
    list: another image list, relative to the root; lines are names, or paths of image and label.
    """
    train_aug = aug and split == "train"
    labels = ("SegmentationClassAug",) if train_aug else ("SegmentationClass", "SegmentationClassAug")
    names = ("trainaug.txt", "train_aug.txt") if train_aug else (f"{split}.txt",)
    hint = " (without the augmented set: --data.options.aug false)" if train_aug else ""
    return Layout(
        name="voc",
        tree=f"ROOT/JPEGImages/*.jpg, ROOT/{labels[0]}/*.png and ROOT/ImageSets/Segmentation/{names[0]}, "
        f"ROOT being VOC2012 or a folder above it{hint}",
        classes=CLASSES / "voc.txt",
        images="JPEGImages",
        labels=labels,
        image_suffixes=(".jpg",),
        lists=(list,) if list else tuple(f"ImageSets/Segmentation/{name}" for name in names) + names,
        inside=("VOC2012", "VOCdevkit/VOC2012"),
    )


def ade20k(split: str) -> Layout:
    """ADE20K scene parsing, 150 classes (Zhou et al., CVPR 2017); label 0 is ignored, label k is class k − 1."""
    folder = {"train": "training", "val": "validation"}.get(split)
    if folder is None:
        raise ValueError(f"ade20k: has the splits train and val, got {split!r}")
    return Layout(
        name="ade20k",
        tree=f"ROOT/images/{folder}/*.jpg beside ROOT/annotations/{folder}/*.png, ROOT being ADEChallengeData2016 or above it",
        classes=CLASSES / "ade20k.txt",
        images=f"images/{folder}",
        labels=(f"annotations/{folder}",),
        image_suffixes=(".jpg",),
        inside=("ADEChallengeData2016",),
        first=1,
        ignored=(0, IGNORE),
    )


def folders(
    split: str,
    *,
    images: str = "images/{split}",
    labels: str = "labels/{split}",
    label_suffix: str = ".png",
    classes: str = "classes.txt",
    first: Byte = 0,
    ignore: IgnoredByte | None = IGNORE,
    values: dict[int, int] | None = None,
    image_suffixes: tuple[str, ...] | str = SUFFIXES,
) -> Layout:
    """Any data set: a folder of images, one of 8-bit labels with the same names, and a class file.

    images, labels: folders relative to the root; "{split}" is replaced by train or val.
    label_suffix: label ending, e.g. "_label.png".
    classes: class file.
    first: label value of the first class.
    ignore: label value that is ignored, None for none.
    values: label value -> class, instead of `first`, e.g. {0: 0, 255: 1}.
    image_suffixes: image endings.
    """
    mapped = None
    if values is not None:
        try:
            mapped = {int(value): int(kind) for value, kind in values.items()}
        except (AttributeError, TypeError, ValueError):
            raise DataError(
                f"folders: values maps label values to classes, e.g. {{0: 0, 255: 1}}, got {values!r}"
            ) from None
        if first:
            raise DataError(f"folders: values says what every label value is; leave out first, which is {first}")
    if isinstance(image_suffixes, str):
        image_suffixes = (image_suffixes,)
    return Layout(
        name="folders",
        tree=f"ROOT/{images}/*{'|'.join(image_suffixes)} beside ROOT/{labels}/*{label_suffix} and ROOT/{classes}".replace(
            "{split}", split
        ),
        classes=Path(classes),
        images=images.replace("{split}", split),
        labels=(labels.replace("{split}", split),),
        label_suffix=label_suffix,
        image_suffixes=tuple(image_suffixes),
        values=mapped,
        first=first,
        ignored=tuple({ignore, IGNORE} - {None, *(mapped or ())}) if ignore is not None else (),
    )


LAYOUTS = {kind.__name__: kind for kind in (cityscapes, camvid, voc, ade20k, folders)}

"""Images and label maps in folders: `Layout` describes them, `LabelledImages` reads them.

A class file has one class per line, in order of class number: a name and optionally its colour, separated by blanks or
commas.

    # comment
    traffic light 250 170 30
    road
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from torchvision import tv_tensors

from fastkd.train.data.images import SUFFIXES, DataError, image_files, open_mode, open_photo, rgb

IGNORE = 255


@dataclass(frozen=True)
class Layout:
    """The files of one split; paths are relative to the root.

    Args:
        name: for messages.
        tree: expected folder structure, for messages.
        classes: class file.
        images: folder of the images, searched recursively.
        labels: folders of the labels; the first that exists is used. Labels mirror the images' subfolders.
        image_suffixes: image endings, case-insensitive; the rest of the name is shared by image and label.
        label_suffix: label ending.
        lists: files that list the images; the first that exists is used; none: all images in the folder. A line is a
            name without ending, or the paths of image and label.
        inside: subfolders in which the data may be below the given root.
        values: label value -> class or 255; None: classes are numbered from `first`.
        first: label value of the first class.
        ignored: label values that are ignored.
        colours: label colour -> class or 255, for RGB labels; None: labels hold class numbers.
    """

    name: str
    tree: str
    classes: Path
    images: str
    labels: tuple[str, ...]
    image_suffixes: tuple[str, ...] = SUFFIXES
    label_suffix: str = ".png"
    lists: tuple[str, ...] = ()
    inside: tuple[str, ...] = ()
    values: Mapping[int, int] | None = None
    first: int = 0
    ignored: tuple[int, ...] = (IGNORE,)
    colours: Mapping[tuple[int, int, int], int] | None = None


class LabelledImages(Dataset):
    """The images of a layout and their labels.

    Item `i` is `(tv_tensors.Image uint8 (3, H, W), tv_tensors.Mask uint8 (H, W))`, ignored pixels 255. `classes` are
    the names, `palette` is uint8 (K, 3), `items` the pairs of paths.

    Raises:
        FileNotFoundError: a folder or list is missing or has no images.
        DataError: at construction: an image without a label, or an invalid class file or list. On access: a file that
            `open_image` rejects, a wrong mode, a label value without a class, or different sizes of image and label.
    """

    ignore_index = IGNORE

    def __init__(self, root: str | Path, layout: Layout, *, transform: Callable[..., Any] | None = None) -> None:
        self.layout, self.transform = layout, transform
        self.root = self._root(Path(root).expanduser())
        self.classes, self.palette = read_classes(self.root / layout.classes)
        self.items = self._listed() if layout.lists else self._found()
        if own := next((image for image, label in self.items if _same(image, label)), None):
            raise DataError(
                f"{layout.name}: {own} would be its own label; set another label folder or ending (--data.options.labels, "
                f"--data.options.label_suffix). Expected {layout.tree}"
            )
        if missing := [pair for pair in self.items if not pair[1].is_file()]:
            more = f" ({len(missing)} images have none)" if len(missing) > 1 else ""
            raise DataError(
                f"{layout.name}: {missing[0][0]} has no label {missing[0][1]}{more}; "
                f"add the label or remove the image. Expected {layout.tree}"
            )
        self.values = dict(layout.values or {layout.first + k: k for k in range(len(self.classes))})
        known = {*range(len(self.classes)), IGNORE}
        if wrong := {v: k for v, k in self.values.items() if not 0 <= v <= 255 or k not in known}:
            value = min(wrong)
            raise DataError(
                f"{layout.name}: the label value {value} is mapped to the class {wrong[value]}; expected values 0 to 255 and "
                f"classes 0 to {len(self.classes) - 1}, the number {self.root / layout.classes} has, or 255 to ignore it"
            )
        if both := sorted(set(self.values) & set(layout.ignored)):
            raise DataError(
                f"{layout.name}: label value {both[0]} is both ignored and the class {self.classes[self.values[both[0]]]!r}; "
                "set --data.options.first to the label value of the first class, or another ignore"
            )
        self.known = np.isin(np.arange(256), [*self.values, *layout.ignored])
        self.table = np.array([self.values.get(value, IGNORE) for value in range(256)], np.uint8)
        self.codes = {_code(colour): number for colour, number in sorted((layout.colours or {}).items())}

    def _root(self, root: Path) -> Path:
        """`root`, or the folder in it that holds the data."""
        layout = self.layout
        begins = layout.images.split("/")[0]
        for inside in ("", *layout.inside):
            if (root / inside / begins).is_dir():
                return root / inside
        raise FileNotFoundError(
            f"{layout.name}: no folder {root / begins if root.is_dir() else root}; expected {layout.tree}. "
            "Set --data.root to that folder"
        )

    def _folders(self) -> tuple[Path, Path]:
        layout = self.layout
        images = self.root / layout.images
        choices = [self.root / labels for labels in layout.labels]
        labels = next((folder for folder in choices if folder.is_dir()), choices[0])
        for folder in (images, labels):
            if not folder.is_dir():
                raise FileNotFoundError(
                    f"{layout.name}: no folder {folder}; expected {layout.tree}. Set --data.root to the folder that has them"
                )
        return images, labels

    def _found(self) -> list[tuple[Path, Path]]:
        layout = self.layout
        images, labels = self._folders()
        items = []
        for path in image_files(images, layout.image_suffixes):
            suffix = next(s for s in layout.image_suffixes if path.name.lower().endswith(s.lower()))
            shared = str(path.relative_to(images))[: -len(suffix)]
            items.append((path, labels / (shared + layout.label_suffix)))
        # With labels among the images: exclude labels of other images.
        theirs = {label for image, label in items if label != image}
        items = [item for item in items if item[0] not in theirs]
        if not items:
            kinds = ", ".join(f"*{suffix}" for suffix in layout.image_suffixes)
            raise FileNotFoundError(f"{layout.name}: no images ({kinds}) in {images}; expected {layout.tree}")
        return items

    def _listed(self) -> list[tuple[Path, Path]]:
        layout = self.layout
        choices = [self.root / name for name in layout.lists]
        path = next((choice for choice in choices if choice.is_file()), None)
        if path is None:
            names = " or ".join(str(choice) for choice in choices)
            raise FileNotFoundError(f"{layout.name}: no list {names}; expected {layout.tree}")
        items = []
        for number, line in enumerate(_text(path).splitlines(), 1):
            words = line.split()
            if len(words) == 1:
                images, labels = self._folders()
                image = self._inside(images, words[0] + layout.image_suffixes[0], path, number)
                items.append((image, self._inside(labels, words[0] + layout.label_suffix, path, number)))
            elif len(words) == 2 and all(Path(word).suffix for word in words):
                image, label = (self._inside(self.root, word.lstrip("/"), path, number) for word in words)
                items.append((image, label))
            elif words:
                raise DataError(
                    f"{layout.name}: line {number} of {path} is {line!r}; expected a name, or the paths of image and label"
                )
        if not items:
            raise DataError(f"{layout.name}: {path} lists no images")
        return items

    def _inside(self, folder: Path, name: str, path: Path, number: int) -> Path:
        """`folder / name`. Lists are downloaded: they must not lead outside the data set."""
        relative = os.path.normpath(name)
        if os.path.isabs(relative) or relative.split(os.sep)[0] == "..":
            raise DataError(f"{self.layout.name}: line {number} of {path} leaves the data set: {name!r}; remove it")
        return folder / relative

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
        try:
            image, label = self._load(*self.items[index])
        except DataError as error:
            raise DataError(f"{self.layout.name}: {error}") from error.__cause__
        item = tv_tensors.Image(torch.from_numpy(image).permute(2, 0, 1)), tv_tensors.Mask(torch.from_numpy(label))
        return item if self.transform is None else self.transform(*item)

    def image(self, index: int) -> tv_tensors.Image:
        """The image of an item, without its label and before `transform`."""
        return rgb(self.items[index][0])

    def _load(self, image_path: Path, label_path: Path) -> tuple[np.ndarray, np.ndarray]:
        image = open_photo(image_path)
        if self.codes:
            label = open_mode(
                label_path, ("RGB",), f"expected colours; is it a label of another kind? {self.layout.tree}"
            )
        else:
            says = "convert it to 8-bit class numbers, one channel (an RGB label is a colour map)"
            label = open_mode(label_path, ("L", "P"), says)
        if image.size != label.size:
            raise DataError(
                f"{image_path} is {image.width}x{image.height} but its label {label_path} is "
                f"{label.width}x{label.height}; they must be the same size"
                + ("; is one of them turned by its EXIF orientation?" if image.size == label.size[::-1] else "")
            )
        numbers = (
            self._from_colours(np.array(label), label_path) if self.codes else self._from_values(label, label_path)
        )
        return np.array(image), numbers

    def _from_colours(self, label: np.ndarray, path: Path) -> np.ndarray:
        codes, found = np.array(list(self.codes)), _code(label.astype(np.int64).transpose(2, 0, 1))
        places = np.searchsorted(codes, found).clip(max=len(codes) - 1)
        wrong = np.argwhere(codes[places] != found)
        if len(wrong):
            y, x = wrong[0]
            raise DataError(
                f"{path} has the colour {tuple(label[y, x].tolist())} at row {y}, column {x}, which no class has; "
                "was it resized or compressed lossily?"
            )
        return np.array(list(self.codes.values()), np.uint8)[places]

    def _from_values(self, label: Any, path: Path) -> np.ndarray:
        numbers = np.array(label)
        wrong = [value for value, count in enumerate(label.histogram()) if count and not self.known[value]]
        if wrong:
            y, x = np.argwhere(numbers == wrong[0])[0]
            raise DataError(f"{path} holds the value {wrong[0]} at row {y}, column {x}; {self._expected()}")
        return self.table[numbers]

    def _expected(self) -> str:
        return (
            f"expected {_spans(sorted(self.values))} for the {len(self.classes)} classes and "
            f"{_spans(sorted(self.layout.ignored)) or 'nothing'} for ignored pixels. Is the number of classes right, or is it "
            "a label of another data set or kind?"
        )


def _same(image: Path, label: Path) -> bool:
    """Whether both are the same file, possibly through linked folders."""
    return image == label or (image.name == label.name and image.parent.resolve() == label.parent.resolve())


CLASS = re.compile(r"(.+?)(?:[\s,;]+(\d+)[\s,;]+(\d+)[\s,;]+(\d+))?")
HEADER = re.compile(r"\w+\s*[,;\t]\s*r(ed)?\s*[,;\t]\s*g(reen)?\s*[,;\t]\s*b(lue)?", re.IGNORECASE)


def _is_header(first: str, others: list[str]) -> bool:
    """Whether the first line is a table header: no digits, above columns of numbers."""
    count = first.count(",")
    numbers = all(line.count(",") == count and re.search(r"(^|,)\s*\d+\s*(,|$)", line) for line in others)
    return count > 0 and not re.search(r"\d", first) and numbers


def _code(rgb: Any) -> Any:
    """One integer from red, green and blue."""
    red, green, blue = rgb
    return (red * 256 + green) * 256 + blue


def _spans(values: Any) -> str:
    """[0, 1, 2, 5] -> "0 to 2, 5"."""
    spans: list[list[int]] = []
    for value in values:
        if spans and value == spans[-1][-1] + 1:
            spans[-1] = [spans[-1][0], value]
        else:
            spans.append([value])
    return ", ".join(" to ".join(map(str, span)) for span in spans)


def read_classes(path: Path) -> tuple[tuple[str, ...], np.ndarray]:
    """Names and palette, uint8 (K, 3), of a class file. `DataError` names the file and the line."""
    if not path.is_file():
        raise FileNotFoundError(f"no class file {path}; write one with one class per line, in order of class number")
    names: list[str] = []
    palette = colour_map(256)
    lines = [(number, line.strip()) for number, line in enumerate(_text(path).splitlines(), 1)]
    lines = [(number, line) for number, line in lines if line and not line.startswith("#")]
    if lines and HEADER.fullmatch(lines[0][1]):
        del lines[0]
    elif len(lines) > 1 and _is_header(lines[0][1], [line for _, line in lines[1:]]):
        raise DataError(
            f"line {lines[0][0]} of {path} is the header of a table, {lines[0][1]!r}; expected a class a line: its name, or "
            "name,r,g,b"
        )
    for number, line in lines:
        name, *colour = CLASS.fullmatch(line).groups()  # type: ignore[union-attr]
        if name in names:
            raise DataError(f"line {number} of {path} repeats the class {name!r}; give it a name of its own")
        if len(names) == IGNORE:
            raise DataError(f"{path} has more than {IGNORE} classes, which 8-bit labels cannot hold")
        if colour[0] is not None:
            values = [int(v) for v in colour]
            if max(values) > 255:
                raise DataError(f"line {number} of {path} has the colour {values}; expected three numbers up to 255")
            palette[len(names)] = values
        names.append(name)
    if not names:
        raise DataError(f"{path} names no class; write one class per line")
    return tuple(names), palette[: len(names)].copy()


def colour_map(count: int) -> np.ndarray:
    """VOC's colours, uint8 (count, 3): bit 3i + c of the class number is bit 7 − i of its channel c."""
    numbers, colours = np.arange(count), np.zeros((count, 3), np.uint8)
    for bit in range(8):
        for channel in range(3):
            colours[:, channel] |= ((numbers >> (3 * bit + channel)) & 1).astype(np.uint8) << (7 - bit)
    return colours


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")  # Windows editors write a byte-order mark
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as text ({error}); save it as UTF-8") from error

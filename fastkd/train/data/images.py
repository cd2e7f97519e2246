"""Files of others: which of a folder are images, and images read in full or refused with a message that names the file.

Training, evaluation and prediction read a photo by `open_photo`, so all of them see the same pixels.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torchvision import tv_tensors

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
FORMATS = ("PNG", "JPEG", "BMP", "WEBP")  # Pillow's other decoders are not for files of unknown origin
MODES = ("RGB", "L", "LA", "RGBA", "P", "PA", "CMYK", "1")  # what Pillow turns into RGB without a guess
LIMIT = "FASTKD_MAX_IMAGE_PIXELS"  # environment variable: what PIL.Image.MAX_IMAGE_PIXELS is raised to, also in loader processes


class DataError(ValueError):
    """A data file that cannot be used. The message names the file, what was found and what to do."""

    def __init__(self, message: str) -> None:
        # What a loader process raises arrives as the text of its traceback, which ends in the message.
        super().__init__(message.rsplit("DataError: ", 1)[-1].strip())


def image_files(folder: Path, suffixes: Sequence[str] = SUFFIXES, *, deep: bool = True) -> list[Path]:
    """The files of a folder that end in one of the suffixes, in any case, sorted; `deep`: those of its folders too.

    Links are followed. Names that begin with a dot are no data: the copies and notes of editors and file managers.
    DataError: a link to something that is not there.
    """
    endings = tuple(suffix.lower() for suffix in suffixes)
    found = []
    for path in _visible(folder, deep, frozenset()):
        if path.name.lower().endswith(endings) and path.is_file():
            found.append(path)
    return sorted(found)


def _visible(folder: Path, deep: bool, above: frozenset[Path]) -> Iterator[Path]:
    real = folder.resolve()
    if real in above:  # a link to a folder it lies in
        return
    for path in folder.iterdir():
        if path.name.startswith("."):
            continue
        if path.is_symlink() and not path.exists():
            raise DataError(f"{path} is a link to {os.readlink(path)}, which is not there; mend or remove the link")
        if not path.is_dir():
            yield path
        elif deep:
            yield from _visible(path, deep, above | {real})


def open_photo(path: Path) -> Image.Image:
    """The picture in RGB, in its EXIF orientation. DataError: as `open_image`, or of a mode that is not converted to RGB."""
    return open_mode(path, MODES, "convert it to 8-bit RGB").convert("RGB")


def open_image(path: Path) -> Image.Image:
    """The decoded picture, in its stored mode and its EXIF orientation.

    `DataError`: no such file, not a PNG, JPEG, BMP or WebP, empty, truncated, or of more pixels than
    `PIL.Image.MAX_IMAGE_PIXELS` (89 million), which its header claims in a few bytes and which is refused before decoding.
    """
    if limit := os.environ.get(LIMIT):
        if not limit.isdecimal():
            raise ValueError(f"{LIMIT} must be a number of pixels, got {limit!r}")
        Image.MAX_IMAGE_PIXELS = int(limit)
    try:
        with warnings.catch_warnings():
            # Pillow only warns between one and two times the limit.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=FORMATS) as picture:
                picture.load()  # `verify` would not decode, and so miss most damage
                return upright(picture)
    except FileNotFoundError:
        raise DataError(f"there is no file {path} (any more); restore it or start again") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        pixels = re.search(r"\((\d+) pixels\)", str(error))
        allowed = f"; or, if you trust it, set {LIMIT}={pixels[1]} in the environment" if pixels else ""
        raise DataError(f"{path} is too large ({str(error).rstrip('.')}): make it smaller{allowed}") from None
    # Pillow reports damage as OSError, SyntaxError (broken PNG chunks) or ValueError, a wrong size in a header as the others.
    except (OSError, SyntaxError, ValueError, EOFError, OverflowError, MemoryError) as error:
        raise DataError(f"{path} cannot be read ({error}); replace the damaged file") from error


def open_mode(path: Path, modes: Sequence[str], remedy: str) -> Image.Image:
    """`open_image`, if its mode is one of `modes`; else a `DataError` that ends in `remedy`."""
    picture = open_image(path)
    if picture.mode not in modes:
        raise DataError(f"{path} has mode {picture.mode}, expected {' or '.join(modes)}; {remedy}")
    return picture


def rgb(path: Path) -> tv_tensors.Image:
    """`open_photo` as uint8 (3, H, W)."""
    return tv_tensors.Image(torch.from_numpy(np.array(open_photo(path))).permute(2, 0, 1))


def upright(picture: Image.Image) -> Image.Image:
    """The picture in its EXIF orientation."""
    try:
        return ImageOps.exif_transpose(picture) if picture.getexif().get(ExifTags.Base.Orientation, 1) != 1 else picture
    except Exception:  # damaged metadata fails in many ways while the pixels are sound
        return picture

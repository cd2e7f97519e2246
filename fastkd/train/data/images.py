"""Finding image files, and reading untrusted images completely or rejecting them with a message that names the file.

Training, evaluation and prediction all read photos through `open_photo`, so they see the same pixels.
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
FORMATS = ("PNG", "JPEG", "BMP", "WEBP")  # no other Pillow decoders on untrusted files
MODES = ("RGB", "L", "LA", "RGBA", "P", "PA", "CMYK", "1")  # modes with an unambiguous conversion to RGB
LIMIT = "FASTKD_MAX_IMAGE_PIXELS"  # environment variable: raises PIL.Image.MAX_IMAGE_PIXELS, in loader processes too


class DataError(ValueError):
    """A data file that cannot be used. The message names the file, the problem and the remedy."""

    def __init__(self, message: str) -> None:
        # Exceptions of a loader process arrive as traceback text that ends in the message.
        super().__init__(message.rsplit("DataError: ", 1)[-1].strip())


def image_files(folder: Path, suffixes: Sequence[str] = SUFFIXES, *, deep: bool = True) -> list[Path]:
    """Sorted files of a folder that end in one of the suffixes, case-insensitive; `deep`: recursively.

    Links are followed. Names with a leading dot are skipped: backups and metadata of editors and file managers. Raises
    DataError for a dangling link.
    """
    endings = tuple(suffix.lower() for suffix in suffixes)
    found = []
    for path in _visible(folder, deep, frozenset()):
        if path.name.lower().endswith(endings) and path.is_file():
            found.append(path)
    return sorted(found)


def _visible(folder: Path, deep: bool, above: frozenset[Path]) -> Iterator[Path]:
    real = folder.resolve()
    if real in above:  # a link to an enclosing folder
        return
    for path in folder.iterdir():
        if path.name.startswith("."):
            continue
        if path.is_symlink() and not path.exists():
            raise DataError(f"{path} is a link to {os.readlink(path)}, which is not there; fix or remove the link")
        if not path.is_dir():
            yield path
        elif deep:
            yield from _visible(path, deep, above | {real})


def open_photo(path: Path) -> Image.Image:
    """The picture in RGB and EXIF orientation. DataError: as `open_image`, or for modes without a conversion to RGB."""
    return open_mode(path, MODES, "convert it to 8-bit RGB").convert("RGB")


def open_image(path: Path) -> Image.Image:
    """The decoded picture, in its stored mode and EXIF orientation.

    Raises DataError if the file is missing, empty, truncated, not PNG, JPEG, BMP or WebP, or has more pixels than
    `PIL.Image.MAX_IMAGE_PIXELS` (89 million); the last is checked in the header, before decoding.
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
                picture.load()  # `verify` does not decode and misses most damage
                return upright(picture)
    except FileNotFoundError:
        raise DataError(f"there is no file {path}; restore it or start again") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        pixels = re.search(r"\((\d+) pixels\)", str(error))
        allowed = f"; or, if you trust it, set {LIMIT}={pixels[1]} in the environment" if pixels else ""
        raise DataError(f"{path} is too large ({str(error).rstrip('.')}): make it smaller{allowed}") from None
    # Pillow raises OSError, SyntaxError (broken PNG chunks), ValueError or others for damaged files.
    except (OSError, SyntaxError, ValueError, EOFError, OverflowError, MemoryError) as error:
        raise DataError(f"{path} cannot be read ({error}); replace the damaged file") from error


def open_mode(path: Path, modes: Sequence[str], remedy: str) -> Image.Image:
    """`open_image` if the mode is one of `modes`; otherwise a `DataError` that ends in `remedy`."""
    picture = open_image(path)
    if picture.mode not in modes:
        raise DataError(f"{path} has mode {picture.mode}, expected {' or '.join(modes)}; {remedy}")
    return picture


def rgb(path: Path) -> tv_tensors.Image:
    """`open_photo` as uint8 (3, H, W)."""
    return tv_tensors.Image(torch.from_numpy(np.array(open_photo(path))).permute(2, 0, 1))


def upright(picture: Image.Image) -> Image.Image:
    """Applies the EXIF orientation."""
    try:
        return ImageOps.exif_transpose(picture) if picture.getexif().get(ExifTags.Base.Orientation, 1) != 1 else picture
    except Exception:  # damaged metadata raises many types; the pixels may still be intact
        return picture

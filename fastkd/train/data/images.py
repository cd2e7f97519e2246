"""Image files of others: read in full or refused with a message that names the file, never half, never by an exotic decoder."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torchvision import tv_tensors

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
FORMATS = ("PNG", "JPEG", "BMP", "WEBP")  # Pillow's other decoders are not for files of unknown origin


class DataError(ValueError):
    """A data file that cannot be used. The message names the file, what was found and what to do."""

    def __init__(self, message: str) -> None:
        # What a loader process raises arrives as the text of its traceback, which ends in the message.
        super().__init__(message.rsplit("DataError: ", 1)[-1].strip())


def open_image(path: Path) -> Image.Image:
    """The decoded picture, in the mode it is stored in.

    `DataError`: no such file, not a PNG, JPEG, BMP or WebP, empty, truncated, or of more pixels than
    `PIL.Image.MAX_IMAGE_PIXELS` (89 million), which its header claims in a few bytes and which is refused before decoding.
    """
    try:
        with warnings.catch_warnings():
            # Pillow only warns between one and two times the limit.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=FORMATS) as picture:
                picture.load()  # `verify` would not decode, and so miss most damage
                return picture
    except FileNotFoundError:
        raise DataError(f"there is no file {path} (any more); restore it or start again") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(
            f"{path} is too large ({error}); make it smaller, or raise PIL.Image.MAX_IMAGE_PIXELS"
        ) from None
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
    """An RGB or grey image as uint8 (3, H, W)."""
    picture = open_mode(path, ("RGB", "L"), "convert it to 8-bit RGB").convert("RGB")
    return tv_tensors.Image(torch.from_numpy(np.array(picture)).permute(2, 0, 1))


def upright(picture: Image.Image) -> Image.Image:
    """The picture turned as its camera says (EXIF orientation)."""
    try:
        return ImageOps.exif_transpose(picture)
    except Exception:  # damaged metadata fails in many ways, and says nothing about the pixels
        return picture

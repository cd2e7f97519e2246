"""Pictures from tensors: coloured labels, overlays, heat maps, and rows of titled panels. NumPy and Pillow only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

IGNORED = (0, 0, 0)
INK, FAINT, PAPER = (32, 36, 42), (104, 110, 118), (255, 255, 255)
# Dark blue to cream by even steps of lightness (CIELAB L* 8 to 95), so that equal steps in the value look equal.
HEAT = np.array(
    [
        (10, 14, 48), (38, 24, 90), (80, 32, 118), (122, 40, 124), (166, 50, 114), (204, 68, 96), (232, 98, 76),
        (246, 138, 66), (250, 180, 84), (250, 220, 130), (252, 248, 206),
    ],
    dtype=np.float64,
)  # fmt: skip


def as_array(value: Any) -> np.ndarray:
    """A tensor, array or Pillow picture as an array on the CPU."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        value = value.float() if value.is_floating_point() else value
    return np.asarray(value)


def as_image(image: Any) -> np.ndarray:
    """Any picture as uint8 (H, W, 3): (3, H, W), (H, W, 3) or (H, W); floats are taken to be in [0, 1]."""
    if isinstance(image, Image.Image):
        return np.asarray(image.convert("RGB"))
    array = as_array(image)
    if array.ndim == 3 and array.shape[0] in (1, 3) and array.shape[-1] not in (1, 3):
        array = array.transpose(1, 2, 0)
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.shape[-1] not in (1, 3):
        raise ValueError(f"an image is (3, H, W), (H, W, 3) or (H, W), got {tuple(as_array(image).shape)}")
    if array.dtype != np.uint8:
        scale = 255 if array.dtype == bool or np.issubdtype(array.dtype, np.floating) else 1
        array = np.clip(np.nan_to_num(array.astype(np.float64)) * scale + 0.5 * (scale == 255), 0, 255).astype(np.uint8)
    return np.broadcast_to(array, (*array.shape[:2], 3))


def colourise(label: Any, palette: Any, ignore_index: int = 255) -> np.ndarray:
    """A label map (H, W) as uint8 (H, W, 3); ignored pixels black. `ValueError`: another value outside the palette."""
    label, palette = as_array(label), as_array(palette)
    if label.ndim != 2:
        raise ValueError(f"a label map is (H, W), got {label.shape}")
    ignored = label == ignore_index
    inside = np.where(ignored, 0, label).astype(np.int64)
    if inside.size and (inside.min() < 0 or inside.max() >= len(palette)):
        bad = inside.min() if inside.min() < 0 else inside.max()
        raise ValueError(
            f"the label map holds {bad}, the palette has {len(palette)} colours; ignore_index is {ignore_index}"
        )
    picture = palette[inside].astype(np.uint8)
    picture[ignored] = IGNORED
    return picture


def overlay(image: Any, label: Any, palette: Any, alpha: float = 0.55, ignore_index: int = 255) -> np.ndarray:
    """The coloured label over the image, uint8 (H, W, 3); ignored pixels show the image."""
    base, label = as_image(image), as_array(label)
    if base.shape[:2] != label.shape:
        raise ValueError(f"image {base.shape[:2]} and label {label.shape} must have the same height and width")
    weight = np.where(label == ignore_index, 0.0, alpha)[..., None]
    mixed = base * (1 - weight) + colourise(label, palette, ignore_index) * weight
    return (mixed + 0.5).astype(np.uint8)


def heatmap(values: Any) -> np.ndarray:
    """A map (H, W) of values in [0, 1] (or bool) as uint8 (H, W, 3), dark blue 0 to cream 1; NaN is grey."""
    values = as_array(values).astype(np.float64)
    if values.ndim != 2:
        raise ValueError(f"a heat map is (H, W), got {values.shape}")
    at = np.clip(np.nan_to_num(values), 0, 1) * (len(HEAT) - 1)
    low = np.minimum(at.astype(int), len(HEAT) - 2)
    part = (at - low)[..., None]
    picture = HEAT[low] * (1 - part) + HEAT[low + 1] * part
    picture[np.isnan(values)] = 128
    return (picture + 0.5).astype(np.uint8)


def _font(size: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)  # the font inside Pillow: the same letters everywhere


def _fit(draw: ImageDraw.ImageDraw, text: str, font: Any, width: int) -> str:
    """`text`, cut with an ellipsis if it is wider than `width` pixels."""
    if draw.textlength(text, font=font) <= width:
        return text
    while text and draw.textlength(text + "…", font=font) > width:
        text = text[:-1]
    return text + "…"


def panel(
    titles: Sequence[str],
    rows: Sequence[Sequence[Any]],
    *,
    width: int = 256,
    row_titles: Sequence[str] | None = None,
    legend: Sequence[str] | None = None,
    palette: Any = None,
) -> Image.Image:
    """A grid of pictures, `titles` over its columns and `row_titles` before its rows.

    Every picture is anything `as_image` takes, or None for an empty place; it is drawn `width` pixels wide, label maps
    and other enlargements without smoothing. `legend`: class names, shown under the grid with the colours of `palette`.
    """
    if not titles or any(len(row) != len(titles) for row in rows):
        raise ValueError(
            f"every row needs {len(titles)} pictures (one a title), got rows of {[len(row) for row in rows]}"
        )
    if row_titles is not None and len(row_titles) != len(rows):
        raise ValueError(f"{len(rows)} rows need as many row titles, got {len(row_titles)}")
    if legend is not None and (palette is None or len(palette) < len(legend)):
        raise ValueError("a legend needs a palette with a colour for each of its names")
    gap, margin = 6, 10
    size = max(12, min(16, width // 15))
    font, small = _font(size), _font(max(11, size - 2))
    tiles = [[None if tile is None else _tile(tile, width) for tile in row] for row in rows]
    heights = [max((t.height for t in row if t is not None), default=width // 2) for row in tiles]

    probe = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    left = margin
    if row_titles:
        left += 10 + int(min(160, max(probe.textlength(t, font=small) for t in row_titles)))
    head = size + 12
    total = left + len(titles) * (width + gap) - gap + margin
    entries: list[tuple[int, int, int]] = []  # x, y, class
    x, y, line = left, 0, size + 10
    for number, name in enumerate(legend or ()):
        step = int(probe.textlength(name, font=small)) + size + 22
        if x + step > total - margin and x > left:
            x, y = left, y + line
        entries.append((x, y, number))
        x += step
    foot = y + line + 4 if legend else 0
    sheet = Image.new("RGB", (total, margin + head + sum(heights) + gap * len(heights) + foot + margin), PAPER)
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(titles):
        draw.text((left + column * (width + gap), margin), _fit(draw, title, font, width), fill=INK, font=font)
    top = margin + head
    for number, (row, height) in enumerate(zip(tiles, heights, strict=True)):
        if row_titles:
            text = _fit(draw, row_titles[number], small, left - margin - 8)
            draw.text((margin, top + height // 2 - size // 2), text, fill=FAINT, font=small)
        for column, tile in enumerate(row):
            at = (left + column * (width + gap), top)
            if tile is None:
                draw.rectangle((*at, at[0] + width - 1, top + height - 1), fill=(244, 245, 247))
                draw.text((at[0] + width // 2, top + height // 2), "not available", fill=FAINT, font=small, anchor="mm")
            else:
                sheet.paste(tile, at)
        top += height + gap
    for x, y, number in entries:
        colour = tuple(int(v) for v in as_array(palette)[number])
        draw.rounded_rectangle((x, top + y + 5, x + size, top + y + 5 + size - 2), 3, fill=colour)
        draw.text((x + size + 7, top + y + 4), legend[number], fill=INK, font=small)  # type: ignore[index]
    return sheet


def _tile(image: Any, width: int) -> Image.Image:
    picture = Image.fromarray(np.ascontiguousarray(as_image(image)))
    height = max(1, round(picture.height * width / picture.width))
    shrink = width < picture.width
    return picture.resize((width, height), Image.Resampling.LANCZOS if shrink else Image.Resampling.NEAREST)

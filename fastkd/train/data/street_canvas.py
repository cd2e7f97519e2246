"""The canvas of the street scenes: a pinhole camera over a ground plane, painted back to front.

Light is linear, float32. World axes in metres: x right, y up, z forward; the camera is at (0, camera_height, 0) and
looks along z. A column has slope a = x / z, a row has slope b = (camera_height - y) / z.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

FLOAT, IGNORE = np.float32, 255
TILE = 512  # side of the noise tiles; a power of two, so that wrapping is a bit mask
Shape = Callable[[np.ndarray, np.ndarray], np.ndarray]  # signed distance of (x, y) in metres, negative inside


@cache
def rgb(*colour: float) -> np.ndarray:
    """A display colour, 0 to 255, as linear light (gamma 2), shape (3, 1, 1)."""
    return (np.array(colour, dtype=FLOAT).reshape(3, 1, 1) / 255) ** 2


@cache
def noise_tile(falloff: float) -> np.ndarray:
    """A (TILE, TILE) tile of periodic noise in [0, 1] with amplitude ~ frequency^-falloff: 0.5 grain, 1.5 cloud."""
    white = np.random.Generator(np.random.PCG64(int(falloff * 1000))).standard_normal((TILE, TILE))
    radius = np.hypot(np.fft.fftfreq(TILE)[:, None], np.fft.rfftfreq(TILE)[None, :])
    radius[0, 0] = np.inf
    field = np.fft.irfft2(np.fft.rfft2(white) * radius**-falloff, s=(TILE, TILE))
    return np.clip(field / (5 * field.std()) + 0.5, 0, 1).astype(FLOAT)


def noise(falloff: float, row: np.ndarray, column: np.ndarray) -> np.ndarray:
    """The noise tile sampled at (row, column), in texels; shapes broadcast."""
    return noise_tile(falloff)[row.astype(np.int32) & (TILE - 1), column.astype(np.int32) & (TILE - 1)]


def clip01(value: Any) -> Any:
    return np.minimum(np.maximum(value, 0), 1)  # a third of np.clip's time


def cover(value: np.ndarray, low: float, high: float, footprint: Any) -> np.ndarray:
    """Antialiased interval: the share of a pixel of width `footprint` at `value` that lies in [low, high]."""
    half = footprint * 0.5
    return clip01((np.minimum(value + half, high) - np.maximum(value - half, low)) / footprint)


def pulse(value: np.ndarray, low: float, high: float, footprint: Any) -> np.ndarray:
    """`cover` of [low, high] repeated with period 1; converges to the mean far away, so it never aliases."""
    ends = (
        np.floor(t) * (high - low) + np.clip(t % 1 - low, 0, high - low)
        for t in (value + footprint / 2, value - footprint / 2)
    )
    return (next(ends) - next(ends)) / footprint


def disc(cx: float, cy: float, rx: float, ry: float | None = None) -> Shape:
    ry = rx if ry is None else ry
    return lambda x, y: (np.sqrt(((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2) - 1) * min(rx, ry)


def ring(cx: float, cy: float, radius: float, half: float) -> Shape:
    """A circle outline of half width `half`."""
    return lambda x, y: np.abs(np.sqrt((x - cx) ** 2 + (y - cy) ** 2) - radius) - half


def box(x0: float, x1: float, y0: float, y1: float) -> Shape:
    return lambda x, y: np.maximum(np.abs(x - (x0 + x1) / 2) - (x1 - x0) / 2, np.abs(y - (y0 + y1) / 2) - (y1 - y0) / 2)


def bar(x0: float, y0: float, x1: float, y1: float, radius: float) -> Shape:
    """A line from (x0, y0) to (x1, y1) with round ends."""
    dx, dy = x1 - x0, y1 - y0

    def distance(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        t = clip01(((x - x0) * dx + (y - y0) * dy) / (dx * dx + dy * dy))
        return np.sqrt((x - x0 - t * dx) ** 2 + (y - y0 - t * dy) ** 2) - radius

    return distance


def taper(y0: float, y1: float, half0: float, half1: float) -> Shape:
    """A trapezoid around x = 0 with half widths `half0` at y0 and `half1` at y1 (0: a triangle)."""
    slope = (half1 - half0) / (y1 - y0)
    edge = np.hypot(1, slope)
    return lambda x, y: np.maximum(
        (np.abs(x) - half0 - slope * (y - y0)) / edge, np.abs(y - (y0 + y1) / 2) - (y1 - y0) / 2
    )


def union(*shapes: Shape) -> Shape:
    return lambda x, y: np.minimum.reduce([shape(x, y) for shape in shapes])


@dataclass
class Plane:
    """The pixels of an upright rectangle: a board facing the camera, or a wall along the street.

    x (1, w): metres along it; y (h, 1) or (h, w): metres above the ground; z: depth; dx, dy: pixel size on it. Depth
    and pixel size are scalars for a board and (w,) for a wall.
    """

    canvas: Canvas
    rows: slice
    columns: slice
    x: np.ndarray
    y: np.ndarray
    z: Any
    dx: Any
    dy: Any

    def paint(self, colour: np.ndarray, alpha: np.ndarray, label: int | None = None) -> None:
        self.canvas.paint(self.rows, self.columns, colour, alpha, label, self.z)

    def fill(self, shape: Shape, colour: np.ndarray, label: int | None = None) -> None:
        """Paints a shape on a board; without a label the pixels keep theirs."""
        self.paint(colour, clip01(0.5 - shape(self.x, self.y) / self.dy), label)

    def thin(self, radius: float) -> float:
        """`radius`, widened to cover a pixel while the object is near enough to be labelled by hand."""
        return max(radius, 0.52 * self.dy) if self.z < 50 else radius


class Canvas:
    """`image` (3, H, W) float32 linear light, `label` (H, W) uint8, and the camera."""

    def __init__(
        self, size: tuple[int, int], focal: float, centre: tuple[float, float], camera_height: float,
        haze: np.ndarray, visibility: float,
    ) -> None:  # fmt: skip
        (self.height, self.width), self.focal, self.camera_height = size, focal, camera_height
        (self.cx, self.cy), self.haze, self.visibility = centre, haze, visibility
        self.image = np.zeros((3, *size), dtype=FLOAT)
        self.label = np.full(size, IGNORE, dtype=np.uint8)
        self.a = ((np.arange(self.width, dtype=FLOAT) + 0.5) - self.cx) / focal
        self.b = ((np.arange(self.height, dtype=FLOAT) + 0.5) - self.cy) / focal

    def fog(self, colour: np.ndarray, z: Any) -> np.ndarray:
        """`colour` through the haze at depth z."""
        return colour + (1 - np.exp(np.asarray(z, FLOAT) * (-1 / self.visibility))) * (self.haze - colour)

    def paint(self, rows: slice, columns: slice, colour: Any, alpha: Any, label: int | None, z: Any) -> None:
        """Blends `colour` (3, 1, 1) or (3, h, w) at depth z with `alpha` (h, w); sets the label where alpha > 1/2."""
        view = self.image[:, rows, columns]
        view += (self.fog(colour, z) - view) * alpha
        if label is not None:
            self.label[rows, columns][alpha > 0.5] = label

    def board(self, x: float, z: float, half: float, top: float) -> Plane | None:
        """The board of half width `half` and height `top` at (x, z); None if outside the picture."""
        scale = self.focal / z
        foot, middle = self.cy + self.camera_height * scale, self.cx + x * scale
        rows = _span(foot - top * scale - 1, foot + 1, self.height)
        columns = _span(middle - half * scale - 1, middle + half * scale + 1, self.width)
        if rows is None or columns is None:
            return None
        across, up = self.a[columns] * z - x, self.camera_height - self.b[rows] * z
        return Plane(self, rows, columns, across[None], up[:, None], z, 1 / scale, 1 / scale)

    def wall(self, x: float, slope: float, z0: float, z1: float, top: float) -> Plane | None:
        """The plane through (x, z0) with dx/dz = `slope` up to depth z1; None if outside the picture or edge-on."""
        near, offset = max(z0, 0.7), x - slope * z0  # the plane is x = offset + slope z
        if z1 <= near or abs(offset) < 1e-3:
            return None
        left, right = sorted(self.cx + self.focal * (offset / z + slope) for z in (near, z1))
        columns = _span(round(left), round(right), self.width)  # pixels whose centre is on the wall
        if columns is None:
            return None
        z = np.minimum(np.maximum(offset / (self.a[columns] - slope), near), z1)
        heights = [self.cy + self.focal * (self.camera_height - y) / d for y in (top, 0) for d in (z.min(), z.max())]
        rows = _span(min(heights) - 1, max(heights) + 1, self.height)
        if rows is None:
            return None
        y = self.camera_height - self.b[rows][:, None] * z
        return Plane(self, rows, columns, (z - z0)[None], y, z, z * z / (abs(offset) * self.focal), z / self.focal)


def _span(low: float, high: float, size: int) -> slice | None:
    """The pixels that overlap [low, high], clipped to the picture; None if there are none."""
    first, last = max(int(np.floor(low)), 0), min(int(np.ceil(high)), size)
    return slice(first, last) if first < last else None

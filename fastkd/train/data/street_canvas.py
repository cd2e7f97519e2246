"""The canvas of the street scenes: a pinhole camera over a ground plane, painted back to front.

Light is linear, float32. World axes in metres: x right, y up, z forward; the camera is at (0, camera_height, 0) and
looks along z. A column has slope a = x / z, a row has slope b = (camera_height - y) / z.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache, reduce
from random import Random
from typing import Any

import numpy as np

FLOAT, IGNORE = np.float32, 255
TILE = 512  # side of the noise tiles; a power of two, so that wrapping is a bit mask


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


def mix(under: Any, over: Any, share: Any) -> Any:
    """`over` painted on `under` with opacity `share`."""
    return under + share * (over - under)


def cover(value: np.ndarray, low: float, high: float, footprint: Any) -> np.ndarray:
    """Antialiased interval: the share of a pixel of width `footprint` at `value` that lies in [low, high]."""
    half = footprint * 0.5
    return clip01((np.minimum(value + half, high) - np.maximum(value - half, low)) / footprint)


def pulse(value: np.ndarray, low: float, high: float, footprint: Any) -> np.ndarray:
    """`cover` of [low, high] repeated with period 1; converges to the mean far away, so it never aliases."""
    half, width = footprint / 2, high - low
    start, end = (np.floor(t) * width + np.clip(t % 1 - low, 0, width) for t in (value - half, value + half))
    return (end - start) / footprint


@dataclass
class Plane:
    """The pixels of an upright rectangle: a board facing the camera, or a wall along the street.

    window: its index in image and label; x (1, w): metres along it; y (h, 1) or (h, w): metres above the ground; z:
    depth; dx, dy: pixel size on it. Depth and pixel size are scalars for a board and (w,) for a wall. A shape on a board
    is the (h, w) signed distance of its pixels in metres, negative inside.
    """

    canvas: Canvas
    window: Any
    x: np.ndarray
    y: np.ndarray
    z: Any
    dx: Any
    dy: Any

    def paint(self, colour: np.ndarray, alpha: np.ndarray, label: int | None = None) -> None:
        self.canvas.paint(colour, alpha, label, self.window, self.z)

    def fill(self, colour: np.ndarray, label: int | None, *shapes: np.ndarray) -> None:
        """Paints the union of shapes on a board; without a label the pixels keep theirs."""
        self.paint(colour, clip01(0.5 - reduce(np.minimum, shapes) / self.dy), label)

    def band(self, low: float, high: Any) -> np.ndarray:
        """Antialiased share of each pixel that is between two heights."""
        return clip01((high - self.y) / self.dy + 0.5) * clip01((self.y - low) / self.dy + 0.5)

    def thin(self, radius: float) -> float:
        """`radius`, widened to cover a pixel while the object is near enough to be labelled by hand."""
        return max(radius, 0.52 * self.dy) if self.z < 50 else radius

    def disc(self, cx: float, cy: float, rx: float, ry: float | None = None) -> np.ndarray:
        ry = rx if ry is None else ry
        return (np.sqrt(((self.x - cx) / rx) ** 2 + ((self.y - cy) / ry) ** 2) - 1) * min(rx, ry)

    def ring(self, cx: float, cy: float, radius: float, half: float) -> np.ndarray:
        """A circle outline of half width `half`."""
        return np.abs(np.sqrt((self.x - cx) ** 2 + (self.y - cy) ** 2) - radius) - half

    def box(self, x0: float, x1: float, y0: float, y1: float) -> np.ndarray:
        across, up = np.abs(self.x - (x0 + x1) / 2), np.abs(self.y - (y0 + y1) / 2)
        return np.maximum(across - (x1 - x0) / 2, up - (y1 - y0) / 2)

    def bar(self, x0: float, y0: float, x1: float, y1: float, radius: float) -> np.ndarray:
        """A line from (x0, y0) to (x1, y1) with round ends."""
        x, y, dx, dy = self.x - x0, self.y - y0, x1 - x0, y1 - y0
        t = clip01((x * dx + y * dy) / (dx * dx + dy * dy))
        return np.sqrt((x - t * dx) ** 2 + (y - t * dy) ** 2) - radius

    def taper(self, y0: float, y1: float, half0: float, half1: float) -> np.ndarray:
        """A trapezoid around x = 0 with half widths `half0` at y0 and `half1` at y1 (0: a triangle)."""
        slope = (half1 - half0) / (y1 - y0)
        flank = (np.abs(self.x) - half0 - slope * (self.y - y0)) / np.hypot(1, slope)
        return np.maximum(flank, np.abs(self.y - (y0 + y1) / 2) - (y1 - y0) / 2)


class Canvas:
    """`image` (3, H, W) float32 linear light, `label` (H, W) uint8, and a random camera in haze."""

    bend: tuple[float, float, float]  # the street's centre line is x = c0 + c1 z + c2 z^2

    def __init__(self, size: tuple[int, int], rng: Random, haze: np.ndarray) -> None:
        self.height, self.width = size
        self.focal = rng.uniform(0.75, 1.05) * math.sqrt(2 * self.height * self.width)
        self.cx, self.cy = self.width * rng.uniform(0.44, 0.56), self.height * rng.uniform(0.38, 0.5)
        self.haze, self.visibility = haze, rng.choices((1200.0, 500.0, 220.0, 80.0), (4, 3, 2, 1))[0]
        self.camera_height = rng.uniform(1.25, 1.75)
        self.image = np.zeros((3, *size), dtype=FLOAT)
        self.label = np.full(size, IGNORE, dtype=np.uint8)
        self.a = ((np.arange(self.width, dtype=FLOAT) + 0.5) - self.cx) / self.focal
        self.b = ((np.arange(self.height, dtype=FLOAT) + 0.5) - self.cy) / self.focal
        self.horizon = int(np.searchsorted(self.b, self.camera_height / 2000))  # first row of ground, 2 km away

    def centre(self, z: Any) -> Any:
        """x of the street's centre line at depth z."""
        c0, c1, c2 = self.bend
        return c0 + c1 * z + c2 * z * z

    def fog(self, colour: np.ndarray, z: Any) -> np.ndarray:
        """`colour` through the haze at depth z."""
        return mix(colour, self.haze, 1 - np.exp(np.asarray(z, FLOAT) * (-1 / self.visibility)))

    def paint(self, colour: Any, alpha: Any, label: int | None, window: Any = ..., z: Any = 0.0) -> None:
        """Blends `colour` (3, 1, 1) or (3, h, w) at depth z with `alpha` (h, w); sets the label where alpha > 1/2."""
        view = self.image[window]
        view += (self.fog(colour, z) - view) * alpha
        if label is not None:
            self.label[window][alpha > 0.5] = label

    def board(self, x: float, z: float, half: float, top: float) -> Plane | None:
        """The board of half width `half` and height `top` at (x, z); None if outside the picture."""
        scale = self.focal / z
        foot, middle = self.cy + self.camera_height * scale, self.cx + x * scale
        rows = _span(foot - top * scale - 1, foot + 1, self.height)
        columns = _span(middle - half * scale - 1, middle + half * scale + 1, self.width)
        if not (rows and columns):
            return None
        across, up = self.a[None, columns] * z - x, self.camera_height - self.b[rows, None] * z
        return Plane(self, np.s_[..., rows, columns], across, up, z, 1 / scale, 1 / scale)

    def wall(self, x: float, z0: float, z1: float, top: float) -> Plane | None:
        """The plane from (x, z0) along the street up to depth z1; None if outside the picture or edge-on."""
        slope = self.bend[1] + 2 * self.bend[2] * z0
        near, offset = max(z0, 0.7), x - slope * z0  # the plane is x = offset + slope z
        if z1 <= near or abs(offset) < 1e-3:
            return None
        left, right = sorted(self.cx + self.focal * (offset / z + slope) for z in (near, z1))
        columns = _span(round(left), round(right), self.width)  # pixels whose centre is on the wall
        if not columns:
            return None
        z = np.minimum(np.maximum(offset / (self.a[columns] - slope), near), z1)
        heights = [self.cy + self.focal * (self.camera_height - y) / d for y in (top, 0) for d in (z.min(), z.max())]
        rows = _span(min(heights) - 1, max(heights) + 1, self.height)
        if not rows:
            return None
        along, up = (z - z0)[None], self.camera_height - self.b[rows, None] * z
        dx, dy = z * z / (abs(offset) * self.focal), z / self.focal
        return Plane(self, np.s_[..., rows, columns], along, up, z, dx, dy)


def _span(low: float, high: float, size: int) -> slice | None:
    """The pixels that overlap [low, high], clipped to the picture; None if there are none."""
    first, last = max(int(np.floor(low)), 0), min(int(np.ceil(high)), size)
    return slice(first, last) if first < last else None

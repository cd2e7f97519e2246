"""The drawing surface of the generated street scenes: a pinhole camera over a ground plane, painted from far to near.

Light is linear, float32. World axes, in metres: x right, y up, z ahead; the camera stands at (0, camera_height, 0) and
looks along z. A column has the slope a = x / z, a row the slope b = (camera_height - y) / z, so everything that is flat
in the world (ground, walls, boards that face the camera) needs one multiplication per pixel and no matrix.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np

FLOAT = np.float32
IGNORE = 255
TILE = 512  # side of the noise tiles, a power of two: wrapping is a bit mask


@cache
def rgb(red: float, green: float, blue: float) -> np.ndarray:
    """A display colour, 0 to 255, as linear light (gamma 2, which `np.sqrt` undoes), (3, 1, 1): it broadcasts over pixels."""
    colour = (np.array((red, green, blue), dtype=FLOAT).reshape(3, 1, 1) / 255) ** 2
    colour.flags.writeable = False  # every caller shares it
    return colour


@cache
def noise_tile(falloff: float) -> np.ndarray:
    """A (TILE, TILE) tile of noise in [0, 1] that wraps; amplitude falls as frequency^-falloff. 0.4 grain, 1.5 cloud."""
    white = np.random.Generator(np.random.PCG64(int(falloff * 1000))).standard_normal((TILE, TILE))
    fy, fx = np.fft.fftfreq(TILE)[:, None], np.fft.rfftfreq(TILE)[None, :]
    radius = np.hypot(fy, fx)
    radius[0, 0] = 1.0
    spectrum = np.fft.rfft2(white) * radius**-falloff
    spectrum[0, 0] = 0.0
    field = np.fft.irfft2(spectrum, s=(TILE, TILE))
    return np.clip(field / (5 * field.std()) + 0.5, 0, 1).astype(FLOAT)


def noise(falloff: float, row: np.ndarray, column: np.ndarray) -> np.ndarray:
    """The noise tile read at (row, column), in texels, any broadcastable shapes."""
    tile = noise_tile(falloff)
    return tile[row.astype(np.int32) & (TILE - 1), column.astype(np.int32) & (TILE - 1)]


def clip01(value: np.ndarray) -> np.ndarray:
    value = np.maximum(value, 0)  # two calls cost a third of one np.clip
    return np.minimum(value, 1, out=value) if isinstance(value, np.ndarray) else min(value, 1)


def cover(value: np.ndarray, low: float, high: float, footprint: np.ndarray | float) -> np.ndarray:
    """How much of a pixel of width `footprint` at `value` lies in [low, high]: an antialiased interval."""
    half = footprint * 0.5
    return clip01((np.minimum(value + half, high) - np.maximum(value - half, low)) / footprint)


def pulse(value: np.ndarray, low: float, high: float, footprint: np.ndarray | float) -> np.ndarray:
    """`cover` for the interval [low, high] of every unit period. Far away it turns into the mean: it never aliases."""
    width = high - low

    def area(t: np.ndarray) -> np.ndarray:
        whole = np.floor(t)
        return whole * width + np.minimum(np.maximum(t - whole - low, 0), width)

    half = footprint * 0.5
    return (area(value + half) - area(value - half)) / footprint


@dataclass
class Shape:
    """A flat shape on a board: a signed distance in metres, negative inside, and the rectangle that holds the inside."""

    bounds: tuple[float, float, float, float]  # x0, x1, y0, y1
    distance: Callable[[np.ndarray, np.ndarray], np.ndarray]  # of x (1, w) and y (h, 1)

    def __or__(self, other: Shape) -> Shape:
        (a0, a1, a2, a3), (b0, b1, b2, b3) = self.bounds, other.bounds
        bounds = (min(a0, b0), max(a1, b1), min(a2, b2), max(a3, b3))
        return Shape(bounds, lambda x, y: np.minimum(self.distance(x, y), other.distance(x, y)))

    def above(self, level: float) -> Shape:
        """The part higher than `level`."""
        x0, x1, y0, y1 = self.bounds
        return Shape((x0, x1, max(y0, level), y1), lambda x, y: np.maximum(self.distance(x, y), level - y))


def disc(cx: float, cy: float, rx: float, ry: float | None = None) -> Shape:
    ry = rx if ry is None else ry
    least = min(rx, ry)
    return Shape(
        (cx - rx, cx + rx, cy - ry, cy + ry),
        lambda x, y: (np.sqrt(((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2) - 1) * least,
    )


def ring(cx: float, cy: float, radius: float, half: float) -> Shape:
    """A circle drawn with a line of half width `half`."""
    reach = radius + half
    return Shape(
        (cx - reach, cx + reach, cy - reach, cy + reach),
        lambda x, y: np.abs(np.sqrt((x - cx) ** 2 + (y - cy) ** 2) - radius) - half,
    )


def box(x0: float, x1: float, y0: float, y1: float) -> Shape:
    cx, cy, hx, hy = (x0 + x1) / 2, (y0 + y1) / 2, (x1 - x0) / 2, (y1 - y0) / 2
    return Shape((x0, x1, y0, y1), lambda x, y: np.maximum(np.abs(x - cx) - hx, np.abs(y - cy) - hy))


def round_box(x0: float, x1: float, y0: float, y1: float, radius: float) -> Shape:
    cx, cy, hx, hy = (x0 + x1) / 2, (y0 + y1) / 2, (x1 - x0) / 2 - radius, (y1 - y0) / 2 - radius

    def distance(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        p, q = np.abs(x - cx) - hx, np.abs(y - cy) - hy
        return np.sqrt(np.maximum(p, 0) ** 2 + np.maximum(q, 0) ** 2) + np.minimum(np.maximum(p, q), 0) - radius

    return Shape((x0, x1, y0, y1), distance)


def diamond(cx: float, cy: float, size: float) -> Shape:
    return Shape(
        (cx - size, cx + size, cy - size, cy + size), lambda x, y: (np.abs(x - cx) + np.abs(y - cy) - size) * 0.7071
    )


def bar(x0: float, y0: float, x1: float, y1: float, radius: float) -> Shape:
    """A line from (x0, y0) to (x1, y1) with round ends."""
    dx, dy = x1 - x0, y1 - y0
    length = max(dx * dx + dy * dy, 1e-9)

    def distance(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        x, y = x - x0, y - y0
        t = clip01(x * (dx / length) + y * (dy / length))
        return np.sqrt((x - t * dx) ** 2 + (y - t * dy) ** 2) - radius

    bounds = (min(x0, x1) - radius, max(x0, x1) + radius, min(y0, y1) - radius, max(y0, y1) + radius)
    return Shape(bounds, distance)


def taper(y0: float, y1: float, half0: float, half1: float) -> Shape:
    """A trapezoid about x = 0: half width `half0` at y0 and `half1` at y1 (0: a triangle)."""
    slope, cy, hy = (half1 - half0) / (y1 - y0), (y0 + y1) / 2, (y1 - y0) / 2
    scale, widest = 1 / math.hypot(1, slope), max(half0, half1)
    return Shape(
        (-widest, widest, y0, y1),
        lambda x, y: np.maximum((np.abs(x) - half0 - slope * (y - y0)) * scale, np.abs(y - cy) - hy),
    )


# A colour (3, 1, 1), or a function of x (1, w) and y (h, 1) that gives colours broadcastable to (3, h, w).
Tone = np.ndarray | Callable[[np.ndarray, np.ndarray], np.ndarray]


@dataclass
class Board:
    """The pixels of an upright rectangle that faces the camera at depth z: x (1, w) about its foot, y (h, 1) above it."""

    canvas: Canvas
    rows: slice
    columns: slice
    x: np.ndarray
    y: np.ndarray
    z: float
    scale: float  # pixels per metre

    def _crop(self, shape: Shape) -> tuple[slice, slice, np.ndarray, np.ndarray] | None:
        """Rows, columns, x and y of the pixels that a shape can touch: a detail costs its own size, not the board's."""
        x0, x1, y0, y1 = shape.bounds
        left, top = float(self.x[0, 0]), float(self.y[0, 0])
        i0, i1 = int((x0 - left) * self.scale), int((x1 - left) * self.scale) + 2
        j0, j1 = int((top - y1) * self.scale), int((top - y0) * self.scale) + 2
        i0, j0 = max(i0, 0), max(j0, 0)
        x, y = self.x[:, i0:i1], self.y[j0:j1]
        if i1 <= i0 or j1 <= j0 or not x.size or not y.size:
            return None
        row, column = self.rows.start + j0, self.columns.start + i0
        return slice(row, row + y.size), slice(column, column + x.size), x, y

    def fill(self, shape: Shape, colour: Tone, label: int | None = None) -> None:
        """Paint a shape; a tone that varies is a function of (x, y). Without a label the pixels keep theirs."""
        crop = self._crop(shape)
        if crop is None:
            return
        rows, columns, x, y = crop
        alpha = clip01(0.5 - shape.distance(x, y) * self.scale)
        self.canvas.paint(rows, columns, colour(x, y) if callable(colour) else colour, alpha, label, self.z)

    def mark(self, shape: Shape, label: int) -> None:
        """Label a shape without painting it."""
        crop = self._crop(shape)
        if crop is not None:
            rows, columns, x, y = crop
            self.canvas.label[rows, columns][shape.distance(x, y) < 0] = label

    def wall(self) -> Wall:
        """The same pixels as a wall that faces the camera."""
        z, pixel = (np.full(self.x.shape[1], value, FLOAT) for value in (self.z, 1 / self.scale))
        return Wall(self.canvas, self.rows, self.columns, z, self.y + 0 * self.x, pixel, pixel)

    def thin(self, radius: float) -> float:
        """`radius`, widened so that the shape still covers a pixel while it is near enough to be labelled by hand."""
        return max(radius, 0.52 / self.scale) if self.z < 50 else radius


@dataclass
class Wall:
    """The pixels of a vertical plane along the street: depth z (w,), height y (h, w), and the size of a pixel on it."""

    canvas: Canvas
    rows: slice
    columns: slice
    z: np.ndarray
    y: np.ndarray
    foot_z: np.ndarray
    foot_y: np.ndarray

    def paint(self, colour: np.ndarray, alpha: np.ndarray, label: int | None = None) -> None:
        self.canvas.paint(self.rows, self.columns, colour, alpha, label, self.z)


class Canvas:
    """`image` (3, H, W) float32 linear light and `label` (H, W) uint8, with the camera that maps the world onto them."""

    def __init__(
        self, height: int, width: int, focal: float, centre: tuple[float, float], camera_height: float,
        haze: np.ndarray, visibility: float,
    ) -> None:  # fmt: skip
        self.height, self.width, self.focal, self.camera_height = height, width, focal, camera_height
        self.cx, self.cy = centre
        self.haze, self.visibility = haze, visibility
        self.image = np.zeros((3, height, width), dtype=FLOAT)
        self.label = np.full((height, width), IGNORE, dtype=np.uint8)
        self.a = ((np.arange(width, dtype=FLOAT) + 0.5) - self.cx) / focal
        self.b = ((np.arange(height, dtype=FLOAT) + 0.5) - self.cy) / focal

    def span(self, low: float, high: float, size: int) -> slice | None:
        """The pixels whose area touches [low, high], cut to the picture; None if there are none."""
        first, last = max(int(np.floor(low)), 0), min(int(np.ceil(high)), size)
        return slice(first, last) if first < last else None

    def paint(
        self, rows: slice, columns: slice, colour: np.ndarray, alpha: np.ndarray, label: int | None, z: np.ndarray | float
    ) -> None:  # fmt: skip
        """Blend `colour` (3, 1, 1) or (3, h, w), seen through the haze of depth z, by `alpha` (h, w); label where alpha > 1/2."""
        fog = (
            1 - np.exp(z * (-1 / self.visibility)) if isinstance(z, np.ndarray) else 1 - math.exp(-z / self.visibility)
        )
        colour = colour + fog * (self.haze - colour)
        view = self.image[:, rows, columns]
        colour = colour - view
        colour *= alpha
        view += colour
        if label is not None:
            self.label[rows, columns][alpha > 0.5] = label

    def board(self, x: float, z: float, half: float, top: float, bottom: float = 0.0) -> Board | None:
        """The board of half width `half` from height `bottom` to `top` at (x, z); None if it is out of the picture."""
        scale = self.focal / z
        foot = self.cy + self.camera_height * scale
        middle = self.cx + x * scale
        rows = self.span(foot - top * scale - 1, foot - bottom * scale + 1, self.height)
        columns = self.span(middle - half * scale - 1, middle + half * scale + 1, self.width)
        if rows is None or columns is None:
            return None
        return Board(
            self, rows, columns, (self.a[columns] * z - x)[None],
            (self.camera_height - self.b[rows] * z)[:, None], z, scale,
        )  # fmt: skip

    def wall(self, x: float, slope: float, z0: float, z1: float, top: float, bottom: float = 0.0) -> Wall | None:
        """The plane through (x, z0) with dx/dz = `slope` up to depth z1; None if out of the picture or seen edge-on."""
        near = max(z0, 0.7)
        if z1 <= near:
            return None
        offset = x - slope * z0  # the plane is x = offset + slope z
        left, right = sorted(self.cx + self.focal * (offset / z + slope) for z in (near, z1))
        columns = self.span(round(left), round(right), self.width)  # the pixels whose centre is on the wall
        if columns is None or abs(offset) < 1e-3:
            return None
        z = np.minimum(np.maximum(offset / (self.a[columns] - slope), near), z1)
        nearest, farthest = sorted((float(z[0]), float(z[-1])))
        heights = [
            self.cy + self.focal * (self.camera_height - y) / d for y in (top, bottom) for d in (nearest, farthest)
        ]
        rows = self.span(min(heights) - 1, max(heights) + 1, self.height)
        if rows is None:
            return None
        y = self.camera_height - self.b[rows][:, None] * z
        foot_z = z * z / (abs(offset) * self.focal)
        return Wall(self, rows, columns, z, y, foot_z, z / self.focal)

"""Generated street scenes: a data set without files, for demonstrations and tests.

Each item is a small world (a street with pavements, houses, trees, traffic, people, time of day and weather), seen
through a pinhole camera and painted back to front. Colour alone does not separate the classes: facades share the greys
of asphalt and the greens of leaves; light, haze, shadow, blur and noise vary between pictures. Class names and colours
follow Cityscapes where possible.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.nn.functional import avg_pool2d
from torch.utils.data import Dataset
from torchvision import tv_tensors

from fastkd import ranges
from fastkd.ranges import Count, CountOrZero, Side
from fastkd.train.data import street_objects as things
from fastkd.train.data.street_canvas import FLOAT, IGNORE, Canvas, clip01, cover, noise, pulse, rgb

SPLITS = {"train": 2000, "val": 200}  # default lengths
REACH = 150.0  # metres of street that are generated
# Hour: odds, sun elevation, lamp brightness, exposure, colours of sun, ambient light, zenith and horizon.
HOURS: dict[str, Any] = {
    "clear": (0.38, 40, 0.0, 0.27, (300, 290, 268), (162, 175, 197), (82, 136, 206), (192, 214, 232)),
    "overcast": (0.26, 60, 0.0, 0.27, (0, 0, 0), (206, 210, 216), (166, 172, 180), (206, 208, 210)),
    "golden": (0.14, 13, 0.0, 0.27, (312, 240, 157), (123, 127, 154), (110, 142, 190), (250, 208, 158)),
    "dusk": (0.12, 45, 0.5, 0.16, (0, 0, 0), (115, 125, 162), (52, 70, 116), (214, 160, 140)),
    "night": (0.1, 45, 0.9, 0.12, (0, 0, 0), (64, 68, 86), (12, 15, 28), (46, 44, 54)),
}


class Light:
    """Sun, sky and lamps of one scene. Colours are linear light, white is about 1."""

    def __init__(self, rng: random.Random) -> None:
        hour = rng.choices(list(HOURS), [row[0] for row in HOURS.values()])[0]
        _, rise, self.lamps, self.exposure, *colours = HOURS[hour]
        turn, rise = rng.uniform(0, 2 * math.pi), math.radians(rise * rng.uniform(0.65, 1.4))
        self.sun_way = (math.cos(rise) * math.sin(turn), math.sin(rise), math.cos(rise) * math.cos(turn))
        self.sun, self.ambient, self.zenith, self.horizon = (rgb(*c) * rng.uniform(0.85, 1.2) for c in colours)
        self.mirror, self.cloud = 0.5 * (self.zenith + self.horizon), rng.uniform(0.7 if hour == "overcast" else 0, 1)

    def facing(self, normal: tuple[float, float, float]) -> np.ndarray:
        """Light on an unshadowed surface with this normal (any length)."""
        lean = sum(n * s for n, s in zip(normal, self.sun_way, strict=True)) / math.hypot(*normal)
        return self.ambient * 0.9 + self.sun * (max(0.0, lean) * 0.9) + things.WARM * (0.1 * self.lamps)

    def at(self, scene: Scene, x: Any, z: Any, share: float = 0.75) -> Any:
        """Light at (x, z) with a `share` of the sun (0 in shadow), plus nearby lamps."""
        lit = scene.sunlit(np.asarray(x - scene.place(np.minimum(z, REACH), 0)[0], FLOAT))
        lamps = things.WARM * (1.2 * self.lamps * np.minimum(1, 9 / np.maximum(z, 3)))
        return self.ambient + self.sun * (share * lit) + lamps


class Scene:
    """One world and its picture. `paint()` returns (image (3, H, W) uint8, label (H, W) uint8)."""

    def __init__(self, height: int, width: int, rng: random.Random) -> None:
        self.rng, self.light = rng, Light(rng)
        self.leaves = things.AUTUMN + things.LEAVES[:2] if rng.random() < 0.2 else things.LEAVES
        focal = rng.uniform(0.75, 1.05) * math.sqrt(2 * height * width)
        centre = (width * rng.uniform(0.44, 0.56), height * rng.uniform(0.38, 0.5))
        visibility = rng.choices((1200.0, 500.0, 220.0, 80.0), (4, 3, 2, 1))[0]
        self.canvas = Canvas((height, width), focal, centre, rng.uniform(1.25, 1.75), self.light.horizon, visibility)
        # Cross-section of the street, metres from the centre line; sides are -1 (left) and 1 (right).
        self.lanes, self.lane = rng.randrange(1, 3), rng.uniform(2.9, 3.5)
        self.parking = {s: rng.random() < 0.6 for s in (-1, 1)}
        self.kerb = {s: self.lane * self.lanes + 2.2 * self.parking[s] for s in (-1, 1)}
        self.walk = {s: self.kerb[s] + rng.uniform(2.0, 5.5) for s in (-1, 1)}
        self.kind = {s: rng.choices(("town", "garden", "park"), (0.58, 0.27, 0.15))[0] for s in (-1, 1)}
        self.front = {s: self.walk[s] + {"town": 0.05, "garden": 5.0, "park": 40.0}[self.kind[s]] for s in (-1, 1)}
        self.roof = {s: {"town": rng.uniform(8, 20), "garden": 6.0, "park": 0.0}[self.kind[s]] for s in (-1, 1)}
        own = self.lane * (rng.randrange(self.lanes) + 0.5) + rng.uniform(-0.4, 0.4)
        self.bend = (-own, rng.uniform(-0.05, 0.05), rng.uniform(-1, 1) * rng.choice((1 / 900, 1 / 4000)))
        self.jobs: list[tuple[int, float, Callable[[random.Random], None]]] = []  # layer, depth, painter

    def place(self, z: Any, lateral: float) -> tuple[Any, Any]:
        """x of the point `lateral` metres right of the centre line at depth z, and the street's dx/dz there."""
        c0, c1, c2 = self.bend
        return c0 + c1 * z + c2 * z * z + lateral, c1 + 2 * c2 * z

    def sunlit(self, lateral: np.ndarray) -> np.ndarray:
        """1 in the sun, 0 in the shadow of the houses on its side."""
        sx, sy, _ = self.light.sun_way
        side = 1 if sx > 0 else -1
        reach = np.maximum(self.front[side] - lateral * side, 0) / max(abs(sx), 0.05)
        return clip01((reach * sy - self.roof[side]) / 0.8 + 0.5)

    def paint(self) -> tuple[np.ndarray, np.ndarray]:
        for side in (-1, 1):
            self._houses(side)
            self._roadside(side)
        # Each object has its own random stream: objects outside the picture do not affect those inside.
        root = self.rng.getrandbits(62)
        self._sky()
        self._ground()
        for number, (_, _, job) in enumerate(sorted(self.jobs, key=lambda job: (job[0], -job[1]))):
            job(random.Random(root + number))
        return self._develop(), self.canvas.label

    def _add(self, thing: Callable[..., None], lateral: float, z: float, layer: int = 2, **options: Any) -> None:
        x = self.place(z, lateral)[0]
        self.jobs.append((layer, z, lambda rng: thing(self, rng, x, z, **options)))

    def _drive(self, lateral: float, z: float, towards: bool, lit: bool = True) -> None:
        kind = self.rng.choices(list(things.BODIES), (0.45, 0.3, 0.13, 0.12 * lit))[0]
        job = partial(things.vehicle, lateral=lateral, z=z, kind=kind, towards=towards, lit=lit)
        self.jobs.append((2, z, partial(job, self)))

    def _houses(self, side: int) -> None:
        """Houses, gardens, parks and their borders."""
        rng, kind, walk, z = self.rng, self.kind[side], self.walk[side], -self.rng.uniform(0, 12)
        while z < REACH and kind != "park":
            end, height = z + rng.uniform(8, 20), rng.uniform(4, 9) if kind == "garden" else rng.uniform(7, 24)
            job = partial(things.building, side=side, lateral=self.front[side], z0=z, z1=end, height=height)
            self.jobs.append((0, z, partial(job, self)))
            z = end + (rng.uniform(2, 8) if kind == "garden" or rng.random() < 0.25 else 0.0)
        if kind != "town":
            for _ in range(rng.randrange(2, 8)):
                away = rng.uniform(0.8, 2.4 if kind == "garden" else 14.0)
                self._add(things.tree, side * (walk + away), rng.uniform(5, 80), layer=1)
            job = partial(things.border, side=side, lateral=walk + 0.1, z0=0.7, z1=rng.uniform(20, 70))
            self.jobs.append((1, 0.7, partial(job, self)))

    def _roadside(self, side: int) -> None:
        """Objects on the pavement, at the kerb and on the lanes of one side."""
        rng, kerb, walk = self.rng, self.kerb[side], self.walk[side]
        post, pavement, lane = (kerb + 0.3, kerb + 0.6), (kerb + 0.4, walk - 0.3), (0.5, kerb - 0.8)
        for thing, most, (low, high), (z0, z1), draw in (
            (things.tree, rng.choice((0, 9)), post, (6, 75), dict),
            (things.pole, 5, post, (6, 75), lambda: {"height": rng.uniform(5, 8), "lamp": -side}),
            (things.pole, 4, post, (4, 45), lambda: {"height": rng.uniform(0.9, 4.5)}),
            (things.sign, 5, post, (6, 45), dict),
            (things.traffic_light, 4, post, (8, 60), dict),
            (things.bicycle, 4, pavement, (4, 26), lambda: {"ridden": False, "across": rng.random() < 0.75}),
            (things.bicycle, 2, lane, (6, 30), lambda: {"ridden": True, "across": rng.random() < 0.3}),
            (things.person, 1, lane, (9, 40), lambda: {"height": rng.uniform(1.45, 1.92)}),
            (things.person, rng.choice((3, 9)), pavement, (4.5, 45), lambda: {"height": rng.uniform(1.45, 1.92)}),
        ):  # fmt: skip
            for _ in range(rng.randrange(most + 1)):
                self._add(thing, side * rng.uniform(low, high), rng.uniform(z0, z1), **draw())
        for lane_number in range(self.lanes):
            lateral = side * self.lane * (lane_number + 0.5)
            z = rng.uniform(8, 40) if abs(lateral + self.bend[0]) < 1.5 else rng.uniform(4, 30)
            while z < 80:
                if rng.random() < 0.65:
                    self._drive(lateral + rng.uniform(-0.3, 0.3), z, side < 0)
                z += rng.uniform(14, 45)
        z, busy = rng.uniform(2.5, 9), rng.uniform(0.3, 0.95) * self.parking[side]
        while z < 60:
            if rng.random() < busy:
                self._drive(side * (kerb - 1.05), z, (side < 0) != (rng.random() < 0.15), lit=False)
            z += rng.uniform(5.8, 7.5)

    def _sky(self) -> None:
        """The sky, and the hazy skyline of houses or trees at the end of the street."""
        canvas, light, rng = self.canvas, self.light, self.rng
        rows = int(np.searchsorted(canvas.b, canvas.camera_height / 2000))
        phase, wood, height = rng.randrange(512), rng.random() < 0.5, rng.uniform(7, 30)
        tone = things.pick(rng, self.leaves if wood else things.FACADES) * light.facing((0, 1, -1))
        up, a = 0.02 - canvas.b[:rows, None], canvas.a[None]
        fine, wide = (noise(1.5, k / (up + 0.12) + phase, a * k / (up + 0.12)) for k in (90, 11))
        cloud = clip01((wide * 0.75 + fine * 0.35 - 0.95 + 0.62 * light.cloud) * 4) * 0.85 * clip01(up * 12)
        sky = light.horizon + clip01(np.sqrt(up / 0.55)) * (light.zenith - light.horizon)
        bright = (light.horizon + light.sun * 0.25 + light.ambient * 0.15) * (0.72 + 0.5 * fine)
        canvas.image[:, :rows], canvas.label[:rows] = sky + cloud * (bright - sky), things.SKY
        along, y = a * 160.0, canvas.camera_height + up * 160.0
        outline = along * 1.2 if wood else np.floor(along / 14) * 37
        top = height * (0.3 + 0.9 * noise(1.5 if wood else 0.4, np.full(1, phase), outline + phase))
        alpha, label = clip01((top - y) * (canvas.focal / 160) + 0.5), things.VEGETATION if wood else things.BUILDING
        canvas.paint(slice(rows), slice(None), tone * (0.5 + noise(0.6, y * 2, along * 2)), alpha, label, 160.0)

    def _ground(self) -> None:
        canvas, light, rng = self.canvas, self.light, self.rng
        first, phase = int(np.searchsorted(canvas.b, canvas.camera_height / 2000)), rng.randrange(512)
        road, *paving = (things.pick(rng, [rgb(v, v, v) for v in (74, 90, 106, 124, 146)]) for _ in range(3))
        grass, paint = things.pick(rng, [rgb(88, 108, 48), rgb(120, 114, 70)]), things.pick(rng, [rgb(212, 210, 202)])
        z = canvas.camera_height / canvas.b[first:, None]
        px, pz, x = z / canvas.focal, z * z / (canvas.focal * canvas.camera_height), canvas.a[None] * z
        lateral = x - self.place(np.minimum(z, REACH), 0)[0]
        grain = (noise(0.5, z * 26 + phase, x * 26) - 0.5) * clip01(0.08 / pz)  # finer than a pixel far away
        blotch = noise(1.5, z * 7, x * 9 + phase)
        shade, label = 0.7 + 0.55 * blotch + grain * 0.8, canvas.label[first:]
        label[:], colour = things.ROAD, road * shade
        for lane in range(-self.lanes, self.lanes + 1):
            line = cover(lateral, lane * self.lane - 0.07, lane * self.lane + 0.07, px) * pulse(z / 12, 0, 0.4, pz / 12)
            colour = colour + line * clip01(blotch * 5 - 1) * 0.9 * (paint * shade - colour)
        for side, stone in zip((-1, 1), paving, strict=True):
            q, kerb, walk = lateral * side, self.kerb[side], self.walk[side] if self.kind[side] != "town" else np.inf
            for edge, tone, kind in (
                (kerb - 0.12, road * 0.35, None),
                (kerb, stone, things.SIDEWALK),
                (walk, grass, things.TERRAIN),
            ):
                amount = clip01((q - edge) / px + 0.5)
                colour = colour + amount * (tone * shade - colour)
                if kind is not None:
                    label[amount > 0.5] = kind
        canvas.image[:, first:] = canvas.fog(colour * light.at(self, x, z, light.sun_way[1]), z)

    def _develop(self) -> np.ndarray:
        """Lens, sensor and processing: blur, exposure, colour balance, noise."""
        canvas, light, rng = self.canvas, self.light, self.rng
        image: np.ndarray = canvas.image
        rise = max(rng.uniform(-0.1, 0.11), 0) * canvas.height  # bonnet of the camera car
        rows, across = np.arange(canvas.height)[:, None] + 0.5, np.arange(canvas.width) / canvas.width * 2 - 1
        alpha = clip01(rows - canvas.height + rise * np.sqrt(1 - 0.75 * across**2))
        canvas.paint(slice(None), slice(None), things.pick(rng, things.PAINTS) * light.ambient, alpha, IGNORE, 0.0)
        soft = rng.choice((0.0, rng.uniform(0.3, 1.0))) * min(1, canvas.height / 160)
        image = image + soft * (avg_pool2d(torch.from_numpy(image), 3, 1, 1, count_include_pad=False).numpy() - image)
        # Auto exposure: evens out most of the difference between scenes, with some error.
        gain = (light.exposure / max(float(image[:, ::4, ::4].mean()), 0.01)) ** 0.8 * rng.uniform(0.8, 1.2)
        image = image * np.array([[[gain * rng.uniform(0.93, 1.07)]] for _ in range(3)], dtype=FLOAT)
        image = np.sqrt(np.maximum(image * (1 + 0.12 * image) / (1 + 0.45 * image), 0)) * 255  # highlights roll off
        level = rng.uniform(1.0, 4) * (2 if light.lamps else 1)
        noisy = np.random.default_rng(rng.getrandbits(63)).standard_normal(image.shape, dtype=FLOAT)
        return np.clip(image + level * noisy + 0.5, 0, 255).astype(np.uint8)


class StreetScenes(Dataset):
    """Generated street scenes with 15 classes.

    Item `i` is `(tv_tensors.Image uint8 (3, H, W), tv_tensors.Mask uint8 (H, W))` and depends only on (seed, split, i)
    and size. Splits share no scene. Void (255): the camera car's bonnet.

    split: "train" | "val".
    size: (height, width), each at least 16.
    length: number of items (2000 train, 200 val).
    cache: keep generated items in memory, H·W·4 bytes each, per process.
    transform: called on (image, mask), after the cache.

    Raises ValueError for any other value.
    """

    classes = things.CLASSES
    palette = np.array(
        [*bytes.fromhex("804080f423e8464646be9999999999faaa1edcdc006b8e2398fb984682b4dc143cff000000008e003c64770b20")],
        np.uint8,
    ).reshape(-1, 3)
    ignore_index = IGNORE

    def __init__(
        self,
        split: str,
        *,
        size: tuple[Side, Side] = (256, 512),
        length: Count | None = None,
        seed: CountOrZero = 0,
        cache: bool = False,
        transform: Callable[..., Any] | None = None,
    ) -> None:
        if split not in SPLITS:
            raise ValueError(f"StreetScenes: unknown split {split!r}; expected one of {', '.join(SPLITS)}")
        ranges.check_options(StreetScenes, {"size": size, "length": length, "seed": seed}, "StreetScenes: ")
        self.split, self.size, self.seed, self.transform = split, (int(size[0]), int(size[1])), seed, transform
        self.length = SPLITS[split] if length is None else length
        self.cache: dict[int, tuple[np.ndarray, np.ndarray]] | None = {} if cache else None

    def __len__(self) -> int:
        return self.length

    def generate(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Scene `index` as (image (3, H, W) uint8, label (H, W) uint8), before cache and transform."""
        return Scene(*self.size, random.Random(f"{self.seed}/{self.split}/{index}")).paint()

    def __getitem__(self, index: int) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
        if not -self.length <= index < self.length:
            raise IndexError(f"StreetScenes: item {index} of {self.length}")
        item = self._item(index % self.length)
        return item if self.transform is None else self.transform(*item)

    def image(self, index: int) -> tv_tensors.Image:
        """The image of an item, without its label and before `transform`."""
        return self._item(index)[0]

    def _item(self, number: int) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
        pair = self.generate(number) if self.cache is None or number not in self.cache else self.cache[number]
        if self.cache is not None:
            self.cache[number] = pair
        return tv_tensors.Image(torch.tensor(pair[0])), tv_tensors.Mask(torch.tensor(pair[1]))  # writable copies

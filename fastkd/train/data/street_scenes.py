"""Generated street scenes: a data set without files, for demonstrations and tests.

Each item is a small world (a street with pavements, houses, trees, traffic, people, time of day and weather), seen
through a pinhole camera and painted back to front. Colour alone does not separate the classes: facades share the greys
of asphalt and the greens of leaves; light, haze, shadow, blur and noise vary between pictures. Class names and colours
are those of Cityscapes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from random import Random
from typing import Any

import numpy as np
import torch
from torch.nn.functional import avg_pool2d
from torch.utils.data import Dataset
from torchvision import tv_tensors

from fastkd import ranges
from fastkd.ranges import Count, CountOrZero, Side
from fastkd.train.data import street_objects as things
from fastkd.train.data.folders import read_classes
from fastkd.train.data.layouts import CLASSES
from fastkd.train.data.street_canvas import FLOAT, IGNORE, Canvas, clip01, cover, mix, noise, pulse, rgb
from fastkd.train.data.street_objects import Label, pick

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

    def __init__(self, rng: Random) -> None:
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


class Scene(Canvas):
    """One world and its picture. `render()` returns (image (3, H, W) uint8, label (H, W) uint8)."""

    def __init__(self, size: tuple[int, int], rng: Random) -> None:
        self.rng, self.light = rng, Light(rng)
        self.leaves = things.AUTUMN + things.LEAVES[:2] if rng.random() < 0.2 else things.LEAVES
        super().__init__(size, rng, self.light.horizon)
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
        self.jobs: list[tuple[int, float, Callable[[Random], Any]]] = []  # layer, -depth, painter

    def light_at(self, x: Any, z: Any, share: float = 0.75) -> Any:
        """Light at (x, z): a `share` of the sun, none in the shadow of the houses on its side, and nearby lamps."""
        light, (sun_x, sun_y, _) = self.light, self.light.sun_way
        side = 1 if sun_x > 0 else -1
        lateral = np.asarray(x - self.centre(np.minimum(z, REACH)), FLOAT)
        reach = np.maximum(self.front[side] - lateral * side, 0) / max(abs(sun_x), 0.05)
        lit = clip01((reach * sun_y - self.roof[side]) / 0.8 + 0.5)
        lamps = things.WARM * (1.2 * light.lamps * np.minimum(1, 9 / np.maximum(z, 3)))
        return light.ambient + light.sun * (share * lit) + lamps

    def render(self) -> tuple[np.ndarray, np.ndarray]:
        for side in (-1, 1):
            self._houses(side)
            self._roadside(side)
        # Each object has its own random stream: objects outside the picture do not affect those inside.
        root = self.rng.getrandbits(62)
        self._sky()
        self._ground()
        for number, (*_, job) in enumerate(sorted(self.jobs, key=lambda job: job[:2])):
            job(Random(root + number))
        return self._develop(), self.label

    def _add(self, thing: Callable[..., Any], lateral: float, z: float, layer: int = 2, **options: Any) -> None:
        x = self.centre(z) + lateral
        self.jobs.append((layer, -z, lambda rng: thing(self, rng, x, z, **options)))

    def _drive(self, lateral: float, z: float, towards: bool, lit: bool = True) -> None:
        kind = self.rng.choices(list(things.BODIES), (0.45, 0.3, 0.13, 0.12 * lit))[0]
        self._add(things.vehicle, lateral, z, kind=kind, towards=towards, lit=lit)

    def _houses(self, side: int) -> None:
        """Houses, gardens, parks and their borders."""
        rng, kind, walk, z = self.rng, self.kind[side], self.walk[side], -self.rng.uniform(0, 12)
        while z < REACH and kind != "park":
            end, height = z + rng.uniform(8, 20), rng.uniform(4, 9) if kind == "garden" else rng.uniform(7, 24)
            self._add(things.building, side * self.front[side], z, 0, side=side, end=end, height=height)
            z = end + (rng.uniform(2, 8) if kind == "garden" or rng.random() < 0.25 else 0.0)
        if kind != "town":
            for _ in range(rng.randrange(2, 8)):
                away = rng.uniform(0.8, 2.4 if kind == "garden" else 14.0)
                self._add(things.tree, side * (walk + away), rng.uniform(5, 80), 1)
            self._add(things.border, side * (walk + 0.1), 0.7, 1, side=side, end=rng.uniform(20, 70))

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
        light, rng, sky = self.light, self.rng, np.s_[..., : self.horizon, :]
        phase, wood, height = rng.randrange(512), rng.random() < 0.5, rng.uniform(7, 30)
        tone = pick(rng, self.leaves if wood else things.FACADES) * light.facing((0, 1, -1))
        up, a = 0.02 - self.b[: self.horizon, None], self.a[None]
        fine, wide = (noise(1.5, k / (up + 0.12) + phase, a * k / (up + 0.12)) for k in (90, 11))
        cloud = clip01((wide * 0.75 + fine * 0.35 - 0.95 + 0.62 * light.cloud) * 4) * 0.85 * clip01(up * 12)
        clear = mix(light.horizon, light.zenith, clip01(np.sqrt(up / 0.55)))
        bright = (light.horizon + light.sun * 0.25 + light.ambient * 0.15) * (0.72 + 0.5 * fine)
        self.image[sky], self.label[sky] = mix(clear, bright, cloud), Label.SKY
        along, y = a * 160.0, self.camera_height + up * 160.0
        outline = along * 1.2 if wood else np.floor(along / 14) * 37
        top = height * (0.3 + 0.9 * noise(1.5 if wood else 0.4, np.full(1, phase), outline + phase))
        alpha, label = clip01((top - y) * (self.focal / 160) + 0.5), Label.VEGETATION if wood else Label.BUILDING
        self.paint(tone * (0.5 + noise(0.6, y * 2, along * 2)), alpha, label, sky, z=160.0)

    def _ground(self) -> None:
        rng, phase, first = self.rng, self.rng.randrange(512), self.horizon
        road, *paving = (pick(rng, [rgb(v, v, v) for v in (74, 90, 106, 124, 146)]) for _ in range(3))
        grass, paint = pick(rng, [rgb(88, 108, 48), rgb(120, 114, 70)]), pick(rng, [rgb(212, 210, 202)])
        z = self.camera_height / self.b[first:, None]
        px, pz, x = z / self.focal, z * z / (self.focal * self.camera_height), self.a[None] * z
        lateral = x - self.centre(np.minimum(z, REACH))
        grain = (noise(0.5, z * 26 + phase, x * 26) - 0.5) * clip01(0.08 / pz)  # finer than a pixel far away
        blotch = noise(1.5, z * 7, x * 9 + phase)
        shade = 0.7 + 0.55 * blotch + grain * 0.8
        colour, label = road * shade, self.label[first:]
        label[:] = Label.ROAD
        for line in range(-self.lanes, self.lanes + 1):
            dash = cover(lateral, line * self.lane - 0.07, line * self.lane + 0.07, px) * pulse(z / 12, 0, 0.4, pz / 12)
            colour = mix(colour, paint * shade, dash * clip01(blotch * 5 - 1) * 0.9)
        for side, stone in zip((-1, 1), paving, strict=True):
            kerb, walk = self.kerb[side], self.walk[side] if self.kind[side] != "town" else np.inf
            zones = (kerb - 0.12, road * 0.35, Label.ROAD), (kerb, stone, Label.SIDEWALK), (walk, grass, Label.TERRAIN)
            for edge, tone, kind in zones:
                amount = clip01((lateral * side - edge) / px + 0.5)
                colour = mix(colour, tone * shade, amount)
                label[amount > 0.5] = kind
        self.image[:, first:] = self.fog(colour * self.light_at(x, z, self.light.sun_way[1]), z)

    def _develop(self) -> np.ndarray:
        """Lens, sensor and processing: blur, exposure, colour balance, noise."""
        light, rng, height, width = self.light, self.rng, self.height, self.width
        rise = max(rng.uniform(-0.1, 0.11), 0) * height  # bonnet of the camera car
        rows, across = np.arange(height)[:, None] + 0.5, np.arange(width) / width * 2 - 1
        bonnet = clip01(rows - height + rise * np.sqrt(1 - 0.75 * across**2))
        self.paint(pick(rng, things.PAINTS) * light.ambient, bonnet, IGNORE)
        soft = rng.choice((0.0, rng.uniform(0.3, 1.0))) * min(1, height / 160)
        blurred = avg_pool2d(torch.from_numpy(self.image), 3, 1, 1, count_include_pad=False).numpy()
        image: np.ndarray = mix(self.image, blurred, soft)
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

    classes = tuple(label.name.lower().replace("_", " ") for label in Label)
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
        names, colours = read_classes(CLASSES / "cityscapes.txt")
        self.palette = colours[[names.index(name) for name in self.classes]]
        self.cache: dict[int, tuple[np.ndarray, np.ndarray]] | None = {} if cache else None

    def __len__(self) -> int:
        return self.length

    def generate(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Scene `index` as (image (3, H, W) uint8, label (H, W) uint8), before cache and transform."""
        return Scene(self.size, Random(f"{self.seed}/{self.split}/{index}")).render()

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

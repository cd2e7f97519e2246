"""Generated street scenes: a data set that needs no files, for demonstrations and tests of segmentation training.

Each item is a small world (a street with its pavements, houses, trees, traffic and people, an hour of the day and a
weather) seen through a pinhole camera and painted from far to near with NumPy. Colour alone does not tell the classes
apart: facades share the greys of asphalt and the greens of leaves, posters the colours of signs; light, haze, shadow,
blur and noise differ from picture to picture. Class names and colours are those of Cityscapes where it has them.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from torchvision import tv_tensors

from fastkd.train.data import street_objects as things
from fastkd.train.data.street_canvas import FLOAT, IGNORE, Canvas, clip01, cover, noise, pulse, rgb

SPLITS = {"train": 2000, "val": 200}  # default lengths
REACH = 150.0  # metres of street that are built
Jobs = list[tuple[float, Callable[[], None]]]  # (depth, what paints it)
HEADLIGHT = rgb(255, 244, 220)


MOVING = {"saloon": 0.28, "hatch": 0.27, "estate": 0.2, "van": 0.12, "bus": 0.13}
PARKED = {"saloon": 0.32, "hatch": 0.32, "estate": 0.22, "van": 0.14}
# Half width and height of what throws a shadow on the ground; posts are not listed.
SHADOWS = {things.tree: (1.9, 3.6), things.person: (0.28, 1.4), things.bicycle: (0.4, 0.8), things.clutter: (0.35, 0.8)}


def _draw(rng: random.Random, odds: dict[Any, float]) -> Any:
    """A key of `odds`, by its probability."""
    return rng.choices(list(odds), list(odds.values()))[0]


class Light:
    """Sun, sky and lamps of one scene. Colours are linear light, white about 1."""

    def __init__(self, rng: random.Random) -> None:
        self.hour = _draw(rng, {"clear": 0.38, "overcast": 0.26, "golden": 0.14, "dusk": 0.12, "night": 0.1})
        azimuth = rng.uniform(0, 2 * math.pi)
        elevation = math.radians({"clear": rng.uniform(25, 60), "golden": rng.uniform(8, 18)}.get(self.hour, 45.0))
        self.sun_way = (
            math.cos(elevation) * math.sin(azimuth), math.sin(elevation), math.cos(elevation) * math.cos(azimuth)
        )  # fmt: skip
        tint = np.array([[[rng.uniform(0.94, 1.06)]] for _ in range(3)], dtype=FLOAT)
        self.lamps = 0.0
        self.cloud = float(rng.uniform(0, 0.9))
        if self.hour == "clear":
            self.sun, self.ambient = rgb(255, 246, 228) * rng.uniform(1.0, 1.5), rgb(176, 190, 214) * 0.85
            self.zenith, self.horizon = rgb(82, 136, 206) * tint, rgb(192, 214, 232) * tint
        elif self.hour == "overcast":
            self.sun, self.ambient = rgb(0, 0, 0), rgb(206, 210, 216) * rng.uniform(0.8, 1.2)
            self.zenith, self.horizon = rgb(166, 172, 180) * tint, rgb(206, 208, 210) * tint
            self.cloud = float(rng.uniform(0.7, 1.0))
        elif self.hour == "golden":
            self.sun, self.ambient = rgb(255, 196, 128) * 1.5, rgb(138, 142, 172) * 0.8
            self.zenith, self.horizon = rgb(110, 142, 190) * tint, rgb(250, 208, 158) * tint
        elif self.hour == "dusk":
            self.sun, self.ambient = rgb(0, 0, 0), rgb(112, 122, 158) * rng.uniform(0.8, 1.3)
            self.zenith, self.horizon = rgb(52, 70, 116) * tint, rgb(214, 160, 140) * tint
            self.lamps = 0.5
        else:
            self.sun, self.ambient = rgb(0, 0, 0), rgb(62, 66, 84) * rng.uniform(0.7, 1.4)
            self.zenith, self.horizon = rgb(12, 15, 28), rgb(46, 44, 54)
            self.lamps = 0.9
        self.mirror = 0.5 * (self.zenith + self.horizon)

    def facing(self, normal: tuple[float, float, float]) -> np.ndarray:
        """The light on a surface with this normal (any length), out of every shadow."""
        lean = sum(n * s for n, s in zip(normal, self.sun_way, strict=True)) / math.hypot(*normal)
        base = self.ambient * 0.9 + self.sun * (max(0.0, lean) * 0.9)
        return base + rgb(255, 206, 138) * (0.10 * self.lamps)

    def side(self, side: int) -> float:
        """How much lighter the flank of a vehicle is than its end, for the flank on the camera's side of it."""
        return 0.92 - 0.22 * side * self.sun_way[0]

    def at(self, scene: Scene, x: float, z: float) -> np.ndarray:
        """The light on something upright at (x, z): less in a shadow, more in a lamp's or the headlights' cone."""
        lit = 0.75 * scene.sunlit(x, z) if self.sun.any() else 0.0
        light = self.ambient + self.sun * lit
        if self.lamps:
            beam = math.exp(-((x / (1.5 + 0.12 * z)) ** 2)) * min(1.0, (9.0 / max(z, 3.0)) ** 1.5)
            near = sum(1 / (1 + ((x - lx) ** 2 + (z - lz) ** 2) / 16) for lx, lz in scene.lamp_posts)
            light = light + HEADLIGHT * (0.9 * self.lamps * beam) + rgb(255, 206, 138) * (0.3 * self.lamps * near)
        return light


class Scene:
    """One world and the picture of it. `paint()` gives (image (3, H, W) uint8, label (H, W) uint8)."""

    def __init__(self, height: int, width: int, rng: random.Random) -> None:
        self.rng = rng
        self.light = light = Light(rng)
        self.leaves = things.AUTUMN + things.LEAVES[:2] if rng.random() < 0.2 else things.LEAVES
        focal = rng.uniform(0.75, 1.05) * math.sqrt(2 * height * width)
        centre = (width * rng.uniform(0.44, 0.56), height * rng.uniform(0.38, 0.5))
        visibility = _draw(rng, {1200.0: 0.4, 500.0: 0.3, 220.0: 0.2, 80.0: 0.1})
        self.canvas = Canvas(height, width, focal, centre, rng.uniform(1.25, 1.75), light.horizon, visibility)

        # The street's cross-section, metres from the centre line; sides are -1 (left) and 1 (right).
        lanes = rng.randrange(1, 3)
        self.lane = rng.uniform(2.9, 3.5)
        self.parking = {s: bool(rng.random() < 0.6) for s in (-1, 1)}
        self.kerb = {s: self.lane * lanes + 2.2 * self.parking[s] for s in (-1, 1)}
        self.verge = {s: self.kerb[s] + (rng.uniform(0.8, 2.4) if rng.random() < 0.35 else 0.0) for s in (-1, 1)}
        self.walk = {s: self.verge[s] + rng.uniform(1.8, 4.5) for s in (-1, 1)}
        self.kind = {s: _draw(rng, {"town": 0.58, "garden": 0.27, "park": 0.15}) for s in (-1, 1)}
        self.front = {
            s: self.walk[s] + {"town": 0.05, "garden": rng.uniform(3, 7), "park": 40.0}[self.kind[s]] for s in (-1, 1)
        }
        self.lanes = lanes
        own = self.lane * (rng.randrange(lanes) + 0.5) + rng.uniform(-0.4, 0.4)
        self.bend = (-own, rng.uniform(-0.05, 0.05), rng.uniform(-1, 1) * (1 / 900 if rng.random() < 0.5 else 1 / 4000))
        self.cross = (rng.uniform(16, 60), rng.uniform(8, 14)) if rng.random() < 0.5 else (1e6, 0.0)
        self.zebra = rng.uniform(9, 35) if rng.random() < 0.25 else None
        self.lamp_posts: list[tuple[float, float]] = []
        self.shadows: list[tuple[float, float, float, float, float]] = []  # x, z, half width, length, height

        # What the sun's side throws its shadow with: the height of the houses at every metre of depth.
        self.blocks: list[tuple[int, float, float, float, float]] = []  # side, z0, z1, height, hidden
        self.roofs = {s: np.zeros(512, dtype=FLOAT) for s in (-1, 1)}
        for side in (-1, 1):
            self._build_blocks(side)

    def _build_blocks(self, side: int) -> None:
        rng = self.rng
        if self.kind[side] == "park":
            return
        z, before, hidden = -rng.uniform(0, 12), -1e6, 0.0
        low = self.kind[side] == "garden"
        cross0, cross1 = self.cross[0] - 3, self.cross[0] + self.cross[1] + 3
        while z < REACH:
            length = rng.uniform(8, 14) if low else rng.uniform(8, 26)
            height = rng.uniform(4, 9) if low else rng.uniform(7, 24)
            end = z + length
            if z < cross1 and end > cross0:  # the cross street stays free
                end = cross0 if z < cross0 - 4 else z
            if end > z:
                self.blocks.append((side, z, end, height, hidden if z - before < 0.1 else 0.0))
                before, hidden = end, height
                self.roofs[side][max(0, int(z)) : max(0, int(end))] = height
                z = end + (rng.uniform(2, 8) if low else (0.0 if rng.random() < 0.75 else rng.uniform(2, 9)))
            else:
                z = cross1

    def place(self, z: float, lateral: float) -> tuple[float, float]:
        """x of the point `lateral` metres right of the centre line at depth z, and the street's dx/dz there."""
        c0, c1, c2 = self.bend
        return c0 + c1 * z + c2 * z * z + lateral, c1 + 2 * c2 * z

    def sunlit(self, x: float, z: float) -> float:
        """1 in the sun, 0 in the shadow of a house."""
        sx, sy, sz = self.light.sun_way
        side = 1 if sx > 0 else -1
        lateral = (x - self.place(z, 0)[0]) * side
        reach = max(self.front[side] - lateral, 0.0) / max(abs(sx), 0.05)
        roof = float(self.roofs[side][min(max(int(z + reach * sz), 0), 511)])
        return float(min(max((reach * sy - roof) / 0.8 + 0.5, 0.0), 1.0))

    def paint(self) -> tuple[np.ndarray, np.ndarray]:
        rng = self.rng
        # Each thing draws its details from its own stream: what is out of the picture does not change what is in it.
        root = rng.getrandbits(62)
        jobs = self._jobs()
        self._sky()
        self._skyline()
        self._ground()
        for x, z, half, length, height in self.shadows:
            self._shadow(x, z, half, length, height)
        for number, (_, job) in enumerate(jobs):
            self.rng = random.Random(root + number)
            job()
        self.rng = random.Random(root - 1)
        return self._develop(), self.canvas.label

    # Composition -------------------------------------------------------------------------------------------------

    def _jobs(self) -> Jobs:
        """Everything above the ground, in painting order: what is behind the pavements first, then by depth."""
        rng = self.rng
        back: Jobs = []
        fore: Jobs = []
        cross0, cross1 = self.cross[0], self.cross[0] + self.cross[1]

        def free(z: float) -> bool:
            return not cross0 - 2 < z < cross1 + 2

        for side, z0, z1, height, hidden in self.blocks:
            depth = float(rng.uniform(9, 16))
            back.append((z0, partial(things.building, self, side, self.front[side], z0, z1, height, depth, hidden)))
        if cross0 < 1e5:
            for side in (-1, 1):
                if rng.random() < 0.6:
                    z = rng.uniform(cross0 + 2, cross1 - 2)
                    x = self.place(z, side * (self.front[side] + rng.uniform(-2, 8)))[0]
                    kind = _draw(rng, MOVING)
                    back.append((z, partial(things.crossing_car, self, x, z, kind=kind, heading=rng.choice((-1, 1)))))
        back.sort(key=lambda job: -job[0])

        middle: Jobs = []
        for side in (-1, 1):
            if self.kind[side] == "town":
                continue
            for _ in range(rng.randrange(3, 9) if self.kind[side] == "park" else rng.randrange(5)):
                z = rng.uniform(5, 80)
                if free(z):
                    spread = rng.uniform(1.0, 14.0) if self.kind[side] == "park" else rng.uniform(0.8, 2.4)
                    x = self.place(z, side * (self.walk[side] + spread))[0]
                    middle.append((z, partial(things.tree, self, x, z)))
        middle.sort(key=lambda job: -job[0])
        for side in (-1, 1):
            border = rng.random()
            if self.kind[side] == "town" or border > 0.85:
                continue
            for z0, z1 in ((0.7, min(cross0 - 2, 70.0)), (cross1 + 2, 70.0)):
                if z1 - z0 > 3:
                    thing = things.fence if border < 0.55 else things.hedge
                    middle.append((z0, partial(thing, self, side, self.walk[side] + 0.1, z0, z1)))

        for side in (-1, 1):
            self._roadside(side, fore, free)
        self._traffic(fore)
        fore.sort(key=lambda job: -job[0])
        return back + middle + fore

    def _roadside(self, side: int, fore: Jobs, free: Callable[[float], bool]) -> None:
        rng = self.rng
        kerb, walk = self.kerb[side], self.walk[side]

        def add(z: float, lateral: float, thing: Callable, **options: Any) -> None:
            fore.append((z, partial(thing, self, self.place(z, side * lateral)[0], z, **options)))

        if rng.random() < 0.55:
            z, step = rng.uniform(5, 14), rng.uniform(8, 16)
            while z < 75:
                if free(z) and rng.random() < 0.85:
                    add(z, kerb + 0.7, things.tree)
                z += step * rng.uniform(0.9, 1.1)
        z, step = rng.uniform(6, 22), rng.uniform(18, 30)
        height = rng.uniform(5, 8)
        while z < 80:
            if free(z):
                add(z, kerb + 0.4, things.pole, height=height, lamp=-side)
                self.lamp_posts.append((self.place(z, side * (kerb - 1.4))[0], z))
            z += step
        for _ in range(rng.randrange(4)):
            z = rng.uniform(4, 45)
            if free(z):
                add(
                    z,
                    kerb + rng.uniform(0.3, 0.6),
                    things.pole,
                    height=rng.uniform(0.9, 4.5),
                    width=rng.uniform(0.04, 0.09),
                )
        for _ in range(rng.randrange(5)):
            z = rng.uniform(6, 45)
            if free(z):
                add(z, kerb + rng.uniform(0.35, 0.7), things.sign)
        if self.cross[0] < 1e5:
            for z in (self.cross[0] - 1.5, self.cross[0] + self.cross[1] + 1.0):
                if rng.random() < 0.75:
                    add(z, kerb + 0.4, things.traffic_light, arm=-side)
        elif rng.random() < 0.3:
            add(rng.uniform(9, 40), kerb + 0.4, things.traffic_light, arm=-side)
        if self.parking[side]:
            z, busy = rng.uniform(2.5, 9), rng.uniform(0.3, 0.95)
            while z < 60:
                if free(z) and free(z + 5) and rng.random() < busy:
                    kind = _draw(rng, PARKED)
                    towards = bool(rng.random() < (0.15 if side > 0 else 0.85))
                    self._drive(fore, side * (kerb - 1.05), z, kind=kind, towards=towards, parked=True)
                z += rng.uniform(5.8, 7.5)
        for _ in range(rng.randrange(4) if rng.random() < 0.6 else 0):
            z = rng.uniform(4, 26)
            if free(z):
                add(
                    z,
                    rng.uniform(kerb + 0.5, walk - 0.4),
                    things.bicycle,
                    ridden=False,
                    across=bool(rng.random() < 0.75),
                )
        for _ in range(rng.randrange(3)):
            z = rng.uniform(4, 40)
            add(z, rng.uniform(kerb + 0.4, walk - 0.3), things.clutter)
        crowd = rng.uniform(0, 9) if self.kind[side] == "town" else rng.uniform(0, 5)
        z = 4.0
        for _ in range(int(crowd)):
            z = rng.uniform(4.5, 50) if rng.random() < 0.7 else z + rng.uniform(0.2, 0.8)  # some walk together
            add(
                z,
                rng.uniform(kerb + 0.4, walk - 0.3),
                things.person,
                height=rng.uniform(1.5, 1.92) if rng.random() < 0.9 else rng.uniform(1.0, 1.3),
            )

    def _stand(self, jobs: Jobs, thing: Callable[..., None], lateral: float, z: float, **options: Any) -> None:
        x = self.place(z, lateral)[0]
        jobs.append((z, partial(thing, self, x, z, **options)))
        if z < 45:
            half, height = SHADOWS.get(thing, (0.1, options.get("height", 2.5)))
            self.shadows.append((x, z, half, 2 * half, height))

    def _drive(self, jobs: Jobs, lateral: float, z: float, *, kind: str, towards: bool, parked: bool = False) -> None:
        jobs.append((z, partial(things.vehicle, self, lateral, z, kind=kind, towards=towards, parked=parked)))
        if z < 60:
            length, width, height = things.BODIES[kind][:3]
            self.shadows.append((self.place(z, lateral)[0], z + length / 2, width * 0.55, length, height))

    def _traffic(self, fore: Jobs) -> None:
        rng = self.rng
        for direction in (-1, 1):
            for lane in range(self.lanes):
                lateral = direction * self.lane * (lane + 0.5)
                own = abs(lateral + self.bend[0]) < 1.5
                z = rng.uniform(8, 40) if own else rng.uniform(4, 30)
                while z < 80:
                    if rng.random() < 0.65:
                        kind = _draw(rng, MOVING)
                        self._drive(fore, lateral + rng.uniform(-0.3, 0.3), z, kind=kind, towards=direction < 0)
                    z += rng.uniform(14, 45)
            if rng.random() < 0.45:
                z = rng.uniform(6, 30)
                lateral = direction * (self.kerb[direction] - (2.9 if self.parking[direction] else 0.8))
                self._stand(fore, things.bicycle, lateral, z, ridden=True, across=False)
        crossing = self.zebra if self.zebra is not None else rng.uniform(10, 40)
        if rng.random() < (0.8 if self.zebra is not None else 0.3):
            for _ in range(rng.randrange(1, 5)):
                z = crossing + rng.uniform(0.3, 2.6)
                lateral = rng.uniform(-self.kerb[-1], self.kerb[1])
                if rng.random() < 0.75:
                    self._stand(fore, things.person, lateral, z, height=rng.uniform(1.5, 1.9))
                else:
                    self._stand(fore, things.bicycle, lateral, z, ridden=True, across=True)

    # Sky and ground ----------------------------------------------------------------------------------------------

    def _sky(self) -> None:
        canvas, light, rng = self.canvas, self.light, self.rng
        rows = int(np.searchsorted(canvas.b, 0.0))
        phase = [rng.randrange(512) for _ in range(2)]
        density, stretch = light.cloud, rng.uniform(1.5, 4.0)
        if rows == 0:
            return
        up = -canvas.b[:rows, None] + 0.02
        t = clip01(np.sqrt(up / 0.55))
        sky = light.horizon + t * (light.zenith - light.horizon) + 0 * canvas.a
        depth = 1 / (up + 0.12)
        fine = noise(1.5, depth * 40 * stretch + phase[0], canvas.a[None] * depth * 30 * stretch + phase[1])
        wide = noise(1.5, depth * 11 + phase[1], canvas.a[None] * depth * 9 + phase[0])
        thick = clip01((wide * 0.75 + fine * 0.35 - (0.95 - 0.62 * density)) * 4)
        body = (light.horizon + light.sun * 0.25) * 1.05 + light.ambient * 0.15
        cloud = body * (0.72 + 0.5 * fine)
        sky += (thick * 0.85 * clip01(up * 12)) * (cloud - sky)
        sx, sy, sz = light.sun_way
        if light.sun.any() and sz > 0.1:
            d2 = (canvas.a[None] - (sx / sz)) ** 2 + (canvas.b[:rows, None] + (sy / sz)) ** 2
            sky += light.sun * (0.35 * np.exp(-d2 * 9) + 1.2 * np.exp(-d2 * 400))
        canvas.image[:, :rows] = sky
        canvas.label[:rows] = things.SKY

    def _skyline(self) -> None:
        """What closes the street: one or two hazy ranges of houses and trees."""
        canvas, rng = self.canvas, self.rng
        for z, scale in ((300.0, 1.8), (160.0, 1.0)):
            wood = rng.random() < 0.5
            phase, height = rng.randrange(512), rng.uniform(7, 22) * scale
            colour = things.pick(self, self.leaves if wood else things.FACADES) * self.light.facing((0, 1, -1))
            along = canvas.a * z
            if wood:
                top = height * (
                    0.4
                    + 0.5 * noise(1.5, np.full(1, phase), along * 1.2 + phase)
                    + 0.35 * noise(0.6, np.full(1, phase), along * 3)
                )
            else:
                top = height * (0.3 + 0.9 * noise(0.4, np.full(1, phase), np.floor(along / 14) * 37 + phase))
            rows = canvas.span(canvas.cy - canvas.focal * 1.8 * height / z, canvas.cy + 2, canvas.height)
            if rows is None:
                continue
            y = canvas.camera_height - canvas.b[rows][:, None] * z
            alpha = clip01((top[None] - y) * (canvas.focal / z) + 0.5)
            grain = 0.5 + noise(0.6, y * 2 + phase, along[None] * 2)
            if not wood:
                grain = grain * (
                    1
                    - 0.4
                    * pulse(along / 5, 0.3, 0.7, z / canvas.focal / 5)
                    * pulse(y / 4, 0.3, 0.7, z / canvas.focal / 4)
                )
            canvas.paint(
                rows, slice(0, canvas.width), colour * grain, alpha, things.VEGETATION if wood else things.BUILDING, z
            )

    def _ground(self) -> None:
        canvas, light, rng = self.canvas, self.light, self.rng
        first = int(np.searchsorted(canvas.b, canvas.camera_height / 2000))
        road = things.pick(self, [rgb(86, 86, 90), rgb(104, 102, 100), rgb(70, 70, 76), rgb(120, 118, 114)])
        stone = [rgb(128, 124, 118), rgb(106, 104, 102), rgb(150, 144, 136), rgb(140, 120, 108), rgb(90, 90, 92)]
        paving = {s: things.pick(self, stone) for s in (-1, 1)}
        grass = things.pick(self, [rgb(88, 108, 48), rgb(104, 116, 62), rgb(120, 114, 70), rgb(72, 94, 48)])
        paint = things.pick(self, [rgb(216, 214, 206), rgb(188, 186, 180), rgb(214, 182, 90)], 0.06)
        slab, wear, edge_line = rng.uniform(0.5, 1.2), rng.uniform(0.35, 0.95), rng.random() < 0.5
        solid, patched = rng.random() < 0.35, rng.random() < 0.4
        phase = [rng.randrange(512) for _ in range(4)]
        if first >= canvas.height:
            return
        b = canvas.b[first:, None]
        z = canvas.camera_height / b
        px, pz = z / canvas.focal, z * z / (canvas.focal * canvas.camera_height)
        x = canvas.a[None] * z
        c0, c1, c2 = (c for c in self.bend)
        lateral = x - (c0 + c1 * z + c2 * np.minimum(z, REACH) ** 2)
        grain = noise(0.5, z * 26 + phase[0], x * 26 + phase[1]) - 0.5
        blotch = noise(1.5, z * 7 + phase[2], x * 9 + phase[3])
        near = clip01(0.08 / pz)  # grain is finer than a pixel far away
        shade = 0.7 + 0.55 * blotch + grain * near * 0.8
        for track in (-0.75, 0.75):  # tyres polish the lanes
            shade = shade - 0.05 * pulse((lateral / self.lane + (track / self.lane)), 0.4, 0.6, px / self.lane)
        if patched:
            patch = pulse(z / 23 + (phase[0] / 512), 0.2, 0.42, pz / 23) * cover(lateral, -0.4, self.lane * 0.9, px)
            shade = shade * (1 - 0.25 * patch)
        colour = road * shade
        label = np.full(lateral.shape, things.ROAD, dtype=np.uint8)

        def blend(amount: np.ndarray, tone: np.ndarray) -> None:
            nonlocal colour
            colour += amount * (tone - colour)

        cross = cover(z, self.cross[0], self.cross[0] + self.cross[1], pz)
        open_road = 1 - cross
        worn = clip01((blotch - (1 - wear)) * 5 + 0.5) * 0.9
        marks = cover(lateral, -0.07, 0.07, px) * (1 if solid else pulse(z / 9, 0, 0.5, pz / 9))
        for side in (-1, 1):
            for lane in range(1, self.lanes + 1):
                at = side * self.lane * lane
                if lane < self.lanes:
                    marks = marks + cover(lateral, at - 0.06, at + 0.06, px) * pulse(z / 12, 0, 0.35, pz / 12)
                elif edge_line or self.parking[side]:
                    marks = marks + cover(lateral, at - 0.06, at + 0.06, px)
        marks = marks * open_road
        if self.cross[0] < 1e5:
            stop = cover(z, self.cross[0] - 2.0, self.cross[0] - 1.55, pz) * cover(
                lateral, 0.1, self.lane * self.lanes, px
            )
            marks = marks * (z < self.cross[0] - 1.5) + marks * (z > self.cross[0] + self.cross[1]) + stop
        if self.zebra is not None:
            bars = pulse(lateral, 0.0, 0.5, px) * cover(z, self.zebra, self.zebra + 3.0, pz)
            marks = np.maximum(marks * (1 - cover(z, self.zebra - 1, self.zebra + 4, pz)), bars)
        blend(clip01(marks) * worn, paint * shade)

        for side in (-1, 1):
            q = lateral * side
            kerb, verge, walk = self.kerb[side], self.verge[side], self.walk[side]
            beyond = clip01((q - kerb) / px + 0.5) * open_road
            joints = np.maximum(pulse(q / slab, 0, 0.05, px / slab), pulse(z / slab, 0, 0.05, pz / slab))
            stones = paving[side] * (0.72 + 0.5 * blotch + grain * near * 0.7 - 0.3 * joints)
            blend(beyond, stones)
            label[beyond > 0.5] = things.SIDEWALK
            blend(cover(q, kerb, kerb + 0.14, px) * open_road, rgb(150, 148, 142) * shade)
            blend(cover(q, kerb - 0.12, kerb, px) * open_road * 0.55, road * 0.35)
            lawn = cover(q, kerb + 0.14, verge, px) if verge > kerb + 0.3 else None
            if self.kind[side] != "town":
                outer = clip01((q - walk) / px + 0.5)
                lawn = outer if lawn is None else np.maximum(lawn, outer)
            if lawn is not None:
                lawn = lawn * open_road
                blades = 0.5 + 0.7 * blotch + grain * (0.4 + near) * 1.2
                blend(lawn, grass * blades)
                label[lawn > 0.5] = things.TERRAIN

        lit = np.ones_like(lateral)
        if light.sun.any():
            sx, sy, sz = light.sun_way
            side = 1 if sx > 0 else -1
            reach = np.maximum(self.front[side] - lateral * side, 0) / (max(abs(sx), 0.05))
            roof = self.roofs[side][np.minimum(np.maximum(z + reach * sz, 0), 511).astype(np.int32)]
            lit = clip01((reach * sy - roof) / np.maximum(0.5, px * 2) + 0.5)
        base = light.ambient + 0 * lit
        if light.sun.any():
            base = base + (light.sun * light.sun_way[1]) * lit
        if light.lamps:
            beam = np.exp(-((x / (1.5 + 0.2 * z)) ** 2)) * np.minimum(1, (9 / z) ** 1.5) * clip01(z / 8)
            base = base + HEADLIGHT * ((0.8 * light.lamps) * beam)
            pool = np.zeros_like(lateral)
            for lx, lz in self.lamp_posts[:8]:
                pool += 1 / (1 + ((x - lx) ** 2 + (z - lz) ** 2) / 16)
            base = base + rgb(255, 206, 138) * ((0.35 * light.lamps) * pool)
        fog = 1 - np.exp(z * (-1 / canvas.visibility))
        colour *= base
        colour += fog * (canvas.haze - colour)
        canvas.image[:, first:] = colour
        canvas.label[first:] = label

    def _shadow(self, x: float, z: float, half: float, length: float, height: float) -> None:
        """The dark under something that stands on the ground at (x, z); in the sun, its cast shadow too."""
        canvas, light = self.canvas, self.light
        sun = light.sun.any() and self.sunlit(x, z) > 0.5
        throw = min(height / light.sun_way[1], 9.0) if sun else 0.0
        x1, z1 = x - throw * light.sun_way[0], z - throw * light.sun_way[2]
        z_low, z_high = max(min(z, z1) - length * 0.7, 1.0), max(z, z1) + length * 0.7
        rows = canvas.span(
            canvas.cy + canvas.focal * canvas.camera_height / z_high,
            canvas.cy + canvas.focal * canvas.camera_height / z_low,
            canvas.height,
        )
        edges = [
            canvas.cx + canvas.focal * e / d
            for e in (min(x, x1) - half * 1.3, max(x, x1) + half * 1.3)
            for d in (z_low, z_high)
        ]
        columns = canvas.span(min(edges), max(edges), canvas.width)
        if rows is None or columns is None:
            return
        depth = canvas.camera_height / canvas.b[rows][:, None]
        across = canvas.a[columns][None] * depth
        dx, dz = x1 - x, z1 - z
        square = dx * dx + dz * dz
        t = clip01(((across - x) * dx + (depth - z) * dz) / square) if square > 1e-4 else 0
        d = np.sqrt(((across - x - t * dx) / half) ** 2 + ((depth - z - t * dz) / (length / 2)) ** 2)
        dark = clip01((1.2 - d) * 2.5) * (0.6 if sun else 0.35)
        canvas.image[:, rows, columns] *= 1 - dark

    # The camera --------------------------------------------------------------------------------------------------

    def _develop(self) -> np.ndarray:
        """Lens, sensor and processing: own bonnet, wet road, bloom, blur, vignette, exposure, colour balance, noise."""
        canvas, light, rng = self.canvas, self.light, self.rng
        image: np.ndarray = canvas.image
        height = canvas.height
        if rng.random() < 0.2:
            self._wet()
        if rng.random() < 0.6:
            self._bonnet()
        if light.lamps:
            image = image + 0.22 * _soft(np.maximum(image - 0.35, 0), max(2, height // 24))
        blur = _draw(rng, {0.0: 0.3, 0.35: 0.5, 0.7: 0.2}) * min(1.0, height / 160)
        if blur:
            image = _blur(image, blur)
        # The camera meters: it evens out most of the difference between scenes, less so at night, and errs a little.
        aim, trust = {"dusk": (0.16, 0.8), "night": (0.12, 0.7)}.get(light.hour, (0.27, 0.8))
        gain = (aim / max(float(image[:, ::4, ::4].mean()), 0.01)) ** trust * rng.uniform(0.8, 1.2)
        balance = np.array([[[gain * rng.uniform(0.93, 1.07)]] for _ in range(3)], dtype=FLOAT)
        radius = (canvas.a[None] ** 2 + canvas.b[:, None] ** 2) / (float(canvas.a[0] ** 2 + canvas.b[0] ** 2) + 1e-6)
        fall = 1 - rng.uniform(0.05, 0.3) * clip01(radius)
        image = image * (fall * balance)
        image = image * (1 + 0.12 * image) / (1 + 0.45 * image)  # highlights roll off
        image = np.sqrt(np.maximum(image, 0)) * 255
        level = rng.uniform(1.0, 4) * (2.2 if light.hour == "night" else 1.0)
        image += level * np.random.Generator(np.random.SFC64(rng.getrandbits(63))).standard_normal(
            image.shape, dtype=FLOAT
        )
        return np.minimum(np.maximum(image + 0.5, 0), 255).astype(np.uint8)

    def _wet(self) -> None:
        """A wet road mirrors what stands above the horizon in the same column."""
        canvas = self.canvas
        first = int(np.searchsorted(canvas.b, 0.0))
        rows = np.arange(first, canvas.height)
        above = np.maximum(2 * first - 1 - rows, 0)
        road = (canvas.label[first:] == things.ROAD).astype(FLOAT)
        glance = np.exp(-canvas.b[first:] * 2.5)[:, None] * 0.4
        puddle = noise(1.5, canvas.camera_height / np.maximum(canvas.b[first:, None], 1e-3) * 9, canvas.a[None] * 60)
        amount = road * glance * (0.35 + puddle)
        canvas.image[:, first:] *= 1 - 0.3 * road
        canvas.image[:, first:] += amount * (canvas.image[:, above] - canvas.image[:, first:])

    def _bonnet(self) -> None:
        canvas, rng = self.canvas, self.rng
        rise = rng.uniform(0.04, 0.11) * canvas.height
        colour = things.pick(self, things.PAINTS) * self.light.facing((0, 1, 0.3)) * 0.7
        columns = (np.arange(canvas.width, dtype=FLOAT) + 0.5) / canvas.width * 2 - 1
        top = canvas.height - rise * np.sqrt(np.maximum(1 - 0.75 * columns**2, 0))
        start = max(int(canvas.height - rise - 1), 0)
        rows = np.arange(start, canvas.height, dtype=FLOAT)[:, None] + 0.5
        alpha = clip01(rows - top[None] + 0.5)
        gloss = np.exp(-((rows - top[None]) / (0.25 * rise + 0.5)))
        tone = colour + (self.light.mirror * 0.6) * gloss
        canvas.paint(slice(start, canvas.height), slice(0, canvas.width), tone, alpha, IGNORE, 0.0)


def _blur(image: np.ndarray, side: float) -> np.ndarray:
    """Three taps (side, 1, side) / (1 + 2 side) down and across; edges repeat."""
    centre = 1 / (1 + 2 * side)
    for axis in (1, 2):
        out = image * centre
        a, b = [slice(None)] * 3, [slice(None)] * 3
        a[axis], b[axis] = slice(1, None), slice(None, -1)
        out[tuple(a)] += (side * centre) * image[tuple(b)]
        out[tuple(b)] += (side * centre) * image[tuple(a)]
        first, last = [slice(None)] * 3, [slice(None)] * 3
        first[axis], last[axis] = slice(0, 1), slice(-1, None)
        out[tuple(first)] += (side * centre) * image[tuple(first)]
        out[tuple(last)] += (side * centre) * image[tuple(last)]
        image = out
    return image


def _soft(image: np.ndarray, step: int) -> np.ndarray:
    """A wide blur: means of step x step blocks, smoothed and spread back by linear interpolation."""
    _, height, width = image.shape
    pad = np.pad(image, ((0, 0), (0, -height % step), (0, -width % step)), mode="edge")
    small = pad.reshape(3, pad.shape[1] // step, step, pad.shape[2] // step, step).mean(axis=(2, 4))
    small = _blur(_blur(small, 1), 1)
    for axis, size in ((1, height), (2, width)):
        at = np.clip((np.arange(size, dtype=FLOAT) + 0.5) / step - 0.5, 0, small.shape[axis] - 1)
        low = at.astype(np.int32)
        high = np.minimum(low + 1, small.shape[axis] - 1)
        t = (at - low.astype(FLOAT)).reshape((-1, 1) if axis == 1 else -1)
        small = np.take(small, low, axis) * (1 - t) + np.take(small, high, axis) * t
    return small


class StreetScenes(Dataset):
    """Generated street scenes with 15 classes.

    Item `i` is `(tv_tensors.Image uint8 (3, H, W), tv_tensors.Mask uint8 (H, W))` and depends on (seed, split, i) and the
    size alone. Splits never share a scene. Void (255): the camera car's bonnet and clutter on the pavement.

    split: "train" | "val". size: (height, width), each at least 16. length: number of items (2000 train, 200 val).
    cache: keep generated items in memory, H·W·4 bytes each, per process. transform: called on (image, mask), after
    the cache. `ValueError` for any other value.
    """

    classes = things.CLASSES
    palette = np.array(
        [
            (128, 64, 128), (244, 35, 232), (70, 70, 70), (190, 153, 153), (153, 153, 153), (250, 170, 30), (220, 220, 0),
            (107, 142, 35), (152, 251, 152), (70, 130, 180), (220, 20, 60), (255, 0, 0), (0, 0, 142), (0, 60, 100),
            (119, 11, 32),
        ],
        dtype=np.uint8,
    )  # fmt: skip
    ignore_index = IGNORE

    def __init__(
        self,
        split: str,
        *,
        size: tuple[int, int] = (256, 512),
        length: int | None = None,
        seed: int = 0,
        cache: bool = False,
        transform: Callable[..., Any] | None = None,
    ) -> None:
        if split not in SPLITS:
            raise ValueError(f"StreetScenes: unknown split {split!r}; expected one of {', '.join(SPLITS)}")
        if len(size) != 2 or min(size) < 16:
            raise ValueError(f"StreetScenes: size must be (height, width), both at least 16, got {size}")
        if seed < 0 or (length is not None and length < 1):
            raise ValueError(f"StreetScenes: seed must be >= 0 and length >= 1, got seed={seed}, length={length}")
        self.split, self.size, self.seed, self.transform = split, (int(size[0]), int(size[1])), seed, transform
        self.length = SPLITS[split] if length is None else length
        self.cache: dict[int, tuple[torch.Tensor, torch.Tensor]] | None = {} if cache else None

    def __len__(self) -> int:
        return self.length

    def generate(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Scene `index` as (image (3, H, W) uint8, label (H, W) uint8), before cache and transform."""
        return Scene(*self.size, random.Random(f"{self.seed}/{self.split}/{index}")).paint()

    def prefetch(self) -> None:
        """Generate every item into the cache now."""
        if self.cache is None:
            raise ValueError("StreetScenes: prefetch needs cache=True")
        for index in range(self.length):
            self._load(index)

    def _load(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        if self.cache is not None and index in self.cache:
            return self.cache[index]
        image, label = self.generate(index)
        pair = (torch.from_numpy(image), torch.from_numpy(label))
        if self.cache is not None:
            self.cache[index] = pair
        return pair

    def __getitem__(self, index: int) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
        if not -self.length <= index < self.length:
            raise IndexError(f"StreetScenes: item {index} of {self.length}")
        image, label = self._load(index % self.length)
        if self.cache is not None:  # a transform may write in place
            image, label = image.clone(), label.clone()
        item = (tv_tensors.Image(image), tv_tensors.Mask(label))
        return item if self.transform is None else self.transform(*item)

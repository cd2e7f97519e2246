"""What stands in a generated street: buildings, fences, trees, poles, signs, vehicles, people. Each paints itself.

Sizes are metres. Every function takes the scene (`street_scenes.Scene`: canvas, light, rng) and a place, and draws colour
and label together. Details are left out when they would be under a pixel or two.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from fastkd.train.data.street_canvas import (
    FLOAT,
    IGNORE,
    Shape,
    Wall,
    bar,
    box,
    clip01,
    cover,
    diamond,
    disc,
    noise,
    pulse,
    rgb,
    ring,
    round_box,
    taper,
)  # fmt: skip

if TYPE_CHECKING:
    from fastkd.train.data.street_scenes import Scene

CLASSES = (
    "road", "sidewalk", "building", "fence", "pole", "traffic light", "traffic sign", "vegetation",
    "terrain", "sky", "person", "rider", "car", "bus", "bicycle",
)  # fmt: skip
(
    ROAD, SIDEWALK, BUILDING, FENCE, POLE, TRAFFIC_LIGHT, TRAFFIC_SIGN, VEGETATION,
    TERRAIN, SKY, PERSON, RIDER, CAR, BUS, BICYCLE,
) = range(len(CLASSES))  # fmt: skip

BLACK, WHITE = rgb(16, 16, 18), rgb(235, 235, 232)
TYRE, GLASS = rgb(26, 26, 28), rgb(38, 46, 54)
# Facades: the greys of the road and the pavement, the greens of leaves and the blues of the sky are all among them.
FACADES = [
    rgb(*c) for c in (
        (176, 164, 148), (150, 92, 74), (196, 178, 140), (128, 128, 128), (104, 106, 110), (208, 202, 192), (122, 138, 112),
        (166, 128, 100), (92, 96, 104), (140, 152, 166), (188, 150, 130), (86, 104, 82), (222, 214, 200), (120, 84, 72),
    )
]  # fmt: skip
PAINTS = [
    rgb(*c) for c in (
        (28, 28, 32), (60, 62, 66), (120, 122, 126), (178, 180, 184), (228, 228, 226), (130, 24, 26), (34, 52, 98),
        (84, 108, 132), (52, 74, 56), (156, 140, 112), (186, 120, 40), (100, 20, 40), (96, 100, 104), (212, 208, 198),
        (54, 46, 44),
    )
]  # fmt: skip
CLOTHES = [
    rgb(*c) for c in (
        (30, 32, 38), (48, 52, 62), (70, 74, 80), (38, 52, 84), (120, 116, 108), (150, 40, 40), (92, 72, 52), (188, 184, 176),
        (60, 84, 60), (200, 160, 60), (104, 60, 96), (216, 216, 214), (80, 110, 140), (24, 24, 26),
    )
]  # fmt: skip
SKIN = [rgb(*c) for c in ((224, 182, 154), (198, 148, 116), (148, 100, 74), (96, 64, 48))]
LEAVES = [rgb(*c) for c in ((70, 98, 44), (54, 80, 40), (92, 110, 52), (60, 84, 58), (110, 116, 62), (80, 104, 70))]
AUTUMN = [rgb(*c) for c in ((168, 110, 40), (150, 76, 36), (178, 140, 58), (120, 98, 58))]


def pick(scene: Scene, options: list[np.ndarray], spread: float = 0.12) -> np.ndarray:
    """One of the colours, a little lighter or darker and off hue."""
    table = _tints(spread)
    return scene.rng.choice(options) * table[scene.rng.randrange(len(table))]


@cache
def _tints(spread: float) -> np.ndarray:
    """256 factors (256, 3, 1, 1) about 1: lightness within 1.5 `spread`, each channel within half of it."""
    draw = np.random.Generator(np.random.PCG64(1)).random((256, 4, 1, 1), dtype=FLOAT) * 2 - 1
    return (1 + 1.5 * spread * draw[:, :1]) * (1 + 0.5 * spread * draw[:, 1:])


@cache
def _windows(number: int) -> np.ndarray:
    """Table `number` of 16 x 16 random values in [0, 1]: what goes on behind each window."""
    return np.random.Generator(np.random.PCG64(number)).random((16, 16), dtype=FLOAT)


# Buildings and other things along the street ---------------------------------------------------------------------


class Facade:
    """How one house looks: drawn once, used for its street wall and its gable."""

    def __init__(self, scene: Scene, height: float) -> None:
        rng = scene.rng
        self.height, self.storey, self.bay = height, rng.uniform(2.8, 3.8), rng.uniform(1.8, 3.6)
        # The windows, as shares of a bay and of a storey.
        self.left, self.right = rng.uniform(0.18, 0.3), rng.uniform(0.62, 0.86)
        self.sill, self.lintel = rng.uniform(0.2, 0.34), rng.uniform(0.72, 0.9)
        self.frame = rng.uniform(0.03, 0.08)
        self.luck, self.lit_share = _windows(rng.randrange(64)), rng.uniform(0.1, 0.45)
        self.shop, self.band, self.brick = rng.random() < 0.45, rng.random() < 0.5, rng.random() < 0.5
        self.blank, self.ivy = rng.random() < 0.12, rng.random() < 0.1
        self.poster = self.blank and rng.random() < 0.7
        self.roof = rng.uniform(0.5, 2.4) if rng.random() < 0.6 else 0.0
        self.colour = pick(scene, FACADES)
        self.trim = pick(scene, [WHITE, rgb(90, 84, 78), rgb(190, 180, 164)])
        self.glass = pick(scene, [GLASS, rgb(60, 74, 88), rgb(26, 28, 32), rgb(110, 130, 150)])
        self.sign = pick(scene, [*PAINTS, rgb(170, 30, 36), rgb(30, 90, 60), rgb(210, 170, 50)])
        self.tiles = pick(scene, [rgb(110, 60, 48), rgb(70, 70, 76), rgb(58, 52, 50), rgb(90, 96, 92)])
        self.phase = (rng.randrange(512), rng.randrange(512))

    def paint(
        self, scene: Scene, wall: Wall, along: np.ndarray, light: np.ndarray, ends: np.ndarray | float = 1.0
    ) -> None:
        """Paint the face on `wall`, `along` (w,) metres from its corner; `ends` (w,) is its share of the columns."""
        y, foot, foot_y, height, storey, bay = wall.y, wall.foot_z, wall.foot_y, self.height, self.storey, self.bay
        alpha = clip01((height - y) / foot_y + 0.5) * clip01(y / foot_y + 0.5) * ends
        if along.size < 3:
            wall.paint(self.colour * light * 0.8, alpha, BUILDING)
            return
        near = float(foot_y.min()) < 0.1  # what is finer than a pixel is left out
        grain = noise(1.0, y * 14 + self.phase[0], along * 14 + self.phase[1])
        blotch = noise(1.5, y * 5 + self.phase[1], along * 5 + self.phase[0])
        shade = 0.55 + 0.35 * grain + 0.5 * blotch
        if self.brick and near:
            shade = shade * (1 - 0.22 * pulse(y * 3.5, 0, 0.16, foot_y * 3.5))
        if self.band and near:
            shade = shade * (1 + 0.4 * pulse(y / storey, 0.0, 0.07, foot_y / storey))
        # Dirt rises from the street and gathers under the eaves.
        shade = shade * (1 - 0.35 * np.exp(y * (-1 / 1.2))) * (1 - 0.3 * cover(y, height - 0.5, height, foot_y))
        colour = self.colour * shade
        lamps = np.zeros_like(y)  # where light comes from inside

        def layer(share: np.ndarray, tone: np.ndarray) -> None:
            nonlocal colour
            colour += share * (tone - colour)

        if self.ivy:
            layer(clip01((blotch * 1.6 - y / height - 0.1) * 6), LEAVES[1] * (0.4 + grain))
        if not self.blank:
            u, v, fu, fv = along / bay, y / storey, foot / bay, foot_y / storey
            upper = clip01((height - 0.3 - y) / foot_y)
            if self.shop:
                upper = upper * clip01((y - storey) / foot_y)
            pane = pulse(u, self.left, self.right, fu) * pulse(v, self.sill, self.lintel, fv) * upper
            luck = self.luck[np.floor(v).astype(np.int32) & 15, np.floor(u).astype(np.int32) & 15]
            # A pane mirrors the sky more the higher it is; some are curtained.
            glass = self.glass * (0.6 + 0.8 * luck) + scene.light.mirror * (0.25 * clip01(y / 20) * luck)
            if near:
                e, middle = self.frame, (self.left + self.right) / 2
                pane = pane * (1 - 0.8 * pulse(u, middle - 0.02, middle + 0.02, fu))
                frame = pulse(u, self.left - e, self.right + e, fu) * pulse(v, self.sill - e, self.lintel + e, fv)
                layer(frame * upper, self.trim * shade)
                glass = glass + (luck > 0.8).astype(FLOAT) * 0.6 * (self.trim * 0.7 - glass)
            layer(pane, glass)
            lamps = pane * (luck < self.lit_share)
        if self.shop:
            windows = pulse(along / (bay * 2), 0.06, 0.94, foot / (bay * 2))
            display = cover(y, 0.5, storey - 0.95, foot_y) * windows
            layer(cover(y, 0, storey - 0.1, foot_y) * 0.7, self.trim * 0.5)
            layer(cover(y, storey - 0.8, storey - 0.15, foot_y), self.sign * (0.7 + 0.6 * grain))
            layer(display, self.glass * (0.5 + 2.2 * blotch * self.luck[0, :3].reshape(3, 1, 1)))
            lamps = lamps + display * 0.8
        if self.roof:
            tiles = cover(y, height - self.roof, height, foot_y)
            layer(tiles, self.tiles * (0.6 + 0.8 * grain))
            lamps = lamps * (1 - tiles)
        if self.poster:  # a bright board that is no traffic sign
            layer(cover(y, 1.2, 3.4, foot_y) * cover(along, 2, 5.5, foot), self.sign * (0.6 + grain))
        colour *= light
        if scene.light.lamps:
            colour += lamps * (scene.light.lamps * rgb(255, 206, 138))
        wall.paint(colour, alpha, BUILDING)


def building(
    scene: Scene, side: int, lateral: float, z0: float, z1: float, height: float, depth: float, hidden: float
) -> None:
    """A block from z0 to z1 whose front is `lateral` metres from the street's centre line: its street wall and near gable.

    A nearer neighbour covers the gable up to the height `hidden`.
    """
    x, slope = scene.place(z0, side * lateral)
    gable = z0 > 0.7 and height > hidden
    board = scene.canvas.board(x + side * depth / 2, z0, depth / 2, height, hidden) if gable else None
    wall = scene.canvas.wall(x, slope, z0, z1, height) if x * side > 0 else None
    if board is None and wall is None:
        return
    facade = Facade(scene, height)
    if board is not None:
        along = board.x[0] + depth / 2
        ends = cover(along, 0, depth, 1 / board.scale)
        facade.paint(scene, board.wall(), along, scene.light.facing((0, 0, -1)), ends)
    if wall is not None:
        facade.paint(scene, wall, wall.z - z0, scene.light.facing((-side, 0, 0)))


def fence(scene: Scene, side: int, lateral: float, z0: float, z1: float) -> None:
    """Railings, mesh, or boards. What shows through the gaps is labelled fence too, as annotators do."""
    rng = scene.rng
    kind = rng.randrange(3)
    height = rng.uniform(0.9, 2.0)
    x, slope = scene.place(z0, side * lateral)
    wall = scene.canvas.wall(x, slope, z0, z1, height)
    colour = pick(scene, [BLACK, rgb(90, 94, 98), rgb(120, 92, 66), rgb(180, 180, 178), rgb(54, 78, 60)])
    if wall is None:
        return
    inside = cover(wall.y, 0, height, wall.foot_y)
    if kind == 0:
        period = rng.uniform(0.14, 0.3)
        solid = pulse(wall.z / period, 0, 0.3, wall.foot_z / period)[None] + 0 * wall.y
        rails = cover(wall.y, height - 0.16, height - 0.04, wall.foot_y) + cover(wall.y, 0.1, 0.2, wall.foot_y)
        solid = np.maximum(solid, rails)
    elif kind == 1:
        posts = pulse(wall.z / 2, 0, 0.04, wall.foot_z / 2)[None]
        solid = np.maximum(
            np.maximum(posts, 0.35 * np.ones_like(wall.y)), cover(wall.y, height - 0.07, height, wall.foot_y)
        )
    else:
        solid = 1 - 0.6 * pulse(wall.z / 0.2, 0, 0.12, wall.foot_z / 0.2)[None] + 0 * wall.y
    rough = 0.6 + 0.8 * noise(1.0, wall.y * 8, (wall.z * 8)[None])
    light = scene.light.facing((-side, 0, 0))
    wall.paint((colour * light) * rough, inside * solid)
    region = scene.canvas.label[wall.rows, wall.columns]
    region[inside > 0.5] = FENCE


def hedge(scene: Scene, side: int, lateral: float, z0: float, z1: float) -> None:
    height = scene.rng.uniform(0.8, 2.2)
    x, slope = scene.place(z0, side * lateral)
    wall = scene.canvas.wall(x, slope, z0, z1, height + 0.3)
    if wall is None:
        return
    tile = 22
    leaf = noise(0.6, wall.y * tile, (wall.z * tile)[None])
    clump = noise(1.5, wall.y * 6 + 90, (wall.z * 6)[None])
    top = clip01((height + (clump - 0.5) * 0.8 - wall.y) / (wall.foot_y * 2))
    shade = (0.25 + 0.9 * leaf) * (0.5 + clump) * (0.6 + 0.4 * clip01(wall.y / height))
    colour = pick(scene, scene.leaves) * scene.light.facing((-side, 1, 0)) * shade
    wall.paint(colour, top * clip01(wall.y / wall.foot_y + 0.5), VEGETATION)


def tree(scene: Scene, x: float, z: float) -> None:
    rng = scene.rng
    radius, conifer = rng.uniform(1.3, 3.4), rng.random() < 0.15
    trunk, tall = rng.uniform(1.8, 3.2), radius * rng.uniform(0.9, 1.5)
    if conifer:
        trunk, tall, radius = 0.8, rng.uniform(3, 5.5), radius * 0.7
    board = scene.canvas.board(x, z, radius * 1.3, trunk + 2.3 * tall)
    if board is None:
        return
    light, (sun_x, _, _) = scene.light.at(scene, x, z), scene.light.sun_way
    colour = pick(scene, scene.leaves, 0.2) * (1.1 if conifer else 1.8)
    bark = pick(scene, [rgb(84, 68, 54), rgb(104, 100, 94), rgb(60, 52, 46)])
    width, lean, phase = rng.uniform(0.12, 0.24), rng.uniform(-0.3, 0.3), [rng.randrange(512) for _ in range(4)]
    wood = bark * light
    board.fill(
        bar(0, 0, lean, trunk + tall * 0.6, board.thin(width)),
        lambda x, y: wood * (0.8 + 0.35 * sun_x * np.minimum(np.maximum(x / width, -1), 1)), VEGETATION,
    )  # fmt: skip
    grain = min(36.0, board.scale * 0.9)  # texels per metre: never finer than a pixel
    leaf = noise(0.6, board.y * grain + phase[0], board.x * grain + phase[1])
    clump = noise(1.5, board.y * 22 + phase[2], board.x * 22 + phase[3])
    middle = trunk + tall
    if conifer:
        edge = taper(trunk, trunk + 2 * tall, radius, 0.05).distance(board.x, board.y) + (clump + leaf - 1) * 0.8
    else:
        out = np.sqrt((board.x / radius) ** 2 + ((board.y - middle) / tall) ** 2)
        edge = np.maximum(out - 1 + (clump * 1.9 + leaf * 0.5 - 1.2) * 0.75, out - 1.1 - 0.18 * leaf) * radius
    # Lit from the sun's side and from above, dark inside and below.
    glow = 0.5 + 0.28 * sun_x * (board.x / radius) + 0.2 * ((board.y - middle) / tall)
    shade = (0.2 + 1.3 * leaf) * np.maximum(glow, 0.12) * (0.35 + 1.3 * clump)
    alpha = clip01(0.5 - edge * board.scale)
    scene.canvas.paint(board.rows, board.columns, (colour * light) * shade, alpha, VEGETATION, z)


def pole(scene: Scene, x: float, z: float, *, height: float, lamp: int = 0, width: float = 0.07) -> None:
    """A post; `lamp` -1 or 1 gives it an arm and a lamp over the street on that side."""
    board = scene.canvas.board(x, z, 2.6 if lamp else 0.4, height + 0.4)
    if board is None:
        return
    light, (sun_x, _, _) = scene.light.at(scene, x, z), scene.light.sun_way
    tone = light * pick(
        scene, [rgb(92, 96, 98), rgb(128, 130, 130), rgb(50, 54, 52), rgb(150, 146, 138), rgb(72, 86, 74)]
    )
    radius = board.thin(width)
    shape = box(-radius, radius, 0, height)
    board.fill(
        shape, tone if radius * board.scale < 1.5 else lambda x, y: tone * (1 + 0.3 * sun_x * (x / radius)), POLE
    )
    if lamp:
        board.fill(bar(0, height, lamp * 1.8, height + 0.25, board.thin(width * 0.7)), tone, POLE)
        head = round_box(lamp * 2.0 - 0.42, lamp * 2.0 + 0.42, height + 0.12, height + 0.3, 0.08)
        board.fill(head, rgb(255, 226, 170) * 3 if scene.light.lamps else tone * 0.8, POLE)


def traffic_light(scene: Scene, x: float, z: float, *, arm: int) -> None:
    """Signals on a post, in a third of the cases with a second set on an arm over the street on the side `arm`."""
    rng = scene.rng
    height, over = rng.uniform(2.6, 3.4), rng.random() < 0.35
    pole(scene, x, z, height=5.6 if over else height, width=0.075)
    board = scene.canvas.board(x, z, 4.2, 6.2)
    if board is None:
        return
    light, phase = scene.light.at(scene, x, z), rng.randrange(3)
    places = [(0.0, height)]
    if over:
        reach = arm * rng.uniform(2.2, 3.8)
        board.fill(bar(0, 5.5, reach, 5.6, board.thin(0.06)), rgb(90, 94, 96) * light, POLE)
        places.append((reach, 5.7))
    for px, top in places:
        board.fill(round_box(px - 0.19, px + 0.19, top - 1.0, top, 0.06), BLACK * light * 1.3, TRAFFIC_LIGHT)
        for i, bulb in enumerate((rgb(255, 40, 30), rgb(255, 180, 40), rgb(60, 255, 150))):
            if i == phase:
                board.fill(disc(px, top - 0.2 - 0.3 * i, max(0.125, 0.35 / board.scale)), bulb * 1.6)
            elif board.scale > 14:
                board.fill(disc(px, top - 0.2 - 0.3 * i, 0.125), bulb * 0.1 * light)


def sign(scene: Scene, x: float, z: float) -> None:
    rng = scene.rng
    height, size, kind = rng.uniform(2.0, 2.9), rng.uniform(0.28, 0.42), rng.randrange(7)
    pole(scene, x, z, height=height, width=0.035)
    board = scene.canvas.board(x, z, 1.1, height + 1.2)
    if board is None:
        return
    light = scene.light.at(scene, x, z) * 1.1
    red, blue, yellow, white = (c * light for c in (rgb(190, 28, 30), rgb(24, 70, 160), rgb(232, 186, 40), WHITE))
    cy, close = height + size * 0.6, board.scale * size > 3
    if kind == 0:  # prohibition: a red ring
        board.fill(disc(0, cy, size), red, TRAFFIC_SIGN)
        board.fill(disc(0, cy, size * 0.72), white)
        if close:
            board.fill(box(-size * 0.35, size * 0.35, cy - size * 0.16, cy + size * 0.16), BLACK * light)
    elif kind == 1:  # warning: a red triangle
        board.fill(taper(cy - size, cy + size, size * 1.15, 0.0), red, TRAFFIC_SIGN)
        board.fill(taper(cy - size * 0.72, cy + size * 0.5, size * 0.72, 0.0), white)
    elif kind == 2:  # an order: a blue disc
        board.fill(disc(0, cy, size), blue, TRAFFIC_SIGN)
        if close:
            board.fill(bar(0, cy - size * 0.5, 0, cy + size * 0.5, size * 0.12), white)
    elif kind == 3:  # stop: an octagon is what a square and a larger diamond share
        square, corner = box(-size, size, cy - size, cy + size), diamond(0, cy, size * 1.38)
        eight = Shape(square.bounds, lambda x, y: np.maximum(square.distance(x, y), corner.distance(x, y)))
        board.fill(eight, red, TRAFFIC_SIGN)
        if close:
            board.fill(box(-size * 0.66, size * 0.66, cy - size * 0.2, cy + size * 0.2), white)
    elif kind == 4:  # a crossing: a blue square
        board.fill(box(-size, size, cy - size, cy + size), blue, TRAFFIC_SIGN)
        board.fill(taper(cy - size * 0.6, cy + size * 0.6, size * 0.6, 0.0), white)
    elif kind == 5:  # priority: a yellow diamond
        board.fill(diamond(0, cy, size * 1.2), white, TRAFFIC_SIGN)
        board.fill(diamond(0, cy, size * 0.92), yellow)
    else:  # the back of a sign, bare metal
        board.fill(disc(0, cy, size), rgb(128, 130, 132) * light, TRAFFIC_SIGN)


def clutter(scene: Scene, x: float, z: float) -> None:
    """A bin, a box or a bollard: in no class, so ignored."""
    rng = scene.rng
    half, height = rng.uniform(0.12, 0.5), rng.uniform(0.6, 1.3)
    board = scene.canvas.board(x, z, half * 1.2, height * 1.2)
    if board is None:
        return
    colours = [rgb(60, 70, 64), rgb(110, 112, 110), rgb(150, 120, 60), rgb(50, 70, 110), rgb(90, 60, 50)]
    tone, sun_x = pick(scene, colours) * scene.light.at(scene, x, z), scene.light.sun_way[0]
    body = round_box(-half, half, 0, height, min(half, 0.1))
    board.fill(body, lambda x, y: tone * (0.75 + 0.35 * sun_x * (x / half)), IGNORE)
    board.fill(box(-half, half, height * 0.8, height * 0.88), tone * 0.4)


# Vehicles --------------------------------------------------------------------------------------------------------

# Length, width, height, belt line, and the outline seen from the side: (share of the length from the tail, height).
BODIES = {
    "saloon": (4.6, 1.8, 1.45, 0.95, ((0, 0.9), (0.13, 0.99), (0.25, 1.44), (0.55, 1.45), (0.73, 0.99), (0.97, 0.84), (1, 0.58))),
    "hatch": (4.0, 1.75, 1.48, 0.95, ((0, 0.98), (0.04, 1.07), (0.13, 1.45), (0.55, 1.48), (0.76, 1.0), (0.97, 0.89), (1, 0.62))),
    "estate": (4.7, 1.9, 1.7, 1.05, ((0, 1.05), (0.02, 1.22), (0.08, 1.67), (0.6, 1.7), (0.74, 1.16), (0.97, 1.05), (1, 0.71))),
    "van": (5.2, 2.0, 2.2, 1.2, ((0, 2.13), (0.02, 2.2), (0.7, 2.2), (0.84, 1.36), (0.98, 1.14), (1, 0.77))),
    "bus": (11.5, 2.5, 3.1, 1.3, ((0, 3.04), (0.01, 3.1), (0.99, 3.1), (1, 3.04))),
}  # fmt: skip
LIVERIES = [rgb(190, 40, 40), rgb(220, 190, 60), rgb(60, 110, 150), WHITE, rgb(60, 90, 66), rgb(128, 130, 134)]


def vehicle(scene: Scene, lateral: float, z: float, *, kind: str, towards: bool, parked: bool = False) -> None:
    """A vehicle along the street, its near end at depth z, seen from behind or from in front (`towards`)."""
    rng, canvas = scene.rng, scene.canvas
    length, width, height, belt, outline = BODIES[kind]
    half, label = width / 2, BUS if kind == "bus" else CAR
    x, slope = scene.place(z, lateral)
    board = canvas.board(x, z, half * 1.05, height)
    side = 1 if x - half > 0 else -1 if x + half < 0 else 0
    wall = canvas.wall(x - side * half, slope, z, z + length, height) if side else None
    if board is None and wall is None:
        return
    paint, brakes = pick(scene, LIVERIES if kind == "bus" else PAINTS), rng.random() < 0.4
    light = scene.light.at(scene, x, z)
    share, tops = (np.array(v) for v in zip(*outline, strict=True))
    if towards:
        share, tops = 1 - share[::-1], tops[::-1]
    if wall is not None:
        _flank(
            wall,
            wall.z - z,
            length,
            share,
            tops,
            belt,
            paint,
            light * scene.light.side(side),
            scene.light.mirror,
            label,
        )
    if board is None:
        return
    # The near end stands as high as the outline starts; the rest of the cabin is set back, glass above the belt line.
    peak = int(np.argmax(tops))
    setback = float(np.interp(height * 0.9, tops[: peak + 1], share[: peak + 1])) * length
    tail = max(float(tops[0]), belt) if setback > 0.15 else height
    glass = GLASS * 0.8 * light + scene.light.mirror * 0.12
    if setback > 0.15:
        cabin = canvas.board(x + slope * setback, z + setback, half, height)
        if cabin is not None:
            cabin.fill(taper(belt - 0.2, height, half * 0.97, half * 0.68), paint * light * 0.9, label)
            cabin.fill(taper(belt - 0.2, height - 0.1, half * 0.9, half * 0.6), glass)
    sun_x = scene.light.sun_way[0]
    if board.scale > 6:
        for s in (-1, 1):
            board.fill(box(s * (half - 0.16) - 0.11, s * (half - 0.16) + 0.11, 0, 0.4), TYRE * light, label)
    body = paint * light
    board.fill(
        round_box(-half, half, 0.24 if board.scale > 6 else 0.1, tail, 0.14),
        lambda x, y: body * (0.8 + 0.3 / tail * y + 0.12 * sun_x / half * x), label,
    )  # fmt: skip
    if tail == height:
        low, top = (1.25, 2.55) if kind == "bus" else (belt + 0.05, height - 0.2)
        board.fill(round_box(-half * 0.86, half * 0.86, low, top, 0.08), glass)
    lamp_y, on = 0.9 if kind == "bus" else 0.78, scene.light.lamps > 0 and not parked
    if towards:
        tone = rgb(255, 244, 214) * 4 if on else WHITE * light * 0.9
    else:
        tone = rgb(168, 18, 20) * light + rgb(255, 30, 24) * (1.3 if on or (brakes and not parked) else 0.0)
    for s in (-1, 1):
        edge = s * (half - 0.24)
        board.fill(round_box(edge - 0.19, edge + 0.19, lamp_y - 0.1, lamp_y + 0.1, 0.05), tone)
    if board.scale < 9:
        return
    board.fill(box(-half * 0.98, half * 0.98, 0.24, 0.42), TYRE * light * 1.6)
    board.fill(box(-0.26, 0.26, 0.5, 0.61), WHITE * light * 0.8)
    if towards:
        board.fill(round_box(-half * 0.5, half * 0.5, 0.63, 0.8, 0.04), BLACK * light)
    if kind == "bus":
        board.fill(box(-half * 0.6, half * 0.6, 2.68, 2.95), BLACK * light)
    if not towards and kind in ("saloon", "hatch"):
        board.fill(box(-half * 0.9, half * 0.9, tail - 0.05, tail - 0.02), body * 0.5)


def _flank(wall: Wall, along, length, share, tops, belt, paint, light, mirror, label) -> None:
    """The long side of a vehicle; `along` (w,) metres from its near end, (`share`, `tops`) its outline from there."""
    s, foot, height = along / length, wall.foot_y, float(tops.max())
    top = np.interp(s, share, tops).astype(FLOAT)
    # Outside its ends a side view has pixels to spare: they stay empty.
    alpha = (
        clip01((top - wall.y) / foot + 0.5)
        * clip01((wall.y - 0.22) / foot + 0.5)
        * cover(along, 0, length, wall.foot_z)
    )
    shade = 0.7 + 0.35 * clip01(wall.y / belt) - 0.25 * cover(wall.y, belt * 0.62, belt * 0.66, foot)
    if label == BUS:
        pane = cover(wall.y, 1.25, 2.5, foot) * pulse(along / 1.6, 0.05, 0.95, wall.foot_z / 1.6)
    else:
        inner = np.minimum(top - 0.09, height - 0.1)
        pane = clip01((inner - wall.y) / foot + 0.5) * clip01((wall.y - belt) / foot + 0.5)
        pane = pane * (1 - cover(s, 0.44, 0.47, wall.foot_z / length))
        if height > 2:  # a van has windows in front only
            pane = pane * ((s < 0.45) if float(share[int(np.argmax(tops))]) > 0.2 else (s > 0.55))
        shade = shade - 0.2 * cover(s, 0.45, 0.46, wall.foot_z / length)
    body = (paint * light) * shade
    wall.paint(body + pane * (GLASS * light + mirror * 0.15 - body), alpha, label)
    radius = 0.48 if label == BUS else 0.33
    pixel = np.maximum(wall.foot_z, foot)
    if float(pixel.min()) > 0.3:
        return
    for centre in (0.17 * length, 0.82 * length):
        d = np.sqrt((along - centre) ** 2 + (wall.y - radius) ** 2)
        wall.paint(TYRE * light, clip01((radius - d) / pixel + 0.5), label)
        wall.paint(rgb(130, 132, 136) * light, clip01((radius * 0.58 - d) / pixel + 0.5))


def crossing_car(scene: Scene, x: float, z: float, *, kind: str, heading: int) -> None:
    """A vehicle seen exactly from the side, on a cross street; `heading` is the sign of its motion along x."""
    length, _, height, belt, outline = BODIES[kind]
    board = scene.canvas.board(x, z, length / 2 + 0.1, height + 0.1)
    if board is None:
        return
    light, paint = scene.light.at(scene, x, z), pick(scene, LIVERIES if kind == "bus" else PAINTS)
    share, tops = (np.array(v) for v in zip(*outline, strict=True))
    along = board.x[0] * heading + length / 2
    _flank(
        board.wall(), along, length, share, tops, belt, paint, light, scene.light.mirror, BUS if kind == "bus" else CAR
    )
    tail = -heading * length / 2
    board.fill(box(tail - 0.1, tail + 0.1, 0.7, 0.85), rgb(150, 20, 20) * light)


# People ----------------------------------------------------------------------------------------------------------

HAIR = [rgb(40, 30, 24), rgb(90, 66, 40), rgb(150, 130, 100), rgb(20, 18, 18)]


def person(scene: Scene, x: float, z: float, *, height: float) -> None:
    """Someone who stands or walks."""
    rng, h = scene.rng, height
    board = scene.canvas.board(x, z, 0.45 * h, 1.04 * h)
    if board is None:
        return
    light, far = scene.light.at(scene, x, z), board.scale * h < 14
    coat, trousers, skin = (pick(scene, c) * light for c in (CLOTHES, CLOTHES, SKIN))
    hair, bag = pick(scene, HAIR) * light, pick(scene, CLOTHES) * light if rng.random() < 0.3 else None
    stride, swing, bulk = rng.uniform(0, 0.14) * h, rng.uniform(-0.1, 0.1) * h, rng.uniform(0.085, 0.12) * h
    long_coat, sun_x = rng.random() < 0.2, scene.light.sun_way[0]
    foot, leg = stride + 0.02 * h, board.thin(0.048 * h)
    legs = bar(-0.045 * h, 0.5 * h, -foot, 0.05 * h, leg) | bar(0.045 * h, 0.5 * h, foot, 0.05 * h, leg)
    board.fill(legs, trousers * 0.9, PERSON)
    if not far:
        shoes = disc(-foot, 0.025 * h, 0.05 * h, 0.03 * h) | disc(foot, 0.025 * h, 0.05 * h, 0.03 * h)
        board.fill(shoes, BLACK * light * 1.4, PERSON)
    hands = (-bulk - 0.03 * h - swing, bulk + 0.03 * h - swing)
    arms = bar(-bulk, 0.77 * h, hands[0], 0.47 * h, 0.036 * h) | bar(bulk, 0.77 * h, hands[1], 0.47 * h, 0.036 * h)
    torso = bar(0, (0.36 if long_coat else 0.5) * h, 0, 0.74 * h, bulk)
    if far:
        board.fill(torso | arms, coat, PERSON)
    else:
        board.fill(arms, coat * 0.75, PERSON)
        board.fill(torso, lambda x, y: coat * (0.95 + 0.3 * sun_x / bulk * x), PERSON)
        for hand in hands:
            board.fill(disc(hand, 0.45 * h, 0.028 * h), skin, PERSON)
        if bag is not None:
            board.fill(round_box(0.08 * h, 0.2 * h, 0.36 * h, 0.5 * h, 0.02 * h), bag, PERSON)
    board.fill(disc(0, 0.915 * h, 0.062 * h, 0.078 * h), skin, PERSON)
    board.fill(disc(0, 0.925 * h, 0.068 * h, 0.08 * h).above(0.925 * h), hair, PERSON)


FRAME = (
    (-0.52, 0.34, -0.2, 0.82), (-0.52, 0.34, 0.0, 0.34), (0.0, 0.34, -0.2, 0.82), (0.0, 0.34, 0.38, 0.8),
    (-0.17, 0.76, 0.38, 0.8), (0.52, 0.34, 0.36, 0.95),
)  # fmt: skip


def bicycle(scene: Scene, x: float, z: float, *, ridden: bool, across: bool) -> None:
    """A bicycle, and its rider if `ridden`; `across`: seen from the side, else from behind."""
    rng = scene.rng
    board = scene.canvas.board(x, z, 1.0 if across else 0.45, 1.85 if ridden else 1.15)
    if board is None:
        return
    light, way = scene.light.at(scene, x, z), 1 if rng.random() < 0.5 else -1
    frame, coat, trousers, skin = (pick(scene, c) * light for c in (PAINTS, CLOTHES, CLOTHES, SKIN))
    hat = pick(scene, PAINTS if rng.random() < 0.5 else HAIR) * light
    tube, tyre = board.thin(0.022), TYRE * light

    def line(x0: float, y0: float, x1: float, y1: float, radius: float) -> Shape:
        return bar(way * x0, y0, way * x1, y1, radius)

    if across:
        half = board.thin(0.024)
        for centre in (-0.52, 0.52):
            # The inside of a wheel belongs to the bicycle although the street shows through.
            board.mark(disc(centre, 0.34, 0.34), BICYCLE)
            board.fill(ring(centre, 0.34, 0.32, half), tyre, BICYCLE)
        shape = line(*FRAME[0], tube)
        for tubes in FRAME[1:]:
            shape = shape | line(*tubes, tube)
        board.fill(shape, frame, BICYCLE)
        board.fill(line(-0.3, 0.9, -0.1, 0.9, 0.03) | line(0.3, 1.0, 0.46, 0.98, 0.02), BLACK * light, BICYCLE)
        if ridden:
            board.fill(line(-0.18, 0.95, 0.14, 0.62, 0.075) | line(0.14, 0.62, 0.02, 0.28, 0.055), trousers, RIDER)
            board.fill(line(-0.16, 1.0, 0.1, 1.42, 0.13), coat, RIDER)
            board.fill(line(0.1, 1.4, 0.36, 1.02, 0.045), coat * 0.75, RIDER)
            board.fill(disc(way * 0.2, 1.64, 0.1, 0.125), skin, RIDER)
            board.fill(disc(way * 0.19, 1.66, 0.115, 0.13).above(1.66), hat, RIDER)
        return
    board.fill(round_box(-0.045, 0.045, 0, 0.68, 0.04), tyre, BICYCLE)
    board.fill(bar(-0.28, 1.0, 0.28, 1.0, tube) | bar(0, 0.6, 0, 0.95, board.thin(0.03)), frame, BICYCLE)
    if ridden:
        board.fill(bar(-0.1, 0.95, -0.12, 0.3, 0.07) | bar(0.1, 0.95, 0.12, 0.45, 0.07), trousers * 0.9, RIDER)
        board.fill(bar(-0.17, 1.38, -0.27, 1.02, 0.05) | bar(0.17, 1.38, 0.27, 1.02, 0.05), coat * 0.75, RIDER)
        board.fill(bar(0, 0.98, 0, 1.34, 0.17), coat, RIDER)
        board.fill(disc(0, 1.63, 0.095, 0.13), skin * 0.8, RIDER)
        board.fill(disc(0, 1.65, 0.115, 0.13).above(1.6), hat, RIDER)

"""Street-scene objects: houses, fences, trees, posts, signs, vehicles, people. Each paints colour and label together.

Sizes are in metres. Every function takes the scene (canvas and light), its own random stream, and where it stands.
"""

from __future__ import annotations

from enum import IntEnum
from random import Random
from typing import TYPE_CHECKING

import numpy as np

from fastkd.train.data.street_canvas import FLOAT, Plane, clip01, cover, mix, noise, pulse, rgb

if TYPE_CHECKING:
    from fastkd.train.data.street_scenes import Scene

Label = IntEnum(
    "Label",
    "ROAD SIDEWALK BUILDING FENCE POLE TRAFFIC_LIGHT TRAFFIC_SIGN VEGETATION TERRAIN SKY PERSON RIDER CAR BUS BICYCLE",
    start=0,
)


def colours(text: str) -> list[np.ndarray]:
    return [rgb(*bytes.fromhex(word)) for word in text.split()]


BLACK, WHITE, GLASS, WARM = colours("101012 ebebe8 262e36 ffce8a")
# Facades include the greys of road and pavement, the greens of leaves and the blues of the sky.
FACADES = colours("b0a494 965c4a c4b28c 808080 686a6e d0cac0 7a8a70 a68064 5c6068 8c98a6 bc9682 566852 ded6c8 785448")
PAINTS = colours("1c1c20 3c3e42 787a7e b2b4b8 e4e4e2 82181a 223462 546c84 344a38 9c8c70 ba7828 641428 60646a d4d0c6")
CLOTHES = colours("1e2026 30343e 464a50 263454 78746c 962828 5c4834 bcb8b0 3c543c c8a03c 683c60 d8d8d6 506e8c 18181a")
SKIN, HAIR = colours("e0b69a c69474 94644a 604030"), colours("281e18 5a4228 968264 141212")
LEAVES, AUTUMN = colours("46622c 365028 5c6e34 3c543a 6e743e 506846"), colours("a86e28 964c24 b28c3a 786246")
METAL, LIVERIES = colours("5c6062 808282 32363a 96928a 48564a"), colours("be2828 dcbe3c 3c6e96 ebebe8 3c5a42 808286")
# Length, width, height, belt line, and the side outline: (share of the length from the tail, height).
BODIES = {
    "saloon": (4.6, 1.8, 1.45, 0.95, ((0, 0.95), (0.13, 1.0), (0.25, 1.44), (0.55, 1.45), (0.73, 1.0), (1, 0.6))),
    "estate": (4.4, 1.8, 1.6, 1.0, ((0, 1.0), (0.06, 1.57), (0.58, 1.6), (0.75, 1.1), (1, 0.66))),
    "van": (5.2, 2.0, 2.2, 1.2, ((0, 2.15), (0.7, 2.2), (0.84, 1.36), (1, 0.77))),
    "bus": (11.5, 2.5, 3.1, 1.3, ((0, 3.04), (0.01, 3.1), (0.99, 3.1), (1, 3.04))),
}


def pick(rng: Random, options: list[np.ndarray], spread: float = 0.12) -> np.ndarray:
    """One of the colours, with slightly varied brightness and hue."""
    tint = [[[1 + spread * rng.uniform(-0.5, 0.5)]] for _ in range(3)]
    return rng.choice(options) * np.array(tint, FLOAT) * (1 + 1.5 * spread * rng.uniform(-1, 1))


def building(scene: Scene, rng: Random, x: float, z: float, *, side: int, end: float, height: float) -> None:
    """A block along the street up to depth `end`: gable and street wall."""
    depth, phase = rng.uniform(9, 16), rng.randrange(512)
    colour, glass, sign, tiles = (pick(rng, c) for c in (FACADES, [GLASS, *PAINTS[6:8]], PAINTS, PAINTS[:3] + HAIR))
    storey, bay, left, right = (rng.uniform(*ends) for ends in ((2.8, 3.8), (1.8, 3.6), (0.15, 0.3), (0.6, 0.9)))
    shop, roof, lit_share = rng.random() < 0.45, rng.choice((0, 0.8, 2.2)), rng.uniform(0.1, 0.45)
    panes = np.random.default_rng(rng.getrandbits(32)).random((16, 16), FLOAT)

    def face(wall: Plane, along: np.ndarray, light: np.ndarray, ends: np.ndarray | float) -> None:
        y, dx, dy = wall.y, wall.dx, wall.dy
        grain, blotch = noise(1.0, y * 14 + phase, along * 14), noise(1.5, y * 5, along * 5 + phase)
        shade = (0.55 + 0.35 * grain + 0.5 * blotch) * (1 - 0.35 * np.exp(-y / 1.2))  # dirt near the ground
        u, v = along / bay, y / storey
        pane = pulse(u, left, right, dx / bay) * pulse(v, 0.28, 0.83, dy / storey)
        luck = panes[np.floor(v).astype(np.int32) & 15, np.floor(u).astype(np.int32) & 15]
        if shop:
            pane = pane * clip01((y - storey) / dy)
        tone = mix(colour * shade, glass * (0.6 + 0.8 * luck) + scene.light.mirror * (0.15 * luck), pane)
        if shop:
            window = cover(y, 0.5, storey - 0.95, dy) * pulse(u / 2, 0.06, 0.94, dx / (bay * 2))
            tone = mix(tone, sign * (0.7 + grain), cover(y, storey - 0.8, storey - 0.15, dy))
            tone = mix(tone, glass * (0.5 + 2 * blotch), window)
        tone = mix(tone, tiles * (0.6 + 0.8 * grain), cover(y, height - roof, height, dy))
        lit = (pane * (luck < lit_share) * scene.light.lamps) * WARM
        wall.paint(tone * light + lit, wall.band(0, height) * ends, Label.BUILDING)

    if z > 0.7 and (board := scene.board(x + side * depth / 2, z, depth / 2, height)):
        along = board.x + depth / 2
        face(board, along, scene.light.facing((0, 0, -1)), cover(along, 0, depth, board.dx))
    if x * side > 0 and (wall := scene.wall(x, z, end, height)):
        face(wall, wall.x, scene.light.facing((-side, 0, 0)), 1.0)


def border(scene: Scene, rng: Random, x: float, z: float, *, side: int, end: float) -> None:
    """A hedge, or a fence of railings or boards, up to depth `end`; openings in a fence are labelled as fence."""
    hedge, height = rng.random() < 0.5, rng.uniform(0.9, 2.1)
    colour = pick(rng, scene.leaves if hedge else [BLACK, *METAL, *HAIR])
    period, solid = rng.uniform(0.14, 0.3), rng.choice((0.3, 0.85))
    if wall := scene.wall(x, z, end, height + 0.4):
        tone = colour * scene.light.facing((-side, 0.4, 0)) * (0.4 + noise(0.6, wall.y * 18, wall.x * 18))
        top = height + 0.6 * hedge * (noise(1.5, wall.y * 6 + 90, wall.x * 6) - 0.5)
        gaps = np.maximum(1.0 if hedge else 0.55, pulse(wall.x / period, 0, solid, wall.dx / period))
        wall.paint(tone, wall.band(0, top) * gaps, Label.VEGETATION if hedge else Label.FENCE)


def tree(scene: Scene, rng: Random, x: float, z: float) -> None:
    radius, trunk = rng.uniform(1.3, 3.4), rng.uniform(1.8, 3.2)
    lean, phase = rng.uniform(-0.3, 0.3), rng.randrange(512)
    tall, colour, bark = radius * rng.uniform(0.9, 1.5), pick(rng, scene.leaves, 0.2), pick(rng, HAIR[1:3] + METAL[:1])
    if board := scene.board(x, z, radius * 1.3, trunk + 2.3 * tall):
        light, right, up = scene.light_at(x, z), board.x / radius, (board.y - trunk - tall) / tall
        stem = board.bar(0, 0, lean, trunk + tall * 0.6, board.thin(0.18))
        board.fill(bark * light, Label.VEGETATION, stem)
        grain = min(36.0, 0.9 / board.dx)  # texels per metre: never finer than a pixel
        leaf = noise(0.6, board.y * grain + phase, board.x * grain)
        clump = noise(1.5, board.y * 22, board.x * 22 + phase)
        crown = (np.sqrt(right**2 + up**2) - 1.9 + clump * 1.4 + leaf * 0.4) * radius
        # Lit from the sun's side and from above; dark inside and below.
        glow = np.maximum(0.5 + 0.28 * scene.light.sun_way[0] * right + 0.2 * up, 0.12)
        shade = 1.8 * (0.2 + 1.3 * leaf) * glow * (0.35 + 1.3 * clump)
        board.fill(colour * light * shade, Label.VEGETATION, crown)


def pole(scene: Scene, rng: Random, x: float, z: float, *, height: float, lamp: int = 0) -> Plane | None:
    """A post; `lamp` -1 or 1 adds an arm and a lamp over the street on that side. The board has room for a sign."""
    tone, board = pick(rng, METAL), scene.board(x, z, 2.6 if lamp else 0.6, height + 1.2)
    if board:
        tone, radius = tone * scene.light_at(x, z), board.thin(0.06)
        board.fill(tone, Label.POLE, board.box(-radius, radius, 0, height))
        if lamp:
            board.fill(tone, Label.POLE, board.bar(0, height, lamp * 1.8, height + 0.25, radius))
            head = board.box(lamp * 2.0 - 0.42, lamp * 2.0 + 0.42, height + 0.12, height + 0.3)
            board.fill(rgb(255, 226, 170) * 3 if scene.light.lamps else tone * 0.8, Label.POLE, head)
    return board


def traffic_light(scene: Scene, rng: Random, x: float, z: float) -> None:
    height, on = rng.uniform(2.6, 3.4), rng.randrange(3)
    if board := pole(scene, rng, x, z, height=height):
        housing = board.box(-0.19, 0.19, height - 1.0, height)
        lamp = board.disc(0, height - 0.2 - 0.3 * on, max(0.125, 0.35 * board.dx))
        board.fill(BLACK * scene.light_at(x, z) * 1.3, Label.TRAFFIC_LIGHT, housing)
        board.fill(colours("ff281e ffb428 3cff96")[on] * 1.6, None, lamp)


def sign(scene: Scene, rng: Random, x: float, z: float) -> None:
    height, size, kind = rng.uniform(2.0, 2.9), rng.uniform(0.28, 0.42), rng.randrange(4)
    if board := pole(scene, rng, x, z, height=height):
        cy, light = height + size * 0.6, scene.light_at(x, z)
        disc, triangle = board.disc(0, cy, size), board.taper(cy - size, cy + size, size * 1.15, 0)
        plate, colour, white = (
            (disc, "be1c1e", 0.65),  # prohibition
            (triangle, "be1c1e", 0.4),  # warning
            (disc, "1846a0", 0.3),  # mandatory
            (board.box(-size, size, cy - size, cy + size), rng.choice(("1846a0", "e8ba28")), 0.5),  # others
        )[kind]
        board.fill(colours(colour)[0] * light, Label.TRAFFIC_SIGN, plate)
        board.fill(WHITE * light, None, board.disc(0, cy - size * 0.2 * (plate is triangle), size * white))


def vehicle(scene: Scene, rng: Random, x: float, z: float, *, kind: str, towards: bool, lit: bool) -> None:
    """A vehicle along the street, near end at depth z, seen from behind or from the front (`towards`)."""
    length, width, height, belt, outline = BODIES[kind]
    bus, half = kind == "bus", width / 2
    light, label, side = scene.light_at(x, z), Label.BUS if bus else Label.CAR, (x > half) - (x < -half)
    body, tyre = pick(rng, LIVERIES if bus else PAINTS) * light, BLACK * light
    glass = GLASS * light + scene.light.mirror * 0.13
    share, tops = (np.array(v, FLOAT) for v in zip(*outline, strict=True))
    if towards:
        share, tops = 1 - share[::-1], tops[::-1]
    if side and (wall := scene.wall(x - side * half, z, z + length, height)):
        top = np.interp(wall.x / length, share, tops).astype(FLOAT)
        pane = wall.band(belt, top - 0.1)
        pane = pane * (pulse(wall.x / 1.6, 0.05, 0.95, wall.dx / 1.6) if bus else top > belt + 0.2)
        flank = body * (0.92 - 0.22 * side * scene.light.sun_way[0]) * (0.7 + 0.35 * clip01(wall.y / belt))
        wall.paint(mix(flank, glass, pane), wall.band(0.22, top), label)
        for centre in (0.17 * length, 0.82 * length):
            wheel = 0.34 - np.sqrt((wall.x - centre) ** 2 + (wall.y - 0.34) ** 2)
            wall.paint(tyre, clip01(wheel / np.maximum(wall.dx, wall.dy) + 0.5), label)
    if board := scene.board(x, z, half, height):
        # The near end is as high as the outline starts; the cabin above it is glass.
        tail = max(float(tops[0]), belt)
        if tail < height * 0.9:
            board.fill(body * 0.9, label, board.taper(tail - 0.2, height, half * 0.97, half * 0.68))
            board.fill(glass, None, board.taper(tail, height - 0.1, half * 0.9, half * 0.6))
        board.fill(tyre, label, *(board.box(s - 0.11, s + 0.11, 0, 0.4) for s in (0.16 - half, half - 0.16)))
        board.fill(body * (0.8 + 0.3 / tail * board.y), label, board.box(-half, half, 0.2, tail))
        if tail >= height * 0.9:
            board.fill(glass, None, board.box(-half * 0.86, half * 0.86, belt + 0.05, height - 0.3))
        glow = (scene.light.lamps > 0) and lit
        front, back = WHITE * light * 0.9 + 3 * WARM * glow, rgb(168, 18, 20) * light + rgb(255, 30, 24) * 1.3 * glow
        lamps = (board.box(s - 0.19, s + 0.19, 0.68, 0.88) for s in (0.24 - half, half - 0.24))
        board.fill(front if towards else back, None, *lamps)


def person(scene: Scene, rng: Random, x: float, z: float, *, height: float) -> None:
    """A standing or walking person."""
    h, stride, bulk, hem = height, rng.uniform(0.02, 0.16), rng.uniform(0.085, 0.12), rng.choice((0.36, 0.5, 0.5))
    coat, trousers, skin, hair = (pick(rng, c) for c in (CLOTHES, CLOTHES, SKIN, HAIR))
    if board := scene.board(x, z, 0.45 * h, 1.04 * h):
        light, leg = scene.light_at(x, z), board.thin(0.048 * h)
        legs = (board.bar(s * 0.045 * h, h / 2, s * stride * h, 0.05 * h, leg) for s in (-1, 1))
        arms = (board.bar(s * bulk * h, 0.77 * h, s * (bulk + 0.03) * h, 0.47 * h, 0.036 * h) for s in (-1, 1))
        board.fill(trousers * light, Label.PERSON, *legs)
        board.fill(coat * 0.75 * light, Label.PERSON, *arms)
        board.fill(coat * light, Label.PERSON, board.bar(0, hem * h, 0, 0.74 * h, bulk * h))
        board.fill(hair * light, Label.PERSON, board.disc(0, 0.925 * h, 0.068 * h, 0.08 * h))
        board.fill(skin * light, Label.PERSON, board.disc(0, 0.9 * h, 0.06 * h))


def bicycle(scene: Scene, rng: Random, x: float, z: float, *, ridden: bool, across: bool) -> None:
    """A bicycle, with a rider if `ridden`; `across`: seen from the side, otherwise from behind."""
    way, (frame, coat, trousers, skin) = rng.choice((-1, 1)), (pick(rng, c) for c in (PAINTS, CLOTHES, CLOTHES, SKIN))
    board = scene.board(x, z, 1.0 if across else 0.45, 1.85 if ridden else 1.15)
    if board is None:
        return
    light, tube = scene.light_at(x, z), board.thin(0.024)
    if across:
        tubes = ((-0.52, 0.34, -0.2, 0.82), (-0.2, 0.8, 0, 0.34), (-0.17, 0.76, 0.38, 0.8), (0.52, 0.34, 0.36, 0.95))
        wheels = (board.ring(centre, 0.34, 0.32, tube) for centre in (-0.52, 0.52))
        board.fill(BLACK * light, Label.BICYCLE, *wheels)
        board.fill(frame * light, Label.BICYCLE, *(board.bar(way * a, b, way * c, d, tube) for a, b, c, d in tubes))
    else:
        wheel, handlebar = board.box(-0.045, 0.045, 0, 0.68), board.bar(-0.28, 1.0, 0.28, 1.0, tube)
        board.fill(frame * light * 0.4, Label.BICYCLE, wheel, handlebar)
    if ridden:
        if across:
            legs = board.bar(way * -0.18, 0.95, way * 0.14, 0.5, 0.075)
            torso = board.bar(way * -0.16, 1.0, way * 0.1, 1.42, 0.14)
        else:
            legs, torso = board.taper(0.35, 0.95, 0.19, 0.14), board.bar(0, 0.98, 0, 1.34, 0.22)
        board.fill(trousers * light, Label.RIDER, legs)
        board.fill(coat * light, Label.RIDER, torso)
        board.fill(skin * light, Label.RIDER, board.disc(way * 0.2 * across, 1.64, 0.1, 0.13))

"""The subjects of scenes: eight things, each drawn into a box of its own on a transparent sheet.

A drawing gets a `Sheet`, x and y of the middle of its foot and its height, in units of a native window, and returns its
width. Sun, moon and balloon hang with their middle at the place instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, ImageDraw

FINER = 2
"""How much finer sheets are than pictures, so that edges come out smooth."""

Point = tuple[float, float]


class Sheet:
    """A transparent picture that is drawn on in units of a native window.

    Args:
        shape: (height, width) of the picture in pixels.
        unit: pixels of a native window's side.
        origin: the pixel (y, x) of the coordinates' zero.
        shade: what every colour is multiplied by: dusk and night darken subjects.
    """

    def __init__(self, shape: tuple[int, int], unit: float, origin: Point, shade: Sequence[float] = (1, 1, 1)):
        self._image = Image.new("RGBA", (FINER * shape[1], FINER * shape[0]))
        self._draw = ImageDraw.Draw(self._image)
        self._unit, self._origin = FINER * unit, (FINER * origin[0], FINER * origin[1])
        self._shade = np.asarray(shade, float)

    def _at(self, points: Sequence[Point] | np.ndarray) -> list[tuple[float, float]]:
        return [(self._origin[1] + self._unit * x, self._origin[0] + self._unit * y) for x, y in points]

    def _colour(self, colour: Sequence[float] | np.ndarray, lit: bool) -> tuple[int, ...]:
        shaded = np.asarray(colour, float) * (1 if lit else self._shade)
        return (*(int(channel) for channel in np.clip(shaded, 0, 255)), 255)

    def polygon(
        self, points: Sequence[Point] | np.ndarray, colour: Sequence[float] | np.ndarray, lit: bool = False
    ) -> None:
        """A filled polygon; what is `lit` shines by itself and is not darkened."""
        self._draw.polygon(self._at(points), fill=self._colour(colour, lit))

    def disc(
        self,
        centre: Point,
        radius: float | Point,
        colour: Sequence[float] | np.ndarray,
        lit: bool = False,
    ) -> None:
        """A filled circle, or an ellipse with radii (x, y)."""
        rx, ry = radius if isinstance(radius, tuple) else (radius, radius)
        corners = self._at([(centre[0] - rx, centre[1] - ry), (centre[0] + rx, centre[1] + ry)])
        self._draw.ellipse([*corners[0], *corners[1]], fill=self._colour(colour, lit))

    def cut(self, points: Sequence[Point] | np.ndarray) -> None:
        """A hole through which what lies behind is seen."""
        self._draw.polygon(self._at(points), fill=(0, 0, 0, 0))

    def line(self, points: Sequence[Point], colour: Sequence[float] | np.ndarray, width: float) -> None:
        self._draw.line(self._at(points), fill=self._colour(colour, False), width=max(1, round(width * self._unit)))

    def over(self, picture: np.ndarray) -> np.ndarray:
        """The float picture (h, w, 3) with this sheet laid over it."""
        size = (picture.shape[1], picture.shape[0])
        reduced = np.asarray(self._image.convert("RGBa").resize(size, Image.Resampling.BOX), np.float32)
        return picture * (1 - reduced[..., 3:] / 255) + reduced[..., :3]


def lighthouse(rng: np.random.Generator, sheet: Sheet, x: float, y: float, height: float) -> float:
    """A white tower with two or three coloured bands, a gallery, a lit lantern and a cap."""
    band = np.array([(178, 38, 34), (178, 38, 34), (34, 60, 130)][rng.integers(3)]) + rng.uniform(-12, 12, 3)
    foot, top = height * rng.uniform(0.13, 0.16), height * rng.uniform(0.075, 0.095)
    tower = 0.76 * height

    def slice_(low: float, high: float, colour: np.ndarray | Sequence[float]) -> None:
        half = [foot + (top - foot) * level for level in (low, high)]
        levels = [y - tower * level for level in (low, high)]
        for side, shade in ((-1, 1.0), (1, 0.72)):
            sheet.polygon(
                [(x, levels[0]), (x + side * half[0], levels[0]), (x + side * half[1], levels[1]), (x, levels[1])],
                np.multiply(colour, shade),
            )

    bands = int(rng.integers(2, 4))
    slice_(0, 1, (240, 238, 230))
    for i in range(bands):
        low = (i + 0.35) / (bands + 0.1)
        slice_(low, low + 0.45 / bands, band)
    gallery = y - tower
    sheet.polygon(_box(x, gallery, 1.45 * top, 0.04 * height), (52, 52, 58))
    sheet.polygon(_box(x, gallery - 0.04 * height, 0.72 * top, 0.11 * height), (255, 236, 150), lit=True)
    for place in (-0.72, -0.24, 0.24, 0.72):
        sheet.line(
            [(x + place * top, gallery - 0.04 * height), (x + place * top, gallery - 0.15 * height)],
            (48, 44, 44),
            0.004,
        )
    roof = gallery - 0.15 * height
    sheet.polygon([(x - 0.95 * top, roof), (x + 0.95 * top, roof), (x, roof - 0.09 * height)], 0.8 * band)
    return 2 * foot


def boat(rng: np.random.Generator, sheet: Sheet, x: float, y: float, height: float) -> float:
    """A hull, a mast and two sails, sailing left or right."""
    way = rng.choice((-1, 1))
    hull = np.array([(120, 60, 34), (40, 60, 110), (150, 36, 36), (60, 60, 64)][rng.integers(4)], float)
    sail = np.array([(246, 244, 236), (246, 244, 236), (214, 74, 50), (236, 186, 70)][rng.integers(4)], float)
    half = height * rng.uniform(0.36, 0.44)

    def at(u: float, v: float) -> Point:
        return (x + way * u * half, y - v * height)

    sheet.polygon([at(-0.92, 0.16), at(1.1, 0.18), at(0.72, -0.02), at(-0.74, -0.02)], hull)
    sheet.polygon([at(-0.94, 0.185), at(1.12, 0.205), at(1.1, 0.16), at(-0.92, 0.14)], (236, 230, 220))
    sheet.line([at(0.08, 0.17), at(0.08, 1.0)], (80, 58, 40), 0.016 * height)
    sheet.polygon([at(0.0, 0.24), at(-0.86, 0.27), at(0.03, 0.98)], 0.94 * sail)
    sheet.polygon([at(0.15, 0.26), at(0.95, 0.28), at(0.13, 0.88)], sail)
    sheet.polygon([at(0.0, 0.24), at(-0.30, 0.25), at(0.03, 0.98)], 0.8 * sail)
    return 2.05 * half


def tree(rng: np.random.Generator, sheet: Sheet, x: float, y: float, height: float) -> float:
    """A trunk with branches and a round crown of many leaf clusters, lit from the left above."""
    bark = np.array((82, 58, 40)) * rng.uniform(0.8, 1.2)
    leaf = np.array([(70, 122, 40), (54, 104, 44), (92, 132, 46), (202, 112, 36)][rng.integers(4)], float)
    leaf = leaf + rng.uniform(-10, 10, 3)
    width = 0.045 * height
    fork = y - 0.42 * height
    sheet.polygon([(x - 1.5 * width, y), (x - 0.7 * width, fork), (x + 0.7 * width, fork), (x + 1.5 * width, y)], bark)
    sheet.polygon([(x, y), (x, fork), (x + 0.7 * width, fork), (x + 1.5 * width, y)], 0.7 * bark)
    spread = height * rng.uniform(0.30, 0.38)
    middle = y - 0.66 * height
    for side in (-0.6, 0.1, 0.65):
        sheet.line([(x, fork + 0.05 * height), (x + side * spread, middle)], 0.85 * bark, 0.022 * height)
    blobs = []
    for _ in range(110):
        angle, radius = rng.uniform(0, 2 * np.pi), np.sqrt(rng.random())
        blobs.append((x + spread * radius * np.cos(angle), middle + 0.32 * height * radius * np.sin(angle)))
    for bx, by in sorted(blobs, key=lambda place: -place[1]):
        light = 0.86 - 0.38 * (bx - x) / spread - 0.55 * (by - middle) / (0.32 * height) * 0.6
        size = height * rng.uniform(0.035, 0.075)
        sheet.disc((bx, by), size, leaf * np.clip(light, 0.42, 1.35) * rng.uniform(0.9, 1.1))
    return 2 * spread


def house(rng: np.random.Generator, sheet: Sheet, x: float, y: float, height: float) -> float:
    """A house seen a little from the side: lit front with a door and windows, a gable, a roof, a chimney."""
    wall = np.array([(236, 226, 204), (226, 196, 150), (204, 206, 210), (210, 130, 104)][rng.integers(4)], float)
    roof = np.array([(166, 66, 44), (120, 56, 44), (84, 84, 96)][rng.integers(3)], float) + rng.uniform(-10, 10, 3)
    glass = (255, 222, 130) if rng.random() < 0.6 else (92, 120, 150)
    way = rng.choice((-1, 1))
    eave, ridge = y - 0.5 * height, y - 0.9 * height
    wide, gable = height * rng.uniform(0.72, 0.9), height * rng.uniform(0.34, 0.44)
    left = -(wide + gable) / 2

    def at(u: float, v: float) -> Point:
        return (x + way * (left + u), v)

    chimney = 0.18 * wide
    sheet.polygon([at(chimney, ridge + 0.15 * height), at(chimney, y - height), at(chimney + 0.09 * height, y - height),
                   at(chimney + 0.09 * height, ridge + 0.15 * height)], 0.7 * roof)  # fmt: skip
    sheet.polygon([at(0, y), at(0, eave), at(wide, eave), at(wide, y)], wall)
    sheet.polygon([at(wide, y), at(wide, eave), at(wide + gable / 2, ridge), at(wide + gable, eave),
                   at(wide + gable, y)], 0.72 * wall)  # fmt: skip
    over = 0.05 * height
    sheet.polygon([at(-over, eave + over), at(wide, eave + over), at(wide + gable / 2, ridge),
                   at(gable / 2 - over, ridge)], roof)  # fmt: skip
    sheet.polygon([at(wide + gable + over, eave + over), at(wide + gable, eave + over),
                   at(wide + gable / 2 - 0.01, ridge), at(wide + gable / 2, ridge - 0.02 * height)],
                  0.8 * roof)  # fmt: skip
    door = 0.44 * wide
    sheet.polygon([at(door, y), at(door, y - 0.3 * height), at(door + 0.14 * height, y - 0.3 * height),
                   at(door + 0.14 * height, y)], (96, 58, 40))  # fmt: skip
    for u in (0.14 * wide, 0.74 * wide, wide + 0.5 * gable - 0.06 * height):
        corners = [at(u, y - 0.2 * height), at(u, y - 0.36 * height), at(u + 0.13 * height, y - 0.36 * height),
                   at(u + 0.13 * height, y - 0.2 * height)]  # fmt: skip
        sheet.polygon(corners, glass, lit=glass[0] == 255)
    return wide + gable


def sun(rng: np.random.Generator, sheet: Sheet, x: float, y: float, height: float) -> float:
    """A bright disc; its glow is the sky's."""
    sheet.disc((x, y), height / 2, (255, 214 + rng.uniform(-14, 14), 120 + rng.uniform(-30, 30)), lit=True)
    sheet.disc((x, y), 0.43 * height, (255, 236, 170), lit=True)
    return height


def moon(rng: np.random.Generator, sheet: Sheet, x: float, y: float, height: float) -> float:
    """A pale disc with gray seas."""
    radius = height / 2
    sheet.disc((x, y), radius, (236, 234, 218), lit=True)
    for _ in range(7):
        angle, away = rng.uniform(0, 2 * np.pi), rng.uniform(0.1, 0.62) * radius
        spot = (x + away * np.cos(angle), y + away * np.sin(angle))
        sheet.disc(spot, radius * rng.uniform(0.1, 0.26), np.array((206, 204, 192)) + rng.uniform(-8, 8), lit=True)
    return height


def balloon(rng: np.random.Generator, sheet: Sheet, x: float, y: float, height: float) -> float:
    """An envelope of coloured gores, ropes and a basket."""
    pairs = (((206, 44, 40), (246, 222, 130)), ((36, 84, 170), (244, 240, 232)), ((230, 120, 30), (250, 214, 90)),
             ((150, 44, 130), (246, 190, 60)))  # fmt: skip
    colours = [np.asarray(colour, float) + rng.uniform(-10, 10, 3) for colour in pairs[rng.integers(len(pairs))]]
    radius = 0.36 * height
    middle = y - 0.12 * height
    t = np.linspace(0, 1, 25)
    angle = np.pi * t
    profile = np.where(
        t < 0.55, np.sin(angle), np.sin(angle) * (1 - 0.45 * (t - 0.55) / 0.45) + 0.12 * (t - 0.55) / 0.45
    )
    levels = middle - radius * np.cos(angle) * np.where(t < 0.5, 1, 1.28)
    edges = np.sin(np.linspace(-np.pi / 2, np.pi / 2, 8))
    for i, (left, right) in enumerate(zip(edges, edges[1:])):
        outline = [(x + left * radius * p, v) for p, v in zip(profile, levels)]
        outline += [(x + right * radius * p, v) for p, v in zip(profile[::-1], levels[::-1])]
        sheet.polygon(outline, colours[i % 2] * (1.06 - 0.3 * (i / 6)))
    mouth = levels[-1]
    basket = 0.075 * height
    for side in (-1, 1):
        sheet.line([(x + side * 0.12 * radius, mouth), (x + side * basket, mouth + 0.09 * height)], (70, 54, 44), 0.006)
    sheet.polygon(_box(x, mouth + 0.17 * height, basket, 0.09 * height), (128, 86, 48))
    return 2 * radius


def bridge(rng: np.random.Generator, sheet: Sheet, x: float, y: float, height: float) -> float:
    """A stone bridge of three arches, its deck highest in the middle; its foot stands in the water."""
    stone = np.array([(156, 146, 132), (150, 120, 98), (128, 130, 136)][rng.integers(3)], float) + rng.uniform(
        -10, 10, 3
    )
    half = height * rng.uniform(1.35, 1.6)
    t = np.linspace(-1, 1, 41)
    deck = y - height * (0.62 + 0.3 * (1 - t**2))
    sheet.polygon([*zip(x + half * t, deck - 0.12 * height), (x + half, y), (x - half, y)], stone)
    sheet.polygon([*zip(x + half * t, deck), *zip(x + half * t[::-1], deck[::-1] + 0.05 * height)], 0.62 * stone)
    for centre, radius in ((-0.62, 0.2), (0.0, 0.26), (0.62, 0.2)):
        rise = radius * half
        arch = np.linspace(0, np.pi, 21)
        rim = [
            (x + half * centre + 1.16 * rise * np.cos(a), y - min(1.16 * rise, 0.74 * height) * np.sin(a)) for a in arch
        ]
        hole = [(x + half * centre + rise * np.cos(a), y - min(rise, 0.66 * height) * np.sin(a)) for a in arch]
        sheet.polygon(rim, 1.18 * stone)
        sheet.cut(hole)
    return 2 * half


def _box(x: float, bottom: float, half_width: float, height: float) -> list[Point]:
    """The corners of an upright rectangle by the middle of its lower side."""
    return [
        (x - half_width, bottom),
        (x - half_width, bottom - height),
        (x + half_width, bottom - height),
        (x + half_width, bottom),
    ]


SUBJECTS: dict[str, Callable[[np.random.Generator, Sheet, float, float, float], float]] = {
    function.__name__: function for function in (lighthouse, boat, tree, house, sun, moon, balloon, bridge)
}
"""Subject to the function that draws it."""

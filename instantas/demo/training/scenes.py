"""The training pictures of scenes: a setting with a horizon, and at most one subject in it.

Places and sizes are in units of a native window, whose upper left corner is (0, 0). `render_scene(kind, index, seed)`
is the same picture every time, at twice or three times the size at which a scene fills a native window: a native window
of the full size is a part of it. `draw_scene` draws on any canvas, with any number of subjects.
`python -m instantas.demo.training.scenes OUT.png` draws a contact sheet.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from instantas.demo.training.drawing import SIZE, add_stars, colour_ramp, fractal_noise, smoothstep, to_uint8
from instantas.demo.training.scenery import LIGHTS, SCENES, Light, SceneKind
from instantas.demo.training.sheets import WINDOW, contact_sheet, write_sheet
from instantas.demo.training.subjects import SUBJECTS, Sheet

UNIT = 256
"""Pixels of a native window's side in a scene of SIZE: twice WINDOW, what the model paints."""

MARGIN = (SIZE - UNIT) // 2


class Place(NamedTuple):
    """Where a subject is: x and y of its foot (of its middle, if it hangs in the sky) and its height."""

    x: float
    y: float
    height: float


class Box(NamedTuple):
    """A subject's middle and extents in pixels."""

    y: float
    x: float
    height: float
    width: float


class Scene(NamedTuple):
    """A picture, uint8 (h, w, 3), and what it shows: the subject or "", the setting, the light, the subjects' boxes."""

    image: np.ndarray
    subject: str
    setting: str
    light: str
    boxes: tuple[Box, ...]


class View(NamedTuple):
    """A canvas: (height, width) in pixels, pixels of a unit, and the pixel (y, x) of (0, 0)."""

    shape: tuple[int, int]
    unit: float = UNIT
    origin: tuple[float, float] = (MARGIN, MARGIN)

    def coordinates(self) -> tuple[np.ndarray, np.ndarray]:
        """(y, x) fields (h, w) in units."""
        y, x = np.mgrid[: self.shape[0], : self.shape[1]].astype(np.float32)
        return (y + 0.5 - self.origin[0]) / self.unit, (x + 0.5 - self.origin[1]) / self.unit

    def noise(self, rng: np.random.Generator, exponent: float, stretch: tuple[float, float] = (1, 1),
              octaves: tuple[int, int] = (0, 9)) -> np.ndarray:  # fmt: skip
        scale = self.unit / UNIT
        return fractal_noise(rng, exponent, (scale * stretch[0], scale * stretch[1]), octaves, self.shape)

    def ridge(self, rng: np.random.Generator, exponent: float, octaves: tuple[int, int]) -> np.ndarray:
        """A line of heights (1, w) around 0 with deviation 1."""
        return fractal_noise(rng, exponent, (1, self.unit / UNIT), octaves, (1, self.shape[1]))


def draw_scene(
    rng: np.random.Generator, setting: str, light: str, subject: str, places: Sequence[Place], view: View
) -> tuple[np.ndarray, tuple[Box, ...]]:
    """The float picture (h, w, 3) of a setting with a subject at each of the places, and the subjects' boxes."""
    lit = LIGHTS[light]
    y, x = view.coordinates()
    horizon = rng.uniform(0.6, 0.7)
    picture = _sky(rng, view, lit, horizon, [place for place in places if subject in ("sun", "moon")], subject)
    soft = 1.2 / view.unit

    def lay(colours: np.ndarray, line: np.ndarray | float) -> None:
        nonlocal picture
        mask = smoothstep(y, line - soft, line + soft)[..., None]
        picture = picture * (1 - mask) + colours * mask

    depth = np.clip((y - horizon) / (1 - horizon), 0, 1.5)
    if setting == "mountains":
        line = horizon + 0.02 - np.clip(0.19 + 0.075 * view.ridge(rng, 2.8, (1, 6)), 0.05, None)
        lay(_mountain(rng, view, lit, y - line), line)
    elif setting in ("field", "hill", "river") and rng.random() < 0.7:
        line = horizon - np.clip(0.03 + 0.02 * view.ridge(rng, 3.2, (0, 4)), 0.004, None)
        lay(_ground(rng, view, lit, "far", depth), line)
    ground = {"sea": "water", "hill": "grass", "field": "grass", "mountains": "grass", "river": "grass"}.get(
        setting, setting
    )
    line = np.full((1, view.shape[1]), horizon)
    if setting == "desert":
        line = line - 0.018 * view.ridge(rng, 3.4, (0, 3))
    if subject == "house":
        for place in places:
            line = np.minimum(
                line, place.y - 0.01 + 1.1 * np.maximum(np.abs(x[:1] - place.x) - 0.75 * place.height, 0) ** 1.5
            )
    lay(_ground(rng, view, lit, ground, depth), line)
    if setting == "river":
        for place in places or [Place(0.5, 0.8, 0.27)]:
            bank = 0.26 + 0.5 * depth + 0.03 * view.ridge(rng, 3, (1, 4))
            wet = smoothstep(bank - np.abs(x - place.x), -2 * soft, 2 * soft) * smoothstep(
                y, horizon - soft, horizon + soft
            )
            picture = picture * (1 - wet[..., None]) + _ground(rng, view, lit, "water", depth) * wet[..., None]
    if setting == "sea":
        picture = _glitter(rng, view, picture, lit, horizon, places if subject in ("sun", "moon") else [])
    sheet = Sheet(view.shape, view.unit, view.origin, lit.shade)
    boxes = []
    for place in places:
        if subject == "lighthouse" and setting == "sea":
            _rock(rng, sheet, place)
        width = SUBJECTS[subject](rng, sheet, *place)
        boxes.append(_box(view, subject, place, width))
    return sheet.over(picture), tuple(boxes)


def _box(view: View, subject: str, place: Place, width: float) -> Box:
    middle = place.y if subject in ("sun", "moon", "balloon") else place.y - place.height / 2
    return Box(view.origin[0] + view.unit * middle, view.origin[1] + view.unit * place.x,
               view.unit * place.height, view.unit * width)  # fmt: skip


def _sky(
    rng: np.random.Generator, view: View, light: Light, horizon: float, glowing: Sequence[Place], subject: str
) -> np.ndarray:
    y, x = view.coordinates()
    level = y / horizon + 0.04 * view.noise(rng, 4, octaves=(0, 2))
    colours = [np.asarray(colour, float) + rng.uniform(-10, 10, 3) for colour in light.sky]
    picture = colour_ramp(level, colours)
    if light.clouds and rng.random() < 0.6:
        density = view.noise(rng, 3.2, (0.7, 1.8), (0, 7))
        threshold = rng.uniform(0.3, 1.0)
        cover = (smoothstep(density, threshold, threshold + 1.2) * (1 - smoothstep(level, 0.55, 0.95)))[..., None]
        picture = picture * (1 - 0.85 * cover) + np.asarray(light.clouds) * 0.85 * cover
    if light.stars:
        points = add_stars(
            rng, np.zeros_like(picture), small=int(view.shape[0] * view.shape[1] / 700), large=0, faintest=60
        )
        picture = picture + points * (1 - smoothstep(level, 0.6, 1.0))[..., None]
    for place in glowing:
        away = np.hypot(y - place.y, x - place.x) / place.height
        glow = np.exp(-1.5 * np.maximum(away - 0.4, 0))[..., None]
        colour = np.array((255, 206, 120) if subject == "sun" else (120, 130, 160), float)
        picture = picture + (0.75 if subject == "sun" else 0.4) * glow * (colour - 0.45 * picture)
    return picture


GROUNDS = {
    "grass": ((40, 74, 22), (86, 132, 44), (150, 176, 78)),
    "far": ((60, 92, 66), (104, 134, 96), (140, 160, 120)),
    "snow": ((150, 174, 214), (206, 220, 240), (248, 250, 254)),
    "desert": ((150, 92, 44), (214, 158, 86), (242, 206, 138)),
    "water": ((14, 52, 84), (44, 106, 146), (150, 196, 214)),
    "sky": ((60, 92, 66), (104, 134, 96), (150, 168, 120)),
}
"""Colours of what lies below the horizon, dark to bright, by day."""


def _ground(rng: np.random.Generator, view: View, light: Light, name: str, depth: np.ndarray) -> np.ndarray:
    """What lies below the horizon: finer and paler far away."""
    if name == "water":
        waves = view.noise(rng, 2.2, (1, 6), (2, 8))
        values = 0.55 - 0.3 * depth + 0.14 * waves * (0.35 + 0.9 * depth)
    elif name == "snow":
        values = 0.5 + 0.2 * view.noise(rng, 3.0, (1, 2.4), (0, 6)) + 0.03 * view.noise(rng, 0.8, octaves=(5, 8))
    elif name == "desert":
        bend = view.noise(rng, 3.6, (1, 1.5), (0, 4))
        rows = np.sin(60 * np.sqrt(depth + 0.02) + 2.5 * bend)
        values = 0.56 + 0.1 * rows * depth + 0.13 * bend + 0.03 * view.noise(rng, 0.8, octaves=(5, 8))
    else:
        values = 0.62 - 0.28 * depth + 0.13 * view.noise(rng, 1.6, (1, 2.2), (1, 8)) * (0.5 + 0.6 * depth)
    picture = colour_ramp(values, [np.asarray(colour, float) + rng.uniform(-8, 8, 3) for colour in GROUNDS[name]])
    picture = picture * np.asarray(light.shade)
    if name == "water":
        mirrored = colour_ramp(1 - np.clip(1.6 * depth, 0, 1) + 0.1 * waves, light.sky)
        picture = 0.5 * picture + 0.5 * mirrored
    haze = (0.45 * np.exp(-7 * depth))[..., None] * (name not in ("water", "snow"))
    return picture * (1 - haze) + np.asarray(light.sky[-1], float) * haze


def _mountain(rng: np.random.Generator, view: View, light: Light, below: np.ndarray) -> np.ndarray:
    """Rock with snow near the ridge; `below` is how far under it a place lies."""
    relief = view.noise(rng, 2.4, (1.2, 0.8), (2, 7))
    rock = colour_ramp(0.5 + 0.2 * relief, ((70, 78, 100), (112, 120, 142), (150, 156, 174)))
    cap = smoothstep(0.09 + 0.022 * relief - below, 0, 0.03)[..., None]
    return (
        rock * (1 - cap) + np.array((240, 244, 250)) * (0.9 + 0.1 * np.clip(relief, -1, 1)[..., None]) * cap
    ) * np.asarray(light.shade)


def _glitter(
    rng: np.random.Generator, view: View, picture: np.ndarray, light: Light, horizon: float, places: Sequence[Place]
) -> np.ndarray:
    """The path of light under a sun or a moon on the water."""
    y, x = view.coordinates()
    waves = smoothstep(view.noise(rng, 2, (1, 7), (3, 8)), -0.4, 1.2)
    for place in places:
        spread = 0.3 * place.height + 0.35 * np.clip(y - horizon, 0, None)
        path = np.exp(-(((x - place.x) / spread) ** 2)) * smoothstep(y, horizon, horizon + 0.01) * waves
        picture = picture + 0.7 * path[..., None] * (np.array((255, 226, 170)) * max(light.shade) - 0.5 * picture)
    return picture


def _rock(rng: np.random.Generator, sheet: Sheet, place: Place) -> None:
    """A flat rock in the water under the place."""
    half = place.height * rng.uniform(0.36, 0.5)
    t = np.linspace(-1, 1, 15)
    top = place.y + 0.004 - 0.05 * place.height * np.clip(1.15 - t**2 * 1.15, 0, 1) * rng.uniform(0.7, 1.1, 15)
    top[6:9] = place.y - 0.03 * place.height
    base = place.y + 0.09 * place.height
    sheet.polygon(
        [*zip(place.x + half * t, top), (place.x + 1.06 * half, base), (place.x - 1.06 * half, base)], (92, 82, 74)
    )
    low = top + 0.06 * place.height * rng.uniform(0.6, 1.2, 15)
    sheet.polygon(
        [*zip(place.x + half * t, low), (place.x + 1.06 * half, base), (place.x - 1.06 * half, base)], (58, 52, 50)
    )


def choose_place(rng: np.random.Generator, kind: SceneKind) -> Place:
    """A place for the kind's subject on a native window."""
    low, high = kind.heights
    height = rng.uniform(low, high)
    return Place(rng.uniform(*kind.x), rng.uniform(*kind.y), height)


def render_scene(subject: str, index: int, seed: int = 0, scale: int = 2) -> Scene:
    """The `index`-th scene with a subject, or with none (""); the same for the same arguments.

    Args:
        subject: one of SCENES.
        index: which of them.
        seed: start of all choices.
        scale: sides of the picture in those of a scene that fills a native window: SIZE / 2 pixels, WINDOW inside.

    Raises:
        ValueError: for an unknown subject.
    """
    if subject not in SCENES:
        raise ValueError(f"subject: expected one of {', '.join(filter(None, SCENES))} or '', got {subject!r}")
    rng = np.random.default_rng([seed, 100 + list(SCENES).index(subject), index])
    kind = SCENES[subject]
    setting, light = kind.settings[rng.integers(len(kind.settings))]
    places = [choose_place(rng, kind)] if subject else []
    size, unit, margin = (scale * pixels // 2 for pixels in (SIZE, UNIT, MARGIN))
    picture, boxes = draw_scene(rng, setting, light, subject, places, View((size, size), unit, (margin, margin)))
    return Scene(to_uint8(picture), subject, setting, light, boxes)


def sheet_of_scenes(columns: int = 8, seed: int = 0) -> Image.Image:
    """One row per subject, the last without one: scenes as they fill a native window."""
    inner = (MARGIN, MARGIN, MARGIN + UNIT, MARGIN + UNIT)

    def window(subject: str, column: int) -> Image.Image:
        picture = Image.fromarray(render_scene(subject, column, seed).image).crop(inner)
        return picture.resize((WINDOW, WINDOW), Image.Resampling.LANCZOS)

    return contact_sheet([[window(subject, column) for column in range(columns)] for subject in SCENES])


def main(arguments: list[str] | None = None) -> int:
    """`python -m instantas.demo.training.scenes OUT.png`."""
    program = "python -m instantas.demo.training.scenes"
    return write_sheet(program, "One row per subject, the last without one.", sheet_of_scenes, arguments)


if __name__ == "__main__":
    sys.exit(main())

"""Pictures with a known number of subjects, for a detector: one landscape with several, mosaics of scenes, and none."""

from __future__ import annotations

import numpy as np

from instantas.demo import MATERIALS, SUBJECTS
from instantas.demo.training.drawing import SIZE, smoothstep, to_uint8
from instantas.demo.training.materials import render
from instantas.demo.training.scenery import SCENES
from instantas.demo.training.scenes import Box, Place, Scene, View, draw_scene

SPACING = {"lighthouse": 0.36, "boat": 0.56, "tree": 0.56, "house": 0.62, "sun": 0.4, "moon": 0.4, "balloon": 0.5,
           "bridge": 1.05}  # fmt: skip
"""How far apart the middles of two subjects are at least, in units of a native window."""

HORIZON = 0.65
"""Where scenes have their horizon, about, in units of a native window."""


def plant(rng: np.random.Generator, subject: str, count: int, shape: tuple[int, int], unit: float) -> Scene:
    """A landscape of (height, width) pixels with `count` subjects, or as many as have room, `unit` pixels a window.

    The subjects' boxes say how many there are; "" as the subject stands for a landscape without any.
    """
    kind = SCENES[subject]
    setting, light = kind.settings[rng.integers(len(kind.settings))]
    low, high = (0.5, 0.8) if shape[0] > 1.2 * unit else (0.6, 0.7)
    view = View(shape, unit, (shape[0] * rng.uniform(low, high) - HORIZON * unit, 0))
    width = shape[1] / unit
    places: list[Place] = []
    for _ in range(30 * count if subject else 0):
        size = rng.uniform(0.8, 1.2)
        margin = 0.45 * SPACING[subject] * size
        if len(places) == count or width < 2 * margin:
            break
        x = rng.uniform(margin, width - margin)
        if all(abs(x - place.x) > SPACING[subject] * (1.05 + 0.1 * size) for place in places):
            places.append(Place(x, rng.uniform(*kind.y), size * rng.uniform(*kind.heights)))
    picture, boxes = draw_scene(rng, setting, light, subject, places, view)
    return Scene(to_uint8(picture), subject, setting, light, boxes)


def mosaic(rng: np.random.Generator, side: int, subjects: list[str]) -> tuple[np.ndarray, list[tuple[str, Box]]]:
    """Scenes of the subjects beside and above each other, two in a row, blended where they meet: (2 side, 2 side).

    What windows paint that do not know of each other looks like it.
    """
    size, rim = 2 * side, int(rng.integers(2, max(3, side // 6)))
    along = np.arange(size) + 0.5
    shares = [1 - smoothstep(along, side - rim, side + rim), smoothstep(along, side - rim, side + rim)]
    picture, found = np.zeros((size, size, 3)), []
    for i, subject in enumerate(subjects):
        row, column = divmod(i, 2)
        kind = SCENES[subject]
        setting, light = kind.settings[rng.integers(len(kind.settings))]
        place = Place(rng.uniform(*kind.x), rng.uniform(*kind.y), rng.uniform(*kind.heights))
        view = View((size, size), side, (row * side, column * side))
        drawn, boxes = draw_scene(rng, setting, light, subject, [place] if subject else [], view)
        picture += drawn * np.outer(shares[row], shares[column])[..., None]
        found += [(subject, box) for box in boxes]
    return to_uint8(picture), found


def example(rng: np.random.Generator, size: int = 256) -> tuple[np.ndarray, list[tuple[str, Box]]]:
    """A picture uint8 (size, size, 3) and its subjects with their boxes, as the detector is trained on."""
    subject = str(rng.choice(SUBJECTS))
    chance = rng.random()
    if chance < 0.12:
        material = str(rng.choice(MATERIALS))
        image = render(material, int(rng.integers(1 << 30))).image
        y, x = rng.integers(0, SIZE - size + 1, 2)
        return image[y : y + size, x : x + size], []
    if chance < 0.37:
        chosen = [subject if rng.random() < 0.8 else str(rng.choice([*SUBJECTS, ""])) for _ in range(4)]
        return mosaic(rng, size // 2, chosen)
    if chance < 0.45:
        subject = ""
    unit = size * float(np.exp(rng.uniform(np.log(0.22), np.log(1.3))))
    scene = plant(rng, subject, int(rng.integers(1, 6)), (size, size), unit)
    return scene.image, [(subject, box) for box in scene.boxes]

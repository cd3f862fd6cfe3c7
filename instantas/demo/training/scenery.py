"""What scenes are made of and called: subjects, settings, lights, and where a subject stands in a native window."""

from __future__ import annotations

from typing import NamedTuple

Range = tuple[float, float]
Colour = tuple[int, int, int]


class Light(NamedTuple):
    """A time of day.

    Attributes:
        words: phrases for it; "" means that it goes without saying.
        sky: colours from the top down to the horizon.
        shade: what colours of the ground and of subjects are multiplied by.
        clouds: the colour of clouds, if there are any.
        stars: whether stars are seen.
    """

    words: tuple[str, ...]
    sky: tuple[Colour, ...]
    shade: tuple[float, float, float]
    clouds: Colour | None = None
    stars: bool = False


LIGHTS = {
    "day": Light(
        ("by day", "at noon", "on a sunny day"),
        ((58, 116, 202), (118, 168, 226), (200, 220, 238)),
        (1.0, 1.0, 1.0),
        clouds=(248, 250, 254),
    ),
    "dusk": Light(
        ("at dusk", "at sunset", "in the evening"),
        ((72, 58, 118), (202, 108, 110), (255, 186, 106)),
        (0.84, 0.66, 0.62),
        clouds=(236, 150, 120),
    ),
    "night": Light(("at night", "by night"), ((7, 10, 30), (16, 24, 56), (36, 48, 92)), (0.46, 0.50, 0.66), stars=True),
}

SETTINGS = {
    "sea": (("sea", "open sea"), ("by the sea", "on the sea", "at sea")),
    "field": (("green field", "open field"), ("in a field", "in a green field")),
    "snow": (("snowy field", "winter field"), ("in snow", "in the snow", "in winter")),
    "desert": (("desert landscape", "sandy desert"), ("in the desert", "in a sandy desert")),
    "hill": (("green hills", "hill"), ("on a hill", "on a green hill")),
    "mountains": (("mountains", "mountain landscape"), ("over mountains", "in the mountains")),
    "river": (("river", "river landscape"), ("over a river", "over the river")),
}
"""By setting, what it is called alone and how a subject stands in it."""


class SceneKind(NamedTuple):
    """Scenes of one subject, in units of a native window.

    Attributes:
        nouns: names of the subject, the first used most.
        settings: (setting, light) of which each is drawn as often.
        x, y: where its foot stands, or its middle hangs.
        heights: its smallest and largest height.
    """

    nouns: tuple[str, ...]
    settings: tuple[tuple[str, str], ...]
    x: Range
    y: Range
    heights: Range


def _pairs(**lights: str) -> tuple[tuple[str, str], ...]:
    return tuple((setting, light) for setting, words in lights.items() for light in words.split())


SCENES = {
    "lighthouse": SceneKind(
        ("lighthouse", "lighthouse tower"), _pairs(sea="day day dusk dusk night night", snow="day dusk"),
        (0.28, 0.72), (0.76, 0.86), (0.5, 0.66)),
    "boat": SceneKind(
        ("sailing boat", "sailboat", "boat"), _pairs(sea="day day dusk dusk night"),
        (0.32, 0.68), (0.76, 0.88), (0.4, 0.56)),
    "tree": SceneKind(
        ("tree", "lone tree"), _pairs(field="day day dusk night", snow="day dusk", desert="day dusk"),
        (0.34, 0.66), (0.8, 0.9), (0.52, 0.68)),
    "house": SceneKind(
        ("house", "cottage"), _pairs(hill="day day dusk dusk night", snow="day dusk night"),
        (0.38, 0.62), (0.56, 0.64), (0.32, 0.42)),
    "sun": SceneKind(
        ("sun", "setting sun"), _pairs(mountains="dusk dusk day", sea="dusk dusk", desert="dusk"),
        (0.25, 0.75), (0.2, 0.42), (0.18, 0.27)),
    "moon": SceneKind(
        ("moon", "full moon"), _pairs(mountains="night", sea="night night", snow="night", field="night"),
        (0.25, 0.75), (0.2, 0.4), (0.18, 0.27)),
    "balloon": SceneKind(
        ("hot air balloon", "balloon"), _pairs(field="day", mountains="day dusk", desert="day dusk", sea="day"),
        (0.32, 0.68), (0.32, 0.44), (0.42, 0.58)),
    "bridge": SceneKind(
        ("bridge", "stone bridge"), _pairs(river="day day dusk dusk night"),
        (0.46, 0.54), (0.78, 0.84), (0.25, 0.29)),
    "": SceneKind(
        ("",), tuple((setting, light) for setting in SETTINGS for light in LIGHTS), (0, 0), (0, 0), (0, 0)),
}  # fmt: skip
"""Subject to its scenes; the last are settings alone."""

"""The looks of every material: how often, by which words, in which colours (RGB, dark to bright unless noted)."""

from __future__ import annotations

from typing import NamedTuple


class Look(NamedTuple):
    """One appearance of a material.

    Attributes:
        weight: how often the look is drawn, relative to the material's other looks.
        adjectives: words for it, repeated to be used more often; "" means that the bare noun describes it too.
        colours: what the drawing mixes.
        kind: tells drawings that treat one look differently which it is.
    """

    weight: float
    adjectives: tuple[str, ...]
    colours: tuple[tuple[int, int, int], ...]
    kind: str = ""


NOUNS = {
    "brick": ("brick", "brick wall", "bricks"),
    "grass": ("grass", "lawn", "grass field", "meadow"),
    "gravel": ("gravel", "pebbles", "small stones"),
    "stars": ("stars", "night sky", "space", "starry sky"),
    "sand": ("sand", "sand dunes", "desert", "desert sand"),
    "water": ("water", "sea", "ocean", "waves"),
    "clouds": ("clouds", "sky", "cloudy sky", "sky with clouds"),
    "wood": ("wood", "wooden planks", "wood floor", "wooden boards"),
    "lava": ("lava", "magma", "volcano lava"),
    "marble": ("marble", "marble stone", "polished marble"),
    "leaves": ("leaves", "foliage", "leaf pile"),
    "snow": ("snow", "snow field", "snowy ground"),
    "nebula": ("nebula", "nebula stars", "space nebula"),
}
"""Names of every material; the first is the one used most."""

LOOKS = {
    # the brick's dark and bright colour, then the mortar's
    "brick": (
        Look(5, ("red", "", ""), ((92, 34, 26), (176, 82, 60), (196, 186, 174))),
        Look(1.5, ("gray", "grey"), ((70, 70, 74), (128, 128, 130), (190, 188, 184))),
        Look(1.5, ("yellow", "sandstone"), ((150, 112, 50), (218, 180, 104), (222, 212, 190))),
        Look(1.5, ("white", "painted white"), ((186, 184, 180), (232, 230, 226), (160, 156, 150))),
    ),
    "grass": (
        Look(5, ("green", "", "", "fresh"), ((14, 34, 8), (62, 112, 26), (176, 206, 92))),
        Look(1.5, ("dry", "yellow"), ((48, 36, 12), (150, 122, 52), (236, 214, 136))),
        Look(1.5, ("dark green", "dark"), ((4, 16, 8), (24, 66, 30), (92, 138, 70))),
    ),
    "gravel": (
        Look(5, ("gray", "grey", "", ""), ((18, 18, 20), (116, 114, 112), (224, 222, 218))),
        Look(1.5, ("brown",), ((24, 14, 8), (126, 92, 64), (224, 196, 164))),
        Look(1.5, ("white",), ((60, 58, 56), (190, 186, 180), (250, 248, 244))),
    ),
    # the sky between the stars
    "stars": (
        Look(3, ("", "", "dark", "deep", "black"), ((9, 12, 30),)),
        Look(2, ("", "", "dark", "deep", "black"), ((4, 4, 8),)),
    ),
    "sand": (
        Look(5, ("golden", "", "", "yellow"), ((126, 84, 38), (214, 168, 98), (252, 226, 166))),
        Look(1.5, ("red",), ((92, 34, 14), (192, 92, 48), (244, 160, 104))),
        Look(1.5, ("white",), ((150, 140, 124), (220, 212, 198), (252, 248, 240))),
    ),
    "water": (
        Look(5, ("blue", "", "", "deep blue"), ((4, 26, 66), (18, 84, 142), (128, 190, 222))),
        Look(2, ("turquoise", "tropical", "teal"), ((0, 74, 92), (26, 150, 160), (170, 236, 230))),
        Look(1.2, ("dark", "stormy"), ((10, 18, 24), (44, 62, 72), (142, 160, 168))),
    ),
    # the sky, the clouds' shadow, the clouds' light; at sunset also the horizon
    "clouds": (
        Look(5, ("white", "", "", "", "blue sky with"), ((58, 120, 206), (176, 190, 210), (255, 255, 255))),
        Look(2, ("storm", "storm", "gray", "dark"), ((62, 70, 84), (84, 90, 102), (178, 184, 194)), "storm"),
        Look(
            2,
            ("sunset", "sunset", "pink", "orange"),
            ((112, 98, 170), (206, 112, 118), (255, 214, 160), (250, 158, 104)),
            "sunset",
        ),
    ),
    "wood": (
        Look(5, ("brown", "", ""), ((52, 28, 14), (118, 70, 36), (172, 116, 66))),
        Look(3, ("dark",), ((26, 14, 8), (72, 42, 24), (120, 78, 46))),
        Look(1.5, ("light", "pale"), ((146, 110, 70), (212, 176, 128), (242, 218, 178))),
    ),
    "lava": (
        Look(
            1,
            ("hot", "", "glowing", "molten"),
            ((14, 8, 8), (70, 12, 4), (190, 40, 4), (255, 120, 10), (255, 226, 110)),
        ),
    ),
    # the stone, the veins
    "marble": (
        Look(5, ("white", "", ""), ((236, 234, 232), (96, 98, 108))),
        Look(2, ("black",), ((26, 26, 30), (214, 206, 190))),
        Look(1.5, ("green",), ((22, 74, 54), (176, 214, 190))),
    ),
    # one leaf each
    "leaves": (
        Look(5, ("green", "", "", "lush"), ((38, 104, 28), (72, 150, 40), (120, 188, 66), (26, 78, 30))),
        Look(
            3,
            ("autumn", "orange", "fallen autumn"),
            ((204, 78, 18), (232, 146, 34), (158, 42, 18), (222, 186, 64)),
        ),
    ),
    "snow": (
        Look(
            1,
            ("white", "", "", "fresh", "cold"),
            ((70, 96, 150), (132, 160, 206), (206, 220, 240), (244, 248, 254), (255, 255, 255)),
        ),
    ),
    # the gas and the gas behind it
    "nebula": (
        Look(3, ("purple", "purple", "", "colorful"), ((150, 50, 190), (90, 70, 210))),
        Look(2, ("blue", "", "colorful"), ((30, 90, 210), (30, 160, 190))),
        Look(2, ("pink", "red", "", "colorful"), ((210, 50, 110), (130, 50, 170))),
    ),
}
"""The looks of every material."""

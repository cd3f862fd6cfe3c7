"""The training pictures: thirteen materials, one function each.

Brick, grass and gravel are crops of scikit-image's CC0 photographs, recoloured; the others are drawn with numpy. Each
function takes a generator and a look (see palettes.py) and returns a float picture (SIZE, SIZE, 3) of 0..255;
`render(material, index, seed)` is the same picture every time. `python -m instantas.demo.training.materials OUT.png`
draws a contact sheet.
"""

from __future__ import annotations

import sys
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage

from instantas.demo import MATERIALS
from instantas.demo.training.drawing import (
    SIZE,
    Colours,
    add_stars,
    colour_ramp,
    coordinates,
    fractal_noise,
    photograph_crop,
    plain,
    smoothstep,
    to_uint8,
    vary,
)
from instantas.demo.training.palettes import LOOKS, Look
from instantas.demo.training.sheets import WINDOW, contact_sheet, write_sheet


class Render(NamedTuple):
    """A training picture, uint8 (SIZE, SIZE, 3), and what it shows."""

    image: np.ndarray
    material: str
    look: Look


def brick(rng: np.random.Generator, look: Look) -> np.ndarray:
    """The photographed wall: dark values are brick, bright values mortar."""
    dark, bright, mortar = look.colours
    gray = ndimage.gaussian_filter(photograph_crop(rng, "brick", (0.62, 0.9)), 0.5)
    stains = smoothstep(fractal_noise(rng, 2.5, stretch=(1, 0.35)), -2, 2)
    is_mortar = smoothstep(gray, 0.40, 0.66)[..., None]
    stone = colour_ramp(0.75 * np.clip(gray / 0.42, 0, 1) + 0.25 * stains, [vary(rng, dark), vary(rng, bright)])
    joints = colour_ramp(gray, [vary(rng, mortar) * 0.55, vary(rng, mortar)])
    grain = fractal_noise(rng, 1.2, octaves=(5, 9))[..., None]
    return stone * (1 - is_mortar) + joints * is_mortar + 4 * grain


def grass(rng: np.random.Generator, look: Look) -> np.ndarray:
    """The photographed lawn, lit unevenly."""
    gray = photograph_crop(rng, "grass", (0.85, 1.2)) + 0.05 * fractal_noise(rng, octaves=(0, 3))
    if rng.random() < 0.5:
        gray = np.rot90(gray)
    return colour_ramp(gray, [vary(rng, colour, 5) for colour in look.colours])


def gravel(rng: np.random.Generator, look: Look) -> np.ndarray:
    """The photographed stones, each tinted a little."""
    gray = photograph_crop(rng, "gravel", (0.7, 1.0))
    picture = colour_ramp(gray, [vary(rng, colour) for colour in look.colours])
    tint = np.stack([fractal_noise(rng, 1, octaves=(3, 9)) for _ in range(3)], -1)
    picture = picture * (1 + 0.06 * tint * (gray[..., None] > 0.25))
    return np.rot90(picture) if rng.random() < 0.5 else picture


def stars(rng: np.random.Generator, look: Look) -> np.ndarray:
    """Round stars of three sizes on a dark, slightly cloudy sky."""
    haze = np.clip(fractal_noise(rng, 4, octaves=(0, 3)), -1.5, 2)[..., None]
    sky = plain(vary(rng, look.colours[0], 4)) * (1 + 0.25 * haze)
    return add_stars(rng, sky, small=int(rng.integers(260, 520)), large=int(rng.integers(14, 34)))


def sand(rng: np.random.Generator, look: Look) -> np.ndarray:
    """Wind ripples: a sine of the height, bent by smooth noise."""
    y, x = coordinates()
    bend = 1.6 * rng.uniform(1.2, 2.2) * fractal_noise(rng, 4.2, octaves=(0, 4))
    bend += 0.25 * fractal_noise(rng, 3, octaves=(3, 6))
    phase = 2 * np.pi * (rng.integers(8, 13) * y + rng.integers(-3, 4) * x) + bend
    ripples = np.sin(phase) + 0.35 * np.sin(2 * phase + 0.9)
    dunes = fractal_noise(rng, 4.5, octaves=(0, 3))
    depth = np.clip(0.55 + 0.3 * fractal_noise(rng, 4, octaves=(0, 3)), 0.3, 1)
    grain = fractal_noise(rng, 0.6, octaves=(4, 9))
    light = 0.52 + 0.24 * ripples * depth + 0.1 * dunes + 0.035 * grain
    return colour_ramp(light, [vary(rng, colour) for colour in look.colours])


def water(rng: np.random.Generator, look: Look) -> np.ndarray:
    """Waves lit from above: the colour follows the slope, steep slopes glint."""
    height = fractal_noise(rng, 3.4, stretch=(1, 2.6), octaves=(2, 7))
    height += 0.35 * fractal_noise(rng, 3, stretch=(1, 1.6), octaves=(4, 8))
    slope_y, slope_x = np.gradient(height)
    slope = 0.25 * slope_x - slope_y
    slope /= slope.std()
    glints = 70 * np.clip(slope - 1.7, 0, None)
    light = 0.42 + 0.17 * slope + 0.06 * height
    return colour_ramp(light, [vary(rng, colour, 7) for colour in look.colours]) + glints[..., None]


def clouds(rng: np.random.Generator, look: Look) -> np.ndarray:
    """Thresholded noise, bright where it is dense and lit from above, on a plain or a sunset sky."""
    sky_colour, shadow, light = look.colours[:3]
    density = fractal_noise(rng, 3.3, stretch=(1.5, 1)) + 0.5 * fractal_noise(rng, 2.9, octaves=(2, 6))
    density /= density.std()
    threshold = rng.uniform(-0.4, 0.5) - (0.6 if look.kind == "storm" else 0)
    cover = smoothstep(density, threshold - 0.35, threshold + 1.1)[..., None]
    underside = ndimage.gaussian_filter(density - np.roll(density, 7, 0), 2)
    brightness = 0.62 + 0.13 * (density - threshold) - 0.5 * underside
    sky = plain(vary(rng, sky_colour, 8))
    if look.kind == "sunset":
        low = smoothstep(coordinates()[0], 0.1, 0.95)[..., None]
        sky = sky * (1 - low) + vary(rng, look.colours[3]) * low
    sky = sky * (1 + 0.05 * fractal_noise(rng, octaves=(0, 2))[..., None])
    return sky * (1 - cover) + colour_ramp(brightness, [np.multiply(shadow, 0.9), vary(rng, shadow, 6), light]) * cover


def wood(rng: np.random.Generator, look: Look) -> np.ndarray:
    """Rows of planks; every row has one joint, above and below it a gap with a lit and a dark edge."""
    colours = [vary(rng, colour, 8) for colour in look.colours]
    gap = np.multiply(look.colours[0], 0.18)
    height = int(rng.integers(36, 58))
    edges = {0: 0, 1: 0, 2: 0, 3: 0, 4: 1.22, 5: 1.12, height - 2: 0.8, height - 1: 0.6}
    picture = plain(gap)
    for top in range(-int(rng.integers(0, height)), SIZE, height):
        row = _plank(rng, colours)
        joint = rng.integers(20, SIZE - 20)
        row[:, joint:] = _plank(rng, colours)[:, joint:]
        row[:, joint - 1 : joint + 3] = gap
        row[:, joint + 3 : joint + 5] *= 1.15
        for offset in range(height):
            if 0 <= top + offset < SIZE:
                shade = edges.get(offset, 1)
                picture[top + offset] = shade * row[top + offset] if shade else gap
    return picture


def _plank(rng: np.random.Generator, colours: Colours) -> np.ndarray:
    """A picture of endless grain: a sine of the height, bent by noise that is long along the plank."""
    bend = fractal_noise(rng, 3, stretch=(1, 9), octaves=(1, 6))
    fibres = fractal_noise(rng, 1.2, stretch=(1, 14), octaves=(3, 9))
    rings = np.sin(60 * coordinates()[0] + 2.4 * bend)
    return colour_ramp(0.5 + 0.15 * rings + 0.08 * fibres + rng.uniform(-0.24, 0.24), colours)


def lava(rng: np.random.Generator, look: Look) -> np.ndarray:
    """Cracks along the zero lines of two noises glow through a dark crust."""
    coarse, fine = (fractal_noise(rng, 4.6, octaves=(2, 6)), fractal_noise(rng, 4.4, octaves=(3, 6)))
    distance = np.minimum(np.abs(coarse), 1.3 * np.abs(fine)) + 0.05 * fractal_noise(rng, 2.2, octaves=(4, 9))
    glow = np.exp(-np.clip(distance, 0, None) * rng.uniform(4, 6))
    crust = np.clip(0.5 + 0.5 * fractal_noise(rng, 1.8, octaves=(3, 9)), 0, 2)
    return colour_ramp(glow, look.colours) + ((1 - glow) * crust)[..., None] * np.array((20, 17, 17))


def marble(rng: np.random.Generator, look: Look) -> np.ndarray:
    """Three families of veins: zero lines of bent waves, strong in some places and faint in others."""
    y, x = coordinates()
    veins: np.ndarray = np.zeros((SIZE, SIZE), np.float32)
    for _ in range(3):
        angle = rng.uniform(0, np.pi)
        bend = 1.5 * fractal_noise(rng, 4, octaves=(0, 6)) + 0.1 * fractal_noise(rng, 2.6, octaves=(4, 7))
        wave = np.sin(2 * np.pi * rng.uniform(1, 2.4) * (np.cos(angle) * x + np.sin(angle) * y) + bend)
        strength = rng.uniform(0.4, 1) * smoothstep(fractal_noise(rng, octaves=(0, 3)), -1.4, 0.6)
        veins = np.maximum(veins, strength * np.exp(-rng.uniform(7, 16) * np.abs(wave)))
    veins = np.clip(veins + 0.11 * smoothstep(fractal_noise(rng, 3.2), -1, 2), 0, 1)[..., None]
    stone, vein = look.colours
    return vary(rng, stone, 6) * (1 - veins) + vary(rng, vein, 8) * veins


def leaves(rng: np.random.Generator, look: Look, count: int = 230) -> np.ndarray:
    """A heap of leaves, the top ones brightest; drawn at twice the size and reduced."""
    canvas = Image.new("RGB", (2 * SIZE, 2 * SIZE), (14, 20, 10))
    draw = ImageDraw.Draw(canvas)
    for i in range(count):
        brightness = (0.42 + 0.62 * (i / count) ** 0.8) * rng.uniform(0.88, 1.12)
        _draw_leaf(rng, draw, brightness * np.array(look.colours[rng.integers(len(look.colours))]))
    picture = np.asarray(canvas.resize((SIZE, SIZE), Image.Resampling.LANCZOS), np.float32)
    return ndimage.gaussian_filter(picture, (0.5, 0.5, 0))


def _draw_leaf(rng: np.random.Generator, draw: ImageDraw.ImageDraw, colour: np.ndarray) -> None:
    """One leaf with a shadow, a bright and a dark half, side veins and a midrib, anywhere on the canvas."""
    length = 2 * rng.uniform(52, 84)
    angle = rng.uniform(0, 2 * np.pi)
    centre = 2 * rng.uniform(-25, SIZE + 25, 2)
    along = np.array([np.cos(angle), np.sin(angle)])
    across = np.array([-along[1], along[0]]) * length * rng.uniform(0.22, 0.3)
    t = np.linspace(0, 1, 13)
    width = np.sin(np.pi * t**0.85)[:, None] ** 0.9
    midrib = centre + np.outer((t - 0.5) * length, along)
    left, right = midrib + width * across, midrib - width * across

    def polygon(points: np.ndarray, shade: float) -> None:
        draw.polygon([tuple(point) for point in points], fill=_fill(colour * shade))

    polygon(np.concatenate([left, right[::-1]]) + (6, 8), 0.22)
    polygon(np.concatenate([left, midrib[::-1]]), 1.18)
    polygon(np.concatenate([right, midrib[::-1]]), 0.8)
    for i in (3, 5, 7, 9):
        for edge, shade in ((left, 0.92), (right, 0.62)):
            tip = midrib[i + 1] + 0.85 * (edge[i + 1] - midrib[i + 1])
            draw.line([tuple(midrib[i]), tuple(tip)], fill=_fill(colour * shade), width=2)
    draw.line([tuple(midrib[0]), tuple(midrib[-1])], fill=_fill(colour * 1.5 + 18), width=4)


def _fill(colour: np.ndarray) -> tuple[int, ...]:
    return tuple(int(channel) for channel in np.clip(colour, 0, 255))


def snow(rng: np.random.Generator, look: Look) -> np.ndarray:
    """Pillows of fresh snow lit from above: white lit sides, blue shadow sides, fine grain."""
    y, x = np.mgrid[:SIZE, :SIZE].astype(np.float32)
    height = np.zeros((SIZE, SIZE), np.float32)
    for _ in range(rng.integers(90, 150)):
        centre_y, centre_x = rng.uniform(0, SIZE, 2)
        radius = rng.uniform(10, 26)
        dy, dx = (np.abs(y - centre_y), np.abs(x - centre_x))
        dy, dx = (np.minimum(dy, SIZE - dy), np.minimum(dx, SIZE - dx))
        distance = (dy**2 + 0.6 * dx**2) / (1.8 * radius**2)
        height = np.maximum(height, radius * np.sqrt(np.clip(1 - distance, 0, 1)))
    height = ndimage.gaussian_filter(height, 3, mode="wrap") + 4 * fractal_noise(rng, 4, octaves=(0, 5))
    slope_y, slope_x = np.gradient(height)
    slope = slope_y + 0.6 * slope_x
    light = 0.60 + 0.2 * np.clip(slope / slope.std(), -2.2, 2) + 0.02 * fractal_noise(rng, 0.6, octaves=(5, 9))
    return colour_ramp(light, [vary(rng, colour, 5) for colour in look.colours])


def nebula(rng: np.random.Generator, look: Look) -> np.ndarray:
    """Two glowing gases on a dark sky with a few stars."""
    front, behind = look.colours
    gas = smoothstep(fractal_noise(rng, 3.6, octaves=(0, 6)), -1.3, 1.7)[..., None]
    mix = smoothstep(fractal_noise(rng, 3.6, octaves=(0, 6)), -1, 1.8)[..., None]
    wisps = 0.75 + 0.25 * np.clip(fractal_noise(rng, 2.8, octaves=(2, 6)), -2, 2)[..., None]
    colour = (1 - mix) * vary(rng, front, 14) + mix * vary(rng, behind, 14)
    picture = plain(vary(rng, (14, 8, 26), 4)) + 1.05 * gas * colour * wisps + 60 * gas**2 * mix
    return add_stars(rng, picture, small=int(rng.integers(110, 240)), large=int(rng.integers(8, 20)), faintest=90)


DRAWINGS = {
    function.__name__: function
    for function in (brick, grass, gravel, stars, sand, water, clouds, wood, lava, marble, leaves, snow, nebula)
}
"""Material to the function that draws it."""


def render(material: str, index: int, seed: int = 0, *, look: Look | None = None) -> Render:
    """The `index`-th picture of a material, in a given or a random look; the same for the same arguments.

    Raises:
        ValueError: for an unknown material.
    """
    if material not in DRAWINGS:
        raise ValueError(f"material: expected one of {', '.join(MATERIALS)}, got {material!r}")
    rng = np.random.default_rng([seed, MATERIALS.index(material), index])
    weights = np.array([look.weight for look in LOOKS[material]])
    drawn = LOOKS[material][rng.choice(len(weights), p=weights / weights.sum())]
    look = look or drawn
    return Render(to_uint8(DRAWINGS[material](rng, look)), material, look)


def sheet_of_materials(columns: int = 8, seed: int = 0) -> Image.Image:
    """One row per material, each picture the middle of a render."""
    start = (SIZE - WINDOW) // 2
    middle = (start, start, start + WINDOW, start + WINDOW)
    return contact_sheet(
        [
            [Image.fromarray(render(material, column, seed).image).crop(middle) for column in range(columns)]
            for material in MATERIALS
        ]
    )


def main(arguments: list[str] | None = None) -> int:
    """`python -m instantas.demo.training.materials OUT.png`."""
    program = "python -m instantas.demo.training.materials"
    return write_sheet(program, "One row per material.", sheet_of_materials, arguments)


if __name__ == "__main__":
    sys.exit(main())

"""What the drawings of all materials share: fractal noise, colour ramps, photographs, star fields.

Fields are float arrays (SIZE, SIZE), pictures float arrays (SIZE, SIZE, 3) of 0..255 that may still leave that range.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np

try:
    import skimage.data
    from scipy import ndimage
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(f"{error.name} is missing: pip install 'instantas[train]'", name=error.name) from error

Colour = Sequence[float] | np.ndarray  # red, green, blue, 0..255
Colours = Sequence[Colour]
SIZE = 320
"""Side of a drawing in pixels: two and a half native windows."""

BRICK_OUTLINE = ((97, 0), (379, 0), (512, 512), (0, 512))
"""Corners (x, y) of the wall in scikit-image's brick photograph, whose far end is smaller."""


def coordinates() -> tuple[np.ndarray, np.ndarray]:
    """(y, x) fields running from 0 to 1."""
    y, x = np.mgrid[:SIZE, :SIZE].astype(np.float32) / SIZE
    return y, x


def fractal_noise(
    rng: np.random.Generator,
    exponent: float = 3.0,
    stretch: tuple[float, float] = (1, 1),
    octaves: tuple[int, int] = (0, 9),
    shape: tuple[int, int] = (SIZE, SIZE),
) -> np.ndarray:
    """Periodic noise with the power spectrum 1 / f^exponent, zero mean, standard deviation 1; 0 where the shape is too
    small for the octaves.

    Args:
        rng: source of the white noise.
        exponent: larger is smoother; 0 is white.
        stretch: factors (y, x) by which features are longer along an axis.
        octaves: the band of frequencies, 2^low to 2^high cycles in SIZE pixels.
        shape: (height, width) in pixels.
    """
    fy = np.fft.fftfreq(shape[0])[:, None] * SIZE * stretch[0]
    fx = np.fft.fftfreq(shape[1])[None, :] * SIZE * stretch[1]
    frequency = np.hypot(fy, fx)
    frequency[0, 0] = 1
    amplitude = frequency ** (-exponent / 2) * (frequency >= 2.0 ** octaves[0]) * (frequency <= 2.0 ** octaves[1])
    amplitude[0, 0] = 0
    field = np.fft.ifft2(np.fft.fft2(rng.standard_normal(shape)) * amplitude).real
    return (field / (field.std() or 1)).astype(np.float32)


def smoothstep(values: np.ndarray, low: float | np.ndarray, high: float | np.ndarray) -> np.ndarray:
    """0 below `low`, 1 above `high`, 3 t^2 - 2 t^3 between."""
    t = np.clip((values - low) / (high - low), 0, 1)
    return t * t * (3 - 2 * t)


def colour_ramp(values: np.ndarray, colours: Colours) -> np.ndarray:
    """The picture that paints 0 in the first colour, 1 in the last and mixes neighbours between."""
    stops = np.linspace(0, 1, len(colours))
    channels = np.asarray(colours, np.float32).T
    return np.stack([np.interp(np.clip(values, 0, 1), stops, channel) for channel in channels], -1).astype(np.float32)


def plain(colour: Colour) -> np.ndarray:
    """A picture of one colour."""
    return np.full((SIZE, SIZE, 3), colour, np.float32)


def vary(rng: np.random.Generator, colour: Colour, amount: float = 10) -> np.ndarray:
    """The colour with each channel moved by up to `amount`."""
    return np.asarray(colour, np.float32) + rng.uniform(-amount, amount, 3).astype(np.float32)


def to_uint8(picture: np.ndarray) -> np.ndarray:
    return (np.clip(picture, 0, 255) + 0.5).astype(np.uint8)


def stretch_contrast(gray: np.ndarray) -> np.ndarray:
    """The 1st percentile to 0, the 99th to 1."""
    low, high = np.percentile(gray, [1, 99])
    return np.clip((gray - low) / (high - low), 0, 1).astype(np.float32)


def rectify(gray: np.ndarray, outline: Sequence[tuple[float, float]]) -> np.ndarray:
    """The part of a photograph inside a quadrangle, drawn as a square of the photograph's size.

    The projective map from the square to the quadrangle has eight unknowns; its four corners give eight equations.
    """
    size = len(gray)
    rows, targets = [], []
    for (u, v), (x, y) in zip(((0, 0), (size, 0), (size, size), (0, size)), outline):
        rows += [[u, v, 1, 0, 0, 0, -x * u, -x * v], [0, 0, 0, u, v, 1, -y * u, -y * v]]
        targets += [x, y]
    matrix = np.append(np.linalg.solve(np.array(rows, float), np.array(targets, float)), 1).reshape(3, 3)
    v, u = np.mgrid[:size, :size]
    x, y, depth = np.tensordot(matrix, np.stack([u, v, np.ones_like(u)]), 1)
    return ndimage.map_coordinates(gray, [y / depth, x / depth], order=3, mode="nearest")


@functools.cache
def photograph(name: str) -> np.ndarray:
    """One of scikit-image's CC0 photographs, "brick", "grass" or "gravel": float32 (512, 512), 0..1.

    The brick wall is freed from its perspective and turned upright.
    """
    gray = getattr(skimage.data, name)().astype(np.float32)
    if name == "brick":
        gray = np.rot90(rectify(gray, BRICK_OUTLINE))
    return stretch_contrast(gray)


def photograph_crop(rng: np.random.Generator, name: str, zoom: tuple[float, float]) -> np.ndarray:
    """A random square of a photograph, enlarged by a random factor between the two of `zoom`: float32, 0..1."""
    source = photograph(name)
    side = min(int(np.ceil(SIZE / rng.uniform(*zoom))), len(source))
    y, x = rng.integers(0, len(source) - side + 1, 2)
    crop = source[y : y + side, x : x + side]
    positions = (np.arange(SIZE) + 0.5) * side / SIZE - 0.5
    if side > SIZE:
        crop = ndimage.gaussian_filter(crop, 0.35 * (side / SIZE - 1))
    grid = np.meshgrid(positions, positions, indexing="ij")
    return np.clip(ndimage.map_coordinates(crop, grid, order=3, mode="nearest"), 0, 1)


def add_stars(
    rng: np.random.Generator, picture: np.ndarray, small: int, large: int, faintest: float = 45
) -> np.ndarray:
    """The picture with round stars added: `small` points, a fifth as many middling ones and `large` bright ones."""
    kinds = (
        (small, faintest, 210, 0.85, 4.2),
        (small // 5, 130, 330, 1.25, 8.5),
        (large, 420, 900, 1.9, 15),
    )
    for count, faint, bright, radius, gain in kinds:
        points = np.zeros_like(picture)
        y, x = rng.integers(0, np.array(picture.shape[:2])[:, None], (2, count))
        brightness = faint + (bright - faint) * rng.random((count, 1)) ** 2
        temperature = 1 + rng.normal(0, 0.1, (count, 1)) * np.array([[1, 0.2, -1]])
        points[y, x] = brightness * np.clip(temperature, 0.7, 1.3)
        picture = picture + gain * ndimage.gaussian_filter(points, (radius, radius, 0), mode="wrap")
    return picture

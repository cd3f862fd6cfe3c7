"""Measures of large pictures: seams, unrelated windows, repetition, lost detail, glued edges.

`python -m bench.quality FOLDER --window 128` measures every PNG and JPEG file of a folder. Needs numpy, scipy and
pillow. Pictures are float arrays (H, W, 3) in 0..1; positions and lengths are in pixels.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import numpy as np
from PIL import Image
from scipy import ndimage

CELL = 8  # pixels of a latent cell: a decoder leaves a grid of this period, so only positions on it are compared
LUMINANCE = np.array([0.299, 0.587, 0.114])
BANDS = ((1, 2), (2, 4), (4, 8), (8, 16), (16, 32), (32, 64))  # cycles per crop


def load_picture(path) -> np.ndarray:
    """(H, W, 3) float64 in 0..1."""
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")) / 255.0


def window_borders(length: int, window: int, cell: int = CELL) -> np.ndarray:
    """Positions where windows of a minimum cover begin or end inside an axis, evenly spread on cells."""
    cells, size = -(-length // cell), window // cell
    count = -(-cells // size)
    if count == 1:
        return np.zeros(0, dtype=np.int64)
    origins = np.arange(count) * (cells - size) // (count - 1)
    return np.unique(np.concatenate([origins[1:], origins[:-1] + size])) * cell


def steps_across(picture: np.ndarray, axis: int) -> np.ndarray:
    """Mean absolute difference between neighbouring columns (axis 1) or rows (axis 0); entry p: from p - 1 to p.

    Entry 0 is NaN, so that indices are positions.
    """
    across = np.abs(np.diff(picture, axis=axis)).mean(axis=(1 - axis, 2))
    return np.concatenate([[np.nan], across])


def control_positions(length: int, borders: Sequence[int], cell: int = CELL) -> np.ndarray:
    """Positions on the decoder's grid that are neither next to a border nor next to the picture's edge."""
    positions = np.arange(2 * cell, length - 2 * cell + 1, cell)
    distance = np.abs(positions[:, None] - np.asarray(borders)[None]).min(1)
    return positions[distance > cell]


def seam_ratio(picture: np.ndarray, borders: Sequence[int], axis: int, cell: int = CELL) -> float:
    """Mean absolute difference across the borders over that at the control positions of the same picture.

    axis 1: borders between columns (vertical seams); axis 0: between rows. Border and control positions are all
    multiples of `cell`, where decoder artefacts sit: those cancel. 1: no seam. Rows and columns that a material has of
    its own (bricks, planks) make single ratios scatter about 1: average over pictures, and read the interval.

    Raises:
        ValueError: without borders or without control positions.
    """
    controls = control_positions(picture.shape[axis], borders, cell) if len(borders) else borders
    if not len(borders) or not len(controls):
        raise ValueError(f"borders: expected some, and positions apart from them, got {list(borders)}")
    across = steps_across(picture, axis)
    return float(across[np.asarray(borders)].mean() / across[controls].mean())


def seam_scatter(picture: np.ndarray, borders: Sequence[int], axis: int, cell: int = CELL) -> float:
    """Standard deviation that the seam ratio would have without a seam, from the spread of the control positions.

    Large for bricks and planks, small for grass: its inverse is a weight for a mean over pictures.
    """
    controls = control_positions(picture.shape[axis], borders, cell)
    across = steps_across(picture, axis)[controls]
    return float(across.std(ddof=1) / across.mean() * np.sqrt(1 / len(borders) + 1 / len(controls)))


def seam_profile(picture: np.ndarray, borders: Sequence[int], axis: int, window: int, cell: int = CELL) -> np.ndarray:
    """The difference at every distance (in cells, -window/2 to window/2) from the borders, over the mean of all.

    What the seam ratio sees, drawn out: a seam is a peak in the middle, and the rest shows how far pictures without a
    seam scatter.
    """
    half = window // (2 * cell)
    offsets = np.arange(-half, half + 1) * cell
    positions = np.asarray(borders)[:, None] + offsets
    inside = (positions >= 2 * cell) & (positions <= picture.shape[axis] - 2 * cell)
    across = steps_across(picture, axis)[np.where(inside, positions, 1)]
    profile = np.where(inside, across, 0).sum(0) / np.maximum(inside.sum(0), 1)
    return np.where(inside.any(0), profile / profile[inside.any(0)].mean(), np.nan)


def native_crops(picture: np.ndarray, window: int) -> list[tuple[tuple[int, int], np.ndarray]]:
    """((y, x), crop) of the windows of a minimum cover; sides that hold no whole window are an error."""
    height, width = picture.shape[:2]
    if min(height, width) < window:
        raise ValueError(f"picture: expected sides of at least {window} pixels, got {height} x {width}")
    ys, xs = (np.linspace(0, n - window, -(-n // window)).astype(int) for n in (height, width))
    return [((y, x), picture[y : y + window, x : x + window]) for y in ys for x in xs]


def crop_features(crop: np.ndarray) -> np.ndarray:
    """18 statistics of a square crop.

    Mean and standard deviation of red, green and blue (6); log10 of the luminance's spectral power, which a Hann window
    keeps free of border effects, in six octaves by nearer to horizontal or to vertical frequency (12).
    """
    gray = crop @ LUMINANCE
    hann = np.hanning(len(gray))
    power = np.abs(np.fft.fft2((gray - gray.mean()) * np.outer(hann, hann))) ** 2 / gray.size
    fy, fx = np.meshgrid(*[np.fft.fftfreq(len(gray)) * len(gray)] * 2, indexing="ij")
    radius, horizontal = np.hypot(fy, fx), np.abs(fx) >= np.abs(fy)
    logs = [
        np.log10(power[(radius >= low) & (radius < high) & side].mean() + 1e-5)
        for low, high in BANDS
        for side in (horizontal, ~horizontal)
    ]
    return np.concatenate([crop.mean((0, 1)), crop.std((0, 1)), logs])


FEATURE_SCALE = np.concatenate([np.full(3, 0.05), np.full(3, 0.02), np.full(12, 0.25)])
"""Unit of each feature: a difference that is plain to the eye, and about the spread among crops of one real picture."""


def window_divergence(picture: np.ndarray, window: int) -> float:
    """Mean distance between the features of a picture's native crops: 0 for equal crops, larger as they drift apart.

    The distance of a pair is the root mean square over the 18 features of `crop_features`, in units of FEATURE_SCALE.
    Compare with the value of real pictures of the same subjects.
    """
    features = [crop_features(crop) / FEATURE_SCALE for _, crop in native_crops(picture, window)]
    if len(features) < 2:
        raise ValueError(f"picture: expected more than one window of {window}, got {picture.shape[:2]}")
    return float(np.mean([np.sqrt(np.mean((a - b) ** 2)) for a, b in combinations(features, 2)]))


def repetition(picture: np.ndarray, window: int) -> float:
    """How well a native crop can be found again in the crops farthest from it: 1 for copies, about 0.1 for noise.

    Peak over all cyclic shifts of the normalised cross-correlation of two crops' luminance, freed of what is broader
    than an eighth of the window; mean over the farther half of all pairs. Lattices score high by themselves, so compare
    like with like.
    """
    crops = native_crops(picture, window)
    if len(crops) < 2:
        raise ValueError(f"picture: expected more than one window of {window}, got {picture.shape[:2]}")
    spectra = []
    for _, crop in crops:
        gray = crop @ LUMINANCE
        gray = gray - ndimage.gaussian_filter(gray, window / 8)
        spectrum = np.fft.rfft2(gray - gray.mean())
        spectra.append(spectrum / max(np.sqrt(((gray - gray.mean()) ** 2).sum()), 1e-9))
    pairs = list(combinations(range(len(crops)), 2))
    distance = [np.hypot(*np.subtract(crops[i][0], crops[j][0])) for i, j in pairs]
    far = [pair for pair, d in zip(pairs, distance) if d >= np.median(distance)]
    return float(np.mean([np.fft.irfft2(spectra[i] * spectra[j].conj()).max() for i, j in far]))


def gradient_energy(picture: np.ndarray) -> float:
    """Mean squared difference of neighbouring luminance values, both directions: falls as detail is blurred."""
    gray = picture @ LUMINANCE
    return float((np.diff(gray, axis=0) ** 2).mean() + (np.diff(gray, axis=1) ** 2).mean())


def window_gradient_energy(picture: np.ndarray, window: int, margin: int = 16) -> float:
    """Gradient energy inside the native crops, a margin away from their borders: what seams add is left out."""
    inside = slice(margin, window - margin)
    return float(np.mean([gradient_energy(crop[inside, inside]) for _, crop in native_crops(picture, window)]))


def edge_distance(picture: np.ndarray, axis: int, window: int) -> float:
    """Difference of the two opposite outer lines over that of inner lines a window or more apart.

    About 1 for edges that know nothing of each other, far below for edges glued together. axis 1: left and right.
    """
    lines = np.moveaxis(picture, axis, 0)[4:-4:4]  # the outermost pixels hold the decoder's padding
    apart = -(-window // 4)
    inner = [np.abs(lines[i] - lines[j]).mean() for i in range(len(lines)) for j in range(i + apart, len(lines))]
    if len(inner) < 2:
        raise ValueError(f"picture: expected more than one window of {window} along axis {axis}, got {picture.shape}")
    return float(np.abs(lines[0] - lines[-1]).mean() / np.mean(inner))


def region_fidelity(
    picture: np.ndarray, masks: Sequence[np.ndarray], names: Sequence[str], classify, side: int = 128
) -> float:
    """Share of the crops of each region that a classifier gives to the region's name, averaged over the regions.

    Crops are squares of `side` pixels that lie wholly inside the region, `side / 4` apart.

    Args:
        masks: (H, W) bool, one for each region.
        classify: function of uint8 crops (n, side, side, 3) that gives their names.

    Raises:
        ValueError: for a region that holds no crop.
    """
    shares, apart = [], max(1, side // 4)
    for mask, name in zip(masks, names, strict=True):
        inside = np.lib.stride_tricks.sliding_window_view(np.asarray(mask, bool), (side, side))[::apart, ::apart]
        corners = np.argwhere(inside.all((2, 3))) * apart
        if not len(corners):
            raise ValueError(f"masks: expected room for {side} x {side} pixels in every region, got none for {name!r}")
        crops = np.stack([picture[y : y + side, x : x + side] for y, x in corners])
        found = classify((crops * 255).round().astype(np.uint8))
        shares.append(np.mean([other == name for other in found]))
    return float(np.mean(shares))


def bootstrap(
    values: Sequence[float], weights: Sequence[float] | None = None, confidence: float = 0.95, draws: int = 2000
) -> tuple[float, float]:
    """Percentile interval of the (weighted) mean under resampling of pictures."""
    values = np.asarray(values, dtype=float)
    weights = np.ones_like(values) if weights is None else np.asarray(weights, dtype=float)
    picks = np.random.default_rng(0).integers(0, len(values), (draws, len(values)))
    means = (values * weights)[picks].sum(1) / weights[picks].sum(1)
    tail = 50 * (1 - confidence)
    low, high = np.percentile(means, [tail, 100 - tail])
    return float(low), float(high)


def measure(picture: np.ndarray, window: int) -> dict[str, float]:
    """Every measure of one picture, for the borders of its minimum cover; directions of a single window left out."""
    values = {}
    for axis, name in ((1, "columns"), (0, "rows")):
        if len(borders := window_borders(picture.shape[axis], window)):
            values[f"seam_{name}"] = seam_ratio(picture, borders, axis)
            values[f"edge_{name}"] = edge_distance(picture, axis, window)
    if max(picture.shape[:2]) > window:
        values["divergence"] = window_divergence(picture, window)
        values["repetition"] = repetition(picture, window)
    return values | {"gradient": window_gradient_energy(picture, window)}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--window", type=int, default=128, help="native window in pixels")
    options = parser.parse_args(arguments)
    paths = sorted(p for p in options.folder.iterdir() if p.suffix.lower() in (".png", ".jpg", ".jpeg"))
    table = {path.name: measure(load_picture(path), options.window) for path in paths}
    for name, values in table.items():
        print(name, *(f"{measure} {value:.4f}" for measure, value in values.items()), sep="  ")
    for key in dict.fromkeys(key for values in table.values() for key in values):
        column = [values[key] for values in table.values() if key in values]
        low, high = bootstrap(column)
        print(f"{key}  mean {np.mean(column):.4f}  interval {low:.4f} to {high:.4f}  of {len(column)} pictures")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""A judge of pictures: which material does a crop of 128x128 px show?

A forest of extremely randomised trees (Geurts et al. 2006) on features of texture and colour, trained on fresh renders
and on what the embedded autoencoder makes of them, since everything that the model paints has gone through its decoder.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from instantas.demo import MATERIALS, folder
from instantas.demo.training.materials import render
from instantas.demo.training.palettes import LOOKS

try:
    from skimage.color import rgb2gray, rgb2lab
    from skimage.feature import local_binary_pattern
    from sklearn.ensemble import ExtraTreesClassifier
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(f"{error.name} is missing: pip install 'instantas[train]'", name=error.name) from error

SIDE = 128
"""Side of a crop in pixels: one native window."""

CROPS = 2
"""Crops taken of every render."""


def spectrum(gray: np.ndarray) -> np.ndarray:
    """log10 of the mean power of a (SIDE, SIDE) field in 32 rings of frequency, after a Hann window."""
    window = np.hanning(SIDE)
    power = np.abs(np.fft.fftshift(np.fft.fft2((gray - gray.mean()) * np.outer(window, window)))) ** 2
    y, x = np.mgrid[-SIDE // 2 : SIDE // 2, -SIDE // 2 : SIDE // 2]
    rings = (np.hypot(y, x) / 2).astype(int).ravel()
    return np.log10(np.bincount(rings, power.ravel())[:32] / np.bincount(rings)[:32] + 1e-6)


def features(crop: np.ndarray) -> np.ndarray:
    """Texture and colour of a uint8 crop (SIDE, SIDE, 3).

    Of the gray picture: histograms of local binary patterns (Ojala et al. 2002) at three radii and percentiles; of the
    same with mean 0 and deviation 1: the spectrum, gradients, skewness, kurtosis. Of the colours: mean and deviation in
    CIE Lab.
    """
    gray = rgb2gray(crop)
    normal = (gray - gray.mean()) / (gray.std() + 1e-6)
    patterns = [
        np.histogram(local_binary_pattern((255 * gray).astype(np.uint8), 8, radius, "uniform"), 10, (0, 10))[0]
        for radius in (1, 2, 4)
    ]
    gradient_y, gradient_x = np.gradient(normal)
    moments = [np.abs(gradient_x).mean(), np.abs(gradient_y).mean(), (normal**3).mean(), (normal**4).mean()]
    lab = rgb2lab(crop[::2, ::2])
    return np.concatenate(
        [
            *patterns,
            spectrum(normal),
            moments,
            lab.mean((0, 1)),
            lab.std((0, 1)),
            np.percentile(gray, [5, 50, 95]),
        ]
    )


def render_crops(per_material: int, seed: int) -> tuple[np.ndarray, list[str]]:
    """uint8 (n, SIDE, SIDE, 3), CROPS crops of each render one after the other, and their materials.

    A material's looks take turns, so that the rare ones are there too.
    """
    rng = np.random.default_rng([seed, 1])
    crops, names = [], []
    for material in MATERIALS:
        for index in range(per_material):
            looks = LOOKS[material]
            image = render(material, index, seed, look=looks[index % len(looks)]).image
            for y, x in rng.integers(0, image.shape[0] - SIDE + 1, (CROPS, 2)):
                crops.append(image[y : y + SIDE, x : x + SIDE])
                names.append(material)
    return np.stack(crops), names


@torch.no_grad()
def reconstruct(autoencoder: Any, crops: np.ndarray, batch: int = 16) -> np.ndarray:
    """The crops after encoding and decoding, uint8."""
    autoencoder = autoencoder.to(memory_format=torch.channels_last)
    decoded = []
    for start in range(0, len(crops), batch):
        pictures = torch.from_numpy(crops[start : start + batch]).permute(0, 3, 1, 2) / 127.5 - 1
        with torch.autocast("cpu", torch.bfloat16):
            output = autoencoder.decode(autoencoder.encode(pictures).latents).sample
        output = output.float().clamp(-1, 1)
        decoded.append(((output + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy())
    return np.concatenate(decoded)


class Judge:
    """Recognises materials; made by `Judge.train`."""

    def __init__(self, forest: ExtraTreesClassifier):
        self._forest = forest

    @classmethod
    def train(cls, seed: int = 0, per_material: int = 12, model: str | os.PathLike | None = None) -> Judge:
        """Train a judge on two crops of each render, one of them reconstructed; the same for the same arguments.

        Args:
            seed: start of all random numbers; renders of different seeds differ, though they share their photographs.
            per_material: renders of every material.
            model: folder of the model whose autoencoder reconstructs, by default the embedded one.

        Raises:
            ValueError: for a negative seed or fewer than one render.
        """
        if seed < 0:
            raise ValueError(f"seed: expected 0 or more, got {seed}")
        if per_material < 1:
            raise ValueError(f"per_material: expected at least 1, got {per_material}")
        from diffusers import AutoencoderTiny

        autoencoder = AutoencoderTiny.from_pretrained(Path(model or folder()) / "vae", torch_dtype=torch.float32)
        crops, names = render_crops(per_material, seed)
        crops[1::CROPS] = reconstruct(autoencoder, crops[1::CROPS])
        forest = ExtraTreesClassifier(200, random_state=seed, n_jobs=1)
        return cls(forest.fit(np.stack([features(crop) for crop in crops]), names))

    def classify(self, images: Sequence[np.ndarray] | np.ndarray) -> list[str]:
        """The material that each picture shows most likely.

        Args:
            images: uint8 (n, 128, 128, 3), an array or a sequence of arrays or PIL pictures.

        Raises:
            ValueError: for another shape.
            TypeError: for another dtype.
        """
        crops = np.stack([np.asarray(image) for image in images]) if len(images) else np.zeros((0, SIDE, SIDE, 3), "u1")
        if crops.dtype != np.uint8:
            raise TypeError(f"images: expected uint8, got {crops.dtype}")
        if crops.shape[1:] != (SIDE, SIDE, 3):
            raise ValueError(f"images: expected (n, {SIDE}, {SIDE}, 3), got {crops.shape}")
        if not len(crops):
            return []
        return [str(name) for name in self._forest.predict(np.stack([features(crop) for crop in crops]))]

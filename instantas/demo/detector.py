"""A detector of the subjects of scenes: where in a picture of any size they are, and how many.

A convolutional network that marks the middles of subjects and says their extents (Zhou, Wang and Kraehenbuehl 2019,
"Objects as Points"), trained on pictures that `training/planting.py` draws, half of them through the embedded model's
autoencoder. `python -m instantas.demo.training.detection --out FILE` trains it again in some ten minutes on one core.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from instantas.checks import real
from instantas.demo import SUBJECTS
from instantas.files import whole_file

SIDE = 256
"""Larger pictures are reduced until their area is that of a square of so many pixels."""

STRIDE = 4
"""Pixels of the map in which middles are marked."""

FOUND = 0.4
"""The least confidence that counts."""


class Found(NamedTuple):
    """A subject in a picture: its name, the confidence 0..1, its middle and extents in pixels."""

    subject: str
    confidence: float
    y: float
    x: float
    height: float
    width: float


class Block(nn.Module):
    """Two convolutions with group norms around a shortcut."""

    def __init__(self, channels: int):
        super().__init__()
        self.norms = nn.ModuleList(nn.GroupNorm(8, channels) for _ in range(2))
        self.layers = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x
        for norm, layer in zip(self.norms, self.layers):
            y = layer(F.silu(norm(y)))
        return x + y


class Network(nn.Module):
    """(B, 3, H, W) pictures in -1..1 -> (B, subjects + 2, H/4, W/4): logits of middles, then logarithms of extents.

    H and W are multiples of 32.
    """

    def __init__(self, channels: Sequence[int] = (16, 32, 48, 64, 96)):
        super().__init__()
        before = (3, *channels)
        self.down = nn.ModuleList(
            nn.Conv2d(narrow, wide, 4, stride=2, padding=1) for narrow, wide in zip(before, channels)
        )
        self.blocks = nn.ModuleList(Block(wide) for wide in channels)
        self.up = nn.ModuleList(nn.Conv2d(wide, narrow, 1) for narrow, wide in zip(channels[1:], channels[2:]))
        self.merge = nn.ModuleList(Block(narrow) for narrow in channels[1:-1])
        last = nn.Conv2d(64, len(SUBJECTS) + 2, 1)
        self.head = nn.Sequential(nn.Conv2d(channels[1], 64, 3, padding=1), nn.SiLU(), last)
        with torch.no_grad():  # middles are rare, and extents are some fifty pixels
            last.get_parameter("bias").copy_(torch.tensor([-4.0] * len(SUBJECTS) + [4.0] * 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kept = []
        for down, block in zip(self.down, self.blocks):
            x = block(down(x))
            kept.append(x)
        for up, merge, fine in zip(reversed(self.up), reversed(self.merge), kept[-2:0:-1]):
            x = merge(fine + F.interpolate(up(x), scale_factor=2))
        return self.head(x)


class Detector:
    """Finds subjects; made by `Detector.load` or `training.detection.train`."""

    def __init__(self, network: Network):
        self.network = network.eval()

    @classmethod
    def load(cls, path: str | os.PathLike | None = None) -> Detector:
        """The detector of a file that `save` has written, by default the one that comes along.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it is none of a detector.
        """
        network = Network()
        file = Path(path) if path is not None else Path(__file__).with_name("detector.safetensors")
        try:
            network.load_state_dict({name: weight.float() for name, weight in load_file(file).items()})
        except (SafetensorError, RuntimeError) as error:
            raise ValueError(f"path: expected a file that `save` has written, got {str(file)!r}: {error}") from error
        return cls(network)

    def save(self, path: str | os.PathLike) -> None:
        """Write the weights in float16, whole or not at all."""
        with whole_file(path) as part:
            save_file({name: weight.half().contiguous() for name, weight in self.network.state_dict().items()}, part)

    @torch.no_grad()
    def find(self, image: np.ndarray, confidence: float = FOUND) -> list[Found]:
        """The subjects of a picture, the surest first.

        Args:
            image: uint8 (h, w, 3), an array or a PIL picture, of any size.
            confidence: the least that counts, 0..1.

        Raises:
            ValueError, TypeError: for another shape or dtype, and a confidence out of range.
        """
        real("confidence", confidence, 0, 1)
        pixels = np.asarray(image)
        if pixels.dtype != np.uint8:
            raise TypeError(f"image: expected uint8, got {pixels.dtype}")
        if pixels.ndim != 3 or pixels.shape[2] != 3 or not pixels.size:
            raise ValueError(f"image: expected (h, w, 3), got {pixels.shape}")
        picture = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
        height, width = pixels.shape[:2]
        reduction = max(1.0, math.sqrt(height * width) / SIDE)
        size = [max(32, 32 * round(side / reduction / 32)) for side in (height, width)]
        picture = F.interpolate(picture, size, mode="bilinear", antialias=True, align_corners=False)
        scale = (height / size[0], width / size[1])
        maps = self.network(picture)[0]
        marks = maps[: len(SUBJECTS)].sigmoid()
        peaks = marks * (marks == F.max_pool2d(marks[None], 3, 1, 1)[0])
        found = []
        for subject, y, x in (peaks >= confidence).nonzero().tolist():
            sides = maps[len(SUBJECTS) :, y, x].exp()
            found.append(
                Found(SUBJECTS[subject], float(marks[subject, y, x]), (y + 0.5) * STRIDE * scale[0],
                      (x + 0.5) * STRIDE * scale[1], float(sides[0]) * scale[0], float(sides[1]) * scale[1])
            )  # fmt: skip
        return _distinct(sorted(found, key=lambda each: -each.confidence))


def overlap(a: Found, b: Found) -> float:
    """Intersection over union of two boxes."""
    inner = [
        max(0.0, min(p + s / 2, q + t / 2) - max(p - s / 2, q - t / 2))
        for p, s, q, t in ((a.y, a.height, b.y, b.height), (a.x, a.width, b.x, b.width))
    ]
    shared = inner[0] * inner[1]
    return shared / (a.height * a.width + b.height * b.width - shared + 1e-9)


def _distinct(found: list[Found]) -> list[Found]:
    """Of boxes that lie over each other, the surest: a place shows one thing."""
    kept: list[Found] = []
    for each in found:
        if all(overlap(each, other) < 0.3 for other in kept):
            kept.append(each)
    return kept

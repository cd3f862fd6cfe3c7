"""Scenes of two materials on the embedded model, with and without a start on a smaller canvas.

    python -m bench.structure --out out/structure --only shift coarse       # paints what is missing of some methods
    python -m bench.structure --out out/structure --table bench/results/structure.md --sheet docs/pictures/structure.jpg

The model's own scheduler (DDIM), 25 steps, guidance 2.5; the same seeds for every method. A picture that is in the
folder is not painted again. Needs `instantas[train]`.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage

from bench.bridging_pictures import SCENES
from bench.quality import gradient_energy, load_picture
from bench.structure_pictures import (
    MEASURES,
    arguments_of,
    border,
    bracket,
    cost,
    file_of,
    measures,
    octaves,
    paint,
    paint_all,
    seams,
    sheet,
)

PROMPTS = SCENES[:6]
SEEDS = {1: 5, 2: 5, 3: 2}  # of every prompt, by the windows a side
SIZES = {
    2: ["none", "shift", "coarse", "coarse, economy", "coarse, sigma 1.1", "shift, overlapping", "coarse, overlapping"],
    3: ["none", "shift", "coarse", "coarse, sigma 1.1", "shift, overlapping", "coarse, overlapping"],
}
LEAST = 0.03  # of the picture's area, that counts as a patch


def surface(picture: np.ndarray) -> np.ndarray:
    """(H, W, 12): colour and texture around each pixel, at two scales."""
    from skimage.color import rgb2lab

    lab = rgb2lab(picture)
    light = lab[..., 0]
    down, across = np.gradient(light)
    found = []
    for scale in (4, 8):
        means = [ndimage.gaussian_filter(channel, scale) for channel in np.moveaxis(lab, -1, 0)]
        edges = [np.log(ndimage.gaussian_filter(gradient**2, scale) + 0.1) for gradient in (down, across)]
        spread = np.log(np.maximum(ndimage.gaussian_filter(light**2, scale) - means[0] ** 2, 0) + 0.5)
        found += [*means, *edges, spread]
    return np.stack(found, axis=-1)


@functools.cache
def judge(out: Path, prompt: str) -> Any:
    """Tells a scene's two materials apart, pixel by pixel: trained on native pictures of each."""
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    features, names = [], []
    for number, material in enumerate(prompt.split(" next to ")):
        seeds = range(900, 908)
        paint(out, "native", 1, material, seeds)
        for seed in seeds:
            seen = surface(load_picture(file_of(out, "native", 1, material, seed)))[8:-8:6, 8:-8:6].reshape(-1, 12)
            features.append(seen)
            names += [number] * len(seen)
    return LinearDiscriminantAnalysis().fit(np.concatenate(features), names)


def patches(picture: np.ndarray, judge: Any) -> int:
    """Connected parts of one material that have at least `LEAST` of the area; 2 in a picture of "A next to B"."""
    seen = surface(picture)[::2, ::2]
    first = judge.decision_function(seen.reshape(-1, 12)).reshape(seen.shape[:2]) > 0
    first = ndimage.median_filter(first.astype(np.uint8), size=7)
    count = 0
    for material in (0, 1):
        parts, number = ndimage.label(first == material)
        count += sum(np.bincount(parts.ravel(), minlength=number + 1)[1:] > LEAST * first.size)
    return int(count)


def measure(out: Path, name: str, size: int) -> dict[str, np.ndarray]:
    """Of every picture: its patches, detail, octaves, and seam ratios with their weights."""
    found: dict[str, list] = dict(patches=[], detail=[], octaves=[], seams=[], weights=[])
    for prompt in PROMPTS:
        for seed in range(SEEDS[size]):
            picture = load_picture(file_of(out, name, size, prompt, seed))
            found["patches"].append(patches(picture, judge(out, prompt)))
            found["detail"].append(gradient_energy(picture))
            found["octaves"].append(octaves(picture))
            for quantity, values in zip(("seams", "weights"), seams(picture)):
                found[quantity] += values
    return {key: np.array(values) for key, values in found.items()}


def table(out: Path, sizes: dict[int, list[str]]) -> list[str]:
    """Lines of markdown: a table for each size, of the methods whose pictures are all there."""
    native = measure(out, "native", 1)
    lines = [f"Native pictures: {bracket(native['patches'])} patches."]
    for size, names in sizes.items():
        shift = measure(out, "shift", size)
        head = f"method | evaluations | patches | {MEASURES}"
        lines += ["", f"{size} x {size} windows, {len(shift['patches'])} pictures:", ""]
        lines += [f"| {head} |", "|---" * (1 + head.count("|")) + "|"]
        for name in names:
            if not file_of(out, name, size, PROMPTS[-1], SEEDS[size] - 1).exists():
                continue
            found = measure(out, name, size)
            rest = measures(found, shift, border(out, name, size, PROMPTS, SEEDS[size]))
            row = f"{cost(name, size):.2f} | {bracket(found['patches'])} | {rest}"
            lines.append(f"| {name} | {row} |")
    return lines


def main(arguments: list[str] | None = None) -> int:
    about = "of every prompt; fewer than the table needs are left out of it"
    options = arguments_of(__doc__.split("\n")[0], SIZES, None, about).parse_args(arguments)
    paint_all(options, PROMPTS, SIZES, lambda size: SEEDS[1] if size == 1 else options.seeds or SEEDS[size])
    lines = table(options.out, {size: SIZES[size] for size in options.size})
    print(*lines, sep="\n")
    if options.table:
        options.table.write_text("\n".join(lines) + "\n")
    if options.sheet:
        named = [(size, name) for size in (2, 3) for name in ("none", "shift", "coarse")]
        rows = [[file_of(options.out, name, size, prompt, 0) for prompt in PROMPTS] for size, name in named]
        sheet(rows, options.sheet, height=192, quality=80)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Borders of what is painted into a picture: an ellipse of the embedded model's 256x256 px, painted anew by its prompt.

    python -m bench.inpainting --out out/inpainting    # paints what is missing, some five minutes of one core

The mean difference of neighbouring pixels of which the mask holds one, over that of the same pixels in the picture to
start from, which has no border there; and for comparison that of neighbours inside the ellipse, over theirs.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from bench.quality import bootstrap, load_picture
from instantas import InstantASPipeline, demo

SIDE, ELLIPSE = 256, (60, 90, 180, 200)  # pixels; as in README.md
SEEDS = 2  # of every prompt


def drawn_mask() -> Image.Image:
    mask = Image.new("L", (SIDE, SIDE))
    ImageDraw.Draw(mask).ellipse(ELLIPSE, fill="white")
    return mask


def names() -> list[str]:
    return [f"{material}-{seed}" for material in demo.MATERIALS for seed in range(SEEDS)]


def paint_missing(out: Path) -> None:
    pipe = InstantASPipeline.from_pretrained(demo.folder())
    pipe.set_progress_bar_config(disable=True)
    for name in names():
        source, painted = out / f"{name}.png", out / f"{name}-painted.png"
        prompt, _, seed = name.rpartition("-")
        if not source.exists():
            generator = torch.Generator().manual_seed(int(seed))
            pipe(prompt, SIDE, SIDE, generator=generator).images[0].save(source)
        if not painted.exists():
            with Image.open(source) as opened:
                picture = opened.convert("RGB")
            generator = torch.Generator().manual_seed(1000 + int(seed))
            pipe(prompt, image=picture, mask_image=drawn_mask(), generator=generator).images[0].save(painted)
            print(painted, flush=True)


def differences(picture: np.ndarray, mask: np.ndarray) -> tuple[float, float]:
    """Mean absolute difference of neighbours: of which the mask holds one, and of which it holds both."""
    across, inside = [], []
    for axis in (0, 1):
        steps = np.abs(np.diff(picture, axis=axis)).mean(2)
        held = np.diff(mask.astype(int), axis=axis) == 0
        both = np.minimum(*(np.take(mask, range(i, SIDE - 1 + i), axis) for i in (0, 1)))
        across.append(steps[~held])
        inside.append(steps[both])
    return np.concatenate(across).mean(), np.concatenate(inside).mean()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("out/inpainting"))
    out = parser.parse_args(arguments).out
    out.mkdir(parents=True, exist_ok=True)
    paint_missing(out)
    mask = np.asarray(drawn_mask()) > 0
    logs = []
    for name in names():
        source, painted = (differences(load_picture(out / f"{name}{end}.png"), mask) for end in ("", "-painted"))
        logs.append([np.log(after / before) for before, after in zip(source, painted)])
        print(f"{name}: border {np.exp(logs[-1][0]):.3f}, inside {np.exp(logs[-1][1]):.3f}")
    print(f"{len(logs)} pictures, painted over source, geometric mean with its 95% bracket")
    for what, values in zip(("border", "inside"), np.array(logs).T):
        low, high = bootstrap(values)
        print(f"{what}: {np.exp(values.mean()):.3f} ({np.exp(low):.3f} to {np.exp(high):.3f})")


if __name__ == "__main__":
    main()

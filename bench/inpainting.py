"""Borders of what is painted into a picture: an ellipse of the embedded model's 256x256 px, painted anew by its prompt.

    python -m bench.inpainting --out out/inpainting    # paints what is missing, some ten minutes of one core

The mean difference of neighbouring pixels of which the mask holds one, over that of the same pixels in the picture to
start from, which has no border there; and for comparison that of neighbours inside the ellipse, over theirs. Both as
the pipeline joins the two by default, and only pasted.
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
BLENDS = {16: "drawn to the picture, the default", 0: "pasted alone"}


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
        source, (prompt, _, seed) = out / f"{name}.png", name.rpartition("-")
        if not source.exists():
            generator = torch.Generator().manual_seed(int(seed))
            pipe(prompt, SIDE, SIDE, generator=generator).images[0].save(source)
        with Image.open(source) as opened:
            picture = opened.convert("RGB")
        for blend in BLENDS:
            if not (painted := out / f"{name}-{blend}.png").exists():
                settings = dict(blend=blend, generator=torch.Generator().manual_seed(1000 + int(seed)))
                pipe(prompt, image=picture, mask_image=drawn_mask(), **settings).images[0].save(painted)
                print(painted, flush=True)


def differences(picture: np.ndarray, mask: np.ndarray) -> tuple[float, float]:
    """Mean absolute difference of neighbours: of which the mask holds one, and of which it holds both."""
    across, inside = [], []
    for axis in (0, 1):
        steps = np.abs(np.diff(picture, axis=axis)).mean(2)
        both = np.minimum(*(np.take(mask, range(i, SIDE - 1 + i), axis) for i in (0, 1)))
        across.append(steps[np.diff(mask, axis=axis)])
        inside.append(steps[both])
    return np.concatenate(across).mean(), np.concatenate(inside).mean()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("out/inpainting"))
    out = parser.parse_args(arguments).out
    out.mkdir(parents=True, exist_ok=True)
    paint_missing(out)
    mask = np.asarray(drawn_mask()) > 0
    print(f"{len(names())} pictures, painted over source, geometric mean with its 95% bracket")
    for blend, told in BLENDS.items():
        logs = []
        for name in names():
            source, painted = (load_picture(out / f"{name}{end}.png") for end in ("", f"-{blend}"))
            logs.append(np.log(np.divide(differences(painted, mask), differences(source, mask))))
        for what, values in zip(("border", "inside"), np.array(logs).T):
            low, high = np.exp(bootstrap(values))
            print(f"{told}, {what}: {np.exp(values.mean()):.2f} ({low:.2f} to {high:.2f})")


if __name__ == "__main__":
    main()

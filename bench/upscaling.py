"""Seams of enlarged pictures: the embedded model's, 128x128 px, four times as large, at the borders of their windows.

    python -m bench.upscaling --out out/upscaling      # paints what is missing, some ten minutes of one core

As `instantas upscale` with its defaults; without a bridge; and only resized, which has no windows and so no seams.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from PIL import Image

from bench.bridging import SIDE, seams
from bench.quality import load_picture
from instantas import InstantASPipeline, demo

SCALE, COUNT = 4, 16
LANCZOS = "Lanczos alone"
METHODS = {"shift": "shift, the default", "none": "no bridge"}  # by their names as bridges


def paint_missing(out: Path) -> None:
    pipe = InstantASPipeline.from_pretrained(demo.folder())
    pipe.set_progress_bar_config(disable=True)
    prompts = [prompt for prompt in demo.PROMPTS if " next to " not in prompt]
    for number in range(COUNT):
        prompt = prompts[number % len(prompts)]
        if not (small := out / f"{number}.png").exists():
            pipe(prompt, SIDE, SIDE, generator=torch.Generator().manual_seed(number)).images[0].save(small)
        with Image.open(small) as opened:
            picture = opened.convert("RGB")
        for name in METHODS:
            if not (large := out / f"{number}-{name}.png").exists():
                generator = torch.Generator().manual_seed(number)
                pipe.upscale(picture, SCALE, prompt, generator=generator, bridging=name).images[0].save(large)
                print(large, flush=True)
        if not (large := out / f"{number}-{LANCZOS}.png").exists():
            picture.resize((SCALE * SIDE, SCALE * SIDE), Image.Resampling.LANCZOS).save(large)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("out/upscaling"))
    out = parser.parse_args(arguments).out
    out.mkdir(parents=True, exist_ok=True)
    paint_missing(out)
    print(f"seam ratio of {COUNT} pictures (1: no seam), weighted mean with its 95% bracket: columns, rows, both")
    for name, told in {**METHODS, LANCZOS: LANCZOS}.items():
        groups = seams([load_picture(out / f"{number}-{name}.png") for number in range(COUNT)])
        print(f"{told}: {', '.join(group.weighted() for group in groups)}")


if __name__ == "__main__":
    main()

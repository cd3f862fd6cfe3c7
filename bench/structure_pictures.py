"""Pictures by several ways to begin and to bridge, on the embedded model, painted once; what is measured of all.

The model's own scheduler, steps and guidance; the same seeds for every method.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from bench.quality import bootstrap, load_picture, seam_ratio, seam_scatter, steps_across, window_borders
from bench.structure_rivals import RIVALS, STRENGTH, Overlapping
from instantas import InstantASPipeline, demo
from instantas.files import whole_file
from instantas.sampling import coarse
from instantas.sampling.settings import set_timesteps

SIDE, CELL = 128, 8  # of a native window, of a latent cell, in pixels
OCTAVES = (4, 8, 16, 32, 64, 128)  # wavelengths in pixels: bands between neighbours


class Method(NamedTuple):
    """Arguments of the pipeline's call; other methods are of `bench/structure_rivals.py`."""

    bridging: Any = "shift"
    start: Any = "none"
    method: str = "instantas"


METHODS = {
    "none": Method("none"),
    "shift": Method(),
    "dilated": Method("dilated"),
    "coarse": Method(start="coarse"),
    "coarse, economy": Method("economy", "coarse"),
    "coarse, sigma 1.1": Method(start=coarse.CoarseStart(sigma=1.1)),
    "MultiDiffusion": Method("default", method="multidiffusion"),
    "anchor": Method(method="anchor"),
    "refined": Method(method="refined"),
    "shift, overlapping": Method(Overlapping()),
    "coarse, overlapping": Method(Overlapping(), "coarse"),
    "coarse, economy, overlapping": Method(Overlapping(share=0.65), "coarse"),
}


@functools.cache
def pipeline() -> InstantASPipeline:
    pipe = InstantASPipeline.from_pretrained(demo.folder())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def file_of(out: Path, name: str, size: int, prompt: str, seed: int) -> Path:
    return out / f"{name}-{size}" / f"{prompt}-{seed}.png"


def paint(out: Path, name: str, size: int, prompt: str, seeds: range) -> None:
    """The pictures of a method, size x size windows, that are not there yet."""
    missing = [seed for seed in seeds if not file_of(out, name, size, prompt, seed).exists()]
    if not missing:
        return
    generators = [torch.Generator().manual_seed(seed) for seed in missing]
    canvas = dict(height=size * SIDE, width=size * SIDE, window_batch_size=20)
    if size > 1 and name in RIVALS:
        pictures = RIVALS[name](pipeline(), prompt, generators, **canvas).images
    else:
        method = METHODS[name]._asdict() if size > 1 else {}
        many = dict(num_images_per_prompt=len(missing), generator=generators)
        pictures = pipeline()(prompt, **canvas, **many, **method).images
    for seed, picture in zip(missing, pictures):
        keep(picture, file_of(out, name, size, prompt, seed))


def keep(picture: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path, overwrite=True) as part:
        picture.save(part, format="PNG")


def arguments_of(
    description: str, sizes: dict[int, list[str]], seeds: int | None, about: str
) -> argparse.ArgumentParser:
    """What both benchmarks are asked: where pictures lie, which to paint, what to write."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="+", choices=METHODS, help="methods to paint; by default all")
    parser.add_argument("--size", type=int, nargs="+", choices=sizes, default=list(sizes), help="windows a side")
    parser.add_argument("--seeds", type=int, default=seeds, help=about)
    parser.add_argument("--table", type=Path)
    parser.add_argument("--sheet", type=Path)
    return parser


def paint_all(
    options: argparse.Namespace, prompts: Iterable[str], sizes: dict[int, list[str]], seeds: Callable[[int], int]
) -> None:
    """The native pictures and those that are asked for; `seeds` says how many of a prompt, by windows a side."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    wanted = [(1, "native")]
    wanted += [(n, name) for n in options.size for name in sizes[n] if options.only is None or name in options.only]
    for size, name in wanted:
        for prompt in prompts:
            paint(options.out, name, size, prompt, range(seeds(size)))


def sheet(rows: Sequence[Sequence[Path]], path: Path, height: int, quality: int) -> None:
    """The pictures of files in rows, all reduced to one height; white where a row is shorter."""

    def shown(file: Path) -> np.ndarray:
        picture = Image.open(file).convert("RGB")
        reduced = picture.resize((picture.width * height // picture.height, height), Image.Resampling.LANCZOS)
        return np.pad(np.asarray(reduced), ((0, 3), (0, 3), (0, 0)), constant_values=255)

    lines = [np.concatenate([shown(file) for file in row], 1) for row in rows]
    width = max(line.shape[1] for line in lines)
    filled = [np.pad(line, ((0, 0), (0, width - line.shape[1]), (0, 0)), constant_values=255) for line in lines]
    with whole_file(path, overwrite=True) as part:
        Image.fromarray(np.concatenate(filled)).save(part, format="JPEG", quality=quality)


def cost(name: str, size: int) -> float:
    """Evaluations over those of minimum coverage."""
    pipe, method = pipeline(), METHODS[name]
    steps = pipe.defaults["num_inference_steps"]
    set_timesteps(pipe.scheduler, steps, None, torch.device("cpu"))
    plan = pipe.plan(size * SIDE, size * SIDE)
    if name in RIVALS:
        return 1 / plan.count + {"anchor": 1, "refined": int(STRENGTH * steps) / steps}[name]
    if method.method == "multidiffusion":
        return pipe.plan(size * SIDE, size * SIDE, method=method.method).count / plan.count
    runs = coarse.legs(coarse.start_of(method.start, pipe.defaults.get("coarse_sigma")), plan, pipe.scheduler)
    return coarse.evaluations(method.bridging, runs) / (steps * plan.count)


def octaves(picture: np.ndarray) -> list[float]:
    """log10 of the luminance's power in the bands between `OCTAVES`, and from 2 to 4 pixels, finest first."""
    gray = picture @ np.array([0.299, 0.587, 0.114])
    hann = np.outer(*map(np.hanning, gray.shape))
    power = np.abs(np.fft.fft2((gray - gray.mean()) * hann)) ** 2 / (hann**2).sum()
    radius = np.hypot(*np.meshgrid(*map(np.fft.fftfreq, gray.shape), indexing="ij"))
    bands = zip((2, *OCTAVES), OCTAVES)
    return [float(np.log10(power[(radius <= 1 / short) & (radius > 1 / long)].mean())) for short, long in bands]


def seams(picture: np.ndarray) -> tuple[list[float], list[float]]:
    """The seam ratios of both axes of a picture of square size, and their weights."""
    borders = window_borders(len(picture), SIDE)
    axes = (0, 1) if len(borders) else ()
    return [seam_ratio(picture, borders, axis) for axis in axes], [
        1 / seam_scatter(picture, borders, axis) for axis in axes
    ]


def border_steps(path: Path) -> float:
    """log of the mean difference across the window borders of a picture of square size, mean of both axes."""
    picture = load_picture(path)
    borders = window_borders(len(picture), SIDE)
    return float(np.mean([np.log(steps_across(picture, axis)[borders].mean()) for axis in (0, 1)]))


def border(out: Path, name: str, size: int, prompts: Iterable[str], seeds: int) -> str:
    """What a border adds: the difference across it over that in the same run with `Overlapping` resting windows.

    1: no seam, whatever is painted there. Empty where such a run was not painted.
    """
    apart = []
    for prompt, seed in itertools.product(prompts, range(seeds)):
        files = [file_of(out, method, size, prompt, seed) for method in (name, f"{name}, overlapping")]
        if all(file.exists() for file in files):
            apart.append(border_steps(files[0]) - border_steps(files[1]))
    if not apart:
        return ""
    return "{:.3f} ({:.3f} to {:.3f})".format(*np.exp([np.mean(apart), *bootstrap(apart)]))


MEASURES = "detail | seams | border | " + " | ".join(f"{a} to {b} px" for a, b in zip((2, *OCTAVES), OCTAVES))


def measures(found: dict[str, np.ndarray], shift: dict[str, np.ndarray], edge: str) -> str:
    """The cells of `MEASURES` of a method's pictures; detail and octaves over shift's. edge: of `border`."""
    detail = found["detail"].mean() / shift["detail"].mean()
    bands = " | ".join(f"{10**d:.2f}" for d in found["octaves"].mean(0) - shift["octaves"].mean(0))
    return f"{detail:.3f} | {bracket(found['seams'], found['weights'])} | {edge} | {bands}"


def bracket(values, weights=None, digits: int = 2) -> str:
    low, high = bootstrap(values, weights)
    return f"{np.average(values, weights=weights):.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"

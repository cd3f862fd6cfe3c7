"""What tiles do to a picture: the decoder's and the encoder's whole, in ours, in blended ones and in diffusers' own.

    python -m bench.codec                                   # the decoder of Stable Diffusion, three seeds, 64x300 cells
    python -m bench.codec --channels 16 32 64 64 --encode   # a small one, both ways
    python -m bench.codec --channels 8 16 16 16 --cells 1024x1024 --no-attention --seeds 0 --methods ours

The autoencoder has random weights; the latents' halves are unlike: one bright and flat, one dark and busy. Prints mean
and worst error against all at once in parts of the range, the contrast (deviation) of 30 strips against what it is at
once, processor time and the peak of memory beside the model. Each method runs in a process of its own.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import multiprocessing
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL

from instantas import ops
from instantas.pipelines import codec
from instantas.windows import WindowPlan

METHODS = "whole", "blended", "diffusers", "ours"
HALO, RAMP = 8, 16  # cells of blended tiles that do not count, and over which one gives way to the next
STRIPS = 30


def autoencoder(channels: Sequence[int], seed: int, attention: bool = True) -> AutoencoderKL:
    """Of Stable Diffusion's shape, with random weights and as many channels to a group."""
    torch.manual_seed(seed)
    return AutoencoderKL(
        block_out_channels=tuple(channels),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        norm_num_groups=channels[0] // 4,
        sample_size=512,
        mid_block_add_attention=attention,
    ).eval()


def unlike_halves(height: int, width: int, seed: int) -> torch.Tensor:
    """(1, 4, height, width) latents."""
    latents = torch.randn(1, 4, height, width, generator=torch.Generator().manual_seed(seed))
    left = torch.arange(width) < width // 2
    return 0.18215 * torch.where(left, 0.3 * latents + 1, 1.5 * latents - 0.5)


def blended(run, given: torch.Tensor, unit: int) -> torch.Tensor:
    """Tiles of 1024 pixels, each with statistics of its own, blended where they overlap."""
    cells = [side // unit for side in given.shape[-2:]]
    plan = WindowPlan.strided(*cells, codec.TILE, codec.TILE - 2 * HALO - RAMP)
    cut = WindowPlan(*given.shape[-2:], [side * unit for side in plan.window], plan.origins * unit)
    tiles = torch.cat([run(tile) for tile in ops.gather_windows(given, cut)[0].split(1)])
    scale = tiles.shape[-1] / plan.window[1]
    whole = [round(scale * side) for side in (*cells, *plan.window)]
    made = WindowPlan(*whole[:2], whole[2:], (plan.origins * scale).astype(int))
    weight = torch.from_numpy(_ramps(plan, scale))
    return ops.scatter_windows(tiles[None], made, weight)


def _ramps(plan: WindowPlan, scale: float) -> np.ndarray:
    axes = []
    for axis, length in enumerate((plan.height, plan.width)):
        window, origins = plan.window[axis], plan.origins[:, axis]
        centre = (np.arange(round(window * scale)) + 0.5) / scale
        sides = []
        for distance, edge in ((centre, 0), (window - centre, length - window)):
            ramp = ((distance - HALO) / RAMP).clip(0, 1)
            sides.append(np.where((origins == edge)[:, None], 1.0, ramp))
        axes.append(np.minimum(*sides))
    return (axes[0][:, :, None] * axes[1][:, None, :]).astype(np.float32)


@torch.inference_mode()
def measured(
    method: str, channels: Sequence[int], given: torch.Tensor, seed: int, encode: bool, attention: bool
) -> tuple[torch.Tensor, float, float]:
    """(result, seconds of the processor, MiB at the peak beside the model)."""
    torch.set_num_threads(1)
    vae = autoencoder(channels, seed, attention)
    if method == "diffusers":
        vae.enable_tiling()
    Path("/proc/self/clear_refs").write_text("5")  # the peak is that from here on
    before, started = _peak(), time.process_time()
    if method == "blended":
        run = (lambda x: vae.encode(x).latent_dist.mode()) if encode else (lambda x: vae.decode(x).sample)
        scale = vae.config.scaling_factor
        result = blended(run, given, 8) * scale if encode else blended(run, given / scale, 1)
    else:
        tiles = "auto" if method == "ours" else "whole"
        go = (lambda: codec.encode(vae, given, tiles=tiles, sample_mode="argmax")) if encode else None
        result = go() if go else codec.decode(vae, given, tiles=tiles)
    seconds = time.process_time() - started
    return result, seconds, _peak() - before


def _peak() -> float:
    """MiB of memory that this process had at most."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def saved(path: str, *arguments) -> tuple[float, float]:
    result, *figures = measured(*arguments)
    torch.save(result.clone(), path)
    return tuple(figures)


def errors(result: torch.Tensor, whole: torch.Tensor) -> str:
    off, span = (result - whole).abs(), whole.max() - whole.min()
    strips = [[part.std() for part in picture.tensor_split(STRIPS, -1)] for picture in (result, whole)]
    contrast = [float(a / b) for a, b in zip(*strips)]
    return f"{off.mean() / span:10.4%} {off.max() / span:9.3%}   {min(contrast):.4f} to {max(contrast):.4f}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.codec", description=__doc__.splitlines()[0])
    parser.add_argument("--channels", type=int, nargs=4, default=(128, 256, 512, 512))
    parser.add_argument("--cells", default="64x300", help="height x width of the latents")
    parser.add_argument("--seeds", type=int, nargs="+", default=(0, 1, 2))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--encode", action="store_true", help="the encoder too, on the picture of the decoder at once")
    parser.add_argument("--no-attention", action="store_true", help="in the middle: it compares all cells with all")
    given = parser.parse_args(arguments)
    height, width = map(int, given.cells.split("x"))
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(2**20)  # what is freed is the system's again, and the peak the true one
    context = multiprocessing.get_context("spawn")
    print(f"{given.channels}, {given.cells} cells: mean error, worst, contrast of strips, processor time, peak memory")
    for seed in given.seeds:
        latents, made = unlike_halves(height, width, seed), {}
        for encode in (False, True)[: 1 + given.encode]:
            source = made["whole"] / made["whole"].abs().max() if encode else latents
            made = {}
            for method in given.methods:
                with (
                    tempfile.TemporaryDirectory() as folder,
                    concurrent.futures.ProcessPoolExecutor(1, context) as process,
                ):
                    path = str(Path(folder, "result.pt"))
                    job = process.submit(
                        saved, path, method, given.channels, source, seed, encode, not given.no_attention
                    )
                    seconds, memory = job.result()
                    made[method] = torch.load(path)
                told = errors(made[method], made["whole"]) if "whole" in made else ""
                name = f"{'encode' if encode else 'decode'} {seed} {method}"
                print(f"{name:20} {told:50} {seconds:8.1f} s {memory:8.0f} MiB", flush=True)


if __name__ == "__main__":
    main()

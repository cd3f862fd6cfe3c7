"""A picture that is never held: noise, windows, bands, a BigTIFF file, and what of it is in memory at most.

    python -m bench.bands                                     # 16384x16384 px in bands
    python -m bench.bands --size 4096x4096 --at-once          # for comparison, decoded and written at once
    python -m bench.bands --size 4096x4096 --norms            # a decoder with group norms, which takes more passes

The network and the autoencoder are stand-ins of hardly any weights and channels, so what is measured is what ours holds
beside them: the peak of the process's memory above what it was before the noise was drawn. With real weights the
autoencoder's own activations in a tile come on top, and its layers on the whole latent (docs/bands.md).
Afterwards the file is opened again and compared with pieces that are decoded by themselves.
"""

from __future__ import annotations

import argparse
import resource
import time
from pathlib import Path

import numpy as np
import tifffile
import torch
from diffusers import AutoencoderKL, AutoencoderTiny

from instantas import InstantASPipeline, WindowPlan, demo, sample
from instantas.cli.bands import write_bands
from instantas.cli.pictures import write_picture
from instantas.pipelines import codec

WINDOW, STEPS, PIECES, PIECE, AROUND = 64, 4, 4, 32, 24  # cells, but for steps and pieces


def autoencoder(norms: bool) -> AutoencoderKL | AutoencoderTiny:
    torch.manual_seed(0)
    if not norms:
        return AutoencoderTiny(decoder_block_out_channels=(4,) * 4, num_decoder_blocks=(1,) * 4).eval()
    return AutoencoderKL(
        block_out_channels=(4,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=2,
        mid_block_add_attention=False,
    ).eval()


def resident() -> int:
    """Bytes of this process that are in memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def highest() -> int:
    """Bytes of this process that were in memory at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def compare(vae, latents: torch.Tensor, picture: np.ndarray) -> int:
    """The greatest difference between places of the picture and pieces of the latents that are decoded apart."""
    rows, columns = latents.shape[-2:]
    worst = 0
    for number in range(PIECES):
        top, left = (AROUND + number * (side - PIECE - 2 * AROUND) // (PIECES - 1) for side in (rows, columns))
        part = latents[:, :, top - AROUND : top + PIECE + AROUND, left - AROUND : left + PIECE + AROUND]
        apart = codec.decode(vae, part, tiles="whole")[0, :, 8 * AROUND : -8 * AROUND, 8 * AROUND : -8 * AROUND]
        apart = ((apart / 2 + 0.5).clamp(0, 1) * 255).round().permute(1, 2, 0).numpy()
        there = picture[8 * top : 8 * (top + PIECE), 8 * left : 8 * (left + PIECE)]
        worst = max(worst, int(np.abs(apart - there).max()))
    return worst


@torch.no_grad()
def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", default="16384x16384", help="WIDTHxHEIGHT in whole cells")
    parser.add_argument("--at-once", action="store_true")
    parser.add_argument("--norms", action="store_true")
    parser.add_argument("-o", "--output", type=Path, default=Path("out/big.tif"))
    options = parser.parse_args(arguments)
    width, height = map(int, options.size.split("x"))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    pipe = InstantASPipeline.from_pretrained(demo.folder())
    pipe.vae = autoencoder(options.norms)
    plan = WindowPlan.minimum_coverage(height // 8, width // 8, WINDOW)
    text = dict(prompt="", seed="0", size=options.size, settings="{}", Software="instantas")
    evaluated = 0

    def denoiser(windows, timestep, context):
        nonlocal evaluated
        evaluated += len(windows)
        return 0.1 * windows, 0.05 * windows

    before, start = resident(), time.perf_counter()
    latents = torch.randn(1, 4, plan.height, plan.width, generator=torch.Generator().manual_seed(0))
    settings = dict(num_inference_steps=STEPS, guidance_scale=2.0, bridging="shift")
    latents = sample(denoiser, latents, plan, pipe.scheduler, **settings)
    sampled, painted = highest() - before, time.perf_counter() - start
    if options.at_once:
        write_picture(pipe.decode(latents, height, width)[0], options.output, text, True)
    else:
        write_bands(pipe.bands(latents, height, width), options.output, width, height, text, True)
    peak, done = highest() - before, time.perf_counter() - start
    mib, canvas = 2**20, latents.numel() * 4
    print(f"{width}x{height} px, {'at once' if options.at_once else 'in bands'}, {type(pipe.vae).__name__}")
    print(f"evaluations {evaluated} of {plan.count} windows in {STEPS} steps, beside the network {painted:.0f} s")
    print(f"sampling: at most {sampled / mib:.0f} MiB, {sampled / canvas:.1f} canvases of {canvas / mib:.0f} MiB")
    print(f"decoding and writing: {done - painted:.0f} s; of all at most {peak / mib:.0f} MiB")
    pixels, file = 3 * width * height, options.output.stat().st_size
    print(f"the picture: {pixels / mib:.0f} MiB in uint8, {file / mib:.0f} in the file")
    if not options.norms:
        worst = compare(pipe.vae, latents, tifffile.imread(options.output))
        print(f"{PIECES} pieces decoded apart: they differ from the file by at most {worst} of 255")


if __name__ == "__main__":
    main()

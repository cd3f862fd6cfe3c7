"""`instantas upscale`: a larger picture of a picture, with detail that a model paints."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path
from typing import Any

import click
import torch

from instantas import __version__
from instantas.cli.cost import Memory
from instantas.cli.model import EMBEDDED, check_words, load
from instantas.cli.options import DTYPES, SCHEDULERS, Device
from instantas.cli.record import write_png
from instantas.files import check_writable
from instantas.sampling.bridging import DEFAULT, evaluations
from instantas.sampling.sampler import set_timesteps

MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")  # of 8 bits: others would be cut off


@click.command()
@click.argument("picture", type=click.Path(path_type=Path))
@click.option("--scale", type=float, default=4.0, show_default=True, help="Times as wide and as high.")
@click.option("--prompt", default="", help="What the picture shows.")
@click.option("--strength", type=float, default=0.35, show_default=True, help="Part of the steps: how much is made up.")
@click.option("--model", help="As of generate; by default the small model that comes along.")
@click.option("--steps", type=click.IntRange(1), help="Scheduler steps; by default the model's own number, else 50.")
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), help="By default a random one, which is printed.")
@click.option("--guidance", type=float, help="Guidance scale; by default the model's own, else 7.5.")
@click.option("--scheduler", type=click.Choice(sorted(SCHEDULERS)), help="By default the model's own.")
@click.option("--negative", metavar="PROMPT", help="What the picture should not show.")
@click.option("--bridging", default=DEFAULT, show_default=True, metavar="NAME[+NAME]", help="As of generate.")
@click.option("--window-batch", type=click.IntRange(1), default=4, show_default=True, help="Windows per network call.")
@click.option("--dtype", type=click.Choice(list(DTYPES)), help="By default float16 on a GPU, float32 elsewhere.")
@click.option("--device", type=Device(), help="By default cuda where there is one, else cpu.")
@click.option("-o", "--output", type=click.Path(path_type=Path), default="large.png", show_default=True)
@click.option("--force", is_flag=True, help="Replace the output file if it exists.")
def upscale(picture: Path, output: Path, force: bool, seed: int | None, **options: Any) -> None:
    """Enlarge PICTURE and write a PNG file."""
    if output.suffix.lower() != ".png":
        raise ValueError(f"output: expected a file name that ends in .png, got {output.name!r}")
    check_writable(output, overwrite=force)
    from instantas.pipelines.starts import stages

    image = read_picture(picture)
    sizes = stages((image.height, image.width), options["scale"])
    prompt, negative = options["prompt"], options["negative"]
    if options["model"] is None:
        check_words([prompt], negative)
    pipe = load(options["model"], options["scheduler"], options["dtype"], options["device"])
    steps, guidance = options["steps"], options["guidance"]
    settings = dict(
        num_inference_steps=pipe.defaults["num_inference_steps"] if steps is None else steps,
        guidance_scale=pipe.defaults["guidance_scale"] if guidance is None else guidance,
        strength=options["strength"],
        negative_prompt=negative,
        bridging=options["bridging"],
        window_batch_size=options["window_batch"],
    )
    height, width = sizes[-1]
    memory = Memory.of(pipe, height, width, (False, False), "instantas")
    memory.check(pipe.device, f"{width}x{height}")
    click.echo(f"{_evaluations(pipe, sizes, settings)}, memory: {memory}")
    seed = random.SystemRandom().randrange(2**32) if seed is None else seed
    large = pipe.upscale(
        image, options["scale"], prompt, generator=torch.Generator("cpu").manual_seed(seed), **settings
    )
    noted = settings | {
        "instantas": __version__,
        "model": options["model"] or EMBEDDED,
        "scheduler": options["scheduler"],
        "scheduler_class": type(pipe.scheduler).__name__,
        "dtype": str(pipe.dtype).removeprefix("torch."),
        "scale": options["scale"],
        "picture": str(picture.resolve()),
        "sha256": hashlib.sha256(picture.read_bytes()).hexdigest(),
    }
    text = dict(prompt=prompt, seed=str(seed), size=f"{width}x{height}", settings=json.dumps(noted))
    write_png(large.images[0], output, text | {"Software": f"instantas {__version__}"}, force)
    click.echo(f"{output}: {width}x{height}, seed {seed}")


def read_picture(path: Path) -> Any:
    """A picture file as RGB, turned the way its camera was held, on white where it is transparent.

    Raises:
        ValueError: for a file that is none, or one of more than 8 bits.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as opened:
            image = ImageOps.exif_transpose(opened)
    except (OSError, SyntaxError, ValueError) as error:  # what Pillow raises, by format
        raise ValueError(f"picture: expected a picture file, got {str(path)!r}: {error}") from error
    if image.mode not in MODES:
        raise ValueError(f"picture: expected 8 bits a channel, got mode {image.mode!r} of {str(path)!r}")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _evaluations(pipe, sizes, settings):
    """How often the network is evaluated on a window, in all stages."""
    from instantas.pipelines.starts import first_timestep

    set_timesteps(pipe.scheduler, settings["num_inference_steps"], None, pipe.device)
    steps = len(pipe.scheduler.timesteps) - first_timestep(pipe.scheduler, settings["strength"])
    counts = [evaluations(settings["bridging"], pipe.plan(*size), steps) for size in sizes]
    through = ", ".join(f"{width}x{height}" for height, width in sizes)
    return f"stages: {through}, evaluations: {sum(counts)} in {steps} steps each"

"""`instantas upscale`: a larger picture of a picture, with detail that a model paints."""

from __future__ import annotations

import contextlib
import random
from pathlib import Path
from typing import Any

import click
import torch

from instantas.checks import real
from instantas.cli.bands import in_bands
from instantas.cli.cost import Memory
from instantas.cli.finish import check_apart, check_finish, finish, say
from instantas.cli.inputs import whole
from instantas.cli.kept import Kept, checkpoint_option
from instantas.cli.like import check_beside, check_unchanged, resume_option
from instantas.cli.model import check_words, load
from instantas.cli.options import (
    OUTPUT,
    device_option,
    dtype_option,
    force_option,
    guidance_option,
    negative_option,
    scheduler_option,
    seed_option,
    steps_option,
    window_batch_option,
)
from instantas.cli.pictures import check_output, check_size, read_picture
from instantas.cli.processes import processes
from instantas.cli.record import record
from instantas.sampling.bridging import DEFAULT, evaluations
from instantas.sampling.settings import set_timesteps


@click.command()
@click.argument("picture", type=click.Path(path_type=Path), required=False)
@click.option("--scale", type=float, default=4.0, show_default=True, help="Times as wide and as high.")
@click.option("--prompt", default="", help="What the picture shows.")
@click.option("--strength", type=float, default=0.35, show_default=True, help="Part of the steps: how much is made up.")
@click.option("--model", help="As of generate; by default the small model that comes along.")
@steps_option
@seed_option
@guidance_option
@scheduler_option
@negative_option
@click.option("--bridging", default=DEFAULT, show_default=True, metavar="NAME[+NAME]", help="As of generate.")
@window_batch_option
@dtype_option
@device_option
@click.option("-o", "--output", type=click.Path(path_type=Path), default="large.png", show_default=True, help=OUTPUT)
@force_option
@resume_option
@checkpoint_option
@click.pass_context
def upscale(context: click.Context, **options: Any) -> None:
    """Enlarge PICTURE and write a file: PNG, JPEG, WebP or TIFF, by the name's ending."""
    with processes() as ranks:
        _upscale(context, ranks, **options)


def _upscale(context, ranks, picture, output, force, seed, resume, checkpoint, **options):
    check_output(output, force)
    from instantas.pipelines.starts import stages

    if resume:
        check_beside(context, resume["done"])
        check_unchanged(context, resume, [])
    if picture is None:
        raise click.MissingParameter(ctx=context, param=next(p for p in context.command.params if p.name == "picture"))
    image = read_picture(picture)
    scale, prompt, negative, model = (options[name] for name in ("scale", "prompt", "negative", "model"))
    if options["guidance"] is not None:
        real("guidance", options["guidance"])
    sizes = stages((image.height, image.width), scale)
    height, width = sizes[-1]
    check_size(output, width, height)
    kept = Kept(output, len(sizes), resume["file"] if resume else None)
    check_apart(kept, (width, height), [picture.resolve(), *([Path(whole(model))] if model else [])])
    kept.check(force)
    if model is None:
        check_words([prompt], negative)
    pipe = load(model, options["scheduler"], options["dtype"], options["device"])
    steps, guidance = options["steps"], options["guidance"]
    settings = dict(
        num_inference_steps=pipe.defaults["num_inference_steps"] if steps is None else steps,
        guidance_scale=pipe.defaults["guidance_scale"] if guidance is None else guidance,
        strength=options["strength"],
        negative_prompt=negative,
        bridging=options["bridging"],
        window_batch_size=options["window_batch"],
    )
    memory = Memory.of(pipe, height, width, (False, False), "instantas", in_bands(pipe, output, width, height))
    memory.check(pipe.device, f"{width}x{height}")
    click.echo(f"{_evaluations(pipe, sizes, settings)}, memory: {memory}")
    seed = random.SystemRandom().randrange(2**32) if seed is None else seed
    noted = settings | {"wrap": (False, False), "scale": scale, "picture": str(picture.resolve())}
    text = kept.text or record(
        pipe,
        prompt,
        seed,
        (width, height),
        noted,
        model=model,
        scheduler=options["scheduler"],
        files=[picture.resolve()],
    )
    check_finish(pipe, output, text, force)
    generator = torch.Generator("cpu").manual_seed(seed)
    settings |= dict(generator=generator, output_type="latent", checkpoint=kept.checkpoint(checkpoint, text))
    leads = ranks is None or ranks.rank == 0
    with kept.until_done("upscale") if leads else contextlib.nullcontext():
        latents = kept.finished() if ranks is None else ranks.first(kept.finished)  # rank 0 has the file
        if latents is None:
            latents = pipe.upscale(image, scale, prompt, group=ranks, **settings).images
        written = finish(pipe, latents.to(pipe.device, pipe.unet.dtype), output, text, force, ranks)
    say(written, text)


def _evaluations(pipe, sizes, settings):
    """How often the network is evaluated on a window, in all stages."""
    from instantas.pipelines.starts import first_timestep

    set_timesteps(pipe.scheduler, settings["num_inference_steps"], None, pipe.device)
    steps = len(pipe.scheduler.timesteps) - first_timestep(pipe.scheduler, settings["strength"])
    counts = [evaluations(settings["bridging"], pipe.plan(*size), steps) for size in sizes]
    through = ", ".join(f"{width}x{height}" for height, width in sizes)
    return f"stages: {through}, evaluations: {sum(counts)} in {steps} steps each"

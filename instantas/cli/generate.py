"""`instantas generate`: paints a picture, or goes on with one whose run was stopped."""

from __future__ import annotations

import contextlib
import random
from pathlib import Path
from typing import Any, cast

import click
import torch

from instantas.checks import real
from instantas.cli.bands import in_bands
from instantas.cli.cost import Memory
from instantas.cli.finish import check_apart, check_finish, finish, say
from instantas.cli.inputs import ControlType, LoraType, files, read_regions, whole
from instantas.cli.kept import Kept, checkpoint_option
from instantas.cli.like import (
    check_beside,
    check_unchanged,
    is_given,
    is_taken,
    replace_taken,
    resume_option,
    take_settings,
)
from instantas.cli.model import check_words, load
from instantas.cli.options import (
    OUTPUT,
    Sides,
    Size,
    device_option,
    dtype_option,
    force_option,
    guidance_option,
    negative_option,
    scheduler_option,
    seed_option,
    steps_option,
    window_batch_option,
    wrap_option,
)
from instantas.cli.pictures import check_output, check_size, read_picture, write_picture
from instantas.cli.processes import processes
from instantas.cli.record import record
from instantas.plots import check_figure
from instantas.regions import SCHEDULES, Region, RegionMap
from instantas.sampling import coarse
from instantas.sampling.bridging import BRIDGES, DEFAULT
from instantas.sampling.coarse import STARTS
from instantas.sampling.settings import check_interval, set_timesteps

STRENGTH = 0.8  # as in diffusers' img2img


@click.command()
@click.argument("prompt", required=False)
@click.option("--size", type=Size(), help="Width and height of the picture in pixels, any from 1 up.")
@click.option(
    "--model",
    help="Hub id, folder in diffusers' layout or checkpoint file; by default the small model that comes along.",
)
@steps_option
@seed_option
@guidance_option
@click.option(
    "--guidance-interval",
    type=(float, float),
    metavar="START END",
    default=(0.0, 1.0),
    show_default=True,
    help="Part of the run with guidance, as two fractions; elsewhere the prompt alone is evaluated.",
)
@scheduler_option
@negative_option
@wrap_option
@click.option("--image", type=click.Path(path_type=Path), help="A picture to start from, whose size is the default.")
@click.option(
    "--mask", type=click.Path(path_type=Path), help="Paint --image where this picture is white; black is kept."
)
@click.option("--extend", type=Sides(), help="Pixels painted beside --image, left of, above, right of and below it.")
@click.option(
    "--strength",
    type=float,
    help=f"Part of the steps taken from --image, 0 to 1; by default {STRENGTH}, with --mask or --extend 1: from noise.",
)
@click.option(
    "--lora",
    "loras",
    type=LoraType(),
    multiple=True,
    help="A file, folder or hub id with LoRA weights, and how much of them; by default 1. Repeatable.",
)
@click.option(
    "--control",
    "controls",
    type=ControlType(),
    multiple=True,
    help="A picture, and the ControlNet (file, folder or hub id) that is told it. Repeatable.",
)
@click.option("--method", type=click.Choice(["instantas", "multidiffusion"]), default="instantas", show_default=True)
@click.option(
    "--bridging",
    metavar="NAME[+NAME]",
    help=f"What ties the windows together: none, {', '.join(BRIDGES)}; by default {DEFAULT}, of multidiffusion none.",
)
@click.option(
    "--start",
    type=click.Choice(list(STARTS)),
    help="coarse: begin on a smaller canvas, for one scene in place of many and fewer evaluations; by default the "
    "model's own (coarse of the one that comes along) where it is possible and saves evaluations, else none.",
)
@click.option(
    "--coarse-sigma",
    type=float,
    help=f"noise / signal from which a coarse start goes on; by default the model's own, as calibrate has measured it, "
    f"else {coarse.SIGMA}.",
)
@click.option(
    "--region",
    "places",
    metavar="PROMPT@PLACE",
    multiple=True,
    help='A part with its own prompt: "grass@0,0.5,1,1" (left, top, right, bottom) or "grass@mask.png". Repeatable.',
)
@click.option("--regions", "regions_file", metavar="FILE.json", help="More regions: a list of Region's arguments.")
@click.option("--region-mode", type=click.Choice(["blend", "joint"]), default="blend", show_default=True)
@click.option("--base-weight", type=float, default=0.0, show_default=True, help="PROMPT's share beside the regions.")
@click.option(
    "--semantic-schedule",
    type=click.Choice(list(SCHEDULES)),
    default="constant",
    show_default=True,
    help="Regions' share over the steps.",
)
@click.option("--preview", type=click.Path(path_type=Path), help="Draw regions and windows to this file.")
@window_batch_option
@click.option("--cuda-graph", is_flag=True, help="Capture a step once and replay it; on a GPU, for many steps.")
@dtype_option
@device_option
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), default="instantas.png", show_default=True, help=OUTPUT
)
@force_option
@click.option(
    "--like",
    type=click.Path(path_type=Path),
    metavar="PICTURE",
    is_eager=True,
    callback=take_settings,
    help="Take all that is not given here, PROMPT included, from a picture that was painted before.",
)
@resume_option
@checkpoint_option
@click.pass_context
def generate(
    context: click.Context,
    prompt: str | None,
    size: tuple[int, int] | None,
    resume: dict[str, Any] | None,
    like: dict[str, Any] | None,
    image: Path | None,
    mask: Path | None,
    extend: tuple[int, ...] | None,
    places: tuple[str, ...],
    regions_file: str | None,
    output: Path,
    force: bool,
    preview: Path | None,
    **options: Any,
) -> None:
    """Paint PROMPT and write a file: PNG, JPEG, WebP or TIFF, by the name's ending."""
    check_output(output, force)
    if resume:
        check_beside(context, resume["done"])
    regions, notes = read_regions(places, regions_file)
    if taken := like or resume:
        notes = notes or taken["regions"]
        replace_taken(context)
        size, mask, extend = (context.params[name] for name in ("size", "mask", "extend"))
        check_unchanged(context, taken, [] if regions else notes)
        regions = regions or [Region(**note) for note in notes]
        if is_given(context, "method") and not is_given(context, "bridging"):  # it goes with the method
            options["bridging"] = None
    if options["guidance"] is not None:
        real("guidance", options["guidance"])
    check_interval(options["guidance_interval"])
    if options["coarse_sigma"] is not None:
        real("coarse_sigma", options["coarse_sigma"], 0, above=True)
    both = ("start", "coarse_sigma")  # the picture's give way to what is typed
    noted_start = {name: options[name] for name in both if is_taken(context, name) and options[name] is not None}
    options |= dict.fromkeys(noted_start)
    source = read_picture(image, "image") if image else None
    for name, given in (("mask", mask), ("extend", extend)):
        if given and source is None:
            raise ValueError(f"{name}: expected a picture beside it, got no --image")
    if mask and extend:
        raise ValueError(f"mask: expected none beside --extend, got {str(mask)!r}")
    if extend and not any(extend):
        raise ValueError("extend: expected pixels on some side, got 0,0,0,0")
    if source and extend:
        if is_given(context, "size"):
            raise ValueError(f"size: expected none beside --extend, got {size}")
        size = source.width + extend[0] + extend[2], source.height + extend[1] + extend[3]
    masked = read_picture(mask, "mask", "black") if mask else None
    hints = [read_picture(control.image, "control") for control in options["controls"]]
    for picture in filter(None, (source, *hints)):
        size = size or picture.size
    for name, value in (("prompt", prompt), ("size", size)):
        if value is None:
            raise click.MissingParameter(ctx=context, param=next(p for p in context.command.params if p.name == name))
    check_size(output, *cast(tuple[int, int], size))
    kept = Kept(output, resumed=resume["file"] if resume else None)
    read = [Path(whole(str(name))) for name in (options["model"], regions_file) if name]
    read += files(notes, image, options["loras"], options["controls"], mask)
    check_apart(kept, cast(tuple[int, int], size), read, preview)
    kept.check(force)
    if preview:
        check_figure(preview, overwrite=force, name="preview")
    inputs = dict(
        regions=regions, notes=notes, image=image, source=source, hints=hints, mask=mask, masked=masked, extend=extend
    )
    inputs["noted_start"] = noted_start
    with processes() as ranks:
        _paint(prompt, size, output, force, preview, kept, ranks, **inputs, **options)


def _paint(
    prompt,
    size,
    output,
    force,
    preview,
    kept,
    ranks,
    *,
    regions,
    notes,
    image,
    source,
    hints,
    mask,
    masked,
    extend,
    noted_start,
    model,
    steps,
    seed,
    guidance,
    scheduler,
    negative,
    strength,
    start,
    coarse_sigma,
    loras,
    controls,
    checkpoint,
    window_batch,
    dtype,
    device,
    **settings,
):
    from instantas.pipelines.starts import smaller_start

    if source is None and strength is not None:
        raise ValueError(f"strength: expected none without --image, got {strength}")
    if start == "coarse" and (source is not None or settings["method"] != "instantas"):
        raise ValueError(f"start: expected none with --image or --method multidiffusion, got {start}")
    if model is None:
        check_words([prompt, *(region.prompt for region in regions)], negative)
    pipe = load(model, scheduler, dtype, device, loras, controls)
    (width, height), wrap, method, bridging = size, settings["wrap"], settings["method"], settings["bridging"]
    if bridging is None:
        bridging = DEFAULT if method == "instantas" else "none"
    banded = in_bands(pipe, output, width, height) and not (mask or extend)  # these take the whole, to join it
    memory = Memory.of(pipe, height, width, wrap, method, banded)
    memory.check(pipe.device, f"{width}x{height}")
    steps = pipe.defaults["num_inference_steps"] if steps is None else steps
    plan = pipe.plan(height, width, wrap=wrap, method=method)
    set_timesteps(pipe.scheduler, steps, None, pipe.device)
    own = pipe.defaults | noted_start | ({} if coarse_sigma is None else {"coarse_sigma": coarse_sigma})
    try:
        wished = start or noted_start.get("start", "default")
        chosen = smaller_start(wished, own, method, source, plan, pipe.scheduler, bridging)
    except ValueError:
        if start or "start" not in noted_start:
            raise
        chosen = None
    if chosen is None and coarse_sigma is not None:
        raise ValueError(f"coarse_sigma: expected none without a coarse start, got {coarse_sigma}")
    settings = settings | dict(
        num_inference_steps=steps,
        guidance_scale=pipe.defaults["guidance_scale"] if guidance is None else guidance,
        negative_prompt=negative,
        strength=(1.0 if mask or extend else STRENGTH) if source is not None and strength is None else strength,
        bridging=bridging,
        window_batch_size=window_batch,
        start=chosen,
    )
    leads = ranks is None or ranks.rank == 0
    if preview and leads:
        shares = {name: settings[name] for name in ("wrap", "base_weight", "semantic_schedule")}
        drawn = RegionMap(regions, height, width, pipe.cell, pipe.canvas(height, width), **shares)
        drawn.preview(preview, plan)
        click.echo(f"{preview}: layout")
    painted = None if source is None else _painted(pipe, size, source, masked, extend)
    evaluations = _evaluations(pipe, plan, settings, len(regions), painted, measured="coarse_sigma" in own)
    click.echo(f"{evaluations}, memory: {memory}")
    seed = random.SystemRandom().randrange(2**32) if seed is None else seed
    generator = torch.Generator("cpu").manual_seed(seed)
    noted = settings | {
        "start": "none" if chosen is None else "coarse",
        "coarse_sigma": None if chosen is None else chosen.sigma,
        "regions": notes,
        "image": str(image.resolve()) if image else None,
        "mask": str(mask.resolve()) if mask else None,
        "extend": extend,
        "loras": list(map(str, loras)),
        "controls": list(map(str, controls)),
    }
    used = files(notes, image, loras, controls, mask)
    text = kept.text or record(pipe, prompt, seed, size, noted, model=model, scheduler=scheduler, files=used)
    check_finish(pipe, output, text, force)
    hint = hints if len(hints) > 1 else hints[0] if hints else None
    pictures = dict(image=hint) if source is None else dict(image=source, control_image=hint)
    asked = settings | dict(regions=regions, generator=generator, checkpoint=kept.checkpoint(checkpoint, text))
    asked["group"] = ranks
    written = [output]
    with kept.until_done("generate") if leads else contextlib.nullcontext():
        if extend:
            picture = pipe.extend(source, *extend, prompt, control_image=hint, **asked).images[0]
        elif mask:
            picture = pipe(prompt, mask_image=masked, **pictures, height=height, width=width, **asked).images[0]
        else:
            asked |= pictures | dict(height=height, width=width)
            latents = kept.finished() if ranks is None else ranks.first(kept.finished)  # rank 0 has the file
            if latents is None:
                latents = pipe(prompt, output_type="latent", **asked).images
            written = finish(pipe, latents.to(pipe.device, pipe.unet.dtype), output, text, force, ranks)
        if leads and (extend or mask):
            write_picture(picture, output, text, force)
    say(written, text)


def _painted(pipe, size, source, masked, extend):
    """(H, W) bool, the cells of the canvas that are painted; None: all."""
    from instantas.pipelines.outpainting import Margins
    from instantas.pipelines.pictures import read_masks

    (width, height), own = size, (source.height, source.width)
    given = Margins(*extend).mask(*own, pipe.cell) if extend else masked
    if given is None:
        return None
    canvas = tuple(side * pipe.cell for side in pipe.canvas(height, width))
    return read_masks(pipe.pipe, given, own, (height, width), canvas, 1)[0, 0, :: pipe.cell, :: pipe.cell].cpu()


def _evaluations(pipe, plan, settings, regions, painted, measured):
    """Windows, and how often the network is evaluated on one: the progress bar tells the time that is left of them."""
    from instantas.pipelines.starts import first_timestep

    begin = 0 if settings["strength"] is None else first_timestep(pipe.scheduler, settings["strength"])
    start = settings["start"]
    runs = coarse.legs(start, plan, pipe.scheduler)
    runs = [runs[0]._replace(begin=begin)] if begin else runs
    count = coarse.evaluations(settings["bridging"], runs, painted=painted)
    count *= 1 + regions * (settings["method"] == "multidiffusion")
    smaller = "".join(f", {run.steps} of them on {run.plan.width}x{run.plan.height} cells" for run in runs[:-1])
    if smaller:
        smaller += f", then from sigma {start.sigma}"
        smaller += "" if measured else ", which `instantas calibrate` has not measured for this model"
    return f"windows: {plan.count}, evaluations: {count} in {sum(run.steps for run in runs)} steps{smaller}"

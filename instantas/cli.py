"""The command line: `instantas generate | plan | bench | info`, also `python -m instantas`.

Errors are one line on standard error and exit code 2.
"""

from __future__ import annotations

import json
import platform
import random
import re
import sys
import warnings
from importlib import metadata
from pathlib import Path

import click
import torch

from instantas import __version__, ops
from instantas.files import check_writable, whole_file
from instantas.ops.backend import BACKENDS
from instantas.regions import SCHEDULES, Region, RegionMap, load_regions
from instantas.sampling.bridging import BRIDGES, DEFAULT
from instantas.windows import WindowPlan

SCHEDULERS = {  # command line's name -> diffusers' class and what it is made with
    "ddim": ("DDIMScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
    "deis": ("DEISMultistepScheduler", {}),
    "dpm++": ("DPMSolverMultistepScheduler", {}),
    "dpm++-single": ("DPMSolverSinglestepScheduler", {}),
    "dpm": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler-a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "kdpm2": ("KDPM2DiscreteScheduler", {}),
    "lcm": ("LCMScheduler", {}),
    "lms": ("LMSDiscreteScheduler", {}),
    "pndm": ("PNDMScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {}),
}
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class Size(click.ParamType):
    """WIDTHxHEIGHT in pixels."""

    name = "WxH"

    def convert(self, value, param, ctx):
        if isinstance(value, tuple):
            return value
        match = re.fullmatch(r"(\d+)x(\d+)", value)
        if not match or 0 in (size := tuple(map(int, match.groups()))):
            self.fail(f"expected WIDTHxHEIGHT in whole pixels from 1 up, such as 1024x512, got {value!r}", param, ctx)
        return size


class Wrap(click.ParamType):
    """x, y or x,y -> (vertical, horizontal)."""

    name = "x,y"

    def convert(self, value, param, ctx):
        if isinstance(value, tuple):
            return value
        axes = value.split(",")
        if not set(axes) <= {"x", "y"}:
            self.fail(f"expected x, y or x,y, got {value!r}", param, ctx)
        return "y" in axes, "x" in axes


class Device(click.ParamType):
    """A torch device that is really there."""

    name = "device"

    def convert(self, value, param, ctx):
        try:
            torch.empty(0, device=value)
        except (RuntimeError, AssertionError) as error:
            self.fail(f"expected a device that this machine has, got {value!r}: {_first_line(error)}", param, ctx)
        return value


size_option = click.option(
    "--size", type=Size(), required=True, help="Width and height of the picture in pixels, any from 1 up."
)
wrap_option = click.option("--wrap", type=Wrap(), default=(False, False), help="Axes that close to a circle.")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="instantas")
def app():
    """Pictures of any size from a pretrained text-to-image model, in the fewest network evaluations."""


@app.command()
@click.argument("prompt")
@size_option
@click.option("--model", help="Hub id or folder in diffusers' layout; by default the small model that comes along.")
@click.option("--steps", type=click.IntRange(1), help="Scheduler steps; by default the model's own number, else 50.")
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), help="By default a random one, which is printed.")
@click.option("--guidance", type=float, help="Guidance scale; by default the model's own, else 7.5.")
@click.option("--scheduler", type=click.Choice(sorted(SCHEDULERS)), help="By default the model's own.")
@click.option("--negative", metavar="PROMPT", help="What the picture should not show.")
@wrap_option
@click.option("--method", type=click.Choice(["instantas", "multidiffusion"]), default="instantas", show_default=True)
@click.option(
    "--bridging",
    metavar="NAME[+NAME]",
    help=f"What ties the windows together: none, {', '.join(BRIDGES)}; by default {DEFAULT}.",
)
@click.option(
    "--region",
    "places",
    metavar="PROMPT@PLACE",
    multiple=True,
    help='A part with its own prompt: "grass@0,0.5,1,1" (left, top, right, bottom) or "grass@mask.png". Repeatable.',
)
@click.option("--regions", "regions_file", metavar="FILE.json", help="More regions: a list of Region's arguments.")
@click.option("--region-mode", type=click.Choice(["blend", "joint"]), help="How regions mix; by default blend.")
@click.option("--base-weight", type=float, help="Share of PROMPT everywhere beside the regions; by default 0.")
@click.option("--semantic-schedule", type=click.Choice(list(SCHEDULES)), help="Regions' share over the steps.")
@click.option("--preview", type=click.Path(path_type=Path), help="Draw regions and windows to this file.")
@click.option("--window-batch", type=click.IntRange(1), help="Windows per network call; by default 4.")
@click.option("--cuda-graph", is_flag=True, help="Capture a step once and replay it; on a GPU, for many steps.")
@click.option("--dtype", type=click.Choice(list(DTYPES)), help="By default float16 on a GPU, float32 elsewhere.")
@click.option("--device", type=Device(), help="By default cuda where there is one, else cpu.")
@click.option("-o", "--output", type=click.Path(path_type=Path), default="instantas.png", show_default=True)
@click.option("--force", is_flag=True, help="Replace the output file if it exists.")
def generate(
    prompt,
    size,
    model,
    steps,
    seed,
    guidance,
    scheduler,
    negative,
    wrap,
    method,
    bridging,
    places,
    regions_file,
    region_mode,
    base_weight,
    semantic_schedule,
    preview,
    window_batch,
    cuda_graph,
    dtype,
    device,
    output,
    force,
):
    """Paint PROMPT and write a PNG file."""
    if output.suffix.lower() != ".png":
        raise ValueError(f"output: expected a file name that ends in .png, got {output.name!r}")
    check_writable(output, overwrite=force)
    if preview:
        if preview.resolve() == output.resolve():
            raise ValueError(f"preview: expected another file than the output, got {str(preview)!r}")
        check_writable(preview, overwrite=force)
    regions = [Region.parse(place) for place in places] + (load_regions(regions_file) if regions_file else [])
    pipe = _pipeline(model, scheduler, dtype, device)
    seed = random.SystemRandom().randrange(2**32) if seed is None else seed
    width, height = size
    settings = dict(
        num_inference_steps=steps,
        guidance_scale=guidance,
        negative_prompt=negative,
        wrap=wrap,
        method=method,
        bridging=bridging,
        region_mode=region_mode,
        base_weight=base_weight,
        semantic_schedule=semantic_schedule,
        window_batch_size=window_batch,
        cuda_graph=cuda_graph,
    )
    settings = pipe.defaults | {name: value for name, value in settings.items() if value is not None}
    if preview:
        shares = {name: settings[name] for name in ("wrap", "base_weight", "semantic_schedule") if name in settings}
        drawn = RegionMap(regions, height, width, pipe.cell, pipe.canvas(height, width), **shares)
        drawn.preview(preview, pipe.plan(height, width, wrap=wrap, method=method))
        click.echo(f"{preview}: layout")
    generator = torch.Generator("cpu").manual_seed(seed)
    picture = pipe(prompt, height=height, width=width, generator=generator, regions=regions, **settings).images[0]
    if regions:
        listed = json.loads(Path(regions_file).read_text(encoding="utf-8")) if regions_file else []
        settings["regions"] = [*places, *listed]
    settings |= {"model": model or "demo", "scheduler": type(pipe.scheduler).__name__, "dtype": str(pipe.dtype)}
    text = {"prompt": prompt, "seed": str(seed), "size": f"{width}x{height}", "settings": json.dumps(settings)}
    _write_png(picture, output, {**text, "Software": f"instantas {__version__}"}, force)
    click.echo(f"{output}: {width}x{height}, seed {seed}")


def _pipeline(model, scheduler, dtype, device):
    """The model on its device with the scheduler asked for."""
    import diffusers
    import transformers

    for library in (diffusers, transformers):  # their remarks on loading are nothing that the user can act on
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    from instantas import demo
    from instantas.pipelines.pipeline import InstantASPipeline

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = DTYPES[dtype or ("float16" if torch.device(device).type == "cuda" else "float32")]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch_dtype: the name that takes its place is too new
        pipe = InstantASPipeline.from_pretrained(model or demo.folder(), torch_dtype=dtype).to(device)
    if scheduler:
        name, settings = SCHEDULERS[scheduler]
        pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config, **settings)
    return pipe


def _write_png(picture, output: Path, text: dict[str, str], force: bool) -> None:
    from PIL.PngImagePlugin import PngInfo

    chunks = PngInfo()
    for key, value in text.items():
        chunks.add_itxt(key, value)
    with whole_file(output, overwrite=force) as part:
        picture.save(part, format="PNG", pnginfo=chunks)


@app.command()
@size_option
@wrap_option
@click.option("--window", type=click.IntRange(1), default=64, show_default=True, help="Native window, in latent cells.")
@click.option("--cell", type=click.IntRange(1), default=8, show_default=True, help="Pixels per latent cell.")
@click.option("--stride", type=click.IntRange(1), default=8, show_default=True, help="MultiDiffusion's, in cells.")
@click.option("--steps", type=click.IntRange(1), default=50, show_default=True)
@click.option("--plot", type=click.Path(path_type=Path), help="Draw the layout to this file.")
def plan(size, wrap, window, cell, stride, steps, plot):
    """Windows and network evaluations for a size, against MultiDiffusion's."""
    if plot:
        check_writable(plot)
    columns, rows = (-(-length // cell) for length in size)
    ours = WindowPlan.minimum_coverage(rows, columns, window, wrap=wrap)
    theirs = WindowPlan.strided(rows, columns, window, stride, wrap=wrap)
    click.echo(f"canvas          {rows} x {columns} cells (height x width), {size[0]}x{size[1]} px")
    click.echo(f"windows         {ours.count} of {ours.window[0]} x {ours.window[1]} (no cover has fewer)")
    click.echo(f"overlap         {ours.overlap:.1%} of the canvas is painted twice")
    click.echo(f"evaluations     {ours.count * steps} in {steps} steps")
    click.echo(f"MultiDiffusion  {theirs.count * steps} with {theirs.count} windows at stride {stride}")
    click.echo(f"ratio           {theirs.count / ours.count:.2f}")
    if plot:
        ours.plot(plot)
        click.echo(f"layout          {plot}")


@app.command()
@click.option("--quick", is_flag=True, help="In less than a minute, with wider quartiles.")
@click.option("--device", type=Device(), help="By default cuda where there is one, else cpu.")
@click.option("--dtype", type=click.Choice(list(DTYPES)), help="By default bfloat16 on a GPU, float32 elsewhere.")
def bench(quick, device, dtype):
    """Time the operations on this machine against what one would write in eager PyTorch."""
    from instantas.bench import cases
    from instantas.bench.measure import DisagreementError, machine

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = DTYPES[dtype or ("bfloat16" if torch.device(device).type == "cuda" else "float32")]
    comparisons = cases.small(device, dtype, quick)
    table = []
    with click.progressbar(length=100 * len(comparisons), label="measuring", file=sys.stderr) as bar:
        for i, case in enumerate(comparisons):
            try:
                table.append(case(progress=lambda share, i=i: bar.update(int(100 * (i + share)) - bar.pos)))
            except DisagreementError as error:
                raise click.ClickException(str(error)) from error
    click.echo(", ".join(f"{name} {value}" for name, value in machine(device).items()))
    for comparison in table:
        click.echo("\n" + comparison.table())


@app.command()
def info():
    """Versions, devices, and which backends can run here."""
    click.echo(f"instantas {__version__}, Python {platform.python_version()}, {platform.machine()} {platform.system()}")
    for package in ("torch", "triton", "diffusers", "transformers"):
        click.echo(f"  {package:<13} {_version(package)}")
    click.echo("devices")
    click.echo(f"  cpu           {torch.get_num_threads()} threads")
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        memory = f"{properties.total_memory / 2**30:.0f} GiB"
        click.echo(f"  cuda:{i}        {properties.name}, sm_{properties.major}{properties.minor}, {memory}")
    click.echo("backends")
    for name, state in ops.backends().items():
        click.echo(f"  {name:<13} {BACKENDS[name].description}: {state}")


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit."""
    try:
        app(arguments, prog_name="instantas", standalone_mode=False)
    except click.ClickException as error:
        message = _first_line(Exception(error.format_message()))
    except click.Abort:
        message = "stopped"
    except ImportError as error:
        extra = "plot" if (error.name or "").startswith("matplotlib") else "diffusers"
        message = f"{_first_line(error)}; this command needs: pip install 'instantas[{extra}]'"
    except (ValueError, TypeError, OSError, torch.OutOfMemoryError) as error:
        message = _first_line(error)
    else:
        return
    click.echo(f"instantas: {message}", err=True)
    sys.exit(2)

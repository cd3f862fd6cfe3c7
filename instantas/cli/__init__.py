"""The command line: `instantas generate | upscale | calibrate | plan | bench | comfyui | info`, `python -m instantas`.

Errors are one line on standard error and exit code 2.
"""

from __future__ import annotations

import platform
import sys
from importlib import metadata
from pathlib import Path

import click
import torch

from instantas import __version__, ops
from instantas.cli.calibrate import calibrate
from instantas.cli.comfyui import comfyui
from instantas.cli.cost import window_count
from instantas.cli.errors import message
from instantas.cli.generate import generate
from instantas.cli.options import DTYPES, Size, default_device, device_option, wrap_option
from instantas.cli.upscale import upscale
from instantas.ops.backend import BACKENDS
from instantas.plots import check_figure
from instantas.windows import WindowPlan

LARGEST_PLOT = 10_000  # windows


@click.group(context_settings={"help_option_names": ["-h", "--help"]}, invoke_without_command=True)
@click.version_option(__version__, prog_name="instantas")
@click.pass_context
def app(context: click.Context) -> None:
    """Pictures of any size from a pretrained text-to-image model, in the fewest network evaluations."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


app.add_command(generate)
app.add_command(upscale)
app.add_command(calibrate)
app.add_command(comfyui)


@app.command()
@click.option("--size", type=Size(), required=True, help="Width and height of the picture in pixels, any from 1 up.")
@wrap_option
@click.option("--window", type=click.IntRange(1), default=64, show_default=True, help="Native window, in latent cells.")
@click.option("--cell", type=click.IntRange(1), default=8, show_default=True, help="Pixels per latent cell.")
@click.option("--stride", type=click.IntRange(1), default=8, show_default=True, help="MultiDiffusion's, in cells.")
@click.option("--steps", type=click.IntRange(1), default=50, show_default=True)
@click.option("--plot", type=click.Path(path_type=Path), help="Draw the layout to this file.")
def plan(
    size: tuple[int, int],
    wrap: tuple[bool, bool],
    window: int,
    cell: int,
    stride: int,
    steps: int,
    plot: Path | None,
) -> None:
    """Windows and network evaluations for a size, against MultiDiffusion's."""
    if stride > window:
        raise ValueError(f"stride: expected at most the window's {window} cells, got {stride}")
    columns, rows = (-(-length // cell) for length in size)
    h, w = min(window, rows), min(window, columns)
    ours = window_count((rows, columns), (h, w), wrap)
    theirs = window_count((rows, columns), (h, w), wrap, (stride, stride))
    if plot:
        if ours > LARGEST_PLOT:
            raise ValueError(f"plot: expected at most {LARGEST_PLOT} windows, got {ours}")
        check_figure(plot, name="plot")
    click.echo(f"canvas          {rows} x {columns} cells (height x width), {size[0]}x{size[1]} px")
    click.echo(f"windows         {ours} of {h} x {w} (no cover has fewer)")
    click.echo(f"overlap         {ours * h * w / (rows * columns) - 1:.1%} of the canvas is painted twice")
    click.echo(f"evaluations     {ours * steps} in {steps} steps")
    click.echo(f"MultiDiffusion  {theirs * steps} with {theirs} windows at stride {stride}")
    click.echo(f"ratio           {theirs / ours:.2f}")
    if plot:
        WindowPlan.minimum_coverage(rows, columns, window, wrap=wrap).plot(plot)
        click.echo(f"layout          {plot}")


@app.command()
@click.option("--quick", is_flag=True, help="In less than a minute, with wider quartiles.")
@device_option
@click.option("--dtype", type=click.Choice(list(DTYPES)), help="By default bfloat16 on a GPU, float32 elsewhere.")
def bench(quick: bool, device: str | None, dtype: str | None) -> None:
    """Time the operations on this machine against what one would write in eager PyTorch."""
    from instantas.bench import cases
    from instantas.bench.measure import DisagreementError, machine

    device = device or default_device()
    usual = "bfloat16" if torch.device(device).type == "cuda" else "float32"
    comparisons = cases.small(device, DTYPES[dtype or usual], quick)
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
@click.option("--prompts", is_flag=True, help="What the small model that comes along can paint, in place of these.")
def info(prompts: bool) -> None:
    """Versions, devices, and which backends can run here."""
    if prompts:
        _list_prompts()
        return
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


def _list_prompts():
    from instantas import demo

    click.echo("materials, then the subjects of scenes: their names; their looks, or settings and lights")
    for name, (nouns, looks) in demo.vocabulary().items():
        click.echo(f"  {name:<10} {', '.join(nouns)}; {', '.join(looks)}")
    click.echo("prompts")
    for prompt, look in (demo.PROMPTS | demo.SCENE_PROMPTS).items():
        click.echo(f"  {prompt:<30} {look}")


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit."""
    try:
        app(arguments, prog_name="instantas", standalone_mode=False)
    except Exception as error:
        if (line := message(error)) is None:
            raise
        click.echo(f"instantas: {line}", err=True)
        sys.exit(2)

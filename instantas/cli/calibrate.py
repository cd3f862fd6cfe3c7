"""`instantas calibrate`: measures from which noise level a model's coarse starts go on, and keeps it beside it."""

from __future__ import annotations

from pathlib import Path

import click

from instantas.checks import real
from instantas.cli.model import load
from instantas.cli.options import (
    SEED,
    device_option,
    dtype_option,
    guidance_option,
    scheduler_option,
    steps_option,
    window_batch_option,
)
from instantas.files import check_writable
from instantas.sampling.calibration import SHARE

SETTING = "coarse_sigma"


@click.command()
@click.argument("model")
@click.option("--prompt", "prompts", multiple=True, help="What is painted to measure on, repeatable; by default four.")
@click.option("--pictures", type=click.IntRange(1), default=2, show_default=True, help="Of each prompt.")
@steps_option
@guidance_option
@scheduler_option
@click.option("--seed", type=SEED, default=0, show_default=True)
@click.option("--scale", type=float, default=2.0, show_default=True, help="Times as long as the small canvas's side.")
@window_batch_option
@dtype_option
@device_option
def calibrate(
    model: str,
    prompts: tuple[str, ...],
    pictures: int,
    steps: int | None,
    guidance: float | None,
    scheduler: str | None,
    seed: int,
    scale: float,
    window_batch: int,
    dtype: str | None,
    device: str | None,
) -> None:
    """Measure from which noise level coarse starts go on with MODEL, once, and keep it in its instantas.json.

    MODEL is a folder in diffusers' layout; of a hub id or a checkpoint file the value is printed alone.
    """
    from instantas.pipelines import calibration
    from instantas.pipelines.loading import DEFAULTS_FILE, is_cached, keep_default, read_defaults

    real("scale", scale, 1, 1e9, above=True)
    if guidance is not None:
        real("guidance", guidance)
    folder = Path(model).expanduser()
    keeps = folder.is_dir() and not is_cached(folder)
    if keeps:
        check_writable(folder / DEFAULTS_FILE, name="model")
    before = read_defaults(folder).get(SETTING) if keeps else None
    pipe = load(model, scheduler, dtype, device)
    found = calibration.calibrate(
        pipe,
        prompts or calibration.PROMPTS,
        pictures=pictures,
        seed=seed,
        scale=scale,
        num_inference_steps=steps,
        guidance_scale=guidance,
        window_batch_size=window_batch,
    )
    click.echo(found.table())
    sigma = round(found.sigma(), 3)
    click.echo(f"sigma {sigma}: from there up less than {SHARE} of the detail is made out")
    if keeps:
        keep_default(folder, SETTING, sigma)
        was = "" if before is None else f", in place of {before}"
        click.echo(f'{folder / DEFAULTS_FILE}: "{SETTING}": {sigma}{was}')
    else:
        click.echo(f"not kept, as {model} is no folder of your own: generate --start coarse --coarse-sigma {sigma},")
        click.echo(
            f'CoarseStart(sigma={sigma}), or a copy of the model with "{SETTING}": {sigma} in its {DEFAULTS_FILE}'
        )

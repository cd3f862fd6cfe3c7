"""The model that a command is given: loaded, and the words that the embedded one knows."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import click
import torch

from instantas.cli.options import DTYPES, SCHEDULERS, default_device

EMBEDDED = "demo"  # the name of the model that comes along in a picture's settings


def load(model: str | None, scheduler: str | None, dtype: str | None, device: str | None) -> Any:
    """The model on its device with the scheduler asked for."""
    import diffusers
    import transformers

    for library in (diffusers, transformers):  # their remarks on loading are nothing that the user can act on
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    from instantas import demo
    from instantas.pipelines.arguments import check_pipeline
    from instantas.pipelines.pipeline import InstantASPipeline

    device = device or default_device()
    precision = DTYPES[dtype or ("float16" if torch.device(device).type == "cuda" else "float32")]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch_dtype: the name that takes its place is too new
        pipe = InstantASPipeline.from_pretrained(model or demo.folder(), torch_dtype=precision).to(device)
    check_pipeline(pipe.pipe, whole=True)
    if scheduler:
        name, settings = SCHEDULERS[scheduler]
        pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config, **settings)
    return pipe


def check_words(prompts: Sequence[str], negative: str | None) -> None:
    """What the embedded model has no word for is told, and refused where it has none at all."""
    from instantas import demo

    unknown = list(dict.fromkeys(word for text in (*prompts, negative or "") for word in demo.unknown_words(text)))
    told = f"it paints {', '.join(demo.MATERIALS)} (`instantas info --prompts` has all words)"
    if unknown:
        told = f"the embedded model has never seen {', '.join(map(repr, unknown))}; {told}"
    for prompt in prompts:
        if prompt.strip() and not demo.names_material(prompt):
            raise ValueError(f"prompt: expected something that the embedded model paints, got {prompt!r}; {told}")
    if unknown:
        click.echo(f"instantas: {told}", err=True)

"""The model that a command is given: loaded, and the words that the embedded one knows."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from instantas.cli.errors import first_line
from instantas.cli.inputs import Control, Lora, whole
from instantas.cli.options import DTYPES, SCHEDULERS, default_device

EMBEDDED = "demo"  # the name of the model that comes along in a picture's settings


def load(
    model: str | None,
    scheduler: str | None,
    dtype: str | None,
    device: str | None,
    loras: Sequence[Lora] = (),
    controls: Sequence[Control] = (),
) -> Any:
    """The model on its device with the scheduler, the LoRAs and the ControlNets asked for.

    Raises:
        ValueError: naming what cannot be loaded, or does not fit the model.
    """
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
        nets = [_control_net(control.model, precision) for control in controls]
        extra: dict[str, Any] = {"controlnet": nets if len(nets) > 1 else nets[0]} if nets else {}
        pipe = InstantASPipeline.from_pretrained(
            demo.folder() if model is None else model, torch_dtype=precision, **extra
        )
    check_pipeline(pipe.pipe, whole=True)
    for net, control in zip(nets, controls):
        for name in ("cross_attention_dim", "block_out_channels"):
            ours, theirs = pipe.unet.config[name], net.config[name]
            if not np.array_equal(ours, theirs):  # numbers, tuples or lists
                raise ValueError(f"control: expected {name} {ours}, the model's, got {theirs} of {control.model!r}")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`", UserWarning)  # of several LoRAs, as is meant
        _add_loras(pipe, loras)
    pipe.to(device)
    if scheduler:
        name, settings = SCHEDULERS[scheduler]
        pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config, **settings)
    return pipe


def _control_net(model, precision):
    from diffusers import ControlNetModel

    try:
        source = _source(model)
        single = Path(source).is_file()
        load = ControlNetModel.from_single_file if single else ControlNetModel.from_pretrained
        return load(source, torch_dtype=precision)
    except Exception as error:  # of the file's format, of the hub, of another kind of model
        raise ValueError(f"control: expected a ControlNet, got {model!r}: {first_line(error)}") from error


def _source(name):
    """The whole path of what is here, or a hub id."""
    from instantas.pipelines.loading import looks_local

    found = whole(name)
    if looks_local(name) and not Path(found).exists():
        raise ValueError("there is no such file or folder")
    return found


def _add_loras(pipe, loras):
    names = [f"lora{number}" for number in range(len(loras))]
    for name, lora in zip(names, loras):
        try:
            pipe.load_lora_weights(_source(lora.path), adapter_name=name)
        except Exception as error:  # of the file's format, of the hub, of weights that do not fit
            raise ValueError(f"lora: expected weights for the model, got {lora.path!r}: {first_line(error)}") from error
        if not any(name in found for found in pipe.get_list_adapters().values()):
            raise ValueError(f"lora: expected weights for the model, got {lora.path!r} with none")
    if loras:
        pipe.set_adapters(names, [lora.scale for lora in loras])


def check_words(prompts: Sequence[str], negative: str | None) -> None:
    """What the embedded model has no word for is told, and refused where it has none at all."""
    from instantas import demo

    unknown = list(dict.fromkeys(word for text in (*prompts, negative or "") for word in demo.unknown_words(text)))
    told = f"it paints {', '.join(demo.MATERIALS)}, and scenes with a {', '.join(demo.SUBJECTS)}"
    told += " (`instantas info --prompts` has all words)"
    if unknown:
        told = f"the embedded model has never seen {', '.join(map(repr, unknown))}; {told}"
    for prompt in prompts:
        if prompt.strip() and not demo.paintable(prompt):
            raise ValueError(f"prompt: expected something that the embedded model paints, got {prompt!r}; {told}")
    if unknown:
        click.echo(f"instantas: {told}", err=True)

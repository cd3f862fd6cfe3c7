"""`--like`: the settings that a picture carries become those of another run, where nothing else is asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from instantas import __version__
from instantas.cli.inputs import digests, files
from instantas.cli.model import EMBEDDED
from instantas.cli.pictures import read_record

OPTIONS = {  # a setting's name in the record: the option's
    "num_inference_steps": "steps",
    "guidance_scale": "guidance",
    "negative_prompt": "negative",
    "window_batch_size": "window_batch",
} | {
    name: name
    for name in (
        "model",
        "scheduler",
        "dtype",
        "wrap",
        "method",
        "bridging",
        "region_mode",
        "base_weight",
        "semantic_schedule",
        "cuda_graph",
        "image",
        "strength",
        "loras",
        "controls",
    )
}
INPUTS = ("image", "loras", "controls")  # options that name files


def take_settings(context: click.Context, parameter: click.Parameter, path: Path | None) -> dict[str, Any] | None:
    """The option's callback: what a picture was painted with becomes the other options' default.

    Returns:
        the settings in the picture's record.

    Raises:
        ValueError: for a picture that this version of `generate` has not written.
    """
    if path is None:
        return None
    text = read_record(path)
    if text["Software"] != f"instantas {__version__}":
        raise ValueError(f"like: expected a picture of instantas {__version__}, got one of {text['Software']}")
    try:
        settings = json.loads(text["settings"])
        missing = [name for name in (*OPTIONS, "regions", "files") if name not in settings]
    except (TypeError, ValueError) as error:
        raise ValueError(f"like: expected settings in {str(path)!r}, got {text['settings']:.40}") from error
    if missing:
        raise ValueError(f"like: expected a picture of `instantas generate`, got one without {missing[0]}")
    defaults = {option: settings[name] for name, option in OPTIONS.items()}
    defaults |= {name: text[name] for name in ("prompt", "seed", "size")}
    defaults["wrap"] = tuple(settings["wrap"])
    defaults["model"] = None if settings["model"] == EMBEDDED else settings["model"]
    context.default_map = defaults
    return settings


def check_unchanged(context: click.Context, settings: dict[str, Any], notes: list[dict]) -> None:
    """Refuse files that are no longer what the picture was painted from; those that are asked for anew may be any.

    Args:
        notes: the regions that are taken over.

    Raises:
        ValueError: naming the file.
    """
    taken = {name: context.params[name] for name in INPUTS if is_taken(context, name)}
    for path in files(notes, **taken):
        if not path.is_file() or digests([path])[str(path)] != settings["files"].get(str(path)):
            state = "which has changed" if path.is_file() else "which is gone"
            raise ValueError(f"like: expected what the picture was painted from, got {str(path)!r}, {state}")


def is_taken(context: click.Context, name: str) -> bool:
    """Whether an option's value is the picture's."""
    return context.get_parameter_source(name) is ParameterSource.DEFAULT_MAP

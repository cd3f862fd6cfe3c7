"""`--like`, `--resume`: what a picture or a run's file carries are the settings of a run, where no others are given."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from instantas import __version__
from instantas.cli.inputs import digests, files
from instantas.cli.kept import BESIDE, read_kept
from instantas.cli.model import EMBEDDED
from instantas.cli.pictures import read_record
from instantas.regions import Region

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
        "start",
        "coarse_sigma",
        "guidance_interval",
        "region_mode",
        "base_weight",
        "semantic_schedule",
        "cuda_graph",
        "image",
        "mask",
        "extend",
        "strength",
        "loras",
        "controls",
        "picture",
        "scale",
    )
}
INPUTS = ("image", "picture", "mask", "loras", "controls")  # options that name files
NOTED = {field.name for field in dataclasses.fields(Region)}


def _list_of(kind: Any, length: int | None = None) -> Callable[[Any], bool]:
    """Whether a value is a list of a kind."""
    return lambda value: (
        isinstance(value, list) and all(isinstance(v, kind) for v in value) and length in (None, len(value))
    )


FITS: dict[str, Callable[[Any], bool]] = {  # what is not checked where it is used
    "files": lambda value: isinstance(value, dict),
    "regions": lambda value: _list_of(dict)(value) and all(note.keys() == NOTED for note in value),
    "wrap": _list_of(bool, 2),
    "guidance_interval": _list_of((int, float), 2),
    "extend": lambda value: value is None or _list_of(int, 4)(value),
    "loras": _list_of(str),
    "controls": _list_of(str),
} | dict.fromkeys(
    ("model", "scheduler", "bridging", "negative_prompt", "image", "mask", "picture"),
    lambda value: value is None or isinstance(value, str),
)


def take_settings(context: click.Context, parameter: click.Parameter, path: Path | None) -> dict[str, Any] | None:
    """The option's callback: what a picture was painted with becomes the other options' default.

    Returns:
        the settings in its record, the path as "file", and as "done" whether it is the file of a run whose steps are.

    Raises:
        ValueError: for a picture, or a run's file, that this version of the command has not written.
    """
    if path is None:
        return None
    whose = parameter.name
    saved = {"note": read_record(path)} if whose == "like" else read_kept(path)
    text = saved["note"]
    if text["Software"] != f"instantas {__version__}":
        raise ValueError(f"{whose}: expected a picture of instantas {__version__}, got one of {text['Software']}")
    taken = {option.name for option in context.command.params}
    options = {name: option for name, option in OPTIONS.items() if option in taken}
    try:
        settings = json.loads(text["settings"])
        missing = [name for name in (*options, "files") if name not in settings]
    except (TypeError, ValueError) as error:
        raise ValueError(f"{whose}: expected settings in {str(path)!r}, got {text['settings']:.40}") from error
    if missing:
        what = f"expected a picture of `instantas {context.command.name}`, got one without {missing[0]}"
        raise ValueError(f"{whose}: {what}")
    if broken := [name for name, fits in FITS.items() if name in settings and not fits(settings[name])]:
        what = f"{broken[0]} {json.dumps(settings[broken[0]]):.40}"
        raise ValueError(f"{whose}: expected settings in {str(path)!r} that are a run's, got {what}")
    defaults = {option: settings[name] for name, option in options.items()}
    defaults |= {name: text[name] for name in ("prompt", "seed", "size") if name in taken}
    defaults["wrap"] = tuple(settings["wrap"])
    defaults["model"] = None if settings["model"] == EMBEDDED else settings["model"]
    context.default_map = defaults
    return settings | {"file": path, "done": "done" in saved and saved["done"] == saved["steps"]}


def check_unchanged(context: click.Context, settings: dict[str, Any], notes: list[dict]) -> None:
    """Refuse files that are no longer what the picture was painted from; those that are asked for anew may be any.

    Args:
        notes: the regions that are taken over.

    Raises:
        ValueError: naming the file.
    """
    whose = "like" if context.params.get("like") else "resume"
    taken = {name: context.params[name] for name in INPUTS if is_taken(context, name)}
    image = taken.pop("image", None) or taken.pop("picture", None)
    for path in files(notes, image, **taken):
        if not path.exists() or digests([path])[str(path)] != settings["files"].get(str(path)):
            state = "which has changed" if path.exists() else "which is gone"
            raise ValueError(f"{whose}: expected what the picture was painted from, got {str(path)!r}, {state}")


def replace_taken(context: click.Context) -> None:
    """A mask or sides to extend that are typed take the place of the other that is the picture's, and of its size."""
    for name, other in (("mask", "extend"), ("extend", "mask")):
        if is_given(context, name) and is_taken(context, other) and context.params[other]:
            context.params[other] = None
            if is_taken(context, "size"):
                context.params["size"] = None


def check_beside(context: click.Context, done: bool) -> None:
    """Refuse options beside `--resume` that would make another run; of one that is done, any dtype may decode.

    Raises:
        ValueError: naming the option.
    """
    beside = (*BESIDE, "dtype") if done else BESIDE
    if surplus := [name for name in context.params if is_given(context, name) and name not in beside]:
        raise ValueError(f"resume: expected only {', '.join(beside[1:])} beside it, got {surplus[0]}")


def is_given(context: click.Context, name: str) -> bool:
    """Whether an option was typed."""
    return context.get_parameter_source(name) is ParameterSource.COMMANDLINE


def is_taken(context: click.Context, name: str) -> bool:
    """Whether an option's value is the picture's."""
    return context.get_parameter_source(name) is ParameterSource.DEFAULT_MAP


resume_option = click.option(
    "--resume",
    type=click.Path(path_type=Path),
    metavar="FILE",
    is_eager=True,
    callback=take_settings,
    help="Go on with a run that was stopped, to the same picture; all settings are in FILE.",
)

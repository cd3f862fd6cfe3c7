"""Models from folders in diffusers' layout, from single checkpoint files, and from the hub."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
from diffusers import (
    AutoPipelineForImage2Image,
    AutoPipelineForInpainting,
    AutoPipelineForText2Image,
    DiffusionPipeline,
)
from diffusers.loaders.single_file_utils import infer_diffusers_model_type, load_single_file_checkpoint

from instantas.checks import positive, real
from instantas.files import whole_file
from instantas.sampling import coarse

DEFAULTS_FILE = "instantas.json"
"""Beside a model's model_index.json: the model's own settings, `SETTINGS`."""
SETTINGS: dict[str, Callable[[Any], object]] = {
    "num_inference_steps": lambda value: positive("num_inference_steps", value),
    "guidance_scale": lambda value: real("guidance_scale", value),
    "start": coarse.start_of,
    "coarse_sigma": lambda value: real("coarse_sigma", value, 0, above=True),
}
"""What such a setting is checked by."""
TASKS = {
    "text-to-image": ("", AutoPipelineForText2Image),
    "image-to-image": ("Img2Img", AutoPipelineForImage2Image),
    "inpainting": ("Inpaint", AutoPipelineForInpainting),
}
"""What a pipeline's kind is called for a task, and what loads it."""
FAMILIES = dict.fromkeys(("v1", "v2", "inpainting", "inpainting_v2"), "") | dict.fromkeys(
    ("xl_base", "xl_inpaint", "xl_refiner", "playground-v2-5"), "XL"
)
"""What diffusers finds a checkpoint's weights to be: how the pipelines of that family are called."""
CHECKPOINTS = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")


def load(model: str | os.PathLike, task: str | None = None, **settings: Any) -> tuple[DiffusionPipeline, dict]:
    """A diffusers pipeline, and the model's own defaults.

    Args:
        model: a folder in diffusers' layout, a checkpoint file, or a hub id.
        task: one of `TASKS`; None: what the folder says, of a file text to image.
        settings: of diffusers' `from_pretrained` or `from_single_file`.

    Raises:
        ValueError: for a folder or file that is missing or incomplete, and for another task.
    """
    if task is not None and task not in TASKS:
        raise ValueError(f"task: expected one of {', '.join(TASKS)}, got {task!r}")
    path = Path(model).expanduser()
    if path.is_file():
        return _from_file(path, task or "text-to-image", settings), {}
    if path.is_dir() and not (path / "model_index.json").is_file():
        raise ValueError(f"model: expected a folder with a model_index.json, got {str(model)!r} without one")
    if not path.is_dir() and looks_local(model):
        raise ValueError(
            f"model: expected a folder in diffusers' layout or a hub id or a checkpoint file, got {str(model)!r}"
        )
    defaults = read_defaults(path)
    by_task = TASKS[task or "text-to-image"][1]
    loader: Any = DiffusionPipeline if task is None and "controlnet" not in settings else by_task
    try:
        pipe = loader.from_pretrained(path if path.is_dir() else model, **settings)
    except OSError as error:
        if not path.is_dir():
            raise
        raise ValueError(f"model: expected a whole model in {str(model)!r}, got {error}") from error
    return pipe, defaults


def read_defaults(folder: Path) -> dict[str, Any]:
    """The model's own defaults, as its folder has them; {} without.

    Raises:
        ValueError: for a file that is no JSON object, and for a value that is none of its setting.
    """
    path = folder / DEFAULTS_FILE
    try:
        defaults = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:  # of the encoding too
        raise ValueError(f"model: expected JSON in {str(path)!r}, got {error}") from error
    if not isinstance(defaults, dict):
        raise ValueError(f"model: expected a JSON object in {str(path)!r}, got {type(defaults).__name__}")
    for name in SETTINGS.keys() & {name for name, value in defaults.items() if value is not None}:
        try:
            SETTINGS[name](defaults[name])
        except (TypeError, ValueError) as error:
            raise ValueError(f"model: expected other settings in {str(path)!r}: {error}") from error
    return defaults


def keep_default(folder: Path, name: str, value: float) -> None:
    """One of the model's own defaults, kept in its folder beside the others; the file is written whole or not at all.

    Raises:
        ValueError: for a folder that cannot be written, and a file that is no JSON object.
    """
    defaults = read_defaults(folder) | {name: value}
    with whole_file(folder / DEFAULTS_FILE) as part:
        part.write_text(json.dumps(defaults, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def is_cached(folder: Path) -> bool:
    """Whether a folder is the hub's copy of a model, in its cache: each revision has another."""
    return folder.resolve().parent.name == "snapshots"


def looks_local(name: str | os.PathLike) -> bool:
    """Whether a name can be a path only, and no hub id."""
    path = Path(name).expanduser()
    return path.is_absolute() or str(name).startswith(".") or str(name).count("/") > 1 or path.suffix in CHECKPOINTS


def _from_file(path, task, settings):
    if path.suffix not in CHECKPOINTS:
        raise ValueError(f"model: expected a checkpoint ({', '.join(CHECKPOINTS)}), got {str(path)!r}")
    found = infer_diffusers_model_type(load_single_file_checkpoint(str(path)))
    if found not in FAMILIES:
        raise ValueError(f"model: expected Stable Diffusion 1.x, 2.x or XL in {str(path)!r}, got weights of {found}")
    control = "ControlNet" if "controlnet" in settings else ""
    kind = getattr(diffusers, f"StableDiffusion{FAMILIES[found]}{control}{TASKS[task][0]}Pipeline")
    return kind.from_single_file(str(path), **settings)

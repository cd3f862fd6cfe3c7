"""Models from folders in diffusers' layout, from single checkpoint files, and from the hub."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from diffusers import (
    AutoPipelineForText2Image,
    DiffusionPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLPipeline,
)
from diffusers.loaders.single_file_utils import infer_diffusers_model_type, load_single_file_checkpoint

DEFAULTS_FILE = "instantas.json"
"""Beside a model's model_index.json: its own num_inference_steps and guidance_scale."""
CHECKPOINTS = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")


def load(model: str | os.PathLike, **settings: Any) -> tuple[DiffusionPipeline, dict]:
    """A diffusers pipeline, and the model's own defaults.

    Args:
        model: a folder in diffusers' layout, a checkpoint file, or a hub id.
        settings: of diffusers' `from_pretrained` or `from_single_file`.

    Raises:
        ValueError: for a folder or file that is missing or incomplete.
    """
    path = Path(model).expanduser()
    if path.is_file():
        return _from_file(path, settings), {}
    if path.is_dir() and not (path / "model_index.json").is_file():
        raise ValueError(f"model: expected a folder with a model_index.json, got {str(model)!r} without one")
    if not path.is_dir() and looks_local(model):
        raise ValueError(
            f"model: expected a folder in diffusers' layout or a hub id or a checkpoint file, got {str(model)!r}"
        )
    loader = AutoPipelineForText2Image if "controlnet" in settings else DiffusionPipeline
    try:
        pipe = loader.from_pretrained(path if path.is_dir() else model, **settings)
    except OSError as error:
        if not path.is_dir():
            raise
        raise ValueError(f"model: expected a whole model in {str(model)!r}, got {error}") from error
    defaults = path / DEFAULTS_FILE
    return pipe, json.loads(defaults.read_text(encoding="utf-8")) if defaults.is_file() else {}


def looks_local(name: str | os.PathLike) -> bool:
    """Whether a name can be a path only, and no hub id."""
    path = Path(name).expanduser()
    return path.is_absolute() or str(name).startswith(".") or str(name).count("/") > 1 or path.suffix in CHECKPOINTS


def _from_file(path, settings):
    if path.suffix not in CHECKPOINTS:
        raise ValueError(f"model: expected a checkpoint ({', '.join(CHECKPOINTS)}), got {str(path)!r}")
    xl = infer_diffusers_model_type(load_single_file_checkpoint(str(path))).startswith("xl")
    if "controlnet" in settings:
        kind = StableDiffusionXLControlNetPipeline if xl else StableDiffusionControlNetPipeline
    else:
        kind = StableDiffusionXLPipeline if xl else StableDiffusionPipeline
    return kind.from_single_file(str(path), **settings)

"""The end of a run: its latents become a picture file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import torch

from instantas.cli.pictures import write_picture


def finish(pipe: Any, latents: torch.Tensor, output: Path, text: dict[str, str], force: bool) -> None:
    """Decode the latents of one picture and write it with its record."""
    width, height = map(int, text["size"].split("x"))
    settings = json.loads(text["settings"])
    write(pipe.decode(latents, height, width, wrap=tuple(settings["wrap"]))[0], output, text, force)


def write(picture: Any, output: Path, text: dict[str, str], force: bool) -> None:
    """Write a picture with its record, and say so."""
    write_picture(picture, output, text, force)
    click.echo(f"{output}: {text['size']}, seed {text['seed']}")

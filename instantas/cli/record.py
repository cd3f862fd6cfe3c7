"""What a run leaves with its picture: settings from which it can be made again, and the latents until it is there."""

from __future__ import annotations

import contextlib
import json
import shlex
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import click
import torch

from instantas import __version__
from instantas.cli.errors import first_line, message
from instantas.cli.inputs import digests, whole
from instantas.cli.model import EMBEDDED
from instantas.cli.pictures import TEXT
from instantas.files import whole_file


def record(
    pipe: Any,
    prompt: str,
    seed: int,
    size: tuple[int, int],
    settings: dict[str, Any],
    *,
    model: str | None,
    scheduler: str | None,
    files: Iterable[Path],
) -> dict[str, str]:
    """The text that a picture carries: whatever it takes to paint it again.

    Args:
        size: (width, height).
        settings: of the run, by their names in the pipeline.
        model, scheduler: as the command line was told.
        files: that the picture was painted from, noted with their digests.
    """
    noted = settings | {
        "instantas": __version__,
        "model": whole(model) if model else EMBEDDED,
        "scheduler": scheduler,
        "scheduler_class": type(pipe.scheduler).__name__,
        "dtype": str(pipe.dtype).removeprefix("torch."),
        "files": digests(files),
    }
    return {
        "prompt": prompt,
        "seed": str(seed),
        "size": f"{size[0]}x{size[1]}",
        "settings": json.dumps(noted, sort_keys=True),
        "Software": f"instantas {__version__}",
    }


def latents_path(output: Path) -> Path:
    """Where the latents of a picture are kept until it is written."""
    return output.with_suffix(".latents.safetensors")


@contextlib.contextmanager
def kept(latents: torch.Tensor, output: Path, text: dict[str, str]) -> Iterator[None]:
    """Keeps the latents in a file while they become a picture, for good if they do not.

    Raises:
        ClickException: for what goes wrong meanwhile, telling how to go on.
        OSError: for latents that cannot be written.
    """
    _save(latents, output, text)
    try:
        yield
    except BaseException as error:
        if (line := message(error)) is None:
            raise
        raise click.ClickException(f"{line}; the latents are kept, go on with: {_resume(output)}") from error
    latents_path(output).unlink()


@contextlib.contextmanager
def kept_unfinished(output: Path, text: dict[str, str]) -> Iterator[Callable]:
    """A `callback_on_step_end` for a run whose latents are kept, as they were after its last step, if it is stopped.

    They are there to be looked at, and nothing to go on from: without the scheduler's history, the predictions that are
    re-used and the generator's state the rest would be another picture.

    Raises:
        ClickException: for what stops the run, telling what is kept, how to see it and how to begin again.
    """
    last: dict[str, Any] = {}

    def after_step(pipe: Any, step: int, timestep: torch.Tensor, tensors: dict) -> dict:
        last.update(latents=tensors["latents"], step=f"step {step + 1} of {pipe.num_timesteps}")
        return {}

    try:
        yield after_step
    except BaseException as error:
        if (line := message(error)) is None or not last:
            raise
        traceback.clear_frames(error.__traceback__)  # they hold what has filled the memory
        unfinished = json.dumps(json.loads(text["settings"]) | {"unfinished": last["step"]})
        try:
            _save(last["latents"], output, text | {"settings": unfinished})
        except (OSError, RuntimeError, MemoryError) as failure:
            told = f"the latents could not be kept: {first_line(failure)}"
        else:
            told = f"the latents after {last['step']} are kept, unfinished; to see them: {_resume(output)}"
        told += f"; to begin again: the same command with --seed {text['seed']} --force"
        raise click.ClickException(f"{line}; {told}") from error


def _save(latents, output, text):
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        with whole_file(latents_path(output)) as part:
            save_file({"latents": latents.contiguous().cpu()}, part, metadata=text)
    except SafetensorError as error:
        raise OSError(f"{latents_path(output)}: {error}") from error


def _resume(output):
    """The command that makes a picture of the latents that were kept for it."""
    command = ["instantas", "generate", "--resume", str(latents_path(output)), "-o", str(output)]
    return shlex.join(command + ["--force"] * output.exists())


def read_latents(path: Path) -> tuple[torch.Tensor, dict[str, str]]:
    """The latents and the text that `kept` or `kept_unfinished` wrote.

    Raises:
        ValueError: for another file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            text = file.metadata() or {}
            latents = file.get_tensor("latents")
    except (OSError, SafetensorError) as error:
        raise ValueError(f"resume: expected latents that a run has kept, got {str(path)!r} ({error})") from error
    if missing := [name for name in TEXT if name not in text]:
        raise ValueError(f"resume: expected latents that a run has kept, got {str(path)!r} without {missing[0]}")
    return latents, {name: text[name] for name in TEXT}

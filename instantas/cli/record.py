"""What a run leaves with its picture: settings from which it can be made again, and the latents until it is there."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import shlex
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import torch

from instantas import __version__
from instantas.cli.errors import first_line, message
from instantas.cli.model import EMBEDDED
from instantas.cli.pictures import TEXT
from instantas.files import whole_file
from instantas.regions import Region, load_regions


def read_regions(places: Sequence[str], file: str | None) -> tuple[list[Region], list[dict]]:
    """Regions from the command line and from a JSON file, and what to note of them.

    A note has every argument of `Region`, those that were not given too, with the mask's whole path: a list of them is
    a file for `--regions`.

    Raises:
        ValueError: saying which region is wrong and what was expected.
    """
    regions: list[Region] = []
    masks: list[str | Path] = []
    for number, place in enumerate(places, 1):
        try:
            regions.append(Region.parse(place))
        except (TypeError, ValueError) as error:
            raise ValueError(f"region {number}, {place!r}: {error}") from error
        masks.append(place.rpartition("@")[2].strip())
    if file:
        regions += load_regions(file)
        entries = json.loads(Path(file).read_text(encoding="utf-8"))
        masks += [Path(file).parent / (entry.get("mask") or "") for entry in entries]
    names = [field.name for field in dataclasses.fields(Region)]
    notes = [{name: getattr(region, name) for name in names if name != "mask"} for region in regions]
    for region, note, mask in zip(regions, notes, masks):
        note["mask"] = None if region.mask is None else str(Path(mask).resolve())
    return regions, notes


def digests(files: Iterable[str | Path]) -> dict[str, str]:
    """SHA-256 of files, by name."""
    return {str(file): hashlib.sha256(Path(file).read_bytes()).hexdigest() for file in sorted(set(map(str, files)))}


def record(
    pipe: Any,
    prompt: str,
    seed: int,
    size: tuple[int, int],
    settings: dict[str, Any],
    *,
    model: str | None,
    scheduler: str | None,
    files: Iterable[str | Path],
) -> dict[str, str]:
    """The text that a picture carries: whatever it takes to paint it again.

    Args:
        size: (width, height).
        settings: of the run, by their names in the pipeline.
        model, scheduler: as the command line was told.
        files: that the picture was painted from, noted with their digests.
    """
    if model and (found := Path(model).expanduser()).exists():
        model = str(found.resolve())
    noted = settings | {
        "instantas": __version__,
        "model": model or EMBEDDED,
        "scheduler": scheduler,
        "scheduler_class": type(pipe.scheduler).__name__,
        "dtype": str(pipe.dtype).removeprefix("torch."),
        "files": digests(files),
    }
    return {
        "prompt": prompt,
        "seed": str(seed),
        "size": f"{size[0]}x{size[1]}",
        "settings": json.dumps(noted),
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

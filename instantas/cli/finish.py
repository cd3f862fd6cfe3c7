"""The end of a run: its latents become a picture file."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any

import click
import torch

from instantas.cli.bands import in_bands, is_large, preview_path, write_bands
from instantas.cli.kept import Kept
from instantas.cli.pictures import check_record, write_picture
from instantas.files import check_writable
from instantas.sampling.parallel import Ranks

PATIENCE = timedelta(weeks=1)  # of processes that wait for rank 0, which writes bands alone


def check_apart(kept: Kept, size: tuple[int, int], read: Iterable[Path], preview: Path | None = None) -> None:
    """Refuse to write over what a run reads, and one file over another.

    Args:
        size: (width, height) in pixels.
        read: whole paths.

    Raises:
        ValueError: naming the option and the file.
    """
    small = [preview_path(kept.output)] if is_large(kept.output, *size) else []
    written = [("output", path) for path in (kept.output, *small, *kept.files)]
    taken = set(read)
    for name, path in [*written, *([("preview", preview)] if preview else [])]:
        if path.resolve() in taken:
            raise ValueError(
                f"{name}: expected a file of its own, got {str(path)!r}, which the run reads or writes too"
            )
        taken.add(path.resolve())


def check_finish(pipe: Any, output: Path, text: dict[str, str], force: bool) -> None:
    """Refuse what could not be written in the end.

    Raises:
        ValueError: naming what was expected.
        ImportError: where a package is missing.
    """
    check_record(output, text)
    if in_bands(pipe, output, *size_of(text)):
        import tifffile  # noqa: F401

        check_writable(preview_path(output), overwrite=force, name="output")


def finish(
    pipe: Any, latents: torch.Tensor, output: Path, text: dict[str, str], force: bool, ranks: Ranks | None = None
) -> list[Path]:
    """Decode the latents of one picture, together where processes share the run, and write it with its record.

    Returns:
        the files that are there then, the picture's the last.
    """
    width, height = size_of(text)
    wrap = tuple(json.loads(text["settings"])["wrap"])
    leads = ranks is None or ranks.rank == 0
    if not in_bands(pipe, output, width, height):
        picture = pipe.decode(latents, height, width, wrap=wrap, group=ranks)[0]
        if leads:
            write_picture(picture, output, text, force)
        return [output]
    with contextlib.nullcontext() if ranks is None else Ranks(ranks.group, timeout=PATIENCE).together():
        if leads:
            write_bands(pipe.bands(latents, height, width, wrap=wrap), output, width, height, text, force)
    return [preview_path(output), output]


def say(written: list[Path], text: dict[str, str]) -> None:
    """Tell of the files of `finish`; once the run needs no file any more, since nobody may listen (`... | head -1`)."""
    *previews, output = written
    for preview in previews:
        click.echo(f"{preview}: preview")
    click.echo(f"{output}: {text['size']}, seed {text['seed']}")


def size_of(text: dict[str, str]) -> tuple[int, int]:
    """(width, height) in pixels of a record's picture."""
    width, height = map(int, text["size"].split("x"))
    return width, height

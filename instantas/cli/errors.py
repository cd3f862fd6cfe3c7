"""What went wrong, in one line."""

from __future__ import annotations

import click
import torch

from instantas.sampling.parallel import PeerError

EXTRAS = {"matplotlib": "plot", "tifffile": "tiff"}  # a package: the extra that brings it, if not diffusers


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, of a device or of the host; torch has no type of its own for the host's."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(
        words in str(error) for words in ("can't allocate memory", "not enough memory", "out of memory")
    )


def message(error: BaseException) -> str | None:
    """The line that tells the user; None for an error that is not the user's to mend."""
    if isinstance(error, click.ClickException):
        return first_line(Exception(error.format_message()))
    if isinstance(error, (click.Abort, KeyboardInterrupt)):
        return "stopped"
    if isinstance(error, ImportError):
        extra = EXTRAS.get((error.name or "").split(".")[0], "diffusers")
        return f"{first_line(error)}; this command needs: pip install 'instantas[{extra}]'"
    if out_of_memory(error):
        return f"out of memory: {first_line(error)}"
    return first_line(error) if isinstance(error, (ValueError, TypeError, OSError, PeerError)) else None

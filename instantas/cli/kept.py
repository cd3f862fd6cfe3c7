"""Runs that are stopped: what they have done is kept in a file, from which `--resume` goes on to the same picture."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click
import torch

from instantas.cli.errors import message
from instantas.cli.pictures import TEXT
from instantas.files import check_writable
from instantas.sampling.checkpoint import Checkpoint, read

BESIDE = ("resume", "output", "force", "model", "device", "window_batch", "checkpoint")  # --resume
SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]

checkpoint_option = click.option(
    "--checkpoint",
    type=click.IntRange(1),
    metavar="STEPS",
    help="Keep the run on disk after every so many steps too, not only when it is stopped.",
)


class Kept:
    """The files of the run that paints a picture: one, or one for each of several stages.

    Args:
        resumed: of which the run goes on from one; None: it begins, and its files lie beside the output.
    """

    def __init__(self, output: Path, stages: int = 1, resumed: Path | None = None):
        self.output, self.stages, self.resumed = output, stages, resumed
        self.path = output.with_suffix(".checkpoint") if resumed is None else resumed
        if resumed is not None and stages > 1:
            self.path = resumed.with_name(Path(resumed.stem).stem + resumed.suffix)

    @property
    def files(self) -> list[Path]:
        """Of every stage, whether it is there or not."""
        numbers = range(1, self.stages + 1)
        return [self.path] if self.stages == 1 else [Path(Checkpoint(self.path).stage(n).path) for n in numbers]

    def check(self, force: bool) -> None:
        """Refuse what another run has left, unless by force: it is kept until this one has more to keep.

        Raises:
            ValueError: naming the file; for one to go on from whose name does not say of which stage it is.
        """
        if self.resumed is not None and self.resumed not in self.files:
            names = " or ".join(repr(file.name) for file in self.files)
            raise ValueError(f"resume: expected a stage's file by its name, {names}, got {str(self.resumed)!r}")
        for file in reversed(self.files) if self.resumed is None else []:
            if file.exists() and not force:
                told = f"go on with --resume {shlex.quote(str(file))}, or begin anew with --force"
                raise ValueError(f"output: expected no {str(file)!r}, the file of a run that was stopped: {told}")
            check_writable(file, name="output")

    @property
    def text(self) -> dict[str, str] | None:
        """The record of the picture of a run that goes on."""
        return None if self.resumed is None else read_kept(self.resumed)["note"]

    def finished(self) -> torch.Tensor | None:
        """(1, C, H, W), the latents of a run that goes on when all its steps are done; None before."""
        if self.resumed is None or not self.files[-1].exists():
            return None
        saved = read_kept(self.files[-1])
        return saved["canvas"] if saved["done"] == saved["steps"] else None

    def checkpoint(self, every: int | None, text: Mapping[str, str]) -> Checkpoint:
        return Checkpoint(self.path, every, text)

    @contextlib.contextmanager
    def until_done(self, command: str) -> Iterator[None]:
        """Keeps the files until the block has made a picture; signals that end a process end it as Ctrl-C does.

        Raises:
            ClickException: for what stops the block, telling how `command` goes on.
        """
        others = [] if self.resumed else [file for file in self.files if file.exists()]
        aside = [file.replace(file.with_name(f".{file.name}.{os.getpid()}")) for file in others]
        try:
            with _signals():
                yield
        except BaseException as error:
            left = [file for file in self.files if file.exists()]
            if not left:  # this run has done nothing: what another has left stays
                for file, other in zip(others, aside):
                    other.replace(file)
            if (line := message(error)) is None or not left or isinstance(error, (ValueError, TypeError)):  # refused
                raise
            saved = read(left[-1])
            words = ["instantas", command, "--resume", str(left[-1]), "-o", str(self.output)]
            told = shlex.join(words + ["--force"] * self.output.exists())
            done = f"step {saved['done']} of {saved['steps']}" + f" of stage {len(left)}" * (self.stages > 1)
            raise click.ClickException(f"{line}; the run is kept after {done}, go on with: {told}") from error
        finally:
            for other in aside:
                other.unlink(missing_ok=True)
        for file in self.files:
            file.unlink(missing_ok=True)


def read_kept(path: Path) -> dict[str, Any]:
    """A checkpoint with the record of its picture in "note".

    Raises:
        ValueError: for another file.
    """
    saved = read(path)
    if missing := [name for name in TEXT if name not in saved["note"]]:
        raise ValueError(f"resume: expected the file of a run of this command, got {str(path)!r} without {missing[0]}")
    return saved


@contextlib.contextmanager
def _signals() -> Iterator[None]:
    """Signals that end a process raise KeyboardInterrupt, so that what is done can be kept."""

    def stop(number, frame):
        raise KeyboardInterrupt

    main = threading.current_thread() is threading.main_thread()  # others may set none
    ending = [number for number in SIGNALS if main and signal.getsignal(number) is signal.SIG_DFL]
    for number in ending:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in ending:
            signal.signal(number, signal.SIG_DFL)

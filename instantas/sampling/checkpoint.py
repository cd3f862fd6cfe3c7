"""A run's state in a file, from which a run that was stopped goes on to the same picture, bit by bit."""

from __future__ import annotations

import io
import os
import traceback
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch

from instantas import __version__
from instantas.checks import integer
from instantas.files import check_writable, remove_parts, whole_file
from instantas.sampling.evaluator import out_of_memory
from instantas.sampling.fingerprint import differing
from instantas.sampling.schedulers import copied, step_keywords


@dataclass(frozen=True)
class Checkpoint:
    """Where a run keeps its state: the canvas, what the scheduler and re-used predictions look back on, generators.

    A run that finds the file goes on from the step after it; what it is told must be what the stopped one was told, but
    for `window_batch_size`, `cuda_graph` and the device, which change no more than roundings. The file stays when the
    run is done, and then gives its result at once: remove it when that is safe.

    Args:
        path: written whole or not at all, so that nothing stops a run at a moment at which the file is of no use.
        every: after how many steps it is written; None: never on the way. It is written too when the run is done on a
            canvas (a `start` has several), when a callback ends it, and after the last finished step when an exception
            does.
        note: names and texts to keep beside (`read`).

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """

    path: str | os.PathLike
    every: int | None = 1
    note: Mapping[str, str] | None = None

    def __post_init__(self):
        if not isinstance(self.path, (str, os.PathLike)):
            raise TypeError(f"checkpoint: expected a path, got {type(self.path).__name__}")
        if self.every is not None:
            integer("every", self.every, 1, expected="a positive integer or None")

    @classmethod
    def of(cls, given: Any) -> Checkpoint | None:
        """A checkpoint as it is, one of a path that is written after every step, None of None."""
        return given if given is None or isinstance(given, cls) else cls(given)

    def stage(self, number: int) -> Checkpoint:
        """That of one of several runs that make one picture: a file beside, with a number in its name."""
        path = Path(self.path)
        return replace(self, path=path.with_name(f"{path.stem}.{number}{path.suffix}"))


@dataclass(frozen=True)
class LegCheckpoint(Checkpoint):
    """That of a run's leg on a smaller canvas (`coarse.Leg`), which shares the file of the whole run.

    Attributes:
        run: digests of what the whole run is told, by name.
        lengths: steps of each of its legs.
        leg: number of this one.
    """

    run: Mapping[str, str] = field(default_factory=dict)
    lengths: Sequence[int] = ()
    leg: int = 0


def read(path: str | os.PathLike, device: torch.device | str = "cpu") -> dict[str, Any]:
    """What a checkpoint has: "canvas" (B, C, H, W), of "done" out of "steps", the "note", and what a run goes on with.

    Steps are those of all legs (`coarse.Leg`), of which "leg" is the number of the canvas's.

    Args:
        device: of what is not on the CPU.

    Raises:
        ValueError: for a file that is none, and for one of another version of this library.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"checkpoint: expected one that a run has kept, got {os.fspath(path)!r} ({error})") from error
    return _read(content, path, device)


def _read(content, path, device):
    try:
        saved = unpacked(content, device)
    except Exception as error:  # of zip files, of unpickling what is not allowed; torch advises to allow it
        if out_of_memory(error):
            raise
        saved = None
    if not isinstance(saved, dict) or "version" not in saved:
        raise ValueError(f"checkpoint: expected one that a run has kept, got {os.fspath(path)!r}, another file")
    if saved["version"] != __version__:
        raise ValueError(f"checkpoint: expected one of instantas {__version__}, got one of {saved['version']}")
    return saved | {"canvas": saved["state"]["canvas"]}


def packed(value: Any) -> bytes:
    """Tensors, numbers and texts, in containers too, as bytes."""
    content = io.BytesIO()
    torch.save(value, content)
    return content.getvalue()


def unpacked(content: bytes, device: torch.device | str) -> Any:
    """The inverse of `packed`, of nothing else; what was not on the CPU comes to a device."""

    def placed(storage, location):
        return storage if location == "cpu" else storage.to(device=torch.device(device))

    return torch.load(io.BytesIO(content), map_location=placed, weights_only=True)


class Recorder:
    """Keeps a run's state while its block goes on, and in the checkpoint's file; without a checkpoint, nothing.

    Args:
        checkpoint: where; None: nowhere.
        run: digests of what the run is told, by name.
        lengths: steps of each of its legs; this is the last one, but for a `LegCheckpoint`, which says itself.
        scheduler: whose steps the run takes; None: one that is only read, before the first.
        generators: that the run draws from; None among them: torch's own, of the device.
        callback: with `state_dict` and `load_state_dict` (of tensors, numbers and texts) where it has something to
            keep.
        eta: of the scheduler's steps.
        overwritten: whether steps write over the state before.
        ranks: the processes that share the run (`parallel.Ranks`): rank 0 has the file.

    Raises:
        TypeError: for a scheduler whose state cannot be kept.
        ValueError: for a file that cannot be written.
    """

    def __init__(
        self,
        checkpoint: Checkpoint | None,
        run: Mapping[str, str],
        lengths: Sequence[int],
        device: torch.device,
        *,
        scheduler: Any = None,
        generators: Sequence[torch.Generator | None],
        callback: Any = None,
        eta: float = 0.0,
        overwritten: bool = False,
        ranks: Any = None,
    ):
        self.checkpoint, self.ranks = checkpoint, ranks
        if checkpoint is None:
            return
        self.run, self.lengths, self.leg = dict(run), list(lengths), len(lengths) - 1
        if isinstance(checkpoint, LegCheckpoint):
            self.run, self.lengths, self.leg = dict(checkpoint.run), list(checkpoint.lengths), checkpoint.leg
        self.before = sum(self.lengths[: self.leg])
        self.device, self.scheduler, self.generators = device, scheduler, generators
        self.callback, self.overwritten = callback, overwritten
        self.begun_with = dict(vars(scheduler)) if scheduler is not None else {}
        self.writes = ranks is None or ranks.rank == 0
        self.last: dict[str, Any] | None = None
        if self.writes:
            check_writable(checkpoint.path, name="checkpoint")
        if scheduler is not None:
            _check_steps(scheduler, eta)

    def of_leg(self, leg: int) -> LegCheckpoint | None:
        """Where an earlier leg of the run is kept; None: nowhere."""
        if self.checkpoint is None:
            return None
        path, every, note = self.checkpoint.path, self.checkpoint.every, self.checkpoint.note
        return LegCheckpoint(path, every, note, self.run, self.lengths, leg)

    def resume(self, state: Any) -> tuple[Any, int, int]:
        """The state to begin with, of the same type, how many of this leg's steps are done, and the leg to go on with.

        With an earlier leg, of which the file is, nothing is changed.

        Raises:
            ValueError: for the file of another run, naming what differs, and for one that is no checkpoint.
        """
        if self.checkpoint is None:
            return state, 0, 0
        path = Path(self.checkpoint.path)
        content = self._content() if self.ranks is None else self.ranks.first(self._content)
        if content is None:
            return state, 0, 0
        saved = _read(content, path, self.device)
        if others := differing(self.run, saved["run"]):
            names = ", another ".join(others)
            raise ValueError(f"checkpoint: expected one of this run, got {str(path)!r} of one with another {names}")
        if saved["callback"] is not None and not hasattr(self.callback, "load_state_dict"):
            got = type(self.callback).__name__
            raise ValueError(f"callback: expected one with load_state_dict, as the run's has kept something, got {got}")
        if saved["leg"] < self.leg:
            return state, 0, saved["leg"]
        if self.scheduler is not None:
            vars(self.scheduler).update(saved["scheduler"])
        for generator, drawn in zip(self.generators, saved["generators"]):
            set_state(generator, self.device, drawn)
        if saved["callback"] is not None:
            self.callback.load_state_dict(saved["callback"])
        tensors = {name: t if t is None else t.to(self.device) for name, t in saved["state"].items()}
        return replace(state, **tensors), saved["done"] - self.before, self.leg

    def keep(self, state: Any, done: int, *, last: bool = False) -> None:
        """The state after so many of this leg's steps, which is written if it is its turn, or the last."""
        if self.checkpoint is None or not self.writes:
            return
        tensors = {each.name: getattr(state, each.name) for each in fields(state)}
        if self.overwritten:
            tensors = {name: t if t is None else t.clone() for name, t in tensors.items()}
        last, done = last or done == self.lengths[self.leg], self.before + done
        self.last = dict(
            done=done,
            leg=self.leg,
            state=tensors,
            generators=[get_state(generator, self.device) for generator in self.generators],
            # copies, as the next step may write over what these hold (PNDM's sums do), and fail on the way
            scheduler={} if self.scheduler is None else _copied(_kept(self.scheduler, self.begun_with), True),
            callback=_copied(self.callback.state_dict(), True) if hasattr(self.callback, "state_dict") else None,
        )
        if last or (self.checkpoint.every and done % self.checkpoint.every == 0):
            self._write()

    def _content(self):
        path = Path(self.checkpoint.path)
        remove_parts(path)
        return path.read_bytes() if path.exists() else None

    def _write(self):
        checkpoint, kept = self.checkpoint, self.last
        note = dict(checkpoint.note or {})
        whole = dict(version=__version__, note=note, run=self.run, steps=sum(self.lengths), **_copied(kept))
        with whole_file(checkpoint.path) as part:
            torch.save(whole, part)
        self.last = None

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is None or self.checkpoint is None or self.last is None:
            return
        if out_of_memory(error):
            traceback.clear_frames(trace)  # which hold what has filled the memory
        try:
            self._write()
        except Exception as failure:  # hides nothing of what has stopped the run
            warnings.warn(f"checkpoint: the run could not be kept: {failure}", stacklevel=3)


def get_state(generator: torch.Generator | None, device: torch.device) -> torch.Tensor:
    """Of a generator, or for None of torch's own of a device; waits for no device."""
    if generator is not None:
        return generator.get_state()
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def set_state(generator: torch.Generator | None, device: torch.device, state: torch.Tensor) -> None:
    """The inverse of `get_state`."""
    if generator is not None:
        generator.set_state(state)
    elif device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)


def _kept(scheduler, begun_with):
    """The attributes that can be kept; raises TypeError where another has changed since the run began."""
    attributes = vars(scheduler)
    kept = {name: list(v) if isinstance(v, list) else v for name, v in attributes.items() if _is_plain(v)}
    for name, value in attributes.items():
        if name not in kept and value is not begun_with.get(name):
            raise TypeError(
                f"checkpoint: expected a scheduler that keeps tensors and numbers, got {type(scheduler).__name__} with "
                f"{name}, a {type(value).__name__}"
            )
    return kept


def _check_steps(scheduler, eta):
    """Refuse a scheduler whose state cannot be kept, before the first step of the run: a copy takes one."""
    stepped, nothing = copied(scheduler), torch.zeros(1, 1, 1, 1, device="cpu")
    begun_with = dict(vars(stepped))
    with torch.random.fork_rng(devices=[]):
        t = stepped.timesteps[getattr(stepped, "begin_index", None) or 0]
        if hasattr(stepped, "scale_model_input"):
            stepped.scale_model_input(nothing, t)
        stepped.step(nothing, t, nothing, return_dict=False, **step_keywords(stepped, None, eta))
    _kept(stepped, begun_with)


def _is_plain(value):
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    if type(value) is dict:
        return all(map(_is_plain, value.values()))
    return isinstance(value, torch.Tensor) or type(value) in (bool, int, float, str, type(None))


def _copied(value, every=False):
    """With views copied, as all that they are a part of would be written, or with every tensor copied."""
    if isinstance(value, dict):
        return {name: _copied(each, every) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_copied(each, every) for each in value)
    if not isinstance(value, torch.Tensor):
        return value
    whole = value.untyped_storage().nbytes() == value.numel() * value.element_size()
    return value.detach().clone() if every or not whole else value.detach()

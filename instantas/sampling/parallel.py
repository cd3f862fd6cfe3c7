"""Windows shared by the processes of a torch.distributed group, with the result of one process.

Every process runs the same program and holds the whole canvas. Of a step's windows each evaluates some, and one
all-gather gives all the predictions to all; what follows is the same everywhere. Windows are dealt out in the batches
that one process would make of them, as a network's rounding depends on the batch.

Beside the group's collectives on the device there is one on the CPU, over gloo: before every collective each process
says that it is well, so that one that fails takes the others along at once, and one that was killed is missed when its
connection closes. What is said does not wait for the device.
"""

from __future__ import annotations

import contextlib
import functools
import pickle
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from typing import Any, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from instantas.sampling.checkpoint import get_state, packed, set_state, unpacked
from instantas.sampling.evaluator import Evaluator
from instantas.sampling.fingerprint import differing, digest, digests
from instantas.sampling.prediction import cut
from instantas.sampling.settings import check_whole
from instantas.windows import WindowPlan

P = ParamSpec("P")
T = TypeVar("T")
WELL, FAILED, THROUGH = 0, 1, 2
WORDS = 6  # that a process says at once: how it is, and five numbers
DTYPES = torch.float64, torch.float32, torch.float16, torch.bfloat16  # of predictions
HALF_AN_HOUR = timedelta(minutes=30)
TOLD = "_instantas_told"  # attribute of an error: the `Ranks` that were told of it
GRACE = 0.5  # seconds in which processes that miss another one say that they are there


class PeerError(RuntimeError):
    """Another process of the group failed, which says why in full itself, or is gone."""


class Ranks:
    """The processes that share a run.

    Args:
        group: of torch.distributed, a one-dimensional DeviceMesh, or True: all processes. All its processes make one.
        timeout: after which a process that does not answer counts as gone; None: torch's, half an hour. It is longer
            than a step.
        startup: the same up to the first step, in which models are loaded and compiled; None: `timeout`.

    Attributes:
        rank, count: of this process, of how many.

    Raises:
        TypeError, ValueError: for anything else, and without an initialised torch.distributed.
    """

    def __init__(self, group: Any = True, *, timeout: timedelta | None = None, startup: timedelta | None = None):
        if not (dist.is_available() and dist.is_initialized()):
            raise ValueError("group: expected torch.distributed initialised (torchrun, init_process_group), got it not")
        self.group = _process_group(group)
        self.rank, self.count = dist.get_rank(self.group), dist.get_world_size(self.group)
        if self.rank < 0:
            raise ValueError("group: expected one that this process belongs to, got another")
        self._store = _store(self.group)
        self._started, self._gone = False, ""
        self._kept = ""  # digest of what the run's callback has changed
        self._running = self._line("running", timeout)
        self._starting = self._running if startup in (None, timeout) else self._line("starting", startup)

    def _line(self, name, timeout):
        """Of torch.distributed's own groups none will do: their names differ where processes have unlike groups."""
        store = dist.PrefixStore(name, self._store)
        try:
            return dist.ProcessGroupGloo(store, self.rank, self.count, timeout or HALF_AN_HOUR)
        except RuntimeError as error:
            raise self._lost(error) from error

    # What is said on the CPU

    def exchange(self, *values: int) -> list[tuple[int, ...]]:
        """What every process says, by rank.

        Raises:
            PeerError: where one has failed or is gone.
        """
        return self._said(WELL, values)

    def _said(self, status, values=(), message=""):
        if self._gone:
            raise PeerError(f"group: expected one whose processes are all there, got one in which {self._gone}")
        said = torch.zeros(WORDS, dtype=torch.int64, device="cpu")
        said[: 1 + len(values)] = torch.tensor([status, *values], device="cpu")
        everyone = self._all(said)
        failed = [rank for rank, row in enumerate(everyone) if row[0] == FAILED]
        if failed:
            messages = self._objects(message)
            raise PeerError("; ".join(f"rank {rank} of {self.count}: {messages[rank]}" for rank in failed))
        through = [rank for rank, row in enumerate(everyone) if row[0] == THROUGH]
        if through and len(through) < self.count:
            raise PeerError(f"rank {through[0]} of {self.count} is through, while others go on")
        return [tuple(row[1:].tolist()) for row in everyone]

    def _all(self, tensor):
        """Every process's, by rank."""
        everyone = [torch.empty_like(tensor) for _ in range(self.count)]
        with self._watched():
            self._control.allgather([everyone], [tensor]).wait()
        return everyone

    def _objects(self, value):
        """Every process's, by rank, of what can be pickled."""
        content = _bytes(value)
        sizes = [int(size) for size in self._all(torch.tensor([len(content)], device="cpu"))]
        padded = content.new_zeros(max(sizes))
        padded[: len(content)] = content
        return [pickle.loads(each[:size].numpy().tobytes()) for each, size in zip(self._all(padded), sizes)]

    def _from_first(self, value):
        """Rank 0's."""
        content = _bytes(value if self.rank == 0 else None)
        size = int(self._all(torch.tensor([len(content)], device="cpu"))[0])
        content = content if self.rank == 0 else content.new_empty(size)
        with self._watched():
            self._control.broadcast(content, 0).wait()
        return pickle.loads(content.numpy().tobytes())

    @property
    def _control(self):
        return self._running if self._started else self._starting

    @contextlib.contextmanager
    def _watched(self):
        try:
            yield
        except RuntimeError as error:
            raise self._lost(error) from error

    def _lost(self, error):
        """Who is gone: whoever does not say in the store that it is still there."""
        self._running = self._starting = None  # closes connections: those who wait for this one see it too
        first, missing = str(error).strip().splitlines()[0].split(". ")[0], list(range(self.count))
        try:
            self._store.set(f"here {self.rank}", "")
            end = time.monotonic() + GRACE
            while missing and time.monotonic() < end:
                time.sleep(GRACE / 20)
                missing = [rank for rank in missing if not self._store.check([f"here {rank}"])]
        except RuntimeError:
            missing = [0]  # with whom the store was
        names = ", ".join(f"rank {rank}" for rank in missing) or "one that was waited for too long"
        self._gone = f"{names} of {self.count} is gone or does not answer"
        return PeerError(f"{self._gone}: {first}")

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """A block that all run alike: an exception in one raises PeerError in the others at their next exchange."""
        try:
            yield
        except PeerError:
            raise
        except BaseException as error:
            known = any(isinstance(each, PeerError) or getattr(each, TOLD, None) is self for each in _causes(error))
            if not (self._gone or known):
                setattr(error, TOLD, self)  # kept here, the error would hold all that its frames do
                with contextlib.suppress(PeerError):
                    self._said(FAILED, message=f"{type(error).__name__}: {error}"[:500])
            raise
        else:
            self._said(THROUGH)

    def same(self, run: Mapping[str, str]) -> None:
        """Refuse a run that another process was told otherwise.

        Args:
            run: digests of what it is told (`fingerprint.digests`).

        Raises:
            ValueError: naming the argument, in all processes.
        """
        if len(set(self.exchange(int(digest(run)[:15], 16)))) == 1:
            return
        everyone = self._objects(dict(run))
        for rank, theirs in enumerate(everyone):
            if names := differing(everyone[0], theirs):
                raise ValueError(
                    f"{names[0]}: expected the same in all processes, got another in rank {rank} than in 0"
                )

    def same_networks(self, networks: Mapping[str, torch.nn.Module | None]) -> None:
        """Refuse networks, by name, that are others elsewhere, and those that are evaluated by all processes at once.

        Raises:
            ValueError: naming the network, in all processes.
        """
        check_whole(networks)
        self.same(digests(networks))

    def first(self, make: Callable[[], T]) -> T:
        """What rank 0 makes, for all; of what can be pickled."""
        made = make() if self.rank == 0 else None
        self.exchange()
        return self._from_first(made)

    def seeded(self, generator: Any, device: torch.device) -> None:
        """Put every process's generators, or the global ones that stand for None, where rank 0's are.

        Raises:
            ValueError: in all processes, where one has more of them or fewer.
        """
        generators = generator if isinstance(generator, list) else [generator]
        self.same(digests(dict(generator=None if generator is None else len(generators))))
        states = self.first(lambda: [get_state(each, device) for each in generators])
        for each, state in zip(generators, states):
            set_state(each, device, state)

    # What is sent on the device

    def broadcast(self, tensor: torch.Tensor) -> torch.Tensor:
        """Rank 0's; the others say one of its shape and dtype."""
        tensor = tensor.detach().contiguous().clone()
        self.exchange()
        with self._watched():
            dist.broadcast(tensor, group=self.group, group_src=0)
        return tensor

    def dealt(self, items: int, batch: int) -> slice:
        """Which of the items are this process's (`dealt`)."""
        return dealt(items, batch, self.rank, self.count)

    def gathered(self, own: list[torch.Tensor | None], items: int, batch: int, device: torch.device) -> list[Any]:
        """Everybody's rows of the items that are dealt out, of one or two tensors (the second may be None).

        Args:
            own: (rows, C, h, w), those of this process; none of a process that has no work.
            items, batch: as they were dealt.
        """
        parts = [part.detach() for part in own if part is not None]
        kind = (*parts[0].shape[1:], DTYPES.index(parts[0].dtype)) if parts else ()
        known = {said for said in self.exchange(len(parts), *kind) if said[0]}
        if len(known) > 1:
            kinds = [(*each[:-1], DTYPES[each[-1]]) for each in sorted(known)]
            raise ValueError(f"predictions: expected the same kind in all processes, got {kinds}")
        branches, *shape, dtype = known.pop()
        most = dealt(items, batch, 0, self.count).stop
        mine = torch.zeros(branches, most, *shape, dtype=DTYPES[dtype], device=device)
        for slot, part in zip(mine, parts):
            slot[: len(part)] = part
        everyone = mine.new_empty(self.count, *mine.shape)
        renamed = getattr(dist, "all_gather_single", None)  # in torch 2.13
        with self._watched():
            (renamed or dist.all_gather_into_tensor)(everyone.view(-1), mine.view(-1), group=self.group)
        self._started = True
        whole = [everyone[:, branch].flatten(0, 1)[:items] for branch in range(branches)]
        return [whole[0], whole[1] if branches > 1 else None]

    def begin(self) -> None:
        """Of a run, whose callback may be another than that of the one before."""
        self._kept = ""

    def call_back(self, callback: Callable, step: int, timestep: Any, canvas: torch.Tensor, **more: Any) -> Any:
        """`call_back` in rank 0, and what it says in all; what it changes elsewhere is its `state_dict`."""
        stopped, replaced = False, None
        before = None if canvas.is_inference() else canvas._version
        if self.rank == 0:
            replaced, stopped = call_back(callback, step, timestep, canvas, **more)
        written = before is None or canvas._version != before
        changed = written or not (replaced is None or replaced is canvas)
        state = callback.state_dict() if self.rank == 0 and hasattr(callback, "state_dict") else None
        now = digest(state)
        said = self.exchange(stopped, changed, now != self._kept)[0]
        self._kept = now
        if said[1]:
            replaced = self.broadcast(canvas if replaced is None else replaced)
        if said[2] and (state := unpacked(self._from_first(packed(state)), canvas.device)) is not None and self.rank:
            callback.load_state_dict(state)  # type: ignore[attr-defined]
        return replaced, bool(said[0])

    def check(self, canvas: torch.Tensor) -> None:
        """Refuse canvases that have come apart, as those of unlike devices may; waits for the device."""
        bits = (
            canvas.detach().contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[canvas.element_size()])
        )
        if len(set(self.exchange(int(bits.sum(dtype=torch.int64))))) > 1:
            raise RuntimeError("group: expected devices and libraries of one kind, got canvases that have come apart")


class SharedEvaluator(Evaluator):
    """Evaluates this process's windows of a step, and has all the predictions; cuts out its own windows alone."""

    def __init__(self, denoiser: Callable, batch: int | None, ranks: Ranks):
        super().__init__(denoiser, batch)
        self.ranks, self.share = ranks, self.batches.size  # as asked for: halving changes nobody's windows

    def gather(self, canvas: torch.Tensor, plan: WindowPlan, context: Any) -> torch.Tensor:
        own = self.ranks.dealt(len(context.rows), self.share)
        return cut(canvas, context.pictures[own], context.origins[own], plan.window)

    def __call__(self, windows: torch.Tensor, context: Any) -> list[Any]:
        items = len(context.rows)
        own = context.subset(self.ranks.dealt(items, self.share))
        predicted = super().__call__(windows, own) if len(windows) else []
        return self.ranks.gathered(predicted, items, self.share, windows.device)


def call_back(callback: Callable, step: int, timestep: Any, canvas: torch.Tensor, **more: Any) -> tuple[Any, bool]:
    """(latents to go on with, None for the same; whether to stop): what a callback of `sampler.sample` says.

    Raises:
        TypeError, ValueError: for what are no latents of the canvas.
    """
    stopped = False
    try:
        latents = callback(step, timestep, canvas, **more)
    except StopIteration as stop:
        latents, stopped = stop.value, True
    if latents is None:
        return None, stopped
    wanted = f"callback: expected latents {tuple(canvas.shape)} or None from it, got"
    if not isinstance(latents, torch.Tensor):
        raise TypeError(f"{wanted} {type(latents).__name__}")
    if latents.shape != canvas.shape:
        raise ValueError(f"{wanted} {tuple(latents.shape)}")
    return latents.to(canvas), stopped


def dealt(items: int, batch: int, rank: int, count: int) -> slice:
    """Which of the items are a process's: whole batches, in order, as many as rank 0 has while there are any."""
    each = -(-items // (batch * count)) * batch
    return slice(min(items, rank * each), min(items, (rank + 1) * each))


_made: dict[Any, Ranks] = {}
_stores: Counter = Counter()


def ranks_of(group: Any) -> Ranks | None:
    """Of a group, a mesh, True or Ranks; None of None. One for each group, as making it takes all its processes."""
    if group is None or isinstance(group, Ranks):
        return group
    key = _process_group(group) if dist.is_available() and dist.is_initialized() else None
    if key is None or key not in _made:
        _made[key] = Ranks(group)
    return _made[key]


@contextlib.contextmanager
def joined(group: Any) -> Iterator[Ranks | None]:
    """A block that all processes of a group run alike (`Ranks.together`), or one process alone."""
    ranks = ranks_of(group)
    with contextlib.nullcontext() if ranks is None else ranks.together():
        yield ranks


def shared(function: Callable[P, T]) -> Callable[P, T]:
    """A function with an argument `group`, which it is given as `Ranks` or None, and whose errors reach all of them."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        with joined(kwargs.get("group")) as ranks:
            kwargs["group"] = ranks
            return function(*args, **kwargs)

    return run


def _causes(error):
    """An error, and those from which it was raised."""
    while error is not None:
        yield error
        error = error.__cause__


def _bytes(value):
    return torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)


def _store(group):
    """A part of torch.distributed's store that belongs to a group's processes: they make them in the same order."""
    name = group.group_name
    _stores[name] += 1
    return dist.PrefixStore(f"instantas/{name}/{_stores[name]}", dist.distributed_c10d._get_default_store())


def _process_group(group):
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise ValueError(f"group: expected a DeviceMesh of one dimension, got {group.ndim}; take one of it")
        return group.get_group()
    if group is True:
        return dist.group.WORLD
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"group: expected a process group, a DeviceMesh or True, got {type(group).__name__}")
    return group

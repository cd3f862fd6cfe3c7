"""What `bench.gpu` does, the most telling first: groups of items, each group in a process of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice
from typing import NamedTuple

import torch

from bench import gpu_checks, gpu_speeds
from instantas.testing import examples

CHECK, SPEED, SANITIZER = 30, 60, 90  # seconds that a check, each contender, a tool may take, compilation included
TOGETHER = {"smoke", "runs", "grid", "examples"}  # stages whose groups may run at the same time: none measures
PARTS = {"guided step": 2, "attention": 8}  # processes that share the grid's cases: Triton compiles on one core


class Setting(NamedTuple):
    """What is to be done, and where."""

    device: str = "cuda"
    backends: tuple[str, ...] = ("triton", "cuda")
    smoke: bool = False
    examples: int = 20  # random ones of each operation


class Item(NamedTuple):
    """A check, which raises where something is wrong; or a comparison, which gives what the report keeps of it.

    seconds: after which it counts as hung; of a comparison, each of its contenders.
    """

    name: str
    run: Callable[[], object]
    seconds: float


class Group(NamedTuple):
    """`items` is called in the group's own process. The name begins with the stage: "grid: cuda, gather"."""

    name: str
    items: Callable[[], Iterable[Item]]

    @property
    def stage(self) -> str:
        return self.name.split(":")[0]


def groups(setting: Setting, field: gpu_speeds.Field | None = None) -> list[Group]:
    """All groups in order. field: of the process in which comparisons are to run."""
    device, backends = torch.device(setting.device), setting.backends
    if setting.smoke:
        found = [_checks(f"smoke: {name}", partial(gpu_checks.smoke, [name])) for name in backends]
        return found + _speeds(device, gpu_speeds.SMALL, field)
    found = [_checks("runs: bridges in CUDA graphs", partial(gpu_checks.runs, device))]
    found += [_checks(f"runs: {name} in graphs", partial(gpu_checks.graphs, [name], device)) for name in backends]
    for operation in reversed(gpu_checks.OPERATIONS):  # the longest first
        for name in backends:
            parts = PARTS.get(operation, 1)
            for part in range(parts):
                checks = partial(_part, partial(gpu_checks.grid, [name], contains=f"{operation}, "), part, parts)
                share = f", {part + 1} of {parts}" if parts > 1 else ""
                found.append(_checks(f"grid: {name}, {operation}{share}", checks))
    found += _speeds(device, gpu_speeds.Sizes(), field)
    found.append(Group("sanitizer: every kernel", partial(_sanitized, backends)))
    found += [_checks(f"large: {name}", partial(gpu_checks.large, [name], device)) for name in backends]
    for operation in reversed(examples.OPERATIONS):
        checks = partial(gpu_checks.random_examples, backends, operation, setting.examples)
        found.append(_checks(f"examples: {operation.__name__}", checks))
    return found


def _checks(name, checks):
    return Group(name, lambda: (Item(item, check, CHECK) for item, check in checks()))


def _part(checks, part, parts) -> Iterator[gpu_checks.Check]:
    return islice(checks(), part, None, parts)


def _speeds(device, sizes, field):
    """A group for each operation."""

    def items(operation):
        for kind, key, comparison in gpu_speeds.comparisons(device, sizes, field):
            if kind == operation:
                yield Item(key, partial(_kept, key, comparison, sizes), SPEED)

    return [Group(f"speeds: {name}", partial(items, name)) for name in ("attention", "step", "scatter", "gather")]


def _kept(key, comparison, sizes):
    found = comparison()
    lines = [line._asdict() for line in (gpu_speeds.lines(key, found) if sizes is not gpu_speeds.SMALL else ())]
    return dict(speed=found.as_dict(), table=found.table(), lines=lines)


def _sanitized(backends):
    for tool in gpu_checks.SANITIZERS:
        yield Item(tool, partial(gpu_checks.sanitize, tool, backends), SANITIZER)

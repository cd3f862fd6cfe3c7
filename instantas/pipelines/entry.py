"""What stands in front of a network's call, its hooks and compiled code included, for one thread or task.

It is put where `torch.nn.Module.compile` puts its own: what is called there is called in place of the module, and can
call the module as it was, any number of times. Unlike another `forward` it meets nobody who changes that too.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from instantas.sampling.hosted import Place

SLOT = "_compiled_call_impl"

_HERE: ContextVar[tuple] = ContextVar("who stands in front of networks in this thread or task", default=())
_CHANGING = threading.RLock()


class Seen(NamedTuple):
    """What a network sees of a canvas in the evaluation that is under way.

    Attributes:
        place: which windows.
        call: the arguments by name that the evaluation of the whole canvas had.
    """

    place: Place
    call: dict[str, Any]


SEEN: ContextVar[Seen | None] = ContextVar("windows that the network is evaluated on", default=None)


@dataclass(frozen=True, eq=False)
class User:
    """Who stands in front of a network: the module, compiled or not, and what is called in its place."""

    module: torch.nn.Module
    call: Callable


class Entry:
    """Stands in front of a network.

    Args:
        network: compiled or not.

    Attributes:
        compiled: what `network.compile()` has put there; None: nothing.
        users: one at most for a thread or task.
    """

    def __init__(self, network: torch.nn.Module):
        self.network, self.compiled = network, vars(network).get(SLOT)
        self.users: list[User] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        user = next((user for user in _HERE.get() if user in self.users), None)
        return self.behind(*args, **kwargs) if user is None else user.call(*args, **kwargs)

    def behind(self, *args: Any, **kwargs: Any) -> Any:
        """The network as it was."""
        return (self.compiled or self.network._call_impl)(*args, **kwargs)

    @classmethod
    def of(cls, network: torch.nn.Module) -> Entry | None:
        """The one that stands there; None: nobody does."""
        found = vars(network).get(SLOT)
        return found if isinstance(found, cls) else None


@contextlib.contextmanager
def entered(network: torch.nn.Module, make: Callable[[Callable], Callable]) -> Iterator[Any]:
    """Somebody in front of a network inside of the block, for evaluations in this thread or task.

    Afterwards, also of a failing block, the network is as it was.

    Args:
        make: given the network as it was, gives what is called in its place.

    Yields:
        The same.

    Raises:
        ValueError: where somebody stands there in this thread or task already.
    """
    with _CHANGING:
        entry = Entry.of(network) or Entry(network)
        if any(user.module is module_of(network) for user in _HERE.get()):
            raise ValueError("pipe: expected networks that see whole canvases, got one that is windowed already")
        user = User(module_of(network), make(entry.behind))
        entry.users.append(user)
        vars(network)[SLOT] = entry
    _HERE.set((*_HERE.get(), user))
    try:
        yield user.call
    finally:
        _HERE.set(tuple(other for other in _HERE.get() if other is not user))
        with _CHANGING:
            entry.users = [other for other in entry.users if other is not user]
            if not entry.users and vars(network).get(SLOT) is entry:
                vars(network).pop(SLOT)
                vars(network).update({} if entry.compiled is None else {SLOT: entry.compiled})


def module_of(network: Any) -> torch.nn.Module:
    """The module itself of one that is compiled."""
    return getattr(network, "_orig_mod", network)


def bound(network: Any, args: tuple, kwargs: dict) -> dict[str, Any]:
    """Arguments of a network's call by name."""
    named = signature(network).bind(None, *args, **kwargs).arguments
    return {name: value for name, value in named.items() if name != "self"}


def signature(network: Any) -> inspect.Signature:
    """Of the forward of a network's kind."""
    kind: Any = type(module_of(network))
    return _signature(kind)


@functools.cache
def _signature(kind: Any) -> inspect.Signature:
    return inspect.signature(inspect.unwrap(kind.forward))

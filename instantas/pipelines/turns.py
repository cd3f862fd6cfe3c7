"""What a run shares with its surroundings: other threads, which take turns, and torch's default device."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import torch

_locks: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
_guard = threading.Lock()


@contextlib.contextmanager
def turn(*parts: Any) -> Iterator[None]:
    """Waits until no other thread has a turn with one of the parts; the thread that has it may enter again.

    A run sets the scheduler's timesteps and the network's processors.

    Args:
        parts: objects that a run changes, such as a network and a scheduler. Of several, none is waited for while one
            that comes later in an order common to all threads is held.
    """
    wanted = {id(part): part for part in parts if part is not None}
    with contextlib.ExitStack() as stack:
        for number in sorted(wanted):
            with _guard:
                lock = _locks.setdefault(wanted[number], threading.RLock())
            stack.enter_context(lock)
        yield


def host_tensors() -> contextlib.AbstractContextManager:
    """Tensors that are made without a device are the host's, whatever the default device is."""
    return contextlib.nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu")

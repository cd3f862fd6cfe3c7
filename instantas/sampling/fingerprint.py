"""What a run is told, as digests: by them two runs are known to be the same, or in what they differ."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import torch

SAMPLED = 64  # numbers of each of a network's weights that are looked at: all of them take too long to read


def digests(arguments: Mapping[str, Any]) -> dict[str, str]:
    """Name -> digest of the value: by content, wherever it lies, and the same in every process."""
    return {name: digest(value) for name, value in arguments.items()}


def digest(value: Any) -> str:
    """Of numbers, texts, tensors, arrays, pictures, generators, networks, dataclasses, and containers of them.

    Of a function its name counts, of a scheduler its configuration and timesteps, of any other object its type.
    """
    found = hashlib.sha256()
    for part in _parts(value):
        found.update(part)
    return found.hexdigest()


def differing(ours: Mapping[str, str], theirs: Mapping[str, str]) -> list[str]:
    """Names of the arguments that differ, in our order."""
    return [name for name in dict.fromkeys([*ours, *theirs]) if ours.get(name) != theirs.get(name)]


def _parts(value: Any) -> Iterator[bytes]:
    """Bytes that say a value; what contains others says how many, so that no two are said alike."""
    match value:
        case np.generic():
            yield from _parts(value.item())
        case float() if value.is_integer():
            yield f"{int(value)};".encode()
        case None | bool() | int() | float() | complex() | str() | bytes() | torch.dtype():
            yield f"{value!r};".encode()
        case torch.device():
            yield b"device;"  # a run may go on elsewhere
        case torch.Generator():
            yield from _parts(value.get_state())
        case torch.nn.Module():
            yield from _network(value)
        case torch.Tensor():
            yield f"{value.dtype}{tuple(value.shape)};".encode()
            if value.device.type != "meta":
                yield value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        case Mapping():
            yield from _several("mapping", sorted(value.items(), key=lambda item: repr(item[0])))
        case set() | frozenset():
            yield from _several("set", sorted(value, key=repr))
        case list() | tuple() | range():
            yield from _several("list", value)
        case _ if is_dataclass(value) and not isinstance(value, type):
            given = [getattr(value, field.name) for field in fields(value) if field.init]
            yield from _several(type(value).__qualname__, given)
        case _ if hasattr(value, "set_timesteps"):
            config = dict(getattr(value, "config", None) or {})
            told = {name: each for name, each in config.items() if not name.startswith("_")}  # others differ by process
            yield from _several(_name(type(value)), [told, value.timesteps])
        case _ if hasattr(value, "__array_interface__"):  # arrays, and pictures
            array = np.asarray(value)
            yield f"{array.dtype}{array.shape};".encode()
            yield np.ascontiguousarray(array).tobytes()
        case _:
            yield f"{_name(value if hasattr(value, '__qualname__') else type(value))};".encode()


def _several(name: str, values: Iterable) -> Iterator[bytes]:
    parts = list(values)
    yield f"{name}[{len(parts)}];".encode()
    for part in parts:
        yield from _parts(part)


def _network(module: torch.nn.Module) -> Iterator[bytes]:
    """Its type, and of every weight its name, form and some numbers, spread evenly."""
    yield f"{_name(type(module))};".encode()
    for name, weight in module.state_dict().items():
        yield f"{name}{tuple(getattr(weight, 'shape', ()))};".encode()
        if isinstance(weight, torch.Tensor):
            yield from _parts(weight.detach().flatten()[:: max(1, weight.numel() // SAMPLED)])


def _name(value: Any) -> str:
    return f"{value.__module__}.{value.__qualname__}"

"""Which implementation runs an operation: what is available, what is forced, what is the default.

Every backend implements all operations of `schemas.SCHEMAS`; to add one, add its record to `BACKENDS`.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from . import reference, stamp
from .library import CPP, CUDA
from .schemas import SCHEMAS

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
FLOAT32_AND_BELOW = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True, eq=False)
class Backend:
    """One implementation of all operations: where it runs, on what, and why it cannot."""

    name: str
    description: str
    devices: tuple[str, ...]  # types of the devices whose tensors it takes
    dtypes: tuple[torch.dtype, ...]
    functions: Callable[[], Mapping[str, Callable[..., Any]]]  # operation -> function of its schema's arguments
    absent: Callable[[], str | None] = lambda: None  # why it cannot run on this machine
    refused: Callable[[torch.device], str | None] = lambda device: None  # why it cannot run on this device of a type
    default: bool = True  # whether it runs without being asked for
    ordered: bool = False  # whether its attention visits fewer prompts by an order (`ops.region_order`)

    def unserved(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why it does not take such tensors, or None."""
        if device.type not in self.devices:
            return f"it serves tensors on {', '.join(self.devices)}, got {device.type}"
        if dtype not in self.dtypes:
            return f"it serves {', '.join(_name(d) for d in self.dtypes)}, got {_name(dtype)}"
        return self.refused(device)


def backends() -> dict[str, str]:
    """Name -> "available", or the reason why the backend cannot run here."""
    return {name: backend.absent() or "available" for name, backend in BACKENDS.items()}


@contextlib.contextmanager
def use_backend(backend: str | Backend) -> Iterator[None]:
    """Force one backend for every operation of the process inside the `with` block.

    Args:
        backend: its name; or a record, which need not be one of `BACKENDS`.

    Raises:
        ValueError: for an unknown name.
        RuntimeError: when the backend is not available here; and from an operation whose tensors it does not serve.
            Nothing else is ever run silently, but for the reference under the transforms of `torch.func`.
    """
    if not isinstance(backend, Backend):
        if backend not in BACKENDS:
            raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {backend!r}")
        backend = BACKENDS[backend]
    if reason := backend.absent():
        raise RuntimeError(f"backend {backend.name!r} cannot run here: {reason}")
    forced.append(backend)
    try:
        yield
    finally:
        forced.pop()


forced: list[
    Backend
] = []  # by `use_backend`, the last counts; not context-local: autograd runs backward passes in threads of its own


def implementation(operation: str, tensor: torch.Tensor) -> Callable[..., Any]:
    """The function that runs the operation on tensors of this one's device and dtype."""
    if not forced:
        return default(tensor.device, tensor.dtype).functions()[operation]
    backend = forced[-1]
    if reason := backend.unserved(tensor.device, tensor.dtype):
        raise RuntimeError(f"backend {backend.name!r} cannot run {operation}: {reason}")
    return backend.functions()[operation]


def ordered(device: torch.device) -> bool:
    """Whether an order of the queries is of use to attention on the device."""
    return (forced[-1] if forced else default(device, torch.float32)).ordered


@functools.cache
def default(device: torch.device, dtype: torch.dtype) -> Backend:
    """The fastest backend that can run; a warning, once, where that is the reference for want of another."""
    able = [b for b in reversed(BACKENDS.values()) if b.default and not b.unserved(device, dtype)]
    chosen = next((b for b in able if not b.absent()), BACKENDS["reference"])
    if chosen.name == "reference" and (absent := [b for b in able if b is not chosen]):
        _warn_slow(device.type, "; ".join(f"{b.name}: {b.absent()}" for b in absent))
    return chosen


@functools.cache
def _warn_slow(device: str, reasons: str) -> None:
    message = f"instantas: operations on {device} run in plain PyTorch, which is slower than a kernel. {reasons}"
    warnings.warn(message, RuntimeWarning, stacklevel=2)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@functools.cache
def _cpp_absent() -> str | None:
    return CPP.unfit() or CPP.load()


@functools.cache
def _triton_absent() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if not torch.cuda.is_available() and not INTERPRETED:
        return "interpreter only: there is no GPU (set TRITON_INTERPRET=1 before Python starts)"
    return None


@functools.cache
def _cuda_absent() -> str | None:
    if reason := CUDA.unfit():
        return reason
    if not torch.cuda.is_available():
        return f"built for {', '.join(CUDA.architectures)}, not loadable: there is no CUDA device"
    refusals = [_cuda_refused(torch.device("cuda", i)) for i in range(torch.cuda.device_count())]
    return refusals[0] if all(refusals) else CUDA.load()


def _cuda_refused(device: torch.device) -> str | None:
    major, minor = torch.cuda.get_device_capability(device)
    if stamp.serves(CUDA.architectures, (major, minor)):
        return None
    mend = f"; to build it: {stamp.remedy()}" if major >= 8 else ", and the kernels need sm_80 or later"
    return f"built for {', '.join(CUDA.architectures)}, which {device} of sm_{major}{minor} does not run{mend}"


@functools.cache
def _triton_functions() -> dict[str, Callable[..., Any]]:
    modules = [importlib.import_module(f"..kernels.{stem}", __package__) for stem in ("windows", "step", "attention")]
    return {op: next(getattr(m, op) for m in modules if hasattr(m, op)) for op in SCHEMAS}


class _Plan(NamedTuple):
    """The part of a WindowPlan that the reference reads."""

    height: int
    width: int
    window: tuple[int, int]
    origins: torch.Tensor


def _plan(origins, geometry):
    height, width, h, w = geometry[:4]
    return _Plan(height, width, (h, w), origins)


def _gather_windows(canvas, origins, cover_start, cover_index, geometry):
    return reference.gather_windows(canvas, _plan(origins, geometry))


def _scatter_windows(windows, weight, origins, cover_start, cover_index, geometry, normalize):
    return reference.scatter_windows(windows, _plan(origins, geometry), weight, normalize)


def _guided_step(
    cond,
    uncond,
    sample,
    weight,
    history,
    latest,
    coefficients,
    keep,
    carry,
    guidance_scale,
    guidance_map,
    origins,
    start,
    index,
    geometry,
):
    guidance = guidance_scale if guidance_map is None else guidance_map
    plan = _plan(origins, geometry)
    state = dict(history=history, keep=keep, latest=latest if len(latest) else None, carry=carry)
    new_sample, new_history, *kept = reference.guided_step(
        cond, uncond, sample, plan, coefficients, guidance, weight=weight, **state
    )
    new_history = torch.empty_like(history) if new_history is None else new_history
    return new_sample.contiguous(), new_history, kept[0] if kept else torch.empty_like(latest)


def _regional_attention(query, key, value, prompt_ids, weights, joint, scale, order=None, lengths=None):
    how = dict(mode="joint" if joint else "blend", scale=scale, lengths=lengths)
    return reference.regional_attention(query, key, value, prompt_ids, weights, **how).contiguous()


def _regional_attention_backward(grad, query, key, value, prompt_ids, weights, joint, scale, order=None, lengths=None):
    how = dict(mode="joint" if joint else "blend", scale=scale, lengths=lengths)
    grads = reference.regional_attention_backward(grad, query, key, value, prompt_ids, weights, **how)
    return tuple(g.contiguous() for g in grads)


REFERENCE: dict[str, Callable[..., Any]] = {
    "gather_windows": _gather_windows,
    "scatter_windows": _scatter_windows,
    "guided_step": _guided_step,
    "regional_attention": _regional_attention,
    "regional_attention_backward": _regional_attention_backward,
}


# From the slowest to the fastest: the last that can runs what no `use_backend` claims.
BACKENDS = {
    backend.name: backend
    for backend in (
        Backend(
            "reference",
            "plain PyTorch, the definition of correct",
            ("cpu", "cuda", "mps", "xpu"),
            (*FLOAT32_AND_BELOW, torch.float64),
            lambda: REFERENCE,
        ),
        # Measured on one thread, times as fast as the reference: gather, scatter, guided_step on 256 x 256 x 4 cells
        # 3.0, 10, 10 with windows 8 apart, 11, 13, 6 at minimum coverage; attention with 4 hard regions 13, with a
        # single one 2.3, with soft ones 3.5 to 6.8, its backward 7 and 1.2 to 1.6.
        Backend(
            "cpp",
            "C++ on the CPU",
            ("cpu",),
            (*FLOAT32_AND_BELOW, torch.float64),
            functools.cache(CPP.functions),
            _cpp_absent,
        ),
        Backend(
            "triton",
            "Triton on a GPU",
            ("cpu",) if INTERPRETED else ("cuda",),
            FLOAT32_AND_BELOW,
            _triton_functions,
            _triton_absent,
            default=not INTERPRETED,
            ordered=True,
        ),
        # Not measured yet. Reasoned: CUDA stages a prompt of 77 tokens at once, and picks its own memory instructions.
        Backend(
            "cuda",
            "CUDA on an NVIDIA GPU",
            ("cuda",),
            FLOAT32_AND_BELOW,
            functools.cache(CUDA.functions),
            _cuda_absent,
            _cuda_refused,
            ordered=True,
        ),
    )
}

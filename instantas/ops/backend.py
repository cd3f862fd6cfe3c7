"""Which implementation runs an operation: what is available, what is forced, what is the default.

Every backend implements all operations of `schemas.SCHEMAS`.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
from pathlib import Path
from typing import NamedTuple

import torch

from instantas.ops import cpu, reference
from instantas.ops.schemas import SCHEMAS

BACKENDS = ("reference", "cpp", "triton", "cuda")

# Per device, the backends in order of preference: the first that is available runs the operation.
PREFERENCE = {
    # Measured on one thread, times as fast as the reference: gather, scatter, guided_step on 256 x 256 x 4 cells 3.0,
    # 10, 10 with windows 8 apart, 11, 13, 6 at minimum coverage; attention with 4 hard regions 9 to 11, its backward 7;
    # with a single region or soft ones 1.1 to 2.1, backward 1.2 to 1.6.
    "cpu": dict.fromkeys(SCHEMAS, ("cpp", "reference")),
    # Not measured yet. Reasoned: CUDA stages a prompt of 77 tokens at once, and picks its own memory instructions.
    "cuda": dict.fromkeys(SCHEMAS, ("cuda", "triton", "reference")),
}

# What the host library offers besides: rows of a contiguous tensor by number (instantas/ops/cpu.py).
_ROWS = {
    "take_rows": "(Tensor source, Tensor rows) -> Tensor",
    "put_rows": "(Tensor(a!) target, Tensor rows, Tensor values) -> ()",
}

PACKAGE = Path(__file__).parents[1]  # where the libraries lie
_LIBRARIES = {"cpp": "libinstantas_cpu.so", "cuda": "libinstantas_cuda.so"}
_DEVICES = {"cpp": ("cpu",), "cuda": ("cuda",), "reference": ("cpu", "cuda", "mps", "xpu")}

_forced: list[str] = []  # not context-local: autograd runs backward passes in threads of its own


def backends() -> dict[str, str]:
    """Name -> "available", or the reason why the backend cannot run here."""
    return {name: _absent(name) or "available" for name in BACKENDS}


@contextlib.contextmanager
def use_backend(name: str):
    """Force one backend for every operation of the process inside the `with` block.

    Raises:
        ValueError: for an unknown name.
        RuntimeError: when the backend is not available here; and from an operation whose tensors it does not serve.
            Nothing else is ever run silently.
    """
    if name not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {name!r}")
    if reason := _absent(name):
        raise RuntimeError(f"backend {name!r} cannot run here: {reason}")
    _forced.append(name)
    try:
        yield
    finally:
        _forced.pop()


def implementation(operation: str, tensor: torch.Tensor):
    """The function that runs the operation on tensors of this one's device and dtype."""
    if _forced:
        name = _forced[-1]
        if reason := _unserved(name, tensor):
            raise RuntimeError(f"backend {name!r} cannot run {operation}: {reason}")
    else:
        preference = PREFERENCE.get(tensor.device.type, {}).get(operation, ())
        name = next((n for n in preference if not _absent(n) and not _unserved(n, tensor)), "reference")
    return _functions(name)[operation]


@functools.cache
def _absent(name: str) -> str | None:
    """Why the backend cannot run here, or None."""
    if name == "reference":
        return None
    if name == "triton":
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed"
        if not torch.cuda.is_available() and not _interpreting():
            return "interpreter only: there is no GPU (set TRITON_INTERPRET=1 before Python starts)"
        return None
    library = PACKAGE.joinpath(_LIBRARIES[name])
    if not library.exists():
        return f"not built: {library.name} is not there"
    if name == "cuda" and not torch.cuda.is_available():
        return f"built{_architectures(library)}, not loadable: there is no CUDA device"
    try:
        _define(name)
        torch.ops.load_library(library)
    except OSError as error:
        return f"{library.name} does not load: {error}"
    return None


@functools.cache
def _define(name: str) -> torch.library.Library:
    """The operators instantas_cpp::* or instantas_cuda::*, most of which the library then implements."""
    namespace = torch.library.Library(f"instantas_{name}", "DEF")
    for operation, schema in (SCHEMAS | _ROWS if name == "cpp" else SCHEMAS).items():
        namespace.define(operation + schema.replace("SymInt[]", "int[]"))
        if name == "cpp" and "attention" in operation:
            namespace.impl(operation, getattr(cpu, operation), "CPU")
    return namespace


def _architectures(library: Path) -> str:
    """The architectures that setup.py wrote beside the library, as " for sm_80, sm_90a"."""
    note = library.with_suffix(".arch")
    return f" for {note.read_text().strip()}" if note.exists() else ""


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _unserved(name: str, tensor: torch.Tensor) -> str | None:
    """Why the backend does not serve such tensors, or None."""
    devices = _DEVICES.get(name) or (("cpu",) if _interpreting() else ("cuda",))
    if tensor.device.type not in devices:
        return f"it serves tensors on {', '.join(devices)}, got {tensor.device.type}"
    if name in ("triton", "cuda") and tensor.dtype == torch.float64:
        return "it serves float32, float16 and bfloat16, got float64"
    return None


@functools.cache
def _functions(name: str) -> dict:
    if name == "reference":
        return _REFERENCE
    if name == "triton":
        modules = [importlib.import_module(f"instantas.kernels.{stem}") for stem in ("windows", "step", "attention")]
        return {op: next(getattr(m, op) for m in modules if hasattr(m, op)) for op in SCHEMAS}
    return {op: getattr(getattr(torch.ops, f"instantas_{name}"), op).default for op in SCHEMAS}


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
    coefficients,
    keep,
    guidance_scale,
    guidance_map,
    origins,
    start,
    index,
    geometry,
):
    guidance = guidance_scale if guidance_map is None else guidance_map
    plan = _plan(origins, geometry)
    sample, newest = reference.guided_step(
        cond, uncond, sample, plan, coefficients, guidance, weight=weight, history=history, keep=keep
    )
    return sample.contiguous(), history.new_empty(history.shape) if newest is None else newest


def _regional_attention(query, key, value, prompt_ids, weights, joint, scale):
    mode = "joint" if joint else "blend"
    return reference.regional_attention(query, key, value, prompt_ids, weights, mode=mode, scale=scale).contiguous()


def _regional_attention_backward(grad, query, key, value, prompt_ids, weights, joint, scale):
    mode = "joint" if joint else "blend"
    grads = reference.regional_attention_backward(grad, query, key, value, prompt_ids, weights, mode=mode, scale=scale)
    return tuple(g.contiguous() for g in grads)


_REFERENCE = {
    "gather_windows": _gather_windows,
    "scatter_windows": _scatter_windows,
    "guided_step": _guided_step,
    "regional_attention": _regional_attention,
    "regional_attention_backward": _regional_attention_backward,
}

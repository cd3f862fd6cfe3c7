"""The comparisons: every operation, on every backend that can run, against its rivals (`instantas.bench.rivals`).

Each function makes inputs of the shape asked for, declares the bytes and operations that the work needs at least, and
hands all contenders to `instantas.bench.measure.compare`, or a function called like it, whose keywords it passes on.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch

from instantas import ops
from instantas.bench import rivals
from instantas.bench.measure import Comparison, compare
from instantas.ops import reference
from instantas.ops.backend import BACKENDS, default
from instantas.windows import WindowPlan

COEFFICIENTS = (0.98, -0.11, 0.03, -0.02, 0.01)  # a, b, c_1 ..: of the size that solvers have
KEEP = (0.3, 0.9)
GUIDANCE = 7.5


def gather(
    plan: WindowPlan,
    *,
    channels: int = 4,
    batch: int = 1,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    compiled: bool = False,
    left_out: Iterable[str] = (),
    measure: Callable[..., Comparison] = compare,
    **options: Any,
) -> Comparison:
    """ops.gather_windows."""
    device, size = torch.device(device), dtype.itemsize * batch * channels

    def inputs(generator):
        return (_normal((batch, channels, plan.height, plan.width), generator, device, dtype),)

    ours, absent = contenders(lambda x: ops.gather_windows(x, plan), device, left_out)
    theirs, missing = rivals.gather(plan, device, compiled=compiled)
    return measure(
        f"gather_windows, {_geometry(plan, batch, channels)}",
        inputs,
        ours,
        lambda x: reference.gather_windows(x, plan),
        bytes=size * (plan.height * plan.width + _cells(plan)),
        rivals=theirs,
        absent=absent | missing,
        **options,
    )


def scatter(
    plan: WindowPlan,
    *,
    weight: str | None = None,
    channels: int = 4,
    batch: int = 1,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    compiled: bool = False,
    left_out: Iterable[str] = (),
    measure: Callable[..., Comparison] = compare,
    **options: Any,
) -> Comparison:
    """ops.scatter_windows; weight: a kind of overlap weight."""
    device, size = torch.device(device), dtype.itemsize * batch * channels
    overlap = None if weight is None else plan.weight(weight).to(device)

    def inputs(generator):
        return (_normal((batch, plan.count, channels, *plan.window), generator, device, dtype),)

    ours, absent = contenders(lambda x: ops.scatter_windows(x, plan, overlap), device, left_out)
    theirs, missing = rivals.scatter(plan, overlap, device, dtype, compiled=compiled)
    return measure(
        f"scatter_windows, {_geometry(plan, batch, channels)}{', weighted' if weight else ''}",
        inputs,
        ours,
        lambda x: reference.scatter_windows(x, plan, None if overlap is None else overlap.to(_wide(x))),
        bytes=size * (plan.height * plan.width + _cells(plan)) + (0 if overlap is None else overlap.nbytes),
        rivals=theirs,
        absent=absent | missing,
        **options,
    )


def step(
    plan: WindowPlan,
    *,
    history: int = 0,
    weight: str | None = None,
    channels: int = 4,
    batch: int = 1,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    compiled: bool = False,
    left_out: Iterable[str] = (),
    measure: Callable[..., Comparison] = compare,
    **options: Any,
) -> Comparison:
    """ops.guided_step with guidance; history: entries that the scheduler looks back."""
    device, size = torch.device(device), dtype.itemsize * batch * channels
    overlap = None if weight is None else plan.weight(weight).to(device)
    coefficients = COEFFICIENTS[: 2 + history]
    table, keep = (torch.tensor(v, dtype=torch.float64, device=device) for v in (coefficients, KEEP))

    def inputs(generator):
        windows, canvas = (batch, plan.count, channels, *plan.window), (batch, channels, plan.height, plan.width)
        shapes = [windows, windows, canvas, *[(history, *canvas)] * (history > 0)]
        return tuple(_normal(shape, generator, device, dtype) for shape in shapes)

    def run(cond, uncond, sample, kept=None):
        given = dict(weight=overlap, history=kept, keep=keep)
        return _newest(*ops.guided_step(cond, uncond, sample, plan, table, GUIDANCE, **given))

    def exact(cond, uncond, sample, kept=None):
        given = dict(weight=None if overlap is None else overlap.to(_wide(sample)), history=kept, keep=KEEP)
        return _newest(*reference.guided_step(cond, uncond, sample, plan, coefficients, GUIDANCE, **given))

    ours, absent = contenders(run, device, left_out)
    theirs, missing = rivals.step(plan, overlap, coefficients, GUIDANCE, KEEP, device, dtype, compiled=compiled)
    return measure(
        f"guided_step, {_geometry(plan, batch, channels)}, history {history}",
        inputs,
        ours,
        exact,
        bytes=size * (2 * _cells(plan) + (2 + history + (history > 0)) * plan.height * plan.width),
        rivals=theirs,
        absent=absent | missing,
        **options,
    )


def attention(
    regions: int,
    *,
    windows: int = 8,
    queries: int = 4096,
    heads: int = 5,
    depth: int = 64,
    tokens: int = 77,
    soft: bool = False,
    mode: str = "blend",
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    compiled: bool = False,
    left_out: Iterable[str] = (),
    measure: Callable[..., Comparison] = compare,
    **options: Any,
) -> Comparison:
    """ops.regional_attention; the regions are upright stripes of every window's queries, or overlap everywhere."""
    device = torch.device(device)
    ids, weights = stripes(regions, windows, queries, soft, device)

    def run(query, key, value):
        return ops.regional_attention(query, key, value, ids, weights, mode=mode)

    ours, absent = contenders(run, device, left_out)
    theirs, missing = rivals.attention(ids, weights, tokens, dtype, mode=mode, compiled=compiled)
    wanted = int((weights > 0).sum())  # pairs of a query and a prompt
    moved = 2 * windows * queries * heads * depth + 2 * regions * tokens * heads * depth
    shape = f"{windows} x {queries} queries, {heads} x {depth}, {tokens} tokens"
    return measure(
        f"regional_attention, {shape}, {regions} {'soft' if soft else 'hard'} region{'s' * (regions > 1)}, {mode}",
        bank_inputs(regions, windows, queries, heads, depth, tokens, device, dtype),
        ours,
        exact_attention(ids, weights, mode),
        bytes=moved * dtype.itemsize + weights.nbytes + ids.nbytes,
        flops=4 * wanted * heads * depth * tokens,
        rivals=theirs,
        absent=absent | missing,
        **options,
    )


def small(
    device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, quick: bool = False
) -> list[Callable[..., Comparison]]:
    """Every operation once or twice, at sizes that any machine holds; each takes compare's `progress`.

    quick: a few laps each, without the reference, which is slow.
    """
    fewest, strided = WindowPlan.minimum_coverage(256, 256), WindowPlan.strided(64, 256)
    effort: dict[str, Any] = dict(seconds=1, laps=(3, 100), left_out=("reference",)) if quick else dict(seconds=10)
    options = dict(device=device, dtype=dtype) | effort
    return [
        functools.partial(gather, fewest, channels=16, **options),
        functools.partial(scatter, strided, weight="gaussian", channels=16, **options),
        functools.partial(step, fewest, channels=16, history=1, **options),
        functools.partial(step, strided, channels=16, history=1, **options),
        functools.partial(attention, 1, windows=2, **options),
        functools.partial(attention, 4, windows=2, **options),
    ]


def bank_inputs(
    prompts: int,
    windows: int,
    queries: int,
    heads: int,
    depth: int,
    tokens: int,
    device: torch.device | str,
    dtype: torch.dtype,
) -> Callable[[torch.Generator], tuple[torch.Tensor, ...]]:
    """Makes (query, key, value)."""

    def inputs(generator):
        bank = (prompts, tokens, heads, depth)
        return tuple(
            _normal(shape, generator, device, dtype) for shape in ((windows, queries, heads, depth), bank, bank)
        )

    return inputs


def exact_attention(ids: torch.Tensor, weights: torch.Tensor, mode: str = "blend") -> Callable[..., torch.Tensor]:
    """The reference, an image at a time: the probabilities of all would not fit."""

    def exact(query, key, value):
        rows = zip(query.split(1), ids.split(1), weights.split(1))
        parts = [reference.regional_attention(q, key, value, i, w, mode=mode) for q, i, w in rows]
        return torch.cat(parts)

    return exact


def stripes(
    regions: int, windows: int, queries: int, soft: bool, device: torch.device | str
) -> tuple[torch.Tensor, torch.Tensor]:
    """(prompt ids (B, R), weights (B, R, N)): each window cut into upright stripes."""
    side = round(queries**0.5)
    column = torch.arange(queries) % (side if side * side == queries else queries)
    region = column * regions // (int(column.max()) + 1)
    weights = torch.nn.functional.one_hot(region, regions).T.float()
    if soft:
        weights = 0.9 * weights + 0.1 / regions
    ids = torch.arange(regions, dtype=torch.int32).expand(windows, regions).contiguous()
    return ids.to(device), weights.expand(windows, regions, queries).contiguous().to(device)


def contenders(
    call: Callable, device: torch.device, left_out: Iterable[str] = ()
) -> tuple[dict[str, Callable], dict[str, str]]:
    """({backend: call on it}, {backend: why not}), first the backend that the operation runs on by default.

    That one is not forced, which nobody would do, and which costs a short call a part of its time.
    """
    states, runs, absent = ops.backends(), {}, {}
    for name, backend in reversed(BACKENDS.items()):  # the fastest first
        state = states[name]
        if device.type not in backend.devices:
            state = f"not for tensors on {device.type}"
        elif not backend.default:
            state = "runs in an interpreter: no speed to measure"
        elif state == "available" and name in left_out:
            state = "left out: takes too long"
        if state == "available":
            runs[f"instantas {name}"] = call if backend is default(device, torch.float32) else _forced(name, call)
        else:
            absent[f"instantas {name}"] = state
    return runs, absent


def _forced(name, call):
    def run(*arguments):
        with ops.use_backend(name):
            return call(*arguments)

    return run


def _newest(sample, history):
    return (sample,) if history is None else (sample, history[0])


def _normal(shape, generator, device, dtype):
    return torch.randn(shape, generator=generator, device=generator.device).to(device, dtype)


def _wide(tensor):
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _cells(plan):
    return plan.count * plan.window[0] * plan.window[1]


def _geometry(plan, batch, channels):
    size = f"{batch} x {channels} x {plan.height} x {plan.width}"
    wrapping = ", wrapping" if any(plan.wrap) else ""
    return f"{size}, {plan.count} windows of {plan.window[0]} x {plan.window[1]}{wrapping}"

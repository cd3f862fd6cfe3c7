"""The test grid of the operations, and the judge: a backend's error against float64 is at most twice the reference's.

The error is the root mean square over a result, and the largest as well. In float32 attention both depend on the order
in which the processor's matrix products sum, the reference's too: there the largest may be three times the reference's,
being that of one query with an unlucky logit, and errors within the bounds of `bounds.py` are right besides. Over many
seeds together luck evens out, and half of the bound must do (`judge_pooled`).

Inputs are rounded to the precision under test first; float64 then gets the rounded values. Shared by every test of an
operation, whatever the backend. Without a GPU the Triton kernels run in Triton's interpreter and the CUDA kernels in
the emulation (`emulated.py`), where there is a compiler for it.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from instantas import ops
from instantas.ops.backend import Backend
from instantas.testing import bounds, emulated, interpreted
from instantas.windows import WindowPlan

ROOT = Path(__file__).parents[2]
GPU = torch.cuda.is_available()
EMULATED = not GPU and emulated.AVAILABLE
BACKENDS = [name for name, state in ops.backends().items() if state == "available" or (name == "cuda" and EMULATED)]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

PLANS = {
    "one window": WindowPlan.minimum_coverage(16, 24, 64),
    "exact": WindowPlan.minimum_coverage(16, 48, 16),
    "ragged": WindowPlan.minimum_coverage(23, 37, (10, 16)),
    "wrapped": WindowPlan.minimum_coverage(20, 33, (16, 12), wrap=(True, True), shift=(7, -5)),
    "full circle": WindowPlan.minimum_coverage(16, 48, 16, wrap=(False, True), shift=(0, 9)),
    "strided": WindowPlan.strided(24, 40, 16, 8),
    "strided, no multiple": WindowPlan.strided(13, 21, (8, 9), (5, 3), wrap=(False, True)),
    "one cell": WindowPlan.minimum_coverage(1, 1, 1),
    "cells": WindowPlan.minimum_coverage(3, 2, 1),
    "wide": WindowPlan.minimum_coverage(9, 150, (9, 130)),
}

# B, N, heads, D, P, L, R: the head sizes and prompt lengths of real models, and the smallest and largest of everything
ATTENTION = [
    (2, 37, 2, 64, 3, 77, 3),
    (1, 70, 1, 40, 2, 77, 2),
    (1, 5, 1, 160, 2, 77, 2),
    (1, 9, 1, 80, 2, 154, 2),
    (1, 6, 1, 96, 2, 231, 2),
    (1, 3, 1, 32, 2, 512, 1),
    (1, 4, 1, 128, 1, 16, 4),
    (1, 2, 1, 256, 1, 20, 1),
    (1, 20, 2, 15, 5, 9, 64),
    (3, 1, 3, 1, 2, 1, 2),
]


def device(backend: str | Backend) -> str:
    """Where a backend's tensors live."""
    return "cuda" if backend in ("triton", "cuda") and GPU else "cpu"


def use_backend(backend: str | Backend) -> AbstractContextManager[None]:
    """`ops.use_backend`, or the emulation."""
    return emulated.cuda() if backend == "cuda" and EMULATED else ops.use_backend(backend)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64) * scale


def positive(*shape: int, seed: int = 0) -> torch.Tensor:
    """Weights from 0.05 to 1.05, float32."""
    return torch.rand(*shape, generator=generator(seed)) + 0.05


def region_weights(b: int, r: int, n: int, seed: int = 0, hard: bool = False) -> torch.Tensor:
    """(B, R, N) weights, some of them zero, and some queries without any."""
    weights = torch.rand(b, r, n, generator=generator(seed))
    if hard:
        return torch.zeros(b, r, n).scatter_(1, weights.argmax(1, keepdim=True), 1.0)
    weights[torch.rand(b, r, n, generator=generator(seed + 1)) < 0.4] = 0
    weights[..., n // 2] = 0 if n > 2 else 1
    return weights


def attention_inputs(
    b: int, n: int, heads: int, d: int, p: int, length: int, r: int, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """query, key, value, and prompt ids with every prompt, repetitions and unused slots."""
    ids = torch.randint(-1, p, (b, r), generator=generator(seed), dtype=torch.int32)
    ids[:, 0] = seed % p
    query, key, value = (
        normal(*s, seed=seed + i) for i, s in enumerate([(b, n, heads, d), *[(p, length, heads, d)] * 2])
    )
    return query, key, value, ids


def attention_examples(case: tuple[int, ...], mode: str, seeds: Iterable[int]) -> Iterator[tuple[partial, list]]:
    """(call, arguments) of a case of `ATTENTION` for each seed; seeds ten apart share no numbers."""
    for seed in seeds:
        b, n, heads, d, p, length, r = case
        weights = region_weights(b, r, n, seed=seed)
        yield (
            partial(ops.regional_attention, mode=mode),
            [*attention_inputs(b, n, heads, d, p, length, r, seed), weights],
        )


def place(value: Any, dtype: torch.dtype, where: str) -> Any:
    """float64 tensors are the data: they take the dtype; all others keep theirs."""
    if not isinstance(value, torch.Tensor):
        return value
    return value.to(where, dtype if value.dtype == torch.float64 else value.dtype, copy=True)


def run(
    backend: str | Backend, call: Callable, arguments: Sequence[Any], dtype: torch.dtype, gradients: int = 0
) -> list[torch.Tensor]:
    """call(*arguments) on a backend, as a list of CPU tensors: the results, then the gradients of the first inputs."""
    arguments = [place(value, dtype, device(backend)) for value in arguments]
    sources = [a.requires_grad_() for a in arguments[:gradients] if isinstance(a, torch.Tensor)]
    with use_backend(backend), interpreted.multiplying(dtype if backend == "triton" else torch.float32):
        results = call(*arguments)
        results = [r for r in (results if isinstance(results, tuple) else (results,)) if r is not None]
        assert all(r.is_contiguous() for r in results)
        if sources:
            results += torch.autograd.grad(results, sources, [gradient(r, dtype) for r in results])
    return [r.detach().cpu() for r in results]


def gradient(result: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What `run` takes as the gradient of a result."""
    return normal(*result.shape, seed=9).to(result.device, torch.float32).to(dtype)


def largest(difference: torch.Tensor) -> float:
    return difference.abs().max().item()


def root_mean_square(difference: torch.Tensor) -> float:
    return difference.square().mean().sqrt().item()


class Result(NamedTuple):
    """One result of a call: the backend's and the eager reference's, the exact one, and its bound (or None)."""

    got: torch.Tensor
    eager: torch.Tensor
    exact: torch.Tensor
    bound: torch.Tensor | None


def results(
    backend: str | Backend,
    call: Any,
    arguments: Sequence[Any],
    dtype: torch.dtype,
    gradients: int = 0,
    attention: bool = False,
) -> list[Result]:
    """What `run` gives on a backend beside what it should give, for inputs rounded to the dtype first."""
    rounded = [
        a.to(dtype).double() if isinstance(a, torch.Tensor) and a.dtype == torch.float64 else a for a in arguments
    ]
    exact = run("reference", call, rounded, torch.float64, gradients)
    eager = run("reference", call, rounded, dtype, gradients)
    got = run(backend, call, rounded, dtype, gradients)
    bound: list[Any] = [None] * len(exact)
    if attention and dtype == torch.float32:
        grad = gradient(exact[0], dtype).double() if gradients else None
        query, key, value, ids, weights = rounded
        bound = bounds.attention(query, key, value, ids, weights, grad, **call.keywords)
    assert len(got) == len(exact) == len(bound)
    assert all(g.shape == x.shape and g.dtype == dtype for g, x in zip(got, exact))
    return list(map(Result, got, eager, exact, bound))


def judge(
    backend: str | Backend,
    call: Callable,
    arguments: Sequence[Any],
    dtype: torch.dtype,
    gradients: int = 0,
    attention: bool = False,
) -> list[torch.Tensor]:
    """Holds a backend to the error budget; returns its results.

    attention: the call is `functools.partial(ops.regional_attention, ...)` of exactly these arguments, whose first
    three, or none, are differentiated.
    """
    found = results(backend, call, arguments, dtype, gradients, attention)
    for i, result in enumerate(found):
        what = f"result {i} of {_name(backend)}, {dtype}"
        _hold(what, result, root_mean_square, 2, bounds.U)
        _hold(what, result, largest, 3 if attention and dtype == torch.float32 else 2, bounds.U)
    return [result.got for result in found]


def judge_pooled(backend: str | Backend, case: tuple[int, ...], mode: str, seeds: int = 16) -> None:
    """Holds the root mean square of a float32 attention case over many seeds to the budget, forward and backward."""
    examples = attention_examples(case, mode, range(0, 10 * seeds, 10))
    found = [results(backend, *example, torch.float32, 3, attention=True) for example in examples]
    for i, each in enumerate(zip(*found)):
        pooled = Result(*(torch.cat([t.flatten() for t in tensors]) for tensors in zip(*each)))
        what = f"result {i} of {_name(backend)}, {case}, {mode}, pooled"
        _hold(what, pooled, root_mean_square, 2, bounds.U / 2)


def _name(backend):
    return backend if isinstance(backend, str) else backend.name


def _hold(what, result, measure, factor, unit):
    error, usual = (deviation(t, result.exact, measure) for t in (result.got, result.eager))
    if usual == 0 and result.exact.numel():  # exact by chance: one unit in the last place of the largest instead
        usual = torch.finfo(result.got.dtype).eps * result.exact.abs().max().item()
    least = unit * measure(result.bound) if result.bound is not None and result.bound.numel() else 0.0
    told = f"{measure.__name__} error {error:.3e} beside {usual:.3e}, bound {least:.3e}"
    assert error <= max(factor * usual, least), f"{what}: {told}"


def deviation(result: torch.Tensor, exact: torch.Tensor, measure: Callable[[torch.Tensor], float] = largest) -> float:
    """How far the two are apart where the exact result is finite; elsewhere they must agree."""
    finite = exact.to(result.dtype).isfinite()
    torch.testing.assert_close(result[~finite], exact[~finite].to(result.dtype), rtol=0, atol=0, equal_nan=True)
    return measure((result.double() - exact)[finite]) if finite.any() else 0.0

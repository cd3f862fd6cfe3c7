"""The test grid of the operations, and the judge: a backend's error against float64 is at most twice the reference's.

The error is the root mean square over a result, and the largest as well. In float32 attention the largest may be three
times the reference's: it is that of one query with an unlucky logit, and changes with the order in which the
processor's matrix products sum.

Inputs are rounded to the precision under test first; float64 then gets the rounded values. Shared by every test of an
operation, whatever the backend. Without a GPU the Triton kernels run in Triton's interpreter and the CUDA kernels in
the emulation (`emulated.py`), where there is a compiler for it.
"""

from pathlib import Path

import torch

from instantas import ops
from instantas.testing import emulated
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


def device(backend):
    """Where a backend's tensors live."""
    return "cuda" if backend in ("triton", "cuda") and GPU else "cpu"


def use_backend(backend):
    """`ops.use_backend`, or the emulation."""
    return emulated.cuda() if backend == "cuda" and EMULATED else ops.use_backend(backend)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0, scale=1.0):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64) * scale


def positive(*shape, seed=0):
    """Weights from 0.05 to 1.05, float32."""
    return torch.rand(*shape, generator=generator(seed)) + 0.05


def region_weights(b, r, n, seed=0, hard=False):
    """(B, R, N) weights, some of them zero, and some queries without any."""
    weights = torch.rand(b, r, n, generator=generator(seed))
    if hard:
        return torch.zeros(b, r, n).scatter_(1, weights.argmax(1, keepdim=True), 1.0)
    weights[torch.rand(b, r, n, generator=generator(seed + 1)) < 0.4] = 0
    weights[..., n // 2] = 0 if n > 2 else 1
    return weights


def attention_inputs(b, n, heads, d, p, length, r, seed=0):
    """query, key, value, and prompt ids with every prompt, repetitions and unused slots."""
    ids = torch.randint(-1, p, (b, r), generator=generator(seed), dtype=torch.int32)
    ids[:, 0] = seed % p
    query, key, value = (
        normal(*s, seed=seed + i) for i, s in enumerate([(b, n, heads, d), *[(p, length, heads, d)] * 2])
    )
    return query, key, value, ids


def place(value, dtype, where):
    """float64 tensors are the data: they take the dtype; all others keep theirs."""
    if not isinstance(value, torch.Tensor):
        return value
    return value.to(where, dtype if value.dtype == torch.float64 else value.dtype, copy=True)


def run(backend, call, arguments, dtype, gradients=0):
    """call(*arguments) on a backend, as a list of CPU tensors: the results, then the gradients of the first inputs."""
    arguments = [place(value, dtype, device(backend)) for value in arguments]
    sources = [a.requires_grad_() for a in arguments[:gradients] if isinstance(a, torch.Tensor)]
    with use_backend(backend):
        results = call(*arguments)
        results = [r for r in (results if isinstance(results, tuple) else (results,)) if r is not None]
        assert all(r.is_contiguous() for r in results)
        if sources:
            weights = [normal(*r.shape, seed=9).to(r.device, torch.float32).to(dtype) for r in results]
            results += torch.autograd.grad(results, sources, weights)
    return [r.detach().cpu() for r in results]


def largest(difference):
    return difference.abs().max().item()


def root_mean_square(difference):
    return difference.square().mean().sqrt().item()


def judge(backend, call, arguments, dtype, gradients=0, attention=False):
    """Holds a backend to the error budget; returns its results."""
    rounded = [
        a.to(dtype).double() if isinstance(a, torch.Tensor) and a.dtype == torch.float64 else a for a in arguments
    ]
    exact = run("reference", call, rounded, torch.float64, gradients)
    eager = run("reference", call, rounded, dtype, gradients)
    got = run(backend, call, rounded, dtype, gradients)
    assert len(got) == len(exact)
    for i, (g, e, x) in enumerate(zip(got, eager, exact)):
        assert g.shape == x.shape and g.dtype == dtype
        # where the reference happens to be exact: one unit in the last place of the largest
        unit = torch.finfo(dtype).eps * x.abs().max().item() if x.numel() else 0.0
        for measure, factor in (root_mean_square, 2), (largest, 3 if attention and dtype == torch.float32 else 2):
            error, usual = deviation(g, x, measure), deviation(e, x, measure) or unit
            told = f"{measure.__name__} error {error:.3e} beside {usual:.3e}"
            assert error <= factor * usual, f"result {i} of {backend}, {dtype}: {told}"
    return got


def deviation(result, exact, measure=largest):
    """How far the two are apart where the exact result is finite; elsewhere they must agree."""
    finite = exact.to(result.dtype).isfinite()
    torch.testing.assert_close(result[~finite], exact[~finite].to(result.dtype), rtol=0, atol=0, equal_nan=True)
    return measure((result.double() - exact)[finite]) if finite.any() else 0.0

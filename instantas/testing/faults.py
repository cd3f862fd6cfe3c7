"""Faults of attention kernels, planted in a stand-in backend, so that the judge itself can be judged.

    oracle.judge(faults.planted("a token dropped", "regional_attention"), ...)  # must fail

The stand-in is the eager reference, wrong in one of its two operations. Each fault is one that a kernel can have.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Mapping
from typing import NamedTuple
from unittest import mock

import torch
from torch.nn.functional import pad

from instantas.ops import reference
from instantas.ops.backend import BACKENDS, Backend

OPERATIONS = "regional_attention", "regional_attention_backward"


def _same(*arguments):
    return arguments


class Fault(NamedTuple):
    """What a wrong operation takes in place of (query, key, value, ids, weights, scale), and gives back for it."""

    instead: Callable = _same
    gradients: Callable = _same  # of query, key and value, from those of what was taken in their place


def _last_token_missing(query, key, value, ids, weights, scale):
    return query, key[:, :-1], value[:, :-1], ids, weights, scale


def _last_token_zero(*gradients):
    query, *bank = gradients
    return query, *(pad(rows, (0, 0, 0, 0, 0, 1)) for rows in bank)


def _unscaled(*arguments):
    return *arguments[:-1], 1.0


def _weights_of_the_region_before(query, key, value, ids, weights, scale):
    return query, key, value, ids, weights.roll(1, dims=1), scale


def _row_before(query, *rest):
    return query.roll(1, dims=1), *rest


def _row_after(query, *rest):
    return query.roll(-1, dims=1), *rest


HALF = "half-precision accumulation"
FAULTS = {
    "a token dropped": Fault(_last_token_missing, _last_token_zero),
    HALF: Fault(),  # its sums are wrong, see `_sums`
    "a missing scale": Fault(_unscaled),
    "a neighbour's region": Fault(_weights_of_the_region_before),
    "a row shifted": Fault(_row_before, _row_after),
}


def shows(
    fault: str,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
) -> bool:
    """Whether an example has what the fault gets wrong: one token alone has all the probability, for instance."""
    shares = _shares(key, ids, weights)
    if not shares.any():
        return False
    if fault == "a neighbour's region":
        return not torch.allclose(_shares(key, ids, weights.roll(1, dims=1)), shares)
    needed = {"a missing scale": query.shape[-1], "a row shifted": query.shape[1]}.get(fault, 2)
    return key.shape[1] > 1 and needed > 1


def _shares(key, ids, weights):
    """(B, P, N): the share that each prompt of the bank has of each query."""
    chosen = ids[..., None] == torch.arange(len(key))
    total = torch.einsum("brp,brn->bpn", chosen.double(), weights.double())
    return total / total.sum(1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)


def planted(fault: str | None, operation: str = OPERATIONS[0]) -> Backend:
    """A stand-in backend: the reference, with a fault in one of `OPERATIONS`; None: without any."""
    functions = {name: of(fault if name == operation else None) for name, of in _OPERATIONS.items()}
    return stand_in(f"{operation} with {fault or 'no fault'}", functions)


def stand_in(name: str, functions: Mapping[str, Callable]) -> Backend:
    """The reference, with other functions for some operations."""
    right = BACKENDS["reference"]
    return dataclasses.replace(right, name=name, functions=lambda: {**right.functions(), **functions})


def _forward(fault):
    instead, _ = FAULTS.get(fault, Fault())

    def run(query, key, value, ids, weights, joint, scale):
        *tensors, scale = instead(query, key, value, ids, weights, scale)
        with _sums(fault, query.dtype):
            return reference.regional_attention(*tensors, mode=_mode(joint), scale=scale).contiguous()

    return run


def _backward(fault):
    instead, gradients = FAULTS.get(fault, Fault())

    def run(grad, query, key, value, ids, weights, joint, scale):
        *tensors, scale = instead(query, key, value, ids, weights, scale)
        with _sums(fault, query.dtype):
            found = reference.regional_attention_backward(grad, *tensors, mode=_mode(joint), scale=scale)
        return tuple(gradient.contiguous() for gradient in gradients(*found))

    return run


_OPERATIONS = dict(zip(OPERATIONS, (_forward, _backward)))


def _mode(joint):
    return "joint" if joint else "blend"


def _sums(fault, dtype):
    """Every sum of products in half precision, one term after the other: in bfloat16 for bfloat16, else in float16."""
    half = torch.bfloat16 if dtype == torch.bfloat16 else torch.float16

    def einsum(equation, x, y):
        (of_x, of_y), result = equation.split("->")[0].split(","), equation.split("->")[1]
        size = dict(zip(of_x + of_y, x.shape + y.shape))
        summed = [axis for axis in size if axis not in result]
        total = torch.zeros([size[axis] for axis in result], dtype=x.dtype)
        for numbers in itertools.product(*(range(size[axis]) for axis in summed)):
            at = dict(zip(summed, numbers))
            terms = (t[tuple(at.get(axis, slice(None)) for axis in axes)] for t, axes in ((x, of_x), (y, of_y)))
            left = ["".join(axis for axis in axes if axis not in at) for axes in (of_x, of_y)]
            total = (total + right(f"{left[0]},{left[1]}->{result}", *terms)).to(half).to(x.dtype)
        return total

    right = torch.einsum
    return mock.patch.object(torch, "einsum", einsum) if fault == HALF else contextlib.nullcontext()

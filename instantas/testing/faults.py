"""Faults of attention kernels, planted in a stand-in backend, so that the judge itself can be judged.

    oracle.judge(faults.planted("a token dropped", "regional_attention"), ...)  # must fail

The stand-in is the eager reference, wrong in one of its two operations. Each fault is one that a kernel can have.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable
from unittest import mock

import torch

from instantas.ops import reference, registration

OPERATIONS = "regional_attention", "regional_attention_backward"


def _right(*arguments):
    return arguments


def _token_dropped(query, key, value, ids, weights, scale):
    """The last one, as by a loop over tokens that ends too early."""
    return query, key[:, :-1], value[:, :-1], ids, weights, scale


def _scale_missing(query, key, value, ids, weights, scale):
    return query, key, value, ids, weights, 1.0


def _neighbours_region(query, key, value, ids, weights, scale):
    """Each region takes the weights of the one before it."""
    return query, key, value, ids, weights.roll(1, dims=1), scale


def _row_shifted(query, key, value, ids, weights, scale):
    """Each query is read one row off."""
    return query.roll(1, dims=1), key, value, ids, weights, scale


HALF = "half-precision accumulation"
FAULTS = {
    "a token dropped": _token_dropped,
    HALF: _right,  # its sums are wrong, see `planted`
    "a missing scale": _scale_missing,
    "a neighbour's region": _neighbours_region,
    "a row shifted": _row_shifted,
}


def shows(fault: str, case: tuple[int, ...]) -> bool:
    """Whether a case of `oracle.ATTENTION` has what the fault gets wrong: one token alone has all the probability."""
    _, queries, _, size, prompts, tokens, regions = case
    if fault == "a neighbour's region":
        return queries > 1 and prompts > 1 and regions > 1
    return tokens > 1 and {"a missing scale": size > 1, "a row shifted": queries > 1}.get(fault, True)


def planted(fault: str | None, operation: str = OPERATIONS[0]) -> Callable:
    """What `oracle.run` takes for a backend: the reference, with a fault in one of `OPERATIONS`; None: without any."""

    def choose(name, tensor):
        return _OPERATIONS[name](fault if name == operation else None)

    @contextlib.contextmanager
    def stand_in():
        with mock.patch.object(registration, "implementation", choose):
            yield

    stand_in.__name__ = f"{operation} with {fault or 'no fault'}"
    return stand_in


def _forward(fault):
    tamper = FAULTS.get(fault, _right)

    def run(query, key, value, ids, weights, joint, scale):
        *tensors, scale = tamper(query, key, value, ids, weights, scale)
        with _sums(fault, query.dtype):
            return reference.regional_attention(*tensors, mode=_mode(joint), scale=scale).contiguous()

    return run


def _backward(fault):
    tamper = FAULTS.get(fault, _right)

    def run(grad, query, key, value, ids, weights, joint, scale):
        sources = [t.detach().requires_grad_() for t in (query, key, value)]
        with torch.enable_grad():
            *tensors, scale = tamper(*sources, ids, weights, scale)
        with _sums(fault, query.dtype), torch.no_grad():
            grads = reference.regional_attention_backward(grad, *tensors, mode=_mode(joint), scale=scale)
        return tuple(g.contiguous() for g in torch.autograd.grad(tensors[:3], sources, grads))

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

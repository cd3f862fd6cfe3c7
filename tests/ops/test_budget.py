"""The error budget of attention: its bounds, that it holds over many seeds, and that it refuses every planted fault."""

from functools import partial

import numpy as np
import pytest
import torch

from bench import budget
from instantas import ops
from instantas.ops import reference
from instantas.testing import bounds, faults, interpreted, oracle

FEW = (1, 2, 1, 256, 1, 20, 1)  # two queries: their error beside the reference's is luck
IDS, WEIGHTS = torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, 1, 1)


def rows(*numbers):
    """(1, n, 1, D) float64."""
    return torch.tensor(numbers, dtype=torch.float64)[None, :, None]


def test_bounds_of_one_token():
    """A = 3 and rho = 3 + 3 + 4 + 1; the probability is 1 whatever the logit, so what comes back is all rounding."""
    found = bounds.attention(rows([2, -4]), rows([1, 1]), rows([3, -4]), IDS, WEIGHTS, rows([2, -1]), scale=0.5)
    assert [bound.flatten().tolist() for bound in found] == [[33, 44], [10, 10], [20, 40], [22, 11]]


@pytest.mark.parametrize("mode", ["blend", "joint"])
def test_bounds_of_two_tokens_alike(mode):
    """Keys of 0: p = 1/2, A = 0, rho = 4 + sqrt(2); dP = (1, 3), of which B + mean B = (3, 5) and t = 1."""
    rho = 4 + 2**0.5
    found = bounds.attention(rows([1]), rows([0], [0]), rows([1], [3]), IDS, WEIGHTS, rows([1]), mode=mode, scale=1.0)
    expected = [2 * rho], [0.0], [1.5 + rho, 2.5 + rho], [rho / 2, rho / 2]
    for bound, numbers in zip(found, expected):
        torch.testing.assert_close(bound.flatten(), torch.tensor(numbers, dtype=torch.float64), rtol=1e-14, atol=0)


def off_by(share):
    """A stand-in backend whose results are the exact ones, off by a share of their bounds."""

    def forward(query, key, value, ids, weights, joint, scale):
        inputs = query.double(), key.double(), value.double(), ids, weights
        (bound,) = bounds.attention(*inputs, mode="joint" if joint else "blend", scale=scale)
        right = reference.regional_attention(*inputs, mode="joint" if joint else "blend", scale=scale)
        return (right + share * bounds.U * bound).to(query.dtype)

    return faults.stand_in(f"off by {share}", {"regional_attention": forward})


def refused(judge, *arguments, **options) -> bool:
    try:
        judge(*arguments, **options)
    except AssertionError as error:
        assert str(error).startswith("result 0")
        return True
    return False


@pytest.mark.parametrize("mode", ["blend", "joint"])
def test_an_error_within_the_bound_is_right_whatever_the_reference_has(mode):
    ((call, arguments),) = oracle.attention_examples(FEW, mode, [0])
    (result,) = oracle.results(off_by(0.9), call, arguments, torch.float32, attention=True)
    error, usual = (oracle.largest(x.double() - result.exact) for x in (result.got, result.eager))
    assert error > 3 * usual
    for share in (0.9, 1.5):
        wrong = share > 1
        assert refused(oracle.judge, off_by(share), call, arguments, torch.float32, attention=True) == wrong
    assert refused(oracle.judge, off_by(0.9), call, arguments, torch.float32)  # other operations have no bound


@pytest.mark.parametrize("share, wrong", [(0.4, False), (0.7, True)])
def test_over_many_seeds_half_of_the_bound_must_do(share, wrong):
    assert refused(oracle.judge_pooled, off_by(share), FEW, "blend") == wrong


@pytest.mark.parametrize("mode", ["blend", "joint"])
@pytest.mark.parametrize("case", oracle.ATTENTION, ids=str)
@pytest.mark.parametrize("backend", [name for name in oracle.BACKENDS if name != "reference"])
def test_attention_over_many_seeds(backend, case, mode):
    slow = backend in ("triton", "cuda") and not oracle.GPU  # interpreted, emulated: bench.budget has all their seeds
    oracle.judge_pooled(backend, case, mode, seeds=4 if slow else 16)


@pytest.mark.parametrize("mode", ["blend", "joint"])
@pytest.mark.parametrize("dtype", oracle.DTYPES[1:], ids=str)
@pytest.mark.parametrize("backend", [name for name in oracle.BACKENDS if name != "reference"])
def test_probabilities_are_not_rounded_to_half_precision(backend, dtype, mode):
    """Values of 500 cancel down to 10: there a probability rounded once is wrong by more than the result's rounding."""
    query, key = rows([0.125]).expand(1, 1, 1, 64), rows([0], [0.53], [1.1], [0.3]).expand(1, 4, 1, 64)
    share = key[0, :, 0].to(dtype).double().mean(1).exp()
    values = oracle.normal(4, 64, scale=500.0)
    values[3] = (10 - share[:3] @ values[:3]) / share[3]
    call = partial(ops.regional_attention, mode=mode, scale=0.125)
    (result,) = oracle.judge(backend, call, [query, key, values[None, :, None], IDS, WEIGHTS], dtype, attention=True)
    assert result.abs().mean() < 20


@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
@pytest.mark.parametrize("operation", faults.OPERATIONS)
@pytest.mark.parametrize("fault", faults.FAULTS)
def test_a_planted_fault_is_refused_wherever_it_shows(fault, operation, dtype):
    caught, count = budget.caught(fault, operation, dtype, seeds=1)
    assert caught == count >= 12


@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
def test_the_stand_in_without_a_fault_is_right(dtype):
    for _, check in budget.grid(faults.planted(None), dtype, seeds=1):
        check()


@pytest.mark.skipif("triton" not in oracle.BACKENDS or oracle.GPU, reason="the interpreter is not what runs")
@pytest.mark.parametrize("dtype, product", [(torch.bfloat16, 1 + 2**-9), (torch.float32, 1 + 2**-9 + 2**-18)], ids=str)
def test_the_interpreter_multiplies_what_a_gpu_would(dtype, product):
    from triton import language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    a, one, zero = (TensorHandle(np.array([[x]], np.float32), tl.float32) for x in (1 + 2**-9 + 2**-18, 1, 0))
    with interpreted.multiplying(dtype):
        result = InterpreterBuilder().create_dot(a, one, zero, None, 0)
    assert result.data.item() == product and a.data.item() == 1 + 2**-9 + 2**-18

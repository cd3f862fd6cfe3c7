"""The operations on NaN, infinity, large and small numbers, on every backend that runs here."""

import itertools
import math
from functools import partial

import numpy as np
import pytest
import torch

from instantas import ops
from instantas.testing.oracle import (
    PLANS,
    attention_inputs,
    judge,
    normal,
    positive,
    region_weights,
    run,
)
from instantas.windows import WindowPlan

RAGGED = PLANS["ragged"]


def test_nan_in_a_window_reaches_only_the_cells_it_covers(backend, plan):
    windows = normal(1, plan.count, 2, *plan.window)
    windows[0, plan.count // 2] = math.nan
    y, x = plan.origins[plan.count // 2]
    covered = torch.zeros(plan.height, plan.width, dtype=torch.bool)
    rows, columns = (np.arange(size) + start for size, start in zip(plan.window, (y, x)))
    covered[np.ix_(rows % plan.height, columns % plan.width)] = True
    sample = normal(1, 2, plan.height, plan.width)
    step = lambda m, x: ops.guided_step(m, m, x, plan, [1, 2], 2.0)[0]  # noqa: E731
    for call, arguments in ((lambda m: ops.scatter_windows(m, plan), [windows]), (step, [windows, sample])):
        (out,) = run(backend, call, arguments, torch.float32)
        assert torch.equal(out.isnan(), covered.expand_as(out))


def test_nan_in_a_query_stays_there(backend):
    arguments = [*attention_inputs(1, 20, 2, 8, 2, 9, 2), torch.ones(1, 2, 20)]
    arguments[0][0, 3, 1] = math.nan
    for mode in ("blend", "joint"):
        (out,) = run(backend, lambda *a, m=mode: ops.regional_attention(*a, mode=m), arguments, torch.float32)
        assert out[0, 3, 1].isnan().all() and out.isnan().sum() == 8


HOST = pytest.mark.parametrize("host", ["reference", "cpp"])  # kernels skip a tile of queries, not one of them


@HOST
@pytest.mark.parametrize("mode", ["blend", "joint"])
def test_what_a_prompt_holds_is_not_seen_where_it_has_no_weight(host, mode):
    """Bit for bit, forward and backward."""
    query, key, value, _ = attention_inputs(1, 40, 2, 8, 3, 9, 3)
    ids, weights = torch.tensor([[0, 1, 2]], dtype=torch.int32), torch.zeros(1, 3, 40)
    weights[:, 0, :24], weights[:, 1, 20:] = 0.5, 2.0  # the third has none at all
    call = lambda *a: ops.regional_attention(*a, mode=mode)[:, :20].contiguous()  # noqa: E731
    plain = run(host, call, [query, key, value, ids, weights], torch.float32, gradients=3)
    for bank, prompt, number in itertools.product((1, 2), (1, 2), (math.nan, math.inf)):
        tensors = [query, key.clone(), value.clone(), ids, weights]
        tensors[bank][prompt] = number
        out, grad, *_ = run(host, call, tensors, torch.float32, gradients=3)
        assert torch.equal(out, plain[0]) and torch.equal(grad[:, :20], plain[1][:, :20])


@HOST
@pytest.mark.parametrize("mode", ["blend", "joint"])
def test_nan_in_a_query_reaches_no_prompt_without_weight_there(host, mode):
    """Nor its keys' and values' gradients."""
    query, key, value, ids = attention_inputs(1, 40, 2, 8, 2, 9, 2)
    ids, weights = torch.tensor([[0, 1]], dtype=torch.int32), torch.zeros(1, 2, 40)
    weights[:, 0, :20], weights[:, 1, 20:] = 1, 1
    query[0, 3] = math.nan
    call = partial(ops.regional_attention, mode=mode)
    _, _, *grads = run(host, call, [query, key, value, ids, weights], torch.float32, gradients=3)
    assert all(grad[0].isnan().any() and grad[1].isfinite().all() and grad[1].any() for grad in grads)


@pytest.mark.parametrize("mode", ["blend", "joint"])
def test_attention_without_any_weight_is_zero_and_so_are_its_gradients(backend, mode):
    arguments = [*attention_inputs(1, 5, 2, 8, 2, 9, 2), torch.zeros(1, 2, 5)]
    for result in run(backend, partial(ops.regional_attention, mode=mode), arguments, torch.float32, gradients=3):
        assert (result == 0).all()


@pytest.mark.parametrize("tokens", [1, 9, 77])
def test_nan_in_one_of_many_queries_stays_there(backend, tokens):
    """The host build gives as many of one prompt, in bfloat16, to an operation that may answer 0."""
    query, key, value, _ = attention_inputs(1, 600, 1, 8, 1, tokens, 1)
    query[0, 3] = math.nan
    arguments = [query, key, value, torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, 1, 600)]
    (out,) = run(backend, ops.regional_attention, arguments, torch.bfloat16)
    assert out[0, 3].isnan().all() and out.isnan().sum() == 8


@pytest.mark.parametrize("scale", [1e-6, 1e4])
def test_extreme_values_of_windows(backend, scale):
    plan, weight = PLANS["strided"], PLANS["strided"].weight("gaussian")
    windows = normal(1, plan.count, 4, *plan.window, scale=scale)
    judge(backend, lambda x, w: ops.scatter_windows(x, plan, w), [windows, weight * 1e-20], torch.float16)
    sample = normal(1, 4, plan.height, plan.width, scale=scale)
    step = lambda m, x: ops.guided_step(m, -m, x, plan, [0.1, 0.01], 30.0)[0]  # noqa: E731
    judge(backend, step, [windows, sample], torch.float32)


def test_overlap_weights_whose_reciprocal_is_infinite(backend, dtype):
    plan = PLANS["strided"]
    weight = plan.weight("gaussian") * 1e-30
    assert weight.min() > 0 and weight.min().reciprocal().isinf()
    windows, sample = normal(1, plan.count, 3, *plan.window), normal(1, 3, plan.height, plan.width)
    judge(backend, lambda m, w: ops.scatter_windows(m, plan, w), [windows, weight], dtype)
    judge(
        backend,
        lambda m, x, w: ops.guided_step(m, -m, x, plan, [1, 1], 2.0, weight=w)[0],
        [windows, sample, weight],
        dtype,
    )


def test_cells_of_one_window_are_copied(backend, plan, dtype):
    """With weights too, up to the last digit of float32, which the weights cost."""
    windows, alone = normal(1, plan.count, 3, *plan.window), torch.from_numpy(plan.coverage() == 1)
    weights = [None] if dtype == torch.float32 else [None, plan.weight("gaussian")]
    for weight in weights:
        call = lambda m, w=weight: ops.scatter_windows(m, plan, w)  # noqa: E731
        (out,), (exact,) = (
            run(b, call, [windows.to(dtype).to(d)], d) for b, d in [(backend, dtype), ("reference", torch.float64)]
        )
        assert torch.equal(out[..., alone], exact[..., alone].to(dtype))


@pytest.mark.parametrize("mode", ["blend", "joint"])
def test_attention_to_no_region_is_zero_and_so_are_its_gradients(backend, mode):
    query, key, value, ids = attention_inputs(1, 20, 2, 8, 2, 9, 1)
    arguments = [query, key, value, ids[:, :0], torch.zeros(1, 0, 20)]
    for result in run(backend, partial(ops.regional_attention, mode=mode), arguments, torch.float32, gradients=3):
        assert not result.any()


@HOST
@pytest.mark.parametrize("origins", [[[0, 0], [0, 0]], [[0, 0], [0, 1]], [[0, 1]], []], ids=str)
def test_cells_without_a_window_have_no_mean(host, origins):
    """The operator itself takes any plan, also one with as many cells as the canvas, of which it leaves some out."""
    plan = WindowPlan(4, 4, (4, 2), np.array(origins, dtype=np.int64).reshape(-1, 2), partial=True)
    windows, tables = torch.ones(1, plan.count, 1, 4, 2), plan.tables(torch.device("cpu"))
    with ops.use_backend(host):
        canvas = torch.ops.instantas.scatter_windows(windows, None, *tables, plan.geometry, True)
    covered = torch.as_tensor(plan.coverage() > 0)
    assert torch.equal(canvas[0, 0].isnan(), ~covered) and (canvas[0, 0][covered] == 1).all()


@HOST
@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize(
    "origins",
    [
        [[0, 0], [0, 3], [2, 0], [2, 3]],  # a grid
        [[1, 2], [1, 5], [3, 2], [3, 5]],  # moved around both axes
        [[0, 0], [0, 3], [2, 1], [2, 4]],  # as bricks lie
    ],
    ids=str,
)
def test_windows_that_share_no_cell(host, origins, shuffled):
    plan = WindowPlan(4, 6, (2, 3), np.array(origins[::-1] if shuffled else origins), wrap=(True, True))
    canvas = normal(2, 3, 4, 6).float()
    with ops.use_backend(host):
        assert torch.equal(ops.scatter_windows(ops.gather_windows(canvas, plan), plan), canvas)


@pytest.mark.parametrize("mode", ["blend", "joint"])
@pytest.mark.parametrize("size", [300, 3000])
@pytest.mark.parametrize("case", [(5, 8, 30, 3), (36, 40, 43, 2), (46, 40, 17, 4), (8, 64, 31, 1)], ids=str)
def test_derivatives_of_logits_of_thousands(backend, case, size, mode):
    """The one probability that is left must not be off by what logits of that size are rounded."""
    queries, depth, tokens, regions = case
    query, *bank = attention_inputs(1, queries, 2, depth, 4, tokens, regions)
    inputs = [query * size, *bank, region_weights(1, regions, queries)]
    judge(backend, partial(ops.regional_attention, mode=mode), inputs, torch.float32, 3, attention=True)


@pytest.mark.parametrize("mode", ["blend", "joint"])
def test_large_logits_and_tiny_weights(backend, mode):
    query, key, value, ids = attention_inputs(1, 90, 2, 16, 3, 20, 3)
    weights = region_weights(1, 3, 90) * torch.tensor([1.0, 1e-6, 1e-12])[:, None]
    call = partial(ops.regional_attention, mode=mode)
    judge(backend, call, [query * 30, key * 30, value, ids, weights], torch.float16, gradients=3)
    judge(backend, call, [query, key, value * 1e3, ids, weights * 1e-20], torch.float16)
    judge(backend, call, [query, key, value, ids, weights * 1e20], torch.float32, attention=True)


@pytest.mark.parametrize("mode", ["blend", "joint"])
@pytest.mark.parametrize("scale", [0.0, -0.3, 1e-50])
def test_a_scale_of_zero_or_less(backend, scale, mode):
    """What fills up the last vector of a prompt's tokens has no say, whatever it is multiplied by."""
    arguments = [*attention_inputs(2, 7, 1, 8, 2, 9, 2), region_weights(2, 2, 7)]
    call = partial(ops.regional_attention, mode=mode, scale=scale)
    judge(backend, call, arguments, torch.float32, gradients=3, attention=True)


@HOST
def test_logits_that_are_all_minus_infinity(host):
    """Jointly they give zeros, by the formula with its peak left out; each prompt's own softmax is 0 / 0."""
    arguments = [torch.ones(1, 5, 1, 2).double(), *[normal(2, 9, 1, 2) for _ in range(2)]]
    arguments[1][0] = -math.inf
    arguments += [torch.tensor([[0, 1]], dtype=torch.int32), torch.tensor([[[1.0] * 5, [0.0] * 5]])]
    for mode, right in (("joint", 0.0), ("blend", math.nan)):
        (out,) = run(host, partial(ops.regional_attention, mode=mode), arguments, torch.float32)
        torch.testing.assert_close(out, torch.full_like(out, right), rtol=0, atol=0, equal_nan=True)


@HOST
@pytest.mark.parametrize("weight, logit, factor", [(1e-36, 83.0, 1e-8), (1e-42, 96.0, 1.0)])
def test_a_tiny_weight_that_a_large_logit_outweighs(host, weight, logit, factor):
    """The two prompts count about alike; in the derivative too, which takes neither weight nor e^logit by itself."""
    query, value = torch.ones(1, 5, 1, 1).double(), normal(2, 9, 1, 1)
    key = torch.tensor([0.0, logit]).double()[:, None, None, None].expand(2, 9, 1, 1)
    weights = torch.tensor([1.0, weight])[:, None].expand(1, 2, 5)
    call = lambda *a: factor * ops.regional_attention(*a, mode="joint", scale=1.0)  # noqa: E731
    arguments = [query, key, value, torch.tensor([[0, 1]], dtype=torch.int32), weights]
    found = run(host, call, arguments, torch.float32, gradients=3)
    for got, exact in zip(found, run("reference", call, arguments, torch.float64, gradients=3)):
        torch.testing.assert_close(got.double(), exact, rtol=0, atol=1e-2 * exact.abs().max().item())


@pytest.mark.parametrize("mode", ["blend", "joint"])
def test_a_weight_too_small_to_count_beside_another(backend, mode):
    """It is 0 relative to the other, whatever its prompt has to say."""
    query, key, value, ids = attention_inputs(1, 20, 1, 8, 2, 9, 2)
    key[1], ids = key[1] * 1e3, torch.tensor([[0, 1]])
    weights = torch.tensor([4.0, 1e-45])[:, None].expand(1, 2, 20)
    call = lambda *a: ops.regional_attention(*a, mode=mode)  # noqa: E731
    out, *grads = run(backend, call, [query, key, value, ids, weights], torch.float32, gradients=3)
    assert all(t.isfinite().all() for t in (out, *grads)) and all((g[1] == 0).all() for g in grads[1:])


def test_the_gaussian_weight_keeps_its_corners_in_half_precision(backend):
    """In float16 the weight itself would be 0 in the corners, and the mean 0 / 0."""
    plan = WindowPlan.minimum_coverage(64, 64)
    (out,) = judge(
        backend,
        lambda x, w: ops.scatter_windows(x, plan, w),
        [normal(1, 1, 1, 64, 64), plan.weight("gaussian")],
        torch.float16,
    )
    assert out.isfinite().all()


def test_a_float64_weight(backend):
    weight = positive(RAGGED.count, *RAGGED.window)
    call = lambda x, w: ops.scatter_windows(x, RAGGED, w.double())  # noqa: E731
    judge(backend, call, [normal(1, RAGGED.count, 3, *RAGGED.window), weight], torch.float32)


def test_prompt_ids_outside_the_bank_are_never_read(backend):
    """The public function refuses them on the CPU; on a GPU they cannot be looked at, and count as unused."""
    query, key, value, _ = attention_inputs(1, 20, 1, 8, 3, 9, 4)
    weights = torch.ones(1, 4, 20)
    wild, tame = torch.tensor([[3, 1, -7, 2**31 - 1]]).int(), torch.tensor([[-1, 1, -1, -1]]).int()
    raw = lambda q, k, v, i, w: torch.ops.instantas.regional_attention(q, k, v, i, w, False, 0.3)  # noqa: E731
    out, plain = (run(backend, raw, [query, key, value, ids, weights], torch.float32, 3) for ids in (wild, tame))
    assert all(map(torch.equal, out, plain)) and (out[0] != 0).all()

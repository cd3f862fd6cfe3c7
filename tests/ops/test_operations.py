"""The operations on every backend that runs here, against the reference in float64."""

import math

import numpy as np
import pytest
import torch

from instantas import ops
from instantas.ops import backend as dispatch
from instantas.testing import oracle
from instantas.testing.oracle import (
    ATTENTION,
    BACKENDS,
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


def test_some_backend_besides_the_reference_is_tested():
    assert "triton" in BACKENDS or ops.backends()["triton"] == "triton is not installed"


# The grid


def test_gather(backend, plan, dtype):
    canvas = normal(1, 3, plan.height, plan.width)
    judge(backend, lambda x: ops.gather_windows(x, plan), [canvas], dtype, gradients=1)


def test_scatter(backend, plan, dtype):
    weighting = list(PLANS.values()).index(plan) % 3  # none, one for all windows, one for each
    weight = None if weighting == 0 else positive(*[plan.count] * (weighting == 2), *plan.window)
    windows = normal(1, plan.count, 5, *plan.window)
    call = lambda x, w: ops.scatter_windows(x, plan, w)  # noqa: E731
    judge(backend, call, [windows, weight], dtype, gradients=1)


@pytest.mark.parametrize("guidance", [None, 7.5, "map"])
@pytest.mark.parametrize("k", [0, 1, 3])
def test_guided_step(backend, dtype, guidance, k, request):
    names = ["ragged", "wrapped", "strided", "one cell"]
    plan = PLANS[names[(3 * k + (guidance is None)) % 4]]
    shape = 2, 3, plan.height, plan.width
    cond, uncond = (normal(2, plan.count, 3, *plan.window, seed=s) for s in (1, 2))
    history = normal(k, *shape, seed=3) if k else None
    scale = positive(plan.height, plan.width) * 5 if guidance == "map" else guidance or 1.0
    weight = positive(*plan.window) if k else None
    coefficients = [0.9, -0.4, 0.3, -0.2, 0.1][: 2 + k]

    def call(cond, sample, history, uncond, scale, weight):
        return ops.guided_step(
            cond, uncond, sample, plan, coefficients, scale, weight=weight, history=history, keep=(0.7, 0.2)
        )

    arguments = [cond, normal(*shape), history, None if guidance is None else uncond, scale, weight]
    judge(backend, call, arguments, dtype, gradients=4 if dtype == torch.float32 else 0)


def test_history_is_shifted_exactly(backend):
    plan, history = RAGGED, normal(3, 1, 2, 23, 37)
    windows = normal(1, plan.count, 2, *plan.window)

    def call(windows, sample, history):
        return ops.guided_step(windows, None, sample, plan, [1, 2, 3, 4, 5], 1.0, history=history)

    _, new = run(backend, call, [windows, normal(1, 2, 23, 37), history], torch.float16)
    assert torch.equal(new[1:], history[:-1].half())


@pytest.mark.parametrize("mode", ["blend", "joint"])
@pytest.mark.parametrize("case", ATTENTION, ids=str)
def test_attention(backend, dtype, mode, case):
    for example in oracle.attention_examples(case, mode, [0]):
        judge(backend, *example, dtype, 3, attention=True)


@pytest.mark.parametrize("mode", ["blend", "joint"])
def test_attention_with_hard_masks_skips_what_has_no_weight(backend, mode):
    """Each half of the queries belongs to one prompt: the other prompts' keys may hold anything."""
    query, key, value, _ = attention_inputs(1, 160, 1, 8, 3, 9, 2)
    weights = torch.zeros(1, 2, 160)
    weights[:, 0, :80], weights[:, 1, 80:] = 1, 1
    ids = torch.tensor([[2, 0]])
    key[1], value[1] = math.nan, math.nan  # a prompt that nobody uses
    call = lambda q, k, v, i, w: ops.regional_attention(q, k, v, i, w, mode=mode)  # noqa: E731
    (out,) = judge(backend, call, [query, key, value, ids, weights], torch.float16)
    assert out.isfinite().all()


def test_modes_agree_for_disjoint_masks(backend):
    arguments = [*attention_inputs(2, 30, 2, 16, 3, 21, 3), region_weights(2, 3, 30, hard=True)]
    arguments[3] = torch.tensor([[0, 1, 2], [2, 2, 1]])
    blend, joint = (
        run(backend, lambda *a, m=mode: ops.regional_attention(*a, mode=m), arguments, torch.float32)[0]
        for mode in ("blend", "joint")
    )
    torch.testing.assert_close(blend, joint, rtol=1e-5, atol=1e-6)


# Invariants


def test_scatter_undoes_gather(backend, plan):
    canvas = normal(1, 2, plan.height, plan.width)
    call = lambda x, w: ops.scatter_windows(ops.gather_windows(x, plan), plan, w)  # noqa: E731
    (out,) = run(backend, call, [canvas, plan.weight("gaussian")], torch.float32)
    torch.testing.assert_close(out.double(), canvas, rtol=1e-6, atol=1e-6)


def test_windows_that_share_no_cell_in_any_order(backend):
    """Rows of windows that begin anywhere on axes that wrap, shuffled: each cell is its window's, bit for bit."""
    origins = np.array([(2 + 3 * i, first + 4 * j) for i, first in enumerate((7, 1, 10, 3)) for j in range(3)])
    shuffled = origins[np.random.default_rng(0).permutation(len(origins))]
    plan, canvas = WindowPlan(12, 12, (3, 4), shuffled, wrap=(True, True)), normal(2, 3, 12, 12)
    assert (plan.coverage() == 1).all()
    (out,) = run(backend, lambda x: ops.scatter_windows(ops.gather_windows(x, plan), plan), [canvas], torch.float32)
    assert torch.equal(out, canvas.float())


def test_scatter_is_the_adjoint_of_gather(backend, plan):
    """<gather x, y> = <x, gather* y>, where gather* comes from autograd."""
    x, y = normal(1, 2, plan.height, plan.width), normal(1, plan.count, 2, *plan.window, seed=1)
    windows, _ = run(backend, lambda x: ops.gather_windows(x, plan), [x], torch.float32, gradients=1)

    def adjoint(x, y):
        (grad,) = torch.autograd.grad(ops.gather_windows(x.requires_grad_(), plan), x, y)
        return grad

    (back,) = run(backend, adjoint, [x, y], torch.float32)
    left, right = (windows.double() * y).sum(), (x * back.double()).sum()
    torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-4)


def test_one_window_without_guidance_is_the_plain_scheduler_step(backend):
    plan = WindowPlan.minimum_coverage(8, 16, 16)
    x, m = normal(1, 4, 8, 16), normal(1, 1, 4, 8, 16, seed=1)
    call = lambda m, x: ops.guided_step(m, None, x, plan, [0.5, 0.25], 3.0)[0]  # noqa: E731
    (out,) = run(backend, call, [m, x], torch.float32)
    torch.testing.assert_close(out.double(), 0.5 * x + 0.25 * m[:, 0], rtol=1e-6, atol=1e-6)


def test_attention_does_not_depend_on_the_order_of_the_slots(backend):
    query, key, value, ids = attention_inputs(1, 20, 1, 8, 4, 9, 20)
    weights, order = region_weights(1, 20, 20), torch.randperm(20, generator=oracle.generator(3))
    for mode in ("blend", "joint"):
        call = lambda *a, m=mode: ops.regional_attention(*a, mode=m)  # noqa: E731
        (a,) = run(backend, call, [query, key, value, ids, weights], torch.float32)
        (b,) = run(backend, call, [query, key, value, ids[:, order], weights[:, order]], torch.float32)
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_query_without_weight_gives_zeros(backend):
    arguments = [*attention_inputs(1, 5, 1, 8, 2, 9, 2), torch.zeros(1, 2, 5)]
    arguments[4][0, 0, 0] = 1
    for mode in ("blend", "joint"):
        call = lambda *a, m=mode: ops.regional_attention(*a, mode=m)  # noqa: E731
        out, *grads = run(backend, call, arguments, torch.float32, gradients=3)
        assert (out[:, 1:] == 0).all() and (out[:, 0] != 0).all()
        assert all(g.isfinite().all() for g in grads) and (grads[0][:, 1:] == 0).all()


# Memory: what is not written, what is not contiguous, what is empty, what is far away


@pytest.fixture
def poison():
    """Fresh memory holds NaN, so that an element which nobody writes is seen."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all() and torch.ones(1).new_empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def every_operation(plan):
    """(call, arguments, number of differentiable ones) of each operation, small."""
    shape = 2, 3, plan.height, plan.width
    canvas, windows = normal(*shape), normal(2, plan.count, 3, *plan.window)
    yield lambda x: ops.gather_windows(x, plan), [canvas], 1
    yield lambda x, w: ops.scatter_windows(x, plan, w), [windows, positive(*plan.window)], 1

    def step(cond, uncond, sample, history, scale):
        return ops.guided_step(cond, uncond, sample, plan, [0.9, -0.4, 0.3, 0.1], scale, history=history)

    uncond, history = normal(2, plan.count, 3, *plan.window, seed=1), normal(2, *shape, seed=2)
    yield step, [windows, uncond, canvas, history, positive(plan.height, plan.width)], 4
    for mode in ("blend", "joint"):
        arguments = [*attention_inputs(2, 19, 2, 24, 3, 18, 3), region_weights(2, 3, 19)]
        yield lambda q, k, v, i, w, m=mode: ops.regional_attention(q, k, v, i, w, mode=m), arguments, 3


OPERATIONS = range(5)


@pytest.mark.parametrize("index", OPERATIONS)
def test_every_element_is_written(backend, poison, index):
    call, arguments, gradients = list(every_operation(RAGGED))[index]
    assert all(r.isfinite().all() for r in judge(backend, call, arguments, torch.float16, gradients))


def strided(tensor):
    """The same values in memory whose every axis is backwards and has gaps."""
    if not isinstance(tensor, torch.Tensor):
        return tensor
    apart = tensor.new_full([2 * size + 1 for size in reversed(tensor.shape)], 7)
    view = apart[tuple(slice(1, 2 * size + 1, 2) for size in reversed(tensor.shape))].permute(
        *reversed(range(tensor.dim()))
    )
    return view.copy_(tensor)


@pytest.mark.parametrize("index", OPERATIONS)
def test_tensors_that_are_not_contiguous(backend, index):
    call, arguments, gradients = list(every_operation(RAGGED))[index]
    apart = lambda *a: call(*map(strided, a))  # noqa: E731
    got = judge(backend, apart, arguments, torch.float16, gradients)
    if backend != "reference":  # whose sums are PyTorch's, in an order of their own for each layout
        assert all(map(torch.equal, got, run(backend, call, arguments, torch.float16, gradients)))


def test_a_query_cut_from_a_joint_projection_is_read_in_place(backend):
    query, key, value, ids = attention_inputs(1, 10, 2, 16, 2, 9, 2)
    joined = torch.cat([query, query, query], dim=-1)
    weights = region_weights(1, 2, 10)
    call = lambda q, k, v, i, w: ops.regional_attention(q[..., 16:32], k, v, i, w)  # noqa: E731
    (out,) = run(backend, call, [joined, key, value, ids, weights], torch.float16)
    (plain,) = run(backend, ops.regional_attention, [query, key, value, ids, weights], torch.float16)
    assert torch.equal(out, plain)


@pytest.mark.parametrize("what", ["batch", "channels", "slots", "queries", "heads", "prompts"])
def test_empty(backend, what):
    b, c = 0 if what == "batch" else 2, 0 if what == "channels" else 3
    plan, canvas = RAGGED, normal(b, c, 23, 37)
    windows = normal(b, RAGGED.count, c, *RAGGED.window)
    if what in ("batch", "channels"):
        judge(backend, lambda x: ops.gather_windows(x, plan), [canvas], torch.float32, gradients=1)
        judge(backend, lambda x: ops.scatter_windows(x, plan), [windows], torch.float32, gradients=1)
        step = lambda m, x, h: ops.guided_step(m, m, x, plan, [1, 2, 3], 2.0, history=h)  # noqa: E731
        judge(backend, step, [windows, canvas, canvas[None]], torch.float32, gradients=3)
    n, r, heads, p = (0 if what == name else 2 for name in ("queries", "slots", "heads", "prompts"))
    ids, weights = torch.full((b, r), -1 if p == 0 else 0), torch.ones(b, r, n)
    arguments = [normal(b, n, heads, 8), normal(p, 5, heads, 8), normal(p, 5, heads, 8), ids, weights]
    out, *grads = run(backend, ops.regional_attention, arguments, torch.float32, gradients=3)
    assert [g.shape for g in grads] == [a.shape for a in arguments[:3]]
    assert out.shape == (b, n, heads, 8)
    if what != "channels":
        assert all((result == 0).all() for result in (out, *grads))


def test_only_unused_slots(backend):
    arguments = [
        normal(1, 3, 1, 8),
        normal(2, 5, 1, 8),
        normal(2, 5, 1, 8),
        torch.full((1, 2), -1),
        torch.ones(1, 2, 3),
    ]
    for result in run(backend, ops.regional_attention, arguments, torch.float32, gradients=3):
        assert (result == 0).all()


def sparse(path, count):
    """float16 zeros, as many as asked, none of which takes memory until it is written."""
    return torch.from_numpy(np.memmap(path, np.float16, "w+", shape=(count,)))


@pytest.fixture
def functions(backend):
    """Operation -> the backend's own function, which takes tables that no plan could hold."""
    if backend == "reference" or oracle.device(backend) != "cpu":
        pytest.skip("needs kernels that read host memory")
    with oracle.use_backend(backend):
        yield dispatch.BACKENDS[backend].functions()


class TestOffsetsPast2To31:
    """Inputs of more than 2^31 elements, of which only those that the kernels should find are not zero."""

    def test_gather(self, functions, tmp_path):
        side = 32768
        canvas = sparse(tmp_path / "canvas", 3 * side * side).view(3, 1, side, side)
        values = normal(3, 16, 16).half()
        canvas[:, 0, -16:, -16:] = values
        tables = torch.full((1, 2), side - 16, dtype=torch.int32), torch.zeros(2).int(), torch.zeros(1).int()
        out = functions["gather_windows"](canvas, *tables, [side, side, 16, 16, 0, 0, 8, 16])
        assert torch.equal(out[:, 0, 0], values)

    def test_scatter_and_step(self, functions, tmp_path):
        n = 2**23 + 2
        inputs = sparse(tmp_path / "windows", n * 256).view(1, n, 1, 16, 16)
        values = normal(16, 16).half()
        inputs[0, -1, 0] = values
        origins = sparse(tmp_path / "origins", 4 * n).view(torch.int32).view(n, 2)
        tables = origins, torch.tensor([0, 1, 2], dtype=torch.int32), torch.tensor([n - 1] * 2, dtype=torch.int32)
        geometry = [16, 16, 16, 16, 0, 0, 8, 16]
        assert torch.equal(functions["scatter_windows"](inputs, None, *tables, geometry, True)[0, 0], values)
        sample, pair = torch.zeros(1, 1, 16, 16).half(), torch.tensor([0.0, 1.0], dtype=torch.float64)
        history = sample.new_zeros(0, *sample.shape)
        arguments = inputs, inputs, sample, None, history, history, pair, pair, pair, 1.0, None
        new, _, _ = functions["guided_step"](*arguments, *tables, geometry)
        assert torch.equal(new[0, 0], values)

    def test_attention_to_a_large_bank(self, functions, tmp_path):
        prompts = 2**23 + 2
        bank = sparse(tmp_path / "bank", prompts * 256).view(prompts, 16, 1, 16)
        bank[-1] = normal(16, 1, 16).half()
        query, ids = normal(1, 18, 1, 16).half(), torch.tensor([[prompts - 1]], dtype=torch.int32)
        attend = functions["regional_attention"]
        out = attend(query, bank, bank, ids, torch.ones(1, 1, 18), False, 0.25)
        plain = attend(query, bank[-1:].clone(), bank[-1:].clone(), ids * 0, torch.ones(1, 1, 18), False, 0.25)
        assert torch.equal(out, plain) and (plain != 0).any()

    def test_attention_with_far_strides(self, backend, functions, tmp_path):
        memory = sparse(tmp_path / "all", 2**32 + 2**20)
        query, key, value, ids = attention_inputs(3, 18, 2, 16, 3, 5, 2)
        far = []
        for i, tensor in enumerate((query, key, value)):
            tensor = tensor.half()
            strides = (2**31 - 2**24, 2**16, 32, 1)  # the third image or prompt starts past 2^31
            view = memory[i * 2**10 :].as_strided(tensor.shape, strides)
            far.append(view.copy_(tensor))
        weights = region_weights(3, 2, 18).half()
        far_weights = memory[2**12 :].as_strided(weights.shape, (2**31 - 2**23, 2**17, 1)).copy_(weights)
        out = ops.regional_attention(*far, ids, far_weights)
        plain = ops.regional_attention(*(t.contiguous() for t in far), ids, weights)
        assert torch.equal(out, plain) and (plain != 0).any()


def test_repeated_runs_give_the_same_bits(backend):
    for call, arguments, gradients in every_operation(PLANS["wrapped"]):
        gradients = gradients if backend == "cuda" or oracle.GPU else 0  # the other backends follow one order anyway
        first, second = (run(backend, call, arguments, torch.float16, gradients) for _ in range(2))
        assert all(map(torch.equal, first, second))

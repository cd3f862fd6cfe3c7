"""The public operations as torch sees them: gradients, registration, compilation; and what they refuse."""

import math
import re

import pytest
import torch

from instantas import ops
from instantas.testing import oracle
from instantas.testing.oracle import BACKENDS, PLANS, attention_inputs, normal, positive, region_weights
from instantas.windows import WindowPlan

PLAN = WindowPlan.minimum_coverage(5, 7, (3, 4), wrap=(False, True), shift=(0, 2))
EXACT = [name for name in BACKENDS if name in ("reference", "cpp")]  # those that serve float64
SHAPE = 1, 2, PLAN.height, PLAN.width


def step(cond, uncond, sample, history, guidance):
    coefficients = [0.9, -0.4, 0.3, 0.1]
    return ops.guided_step(cond, uncond, sample, PLAN, coefficients, guidance, history=history, keep=(0.7, 0.2))


def step_inputs(dtype=torch.float64):
    windows = [normal(1, PLAN.count, 2, *PLAN.window, seed=s).to(dtype) for s in (1, 2)]
    return *windows, normal(*SHAPE).to(dtype), normal(2, *SHAPE, seed=3).to(dtype), positive(*SHAPE[2:]).to(dtype)


# Gradients


def gradients_are_right(function, *inputs):
    return torch.autograd.gradcheck(function, [x.requires_grad_() for x in inputs])


@pytest.mark.parametrize("backend", EXACT)
def test_gradcheck(backend):
    weight = positive(PLAN.count, *PLAN.window)
    cond, uncond, sample, history, guidance = step_inputs()
    with oracle.use_backend(backend):
        assert gradients_are_right(lambda x: ops.gather_windows(x, PLAN), normal(*SHAPE))
        assert gradients_are_right(lambda x: ops.scatter_windows(x, PLAN, weight), cond)
        assert gradients_are_right(lambda *x: step(*x, guidance), cond, uncond, sample, history)
        assert gradients_are_right(lambda x, m: ops.guided_step(m, None, x, PLAN, [2, 3], 1.0)[0], sample, cond)
        for mode in ("blend", "joint"):
            query, key, value, ids = attention_inputs(2, 5, 2, 3, 3, 4, 3)
            weights = region_weights(2, 3, 5)
            attention = lambda q, k, v, m=mode: ops.regional_attention(q, k, v, ids, weights, mode=m)  # noqa: E731, B023
            assert gradients_are_right(attention, query, key, value)


# Registration and compilation


def raw_calls(dtype=torch.float32):
    """Operation name -> the arguments of torch.ops.instantas.<name>."""
    tables, geometry = PLAN.tables(torch.device("cpu")), PLAN.geometry
    cond, uncond, sample, history, guidance = step_inputs(dtype)
    numbers = torch.tensor([0.9, 0.3, 0.1, 0.2], dtype=torch.float64)
    query, key, value, ids = (
        t.to(dtype) if t.is_floating_point() else t for t in attention_inputs(1, 5, 1, 4, 2, 3, 2)
    )
    need = [t.requires_grad_() for t in (cond, uncond, sample, history, query, key, value)]
    attention = query, key, value, ids, region_weights(1, 2, 5)
    state = history, history.detach().clone(), numbers, numbers[:2]
    return {
        "gather_windows": (need[2], *tables, geometry),
        "scatter_windows": (cond, positive(*PLAN.window), *tables, geometry, True),
        "guided_step": (cond, uncond, sample, None, *state, numbers[:2], 2.0, guidance, *tables, geometry),
        "regional_attention": (*attention, False, 0.5),
        "regional_attention_backward": (query.detach(), *(t.detach() for t in attention), True, 0.5),
    }


@pytest.mark.parametrize("backend", [name for name in BACKENDS if oracle.device(name) == "cpu"])
@pytest.mark.parametrize("operation", raw_calls())
def test_opcheck(backend, operation):
    with oracle.use_backend(backend):
        torch.library.opcheck(getattr(torch.ops.instantas, operation).default, raw_calls()[operation])


def everything(canvas, weight, query, key, value, ids, weights):
    """All four operations in one graph."""
    windows = ops.gather_windows(canvas, PLAN)
    merged = ops.scatter_windows(windows * 2, PLAN, weight)
    new, history = ops.guided_step(windows, -windows, merged, PLAN, [1.0, 2.0, 3.0], 7.5, history=canvas[None])
    blend = ops.regional_attention(query, key, value, ids, weights)
    return new, history, blend, ops.regional_attention(query, key, value, ids, weights, mode="joint")


def graph_inputs(b, n):
    query, key, value, ids = attention_inputs(b, n, 2, 8, 3, 5, 2)
    canvas = normal(b, 2, PLAN.height, PLAN.width)
    tensors = canvas, positive(*PLAN.window), query, key, value, ids, region_weights(b, 2, n)
    return [t.float() if t.dtype == torch.float64 else t for t in tensors]


def test_backward_is_computed_where_autograd_is_switched_off():
    """As it is while compiled code runs: a backward pass must not itself rely on autograd."""
    arguments = [a.detach() if isinstance(a, torch.Tensor) else a for a in raw_calls()["regional_attention_backward"]]
    for backend in BACKENDS:
        if oracle.device(backend) == "cpu":
            with oracle.use_backend(backend):
                plain = torch.ops.instantas.regional_attention_backward(*arguments)
                with torch._C._AutoDispatchBelowAutograd():
                    below = torch.ops.instantas.regional_attention_backward(*arguments)
            assert all(map(torch.equal, plain, below)) and all((g != 0).any() for g in plain)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_without_graph_breaks(dynamic):
    compiled = torch.compile(everything, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for b, n in ((2, 6), (3, 10)):
        inputs = graph_inputs(b, n)
        for index in (0, 2, 3, 4):
            inputs[index].requires_grad_()
        got, plain = compiled(*inputs), everything(*inputs)
        torch.testing.assert_close(got, plain)
        sources = [inputs[i] for i in (0, 2, 3, 4)]
        grads = [torch.autograd.grad([r.sum() for r in results], sources) for results in (got, plain)]
        torch.testing.assert_close(*grads)


def test_dynamic_shapes_are_compiled_once():
    compiled = torch.compile(everything, fullgraph=True, dynamic=True, backend="aot_eager")
    torch._dynamo.reset()
    with torch.compiler.set_stance("default"):
        compiled(*graph_inputs(10, 6))  # sizes that differ from all others: equal ones are taken for one
    with torch.compiler.set_stance("fail_on_recompile"):
        compiled(*graph_inputs(11, 13))


# What is refused


CANVAS, WINDOWS = torch.zeros(SHAPE), torch.zeros(1, PLAN.count, 2, *PLAN.window)
QUERY, BANK = torch.zeros(1, 4, 2, 8), torch.zeros(3, 5, 2, 8)
IDS, WEIGHTS = torch.zeros(1, 2, dtype=torch.int32), torch.ones(1, 2, 4)


def attend(query=QUERY, key=BANK, value=BANK, ids=IDS, weights=WEIGHTS, **options):
    return ops.regional_attention(query, key, value, ids, weights, **options)


def take_step(cond=WINDOWS, uncond=WINDOWS, sample=CANVAS, coefficients=(1, 2), guidance=2.0, **options):
    return ops.guided_step(cond, uncond, sample, PLAN, coefficients, guidance, **options)


def scatter(weight):
    return ops.scatter_windows(WINDOWS, PLAN, weight)


ONES = torch.ones(PLAN.window)
REFUSED = {
    "plan: expected a WindowPlan, got str": lambda: ops.gather_windows(CANVAS, "plan"),
    "canvas: expected a tensor": lambda: ops.gather_windows([1], PLAN),
    "canvas: expected (B, C, height, width) = (any, any, 5, 7), got (5, 7)": lambda: ops.gather_windows(
        CANVAS[0, 0], PLAN
    ),
    "canvas: expected torch.float32": lambda: ops.gather_windows(CANVAS.int(), PLAN),
    "windows: expected (B, n, C, h, w)": lambda: ops.scatter_windows(WINDOWS[:, 1:], PLAN),
    "weight: expected (h, w) or (n, h, w)": lambda: scatter(ONES[1:]),
    "weight: expected torch.float32 or torch.float64, got torch.float16": lambda: scatter(ONES.half()),
    "weight: expected values >= 0": lambda: scatter(-ONES),
    "weight: expected values >= 0, finite in torch.float32": lambda: scatter(ONES.double() * 1e300),
    "weight: expected values >= 0, finite": lambda: scatter(ONES * math.nan),
    "weight: expected some weight over every cell of the canvas, got none at (0, 0)": lambda: scatter(ONES * 0),
    "weight: expected some weight": lambda: scatter(ONES.double() * 1e-300),
    "weight: expected a constant": lambda: scatter(ONES.clone().requires_grad_()),
    "cond: expected (B, n, C, h, w)": lambda: take_step(cond=WINDOWS[:, :, :1]),
    "uncond: expected torch.float32, got torch.float16": lambda: take_step(uncond=WINDOWS.half()),
    "coefficients: expected at least 2": lambda: take_step(coefficients=[1]),
    "coefficients: expected a finite number, got nan": lambda: take_step(coefficients=[1, math.nan]),
    "coefficients: expected a number, got 'a'": lambda: take_step(coefficients=["a", 2]),
    "coefficients: expected a number, got '1'": lambda: take_step(coefficients="12"),
    "coefficients: expected real numbers, got torch.complex64": lambda: take_step(
        coefficients=torch.ones(2, dtype=torch.complex64)
    ),
    "coefficients: expected numbers or a tensor of them, got 3": lambda: take_step(coefficients=3),
    "coefficients: expected a vector": lambda: take_step(coefficients=torch.ones(2, 2)),
    "coefficients: expected a constant": lambda: take_step(coefficients=torch.ones(2, requires_grad=True)),
    "keep: expected 2 numbers": lambda: take_step(keep=(1, 2, 3)),
    "carry: expected 2 numbers (p, q), got 3": lambda: take_step(uncond=None, latest=CANVAS[None], carry=(1, 2, 3)),
    "latest: expected (branches, B, C, height, width) = (1, 1, 2, 5, 7), got (2, 1, 2, 5, 7)": lambda: take_step(
        uncond=None, latest=torch.stack([CANVAS, CANVAS])
    ),
    "plan: expected one that covers every cell": lambda: ops.scatter_windows(WINDOWS[:, :1], PLAN.subset([0])),
    "plan: expected one that covers every cell (only guided_step": lambda: ops.guided_step(
        WINDOWS[:, :1], None, CANVAS, PLAN.subset([0]), [1, 2], 1.0
    ),
    "history: expected 1 entries": lambda: take_step(coefficients=[1, 2, 3]),
    "history: expected 0 entries, one for each coefficient after the second, got (1, 1, 2, 5, 7)": lambda: take_step(
        history=CANVAS[None]
    ),
    "guidance_scale: expected a finite number, got inf": lambda: take_step(guidance=math.inf),
    "guidance_scale: expected a number, got '7.5'": lambda: take_step(guidance="7.5"),
    "guidance_scale: expected a number, got None": lambda: take_step(guidance=None),
    "guidance_scale: expected a float or (height, width)": lambda: take_step(guidance=torch.ones(2, 2)),
    "guidance_scale: expected a constant": lambda: take_step(guidance=torch.ones(5, 7, requires_grad=True)),
    "canvas: expected a dense tensor, got one of layout torch.sparse_coo": lambda: ops.gather_windows(
        CANVAS.to_sparse(), PLAN
    ),
    "query: expected (B, N, heads, D)": lambda: attend(query=QUERY[0]),
    "query: expected a head size D from 1 to 256, got 300": lambda: attend(query=torch.zeros(1, 4, 2, 300)),
    "key: expected (P, L, heads, D)": lambda: attend(key=BANK[..., :4]),
    "key: expected torch.float32, got torch.bfloat16": lambda: attend(key=BANK.bfloat16()),
    "key: expected at least one token": lambda: attend(key=BANK[:, :0], value=BANK[:, :0]),
    "value: expected (P, L, heads, D) = (3, 5, 2, 8), got (2, 5, 2, 8)": lambda: attend(value=BANK[:2]),
    "prompt_ids: expected (B, R)": lambda: attend(ids=IDS[0]),
    "prompt_ids: expected torch.int32 or torch.int64": lambda: attend(ids=IDS.float()),
    "prompt_ids: expected -1 to 2, got 0 to 3": lambda: attend(ids=torch.tensor([[0, 3]])),
    "prompt_ids: expected -1 to 2, got -2 to 0": lambda: attend(ids=torch.tensor([[0, -2]])),
    "prompt_ids: expected -1 to 2, got 0 to 4294967296": lambda: attend(ids=torch.tensor([[0, 2**32]])),
    "weights: expected (B, R, N)": lambda: attend(weights=WEIGHTS[:, :1]),
    "weights: expected torch.float32": lambda: attend(weights=WEIGHTS.bool()),
    "weights: expected a constant": lambda: attend(weights=WEIGHTS.clone().requires_grad_()),
    "mode: expected 'blend' or 'joint', got 'mean'": lambda: attend(mode="mean"),
    "scale: expected a finite number, got nan": lambda: attend(scale=math.nan),
    "scale: expected a number, got '1'": lambda: attend(scale="1"),
}


@pytest.mark.parametrize("message", REFUSED)
def test_bad_input_is_named(message):
    with pytest.raises((TypeError, ValueError), match="^" + re.escape(message)):
        REFUSED[message]()


def test_a_weight_that_was_changed_is_checked_again():
    weight = ONES.clone()
    scatter(weight)
    weight[0, 0] = -1
    with pytest.raises(ValueError, match="weight"):
        scatter(weight)


def test_backends_that_cannot_run_say_so():
    with pytest.raises(ValueError, match="backend: expected one of reference, cpp, triton, cuda, got 'jax'"):
        with ops.use_backend("jax"):
            pass
    for name, state in ops.backends().items():
        if state != "available":
            with pytest.raises(RuntimeError, match=f"backend '{name}' cannot run here"):
                with ops.use_backend(name):
                    pass


@pytest.mark.skipif("triton" not in BACKENDS, reason="triton is not installed")
def test_a_forced_backend_never_gives_way_to_another():
    with ops.use_backend("triton"):
        with pytest.raises(RuntimeError, match="got float64"):
            ops.gather_windows(CANVAS.double(), PLAN)
        scatter(ONES.double())  # a weight of another precision is no tensor of another precision


def test_every_plan_of_the_grid_covers_its_canvas():
    assert all(plan.coverage().min() >= 1 for plan in PLANS.values())


@pytest.mark.parametrize("backend", [name for name in BACKENDS if oracle.device(name) == "cpu"])
def test_autocast_changes_no_arithmetic(backend):
    arguments = [t.float() if t.is_floating_point() else t for t in attention_inputs(1, 20, 2, 8, 2, 9, 2)]
    weights = region_weights(1, 2, 20)
    for sources in ((), arguments[:3]):  # with and without autograd, which has the operator called otherwise
        for source in sources:
            source.requires_grad_()
        results = []
        for enabled in (False, True):
            with oracle.use_backend(backend), torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                result = ops.regional_attention(*arguments, weights)
                results.append([result, *(torch.autograd.grad(result.sum(), sources) if sources else ())])
        assert all(torch.equal(*pair) for pair in zip(*results))

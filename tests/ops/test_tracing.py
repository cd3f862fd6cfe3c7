"""Operations where torch is in some mode: compiled, exported, traced, in inference mode; and what is differentiated."""

import copy
import functools
import warnings

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

from instantas import ops
from instantas.testing import oracle
from instantas.testing.oracle import BACKENDS, attention_inputs, normal, region_weights
from instantas.windows import PlanTables, WindowPlan

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # torch's own, where it takes jvps

CPU = torch.device("cpu")
CANVAS, WEIGHTS = normal(1, 2, 5, 7).float(), region_weights(2, 2, 3)


def fresh_plan():
    return WindowPlan.minimum_coverage(5, 7, (3, 4), wrap=(False, True), shift=(0, 2))


def smooth(canvas, plan, guidance_scale=2.0, coefficients=(1.0, 2.0), **options):
    """A step of predictions that follow from the canvas."""
    windows = ops.gather_windows(canvas, plan)
    cond = windows - ops.gather_windows(ops.scatter_windows(windows**2, plan), plan)
    return ops.guided_step(cond, windows, canvas, plan, coefficients, guidance_scale, **options)[0]


def attend(query, key, value, scale, mode="blend"):
    ids = torch.tensor([[0, 1], [1, -1]])
    return ops.regional_attention(query, key, value, ids, WEIGHTS, mode=mode, scale=scale)


def attention_tensors(dtype=torch.float32):
    return [t.to(dtype) for t in attention_inputs(2, 3, 2, 4, 2, 3, 2)[:3]]


@functools.cache
def wanted():
    return smooth(CANVAS, fresh_plan())


def holds(plan):
    """Tables that anyone may use, and that autograd may keep."""
    assert all(type(t) is torch.Tensor and t.device == CPU and not t.is_inference() for t in plan.tables(CPU))
    canvas = CANVAS.clone().requires_grad_()
    result = smooth(canvas, plan)
    torch.testing.assert_close(result, wanted())
    result.sum().backward()
    assert canvas.grad.isfinite().all()
    return True


# Plans not used before


class Step(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.plan = fresh_plan()

    def forward(self, canvas):
        return smooth(canvas, self.plan)


def jit_traced(step):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, and warns of every comparison of sizes
        return torch.jit.trace(step, CANVAS + 1)


TRACED = {
    "compile": lambda step: torch.compile(step, fullgraph=True, backend="aot_eager"),
    "compile, dynamic": lambda step: torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager"),
    "export": lambda step: torch.export.export(step, (CANVAS + 1,), strict=True).module(),
    "export, not strict": lambda step: torch.export.export(step, (CANVAS + 1,), strict=False).module(),
    "jit": jit_traced,
    **{
        f"make_fx, {mode}": lambda step, mode=mode: make_fx(step, tracing_mode=mode)(CANVAS + 1)
        for mode in ("real", "fake", "symbolic")
    },
}


@pytest.mark.parametrize("way", TRACED)
def test_a_plan_not_used_before_is_traced(way):
    torch._dynamo.reset()
    step = Step()
    torch.testing.assert_close(TRACED[way](step)(CANVAS), wanted())
    assert holds(step.plan)


MODES = {
    "inference": lambda function: torch.inference_mode()(function)(),
    "fake": lambda function: _within(FakeTensorMode(), function),
    "grad": lambda function: torch.func.vjp(lambda x: (function(), x)[1], torch.zeros(2)),
    "vmap": lambda function: torch.vmap(lambda x: (function(), x)[1])(torch.zeros(2)),
    "functionalize": lambda function: torch.func.functionalize(lambda x: (function(), x)[1])(torch.zeros(2)),
    "inference, vmap": lambda function: torch.inference_mode()(MODES["vmap"])(function),
}


def _within(mode, function):
    with mode:
        return function()


@pytest.mark.parametrize("mode", MODES)
def test_a_plan_made_or_first_used_inside_of_a_mode_holds_outside(mode):
    used, made = fresh_plan(), []

    def inside():
        made.append(fresh_plan())
        for plan in (used, made[0]):
            smooth(torch.zeros(1, 2, 5, 7), plan)
            plan.tables(torch.device("meta"))

    MODES[mode](inside)
    assert holds(used) and holds(made[0])
    assert all(type(t) is torch.Tensor and not t.is_inference() for t in used.tables(torch.device("meta")))


def test_fake_tensors_go_through_a_plan_used_before():
    plan = fresh_plan()
    assert holds(plan)
    with FakeTensorMode():
        result = smooth(torch.zeros(3, 2, 5, 7), plan)
    assert isinstance(result, FakeTensor) and result.shape == (3, 2, 5, 7)
    assert holds(plan)


# Inference mode


@pytest.mark.parametrize("shape", [(), (4,)], ids=["shared", "each"])
def test_a_weight_in_inference_mode(shape):
    plan = fresh_plan()
    expected = ops.scatter_windows(ops.gather_windows(CANVAS, plan) ** 2, plan, torch.ones(plan.window) / 2)
    with torch.inference_mode():
        windows, weight = ops.gather_windows(CANVAS, plan) ** 2, torch.ones(*shape, *plan.window)
        for _ in range(2):
            torch.testing.assert_close(ops.scatter_windows(windows, plan, weight), expected)
        weight.zero_()  # which it does not tell
        with pytest.raises(ValueError, match="weight: expected some weight over every cell"):
            ops.scatter_windows(windows, plan, weight)
        kept = plan.weight("linear")
    assert not kept.is_inference() and holds(plan)
    canvas = CANVAS.clone().requires_grad_()
    ops.scatter_windows(ops.gather_windows(canvas, plan), plan, kept).sum().backward()
    torch.testing.assert_close(canvas.grad, torch.ones_like(canvas))


def test_compiled_in_inference_mode():
    torch._dynamo.reset()
    step = Step()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    with torch.inference_mode():
        for canvas in (CANVAS, CANVAS.clone()):
            torch.testing.assert_close(compiled(canvas), wanted())
    torch.testing.assert_close(compiled(CANVAS), wanted())
    assert holds(step.plan)


# Numbers of compiled graphs


def graphs_of(function, *calls, **options):
    """How many graphs the calls take; each gives what it does without."""
    torch._dynamo.reset()
    counted = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, backend=counted, **options)
    for call in calls:
        torch.testing.assert_close(compiled(*call), function(*call), rtol=0, atol=0)
    return counted.frame_count


@pytest.mark.parametrize("dynamic, most", [(None, 2), (True, 1)])
def test_numbers_do_not_make_a_graph_each(dynamic, most):
    """The first number is taken for a constant, unless told otherwise."""
    plan, values = fresh_plan(), (0.5, 1.5, 2.5, 7.5, 9.25)
    tensors = attention_tensors()
    history = CANVAS[None] * 2
    calls = {
        "guidance_scale": lambda number: smooth(CANVAS, plan, number),
        "coefficients": lambda number: smooth(CANVAS, plan, 2.0, (number, 2 * number)),
        "keep": lambda number: ops.guided_step(
            ops.gather_windows(CANVAS, plan), None, CANVAS, plan, [1, 2, 3], 1.0, history=history, keep=(number, 0.5)
        )[1],
        "scale": lambda number: attend(*tensors, number),
    }
    for name, call in calls.items():
        assert (name, graphs_of(call, *((value,) for value in values), dynamic=dynamic) <= most) == (name, True)


def test_a_number_on_the_device_is_not_read():
    plan = fresh_plan()
    scales = [(CANVAS, plan, torch.tensor(value)) for value in (1.5, 7.5)]
    assert graphs_of(smooth, *scales) == 1


@pytest.mark.parametrize("entries", [0, 1, 2])
def test_coefficients_of_dynamic_graphs_are_tensors(entries):
    plan = fresh_plan()

    def step(canvas, coefficients, history):
        return smooth(canvas, plan, 2.0, coefficients, history=history)

    def call(batch):
        canvas = CANVAS.expand(batch, -1, -1, -1).contiguous()
        history = torch.stack([canvas * 2, canvas * 3])[:entries] if entries else None
        return canvas, torch.arange(1.0, 3 + entries, dtype=torch.float64), history

    assert graphs_of(step, call(11), call(12), call(13), dynamic=True) == 1


# Derivatives


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name in ("reference", "cpp")])
def test_second_derivatives(backend):
    plan = WindowPlan(2, 3, 2, [[0, 0], [0, 1]])
    canvas, windows = normal(1, 1, 2, 3), normal(1, 2, 1, 2, 2, seed=1)
    weight = plan.weight("linear").double()

    def right(function, *inputs):
        return torch.autograd.gradgradcheck(function, [x.clone().requires_grad_() for x in inputs])

    def step(cond, uncond, sample):
        return ops.guided_step(cond**2, uncond**2, sample**2, plan, [2, 3, 4], 5.0, history=sample[None] ** 3)

    with oracle.use_backend(backend):
        assert right(lambda x: ops.gather_windows(x**2, plan) ** 2, canvas)
        assert right(lambda x: ops.scatter_windows(x**2, plan, weight) ** 2, windows)
        assert right(step, windows, windows + 1, canvas)
        for mode in ("blend", "joint"):
            assert right(lambda *x, m=mode: attend(*x, 0.7, m), *attention_tensors(torch.float64))


@pytest.mark.parametrize("mode", ["blend", "joint"])
def test_derivatives_of_attention_go_on(mode):
    """The third one too, and those of a float32 gradient penalty, on every backend that runs here."""
    results = []
    for backend in BACKENDS:
        if oracle.device(backend) == "cpu":
            with oracle.use_backend(backend):
                query, *bank = attention_tensors()
                derivative = query.requires_grad_()
                for _ in range(3):
                    value = attend(query, *bank, 0.7, mode) if derivative is query else derivative
                    (derivative,) = torch.autograd.grad(value.pow(2).sum(), query, create_graph=True)
                results.append(derivative)
    assert results[0].abs().max() > 1e-3
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-3, atol=1e-5)


def test_forward_mode_is_refused():
    plan, (query, key, value) = fresh_plan(), attention_tensors()
    windows = ops.gather_windows(CANVAS, plan)
    functions = {
        "canvas": (lambda x: ops.gather_windows(x, plan), CANVAS),
        "windows": (lambda x: ops.scatter_windows(x, plan), windows),
        "cond": (lambda x: ops.guided_step(x, None, CANVAS, plan, [1, 2], 1.0)[0], windows),
        "sample": (lambda x: ops.guided_step(windows, None, x, plan, [1, 2], 1.0)[0], CANVAS),
        "value": (lambda x: attend(query, key, x, 0.5), value),
    }
    for name, (function, x) in functions.items():
        message = f"^{name}: expected no forward-mode derivative"
        with pytest.raises(NotImplementedError, match=message):
            torch.func.jvp(function, (x,), (x,))
        with pytest.raises(NotImplementedError, match=message):
            torch.func.jacfwd(function)(x)
        with forward_ad.dual_level():
            with pytest.raises(NotImplementedError, match=message):
                function(forward_ad.make_dual(x, x))
            function(x)  # has no tangent


def test_vmap():
    plan, (query, *bank) = fresh_plan(), attention_tensors()
    many = torch.stack([CANVAS, CANVAS * 2, CANVAS - 1])
    torch.testing.assert_close(
        torch.vmap(lambda x: smooth(x, plan))(many), torch.stack([smooth(x, plan) for x in many])
    )
    queries = torch.stack([query, query * 2])
    expected = torch.stack([attend(each, *bank, 0.5) for each in queries])
    torch.testing.assert_close(torch.vmap(lambda x: attend(x, *bank, 0.5))(queries), expected)


def test_vmap_of_what_is_looked_at():
    """Ids, orders, lengths and guidance scales of a batch have no values to check."""
    plan, (query, key, value) = WindowPlan.minimum_coverage(5, 7, (3, 4)), attention_tensors()
    ids, weights = torch.tensor([[0, 1], [1, -1]]), WEIGHTS
    functions = {
        "prompt_ids": (
            lambda x: ops.regional_attention(query, key, value, x, weights),
            torch.stack([ids, ids.flip(0)]),
        ),
        "order": (
            lambda x: ops.regional_attention(query, key, value, ids, weights, order=x),
            torch.stack([ops.region_order(ids, weights), torch.arange(3, dtype=torch.int32).expand(2, 3)]),
        ),
        "lengths": (
            lambda x: ops.regional_attention(query, key, value, ids, weights, lengths=x),
            torch.tensor([[1, 2], [2, 1]]),
        ),
        "guidance_scale": (lambda x: smooth(CANVAS, plan, x), torch.tensor([1.5, 4.0])),
        "guidance map": (lambda x: smooth(CANVAS, plan, x), torch.rand(2, 5, 7)),
        "coefficients": (lambda x: smooth(CANVAS, plan, 2.0, x), torch.tensor([[1.0, 2.0], [3.0, 0.5]])),
    }
    for name, (function, several) in functions.items():
        each = torch.stack([function(one) for one in several])
        torch.testing.assert_close(torch.vmap(function)(several), each, msg=lambda text, name=name: f"{name}: {text}")


def transformable(plan):
    """(function, inputs) of every operation, with all that a gradient passes through."""
    windows, history = ops.gather_windows(CANVAS, plan).double(), torch.stack([CANVAS, CANVAS**2]).double()

    def step(cond, uncond, sample, history):
        scale = torch.linspace(1, 3, 35, dtype=torch.float64).reshape(5, 7)
        numbers = [2, 3, 4, 5], scale
        return torch.cat([part.flatten() for part in ops.guided_step(
            cond, uncond, sample, plan, *numbers, history=history, keep=(0.5, 2)
        )])  # fmt: skip

    yield lambda x: ops.gather_windows(x, plan), [CANVAS.double()]
    yield lambda x: ops.scatter_windows(x, plan, plan.weight("linear")), [windows]
    yield step, [windows, windows.cos(), CANVAS.double(), history]
    for mode in ("blend", "joint"):
        yield functools.partial(attend, scale=0.7, mode=mode), attention_tensors(torch.float64)


def test_torch_func_takes_the_derivatives_that_autograd_takes():
    for function, inputs in transformable(fresh_plan()):
        every = tuple(range(len(inputs)))

        def loss(*inputs, function=function):
            return (function(*inputs) ** 3).sum()

        leaves = [x.clone().requires_grad_() for x in inputs]
        expected = torch.autograd.grad(loss(*leaves), leaves)
        torch.testing.assert_close(torch.func.grad(loss, every)(*inputs), expected)
        many = [torch.stack([x, x.sin()]) for x in inputs]
        each = torch.vmap(torch.func.grad(loss, every))(*many)
        torch.testing.assert_close([g[0] for g in each], list(expected))
        jacobian = torch.autograd.functional.jacobian(function, tuple(inputs))
        torch.testing.assert_close(torch.func.jacrev(function, every)(*inputs), jacobian)


def test_torch_func_goes_on_to_second_derivatives():
    for function, (x, *others) in transformable(WindowPlan(5, 7, (5, 4), [[0, 0], [0, 3]])):

        def loss(x, function=function, others=others):
            return (function(x, *others) ** 3).sum()

        expected = torch.autograd.functional.hessian(loss, x)
        torch.testing.assert_close(torch.func.jacrev(torch.func.grad(loss))(x), expected)


# Tensors without values, and plans with tables of their own


@pytest.mark.parametrize("shape", [(), (4,)], ids=["shared", "each"])
def test_a_weight_on_the_meta_device(shape):
    plan, meta = fresh_plan(), CANVAS.to("meta")
    weight = torch.empty(*shape, *plan.window, device="meta")
    windows = ops.gather_windows(meta, plan)
    assert ops.scatter_windows(windows, plan, weight).shape == CANVAS.shape
    assert ops.guided_step(windows, windows, meta, plan, [1, 2], 3.0, weight=weight)[0].is_meta


def test_a_plan_with_tables_of_its_own():
    plan = WindowPlan(4, 8, 4, [[0, 0], [0, 4]])
    moved = WindowPlan(4, 8, 4, [[0, 4], [0, 0]])
    cells = torch.arange(32.0).view(1, 1, 4, 8)
    placed = plan.with_tables(PlanTables(*(t.clone() for t in moved.tables(CPU))))
    assert torch.equal(ops.gather_windows(cells, placed), ops.gather_windows(cells, moved))
    assert torch.equal(ops.gather_windows(cells, plan), ops.gather_windows(cells, moved).flip(1))
    assert np.array_equal(placed.origins, plan.origins)
    assert torch.equal(copy.copy(placed).tables(CPU).origins, plan.tables(CPU).origins)

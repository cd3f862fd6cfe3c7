"""A call like one that was made before skips checks: what torch and the user may expect of it all the same."""

import dataclasses

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from instantas import ops
from instantas.ops.backend import BACKENDS
from instantas.testing.oracle import normal
from instantas.windows import WindowPlan

pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),  # checks read sizes, which a trace keeps
]

CANVAS = normal(1, 2, 5, 7).float()


class Named(torch.Tensor):
    """Of a class whose operations torch hands to it."""

    seen = []

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        cls.seen.append(str(function))
        return super().__torch_function__(function, types, args, kwargs or {})


class Overriding(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.seen.append(str(function))
        return function(*args, **kwargs or {})


class Watching(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(str(function))
        return function(*args, **kwargs or {})


def squares(canvas, plan):
    return ops.scatter_windows(ops.gather_windows(canvas, plan) ** 2, plan)


@pytest.fixture
def plan():
    plan = WindowPlan.minimum_coverage(5, 7, (3, 4))
    first = squares(CANVAS, plan)
    if BACKENDS["cpp"].absent() is None:
        assert len(plan.calls) == 2  # otherwise nothing here is repeated
    torch.testing.assert_close(squares(CANVAS, plan), first, rtol=0, atol=0)
    torch.testing.assert_close(first, CANVAS**2)
    return plan


def test_derivatives(plan):
    canvas = CANVAS.clone().requires_grad_()
    squares(canvas, plan).sum().backward()
    torch.testing.assert_close(canvas.grad, 2 * CANVAS)
    with torch.no_grad():
        assert squares(canvas, plan).grad_fn is None
    torch.testing.assert_close(torch.func.grad(lambda x: squares(x, plan).sum())(CANVAS), 2 * CANVAS)
    many = torch.stack([CANVAS, -CANVAS])
    torch.testing.assert_close(torch.vmap(lambda x: squares(x, plan))(many), many**2)
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="^canvas: expected no forward-mode"):
        squares(forward_ad.make_dual(CANVAS, CANVAS), plan)


def test_compilers_and_tracers(plan):
    other = 3 * CANVAS
    for function in (
        torch.compile(lambda x: squares(x, plan), fullgraph=True, backend="aot_eager"),
        make_fx(lambda x: squares(x, plan))(CANVAS),
        torch.jit.trace(lambda x: squares(x, plan), CANVAS),
    ):
        torch.testing.assert_close(function(other), other**2)
        leaf = other.clone().requires_grad_()
        function(leaf).sum().backward()
        torch.testing.assert_close(leaf.grad, 2 * other)


def test_a_graph_knows_nothing_of_it(plan):
    compiled = torch.compile(lambda x: squares(x, plan), fullgraph=True, backend="aot_eager")
    compiled(CANVAS)
    squares(torch.cat([CANVAS, CANVAS]), plan)
    with torch.compiler.set_stance("fail_on_recompile"):
        compiled(CANVAS)
        with ops.use_backend("reference"):
            compiled(CANVAS)


def test_modes_and_classes(plan):
    with FakeTensorMode():
        result = squares(torch.zeros(CANVAS.shape), plan)
    assert isinstance(result, FakeTensor) and result.shape == CANVAS.shape
    with Watching() as mode:
        squares(CANVAS, plan)
    assert sum("instantas.gather_windows" in name for name in mode.seen) == 1
    assert isinstance(squares(CANVAS.as_subclass(Named), plan), Named)
    with Overriding() as overriding:
        squares(CANVAS, plan)
    assert all(any("instantas.gather_windows" in name for name in seen) for seen in (Named.seen, overriding.seen))
    assert squares(torch.nn.Parameter(CANVAS), plan).grad_fn is not None
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(squares(CANVAS, plan), CANVAS**2, rtol=0, atol=0)
    with torch.inference_mode():
        assert squares(CANVAS, plan).is_inference()


def test_other_inputs_are_checked(plan):
    with pytest.raises(ValueError, match="^canvas: expected"):
        ops.gather_windows(CANVAS[..., 1:], plan)
    with pytest.raises(TypeError, match="^canvas: expected a dense tensor, got one of layout torch.sparse_coo"):
        ops.gather_windows(CANVAS.to_sparse(), plan)
    with pytest.raises(TypeError, match="^canvas: expected torch.float32 or .* got torch.int32"):
        ops.gather_windows(CANVAS.int(), plan)
    with pytest.raises(TypeError, match="^canvas: expected a tensor .* got list"):
        ops.gather_windows(CANVAS.tolist(), plan)
    with pytest.raises(TypeError, match="^plan: expected a WindowPlan, got tuple"):
        ops.gather_windows(CANVAS, (5, 7))
    with pytest.raises(ValueError, match="^weight: expected some weight over every cell"):
        ops.scatter_windows(ops.gather_windows(CANVAS, plan), plan, torch.zeros(plan.window))
    for dtype in (torch.float64, torch.bfloat16):
        torch.testing.assert_close(squares(CANVAS.to(dtype), plan), CANVAS.to(dtype) ** 2)
    strided = CANVAS.mT.contiguous().mT
    assert not strided.is_contiguous() and torch.equal(squares(strided, plan), squares(CANVAS, plan))
    twice = torch.cat([CANVAS, CANVAS])
    torch.testing.assert_close(squares(twice, plan), twice**2)
    meta = ops.gather_windows(CANVAS.to("meta"), plan)
    assert meta.is_meta and meta.shape == (1, plan.count, 2, *plan.window)


def test_a_forced_backend_is_the_one_that_runs(plan):
    ran, gather = [], BACKENDS["reference"].functions()["gather_windows"]

    def gather_windows(*args):
        ran.append(len(args))
        return gather(*args)

    mine = dataclasses.replace(BACKENDS["reference"], functions=lambda: {"gather_windows": gather_windows})
    for times in (1, 2):
        with ops.use_backend(mine):
            ops.gather_windows(CANVAS, plan)
        assert len(ran) == times
        ops.gather_windows(CANVAS, plan)  # and not when it is over


def test_tables_of_ones_own(plan):
    """They are another plan's: what was called on the first says nothing of it."""
    moved = WindowPlan(5, 7, (3, 4), [[2, 3], [0, 0], [0, 3], [2, 0]])
    windows = ops.gather_windows(CANVAS, plan.with_tables(moved.tables(CANVAS.device)))
    assert torch.equal(windows, ops.gather_windows(CANVAS, moved))
    assert not torch.equal(windows, ops.gather_windows(CANVAS, plan))

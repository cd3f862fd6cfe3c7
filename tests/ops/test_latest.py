"""guided_step on partial plans: the latest predictions, kept and read where no window covers a cell."""

import math

import numpy as np
import pytest
import torch

from instantas import ops
from instantas.testing import oracle
from instantas.testing.oracle import BACKENDS, PLANS, judge, normal, positive, run
from instantas.windows import WindowPlan

PARTIAL = {
    "ragged": PLANS["ragged"].subset([0, 3, 4, 8]),
    "wrapped": PLANS["wrapped"].subset([1, 2]),
    "strided": PLANS["strided"].subset(np.arange(PLANS["strided"].count) % 3 == 0),
    "no window": PLANS["ragged"].subset([]),
    "whole": PLANS["ragged"].subset(range(PLANS["ragged"].count)),
    "one of two in a tile": WindowPlan.minimum_coverage(8, 24, (8, 12)).subset([0]),
    "packs of 8": WindowPlan.minimum_coverage(16, 64, 16).subset([0, 3]),
}
CARRY = (0.6, 0.8)


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


def arguments_of(plan, branches, k=1, c=3):
    """[cond, uncond, sample, history, latest]."""
    shape = 2, c, plan.height, plan.width
    cond, uncond = (normal(2, plan.count, c, *plan.window, seed=seed) for seed in (1, 2))
    history = normal(k, *shape, seed=3) if k else None
    return [cond, uncond if branches == 2 else None, normal(*shape), history, normal(branches, *shape, seed=4)]


def stepping(plan, guidance=5.0, weight=None, k=1, carry=CARRY):
    def call(cond, uncond, sample, history, latest):
        settings = dict(weight=weight, history=history, keep=(0.7, 0.2), latest=latest, carry=carry)
        return ops.guided_step(cond, uncond, sample, plan, [0.9, -0.4, 0.3][: 2 + k], guidance, **settings)

    return call


def test_partial_plans_are_partial():
    assert [name for name, plan in PARTIAL.items() if not plan.partial] == ["whole"]
    for plan in PARTIAL.values():
        assert (plan.coverage() > 0).all() != plan.partial


@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
@pytest.mark.parametrize("branches", [1, 2])
@pytest.mark.parametrize("name", PARTIAL)
def test_error_budget(backend, name, branches, dtype):
    plan, i = PARTIAL[name], list(PARTIAL).index(name)
    guidance = positive(plan.height, plan.width) * 5 if i % 2 else 5.0
    weight = [None, positive(*plan.window), positive(plan.count, *plan.window)][i % 3]
    k = (i + branches) % 2
    judge(backend, stepping(plan, guidance, weight, k), arguments_of(plan, branches, k), dtype)


@pytest.mark.parametrize("name", ["ragged", "wrapped", "no window", "whole"])
def test_gradients(backend, name):
    plan = PARTIAL[name]
    judge(backend, stepping(plan, weight=positive(*plan.window)), arguments_of(plan, 2), torch.float32, gradients=5)


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name in ("reference", "cpp")])
@pytest.mark.parametrize("branches", [1, 2])
def test_gradcheck(backend, branches):
    plan = WindowPlan.minimum_coverage(5, 7, (3, 4)).subset([0, 3])
    arguments = [a if a is None else a.requires_grad_() for a in arguments_of(plan, branches, c=1)]
    with oracle.use_backend(backend):
        assert torch.autograd.gradcheck(stepping(plan), arguments)


def covered(plan):
    return torch.from_numpy(plan.coverage() > 0)


@pytest.mark.parametrize("name", PARTIAL)
def test_kept_cells_stay_bit_for_bit_and_covered_ones_are_not_read(backend, name):
    plan = PARTIAL[name]
    arguments = arguments_of(plan, 2)
    arguments[-1][..., covered(plan)] = math.nan
    sample, history, latest = run(backend, stepping(plan), arguments, torch.bfloat16)
    assert sample.isfinite().all() and history.isfinite().all() and latest.isfinite().all()
    untouched = ~covered(plan)
    assert torch.equal(latest[..., untouched], arguments[-1].bfloat16()[..., untouched])


@pytest.mark.parametrize("name", ["ragged", "wrapped", "strided", "one window"])
def test_a_plan_that_covers_all_steps_as_without_latest(backend, name):
    plan = PLANS[name]
    cond, uncond, sample, history, latest = arguments_of(plan, 2)
    call, weight = stepping(plan, weight=positive(*plan.window)), positive(*plan.window)
    kept = run(backend, call, [cond, uncond, sample, history, latest], torch.float32)
    plain = run(
        backend,
        lambda c, u, x, h: ops.guided_step(
            c, u, x, plan, [0.9, -0.4, 0.3], 5.0, weight=weight, history=h, keep=(0.7, 0.2)
        ),
        [cond, uncond, sample, history],
        torch.float32,
    )
    assert all(map(torch.equal, kept, plain))
    p, q = CARRY
    for branch, windows in zip(kept[2], (cond, uncond)):
        merged = run("reference", lambda w: ops.scatter_windows(w, plan, weight), [windows], torch.float64)[0]
        torch.testing.assert_close(branch.double(), p * sample + q * merged, rtol=1e-5, atol=1e-5)


def test_a_prediction_that_was_kept_comes_back(backend):
    """Every window evaluated, then none: the same prediction, at another sample, whose form has not changed."""
    plan = PLANS["ragged"]
    cond, uncond, sample, _, latest = arguments_of(plan, 2, k=0)

    def twice(cond, uncond, sample, latest):
        first = stepping(plan, k=0, carry=(0.0, 1.0))(cond, uncond, sample, None, latest)
        none = plan.subset([])
        again = stepping(none, k=0, carry=(0.0, 1.0))(cond[:, :0], uncond[:, :0], sample, None, first[2])
        return first[0], again[0], first[2], again[2]

    first, again, kept, still = run(backend, twice, [cond, uncond, sample, latest], torch.float32)
    assert torch.equal(first, again) and torch.equal(kept, still)


def test_a_window_without_weight_in_a_cell_leaves_it_to_latest(backend):
    plan = WindowPlan.minimum_coverage(8, 16, 8).subset([0])
    weight = torch.ones(8, 8)
    weight[:, 6:] = 0
    cond, _, sample, _, latest = arguments_of(plan, 1, k=0)
    call = stepping(plan, 1.0, weight, k=0, carry=(0.0, 1.0))
    new, kept, *grads = run(backend, call, [cond, None, sample, None, latest], torch.float32, gradients=5)
    merged = torch.cat([cond[:, 0, ..., :6], latest[0, ..., 6:]], dim=-1)
    torch.testing.assert_close(kept[0].double(), merged, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(new.double(), 0.9 * sample - 0.4 * merged, rtol=1e-6, atol=1e-6)
    assert all(g.isfinite().all() for g in grads)


def test_compiled_without_graph_breaks():
    plan = PARTIAL["ragged"]
    arguments = [a if a is None else a.float() for a in arguments_of(plan, 2)]
    call = stepping(plan)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert all(map(torch.equal, compiled(*arguments), call(*arguments)))

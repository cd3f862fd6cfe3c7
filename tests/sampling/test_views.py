"""The dilated view of a canvas: windows that see all of it."""

import copy
import pickle

import pytest
import torch

from instantas.sampling import bridging
from instantas.sampling.bridging import Dilated, Shift
from instantas.sampling.sampler import sample
from instantas.testing.tiny import scheduler
from instantas.windows import WindowPlan
from tests.sampling.runs import noise, plan_of, random_plans


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda view: pickle.loads(pickle.dumps(view))])
def test_a_copied_view_brings_no_device_tables(copied):
    view, cells = Dilated().step(0, 10, WindowPlan.minimum_coverage(20, 50, 16)).view, torch.rand(20, 50)
    seen, size = view.apply(cells), len(pickle.dumps(view))
    other = copied(view)
    assert len(pickle.dumps(other)) == size and not other._placed
    assert torch.equal(other.apply(cells), seen) and torch.equal(other.invert(seen), cells)


@pytest.mark.parametrize("made_inside", [False, True])
def test_a_view_used_in_inference_mode_holds_outside(made_inside):
    plan = WindowPlan.minimum_coverage(20, 50, 16)
    view = Dilated().step(0, 10, plan).view
    with torch.inference_mode():
        view = Dilated().step(0, 10, plan).view if made_inside else view
        view.invert(view.apply(torch.rand(20, 50)))
    cells = torch.rand(20, 50, requires_grad=True)
    view.invert(view.apply(cells)).sum().backward()
    assert torch.equal(cells.grad, torch.ones(20, 50))


def test_views_show_every_cell_and_are_undone_for_500_sizes():
    for plan, _ in random_plans(500):
        stage = Dilated().step(0, 10, plan)
        view, (h, w) = stage.view, plan.window
        cells = torch.arange(plan.height * plan.width).reshape(1, 1, plan.height, plan.width)
        seen = view.apply(cells)
        assert torch.equal(view.invert(seen), cells)
        assert stage.plan.count == plan.count
        for index, length, window in ((view.rows, plan.height, h), (view.columns, plan.width, w)):
            each = index.reshape(-1, window)
            assert (each[:, 1:] > each[:, :-1]).all()  # a view runs over the axis once, in order
            assert (each[:, -1] - each[:, 0] > length - 2 * length / window - 1).all()  # and over all of it
            if length % window == 0:
                assert torch.equal(index.sort()[0], torch.arange(length))
                assert (each.diff() == length // window).all()


def test_views_come_first_and_the_windows_after_them():
    plan = plan_of(16, 24)
    stages = [bridging.bridge("shift+dilated").step(i, 20, plan) for i in range(20)]
    assert [stage.view is not None for stage in stages] == [True] * 4 + [False] * 16
    assert stages[7].plan == Shift().step(7, 20, plan).plan
    seen = []

    def denoiser(windows, timestep, context):
        seen.append(context.view is not None)
        return windows

    sample(denoiser, noise(plan), plan, scheduler(), num_inference_steps=20, window_batch_size=9, bridging="dilated")
    assert seen == [True] * 4 + [False] * 16


def test_windows_are_cut_from_the_view():
    plan, given = plan_of(8, 16), []

    def denoiser(windows, timestep, context):
        given.append(windows)
        return torch.zeros_like(windows)

    canvas = noise(plan)
    sample(denoiser, canvas, plan, scheduler("sample"), num_inference_steps=1, bridging=Dilated(until=1.0))
    assert torch.equal(given[0][0], canvas[0, :, :, 0::2]) and torch.equal(given[0][1], canvas[0, :, :, 1::2])

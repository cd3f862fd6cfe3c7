"""Bridges: what they evaluate, what they re-use, what they refuse."""

import itertools
import types

import diffusers
import numpy as np
import pytest
import torch

from instantas.sampling import bridging
from instantas.sampling.bridging import Centred, Dilated, Joined, Moments, Shift, Stage, View
from instantas.sampling.noise import Level
from instantas.sampling.sampler import sample
from instantas.testing.tiny import scheduler
from instantas.windows import WindowPlan
from tests.sampling.runs import noise, plan_of, random_plans

NAMES = ("shift", "economy", "centred", "moments", "dilated", "shift+moments+dilated")
WINDOW = 8


def content_denoiser(windows, timestep, context):
    """A prediction that depends on the whole window, so that the windows' places matter."""
    spread = torch.fft.ifft2(torch.fft.fft2(windows.float()).abs()).real
    return 0.5 * windows + 0.1 * torch.tanh(spread), 0.4 * windows


def covered(stage):
    """(H, W) bool: the cells under evaluated windows."""
    plan, cells = stage.plan, np.zeros((stage.plan.height, stage.plan.width), bool)
    for y, x in plan.origins:
        rows, columns = (y + np.arange(plan.window[0])) % plan.height, (x + np.arange(plan.window[1])) % plan.width
        cells[np.ix_(rows, columns)] = True
    return cells


# One window


@pytest.mark.parametrize("name", NAMES)
def test_a_single_window_is_left_alone_bit_for_bit(name):
    plan = plan_of(WINDOW, WINDOW)
    for kind in (diffusers.DDIMScheduler, diffusers.DPMSolverMultistepScheduler):
        run = [
            sample(content_denoiser, noise(plan), plan, scheduler("v_prediction", kind=kind), num_inference_steps=7,
                   guidance_scale=3.0, bridging=b)
            for b in (None, name)
        ]  # fmt: skip
        assert torch.equal(*run)


def test_a_single_window_that_wraps_moves():
    plan = plan_of(WINDOW, WINDOW, wrap=(False, True))
    origins = {tuple(Shift().step(i, 8, plan).plan.origins[0]) for i in range(8)}
    assert len(origins) > 4 and {y for y, _ in origins} == {0}


# What is evaluated


def test_every_cell_is_evaluated_or_has_a_prediction_to_reuse_for_500_sizes():
    for plan, steps in random_plans(500):
        for name in ("shift", "economy", "centred"):
            age, evaluated = np.zeros((plan.height, plan.width)), 0
            for i in range(steps):
                stage = bridging.bridge(name).step(i, steps, plan)
                fresh = covered(stage)
                evaluated += stage.plan.count
                assert i or fresh.all()
                age = np.where(fresh, 0, age + 1)
                assert age.max() <= (6 if name == "economy" else 3), (name, plan)
            if evaluated > plan.count or steps == 1:
                assert not age.any()  # nothing ends on an old prediction


@pytest.mark.parametrize("size", [(16, 16), (8, 32), (32, 8), (24, 40), (20, 13), (64, 64)])
def test_evaluations_are_those_of_the_contract(size):
    plan = plan_of(*size)
    rows, columns = (len(np.unique(plan.origins[:, axis])) for axis in (0, 1))
    for steps in (1, 2, 7, 50):
        least = steps * plan.lower_bound
        assert bridging.evaluations("none", plan, steps) == least
        assert bridging.evaluations("default", plan, steps) == least
        assert bridging.evaluations("moments", plan, steps) == least
        assert bridging.evaluations("dilated+shift", plan, steps) == least
        assert bridging.evaluations("dilated+economy", plan, steps) <= max(plan.count, 0.65 * least)
        assert bridging.evaluations("economy", plan, steps) == max(1, int(0.65 * steps + 1e-9)) * plan.count
        assert bridging.evaluations("economy", plan, steps) <= max(plan.count, 0.65 * least)
    if all(length % WINDOW == 0 for length in size) and rows > 1 and columns > 1:
        four = rows * columns + (rows - 1) * (columns - 1) + rows * (columns - 1) + (rows - 1) * columns
        assert sum(Centred().step(i, 50, plan).plan.count for i in range(4)) == four


@pytest.mark.parametrize("name", NAMES)
def test_the_network_is_run_as_often_as_is_said(name):
    plan, calls = plan_of(20, 24), []

    def denoiser(windows, timestep, context):
        assert len(context.rows) == len(windows)
        calls.append(len(windows))
        return content_denoiser(windows, timestep, context)

    sample(denoiser, noise(plan, 2), plan, scheduler(), num_inference_steps=13, guidance_scale=2.0, bridging=name)
    assert sum(calls) == 2 * bridging.evaluations(name, plan, 13)


@pytest.mark.parametrize("size", [(32, 32), (16, 64), (64, 64)])
def test_borders_do_not_stay_in_place(size):
    """No place between two cells is where one window takes over from the next for most of the steps."""
    window, steps = 16, 64
    plan = plan_of(*size, window)
    for axis, length in enumerate(size):
        if length == window:
            continue
        share = np.zeros(length + 1)
        for i in range(1, steps - 1):
            stage = Shift().step(i, steps, plan)
            first = np.unique(stage.plan.origins[:, axis])
            centres = first[:, None] + (window - 1) / 2  # weights fall from there: the nearest is the heaviest
            share[1:length] += np.diff(np.abs(np.arange(length) - centres).argmin(0)) != 0
        share /= steps - 2
        assert share.max() < 0.3
        assert share[window:length:window].max() < 0.15


def test_windows_never_reach_across_an_edge_that_does_not_wrap():
    plan = plan_of(16, 24, wrap=(False, True))
    crossing = []
    for i in range(20):
        stage = Shift().step(i, 20, plan)
        assert stage.plan.wrap == (False, True)
        assert (stage.plan.origins[:, 0] + WINDOW <= 16).all()
        crossing.append((stage.plan.origins[:, 1] + WINDOW > 24).any())
    assert any(crossing)


# What is re-used


def planted(prediction_type, clean=0.3):
    """A denoiser that is certain of one x_0: then every prediction of a cell says the same, however old it is."""

    def denoiser(windows, timestep, context):
        predicted = context.level.prediction(torch.full_like(windows, clean), windows)
        return predicted, predicted

    return denoiser


@pytest.mark.parametrize(
    "kind",
    [
        diffusers.DDIMScheduler,
        diffusers.EulerDiscreteScheduler,
        diffusers.DPMSolverMultistepScheduler,
        diffusers.UniPCMultistepScheduler,
    ],
)
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("name", ["shift", "economy+dilated", "centred"])
def test_old_predictions_are_carried_to_the_step_exactly(kind, prediction_type, name):
    plan = plan_of(16, 20)
    run = [
        sample(
            planted(prediction_type),
            noise(plan).double(),
            plan,
            scheduler(prediction_type, kind=kind),
            num_inference_steps=12,
            guidance_scale=2.0,
            bridging=b,
        )
        for b in (None, name)
    ]
    # schedulers keep their tables in float32; an uncarried v differs by more than 1e-2
    assert torch.allclose(*run, rtol=0, atol=2e-3)
    assert (run[0] - run[1]).abs().mean() < 3e-4


def test_flow_matching_reuses_as_it_is():
    plan = plan_of(16, 20)
    run = [
        sample(planted("flow"), noise(plan), plan, diffusers.FlowMatchEulerDiscreteScheduler(), num_inference_steps=9,
               bridging=b)
        for b in (None, "economy")
    ]  # fmt: skip
    assert torch.allclose(*run, atol=1e-4)
    assert torch.allclose(run[0], torch.full_like(run[0], 0.3), atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["DDIM", "DPMSolverMultistep", "PNDM", "EulerAncestralDiscrete", "HeunDiscrete"])
def test_runs_are_the_same_again_and_in_any_batch(name, kind):
    plan = plan_of(13, 20, wrap=(False, True))
    run = []
    for batch, seed in ((1, 5), (7, 5), (7, 6)):
        made = scheduler("v_prediction", kind=getattr(diffusers, kind + "Scheduler"))
        run.append(
            sample(content_denoiser, noise(plan, 2, seed), plan, made, num_inference_steps=6, guidance_scale=2.0,
                   generator=torch.Generator().manual_seed(seed), window_batch_size=batch, bridging=name)
        )  # fmt: skip
    assert torch.isfinite(run[0]).all()
    assert torch.allclose(run[0], run[1], atol=1e-5)
    assert not torch.allclose(run[0], run[2], atol=1e-2)
    plain = sample(content_denoiser, noise(plan, 2, 5), plan, scheduler("v_prediction"), num_inference_steps=6)
    assert not torch.allclose(run[0], plain, atol=1e-3)


def test_half_precision_stays_close():
    plan = plan_of(20, 20)
    full, half = (
        sample(content_denoiser, noise(plan).to(dtype), plan, scheduler("v_prediction"), num_inference_steps=10,
               guidance_scale=2.0, bridging="shift")
        for dtype in (torch.float32, torch.bfloat16)
    )  # fmt: skip
    assert half.dtype == torch.bfloat16
    assert (half.float() - full).abs().mean() < 0.03


# Moments


def test_moments_bring_the_windows_means_together_and_change_no_canvas_mean():
    plan = plan_of(16, 16)
    level = Level(0.6, 0.8, "v_prediction")
    context = types.SimpleNamespace(level=level)
    clean = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    clean[..., :8] += 2
    x = torch.randn_like(clean)
    adjust = Moments(strength=1.0, until=1.0).step(0, 10, plan).adjust
    matched = level.clean(adjust(level.prediction(clean, x), x, context), x)
    means = matched.unfold(2, 8, 8).unfold(3, 8, 8).mean((-2, -1))
    assert torch.allclose(means, means.mean((2, 3), keepdim=True).expand_as(means), atol=1e-5)
    assert torch.allclose(matched.mean((2, 3)), clean.mean((2, 3)), atol=1e-5)
    half = level.clean(Moments(0.5, 1.0).step(0, 10, plan).adjust(level.prediction(clean, x), x, context), x)
    gap = [(v[..., :8].mean() - v[..., 8:].mean()).item() for v in (clean, half, matched)]
    assert gap[1] == pytest.approx(gap[0] / 2, abs=1e-4) and gap[2] == pytest.approx(0, abs=1e-4)


def test_moments_end():
    plan = plan_of(16, 16)
    moments = Moments(until=0.5)
    assert [moments.step(i, 10, plan).adjust is not None for i in range(10)] == [True] * 5 + [False] * 5
    assert Moments(strength=0).step(0, 10, plan).adjust is None


# What is refused


def refused(error, match, **keywords):
    plan, calls = plan_of(16, 16), []

    def denoiser(windows, timestep, context):
        calls.append(timestep)
        return windows

    keywords = {"plan": plan, "scheduler": scheduler()} | keywords
    with pytest.raises(error, match=match):
        sample(denoiser, noise(plan), num_inference_steps=3, **keywords)
    assert not calls


def test_unknown_bridges_are_refused_before_any_evaluation():
    for name in ("shfit", "", "shift+", "shift+none", "Shift"):
        refused(ValueError, "bridging: expected one of none, default, shift", bridging=name)
    for thing in (3, ["shift"]):
        refused(TypeError, f"bridging: expected a name or a bridge, got {type(thing).__name__}", bridging=thing)


def test_bridges_that_choose_the_same_cannot_be_joined():
    for pair in itertools.product(("shift", "economy", "centred"), repeat=2):
        refused(ValueError, "expected bridges that choose different things", bridging="+".join(pair))
    with pytest.raises(ValueError, match="both the prediction"):
        Joined((Moments(), Moments(0.5)))
    stage = bridging.bridge("moments+shift").step(3, 10, plan_of(16, 16))
    assert stage.adjust is not None and stage.plan.partial and stage.weight is not None


@pytest.mark.parametrize(
    "make",
    [
        lambda: Shift(share=0),
        lambda: Shift(share=1.01),
        lambda: Shift(share=float("nan")),
        lambda: Moments(strength=-0.1),
        lambda: Moments(strength=1.5),
        lambda: Dilated(until=0),
        lambda: Moments(until=0),
        lambda: Moments(until=float("inf")),
    ],
)
def test_strengths_outside_their_range_are_refused(make):
    with pytest.raises(ValueError, match="(share|strength|until): expected"):
        make()


def test_strengths_that_are_no_numbers_are_refused():
    for make in (lambda: Shift(share="1"), lambda: Shift(share=True), lambda: Moments(strength=None)):
        with pytest.raises(TypeError, match="expected a number"):
            make()


def test_windows_that_overlap_by_a_stride_need_no_bridge():
    for name in NAMES:
        refused(ValueError, "fewest windows", bridging=name, plan=WindowPlan.strided(16, 16, WINDOW, 4))


def test_moments_ask_for_known_noise_levels():
    refused(ValueError, "alphas_cumprod", bridging="moments", scheduler=diffusers.EDMEulerScheduler())


def test_a_bridge_of_ones_own():
    class Half:
        """Evaluates the left windows at every step, the right ones at every other."""

        def step(self, step, steps, plan):
            return Stage(plan.subset([True, step % 2 == 0]))

    plan, seen = plan_of(8, 16), []

    def denoiser(windows, timestep, context):
        seen.append(len(windows))
        return content_denoiser(windows, timestep, context)

    sample(denoiser, noise(plan), plan, scheduler(), num_inference_steps=4, guidance_scale=2.0, bridging=Half())
    assert seen == [2, 1, 2, 1]
    assert bridging.evaluations(Half(), plan, 4) == 6
    joined = Joined((Half(), Moments()))
    assert joined.step(1, 4, plan).plan.origins.tolist() == [[0, 0]]


def test_stages_that_cannot_be_are_refused():
    class Wrong:
        def __init__(self, stage):
            self.stage = stage

        def step(self, step, steps, plan):
            return self.stage

    plan = plan_of(16, 16)
    refused(ValueError, "step 0, as there is nothing to re-use", bridging=Wrong(Stage(plan.subset([0, 3]))))
    with pytest.raises(ValueError, match=r"chosen: expected \(4,\) booleans, got \(3,\)"):
        plan.subset(torch.ones(3).bool())
    refused(ValueError, "expected plans of 16 x 16 cells", bridging=Wrong(Stage(plan_of(24, 16))))
    view = View(torch.arange(16), torch.arange(16).repeat(2))
    refused(ValueError, "expected plans of 16 x 32 cells", bridging=Wrong(Stage(plan, view=view)))

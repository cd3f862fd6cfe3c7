"""Runs on a canvas that is known outside of what is painted: as diffusers' own loop makes them, no window too many."""

import diffusers
import numpy as np
import pytest
import torch

from instantas.sampling.bridging import Stage, evaluations
from instantas.sampling.known import Known
from instantas.sampling.noise import levels
from instantas.sampling.sampler import sample
from instantas.sampling.schedulers import step_keywords
from instantas.testing import recorded
from instantas.testing.tiny import scheduler
from instantas.windows import WindowPlan

KINDS = [
    "DDIM", "DDPM", "PNDM", "EulerDiscrete", "EulerAncestralDiscrete", "HeunDiscrete", "KDPM2Discrete", "LMSDiscrete",
    "DPMSolverMultistep", "DPMSolverSinglestep", "UniPCMultistep", "DEISMultistep", "LCM", "TCD",
]  # fmt: skip
BRIDGES = ["none", "shift", "economy", "centred", "dilated", "moments"]
PLAN = WindowPlan.minimum_coverage(16, 32, 8)


def of(kind):
    config = dict(skip_prk_steps=True) if kind == "PNDM" else {}
    return scheduler(kind=getattr(diffusers, f"{kind}Scheduler"), **config)


def draw(seed, height=16, width=32, batch=1):
    return torch.randn(batch, 4, height, width, generator=torch.Generator().manual_seed(seed))


def known(painted, batch=1, **more):
    return Known(draw(0, *painted.shape[2:], batch), draw(1, *painted.shape[2:], batch), painted, **more)


def box(rows, columns, height=16, width=32):
    painted = torch.zeros(1, 1, height, width, dtype=torch.bool)
    painted[..., rows, columns] = True
    return painted


@pytest.mark.parametrize("kind", KINDS)
def test_the_loop_of_diffusers(kind):
    theirs, begin = of(kind), 4
    beside = known(box(slice(1, 4), slice(2, 7), 8, 8))
    theirs.set_timesteps(10)
    if hasattr(theirs, "set_begin_index"):
        theirs.set_begin_index(begin)
    timesteps = theirs.timesteps[begin:]
    start = theirs.add_noise(beside.latents, beside.noise, timesteps[:1])

    def network(x, t):
        return 0.3 * torch.tanh(x) + 0.1 * x.roll(1, -1) * (t / 1000)

    x, generator = start, torch.Generator().manual_seed(2)
    for i, t in enumerate(timesteps):
        predicted = network(theirs.scale_model_input(x, t), t)
        x = theirs.step(predicted, t, x, return_dict=False, **step_keywords(theirs, generator))[0]
        kept = beside.latents
        if i < len(timesteps) - 1:
            kept = theirs.add_noise(kept, beside.noise, timesteps[i + 1 : i + 2])
        x = torch.where(beside.painted, x, kept)
    ours = sample(
        lambda windows, t, context: network(windows, t), start, WindowPlan.minimum_coverage(8, 8, 8), of(kind),
        num_inference_steps=10, begin=begin, known=beside, generator=torch.Generator().manual_seed(2),
    )  # fmt: skip
    torch.testing.assert_close(ours, x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bridging", BRIDGES)
@pytest.mark.parametrize("wrap", [(False, False), (False, True)])
def test_only_windows_with_something_to_paint(bridging, wrap):
    """What is painted is what it would be on a canvas that is painted whole, by a network that looks at one cell."""
    plan, seen = WindowPlan.minimum_coverage(16, 32, 8, wrap=wrap), []
    beside = known(box(slice(9, 12), slice(0, 5)), batch=2)

    def network(windows, t, context):
        seen.append(context)
        return 0.3 * torch.tanh(windows)

    run = dict(num_inference_steps=8, bridging=bridging)
    ours = sample(network, draw(3, batch=2), plan, of("DDIM"), known=beside, **run)
    assert torch.equal(*(torch.where(beside.painted, 0.0, each) for each in (ours, beside.latents)))
    assert sum(len(each.pictures) for each in seen) == 2 * evaluations(bridging, plan, 8, painted=beside.cells)
    for context in seen:
        for y, x in context.origins.tolist() if context.view is None else ():
            rows, columns = (torch.arange(begin, begin + 8) % side for begin, side in ((y, 16), (x, 32)))
            assert beside.cells[rows][:, columns].any()
    if bridging != "moments":
        whole = sample(network, draw(3, batch=2), plan, of("DDIM"), **run)
        painted = (each[beside.painted.expand_as(each)] for each in (ours, whole))
        torch.testing.assert_close(*painted, rtol=1e-4, atol=1e-4)


def test_windows_that_hold_cells():
    rng = np.random.default_rng(0)
    for wrap in ((False, False), (True, False), (True, True)):
        plan = WindowPlan.strided(19, 26, (7, 9), (5, 4), wrap=wrap)
        for _ in range(20):
            cells = rng.random((19, 26)) < 0.01
            rows, columns = ((plan.origins[:, axis, None] + np.arange(side)) for axis, side in ((0, 7), (1, 9)))
            wanted = [cells[np.ix_(y % 19, x % 26)].any() for y, x in zip(rows, columns)]
            assert plan.holding(cells).tolist() == wanted


@pytest.mark.parametrize("predicts", ["epsilon", "v_prediction", "sample"])
def test_adjustments_see_the_known_cells(predicts):
    """Where no window is evaluated the prediction says the known latents."""
    beside, seen = known(box(slice(0, 3), slice(0, 3))), []

    class Look:
        def step(self, step, steps, plan):
            def adjust(prediction, sample, context):
                seen.append(context.level.clean(prediction, sample))
                return prediction

            return Stage(plan, adjust=adjust)

    chosen = scheduler(predicts)
    chosen.set_timesteps(6)
    level = levels(chosen)[0]
    start = level.signal * beside.latents + level.noise * beside.noise
    sample(lambda windows, t, c: 0.1 * windows, start, PLAN, chosen, begin=0, known=beside, bridging=Look())
    assert len(seen) == 6
    for clean in seen:
        torch.testing.assert_close(clean[..., 8:, 8:], beside.latents[..., 8:, 8:], rtol=1e-3, atol=1e-3)


def test_a_network_that_is_told_keeps_what_its_windows_cover():
    beside = known(box(slice(0, 3), slice(0, 3)), told=True)
    ours = sample(lambda w, t, c: 0.1 * w, draw(3), PLAN, of("DDIM"), num_inference_steps=4, known=beside)
    covered = torch.zeros(16, 32, dtype=torch.bool)
    covered[:8, :8] = True
    torch.testing.assert_close(torch.where(covered, 0.0, ours), torch.where(covered, 0.0, beside.latents))
    assert (ours != beside.latents)[..., 3:8, 3:8].any()


def test_rescaled_guidance_looks_at_what_is_evaluated():
    """As on a canvas of the evaluated windows alone."""
    beside = known(box(slice(0, 8), slice(0, 8)))
    run = dict(num_inference_steps=4, guidance_scale=3.0, guidance_rescale=0.7)

    def network(windows, t, context):
        return 0.3 * torch.tanh(windows), 0.2 * windows

    ours = sample(network, draw(3), PLAN, of("DDIM"), known=beside, **run)
    alone = sample(network, draw(3)[..., :8, :8], WindowPlan.minimum_coverage(8, 8, 8), of("DDIM"), **run)
    torch.testing.assert_close(ours[..., :8, :8], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("told", [False, True])
def test_captured_steps(told):
    """As those that are not, whichever windows are evaluated at a step."""
    beside = known(box(slice(2, 13), slice(4, 20)), told=told)
    run = dict(num_inference_steps=9, guidance_scale=3.0, guidance_rescale=0.5, bridging="shift", known=beside)

    def network(windows, t, context):
        return 0.3 * torch.tanh(windows), 0.2 * windows

    plain = sample(network, draw(3), PLAN, of("DPMSolverMultistep"), **run)
    with recorded.recording() as made:
        graphed = sample(network, draw(3), PLAN, of("DPMSolverMultistep"), cuda_graph=True, **run)
    assert made
    torch.testing.assert_close(graphed, plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "painted, error, message",
    [
        (torch.zeros(1, 1, 16, 32), TypeError, "painted: expected bool"),
        (torch.zeros(3, 1, 16, 32, dtype=torch.bool), ValueError, "painted: expected \\(1 or 2, 1, 16, 32\\)"),
        (torch.zeros(1, 1, 16, 16, dtype=torch.bool), ValueError, "painted: expected"),
    ],
)
def test_masks_of_other_kinds_are_refused(painted, error, message):
    with pytest.raises(error, match=message):
        Known(draw(0, batch=2), draw(1, batch=2), painted)


def test_what_does_not_fit_the_run_is_refused():
    def run(beside):
        sample(lambda w, t, c: pytest.fail("evaluated"), draw(3), PLAN, of("DDIM"), num_inference_steps=4, known=beside)

    with pytest.raises(TypeError, match="known: expected a Known, got Tensor"):
        run(draw(0))
    with pytest.raises(ValueError, match=r"known: expected latents \(1, 4, 16, 32\), got \(1, 4, 16, 16\)"):
        run(known(box(slice(3), slice(3), 16, 16)))
    with pytest.raises(ValueError, match="noise: expected"):
        Known(draw(0), draw(1, 8, 8), box(slice(3), slice(3)))


def test_weights_of_each_window_stay_with_the_windows_that_are_left():
    """One more window that is painted changes nothing of the others' weights."""
    plan = WindowPlan.strided(16, 32, 8, 4)
    weight = torch.rand(plan.count, 8, 8, generator=torch.Generator().manual_seed(0)) + 0.5
    few, all_ = box(slice(1, 3), slice(1, 3)), box(slice(0, 16), slice(0, 32))

    def network(windows, t, context):
        return 0.3 * torch.tanh(windows)

    runs = [
        sample(network, draw(1), plan, of("DDIM"), num_inference_steps=1, weight=weight, known=known(painted))
        for painted in (few, all_)
    ]
    assert torch.allclose(runs[0][..., 1:3, 1:3], runs[1][..., 1:3, 1:3], atol=1e-6)


@pytest.mark.parametrize(
    "given, message",
    [
        (lambda: Known(1, 2, 3), "latents: expected a tensor, got int"),
        (lambda: Known(draw(0).long(), draw(0), box(slice(1), slice(1))), "latents: expected a tensor of floats"),
        (lambda: Known(draw(0).to("meta"), draw(0), box(slice(1), slice(1))), "known: expected latents on cpu, got it"),
    ],
)
def test_known_cells_that_are_none(given, message):
    with pytest.raises((TypeError, ValueError), match=message):
        sample(lambda windows, t, context: windows, draw(0), PLAN, of("DDIM"), num_inference_steps=3, known=given())


def test_a_scheduler_that_is_set_to_begin_later_is_refused():
    chosen = of("EulerDiscrete")
    chosen.set_timesteps(10)
    chosen.set_begin_index(3)
    with pytest.raises(ValueError, match="num_inference_steps: expected a number, as the scheduler is set to begin"):
        sample(lambda windows, t, context: windows, draw(0), PLAN, chosen)

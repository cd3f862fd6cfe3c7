"""Runs that begin at a later timestep, from a clean sample with noise: as diffusers' own loop makes them."""

import diffusers
import pytest
import torch

from instantas.sampling.sampler import sample
from instantas.sampling.schedulers import step_keywords
from instantas.testing.tiny import scheduler
from instantas.windows import WindowPlan

PLAN = WindowPlan.minimum_coverage(8, 8, 8)
KINDS = [
    "DDIM", "DDPM", "PNDM", "EulerDiscrete", "EulerAncestralDiscrete", "HeunDiscrete", "KDPM2Discrete", "LMSDiscrete",
    "DPMSolverMultistep", "DPMSolverSinglestep", "UniPCMultistep", "DEISMultistep", "LCM", "TCD",
]  # fmt: skip


def of(kind):
    config = dict(skip_prk_steps=True) if kind == "PNDM" else {}
    return scheduler(kind=getattr(diffusers, f"{kind}Scheduler"), **config)


def draw(seed, *shape):
    return torch.randn(1, 4, *(shape or (8, 8)), generator=torch.Generator().manual_seed(seed))


def network(x, t):
    return 0.3 * torch.tanh(x) + 0.1 * x.roll(1, -1) * (t / 1000)


def noised(kind, begin, clean, steps=10):
    chosen = of(kind)
    chosen.set_timesteps(steps)
    if hasattr(chosen, "set_begin_index"):
        chosen.set_begin_index(begin)
    return chosen, chosen.add_noise(clean, draw(1, *clean.shape[2:]), chosen.timesteps[begin : begin + 1])


@pytest.mark.parametrize("begin", [0, 1, 4, 9])
@pytest.mark.parametrize("kind", KINDS)
def test_the_loop_of_diffusers_from_a_later_timestep(kind, begin):
    begin = begin // 2 * 2 if kind in ("HeunDiscrete", "KDPM2Discrete") else begin  # their steps are pairs of timesteps
    theirs, x = noised(kind, begin, draw(0))
    start, generator = x.clone(), torch.Generator().manual_seed(2)
    for t in theirs.timesteps[begin:]:
        predicted = network(theirs.scale_model_input(x, t), t)
        x = theirs.step(predicted, t, x, return_dict=False, **step_keywords(theirs, generator))[0]
    ours = sample(
        lambda windows, t, context: network(windows, t),
        start, PLAN, of(kind), num_inference_steps=10, begin=begin, generator=torch.Generator().manual_seed(2),
    )  # fmt: skip
    torch.testing.assert_close(ours, x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bridging", ["none", "shift", "economy", "centred", "dilated", "moments"])
def test_bridges_count_the_steps_that_are_taken(bridging):
    """The first step taken has nothing to re-use; a larger canvas than a window keeps its picture."""
    plan, seen = WindowPlan.minimum_coverage(16, 24, 8), []
    _, x = noised("DDIM", 6, draw(0, 16, 24))

    def denoiser(windows, t, context):
        seen.append((context.step, context.steps))
        return network(windows, t)

    settings = dict(num_inference_steps=10, begin=6, bridging=bridging, window_batch_size=9)
    assert sample(denoiser, x, plan, of("DDIM"), **settings).isfinite().all()
    assert seen[0] == (0, 4) and {steps for _, steps in seen} == {4}


def test_a_run_may_end_early_too():
    calls = []
    _, x = noised("DDIM", 3, draw(0))
    sample(
        lambda w, t, c: calls.append(int(t)) or w, x, PLAN, of("DDIM"), num_inference_steps=10, begin=3, evaluations=4
    )
    chosen = of("DDIM")
    chosen.set_timesteps(10)
    assert calls == chosen.timesteps[3:7].tolist()


@pytest.mark.parametrize("begin, error", [(10, ValueError), (-1, ValueError), (1.5, TypeError), (True, TypeError)])
def test_what_is_no_timestep_is_refused(begin, error):
    with pytest.raises(error, match="begin: expected"):
        sample(lambda w, t, c: w, draw(0), PLAN, of("DDIM"), num_inference_steps=10, begin=begin)

"""Schedulers as linear recurrences: which have one, what it reproduces, what finding it leaves untouched."""

import random
import warnings

import diffusers
import numpy as np
import pytest
import torch

from instantas import ops
from instantas.sampling.schedulers import MAX_HISTORY, probe, step_keywords
from instantas.testing.tiny import scheduler
from instantas.windows import WindowPlan

LINEAR = {  # scheduler -> entries of history that its steps look back on
    "DDIM": 0,
    "EulerDiscrete": 0,
    "DPMSolverMultistep": 1,
    "DPMSolverSinglestep": 1,
    "DEISMultistep": 1,
    "HeunDiscrete": 1,
    "KDPM2Discrete": 1,
    "UniPCMultistep": 2,
    "LMSDiscrete": 3,
    "PNDM": 4,
}
RANDOM = ("DDPM", "EulerAncestralDiscrete", "LCM", "KDPM2AncestralDiscrete")
PREDICTIONS = ("epsilon", "v_prediction")
STEPS = (1, 2, 7, 24)


def made(name, prediction_type="epsilon", steps=7, **config):
    if name == "PNDM":
        config = dict(skip_prk_steps=True) | config  # as Stable Diffusion has it
    made = scheduler(prediction_type, kind=getattr(diffusers, name + "Scheduler"), **config)
    made.set_timesteps(steps)
    return made


def followed(schedule, noise, eta=0.0):
    """Samples of the scheduler itself for given model outputs, noise[1:]."""
    x, samples = noise[0], []
    for t, output in zip(schedule.timesteps, noise[1:]):
        schedule.scale_model_input(x, t)
        x = schedule.step(output, t, x, return_dict=False, **step_keywords(schedule, eta=eta))[0]
        samples.append(x)
    return samples


def guided_steps(recurrence, noise):
    """Samples of `ops.guided_step` with the recurrence's coefficients, for the same outputs."""
    plan = WindowPlan.minimum_coverage(*noise.shape[-2:])
    x, k, samples = noise[0], recurrence.history, []
    history = torch.zeros(k, *x.shape, dtype=x.dtype) if k else None
    for row, keep, output in zip(recurrence.coefficients, recurrence.keep, noise[1:]):
        x, history = ops.guided_step(output[:, None], None, x, plan, row, 1.0, history=history, keep=keep)
        samples.append(x)
    return samples


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("name", LINEAR)
def test_the_recurrence_reproduces_the_scheduler(name, prediction_type, steps):
    schedule = made(name, prediction_type, steps)
    recurrence = probe(schedule)
    assert recurrence is not None and recurrence.history <= LINEAR[name]
    if steps >= 7:
        assert recurrence.history == LINEAR[name]
    assert len(recurrence.coefficients) == len(recurrence.keep) == len(schedule.timesteps)
    shape = (1 + len(schedule.timesteps), 2, 3, 5, 4)
    noise = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    for ours, theirs in zip(guided_steps(recurrence, noise), followed(schedule, noise)):
        assert (ours - theirs).norm() < 5e-5 * theirs.norm()  # theirs has tables in float32


@pytest.mark.parametrize("name", LINEAR)
def test_the_input_scale_is_the_schedulers(name):
    schedule = made(name)
    recurrence = probe(schedule)
    x = torch.full((1, 1, 1, 1), 2.0)
    scales = [schedule.scale_model_input(x, schedule.timesteps[0]).item() / 2]
    assert recurrence.input_scale[0].item() == pytest.approx(scales[0], rel=1e-5)
    scaled = name in ("EulerDiscrete", "LMSDiscrete", "HeunDiscrete", "KDPM2Discrete")
    assert bool((recurrence.input_scale != 1).any()) == scaled


@pytest.mark.parametrize("name", RANDOM)
def test_a_scheduler_that_draws_noise_has_no_recurrence(name):
    assert probe(made(name)) is None


@pytest.mark.parametrize(
    "name, config, eta",
    [
        ("DDIM", {}, 0.5),
        ("DDIM", dict(clip_sample=True), 0.0),
        ("DDIM", dict(clip_sample=True, clip_sample_range=3.0), 0.0),
        ("DDIM", dict(thresholding=True), 0.0),
        ("DPMSolverMultistep", dict(thresholding=True), 0.0),
        ("DPMSolverMultistep", dict(algorithm_type="sde-dpmsolver++"), 0.0),
        ("PNDM", dict(skip_prk_steps=False), 0.0),
    ],
    ids=str,
)
def test_what_is_not_a_short_recurrence_has_none(name, config, eta):
    assert probe(made(name, **config), eta) is None


@pytest.mark.parametrize(
    "name, config",
    [
        ("DPMSolverMultistep", dict(solver_order=3)),
        ("DPMSolverMultistep", dict(algorithm_type="dpmsolver", final_sigmas_type="sigma_min")),
        ("DPMSolverMultistep", dict(use_karras_sigmas=True)),
        ("UniPCMultistep", dict(solver_order=3)),
        ("EulerDiscrete", dict(use_karras_sigmas=True, timestep_spacing="trailing")),
        ("DDIM", dict(rescale_betas_zero_snr=True, timestep_spacing="trailing")),
    ],
    ids=str,
)
def test_other_settings_have_one_too(name, config):
    schedule = made(name, "v_prediction", 12, **config)
    recurrence = probe(schedule)
    assert recurrence is not None and recurrence.history <= MAX_HISTORY
    noise = torch.randn(13, 1, 2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    ours, theirs = guided_steps(recurrence, noise)[-1], followed(schedule, noise)[-1]
    assert (ours - theirs).norm() < 5e-5 * theirs.norm()


@pytest.mark.parametrize("name", [*LINEAR, *RANDOM])
def test_probing_touches_neither_the_scheduler_nor_random_states(name):
    schedule = made(name)
    before = {key: value for key, value in vars(schedule).items()}
    copies = {key: value.clone() for key, value in before.items() if isinstance(value, torch.Tensor)}
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    probe(schedule)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.random.get_state()[1].tolist() == states[1] and random.getstate() == states[2]
    assert all(map(torch.equal, torch.cuda.get_rng_state_all() if cuda else [], cuda))
    assert vars(schedule).keys() == before.keys()
    for key, value in vars(schedule).items():
        assert value is before[key] or value == before[key]
        if key in copies:  # some of diffusers' tables hold NaN
            torch.testing.assert_close(value, copies[key], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", [*LINEAR, *RANDOM])
def test_probing_warns_of_nothing(name):
    schedule = made(name)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        probe(schedule)
    assert not caught


def test_probing_does_not_seed_any_gpu(monkeypatch):
    """`torch.manual_seed` seeds every device; where there is no GPU, the call of it would go unseen."""
    seeded = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    probe(made("DDIM"))
    assert not seeded


def test_step_keywords_are_those_that_the_scheduler_takes():
    generator = torch.Generator()
    assert step_keywords(made("DDIM"), generator, 0.5) == {"generator": generator, "eta": 0.5}
    assert step_keywords(made("DDPM"), generator, 0.5) == {"generator": generator}
    assert step_keywords(made("PNDM"), generator, 0.5) == {}

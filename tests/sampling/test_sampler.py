"""The sampling loop against a plain one on the whole canvas: every scheduler, guidance, callbacks."""

import copy
import inspect
from unittest import mock

import pytest
import torch

from instantas.ops import validation
from instantas.pipelines.pipeline import InstantASPipeline
from instantas.sampling.sampler import sample
from instantas.sampling.step import StepContext
from instantas.testing.tiny import WINDOW, tiny_pipeline, unet
from instantas.windows import WindowPlan
from tests.sampling.runs import NATIVE, SCALE, WIDE, noise, of, plain_loop, pointwise, seeded

SCHEDULERS = (
    "DDIM",
    "DDPM",
    "PNDM",
    "EulerDiscrete",
    "EulerAncestralDiscrete",
    "DPMSolverMultistep",
    "DPMSolverSinglestep",
    "UniPCMultistep",
    "LMSDiscrete",
    "HeunDiscrete",
    "DEISMultistep",
    "KDPM2Discrete",
    "LCM",
)
PREDICTIONS = ("epsilon", "v_prediction")


def difference(ours, theirs):
    return ((ours - theirs).norm() / theirs.norm()).item()


# Every scheduler


@torch.no_grad()
@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("name", SCHEDULERS)
def test_one_native_window_is_a_plain_loop(name, prediction_type):
    net, texts = unet(), torch.randn(2, 16, 32, generator=seeded(1))

    def denoise(windows, t, context=None):
        both = net(torch.cat([windows] * 2), t, texts.repeat_interleave(len(windows), 0), return_dict=False)[0]
        return both.chunk(2)

    ours = sample(
        denoise,
        noise(NATIVE),
        NATIVE,
        of(name, prediction_type),
        num_inference_steps=6,
        guidance_scale=SCALE,
        generator=seeded(7),
    )
    assert difference(ours, plain_loop(denoise, noise(NATIVE), of(name, prediction_type))) < 1e-4


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("weight", [None, "gaussian"])
def test_any_windows_are_one_step_on_the_whole_canvas(name, prediction_type, weight):
    """Ancestral noise too is drawn once, over the whole canvas."""
    ours = sample(
        pointwise,
        noise(WIDE, 2),
        WIDE,
        of(name, prediction_type),
        num_inference_steps=6,
        guidance_scale=SCALE,
        generator=seeded(7),
        weight=weight and WIDE.weight(weight),
    )
    assert difference(ours, plain_loop(pointwise, noise(WIDE, 2), of(name, prediction_type))) < 1e-4


@pytest.mark.parametrize(
    "name, config, eta",
    [
        ("DDIM", dict(clip_sample=True), 0.0),
        ("DDIM", dict(thresholding=True), 0.0),
        ("DDIM", {}, 1.0),
        ("DDPM", dict(clip_sample=True), 0.0),
        ("DPMSolverMultistep", dict(thresholding=True), 0.0),
        ("DPMSolverMultistep", dict(algorithm_type="sde-dpmsolver++"), 0.0),
        ("EulerAncestralDiscrete", {}, 0.0),
        ("LCM", {}, 0.0),
        ("PNDM", dict(skip_prk_steps=False), 0.0),
    ],
    ids=str,
)
def test_what_is_not_linear_takes_one_global_step(name, config, eta, monkeypatch):
    schedule, stepped = of(name, **config), []
    step = type(schedule).step

    def counted(self, output, *args, **keywords):
        if self is schedule:
            stepped.append(tuple(output.shape))
        return step(self, output, *args, **keywords)

    counted.__signature__ = inspect.signature(step)
    monkeypatch.setattr(type(schedule), "step", counted)
    latents = noise(WIDE, 2)
    run = dict(num_inference_steps=6, guidance_scale=SCALE, generator=seeded(7), eta=eta)
    ours = sample(pointwise, latents, WIDE, schedule, **run)
    assert stepped == [tuple(latents.shape)] * len(schedule.timesteps)
    assert difference(ours, plain_loop(pointwise, latents, of(name, **config), eta=eta)) < 1e-4


def test_a_linear_scheduler_is_never_stepped_and_never_copied_during_the_run(monkeypatch):
    schedule, copied, counts = of("DPMSolverMultistep"), [], []
    deepcopy = copy.deepcopy

    def counting(value, *args):
        copied.append(isinstance(value, type(schedule)))
        return deepcopy(value, *args)

    def denoise(windows, timestep, context):
        counts.append(sum(copied))
        return pointwise(windows, timestep)

    monkeypatch.setattr(copy, "deepcopy", counting)
    sample(denoise, noise(WIDE), WIDE, schedule, num_inference_steps=6, window_batch_size=1)
    assert counts == [2] * 6 * WIDE.count  # those of `probe`, before the run
    assert schedule.step_index is None and schedule.model_outputs == [None] * 2


def test_ancestral_ddpm_follows_equation_7():
    """q(x_{t-1} | x_t, x_0): here x_0 = 0.3, so that mean and standard deviation are known."""
    schedule, x0, seen = of("DDPM", "sample"), 0.3, []
    latents = noise(WIDE, 2)
    sample(
        lambda windows, t, context: torch.full_like(windows, x0),
        latents,
        WIDE,
        schedule,
        timesteps=[500, 499],
        generator=seeded(7),
        callback=lambda i, t, x: seen.append(x),
    )
    abar = schedule.alphas_cumprod.double()
    now, before = abar[500], abar[499]
    beta = 1 - now / before
    mean = before.sqrt() * beta / (1 - now) * x0 + (1 - before) * (1 - beta).sqrt() / (1 - now) * latents
    variance = (1 - before) / (1 - now) * beta
    drawn = torch.randn(latents.shape, generator=seeded(7))
    assert difference(seen[0].double(), mean + variance.sqrt() * drawn) < 1e-5
    assert (seen[0] - mean).std().item() == pytest.approx(variance.sqrt().item(), rel=0.03)


# Guidance


def test_a_guidance_map_guides_each_cell():
    guidance = torch.rand(WIDE.height, WIDE.width, generator=seeded(2)) * 8
    ours = sample(pointwise, noise(WIDE), WIDE, of("DDIM"), num_inference_steps=5, guidance_scale=guidance)
    assert difference(ours, plain_loop(pointwise, noise(WIDE), of("DDIM"), guidance=guidance, steps=5)) < 1e-4
    ours = sample(pointwise, noise(WIDE), WIDE, of("DDPM"), num_inference_steps=5, guidance_scale=guidance,
                  generator=seeded(7))  # fmt: skip
    assert difference(ours, plain_loop(pointwise, noise(WIDE), of("DDPM"), guidance=guidance, steps=5)) < 1e-4


@pytest.mark.parametrize("name", ["DDIM", "EulerAncestralDiscrete"])
def test_a_rescaled_guidance_is_diffusers_over_the_whole_canvas(name):
    ours = sample(
        pointwise,
        noise(WIDE, 2),
        WIDE,
        of(name, "v_prediction"),
        num_inference_steps=6,
        guidance_scale=SCALE,
        guidance_rescale=0.7,
        generator=seeded(7),
    )
    assert difference(ours, plain_loop(pointwise, noise(WIDE, 2), of(name, "v_prediction"), rescale=0.7)) < 1e-4


def test_without_uncond_there_is_no_guidance():
    run = dict(num_inference_steps=5)
    alone = sample(lambda *args: pointwise(*args)[0], noise(WIDE), WIDE, of("DDIM"), guidance_scale=9.0, **run)
    pair = sample(lambda *args: (pointwise(*args)[0], None), noise(WIDE), WIDE, of("DDIM"), **run)
    both = sample(pointwise, noise(WIDE), WIDE, of("DDIM"), guidance_scale=1.0, **run)
    assert torch.equal(alone, pair)
    torch.testing.assert_close(alone, both)


# What the denoiser is told


def test_the_context_says_where_the_run_is():
    contexts, schedule = [], of("HeunDiscrete", "v_prediction")

    def denoise(windows, timestep, context):
        assert isinstance(context, StepContext) and timestep is context.timestep and timestep.dim() == 0
        contexts.append(context)
        return windows

    sample(denoise, noise(WIDE), WIDE, schedule, num_inference_steps=4, window_batch_size=WIDE.count)
    assert [c.step for c in contexts] == list(range(7)) and {c.steps for c in contexts} == {7}
    assert [c.timestep for c in contexts] == list(schedule.timesteps)
    assert all(c.plan is WIDE and c.view is None and c.level.predicts == "v_prediction" for c in contexts)


# Dtypes, steps, callbacks


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["DDIM", "EulerAncestralDiscrete", "UniPCMultistep"])
def test_latents_keep_their_dtype(name, dtype):
    def run(dtype):
        latents = noise(WIDE).to(dtype)
        seen = []

        def denoise(windows, timestep, context):
            seen.append(windows.dtype)
            return pointwise(windows, timestep)

        result = sample(denoise, latents, WIDE, of(name), num_inference_steps=4, guidance_scale=SCALE,
                        generator=seeded(7))  # fmt: skip
        assert result.dtype == dtype and set(seen) == {dtype}
        return result.double()

    ours = run(dtype)
    if dtype == torch.float64 and name == "EulerAncestralDiscrete":
        return  # other noise is drawn in another precision
    assert difference(ours, run(torch.float32)) < {torch.float16: 2e-3, torch.bfloat16: 2e-2}.get(dtype, 1e-6)


def test_timesteps_can_be_given():
    wanted = [900, 600, 300, 10]
    seen = []
    sample(lambda w, t, c: seen.append(int(t)) or w, noise(WIDE), WIDE, of("DPMSolverMultistep"), timesteps=wanted,
           window_batch_size=WIDE.count)  # fmt: skip
    assert seen == wanted


def test_timesteps_that_the_scheduler_has_are_kept():
    schedule = of("UniPCMultistep")
    schedule.set_timesteps(5)
    ours = sample(pointwise, noise(WIDE), WIDE, schedule, guidance_scale=SCALE)
    assert difference(ours, plain_loop(pointwise, noise(WIDE), of("UniPCMultistep"), steps=5)) < 1e-4


@pytest.mark.parametrize("name", ["DDIM", "EulerAncestralDiscrete"])
def test_callbacks_see_replace_and_stop(name):
    run = dict(num_inference_steps=6, guidance_scale=SCALE)
    schedule, seen = of(name), []
    result = sample(pointwise, noise(WIDE), WIDE, schedule, generator=seeded(),
                    callback=lambda i, t, x: seen.append((i, int(t), x)), **run)  # fmt: skip
    assert [(i, t) for i, t, _ in seen] == list(enumerate(schedule.timesteps.int().tolist()))
    assert seen[-1][2] is result

    zeros = torch.zeros_like(result)
    replaced = sample(pointwise, noise(WIDE), WIDE, of(name), callback=lambda i, t, x: zeros if i == 5 else None, **run)
    assert replaced is zeros

    def stop(i, t, x):
        if i == 2:
            raise StopIteration

    stopped = sample(pointwise, noise(WIDE), WIDE, of(name), generator=seeded(), callback=stop, **run)
    assert torch.equal(stopped, seen[2][2])


def test_a_callback_gives_latents_of_the_canvas_in_any_dtype():
    run = dict(num_inference_steps=3, guidance_scale=SCALE)
    wanted = sample(pointwise, noise(WIDE), WIDE, of("DDIM"), callback=lambda i, t, x: x + 1, **run)
    given = sample(pointwise, noise(WIDE), WIDE, of("DDIM"), callback=lambda i, t, x: x.double() + 1, **run)
    assert given.dtype == torch.float32 and difference(given, wanted) < 1e-6
    for error, wrong, got in (
        (TypeError, lambda x: {"latents": x}, "dict"),
        (ValueError, lambda x: torch.cat([x, x]), r"\(2, 4, "),
        (ValueError, lambda x: x.mT, r"\(1, 4, "),
    ):
        with pytest.raises(error, match=rf"^callback: expected latents \(1, 4, .*\) or None from it, got {got}"):
            sample(pointwise, noise(WIDE), WIDE, of("DDIM"), callback=lambda i, t, x, wrong=wrong: wrong(x), **run)


def test_a_generator_for_each_picture():
    run = dict(num_inference_steps=4, guidance_scale=SCALE)
    latents = noise(WIDE, 2)
    both = sample(pointwise, latents, WIDE, of("DDPM"), generator=[seeded(3), seeded(4)], **run)
    for i, seed in enumerate((3, 4)):
        alone = sample(pointwise, latents[i : i + 1], WIDE, of("DDPM"), generator=[seeded(seed)], **run)
        torch.testing.assert_close(both[i], alone[0])


def test_gradients_reach_the_denoiser():
    gain = torch.ones((), requires_grad=True)
    result = sample(lambda w, t, c: (gain * w, 0.5 * w), noise(WIDE), WIDE, of("DDIM"), num_inference_steps=3,
                    guidance_scale=SCALE, window_batch_size=3)  # fmt: skip
    result.square().sum().backward()
    plain = torch.ones((), requires_grad=True)
    theirs = plain_loop(lambda w, t: (plain * w, 0.5 * w), noise(WIDE), of("DDIM"), steps=3)
    theirs.square().sum().backward()
    assert gain.grad.item() == pytest.approx(plain.grad.item(), rel=1e-4)


# Inference mode, which servers run everything in


@pytest.mark.parametrize("bridging", ["none", "shift", "centred", "dilated", "moments", "economy+moments"])
@pytest.mark.parametrize("weighted", [False, True])
def test_inference_mode_is_the_same_run(bridging, weighted):
    """On a canvas that the windows do not tile; a weight is read before the first step alone; the plan holds after."""
    plan = WindowPlan.minimum_coverage(WINDOW + 3, 2 * WINDOW - 5, WINDOW)
    weight = torch.linspace(0.5, 2, WINDOW**2).view(WINDOW, WINDOW) if weighted else None
    looked, at = mock.Mock(side_effect=validation.weight_total), []
    settings = dict(num_inference_steps=6, guidance_scale=2.0, bridging=bridging, weight=weight)
    plain = sample(pointwise, noise(plan), plan, of("DDIM"), **settings)
    with torch.inference_mode(), mock.patch.object(validation, "weight_total", looked):
        settings["weight"] = weight if weight is None else weight.clone()
        settings["callback"] = lambda i, t, latents: at.append(looked.call_count)
        served = sample(pointwise, noise(plan), plan, of("DDIM"), **settings)
    assert torch.equal(served, plain) and len(set(at)) == 1
    gain = torch.ones((), requires_grad=True)
    sample(lambda w, t, c: gain * w, noise(plan), plan, of("DDIM"), **settings | {"weight": weight}).sum().backward()
    assert gain.grad.isfinite() and gain.grad != 0


@pytest.mark.parametrize("size", [(40, 56), (72, 40), (32, 32)])
def test_a_pipeline_in_inference_mode(size):
    pipe = InstantASPipeline.from_pipe(tiny_pipeline())
    settings = dict(height=4 * size[0], width=4 * size[1], num_inference_steps=3, output_type="latent")
    plain = pipe("water", generator=seeded(), **settings).images
    with torch.inference_mode():
        served = pipe("water", generator=seeded(), **settings).images
    assert torch.equal(served, plain)


@pytest.mark.parametrize("interval", [(0.0, 0.5), (0.3, 0.8), (0.6, 1.0)])
@pytest.mark.parametrize("saved", [False, True])
@pytest.mark.parametrize("bridging", ["none", "economy"])
def test_outside_of_its_interval_guidance_is_1(interval, saved, bridging):
    """Whether or not the denoiser saves the unconditional prediction; re-used predictions are the prompt's then."""
    steps, calls = 8, []

    def denoiser(windows, timestep, context):
        cond, uncond = pointwise(windows, timestep)
        if context.step not in [step for step, _ in calls]:
            calls.append((context.step, context.guided))
        return cond, uncond if context.guided or not saved else None

    def scale(context):
        return SCALE if interval[0] <= context.step / context.steps < interval[1] else None

    settings = dict(num_inference_steps=steps, bridging=bridging)
    result = sample(
        denoiser, noise(WIDE), WIDE, of("DDIM"), guidance_scale=SCALE, guidance_interval=interval, **settings
    )
    wanted = sample(pointwise, noise(WIDE), WIDE, of("DDIM"), guidance_scale=scale, **settings)
    torch.testing.assert_close(result, wanted, rtol=1e-5, atol=1e-5)
    assert all(guided is (interval[0] <= step / steps < interval[1]) for step, guided in calls)
    everywhere = sample(pointwise, noise(WIDE), WIDE, of("DDIM"), guidance_scale=SCALE, **settings)
    assert not torch.allclose(result, everywhere, rtol=1e-3, atol=1e-3)

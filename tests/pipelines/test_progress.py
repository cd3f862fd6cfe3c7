"""Regions that come and go in loops that are not ours: they count the run, evaluation by evaluation, as ours does."""

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2DiscreteScheduler,
    PNDMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionXLImg2ImgPipeline,
)

from instantas.pipelines.attention import regional_prompts
from instantas.pipelines.pipeline import InstantASPipeline
from instantas.pipelines.progress import Progress
from instantas.regions import Region
from instantas.testing import tiny

ALL = (0.0, 0.0, 1.0, 1.0)
KINDS = [
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2DiscreteScheduler,
    PNDMScheduler,
]


@pytest.fixture
def seen(monkeypatch):
    """What every evaluation of a network was told."""
    told, usual = [], Progress.__call__

    def remember(self, *args):
        told.append(usual(self, *args))
        return told[-1]

    monkeypatch.setattr(Progress, "__call__", remember)
    return told


@pytest.fixture(scope="module")
def image():
    return torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(0))


def error(got, wanted):
    return float((got - wanted).norm() / wanted.norm())


def paint(pipe, *args, **settings):
    generator = torch.Generator().manual_seed(7)
    return pipe(*args, generator=generator, output_type="latent", **settings).images


def picture_to_picture(kind):
    return tiny.tiny_pipeline(kind=StableDiffusionImg2ImgPipeline, scheduler=tiny.scheduler(kind=kind))


def evenly(seen, count):
    assert len(seen) == count and seen == [pytest.approx(i / count) for i in range(count)]
    seen.clear()


@pytest.mark.parametrize("kind", KINDS)
def test_every_evaluation_of_a_whole_run_and_of_a_part(seen, image, kind):
    pipe, moving = picture_to_picture(kind), [Region("grass", box=ALL, end=0.5)]
    whole = tiny.tiny_pipeline(scheduler=tiny.scheduler(kind=kind))
    with regional_prompts(whole, moving):
        for _ in range(2):
            paint(whole, "stone", num_inference_steps=4)
            evenly(seen, len(whole.scheduler.timesteps))
    with regional_prompts(pipe, moving):
        for strength in (0.5, 0.25, 0.8):  # shorter and longer ones of one scheduler
            paint(pipe, "stone", image, strength=strength, num_inference_steps=8)
            evenly(seen, pipe.num_timesteps)


@pytest.mark.parametrize("kind", [DDIMScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler])
@pytest.mark.parametrize("half", [dict(end=0.5), dict(start=0.5)])
def test_half_of_a_run_that_starts_with_a_picture(image, kind, half):
    """As diffusers with a prompt that is changed in the middle of its run."""
    pipe = picture_to_picture(kind)
    settings = dict(image=image, strength=0.5, num_inference_steps=8)
    words = ("grass", "stone") if "end" in half else ("stone", "grass")
    embedded = [torch.cat(pipe.encode_prompt(word, "cpu", 1, True)[::-1]) for word in words]

    def change(pipe, step, timestep, kwargs):
        return {"prompt_embeds": embedded[(step + 1) / pipe.num_timesteps >= 0.5]}

    wanted = paint(pipe, words[0], callback_on_step_end=change, **settings)
    with regional_prompts(pipe, [Region("grass", box=ALL, **half)]):
        got = paint(pipe, "stone", **settings)
    assert error(got, wanted) < 1e-4
    assert min(error(paint(pipe, word, **settings), wanted) for word in words) > 1e-3


@pytest.mark.parametrize("change", [dict(start=0.4), dict(end=0.6), dict(start=0.25, end=0.5)])
@pytest.mark.parametrize("kind", [HeunDiscreteScheduler, KDPM2DiscreteScheduler, PNDMScheduler])
def test_a_step_of_two_evaluations_counts_as_in_our_own_run(kind, change):
    pipe, regions = tiny.tiny_pipeline(scheduler=tiny.scheduler(kind=kind)), [Region("grass", box=ALL, **change)]
    wanted = paint(InstantASPipeline.from_pipe(pipe), "stone", regions=regions, num_inference_steps=4)
    with regional_prompts(pipe, regions):
        got = paint(pipe, "stone", num_inference_steps=4)
    assert error(got, wanted) < 1e-4


@pytest.mark.parametrize("kind", [DDIMScheduler, EulerDiscreteScheduler])
def test_a_run_whose_end_another_model_paints(seen, image, kind):
    pipe = tiny.tiny_xl_pipeline()
    pipe.scheduler = tiny.scheduler(kind=kind)
    with regional_prompts(pipe, [Region("grass", box=ALL, end=0.5)]):
        latents = paint(pipe, "stone", denoising_end=0.5, num_inference_steps=8)
    evenly(seen, pipe.num_timesteps)
    refiner = StableDiffusionXLImg2ImgPipeline(**pipe.components, add_watermarker=False)
    refiner.set_progress_bar_config(disable=True)
    with regional_prompts(refiner, [Region("grass", box=ALL, end=0.5)]):
        paint(refiner, "stone", image=latents, denoising_start=0.5, num_inference_steps=8)
    evenly(seen, refiner.num_timesteps)


@pytest.mark.parametrize("kind", [DDIMScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler, PNDMScheduler])
@torch.no_grad()
def test_a_loop_of_ones_own(seen, kind):
    config = dict(skip_prk_steps=True) if kind is PNDMScheduler else {}
    pipe = tiny.tiny_pipeline(scheduler=tiny.scheduler(kind=kind, **config))
    scheduler, words = pipe.scheduler, pipe.encode_prompt("stone", "cpu", 1, False)[0]
    regions = [Region("grass", box=ALL, end=0.5)]
    with regional_prompts(pipe, regions, classifier_free_guidance=False):
        for skipped in (0, 4):  # from the start, and from somewhere inside
            scheduler.set_timesteps(6)
            run = scheduler.timesteps[skipped:]
            sample = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(2))
            for t in run:
                prediction = pipe.unet(scheduler.scale_model_input(sample, t), t, words).sample
                sample = scheduler.step(prediction, t, sample).prev_sample
            evenly(seen, len(run))


@torch.no_grad()
def test_a_step_evaluated_in_two_calls_and_one_scheduler_for_two_runs(seen):
    """Unconditional and conditional evaluations apart; a second run without new timesteps."""
    pipe = tiny.tiny_pipeline()
    sample, words = torch.randn(1, 4, 16, 16), pipe.encode_prompt("stone", "cpu", 1, False)[0]
    pipe.scheduler.set_timesteps(4)
    with regional_prompts(pipe, [Region("grass", box=ALL, end=0.5)], classifier_free_guidance=False):
        for first in (0, 0, 1):
            for t in pipe.scheduler.timesteps[first:]:
                for _ in range(2):
                    pipe.unet(sample, t, words)
            count = 4 - first
            assert seen == [pytest.approx(i // 2 / count) for i in range(2 * count)]
            seen.clear()

"""A start on a smaller canvas through the pipeline: what belongs to the canvas becomes smaller with it."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import (
    EulerDiscreteScheduler,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    PNDMScheduler,
    StableDiffusionControlNetPipeline,
)
from PIL import Image

from instantas.pipelines.pipeline import InstantASPipeline
from instantas.regions import Region, RegionMap
from instantas.sampling import coarse
from instantas.testing import tiny

NATIVE = tiny.WINDOW * tiny.CELL
LEFT, ALL = (0.0, 0.0, 0.5, 1.0), (0.0, 0.0, 1.0, 1.0)
SIZE = dict(height=2 * NATIVE, width=2 * NATIVE)


@pytest.fixture(scope="module")
def pipe():
    return InstantASPipeline.from_pipe(tiny.tiny_pipeline())


def paint(pipe, prompt="the water", **settings):
    generator = torch.Generator().manual_seed(0)
    settings = dict(num_inference_steps=4, guidance_scale=4.0, output_type="latent", generator=generator) | settings
    return pipe(prompt, **SIZE | dict(start="coarse") | settings).images


def calls(network):
    """Collects the arguments of a network's calls."""
    seen = []
    network.register_forward_pre_hook(lambda m, a, k: seen.append((a, k)), with_kwargs=True)
    return seen


def error(got, wanted):
    return float((got - wanted).norm() / wanted.norm())


def test_windows_are_counted_before_the_run():
    theirs = tiny.tiny_pipeline()
    pipe, seen = InstantASPipeline.from_pipe(theirs), calls(theirs.unet)
    paint(pipe, num_images_per_prompt=2)
    theirs.scheduler.set_timesteps(4)
    runs = coarse.legs(coarse.CoarseStart(), pipe.plan(2 * NATIVE, 2 * NATIVE), theirs.scheduler)
    assert [run.plan.count for run in runs] == [1, 4]
    # both branches of guidance of two pictures
    assert sum(len(a[0]) for a, _ in seen) == 4 * coarse.evaluations("default", runs)


@pytest.mark.parametrize(
    "size, wrap", [((200, 332), (False, False)), ((200, 328), (False, True)), ((NATIVE, 3 * NATIVE), (False, False))]
)
def test_any_size_and_canvases_that_wrap(pipe, size, wrap):
    size = dict(zip(("height", "width"), size))
    latents = paint(pipe, **size, wrap=wrap, num_inference_steps=2)
    assert latents.shape[2:] == pipe.canvas(**size) and latents.isfinite().all()


def test_regions_become_smaller_with_the_canvas(pipe):
    """Everywhere one prompt is that prompt alone; masks are averaged over a cell of the smaller canvas."""
    plain = paint(pipe, "grass")
    mask = np.random.default_rng(0).random((2 * NATIVE, 2 * NATIVE))
    regions = [Region("grass", mask=mask), Region("grass", box=LEFT), Region("grass", box=ALL)]
    assert error(paint(pipe, regions=regions), plain) < 1e-4
    assert error(paint(pipe), plain) > 1e-3
    drawn = RegionMap(regions, 2 * NATIVE, 2 * NATIVE, tiny.CELL)
    smaller, cell = drawn.at((16, 16)), 2 * tiny.CELL
    expected = mask.reshape(16, cell, 16, cell).mean((1, 3))
    torch.testing.assert_close(smaller.masks[0, 0], torch.from_numpy(expected).float(), atol=1e-6, rtol=0)
    assert smaller.latents == (16, 16) and drawn.at((16, 16)) is smaller and drawn.at((32, 32)) is drawn


def test_guidance_of_regions_becomes_smaller(pipe):
    """Of one scale everywhere it is that scale."""
    plain = paint(pipe, "grass", guidance_scale=6.0)
    assert error(paint(pipe, "grass", regions=[Region("grass", box=ALL, guidance_scale=6.0)]), plain) < 1e-4


def test_control_pictures_become_smaller():
    theirs = tiny.tiny_pipeline(kind=StableDiffusionControlNetPipeline, controlnet=tiny.tiny_controlnet())
    seen = calls(theirs.controlnet)
    drawn = np.random.default_rng(0).integers(0, 256, (2 * NATIVE, 2 * NATIVE, 3), dtype=np.uint8)
    paint(InstantASPipeline.from_pipe(theirs), image=Image.fromarray(drawn))
    shown = [k["controlnet_cond"] for _, k in seen]
    halved = torch.from_numpy(drawn / 255).reshape(NATIVE, 2, NATIVE, 2, 3).mean((1, 3)).permute(2, 0, 1).float()
    torch.testing.assert_close(shown[0][0], halved, atol=1e-5, rtol=0)
    corner = torch.from_numpy(drawn[:NATIVE, :NATIVE] / 255).permute(2, 0, 1).float()
    assert any(torch.allclose(windows[0], corner, atol=1e-5) for windows in shown)


def test_sdxl_is_told_that_the_smaller_canvas_is_whole():
    theirs = tiny.tiny_xl_pipeline()
    seen = calls(theirs.unet)
    paint(InstantASPipeline.from_pipe(theirs))
    ids = [k["added_cond_kwargs"]["time_ids"][0].tolist() for _, k in seen]
    assert ids[0] == [NATIVE, NATIVE, 0, 0, NATIVE, NATIVE]
    assert ids[-1][:2] == [2 * NATIVE, 2 * NATIVE]


def test_callbacks_see_the_canvas_at_hand(pipe):
    told = []

    def callback(held, step, timestep, tensors):
        told.append((step, held.num_timesteps, tuple(tensors["latents"].shape[2:])))
        return {}

    paint(pipe, callback_on_step_end=callback)
    steps = [step for step, *_ in told]
    assert steps == list(range(told[0][1])) and [size for *_, size in told] == [(16, 16)] * 2 + [(32, 32)] * (
        len(told) - 2
    )


def test_an_interrupted_run_gives_the_size_that_was_asked_for(pipe):
    def callback(held, step, timestep, tensors):
        held._interrupt = True
        return {}

    assert paint(pipe, callback_on_step_end=callback, output_type="np").shape[1:3] == (2 * NATIVE, 2 * NATIVE)


def test_what_was_denoised_is_of_the_size_that_was_asked_for_too():
    """Of a pipeline that decodes the clean latents, which a consistency model gives at each step."""
    theirs = tiny.tiny_pipeline(kind=LatentConsistencyModelPipeline, unet=tiny.unet(time_cond_proj_dim=16))
    theirs.scheduler, kept = LCMScheduler.from_config(theirs.scheduler.config), []

    def callback(held, step, timestep, tensors):
        kept.append(tensors["denoised"])
        held._interrupt = True
        return {}

    told = dict(callback_on_step_end=callback, callback_on_step_end_tensor_inputs=["denoised"])
    found, (small,) = paint(InstantASPipeline.from_pipe(theirs), **told), kept
    assert small.shape[2:] == (16, 16) and found.shape[2:] == (32, 32)
    torch.testing.assert_close(F.adaptive_avg_pool2d(found, 1), F.adaptive_avg_pool2d(small, 1))


@pytest.mark.parametrize(
    "settings, kind, message",
    [
        (dict(start="fine"), ValueError, "start: expected one of default, none, coarse, got 'fine'"),
        (dict(start=1.5), TypeError, "start: expected a name or a CoarseStart"),
        (dict(method="multidiffusion"), ValueError, 'start: expected "none" with multidiffusion'),
        (
            dict(image=Image.new("RGB", (8, 8)), strength=0.5),
            ValueError,
            'start: expected "none" with a picture to start from',
        ),
        (dict(denoising_end=0.4), ValueError, "start: expected to go on before the run's end"),
    ],
)
def test_what_does_not_go_together_is_refused(pipe, monkeypatch, settings, kind, message):
    monkeypatch.setattr(pipe.unet, "forward", lambda *a, **k: pytest.fail("the network was evaluated"))
    with pytest.raises(kind, match=message):
        paint(pipe, **settings)


@pytest.mark.parametrize(
    "settings, begins",
    [
        (dict(), "coarse"),
        (dict(start="none"), "none"),
        (dict(method="multidiffusion", stride=8, num_inference_steps=1), "none"),
        (dict(num_inference_steps=2), "none"),  # it would take as many evaluations, and more
        (dict(num_inference_steps=3), "coarse"),
        (dict(num_inference_steps=3, bridging="economy"), "none"),  # 4 evaluations, with a smaller canvas 5
        (dict(denoising_end=0.4), "none"),
        (dict(image=Image.new("RGB", (2 * NATIVE, 2 * NATIVE)), strength=0.5), "none"),
        (dict(latents=torch.randn(1, 4, 32, 32, generator=torch.Generator().manual_seed(1))), "none"),
        (dict(width=NATIVE), "none"),
    ],
    ids=lambda value: value if isinstance(value, str) else ", ".join(value) or "all",
)
def test_the_models_own_start_is_the_default_where_it_is_possible_and_saves_evaluations(pipe, settings, begins):
    own = InstantASPipeline(pipe.pipe, {"start": "coarse"})
    found = paint(own, **dict(start="default", num_inference_steps=10) | settings)
    assert torch.equal(found, paint(own, **dict(num_inference_steps=10) | settings | dict(start=begins)))


def test_a_scheduler_that_cannot_begin_late_has_no_coarse_start_by_default(pipe):
    theirs = tiny.tiny_pipeline()
    theirs.scheduler = PNDMScheduler.from_config(theirs.scheduler.config)
    own = InstantASPipeline(theirs, {"start": "coarse"})
    few = dict(num_inference_steps=10)
    assert torch.equal(paint(own, start="default", **few), paint(own, start="none", **few))
    with pytest.raises(ValueError, match="start: expected a scheduler whose steps can begin at any timestep"):
        paint(own, **few)


@pytest.mark.parametrize("given", [dict(timesteps=[950, 600, 200]), dict(sigmas=[9.0, 3.0, 1.0, 0.0])], ids=str)
def test_timesteps_that_are_given_are_those_of_every_evaluation_by_default(given):
    theirs = tiny.tiny_pipeline()
    theirs.scheduler = EulerDiscreteScheduler.from_config(theirs.scheduler.config)
    own, few = InstantASPipeline(theirs, {"start": "coarse"}), dict(num_inference_steps=None)
    assert torch.equal(paint(own, start="default", **few, **given), paint(own, start="none", **few, **given))


def test_a_model_without_a_start_of_its_own_has_none(pipe):
    assert torch.equal(paint(pipe, start="default"), paint(pipe, start="none"))
    with pytest.raises(ValueError, match="start: expected one of none, coarse, got 'fine'"):
        paint(InstantASPipeline(pipe.pipe, {"start": "fine"}), start="default")

"""Starts from a picture: at one native window diffusers' img2img, at any other size the same through windows."""

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    StableDiffusionControlNetImg2ImgPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionXLImg2ImgPipeline,
)
from PIL import Image

from instantas import InstantASPipeline, Region
from instantas.pipelines import pipeline
from instantas.pipelines.starts import first_timestep, stages
from instantas.sampling.sampler import sample
from instantas.testing.tiny import scheduler, tiny_controlnet, tiny_pipeline, tiny_xl_pipeline
from tests.pipelines.starting import close, latents_of, photo, seeded


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize(
    "kind", ["DDIM", "EulerDiscrete", "EulerAncestralDiscrete", "DPMSolverMultistep", "HeunDiscrete", "PNDM"]
)
@pytest.mark.parametrize("strength", [0.35, 1.0])
def test_diffusers_img2img(kind, strength):
    config = dict(skip_prk_steps=True) if kind == "PNDM" else {}
    pipe = tiny_pipeline()
    pipe.scheduler = scheduler(kind=getattr(diffusers, f"{kind}Scheduler"), **config)
    components = {k: v for k, v in pipe.components.items()}
    theirs = quiet(StableDiffusionImg2ImgPipeline(**components, requires_safety_checker=False))
    given = dict(image=photo(), strength=strength)
    close(latents_of(InstantASPipeline.from_pipe(pipe), **given), latents_of(theirs, **given))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_diffusers_img2img_of_sdxl(prediction_type):
    pipe = tiny_xl_pipeline(prediction_type)
    theirs = quiet(StableDiffusionXLImg2ImgPipeline(**pipe.components, add_watermarker=False))
    given = dict(image=photo(), strength=0.6)
    close(latents_of(InstantASPipeline.from_pipe(pipe), **given), latents_of(theirs, **given))


def test_diffusers_img2img_with_a_controlnet():
    pipe = tiny_pipeline(kind=StableDiffusionControlNetPipeline, controlnet=tiny_controlnet())
    theirs = quiet(StableDiffusionControlNetImg2ImgPipeline(**pipe.components, requires_safety_checker=False))
    given = dict(image=photo(), control_image=photo(seed=1), strength=0.6, controlnet_conditioning_scale=0.9)
    close(latents_of(InstantASPipeline.from_pipe(pipe), **given), latents_of(theirs, **given))


def test_several_prompts_pictures_and_generators():
    pipe = tiny_pipeline()
    theirs = quiet(StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False))
    ours, prompts = InstantASPipeline.from_pipe(pipe), ["red brick", "grass"]
    given = dict(prompt=prompts, image=[photo(), photo(seed=1)], strength=0.5)
    close(*(latents_of(p, **given, generator=[seeded(3), seeded(4)]) for p in (ours, theirs)))
    one = dict(prompt=prompts, image=photo(), strength=0.5)
    close(*(latents_of(p, **one, generator=[seeded(3), seeded(4)]) for p in (ours, theirs)))
    copies = latents_of(ours, image=photo(), strength=0.5, num_images_per_prompt=2)
    assert len(copies) == 2 and not torch.allclose(copies[0], copies[1])


@pytest.mark.parametrize("bridging", ["none", "shift", "economy", "centred", "moments"])
def test_a_large_picture_goes_through_windows(bridging):
    """As many evaluations as strength asks for, and what little noise there is leaves the picture what it was."""
    ours, seen = InstantASPipeline.from_pipe(tiny_pipeline()), []
    width, height, steps = 300, 200, 10

    def look(pipe, step, timestep, tensors):
        seen.append((step, pipe.num_timesteps))
        return {}

    settings = dict(image=photo(width, height), strength=0.3, bridging=bridging, callback_on_step_end=look)
    image = ours("grass", num_inference_steps=steps, generator=seeded(), **settings).images[0]
    assert image.size == (width, height) and seen == [(i, 3) for i in range(3)]


def test_windows_move_from_the_first_step_beside_a_picture(monkeypatch):
    """The picture and the noise on it are known: no border is left where windows would have rested."""
    ours, begun = InstantASPipeline.from_pipe(tiny_pipeline()), []
    monkeypatch.setattr(pipeline, "sample", lambda *args, **how: begun.append((args, how)) or sample(*args, **how))
    latents_of(ours, image=photo(300, 200), strength=0.5)
    ((_, x, _, chosen), how) = begun[0]
    clean, noise = how["origin"]
    assert torch.equal(chosen.add_noise(clean, noise, chosen.timesteps[how["begin"]][None]), x)
    latents_of(ours, height=200, width=300)
    assert begun[1][1]["origin"] is None


def test_the_pictures_size_is_the_default_and_another_resizes_it():
    ours = InstantASPipeline.from_pipe(tiny_pipeline())
    settings = dict(strength=0.5, num_inference_steps=2, generator=seeded())
    assert ours("grass", image=photo(150, 90), **settings).images[0].size == (150, 90)
    large = photo(96, 64).resize((192, 128), Image.Resampling.LANCZOS)
    resized = latents_of(ours, image=photo(96, 64), height=128, width=192, strength=0.5)
    close(resized, latents_of(ours, image=large, strength=0.5))


def test_regions_and_wraps_beside_a_start():
    ours = InstantASPipeline.from_pipe(tiny_pipeline())
    plain = latents_of(ours, image=photo(256, 128), strength=0.5)
    whole = latents_of(
        ours, image=photo(256, 128), strength=0.5, regions=[Region("red brick", box=(0.0, 0.0, 1.0, 1.0))]
    )
    close(whole, plain)
    round_ = latents_of(ours, image=photo(256, 128), strength=0.5, wrap=(False, True))
    assert round_.isfinite().all() and not torch.allclose(round_, plain)


def test_a_picture_that_fits_is_changed_less_by_less_strength():
    ours, picture = InstantASPipeline.from_pipe(tiny_pipeline()), photo(200, 136)
    clean = latents_of(ours, image=picture, strength=0.1, num_inference_steps=10, guidance_scale=1.0)
    apart = [
        (latents_of(ours, image=picture, strength=strength, num_inference_steps=10) - clean).square().mean()
        for strength in (0.2, 0.9)
    ]
    assert apart[0] < apart[1]


@pytest.mark.parametrize(
    "settings, error, message",
    [
        (dict(strength=1.1), ValueError, "strength: expected"),
        (dict(strength="0.5"), TypeError, "strength: expected a number"),
        (dict(strength=0.05, num_inference_steps=10), ValueError, "strength: expected at least 0.1, one of 10 steps"),
        (dict(strength=0.5, image=None), ValueError, "image: expected a picture"),
        (dict(strength=0.5, image="photo.png"), TypeError, "image: expected pictures"),
        (
            dict(strength=0.5, image=[photo()] * 3),
            ValueError,
            "image: expected one picture, or one for each of 1 prompts",
        ),
        (
            dict(strength=0.5, image=torch.full((3, 128, 128), float("nan"))),
            ValueError,
            "image: expected finite values",
        ),
        (
            dict(strength=0.5, latents=torch.zeros(1, 4, 16, 16)),
            ValueError,
            "image: expected a picture in place of latents",
        ),
        (
            dict(strength=0.5, control_image=photo()),
            ValueError,
            "^control_image: expected None, as the pipeline has no ControlNet",
        ),
        (dict(control_image=photo(), image=None), ValueError, "control_image: expected None without strength"),
        (
            dict(image=photo()),
            ValueError,
            "^image: expected strength or mask_image beside it, or None, as the pipeline has no ControlNet",
        ),
    ],
)
def test_bad_input_is_named(settings, error, message):
    ours = InstantASPipeline.from_pipe(tiny_pipeline())
    with pytest.raises(error, match=message):
        ours("grass", **dict(image=photo()) | settings)


def test_first_timesteps():
    chosen = scheduler()
    chosen.set_timesteps(10)
    assert [first_timestep(chosen, strength) for strength in (0.1, 0.35, 0.99, 1.0, 1)] == [9, 7, 1, 0, 0]


# Enlarging


@pytest.mark.parametrize(
    "size, scale, expected",
    [
        ((100, 60), 2, [(200, 120)]),
        ((100, 60), 4, [(200, 120), (400, 240)]),
        ((33, 47), 1.5, [(50, 70)]),
        ((10, 10), 3, [(17, 17), (30, 30)]),
    ],
)
def test_stages_at_most_double(size, scale, expected):
    assert stages(size, scale) == expected


def test_upscaling_is_stages_of_img2img():
    ours, settings = InstantASPipeline.from_pipe(tiny_pipeline()), dict(num_inference_steps=4, strength=0.5)
    large = ours.upscale(photo(60, 40), 4, "grass", generator=seeded(), **settings).images[0]
    generator = seeded()
    step = ours("grass", image=photo(60, 40), height=80, width=120, generator=generator, **settings).images
    by_hand = ours("grass", image=step, height=160, width=240, generator=generator, **settings).images[0]
    assert large.size == (240, 160)
    np.testing.assert_array_equal(np.asarray(large), np.asarray(by_hand))


def test_upscaling_tells_a_controlnet_the_picture():
    pipe = tiny_pipeline(kind=StableDiffusionControlNetPipeline, controlnet=tiny_controlnet())
    ours = InstantASPipeline.from_pipe(pipe)
    settings = dict(num_inference_steps=2, strength=0.5, output_type="np")
    said = ours.upscale(photo(80, 80), 2, "grass", generator=seeded(), **settings).images
    same = dict(image=photo(80, 80), control_image=photo(80, 80), height=160, width=160, generator=seeded())
    np.testing.assert_array_equal(said, ours("grass", **same, **settings).images)


@pytest.mark.parametrize(
    "arguments, settings, message",
    [
        ((photo(), 1), {}, "scale: expected more than 1"),
        ((photo(), 0.5), {}, "scale: expected"),
        ((photo(), 1.001), {}, "scale: expected one that makes 128x128 pixels more, got 1.001"),
        ((photo(), 1 + 1e-12), {}, "scale: expected one that makes 128x128 pixels more"),
        ((None, 2), {}, "image: expected a picture"),
        ((photo(), 2), dict(height=64), "height: expected none beside scale"),
        (
            (photo(), 4),
            dict(regions=[Region("grass", box=(0.0, 0.0, 1.0, 1.0))]),
            "regions: expected none with a scale",
        ),
    ],
)
def test_what_cannot_be_enlarged_is_named(arguments, settings, message):
    with pytest.raises(ValueError, match=message):
        InstantASPipeline.from_pipe(tiny_pipeline()).upscale(*arguments, "grass", **settings)

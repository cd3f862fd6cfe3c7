"""The pipeline against diffusers' own: StableDiffusionPipeline on a native window, the panorama pipeline at strides."""

import diffusers
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionControlNetPipeline, StableDiffusionPanoramaPipeline, StableDiffusionPipeline

from instantas import demo
from instantas.pipelines.pipeline import InstantASPipeline
from instantas.regions import Region
from instantas.testing.tiny import (
    CELL,
    WINDOW,
    autoencoder,
    scheduler,
    tiny_controlnet,
    tiny_pipeline,
    tiny_xl_pipeline,
    unet,
)

NATIVE = WINDOW * CELL
SCHEDULERS = {
    "DDIM": {},
    "DDPM": {},
    "PNDM": {},
    "EulerDiscrete": {},
    "EulerAncestralDiscrete": {},
    "DPMSolverMultistep": {},
    "DPMSolverSinglestep": {},
    "UniPCMultistep": {},
    "LMSDiscrete": {},
    "HeunDiscrete": {},
    "DEISMultistep": {},
    "KDPM2Discrete": {},
    "LCM": {},
}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def difference(ours, theirs):
    ours, theirs = (torch.as_tensor(x).double() for x in (ours, theirs))
    return ((ours - theirs).norm() / theirs.norm()).item()


def both(theirs, **call):
    """Pictures of our pipeline and of the one that it is made from, for the same call."""
    call = dict(prompt="red brick wall", num_inference_steps=5, output_type="np", guidance_scale=4.0) | call
    pictures = []
    for pipe in (InstantASPipeline.from_pipe(theirs), theirs):
        pictures.append(pipe(**call, generator=seeded()).images)
    return pictures


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_one_native_window_is_diffusers_own_picture(name, prediction_type):
    kind = getattr(diffusers, name + "Scheduler")
    theirs = tiny_pipeline(scheduler=scheduler(prediction_type, kind=kind))
    assert difference(*both(theirs, output_type="latent")) < 1e-4


@pytest.mark.parametrize(
    "call",
    [
        dict(guidance_scale=1.0),
        dict(guidance_scale=7.5, guidance_rescale=0.7),
        dict(eta=0.5),
        dict(negative_prompt="grass"),
        dict(prompt=["red brick", "green grass"], negative_prompt=["sky", "a photo"], num_images_per_prompt=2),
        dict(height=64, width=96),
        dict(output_type="pt"),
    ],
    ids=lambda call: ", ".join(call),
)
def test_arguments_mean_what_they_mean_to_diffusers(call):
    assert difference(*both(tiny_pipeline(), **call)) < 1e-4


def test_a_list_of_generators_has_one_for_each_picture():
    theirs = tiny_pipeline()
    ours = InstantASPipeline.from_pipe(theirs)
    call = dict(prompt=["wall"] * 2, num_inference_steps=3, output_type="latent")
    a, b = (p(**call, generator=[seeded(3), seeded(4)]).images for p in (ours, theirs))
    assert difference(a, b) < 1e-4


def test_embeddings_and_latents_in_place_of_prompt_and_seed():
    theirs = tiny_pipeline()
    embeds, negative = (torch.randn(1, 16, 32, generator=seeded(i)) for i in range(2))
    latents = torch.randn(1, 4, WINDOW, WINDOW, generator=seeded(2))
    call = dict(prompt=None, prompt_embeds=embeds, negative_prompt_embeds=negative, latents=latents)
    assert difference(*both(theirs, **call)) < 1e-4


def test_sdxl_on_one_native_window():
    theirs = tiny_xl_pipeline()
    assert difference(*both(theirs)) < 1e-4
    sizes = dict(original_size=(200, 100), crops_coords_top_left=(8, 16), target_size=(64, 64))
    negative = {f"negative_{name}": value for name, value in sizes.items() if name != "target_size"}
    assert difference(*both(theirs, prompt_2="grass", negative_prompt="sky", **sizes, **negative,
                            negative_target_size=(32, 32))) < 1e-4  # fmt: skip


def test_controlnet_on_one_native_window():
    theirs = tiny_pipeline(kind=StableDiffusionControlNetPipeline, controlnet=tiny_controlnet())
    image = torch.rand(1, 3, NATIVE, NATIVE, generator=seeded(1))
    plain = both(tiny_pipeline())[0]
    for extra in ({}, dict(guess_mode=True, controlnet_conditioning_scale=0.5), dict(control_guidance_end=0.5)):
        ours, wanted = both(theirs, image=image, **extra)
        assert difference(ours, wanted) < 1e-4
        assert difference(ours, plain) > 1e-3


class Counted:
    """Notes the batches that a UNet is called with."""

    def __init__(self, unet):
        self.calls = []
        unet.register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, module, args, kwargs):
        self.calls.append((args[0], kwargs))


@pytest.mark.parametrize("size", [(NATIVE, 3 * NATIVE // 2), (160, 192)])
def test_multidiffusion_is_the_panorama_pipeline(size, monkeypatch):
    theirs = tiny_pipeline(kind=StableDiffusionPanoramaPipeline)
    views = StableDiffusionPanoramaPipeline.get_views
    monkeypatch.setattr(
        theirs,
        "get_views",
        lambda h, w, circular_padding: views(theirs, h, w, window_size=WINDOW, stride=2),
        raising=False,
    )
    ours = InstantASPipeline.from_pipe(theirs)
    call = dict(prompt="wall", height=size[0], width=size[1], num_inference_steps=3, output_type="np")
    a = ours(**call, method="multidiffusion", generator=seeded()).images
    b = theirs(**call, generator=seeded()).images
    assert a.shape == (1, *size, 3) and difference(a, b) < 1e-4


def test_evaluations_are_those_of_minimum_coverage():
    theirs = tiny_pipeline()
    counted = Counted(theirs.unet)
    ours = InstantASPipeline.from_pipe(theirs)
    ours("wall", height=NATIVE, width=4 * NATIVE, num_inference_steps=3, output_type="latent", bridging="none")
    assert [tuple(sample.shape) for sample, _ in counted.calls] == [(8, 4, WINDOW, WINDOW)] * 3
    counted.calls.clear()
    ours("wall", height=NATIVE, width=4 * NATIVE, num_inference_steps=3, output_type="latent", window_batch_size=3)
    assert sum(len(sample) for sample, _ in counted.calls) == 2 * 4 * 3
    assert max(len(sample) for sample, _ in counted.calls) == 6


@pytest.mark.parametrize("size", [(1, 1), (7, 90), (130, 250), (333, 100)])
def test_any_size_is_what_comes_out(size):
    ours = InstantASPipeline.from_pipe(tiny_pipeline())
    picture = ours("wall", height=size[0], width=size[1], num_inference_steps=2, output_type="np").images
    assert picture.shape == (1, *size, 3) and np.isfinite(picture).all()


def test_the_picture_depends_on_the_seed_and_not_on_the_window_batch():
    theirs = tiny_pipeline(scheduler=scheduler(kind=diffusers.EulerAncestralDiscreteScheduler))
    ours = InstantASPipeline.from_pipe(theirs)

    def paint(seed, batch):
        call = dict(height=160, width=300, num_inference_steps=4, output_type="np", window_batch_size=batch)
        return ours("wall", generator=seeded(seed), **call).images

    assert difference(paint(1, 1), paint(1, 5)) < 1e-5
    assert difference(paint(1, 1), paint(2, 1)) > 1e-2


def test_pictures_are_paired_with_their_prompts_on_any_canvas():
    ours = InstantASPipeline.from_pipe(tiny_pipeline())
    prompts, negatives = ["red brick", "green grass"], ["sky", "wood"]
    call = dict(height=160, width=200, num_inference_steps=3, output_type="np")
    noise = torch.randn(4, 4, 20, 25, generator=seeded())
    together = ours(prompts, negative_prompt=negatives, num_images_per_prompt=2, latents=noise, **call).images
    for i in range(4):
        alone = ours(prompts[i // 2], negative_prompt=negatives[i // 2], latents=noise[i : i + 1], **call).images
        assert difference(together[i : i + 1], alone) < 1e-4


def test_one_negative_prompt_is_for_all_pictures():
    ours = InstantASPipeline.from_pipe(tiny_pipeline())
    call = dict(num_inference_steps=2, output_type="latent")
    one, two = (
        ours(["wall", "grass"], negative_prompt=n, generator=seeded(), **call).images for n in ("sky", ["sky"] * 2)
    )
    assert torch.equal(one, two)


def test_sdxl_windows_have_their_own_crop():
    theirs = tiny_xl_pipeline()
    counted = Counted(theirs.unet)
    ours = InstantASPipeline.from_pipe(theirs)
    ours("wall", height=2 * NATIVE, width=NATIVE + 40, num_inference_steps=1, output_type="latent", guidance_scale=1.0)
    ids = counted.calls[0][1]["added_cond_kwargs"]["time_ids"].tolist()
    canvas, window = [256, 168], [128, 128]
    assert ids == [[*canvas, y, x, *window] for y in (0, 128) for x in (0, 40)]


def test_controlnet_images_are_cropped_to_each_window():
    theirs = tiny_pipeline(kind=StableDiffusionControlNetPipeline, controlnet=tiny_controlnet())
    seen = []
    theirs.controlnet.register_forward_pre_hook(lambda m, a, k: seen.append(k["controlnet_cond"]), with_kwargs=True)
    ours = InstantASPipeline.from_pipe(theirs)
    image = torch.rand(1, 3, NATIVE, 2 * NATIVE, generator=seeded(1))
    call = dict(num_inference_steps=1, output_type="latent", guidance_scale=1.0)
    ours("wall", height=NATIVE, width=2 * NATIVE, image=image, **call)
    assert torch.equal(seen[0], torch.cat([image[..., :NATIVE], image[..., NATIVE:]]))
    seen.clear()
    ours("wall", height=NATIVE, width=2 * NATIVE, image=image, bridging="dilated", **call)
    assert seen[0].shape == (2, 3, NATIVE, NATIVE) and torch.equal(seen[0][0], seen[0][1])


def test_a_wrapped_canvas_can_be_turned():
    ours = InstantASPipeline.from_pipe(tiny_pipeline(vae=autoencoder(tiny=True)))
    noise = torch.randn(1, 4, 16, 40, generator=seeded())
    call = dict(height=NATIVE, width=320, num_inference_steps=3, wrap=(False, True), output_type="np")
    call |= dict(method="multidiffusion", stride=4)
    straight, turned = (ours("wall", latents=latents, **call).images for latents in (noise, noise.roll(20, -1)))
    assert difference(np.roll(straight, 160, axis=2), turned) < 1e-4


def test_callbacks_see_and_replace_the_latents_and_can_stop():
    ours, seen = InstantASPipeline.from_pipe(tiny_pipeline()), []

    def callback(pipe, step, timestep, given):
        assert pipe is ours
        seen.append(step)
        pipe._interrupt = step == 1
        return {"latents": torch.full_like(given["latents"], float(step))}

    latents = ours("wall", num_inference_steps=5, callback_on_step_end=callback, output_type="latent").images
    assert seen == [0, 1] and latents.shape == (1, 4, WINDOW, WINDOW)


def test_components_are_those_of_the_diffusers_pipeline():
    theirs = tiny_pipeline()
    ours = InstantASPipeline.from_pipe(theirs)
    assert ours.unet is theirs.unet and ours.components.keys() == theirs.components.keys()
    ours.scheduler = other = scheduler(kind=diffusers.EulerDiscreteScheduler)
    assert theirs.scheduler is other
    ours.defaults["num_inference_steps"] = 7
    again = InstantASPipeline.from_pipe(ours)
    assert again.pipe is theirs and again.defaults == ours.defaults and again.defaults is not ours.defaults
    assert ours.to("cpu") is ours
    with pytest.raises(AttributeError):
        getattr(ours, "no_such_thing")  # noqa: B009


def test_the_embedded_model_brings_its_defaults():
    ours = InstantASPipeline.from_pretrained(demo.folder())
    assert ours.defaults == {"num_inference_steps": 25, "guidance_scale": 2.5, "start": "coarse", "coarse_sigma": 1.5}
    assert ours.window == (16, 16) and ours.cell == 8
    assert isinstance(ours.pipe, StableDiffusionPipeline)
    assert InstantASPipeline(ours.pipe).defaults == {"num_inference_steps": 50, "guidance_scale": 7.5}


REFUSED = [
    (ValueError, "height: expected a positive", dict(height=0)),
    (ValueError, "width: expected a positive", dict(width=-5)),
    (TypeError, "width: expected a positive whole number", dict(width=64.5)),
    (TypeError, "height: expected a positive whole number", dict(height=True)),
    (ValueError, "prompt: expected a prompt or prompt_embeds, got neither", dict(prompt=None)),
    (TypeError, "prompt: expected a string or a list", dict(prompt=3)),
    (TypeError, "prompt: expected a string or a list", dict(prompt=[])),
    (ValueError, "negative_prompt: expected one for each of 1", dict(negative_prompt=["a", "b"])),
    (ValueError, "prompt_2: expected None", dict(prompt_2="a")),
    (ValueError, "original_size: expected no SDXL", dict(original_size=(3, 3))),
    (ValueError, "latents: expected .pictures, C", dict(latents=torch.zeros(1, 4, 3, 3))),
    (TypeError, "latents: expected a tensor of floats", dict(latents=torch.zeros(1, 4, 16, 16, dtype=torch.int64))),
    (TypeError, "latents: expected a tensor of floats", dict(latents=np.zeros((1, 4, 16, 16)))),
    (ValueError, "latents: expected finite", dict(latents=torch.full((1, 4, 16, 16), torch.nan))),
    (ValueError, "method: expected one of", dict(method="panorama")),
    (ValueError, "stride: expected None", dict(stride=4)),
    (ValueError, "stride: expected a positive", dict(stride=0, method="multidiffusion")),
    (ValueError, "bridging: expected one of", dict(bridging="glue")),
    (ValueError, "bridging: expected a plan of the fewest", dict(bridging="shift", method="multidiffusion", width=300)),
    (TypeError, "wrap: expected", dict(wrap="x")),
    (ValueError, "width: expected a multiple of 8", dict(wrap=(False, True), width=99)),
    (ValueError, "output_type: expected", dict(output_type="jpeg")),
    (ValueError, "num_images_per_prompt: expected", dict(num_images_per_prompt=0)),
    (ValueError, "num_inference_steps: expected", dict(num_inference_steps=0)),
    (TypeError, "num_inference_steps: expected", dict(num_inference_steps=2.5)),
    (ValueError, "timesteps: expected None", dict(timesteps=[3, 1], num_inference_steps=None)),
    (TypeError, "guidance_scale: expected a number", dict(guidance_scale="7")),
    (ValueError, "guidance_scale: expected a finite", dict(guidance_scale=float("nan"))),
    (ValueError, "guidance_rescale: expected", dict(guidance_rescale=2.0)),
    (ValueError, "window_batch_size: expected", dict(window_batch_size=0)),
    (ValueError, "generator: expected one for each", dict(generator=[seeded(), seeded()])),
    (TypeError, "generator: expected a torch.Generator", dict(generator=7)),
    (ValueError, "eta: expected 0 to 1", dict(eta=1.5)),
    (ValueError, "image: expected strength or mask_image beside it, or None", dict(image=torch.zeros(1, 3, 8, 8))),
    (ValueError, "region_mode: expected", dict(region_mode="mix")),
    (ValueError, "base_weight: expected", dict(base_weight=-1.0)),
    (ValueError, "semantic_schedule: expected", dict(semantic_schedule="step")),
    (TypeError, "regions: expected", dict(regions=["grass"])),
    (ValueError, "regions: expected one list, or one for each of 3", dict(
        num_images_per_prompt=3, regions=[[Region("a", box=(0.0, 0.0, 1.0, 0.5))]] * 2)),
    (ValueError, "callback_on_step_end_tensor_inputs", dict(callback_on_step_end_tensor_inputs=["noise"])),
]  # fmt: skip


@pytest.mark.parametrize("error, match, call", REFUSED, ids=lambda value: None)
def test_what_is_wrong_is_said_before_any_evaluation(error, match, call):
    theirs = tiny_pipeline()
    counted = Counted(theirs.unet)
    with pytest.raises(error, match=match):
        InstantASPipeline.from_pipe(theirs)(**dict(prompt="wall", num_inference_steps=2) | call)
    assert not counted.calls


def test_models_that_cannot_be_are_refused(tmp_path):
    with pytest.raises(ValueError, match="model: expected a folder with a model_index.json"):
        InstantASPipeline.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="model: expected a folder in diffusers' layout or a hub id"):
        InstantASPipeline.from_pretrained(tmp_path / "nothing")
    tiny_pipeline().save_pretrained(tmp_path / "whole")
    assert InstantASPipeline.from_pretrained(tmp_path / "whole").window == (WINDOW, WINDOW)
    for path in (tmp_path / "whole" / "unet").glob("*.safetensors"):
        path.unlink()
    with pytest.raises(ValueError, match="model: expected a whole model"):
        InstantASPipeline.from_pretrained(tmp_path / "whole")
    with pytest.raises(TypeError, match="pipe: expected a pipeline of one of the kinds"):
        InstantASPipeline(object())
    with pytest.raises(TypeError, match="UNet for text to image or inpainting, got .* with 8 channels in and 4 out"):
        InstantASPipeline(tiny_pipeline(unet=unet(in_channels=8)))


def test_scheduler_of_another_kind_is_refused():
    ours = InstantASPipeline.from_pipe(tiny_pipeline())
    ours.scheduler = type("Other", (), {})()
    with pytest.raises(TypeError, match="scheduler: expected a diffusers scheduler"):
        ours("wall", num_inference_steps=2)

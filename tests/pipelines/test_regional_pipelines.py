"""Regional prompts in diffusers' own pipelines."""

import pytest
import torch
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline

from instantas.pipelines.attention import regional_prompts
from instantas.regions import Region
from instantas.testing import tiny
from tests.pipelines.attending import ALL, LEFT, RIGHT, counted, error


def latents(pipe, *arguments, **settings):
    generator = torch.Generator().manual_seed(7)
    settings = dict(num_inference_steps=4, generator=generator, output_type="latent") | settings
    return pipe(*arguments, **settings).images


def test_pipeline():
    pipe = tiny.tiny_pipeline()
    plain = latents(pipe, "grass", negative_prompt="stone")
    with regional_prompts(pipe, [Region("grass", box=ALL)]), counted(pipe.unet) as calls:
        got = latents(pipe, "blue sky", negative_prompt="stone")
    assert error(got, plain) < 1e-4 and set(calls.values()) == {1}


def test_several_pictures_of_each_prompt():
    pipe = tiny.tiny_pipeline()
    settings = dict(num_images_per_prompt=2)
    plain = latents(pipe, ["grass", "blue sky"], **settings)
    lists = [[Region("grass", box=ALL)], [Region("blue sky", box=LEFT), Region("blue sky", box=RIGHT)]]
    with regional_prompts(pipe, lists):
        got = latents(pipe, ["stone", "stone"], **settings)
    assert error(got, plain) < 1e-4


def test_regions_come_and_go_over_the_run():
    pipe, steps = tiny.tiny_pipeline(), []

    def remember(pipe, step, timestep, kwargs):
        steps.append(kwargs["latents"].clone())
        return kwargs

    def run(*regions, **settings):
        steps.clear()
        with regional_prompts(pipe, regions, **settings):
            latents(pipe, "stone", callback_on_step_end=remember)
        return list(steps)

    def equal(one, other):
        return [error(a, b) < 1e-4 for a, b in zip(one, other)]

    base, grass = run(), run(Region("grass", box=ALL))
    assert equal(base, grass) == [False] * 4
    assert equal(run(Region("grass", box=ALL, start=0.5)), base) == [True, True, False, False]
    assert equal(run(Region("grass", box=ALL, end=0.5)), grass) == [True, True, False, False]
    assert equal(run(Region("grass", box=ALL), semantic_schedule="linear"), base) == [True, False, False, False]
    slow, quick = run(Region("grass", box=ALL), semantic_schedule="cosine"), steps
    quick = run(Region("grass", box=ALL), semantic_schedule="linear")
    assert error(slow[1], base[1]) < error(quick[1], base[1])


def test_xl_pipeline():
    pipe = tiny.tiny_xl_pipeline()
    kinds = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    grass, sky = (dict(zip(kinds, pipe.encode_prompt(word, device="cpu"))) for word in ("grass", "blue sky"))
    size = dict(height=104, width=200)
    pooled = {name: sky[name] for name in kinds if "pooled" in name}
    plain = latents(pipe, **grass | pooled, **size)
    with regional_prompts(pipe, [Region("grass", box=ALL)]), counted(pipe.unet) as calls:
        got = latents(pipe, **sky, **size)
    assert error(got, plain) < 1e-4 and set(calls.values()) == {1}
    assert error(latents(pipe, **sky, **size), plain) > 1e-3


def test_controlnet_pipeline():
    net = tiny.tiny_controlnet()
    pipe = tiny.tiny_pipeline(kind=StableDiffusionControlNetPipeline, controlnet=net)
    settings = dict(image=torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(8)))
    grass, sky = latents(pipe, "grass", **settings), latents(pipe, "blue sky", **settings)
    regions, before = [Region("grass", box=ALL)], net.attn_processors
    with regional_prompts(pipe, regions):
        unet_alone = latents(pipe, "blue sky", **settings)
        with regional_prompts(pipe.controlnet, regions, pipe=pipe):
            both = latents(pipe, "blue sky", **settings)
    assert error(both, grass) < 1e-4
    assert min(error(unet_alone, grass), error(unet_alone, sky)) > 1e-4
    assert all(net.attn_processors[name] is processor for name, processor in before.items())
    assert isinstance(net, ControlNetModel)


def test_long_prompt_warns():
    pipe = tiny.tiny_pipeline()
    with pytest.warns(UserWarning, match="cut off: 'blue sky'"):
        with regional_prompts(pipe, [Region(" ".join(["grass"] * 14) + " blue sky", box=ALL)]):
            pass

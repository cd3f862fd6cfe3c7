"""Regional prompts in loops of one's own and in calls with settings of their own: embedded and guided as they are."""

import pytest
import torch
from diffusers import StableDiffusionControlNetPipeline
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer

from instantas.pipelines.attention import regional_prompts
from instantas.pipelines.pipeline import InstantASPipeline
from instantas.regions import Region
from instantas.regions.prompts import PipelineEncoder
from instantas.testing import tiny

ALL = (0.0, 0.0, 1.0, 1.0)
GRASS = [Region("grass", box=ALL)]


@pytest.fixture
def pipe():
    return tiny.tiny_pipeline()


@pytest.fixture(scope="module")
def noise():
    return torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))


def error(got, wanted):
    return float((got - wanted).norm() / wanted.norm())


def paint(pipe, *args, **settings):
    settings = dict(num_inference_steps=3, generator=torch.Generator().manual_seed(7), output_type="latent") | settings
    return pipe(*args, **settings).images


@torch.no_grad()
def encode(pipe, *texts):
    return torch.cat([pipe.encode_prompt(text, "cpu", 1, False)[0] for text in texts])


# Guidance


@pytest.mark.parametrize("before", [None, 7.5, 1.0])
@torch.no_grad()
def test_guidance_of_a_loop_of_ones_own_does_not_depend_on_what_ran_before(pipe, noise, before):
    if before:
        paint(pipe, "stone", guidance_scale=before)
    words, both = encode(pipe, "sky", "stone"), noise[:1].repeat(2, 1, 1, 1)
    with regional_prompts(pipe, GRASS):
        with pytest.raises(ValueError, match="^classifier_free_guidance: expected True or False .*batch of 2 may"):
            pipe.unet(both, 500, words)
        one = pipe.unet(noise[:1], 500, words[:1]).sample  # of one there is one reading
        three = pipe.unet(noise[[0, 1, 0]], 500, words[[0, 1, 0]]).sample
        if before:
            paint(pipe, "stone", guidance_scale=before)
            with pytest.raises(ValueError, match="^classifier_free_guidance: expected"):  # that call is over
                pipe.unet(both, 500, words)
    grass = pipe.unet(noise, 500, encode(pipe, "grass", "grass")).sample
    assert error(one, grass[:1]) < 1e-4 and error(three, grass[[0, 1, 0]]) < 1e-4
    for guided, first in ((True, "sky"), (False, "grass")):
        with regional_prompts(pipe, GRASS, classifier_free_guidance=guided):
            got = pipe.unet(both, 500, words).sample
        assert error(got, pipe.unet(both, 500, encode(pipe, first, "grass")).sample) < 1e-4


@torch.no_grad()
def test_lists_of_regions_say_how_many_pictures_a_batch_has(pipe, noise):
    lists, words = [GRASS, [Region("sky", box=ALL)]], encode(pipe, "stone", "stone")
    with regional_prompts(pipe, lists):
        got = pipe.unet(noise, 500, words).sample
        with pytest.raises(ValueError, match="^classifier_free_guidance: expected .*batch of 4 .* or 4 pictures"):
            pipe.unet(noise.repeat(2, 1, 1, 1), 500, words.repeat(2, 1, 1))
    assert error(got, pipe.unet(noise, 500, encode(pipe, "grass", "sky")).sample) < 1e-4
    with regional_prompts(pipe, []):  # alike either way
        got = pipe.unet(noise, 500, words).sample
    assert error(got, pipe.unet(noise, 500, words).sample) < 1e-4


def test_a_call_inside_of_which_guidance_changes(pipe):
    with regional_prompts(pipe, GRASS):
        got = [paint(pipe, "sky", guidance_scale=scale) for scale in (7.5, 1.0, 3.0)]
        ours = paint(InstantASPipeline.from_pipe(pipe), "sky", guidance_scale=7.5)
    wanted = [paint(pipe, "grass", guidance_scale=scale) for scale in (7.5, 1.0, 3.0)]
    assert max(map(error, [*got, ours], [*wanted, wanted[0]])) < 1e-4


@pytest.mark.parametrize("pictures", [1, 2])
def test_controlnet_that_guesses(pictures):
    """It is evaluated on the conditional half alone."""
    pipe = tiny.tiny_pipeline(kind=StableDiffusionControlNetPipeline, controlnet=tiny.tiny_controlnet())
    settings = dict(image=torch.rand(1, 3, 128, 128), guess_mode=True, num_images_per_prompt=pictures)
    wanted = paint(pipe, "grass", **settings)
    with regional_prompts(pipe, GRASS), regional_prompts(pipe.controlnet, GRASS, pipe=pipe):
        got = paint(pipe, "sky", **settings)
    assert error(got, wanted) < 1e-4


# Settings of the call reach the regions' prompts


@pytest.fixture
def skipping(pipe, monkeypatch):
    """A pipeline whose text encoder has the attribute that diffusers looks for, which transformers 5 took away."""
    if not hasattr(pipe.text_encoder, "text_model"):
        monkeypatch.setattr(type(pipe.text_encoder), "text_model", property(lambda self: self), raising=False)
    return pipe


@pytest.mark.parametrize("skip", [None, 1])
def test_clip_skip(skipping, skip):
    pipe = skipping
    with regional_prompts(pipe, GRASS):
        got = [paint(pipe, "sky", clip_skip=s) for s in (skip, 1, None)]
    wanted = [paint(pipe, "grass", clip_skip=s) for s in (skip, 1, None)]
    assert max(map(error, got, wanted)) < 1e-4 and error(wanted[1], wanted[2]) > 1e-3


def with_lora(pipe):
    for module, names in ((pipe.text_encoder, ["q_proj", "v_proj"]), (pipe.unet, ["to_k", "to_v", "to_q"])):
        torch.manual_seed(5)
        inject_adapter_in_model(LoraConfig(r=4, lora_alpha=32, init_lora_weights=False, target_modules=names), module)
        module._hf_peft_config_loaded = True
    return pipe


def switch(pipe, on):
    for module in (pipe.text_encoder, pipe.unet):
        for layer in module.modules():
            if isinstance(layer, BaseTunerLayer):
                layer.enable_adapters(on)


def test_lora_scale_of_the_call_and_adapters_switched_inside(pipe):
    def pictures(word):
        for scale in (1.0, 0.0, 0.5):
            yield paint(pipe, word, cross_attention_kwargs={"scale": scale})
        yield paint(pipe, word)
        switch(pipe, False)
        yield paint(pipe, word)
        switch(pipe, True)
        yield paint(pipe, word)

    with_lora(pipe)
    wanted = list(pictures("grass"))
    with regional_prompts(pipe, GRASS):
        got = list(pictures("sky"))
    assert max(map(error, got, wanted)) < 1e-4
    assert min(error(wanted[a], wanted[b]) for a, b in ((0, 1), (1, 2), (3, 4))) > 1e-2


@torch.no_grad()
def test_lora_scale_in_a_loop_of_ones_own(pipe, noise):
    with_lora(pipe)
    scales = [dict(cross_attention_kwargs={"scale": scale}) for scale in (1.0, 0.25)]
    sky, one = encode(pipe, "sky"), noise[:1]
    with regional_prompts(pipe, GRASS):
        got = [pipe.unet(one, 500, sky, **scale).sample for scale in scales]
    grass = [pipe.encode_prompt("grass", "cpu", 1, False, lora_scale=scale)[0] for scale in (1.0, 0.25)]
    wanted = [pipe.unet(one, 500, words, **scale).sample for words, scale in zip(grass, scales)]
    assert max(map(error, got, wanted)) < 1e-4 and error(*wanted) > 1e-3


@torch.no_grad()
def test_clip_skip_in_a_loop_of_ones_own(skipping, noise):
    pipe = skipping
    with regional_prompts(pipe, GRASS, encode=PipelineEncoder(pipe, clip_skip=1)):
        got = pipe.unet(noise[:1], 500, encode(pipe, "sky")).sample
    grass = pipe.encode_prompt("grass", "cpu", 1, False, clip_skip=1)[0]
    assert error(got, pipe.unet(noise[:1], 500, grass).sample) < 1e-4


def test_texts_are_embedded_once_for_alike_calls(pipe, monkeypatch):
    calls, usual = [], type(pipe).encode_prompt
    monkeypatch.setattr(type(pipe), "encode_prompt", lambda *a, **k: calls.append(k.get("prompt")) or usual(*a, **k))
    with regional_prompts(pipe, GRASS):
        for word in ("sky", "stone"):
            paint(pipe, word)
    assert [call for call in calls if call == ["grass"]] == [["grass"]]


# A pipeline without a text encoder


def test_without_a_text_encoder():
    whole = tiny.tiny_pipeline()
    words = {name: encode(whole, name) for name in ("grass", "sky", "")}
    pipe = tiny.tiny_pipeline(text_encoder=None, tokenizer=None)
    given = dict(prompt_embeds=words["sky"], negative_prompt_embeds=words[""])
    with regional_prompts(pipe, [Region(box=ALL, embeds=words["grass"])]):
        got = paint(pipe, **given)
    assert error(got, paint(whole, "grass")) < 1e-4
    for region in (GRASS[0], Region(box=ALL, embeds=words["grass"], negative_prompt="sky")):
        with pytest.raises(ValueError, match="^embeds: expected in every region, as the pipeline has no text encoder"):
            with regional_prompts(pipe, [region]):
                pass


# Training inside of the block


def trained(unet, sample, words):
    unet.zero_grad()
    unet(sample, 500, words).sample.square().mean().backward()
    return {name: p.grad.clone() for name, p in unet.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("checkpointed", [False, True])
def test_gradients_are_those_of_the_plain_network(pipe, noise, checkpointed):
    """Two steps, as an optimizer takes them: a graph serves once."""
    unet, regions = pipe.unet.train(), [Region("grass", box=ALL), Region("grass", box=(0.0, 0.0, 0.5, 1.0))]
    if checkpointed:
        unet.enable_gradient_checkpointing()
    grass, sky = encode(pipe, "grass", "grass"), encode(pipe, "sky", "sky")
    wanted = trained(unet, noise, grass)
    with regional_prompts(pipe, regions, classifier_free_guidance=False):
        got = [trained(unet, noise, sky) for _ in range(2)]
        with torch.no_grad():
            unet(noise, 500, sky)
        with torch.inference_mode():
            unet(noise, 500, sky)
        got.append(trained(unet, noise, sky))
    names = [name for name in wanted if "attn2.to_k" in name or "attn2.to_v" in name]
    assert names and all(wanted[name].any() for name in names)
    for found in got:
        assert found.keys() == wanted.keys()
        assert max(error(found[name], wanted[name]) for name in wanted if wanted[name].norm() > 1e-6) < 1e-3


def test_gradients_reach_embeddings_and_frozen_projections_stay_projected(pipe, noise):
    """Textual inversion, of the base prompt and of a region; and guidance by a gradient of the sample."""
    pipe.unet.requires_grad_(False)
    learned, base = (encode(pipe, word).requires_grad_() for word in ("grass", "sky"))
    half = [Region(box=(0.0, 0.0, 0.5, 1.0), embeds=learned)]
    with regional_prompts(pipe, half, classifier_free_guidance=False):
        for _ in range(2):
            learned.grad = base.grad = None
            pipe.unet(noise[:1], 500, base).sample.square().mean().backward()
            assert learned.grad.any() and base.grad.any()
    alone = encode(pipe, "grass").requires_grad_()
    pipe.unet(noise[:1], 500, alone).sample.square().mean().backward()
    learned.grad = None
    with regional_prompts(pipe, [Region(box=ALL, embeds=learned)], classifier_free_guidance=False):
        pipe.unet(noise[:1], 500, base).sample.square().mean().backward()
    assert error(learned.grad, alone.grad) < 1e-3
    sample, frozen = noise[:1].clone().requires_grad_(), learned.detach()
    with regional_prompts(pipe, [Region(box=ALL, embeds=frozen)], classifier_free_guidance=False):
        with torch.inference_mode():
            pipe.unet(noise[:1], 500, base.detach())
        pipe.unet(sample, 500, base.detach()).sample.square().mean().backward()
    assert sample.grad.any()

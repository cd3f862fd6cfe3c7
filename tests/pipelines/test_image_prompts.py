"""Regions with an IP-Adapter: its pictures are attended to beside the prompts of each place, as diffusers does it."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import AttnProcessor2_0, IPAdapterAttnProcessor, IPAdapterAttnProcessor2_0
from diffusers.models.embeddings import ImageProjection, MultiIPAdapterImageProjection

from instantas.pipelines.attention import RegionalAttnProcessor, regional_prompts
from instantas.regions import Region
from instantas.testing import tiny

ALL, LEFT, RIGHT = (0.0, 0.0, 1.0, 1.0), (0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)
HALVES = [Region("grass", box=LEFT), Region("blue sky", box=RIGHT)]


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def load_adapters(pipe, number=1, kind=IPAdapterAttnProcessor2_0):
    """IP-Adapters of random weights, four tokens a picture."""
    torch.manual_seed(3)
    unet, processors = pipe.unet, {}
    for name in unet.attn_processors:
        layer = unet.get_submodule(name.removesuffix(".processor"))
        processors[name] = AttnProcessor2_0()
        if "attn2" in name:
            processors[name] = kind(layer.inner_dim, 32, [4] * number, scale=[0.5 + i for i in range(number)])
            for weight in processors[name].parameters():
                torch.nn.init.normal_(weight, std=0.5)
    unet.set_attn_processor(processors)
    unet.encoder_hid_proj = MultiIPAdapterImageProjection([ImageProjection(24, 32, 4) for _ in range(number)])
    unet.config.encoder_hid_dim_type = "ip_image_proj"  # the attribute alone, as diffusers' load_ip_adapter does it
    return pipe


@pytest.fixture
def pipe():
    return load_adapters(tiny.tiny_pipeline())


def encode(pipe, *texts):
    with torch.no_grad():
        return torch.cat([pipe.encode_prompt(text, "cpu", 1, False)[0] for text in texts])


@torch.no_grad()
def evaluate(pipe, text, *pictures, masks=None, sample=None):
    sample = random(1, 4, 16, 16) if sample is None else sample
    kwargs = None if masks is None else {"ip_adapter_masks": masks}
    embeds = [random(1, count, 24, seed=5 + i) for i, count in enumerate(pictures or (1,))]
    settings = dict(added_cond_kwargs={"image_embeds": embeds}, cross_attention_kwargs=kwargs)
    return pipe.unet(sample, 500, encode(pipe, text), **settings).sample


def regional(pipe, regions, **settings):
    return regional_prompts(pipe, regions, classifier_free_guidance=False, **settings)


def error(got, wanted):
    return float((got - wanted).norm() / wanted.norm())


class ByHand(torch.nn.Module):
    """Each half attends to its own text; what the pictures add is what the adapter's scale changes in diffusers."""

    def __init__(self, adapter, left, right):
        super().__init__()
        self.adapter, self.left, self.right = adapter, left, right
        self.silent = copy.deepcopy(adapter)
        self.silent.scale = [0.0] * len(adapter.scale)

    def __call__(self, attn, hidden, encoder_hidden_states, attention_mask=None, temb=None, ip_adapter_masks=None):
        given = dict(encoder_hidden_states=encoder_hidden_states, ip_adapter_masks=ip_adapter_masks)
        added = self.adapter(attn, hidden, **given) - self.silent(attn, hidden, **given)
        side = int(hidden.shape[1] ** 0.5)
        inside = (torch.arange(side) < side // 2).repeat(side)[None, :, None]
        query = attn.to_q(hidden).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
        found = []
        for text in (self.left, self.right):
            key, value = (to(text).unflatten(-1, (attn.heads, -1)).transpose(1, 2) for to in (attn.to_k, attn.to_v))
            found.append(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))
        return attn.to_out[0](torch.where(inside, *found)) + added


def by_hand(pipe, *pictures, masks=None):
    before = pipe.unet.attn_processors
    words = [encode(pipe, region.prompt) for region in HALVES]
    hand = {name: ByHand(p, *words) if "attn2" in name else p for name, p in before.items()}
    pipe.unet.set_attn_processor(hand)
    wanted = evaluate(pipe, "stone", *pictures, masks=masks)
    pipe.unet.set_attn_processor(before)
    return wanted


def halves(count):
    masks = torch.zeros(1, count, 128, 128)
    for picture in range(count):
        masks[:, picture, picture * 128 // count : (picture + 1) * 128 // count] = 1
    return masks


@pytest.mark.parametrize("kind", [IPAdapterAttnProcessor2_0, IPAdapterAttnProcessor])
@pytest.mark.parametrize("pictures", [(1,), (2,), (1, 1), (2, 3)])
def test_equals_the_composition_by_hand(kind, pictures):
    pipe = load_adapters(tiny.tiny_pipeline(), len(pictures), kind)
    wanted = by_hand(pipe, *pictures)
    with regional(pipe, HALVES):
        got = evaluate(pipe, "stone", *pictures)
    assert error(got, wanted) < 1e-4
    pipe.set_ip_adapter_scale([0.0] * len(pictures))
    assert error(by_hand(pipe, *pictures), wanted) > 1e-2


@torch.no_grad()
def test_embeddings_for_guidance_in_a_run_without_are_attended_to_as_diffusers_does(pipe):
    def evaluated():
        added = {"image_embeds": [random(2, 1, 24, seed=5)]}  # the negative one and the other, for one sample
        return pipe.unet(random(1, 4, 16, 16), 500, encode(pipe, "stone"), added_cond_kwargs=added).sample

    wanted = evaluated()
    with regional(pipe, [Region("stone", box=ALL)]):
        assert error(evaluated(), wanted) < 1e-4


@pytest.mark.parametrize("pictures", [(1,), (2,), (1, 2)])
def test_masks_of_the_adapter(pictures):
    pipe, masks = load_adapters(tiny.tiny_pipeline(), len(pictures)), [halves(count) for count in pictures]
    masks[0] = masks[0] * 0.7
    pipe.set_ip_adapter_scale([[0.3 + i for i in range(count)] if count > 1 else 0.8 for count in pictures])
    wanted = by_hand(pipe, *pictures, masks=masks)
    with regional(pipe, HALVES):
        got = evaluate(pipe, "stone", *pictures, masks=masks)
    assert error(got, wanted) < 1e-4
    if len(pictures) == 1:  # the older form, one picture for each adapter
        old = masks[0][:, :1]
        pipe.set_ip_adapter_scale(0.8)
        with regional(pipe, HALVES):
            got = evaluate(pipe, "stone", 1, masks=old)
        assert error(got, by_hand(pipe, 1, masks=old)) < 1e-4


def test_one_region_over_everything_is_its_prompt_with_the_picture(pipe):
    with regional(pipe, [Region("grass", box=ALL)], mode="joint"):
        got = evaluate(pipe, "stone")
    assert error(got, evaluate(pipe, "grass")) < 1e-4


def test_scales_set_inside_and_everything_put_back(pipe):
    unet = pipe.unet
    before, keys = unet.attn_processors, list(unet.state_dict())
    weights = {name: parameter for name, parameter in unet.named_parameters()}
    with regional(pipe, [Region("grass", box=ALL)]):
        assert list(unet.state_dict()) == keys
        assert all(parameter is weights[name] for name, parameter in unet.named_parameters())
        pipe.set_ip_adapter_scale(0.1)
        got = evaluate(pipe, "stone")
        with ThreadPoolExecutor(1) as pool:  # without regions
            plain = pool.submit(evaluate, pipe, "stone", masks=[halves(1)]).result(60)
    assert all(unet.attn_processors[name] is processor for name, processor in before.items())
    assert list(unet.state_dict()) == keys and not isinstance(before[next(iter(before))], RegionalAttnProcessor)
    assert error(got, evaluate(pipe, "grass")) < 1e-4  # the scale stays, as it does without regions
    assert torch.equal(plain, evaluate(pipe, "stone", masks=[halves(1)]))


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
def test_pipeline(pipe, guidance_scale):
    rows = 2 if guidance_scale > 1 else 1
    settings = dict(num_inference_steps=3, output_type="latent", guidance_scale=guidance_scale)
    settings |= dict(ip_adapter_image_embeds=[random(rows, 1, 24)])

    def paint(text):
        return pipe(text, generator=torch.Generator().manual_seed(7), **settings).images

    with regional_prompts(pipe, [Region("grass", box=ALL)]):
        got = paint("stone")
    assert error(got, paint("grass")) < 1e-4 and error(got, paint("stone")) > 1e-3


def test_numbers_that_do_not_fit(pipe):
    with regional(pipe, HALVES):
        with pytest.raises(ValueError, match="^cross_attention_kwargs: expected ip_adapter_masks for each of 1 IP-Ad"):
            evaluate(pipe, "stone", masks=[halves(1)] * 2)
        with pytest.raises(ValueError, match="^cross_attention_kwargs: expected a scale and a mask .* 2 pictures"):
            evaluate(pipe, "stone", 2, masks=[halves(1)])
        pipe.set_ip_adapter_scale([[0.5, 0.5]])
        with pytest.raises(ValueError, match="^cross_attention_kwargs: .* got 2 and 0"):
            evaluate(pipe, "stone", 2)

"""Regional prompts are installed on a UNet and put back as it was; what they cannot be installed on is refused."""

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0, IPAdapterAttnProcessor2_0

from instantas.pipelines.attention import RegionalAttnProcessor, regional_prompts
from instantas.regions import Region, RegionMap
from instantas.testing import tiny
from instantas.windows import WindowPlan
from tests.pipelines.attending import ALL, regional

# Put back


def hooks(module):
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in module.modules())


def test_processors_are_put_back(unet, text, noise):
    before = unet.attn_processors
    with regional(unet, text, [Region("grass", box=ALL)]):
        inside = unet.attn_processors
        assert {isinstance(p, RegionalAttnProcessor) for name, p in inside.items() if "attn2" in name} == {True}
        assert all(inside[name] is before[name] for name in before if "attn1" in name)
    assert unet.attn_processors.keys() == before.keys() and hooks(unet) == 0
    assert all(unet.attn_processors[name] is processor for name, processor in before.items())


def test_processors_are_put_back_after_an_exception(unet, text, noise):
    before = unet.attn_processors
    for failing in (lambda: unet(noise, 500, text("").double()[:, :, :5]), lambda: 1 / 0):
        with pytest.raises((ValueError, ZeroDivisionError)), regional(unet, text, [Region("grass", box=ALL)]):
            failing()
        assert all(unet.attn_processors[name] is processor for name, processor in before.items())
        assert hooks(unet) == 0


@torch.no_grad()
def test_each_layer_has_its_own_processor_back(unet, text, noise):
    mixed = {
        name: (AttnProcessor if i % 2 else AttnProcessor2_0)() for i, name in enumerate(unet.attn_processors.keys())
    }
    unet.set_attn_processor(dict(mixed))
    with regional(unet, text, [Region("grass", box=ALL)]):
        unet(noise, 500, text("", ""))
    assert all(unet.attn_processors[name] is processor for name, processor in mixed.items())


def test_not_twice(unet, text):
    with regional(unet, text, [Region("grass", box=ALL)]):
        with pytest.raises(ValueError, match="^model: expected a network without regional prompts"):
            with regional(unet, text, []):
                pass


# Refused


class Mine(AttnProcessor2_0):
    pass


@pytest.mark.parametrize("kind", [Mine, lambda: IPAdapterAttnProcessor2_0(16, 32)])
def test_unknown_processors(unet, text, kind):
    name = [name for name in unet.attn_processors if "attn2" in name][-1]
    unet.set_attn_processor(unet.attn_processors | {name: kind()})
    before = unet.attn_processors
    with pytest.raises(
        TypeError, match="^model: expected (processors AttnProcessor, .*Mine|cross-attention to the text)"
    ):
        with regional(unet, text, []):
            pass
    assert all(unet.attn_processors[name] is processor for name, processor in before.items())


def test_processors_changed_inside(unet, text, noise):
    with regional(unet, text, [Region("grass", box=ALL)]):
        unet.set_attention_slice("max")
        with pytest.raises(ValueError, match="^model: expected the regional processors .* got a SlicedAttnProcessor"):
            unet(noise, 500, text("", ""))


def without_cross_attention():
    blocks = dict(block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1)
    plain = dict(down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2)
    return [
        UNet2DModel(sample_size=16, **blocks | plain, attention_head_dim=4),  # self-attention in its middle
        UNet2DConditionModel(sample_size=16, **blocks | plain, mid_block_type=None),
    ]


def test_network_without_cross_attention():
    for network in without_cross_attention():
        with pytest.raises(TypeError, match="^model: expected a network with cross-attention, got UNet2D.*without any"):
            with regional_prompts(network, []):
                pass


def test_layers_that_are_not_known_to_be_cross_attention_to_the_text():
    added = tiny.unet(
        down_block_types=("SimpleCrossAttnDownBlock2D",) * 2,
        up_block_types=("SimpleCrossAttnUpBlock2D",) * 2,
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
    )
    added.set_attn_processor(AttnProcessor2_0())
    with pytest.raises(TypeError, match="^model: expected cross-attention .* in Transformer2DModel blocks alone"):
        with regional_prompts(added, []):
            pass


@pytest.mark.parametrize("model", [None, "unet", torch.nn.Linear(2, 2)])
def test_what_is_no_network(model):
    with pytest.raises(TypeError, match="^model: expected"):
        with regional_prompts(model, []):
            pass


@pytest.mark.parametrize(
    "settings, error, words",
    [
        (dict(mode="add"), ValueError, "mode: expected 'blend' or 'joint', got 'add'"),
        (dict(base_weight=-1), ValueError, "base_weight: expected 0 to"),
        (dict(semantic_schedule="late"), ValueError, "semantic_schedule: expected one of"),
        (dict(encode=None), ValueError, "encode: expected a pipeline, or a function"),
        (dict(regions=["grass"]), TypeError, "regions: expected a list of Region"),
        (dict(regions=[Region("a", box=ALL)] * 64), ValueError, "regions: expected at most 63"),
        (dict(regions=[Region("a", box=ALL, guidance_scale=3)]), ValueError, "guidance_scale: expected None"),
        (dict(regions=RegionMap([], 128, 128), base_weight=1), ValueError, "base_weight: expected to be said where"),
    ],
)
def test_bad_settings(unet, text, settings, error, words):
    with pytest.raises(error, match=f"^{words}"):
        with regional(unet, text, **dict(regions=[Region("grass", box=ALL)]) | settings):
            pass
    assert hooks(unet) == 0


@torch.no_grad()
def test_bad_evaluations(unet, text, noise):
    with regional(unet, text, [Region("grass", box=ALL)]) as prompts:
        with pytest.raises(ValueError, match="^encoder_attention_mask: expected None"):
            unet(noise, 500, text("", ""), encoder_attention_mask=torch.ones(2, 16))
        with pytest.raises(ValueError, match="^encoder_hidden_states: expected 2 prompts, got 3"):
            unet(noise, 500, text("", "", ""))
        with pytest.raises(ValueError, match="^regions: expected a RegionMap, and base prompts set before"):
            prompts.set_windows(WindowPlan.minimum_coverage(16, 16, 16), torch.tensor([[0, 0]]))
    with regional(unet, text, [Region("grass", box=ALL)], classifier_free_guidance=None):
        with pytest.raises(ValueError, match=r"^sample: expected a batch \[uncond, cond\], got 1"):
            unet(noise[:1], 500, text(""))
    with regional(unet, text, [Region("grass", box=ALL, start=0.5)]):
        with pytest.raises(ValueError, match="^scheduler: expected the one in use"):
            unet(noise, 500, text("", ""))
    with regional(unet, text, [Region("grass", mask=np.ones((128, 256)))]):
        with pytest.raises(ValueError, match="^mask: expected the canvas's proportions"):
            unet(noise, 500, text("", ""))
    with regional(unet, text, RegionMap([], 128, 128)) as prompts:
        prompts.base(text("grass"))
        prompts.set_windows(WindowPlan.minimum_coverage(16, 16, 16), torch.tensor([[0, 0]]))
        with pytest.raises(ValueError, match=r"^sample: expected 1 windows of \(16, 16\), or twice as many"):
            unet(noise[:, :, :8], 500, text("", ""))
        with pytest.raises(ValueError, match="^sample: expected conditional windows alone"):
            unet(noise, 500, text("", ""))

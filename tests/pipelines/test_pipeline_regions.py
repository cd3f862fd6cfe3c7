"""Regions through the pipeline: what equals runs without them, what they cost, MultiDiffusion's region mode."""

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionControlNetPipeline
from peft import LoraConfig, inject_adapter_in_model

from instantas.pipelines import multidiffusion
from instantas.pipelines.pipeline import InstantASPipeline
from instantas.regions import Region
from instantas.sampling import bridging
from instantas.testing import tiny

NATIVE = tiny.WINDOW * tiny.CELL
ALL, LEFT, RIGHT = (0.0, 0.0, 1.0, 1.0), (0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)
ODD = dict(height=200, width=332)  # 25 x 42 cells, neither a multiple of the window
WIDE = dict(height=NATIVE, width=2 * NATIVE, bridging="none")  # two windows that know nothing of each other


@pytest.fixture(scope="module")
def pipe():
    return InstantASPipeline.from_pipe(tiny.tiny_pipeline())


def paint(pipe, prompt="the water", seed=0, **settings):
    generator = torch.Generator().manual_seed(seed)
    settings = dict(num_inference_steps=3, guidance_scale=4.0, output_type="latent", generator=generator) | settings
    return pipe(prompt, **settings).images


def error(got, wanted):
    got, wanted = (torch.as_tensor(x) for x in (got, wanted))
    return float((got - wanted).norm() / wanted.norm())


# The same as without


@pytest.mark.parametrize("name", ["none", "default", *bridging.BRIDGES])
@pytest.mark.parametrize("mode", ["blend", "joint"])
def test_regions_of_one_prompt_equal_the_picture_of_that_prompt(pipe, name, mode):
    plain = paint(pipe, "grass", **ODD, bridging=name)
    mask = np.random.default_rng(0).random((200, 332))
    regions = [Region("grass", box=(0, 0, 200, 200), feather=20), Region("grass", mask=mask), Region("grass", box=ALL)]
    assert error(paint(pipe, **ODD, bridging=name, regions=regions, region_mode=mode), plain) < 1e-4
    assert error(paint(pipe, **ODD, bridging=name), plain) > 1e-3


def test_no_regions_equal_the_plain_picture(pipe):
    plain = paint(pipe, **ODD)
    for regions in (None, [], [[]]):
        assert torch.equal(paint(pipe, **ODD, regions=regions), plain)


def test_every_window_has_its_own_regions(pipe):
    got = paint(pipe, **WIDE, regions=[Region("grass", box=LEFT), Region("blue sky", box=(0.5, 0.0, 1.0, 1.0))])
    assert error(got[..., :16], paint(pipe, "grass", **WIDE)[..., :16]) < 1e-4
    assert error(got[..., 16:], paint(pipe, "blue sky", **WIDE)[..., 16:]) < 1e-4


def test_negative_prompts_of_regions(pipe):
    regions = [Region("grass", box=LEFT, negative_prompt="stone"), Region("grass", box=RIGHT)]
    got = paint(pipe, **WIDE, negative_prompt="wood", regions=regions)
    stone, wood = (paint(pipe, "grass", **WIDE, negative_prompt=text) for text in ("stone", "wood"))
    assert error(got[..., :16], stone[..., :16]) < 1e-4 and error(got[..., 16:], wood[..., 16:]) < 1e-4
    assert error(stone, wood) > 1e-3


def test_guidance_of_regions(pipe):
    got = paint(pipe, "grass", **WIDE, regions=[Region("grass", box=LEFT, guidance_scale=1.5)])
    low, high = (paint(pipe, "grass", **WIDE, guidance_scale=scale) for scale in (1.5, 4.0))
    assert error(got[..., :16], low[..., :16]) < 1e-4 and error(got[..., 16:], high[..., 16:]) < 1e-4
    assert error(low, high) > 1e-3
    alone = paint(pipe, "grass", **WIDE, guidance_scale=1.0, regions=[Region("grass", box=LEFT, guidance_scale=4.0)])
    plain = paint(pipe, "grass", **WIDE, guidance_scale=1.0)
    assert error(alone[..., :16], high[..., :16]) < 1e-4 and error(alone[..., 16:], plain[..., 16:]) < 1e-4


def test_regions_for_each_picture(pipe):
    lists = [[Region("grass", box=LEFT)], [Region("blue sky", box=RIGHT), Region("wood", box=LEFT, feather=30)]]
    noise = torch.randn(4, 4, 25, 42, generator=torch.Generator().manual_seed(1))
    both = paint(pipe, ["stone", "the water"], latents=noise, num_images_per_prompt=2, regions=lists, **ODD)
    for i, prompt in enumerate(["stone", "stone", "the water", "the water"]):
        alone = paint(pipe, prompt, latents=noise[i : i + 1], regions=lists[i // 2], **ODD)
        assert error(both[i : i + 1], alone) < 1e-4
    with pytest.raises(ValueError, match="^regions: expected one list, or one for each of 3 pictures, got 2"):
        paint(pipe, ["a"] * 3, regions=lists)


def test_regions_come_and_go_over_the_run(pipe):
    def steps(regions, **settings):
        seen = []
        settings |= dict(callback_on_step_end=lambda pipe, i, t, given: seen.append(given["latents"].clone()))
        paint(pipe, regions=regions, num_inference_steps=4, **ODD, **settings)
        return seen

    def equal(one, other):
        return [error(a, b) < 1e-4 for a, b in zip(one, other)]

    base, grass = steps(None), steps([Region("grass", box=ALL)])
    assert equal(steps([Region("grass", box=ALL, start=0.5)]), base) == [True, True, False, False]
    assert equal(steps([Region("grass", box=ALL, end=0.5)]), grass) == [True, True, False, False]
    assert equal(steps([Region("grass", box=ALL)], semantic_schedule="cosine"), base) == [True, False, False, False]


def test_base_weight(pipe):
    regions = [Region("grass", box=ALL)]
    base, grass = paint(pipe, **ODD), paint(pipe, regions=regions, **ODD)
    mixed = [paint(pipe, regions=regions, base_weight=weight, **ODD) for weight in (0.2, 1.0, 1e6)]
    away = [error(picture, base) for picture in (grass, *mixed)]
    assert away == sorted(away, reverse=True) and away[-1] < 1e-4


# How they are evaluated


def test_evaluations_do_not_depend_on_the_regions(pipe):
    batches, calls = [], []
    hooks = [pipe.unet.register_forward_pre_hook(lambda m, args: batches.append(len(args[0])))]
    for name, module in pipe.unet.named_modules():
        if name.endswith("attn2.to_k"):
            hooks.append(module.register_forward_pre_hook(lambda m, args: calls.append(m)))
    counts = []
    try:
        for n in (0, 1, 16):
            batches.clear()
            calls.clear()
            regions = [Region(f"grass {i}", box=(i, 0, i + 100, 200), negative_prompt=f"wood {i}") for i in range(n)]
            paint(pipe, regions=regions, **ODD)
            counts.append((list(batches), len(calls)))
    finally:
        for hook in hooks:
            hook.remove()
    layers = len(set(calls))
    assert counts[0][0] == counts[1][0] == counts[2][0] and sum(counts[0][0]) == 2 * 3 * 6
    assert counts[1][1] == counts[2][1] == layers < counts[0][1]


def test_the_window_batch_does_not_matter(pipe):
    regions = [Region("grass", box=(0.2, 0.1, 0.9, 0.6), feather=40), Region("blue sky", box=LEFT)]
    one, many = (paint(pipe, regions=regions, window_batch_size=size, **ODD) for size in (1, 6))
    assert error(one, many) < 1e-5


def test_processors_are_put_back(pipe):
    before = pipe.unet.attn_processors

    def fail(*_):
        raise RuntimeError("stop")

    paint(pipe, regions=[Region("grass", box=LEFT)])
    with pytest.raises(RuntimeError, match="stop"):
        paint(pipe, regions=[Region("grass", box=LEFT)], callback_on_step_end=fail)
    assert all(pipe.unet.attn_processors[name] is processor for name, processor in before.items())


@pytest.mark.parametrize("wrap", [(False, True), (True, True)])
def test_regions_over_a_border_that_wraps(pipe, wrap):
    """Turned by a window, noise and regions give the turned picture, whether or not a box crosses the border."""
    size = dict(height=NATIVE, width=3 * NATIVE, bridging="none", wrap=wrap)
    noise = torch.randn(1, 4, 16, 48, generator=torch.Generator().manual_seed(1))
    third = 1 / 3
    over = [Region("grass", box=(0.8, 0.0, 1.2, 1.0), feather=24), Region("wood", box=(0.3, 0.0, 0.5, 1.0))]
    inside = [Region("grass", box=(0.8 - 2 * third, 0.0, 1.2 - 2 * third, 1.0), feather=24)]
    inside.append(Region("wood", box=(0.3 + third, 0.0, 0.5 + third, 1.0)))
    straight = paint(pipe, latents=noise, regions=over, **size)
    turned = paint(pipe, latents=noise.roll(16, -1), regions=inside, **size)
    assert error(straight.roll(16, -1), turned) < 1e-4
    with pytest.raises(ValueError, match="^box: expected 0 to 384 pixels on the horizontal axis"):
        paint(pipe, regions=over, **size | {"wrap": (False, False)})


@pytest.mark.parametrize("size", [(1000, 1400), (712, 1096)])
def test_odd_canvases(size):
    """Masks and boxes on windows of a network of four resolutions, on canvases of odd numbers of cells."""
    four = dict(block_out_channels=(8,) * 4, attention_head_dim=1, sample_size=50)
    four |= dict(down_block_types=("CrossAttnDownBlock2D",) * 4, up_block_types=("CrossAttnUpBlock2D",) * 4)
    pipe = InstantASPipeline.from_pipe(tiny.tiny_pipeline(unet=tiny.unet(**four)))
    height, width = size
    mask = np.zeros(size, dtype=np.float32)
    mask[height // 3 : height // 2, width // 4 :] = 1
    regions = [Region("grass", mask=mask), Region("blue sky", box=(0, 0, 333, height)), Region("wood", box=RIGHT)]
    call = dict(height=height, width=width, num_inference_steps=1)
    picture = paint(pipe, regions=regions, **call)
    assert picture.shape[-2:] == (-(-height // 8), -(-width // 8)) and picture.isfinite().all()
    same = paint(pipe, regions=[Region("grass", mask=mask), Region("grass", mask=1 - mask)], **call)
    assert error(same, paint(pipe, "grass", **call)) < 1e-4


# Other pipelines


def test_sdxl():
    pipe = InstantASPipeline.from_pipe(tiny.tiny_xl_pipeline())
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    grass, water = (dict(zip(names, pipe.encode_prompt(word, device="cpu"))) for word in ("grass", "the water"))
    pooled = {name: water[name] for name in names if "pooled" in name}
    plain = paint(pipe, None, **grass | pooled, **ODD)
    got = paint(pipe, regions=[Region("grass", box=LEFT), Region("grass", box=RIGHT)], **ODD)
    assert error(got, plain) < 1e-4 and error(paint(pipe, **ODD), plain) > 1e-3


def test_controlnet_goes_on_with_the_base_prompt():
    net = tiny.tiny_controlnet()
    pipe = InstantASPipeline.from_pipe(tiny.tiny_pipeline(kind=StableDiffusionControlNetPipeline, controlnet=net))
    image = torch.rand(1, 3, 200, 332, generator=torch.Generator().manual_seed(2))
    seen = []
    hook = net.register_forward_pre_hook(lambda m, a, k: seen.append(k["encoder_hidden_states"]), with_kwargs=True)
    plain = paint(pipe, image=image, **ODD)
    given = list(seen)
    seen.clear()
    same = paint(pipe, image=image, regions=[Region("the water", box=LEFT)], **ODD)
    other = paint(pipe, image=image, regions=[Region("grass", box=LEFT)], **ODD)
    hook.remove()
    assert error(same, plain) < 1e-4 < 1e-3 < error(other, plain)
    assert all(torch.equal(a, b) for a, b in zip(given * 2, seen, strict=True))


def test_lora():
    pipe = InstantASPipeline.from_pipe(tiny.tiny_pipeline())
    torch.manual_seed(5)
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    pipe.unet.add_adapter(LoraConfig(r=4, lora_alpha=16, init_lora_weights=False, target_modules=targets))
    config = LoraConfig(r=4, lora_alpha=16, init_lora_weights=False, target_modules=["q_proj", "v_proj"])
    inject_adapter_in_model(config, pipe.text_encoder)
    for scale in (1.0, 0.25):
        settings = dict(cross_attention_kwargs={"scale": scale}, **ODD)
        got = paint(pipe, regions=[Region("grass", box=ALL)], **settings)
        assert error(got, paint(pipe, "grass", **settings)) < 1e-4


# Bad input


@pytest.mark.parametrize(
    "settings, kind, words",
    [
        (dict(regions=[Region("a", mask=np.ones((64, 128)))]), ValueError, "mask: expected the canvas's proportions"),
        (dict(regions=[Region("a", box=(0, 0, 400, 100))]), ValueError, "box: expected 0 to 332 pixels"),
        (dict(regions=[Region("a", box=ALL)] * 64), ValueError, "regions: expected at most 63 for a picture, got 64"),
        (dict(regions=["a"]), TypeError, "regions: expected a list of Region"),
        (dict(region_mode="add"), ValueError, "region_mode: expected"),
        (dict(base_weight=-0.1), ValueError, "base_weight: expected 0 to"),
        (dict(semantic_schedule="late"), ValueError, "semantic_schedule: expected one of"),
    ],
)
def test_bad_input_is_refused_before_any_evaluation(pipe, settings, kind, words):
    calls = []
    hook = pipe.unet.register_forward_pre_hook(lambda *_: calls.append(1))
    with pytest.raises(kind, match=f"^{words}"):
        paint(pipe, **ODD, **settings)
    hook.remove()
    assert not calls


def test_long_prompt_of_a_region_warns(pipe):
    with pytest.warns(UserWarning, match="cut off: 'blue sky'"):
        paint(pipe, regions=[Region(" ".join(["grass"] * 14) + " blue sky", box=LEFT)])


def test_mask_of_another_size_is_resized_by_area(pipe):
    mask = np.zeros((400, 664), dtype=np.float32)
    mask[100:300, 200:400] = 1
    small = mask.reshape(200, 2, 332, 2).mean((1, 3))
    got, wanted = (paint(pipe, regions=[Region("grass", mask=m)], **ODD) for m in (mask, small))
    assert error(got, wanted) < 1e-5


# MultiDiffusion's region mode


def by_the_book(pipe, prompts, masks, noise, colours, stride, size, steps, guidance):
    """MultiDiffusion with regions, as in the paper: every window and region denoised apart, masks averaged.

    masks: (R, H, W), the first prompt is the background's; colours: (20, C).
    """
    scheduler = pipe.scheduler
    scheduler.set_timesteps(steps)
    text = [pipe.encode_prompt(word, "cpu", 1, False)[0] for word in prompts]
    empty, latent = pipe.encode_prompt("", "cpu", 1, False)[0], noise.clone()
    places = [sorted({*range(0, length - 15, stride), length - 16}) for length in size]
    for i, t in enumerate(scheduler.timesteps):
        total, count = torch.zeros_like(latent), torch.zeros_like(latent)
        for y in places[0]:
            for x in places[1]:
                here = (..., slice(y, y + 16), slice(x, x + 16))
                for r in range(len(prompts)):
                    view = latent[here]
                    if i < 20 and r > 0:
                        colour = colours[i][None, :, None, None].expand_as(view)
                        plain = scheduler.add_noise(colour, noise[here], t[None])
                        view = view * masks[r][here[1:]] + plain * (1 - masks[r][here[1:]])
                    both = pipe.unet(view.repeat(2, 1, 1, 1), t, torch.cat([empty, text[r]])).sample
                    predicted = both[:1] + guidance * (both[1:] - both[:1])
                    denoised = scheduler.step(predicted, t, latent[here]).prev_sample
                    total[here] += denoised * masks[r][here[1:]]
                    count[here] += masks[r][here[1:]]
        latent = total / count
    return latent


@torch.no_grad()
def test_multidiffusion_by_regions_is_what_the_paper_says(pipe, monkeypatch):
    noise = torch.randn(1, 4, 16, 30, generator=torch.Generator().manual_seed(3))
    colours = torch.randn(20, 4, generator=torch.Generator().manual_seed(4))
    monkeypatch.setattr("instantas.pipelines.pipeline.plain_colours", lambda *_: colours)
    grass = torch.zeros(16, 30)
    grass[:, :11] = 1
    sky = torch.zeros(16, 30)
    sky[4:12, 8:20] = 1
    masks = torch.stack([1 - torch.maximum(grass, sky), grass, sky])
    regions = [
        Region("grass", box=(0, 0, 88, 128)),
        Region("blue sky", mask=sky.repeat_interleave(8, 0).repeat_interleave(8, 1)),
    ]
    size, steps = dict(height=NATIVE, width=240), 22
    call = dict(num_inference_steps=steps, latents=noise, method="multidiffusion", stride=7, guidance_scale=3.0)
    got = paint(pipe, regions=regions, **size, **call)
    words = ["the water", "grass", "blue sky"]
    wanted = by_the_book(pipe.pipe, words, masks, noise, colours, 7, (16, 30), steps, 3.0)
    assert error(got, wanted) < 1e-3
    monkeypatch.setattr(multidiffusion, "BOOTSTRAPPING", 0)
    monkeypatch.setattr("instantas.pipelines.pipeline.plain_colours", lambda *_: colours[:0])
    assert error(paint(pipe, regions=regions, **size, **call), wanted) > 1e-2


def test_multidiffusion_of_one_region_is_the_plain_panorama(pipe):
    call = dict(method="multidiffusion", stride=8, **ODD)
    got = paint(pipe, regions=[Region("grass", box=ALL, negative_prompt="wood")], negative_prompt="stone", **call)
    assert error(got, paint(pipe, "grass", negative_prompt="wood", **call)) < 1e-4


def test_multidiffusion_evaluates_once_for_each_region_and_window(pipe):
    batches = []
    hook = pipe.unet.register_forward_pre_hook(lambda m, args: batches.append(len(args[0])))
    regions = [Region("grass", box=LEFT), Region("blue sky", box=RIGHT)]
    paint(pipe, regions=regions, method="multidiffusion", stride=8, num_inference_steps=2, **ODD)
    hook.remove()
    windows = pipe.plan(200, 332, method="multidiffusion", stride=8).count
    assert sum(batches) == 2 * 2 * 3 * windows

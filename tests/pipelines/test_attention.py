"""Regional prompts in a UNet: what equals the plain network, what a region can reach, and what is put back."""

import contextlib

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline, UNet2DConditionModel, UNet2DModel
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0, IPAdapterAttnProcessor2_0
from peft import LoraConfig

from instantas import ops
from instantas.pipelines.attention import RegionalAttnProcessor, regional_prompts
from instantas.regions import Region, RegionMap
from instantas.regions.prompts import encode_prompts
from instantas.testing import tiny
from instantas.windows import WindowPlan

ALL, LEFT, RIGHT = (0.0, 0.0, 1.0, 1.0), (0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)
WORDS = ("red brick wall", "grass", "blue sky", "the water")


@pytest.fixture(scope="module")
def text():
    """Text -> its embedding (1, 16, 32)."""
    pipe = tiny.tiny_pipeline()
    embedded = {word: encode_prompts(pipe, [word]) for word in (*WORDS, "", "stone")}
    return lambda *texts: torch.cat([embedded[t] for t in texts])


@pytest.fixture
def unet():
    return tiny.unet()


@pytest.fixture(scope="module")
def noise():
    return torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))


def error(got, wanted):
    return float((got - wanted).norm() / wanted.norm())


def regional(unet, text, regions, **settings):
    return regional_prompts(
        unet, regions, **dict(encode=lambda texts: text(*texts), classifier_free_guidance=False) | settings
    )


def cross_attention(unet):
    return [m for m in unet.modules() if hasattr(m, "is_cross_attention") and m.is_cross_attention]


@contextlib.contextmanager
def counted(unet, names=("to_k", "to_v", "to_kv")):
    """The calls of the projections of keys and values, by their name in the network."""
    calls, hooks = {}, []
    for name, module in unet.named_modules():
        if "attn2." in name and name.rpartition(".")[2] in names:
            calls[name] = 0

            def count(*_, name=name):
                calls[name] += 1

            hooks.append(module.register_forward_pre_hook(count))
    yield calls
    for hook in hooks:
        hook.remove()


# The same as the plain network


def same_prompt(word):
    soft = torch.rand(128, 128, generator=torch.Generator().manual_seed(1))
    return {
        "one": [Region(word, box=ALL)],
        "two halves": [Region(word, box=LEFT), Region(word, box=RIGHT)],
        "overlapping": [Region(word, box=ALL, weight=w) for w in (1.0, 0.5)] + [Region(word, mask=soft)],
        "three soft": [Region(word, mask=soft), Region(word, mask=1 - soft), Region(word, box=LEFT, feather=40)],
        "four quarters": [Region(word, box=(x, y, x + 0.5, y + 0.5)) for x in (0.0, 0.5) for y in (0.0, 0.5)],
    }


@pytest.mark.parametrize("mode", ["blend", "joint"])
@pytest.mark.parametrize("name", list(same_prompt("")))
@torch.no_grad()
def test_regions_of_one_prompt_equal_the_plain_network_with_it(unet, text, noise, name, mode):
    plain = unet(noise, 500, text("grass", "grass")).sample
    base = text("the water", "blue sky")
    with regional(unet, text, same_prompt("grass")[name], mode=mode):
        got = unet(noise, 500, base).sample
    assert error(got, plain) < 1e-4
    assert error(unet(noise, 500, base).sample, plain) > 1e-2


@torch.no_grad()
def test_no_regions_equal_the_plain_network(unet, text, noise):
    plain = unet(noise, 500, text("grass", "")).sample
    with regional_prompts(unet, []):
        got = unet(noise, 500, text("grass", "")).sample
    assert error(got, plain) < 1e-4


@torch.no_grad()
def test_modes_differ_only_where_regions_mix(unet, text, noise):
    def run(mode, feather):
        regions = [Region("grass", box=LEFT, feather=feather), Region("blue sky", box=RIGHT, feather=feather)]
        with regional(unet, text, regions, mode=mode):
            return unet(noise, 500, text("", "")).sample

    assert error(run("joint", 0), run("blend", 0)) < 1e-4
    assert error(run("joint", 64), run("blend", 64)) > 1e-4


@torch.no_grad()
def test_negative_prompts_of_regions(unet, text, noise):
    """A batch [uncond, cond]: the unconditional half has the regions' negative prompts, or the base's."""
    noise = torch.cat([noise[:1]] * 2)
    regions = [Region("grass", box=ALL, negative_prompt="the water")]
    with regional(unet, text, regions, classifier_free_guidance=True):
        got = unet(noise, 500, text("", "stone")).sample
    assert error(got, unet(noise, 500, text("the water", "grass")).sample) < 1e-4
    with regional(unet, text, [Region("grass", box=ALL)], classifier_free_guidance=True):
        got = unet(noise, 500, text("blue sky", "stone")).sample
    assert error(got, unet(noise, 500, text("blue sky", "grass")).sample) < 1e-4


@torch.no_grad()
def test_regions_for_each_picture_of_a_batch(unet, text, noise):
    lists = [[Region("grass", box=ALL)], [Region("blue sky", box=LEFT), Region("blue sky", box=RIGHT)]]
    with regional(unet, text, lists):
        got = unet(noise, 500, text("stone", "stone")).sample
    assert error(got, unet(noise, 500, text("grass", "blue sky")).sample) < 1e-4
    four, base = noise.repeat_interleave(2, 0), text("", "", "", "")
    with regional(unet, text, lists):  # two pictures of each prompt
        got = unet(four, 500, base).sample
    assert error(got, unet(four, 500, text("grass", "grass", "blue sky", "blue sky")).sample) < 1e-4
    with regional(unet, text, lists), pytest.raises(ValueError, match="^regions: expected one list, or .* 3 pictures"):
        unet(four[:3], 500, base[:3])


@torch.no_grad()
def test_windows_see_their_part_of_the_regions(unet, text):
    """Windows of a plan equal crops of the masks given as masks of whole canvases."""
    mask = torch.rand(160, 256, generator=torch.Generator().manual_seed(2))
    regions = RegionMap([Region("grass", mask=mask)], 160, 256, wrap=(False, True), base_weight=0.1)
    plan = WindowPlan.minimum_coverage(20, 32, 16, wrap=(False, True), shift=(0, 9))
    rows = torch.tensor([[0, i] for i in range(plan.count)])
    windows = torch.randn(plan.count, 4, 16, 16, generator=torch.Generator().manual_seed(3))
    with regional(unet, text, regions) as prompts:
        prompts.base(text("stone"), text("the water"))
        prompts.set_windows(plan, rows)
        both = unet(windows.repeat(2, 1, 1, 1), 500, text("").repeat(2 * plan.count, 1, 1)).sample
        prompts.set_windows(plan, rows[1:3])
        some = unet(windows[1:3], 500, text("", "")).sample
    uncond, cond = both.chunk(2)
    assert error(some, cond[1:3]) < 1e-4
    for window, (y, x) in enumerate(plan.origins * 8):
        crop = mask.roll((-int(y), -int(x)), (0, 1))[:128, :128]
        for got, word, shown in ((cond, "stone", "grass"), (uncond, "the water", "the water")):
            with regional(unet, text, [Region(shown, mask=crop)], base_weight=0.1):
                wanted = unet(windows[window, None], 500, text(word)).sample
            assert error(got[window, None], wanted) < 1e-4


# What a region can reach


@contextlib.contextmanager
def watched(unet, inputs=None):
    """(hidden states, output) of every cross-attention layer; given inputs replace the layer's own."""
    seen, hooks = [], []

    def replace(attn, args, kwargs):
        if inputs is not None:
            return (inputs[len(seen)], *args[1:]), kwargs

    def remember(attn, args, kwargs, output):
        seen.append((args[0].clone(), output.clone(), kwargs["encoder_hidden_states"].grid))

    for attn in cross_attention(unet):
        hooks.append(attn.register_forward_pre_hook(replace, with_kwargs=True))
        hooks.append(attn.register_forward_hook(remember, with_kwargs=True))
    yield seen
    for hook in hooks:
        hook.remove()


def layers_with_and_without(unet, text, sample, regions, changed, **settings):
    """For every layer: outputs before and after a region's prompt is changed, on the same hidden states."""
    base = text("stone").expand(len(sample), -1, -1)
    with regional(unet, text, regions, **settings), watched(unet) as before:
        unet(sample, 500, base)
    with regional(unet, text, changed, **settings), watched(unet, [states for states, _, _ in before]) as after:
        unet(sample, 500, base)
    assert len(before) == len(after) == len(cross_attention(unet))
    return [(grid, a, b) for (_, a, grid), (_, b, _) in zip(before, after)]


def reach(mask, cells, grid):
    """(h w,) bool: the queries whose part of the canvas, in ceil-halved grids, the mask touches."""
    touched = np.zeros(cells, dtype=bool)
    ys, xs = np.nonzero(mask)
    touched[ys // 8, xs // 8] = True
    while touched.shape != grid:
        h, w = (-(-n // 2) for n in touched.shape)
        wide = np.zeros((2 * h, 2 * w), dtype=bool)
        wide[: touched.shape[0], : touched.shape[1]] = touched
        touched = wide.reshape(h, 2, w, 2).any((1, 3))
    return torch.from_numpy(touched.flatten())


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("mode", ["blend", "joint"])
@torch.no_grad()
def test_queries_outside_of_a_region_do_not_know_its_prompt(unet, text, noise, backend, mode):
    if not ops.backends()[backend]:
        pytest.skip(f"{backend}: {ops.backends()[backend]}")
    mask = np.zeros((128, 128), dtype=np.float32)
    mask[10:70, 30:90] = 0.7
    around = [Region("blue sky", box=LEFT, feather=32), Region("the water", box=(0.4, 0.0, 1.0, 1.0))]
    regions, changed = ([Region(word, mask=mask), *around] for word in ("grass", "red brick wall"))
    with ops.use_backend(backend):
        layers = layers_with_and_without(unet, text, noise, regions, changed, mode=mode, base_weight=0.1)
    assert {grid for grid, _, _ in layers} == {(16, 16), (8, 8)}
    for grid, before, after in layers:
        inside = reach(mask, (16, 16), grid)
        assert torch.equal(before[:, ~inside], after[:, ~inside])
        assert (before[:, inside] != after[:, inside]).any(-1).all()


def test_regions_reach_every_resolution_of_odd_canvases(text):
    """1000x1400 and 712x1096 px: 125x175 and 89x137 cells, three times ceil-halved."""
    four = dict(
        block_out_channels=(8, 8, 8, 8),
        attention_head_dim=1,
        down_block_types=("CrossAttnDownBlock2D",) * 4,
        up_block_types=("CrossAttnUpBlock2D",) * 4,
    )
    grids = {
        (1000, 1400): {(125, 175), (63, 88), (32, 44), (16, 22)},
        (712, 1096): {(89, 137), (45, 69), (23, 35), (12, 18)},
    }
    for height, width in grids:
        # without self-attention the large one is a matter of a second
        unet = tiny.unet(**four, only_cross_attention=height == 1000)
        mask = np.zeros((height, width), dtype=np.float32)
        yy, xx = np.mgrid[:height, :width]
        mask[(yy - 300) ** 2 + (xx - 700) ** 2 < 200**2] = 1
        around = [Region("blue sky", box=(0, 0, 333, height)), Region("the water", box=(0.7, 0.51, 1.0, 1.0))]
        regions, changed = ([Region(word, mask=mask), *around] for word in ("grass", "red brick wall"))
        sample = torch.randn(1, 4, height // 8, width // 8, generator=torch.Generator().manual_seed(4))
        with torch.no_grad():
            layers = layers_with_and_without(unet, text, sample, regions, changed)
        assert {grid for grid, _, _ in layers} == grids[height, width]
        for grid, before, after in layers:
            inside = reach(mask, sample.shape[-2:], grid)
            assert 0 < inside.sum() < len(inside)
            assert torch.equal(before[:, ~inside], after[:, ~inside])
            assert (before[:, inside] != after[:, inside]).any(-1).all()


# Keys and values are projected once


@torch.no_grad()
def test_projected_once_for_each_layer_and_run(unet, text, noise):
    regions = [Region(word, box=LEFT) for word in WORDS]
    with counted(unet) as calls:
        with regional(unet, text, regions):
            base = text("stone", "stone")
            for t in (900, 500, 100):
                unet(noise, t, base)
            assert calls and set(calls.values()) == {1}
            unet(noise, 100, base.clone())  # the same prompts in another tensor
            assert set(calls.values()) == {1}
            unet(noise, 100, text("stone", ""))
            assert set(calls.values()) == {2}
        with regional(unet, text, regions):
            unet(noise, 100, base)
    assert set(calls.values()) == {3}


@torch.no_grad()
def test_projected_again_when_a_weight_changes(unet, text, noise):
    base = text("stone", "stone")
    with regional(unet, text, [Region("grass", box=ALL)]), counted(unet) as calls:
        unet(noise, 500, base)
        changed = [name for name in calls if name.endswith("to_v")][0]
        unet.get_submodule(changed).weight.mul_(3)
        got = unet(noise, 500, base).sample
        layer = changed.removesuffix("to_v")
        assert {name for name, count in calls.items() if count == 2} == {f"{layer}to_k", f"{layer}to_v"}
    assert error(got, unet(noise, 500, text("grass", "grass")).sample) < 1e-4


# LoRA, fused projections, slicing, compilation, precision


LORA = dict(r=4, init_lora_weights=False, target_modules=["to_q", "to_k", "to_v", "to_out.0"])


@torch.no_grad()
def test_lora(unet, text, noise):
    grass = text("grass", "grass")
    without = unet(noise, 500, grass).sample
    torch.manual_seed(5)
    unet.add_adapter(LoraConfig(**LORA, lora_alpha=16))

    def evaluations(embeddings):
        """With the adapter, at a quarter of its scale by a keyword, again, at half by its own, and without it."""
        yield unet(noise, 500, embeddings).sample
        yield unet(noise, 500, embeddings, cross_attention_kwargs={"scale": 0.25}).sample
        yield unet(noise, 500, embeddings).sample
        unet.set_adapters("default", 0.5)
        yield unet(noise, 500, embeddings).sample
        unet.disable_adapters()
        yield unet(noise, 500, embeddings).sample
        unet.enable_adapters()
        unet.set_adapters("default", 1.0)

    plain = list(evaluations(grass))
    with regional(unet, text, [Region("grass", box=ALL)]):
        got = list(evaluations(text("", "")))
    assert max(map(error, got, plain)) < 1e-4
    assert error(plain[-1], without) == 0
    assert min(error(a, b) for a, b in zip(plain[:-1], plain[1:])) > 1e-3


@torch.no_grad()
def test_fused_lora(unet, text, noise):
    torch.manual_seed(6)
    unet.add_adapter(LoraConfig(**LORA, lora_alpha=8))
    with regional(unet, text, [Region("grass", box=ALL)]):
        apart = unet(noise, 500, text("", "")).sample
        unet.fuse_lora()
        fused = unet(noise, 500, text("", "")).sample
        unet.unfuse_lora()
        unet.disable_adapters()
        without = unet(noise, 500, text("", "")).sample
    assert error(fused, apart) < 1e-4 and error(without, apart) > 1e-3


@torch.no_grad()
def test_fused_projections(unet, text, noise):
    plain = unet(noise, 500, text("grass", "grass")).sample
    unet.fuse_qkv_projections()
    with regional(unet, text, [Region("grass", box=ALL)]), counted(unet) as calls:
        for _ in range(2):
            assert error(unet(noise, 500, text("", "")).sample, plain) < 1e-4
    assert {name.rpartition(".")[2]: count for name, count in calls.items() if count} == {"to_kv": 1}


@torch.no_grad()
def test_attention_slicing(unet, text, noise):
    plain = unet(noise, 500, text("grass", "grass")).sample
    unet.set_attention_slice("max")
    before = unet.attn_processors
    with regional(unet, text, [Region("grass", box=ALL)]):
        got = unet(noise, 500, text("", "")).sample
    assert error(got, plain) < 1e-4
    assert all(unet.attn_processors[name] is processor for name, processor in before.items())


@pytest.mark.parametrize("in_place", [False, True])
@torch.no_grad()
def test_compiled_before(unet, text, noise, in_place):
    plain = unet(noise, 500, text("grass", "grass")).sample
    torch._dynamo.reset()
    settings = dict(backend="eager" if in_place else "aot_eager", fullgraph=True)
    if in_place:
        unet.compile(**settings)
    compiled = unet if in_place else torch.compile(unet, **settings)
    mask = np.zeros((128, 128), dtype=np.float32)
    mask[10:70, 30:90] = 1
    regions = [Region("grass", box=ALL), Region("grass", mask=mask, start=0.5)]
    schedule = tiny.scheduler()
    schedule.set_timesteps(4)
    with regional(compiled, text, regions, scheduler=schedule):
        got = [compiled(noise, schedule.timesteps[0], text("", "")).sample]
        with torch.compiler.set_stance("fail_on_recompile"):
            for t in schedule.timesteps[1:]:
                got.append(compiled(noise, t, text("", "")).sample)
    wanted = [unet(noise, t, text("grass", "grass")).sample for t in schedule.timesteps]
    assert all(error(a, b) < 1e-4 for a, b in zip(got, wanted))
    assert error(compiled(noise, 500, text("grass", "grass")).sample, plain) < 1e-4
    torch._dynamo.reset()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision(unet, text, noise, dtype):
    exact = unet(noise, 500, text("grass", "grass")).sample
    unet, noise = unet.to(dtype), noise.to(dtype)
    plain = unet(noise, 500, text("grass", "grass").to(dtype)).sample
    with regional(unet, text, same_prompt("grass")["three soft"]):
        got = unet(noise, 500, text("", "").to(dtype)).sample
    assert got.dtype == dtype
    assert error(got.float(), exact) < 2 * error(plain.float(), exact)


@torch.no_grad()
def test_autocast(unet, text, noise):
    with torch.autocast("cpu", torch.bfloat16):
        plain = unet(noise, 500, text("grass", "grass")).sample
        with regional(unet, text, [Region("grass", box=ALL)]):
            got = unet(noise, 500, text("", "")).sample
    exact = unet(noise, 500, text("grass", "grass")).sample
    assert error(got, exact) < 2 * error(plain, exact)


@pytest.mark.parametrize("backend", ["native", "_native_math"])
@torch.no_grad()
def test_attention_backends_of_diffusers(unet, text, noise, backend):
    """Chosen inside of the block, and before it."""
    plain, before = unet(noise, 500, text("grass", "grass")).sample, unet.attn_processors
    try:
        with regional(unet, text, [Region("grass", box=ALL)]):
            unet.set_attention_backend(backend)
            got = [unet(noise, 500, text("", "")).sample]
            unet.reset_attention_backend()
            unet.set_attention_backend(backend)
        with regional(unet, text, [Region("grass", box=ALL)]):
            got.append(unet(noise, 500, text("", "")).sample)
            unet.reset_attention_backend()
    finally:
        _AttentionBackendRegistry.set_active_backend(AttentionBackendName.NATIVE)
    assert max(error(one, plain) for one in got) < 1e-4 and unet.attn_processors == before


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
        (dict(base_weight=-1), ValueError, "base_weight: expected 0 or more"),
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


# Pipelines of diffusers


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

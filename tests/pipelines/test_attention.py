"""Regional prompts in a UNet: what equals the plain network, what a region can reach, which networks are served."""

import contextlib

import numpy as np
import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from peft import LoraConfig

from instantas import ops
from instantas.pipelines.attention import regional_prompts
from instantas.regions import Region, RegionMap
from instantas.testing import tiny
from instantas.windows import WindowPlan
from tests.pipelines.attending import ALL, LEFT, RIGHT, WORDS, counted, cross_attention, error, regional

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

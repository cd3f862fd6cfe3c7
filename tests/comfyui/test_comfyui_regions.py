"""Regional prompts in a ComfyUI checkout (COMFYUI=folder), on whole canvases and through windows."""

import pytest
import torch

from instantas.comfyui import Region, Regions, Windows
from tests.comfyui.checkout import WINDOW, noise, prompt

PIXELS = 8 * WINDOW


def difference(ours, theirs):
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def mask(height, width, top=0.0, left=0.0, bottom=1.0, right=1.0):
    rows, columns = 8 * height, 8 * width
    found = torch.zeros(1, rows, columns)
    found[:, int(top * rows) : int(bottom * rows), int(left * columns) : int(right * columns)] = 1
    return found


def regional(model, *regions, mode="blend", base_weight=0.0):
    """regions: (prompt, mask, settings)"""
    listed = ()
    for conditioning, where, *settings in regions:
        (listed,) = Region().add(conditioning, where, regions=listed, **dict(*settings))
    return Regions().patch(model, listed, mode=mode, base_weight=base_weight)[0]


def windowed(model, **settings):
    return Windows().patch(model, PIXELS, PIXELS, **settings)[0]


@pytest.mark.parametrize("mode", ["blend", "joint"])
@pytest.mark.parametrize("size", [(WINDOW, WINDOW), (24, 40)])
def test_one_region_over_everything_is_its_prompt_alone(model, run, size, mode):
    start, found = noise(*size, batch=2), prompt(7)
    patched = regional(model, (found, mask(*size)), mode=mode)
    if size == (24, 40):
        model, patched = windowed(model), windowed(patched)
    ours, alone = run(patched, start), run(model, start, positive=found)
    print(f"one region over everything, {size}, {mode}: {difference(ours.result, alone.result):.1e}")
    assert difference(ours.result, alone.result) <= 1e-5
    assert ours.count == alone.count
    assert difference(ours.result, run(model, start).result) >= 1e-2


def test_windows_and_regions_in_either_order(model, run):
    start, region = noise(24, 40), (prompt(7), mask(24, 40, right=0.5))
    one, other = windowed(regional(model, region)), regional(windowed(model), region)
    assert torch.equal(run(one, start).result, run(other, start).result)


@pytest.mark.parametrize("bridging", ["shift", "economy", "centred", "dilated"])
def test_a_region_is_at_its_place_in_every_window(model, run, bridging):
    """Two regions with one prompt that halve the canvas are the prompt everywhere."""
    start, found = noise(24, 40), prompt(7)
    halves = [(found, mask(24, 40, right=0.5)), (found, mask(24, 40, left=0.5))]
    ours = run(windowed(regional(model, *halves), bridging=bridging), start)
    alone = run(windowed(model, bridging=bridging), start, positive=found)
    assert difference(ours.result, alone.result) <= 1e-5


def test_regions_lie_where_their_windows_lie(model, run):
    """Windows that do not overlap: the left one is its prompt alone, the right one the other's."""
    start = noise(WINDOW, 2 * WINDOW)
    regions = [(prompt(7), mask(WINDOW, 2 * WINDOW, right=0.5)), (prompt(8), mask(WINDOW, 2 * WINDOW, left=0.5))]
    ours = run(windowed(regional(model, *regions), bridging="none"), start).result
    for i, part in enumerate(start.split(WINDOW, dim=-1)):
        alone = run(model, part, positive=regions[i][0]).result
        assert difference(ours[..., i * WINDOW :][..., :WINDOW], alone) <= 1e-5


def test_regions_have_their_part_of_the_run(comfy, model, run):
    """In a run of two steps: the first has the region's prompt, the second the base prompt."""
    start, everywhere = noise(WINDOW, WINDOW), mask(WINDOW, WINDOW)
    ours = run(regional(model, (prompt(7), everywhere, {"end": 0.5})), start, steps=2)
    timed = prompt(7, start_percent=0.0, end_percent=0.2) + prompt(1, start_percent=0.2, end_percent=1.0)
    theirs = run(model, start, steps=2, positive=timed)
    assert ours.count == theirs.count
    assert difference(ours.result, theirs.result) <= 1e-5
    assert difference(ours.result, run(model, start, steps=2).result) >= 1e-2


@pytest.mark.parametrize("mode", ["blend", "joint"])
def test_prompts_of_several_lengths(model, run, mode):
    """A region of the base prompt's own words changes nothing, however ComfyUI or the bank repeats them."""
    start, base = noise(WINDOW, WINDOW), prompt(1)
    patched = regional(model, (base, mask(WINDOW, WINDOW, right=0.5)), mode=mode)
    long = prompt(2, tokens=14)
    assert difference(run(patched, start, negative=long).result, run(model, start, negative=long).result) <= 1e-5


@pytest.mark.parametrize("mode", ["blend", "joint"])
def test_overlapping_regions_are_brute_force(model, run, mode):
    """Attention written out in a patch of its own, with the masks' means at every resolution."""
    start = noise(WINDOW, WINDOW)
    regions = [
        (prompt(7), mask(WINDOW, WINDOW, right=0.75), {"weight": 2.0}),
        (prompt(8, tokens=14), mask(WINDOW, WINDOW, left=0.25, top=0.25)),
    ]
    ours = run(regional(model, *regions, mode=mode, base_weight=0.25), start).result
    masks = torch.stack([weight * where[0] for weight, (_, where, *_) in zip((2.0, 1.0), regions)])
    masks = torch.nn.functional.avg_pool2d(masks, 8)
    shares = torch.cat([(1 - masks.sum(0, keepdim=True)).clamp(min=0) + 0.25, masks])
    written_out = model.clone()
    lengths = [7, 7, 7, 14]

    def swap(query, context, value, options):
        assert options["cond_or_uncond"] == [1, 0]
        bank = torch.cat([*context[:, :7], *(found[0][0][0] for found, *_ in regions)])[None]
        return query, bank, bank

    def attend(query, key, value, options):
        split = lambda t: t.unflatten(-1, (options["n_heads"], -1)).transpose(1, 2)  # noqa: E731
        q, k, v = split(query), split(key).split(lengths, dim=2), split(value).split(lengths, dim=2)
        grid = options["activations_shape"][-2:]
        weights = torch.nn.functional.adaptive_avg_pool2d(shares, grid).flatten(1)[:, None, :, None]
        own = lambda i, r: q[i] @ k[r][0].transpose(-1, -2) * q.shape[-1] ** -0.5  # noqa: E731
        uncond = own(0, 0).softmax(-1) @ v[0][0]
        if mode == "blend":
            parts = [weights[i] * (own(1, r).softmax(-1) @ v[r][0]) for i, r in enumerate((1, 2, 3))]
            cond = sum(parts) / weights.sum(0)
        else:
            logits = torch.cat([own(1, r) + weights[i].log() for i, r in enumerate((1, 2, 3))], dim=-1)
            cond = logits.softmax(-1) @ torch.cat([v[r][0] for r in (1, 2, 3)], dim=1)
        return torch.stack([uncond, cond]).transpose(1, 2).flatten(-2)

    written_out.set_model_attn2_patch(swap)
    for block, number in [
        ("input", 1),
        ("input", 3),
        ("middle", 0),
        ("output", 0),
        ("output", 1),
        ("output", 2),
        ("output", 3),
    ]:
        written_out.set_model_attn2_replace(attend, block, number)
    theirs = run(written_out, start).result
    print(f"two overlapping regions, {mode}: {difference(ours, theirs):.1e} from brute force")
    assert difference(ours, theirs) <= 1e-5


def test_what_regions_cannot_be_beside_is_refused(comfy, model, run):
    everywhere = prompt(7), mask(WINDOW, WINDOW)
    start = noise(WINDOW, WINDOW)
    with pytest.raises(ValueError, match="conditioning: expected no areas beside regions"):
        run(regional(model, everywhere), start, positive=prompt(1, area=(8, 8, 0, 0)))
    with pytest.raises(ValueError, match="model: expected cross-attention that no other node replaces"):
        regional(regional(model, everywhere), everywhere)
    later = regional(model, everywhere)
    later.set_model_attn2_replace(lambda query, key, value, options: query, "middle", 0)
    with pytest.raises(ValueError, match="IP-Adapter"):
        run(later, start)
    with pytest.raises(ValueError, match="mask: expected the canvas's proportions"):
        run(regional(model, (prompt(7), mask(16, 24))), start)
    guider = comfy.samplers.CFGGuider(regional(model, everywhere))
    guider.inner_set_conds({"first": prompt(1)})
    with pytest.raises(ValueError, match="guider: expected one with positive conditions, got first"):
        guider.sample(start, start, comfy.samplers.sampler_object("euler"), torch.tensor([1.0, 0.0]))

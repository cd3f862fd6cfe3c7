"""The nodes that give parts of the canvas prompts, with stand-ins for what ComfyUI calls them with."""

from types import SimpleNamespace

import pytest
import torch

from instantas import ops
from instantas.comfyui import Region, Regions
from instantas.comfyui.regions import ATTENDED, RegionHooks
from instantas.sampling.hosted import Place
from instantas.windows import WindowPlan
from tests.comfyui.checkout import noise, prompt
from tests.comfyui.stand_ins import SIGMAS, WINDOW, Executor, Patcher, comfy  # noqa: F401


def left(columns=160):
    mask = torch.zeros(1, 96, columns)
    mask[..., : columns // 2] = 1
    return mask


def listed(*regions):
    found = ()
    for conditioning, mask in regions:
        (found,) = Region().add(conditioning, mask, regions=found)
    return found


def lay_out(hooks, x, place=None, uuids=("positive", "negative")):
    """The bank and the layout with which a network would be evaluated."""
    context = torch.cat([prompt(i)[0][0] for i in range(len(uuids))]).repeat_interleave(len(x) // len(uuids), 0)
    options = {"uuids": list(uuids), "sigmas": SIGMAS[:1], "patches_replace": {"attn2": {("middle", 0): hooks.attend}}}
    options |= {} if place is None else {"instantas": place}
    seen = []
    hooks.evaluate(lambda *args, **named: seen.append(args[5]), x, None, context, transformer_options=options)
    return seen[0]


def regional_hooks(regions, mode="blend", uuids=("positive",)):
    hooks = RegionHooks(regions, mode, 0.0)
    hooks._lengths, hooks._sigmas = dict.fromkeys(uuids, 7), SIGMAS
    return hooks


def test_windows_have_their_part_of_the_regions_and_the_negative_prompt_none():
    plan = WindowPlan.minimum_coverage(12, 20, WINDOW)
    place = Place(plan, torch.arange(2).repeat_interleave(2), torch.tensor([[0, 0], [4, 12]] * 2).int(), range(2), 0.0)
    hooks = regional_hooks(listed((prompt(7), left())))
    bank, layout = lay_out(hooks, noise(WINDOW, WINDOW, batch=4), place)[ATTENDED]
    assert bank.shape == (3, 7, 32)  # positive, negative, the region's
    weights = layout.weights_at((WINDOW, WINDOW))
    assert layout.ids.tolist() == [[0, 2], [0, 2], [1, -1], [1, -1]]
    for element, (base, region) in enumerate([(0.0, 1.0), (1.0, 0.0), (1.0, 0.0), (1.0, 0.0)]):
        assert (weights[element, 0] == base).all() and (weights[element, 1] == region).all()


def test_layers_attend_by_the_layout_at_their_resolution():
    hooks = regional_hooks(listed((prompt(7), left())))
    options = lay_out(hooks, noise(12, 20, batch=2)) | {"n_heads": 2, "activations_shape": [2, 32, 6, 10]}
    query, bank, value = hooks.swap(noise(60, 32)[0, :2], None, None, options)
    assert bank is value
    out = hooks.attend(query, bank, 0.5 * value, options)
    layout = options[ATTENDED][1]
    heads = [each.unflatten(-1, (2, -1)) for each in (query, bank, 0.5 * value)]
    expected = ops.regional_attention(*heads, layout.ids, layout.weights_at((6, 10)))
    torch.testing.assert_close(out, expected.flatten(-2))


def test_regions_are_of_the_positive_conditions_for_one_run():
    model = Regions().patch(Patcher(), listed((prompt(7), left())))[0]
    replaced = model.model_options["transformer_options"]["patches_replace"]["attn2"]
    assert set(replaced) == {("input", 1), ("middle", 0), ("output", 0)}
    hooks, found = model.wrappers["OUTER_SAMPLE"].__self__, []
    conds = {name: [{"uuid": name, "cross_attn": prompt(1)[0][0]}] for name in ("positive", "negative")}
    executor = Executor(lambda *args: found.append(dict(hooks._lengths)), SimpleNamespace(conds=conds))
    hooks.sample(executor, noise(12, 20), None, None, SIGMAS)
    assert found == [{"positive": 7}] and not hooks._lengths and not hooks._maps
    conds["negative"][0]["area"] = (8, 8, 0, 0)
    with pytest.raises(ValueError, match="conditioning: expected no areas beside regions"):
        hooks.sample(executor, noise(12, 20), None, None, SIGMAS)
    del conds["positive"]
    with pytest.raises(ValueError, match="guider: expected one with positive conditions, got negative"):
        hooks.sample(executor, noise(12, 20), None, None, SIGMAS)


@pytest.mark.parametrize(
    "conditioning, mask, message",
    [
        (prompt(1) + prompt(2), left(), "conditioning: expected one prompt, got 2 combined"),
        (prompt(1, area=(8, 8, 0, 0)), left(), "conditioning: expected a prompt alone, got one with area"),
        (prompt(1, control=object()), left(), "conditioning: expected a prompt alone, got one with control"),
        (prompt(1), left().repeat(2, 1, 1), r"mask: expected \(height, width\)"),
        (prompt(1), torch.zeros(1, 96, 160), "mask: expected some part above 0"),
    ],
)
def test_region_refuses(conditioning, mask, message):
    with pytest.raises(ValueError, match=message):
        Region().add(conditioning, mask)


def test_regions_refuse_what_another_node_replaces():
    regions = listed((prompt(7), left()))
    with pytest.raises(ValueError, match="model: expected cross-attention that no other node replaces"):
        Regions().patch(Regions().patch(Patcher(), regions)[0], regions)
    with pytest.raises(ValueError, match="mode: expected 'blend' or 'joint', got 'sum'"):
        Regions().patch(Patcher(), regions, mode="sum")
    hooks = regional_hooks(regions)
    options = {"uuids": ["positive"], "patches_replace": {"attn2": {("middle", 0): print}}}
    with pytest.raises(ValueError, match="IP-Adapter"):
        hooks.evaluate(print, noise(12, 20), context=prompt(1)[0][0], transformer_options=options)

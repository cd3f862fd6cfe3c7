"""diffusers' own pipelines on native windows: as they are at native size, and what their networks see of a canvas.

`python -m tests.pipelines.test_windowed` prints the table of `docs/hosts.md`.
"""

import re
import threading
from pathlib import Path

import diffusers
import pytest
import torch

from instantas import InstantASPipeline, Region, WindowPlan, regional_prompts, windowed
from instantas.pipelines.entry import SLOT
from instantas.pipelines.windowed import REFUSED, arguments
from instantas.sampling.bridging import Stage, bridge
from instantas.sampling.hosted import Place
from instantas.testing import tiny
from instantas.testing.tiny import CELL, WINDOW, tiny_pipeline
from tests.pipelines.kinds import KINDS, LARGE, NATIVE, difference, nets, painted, recorded, sized, started


def row(kind):
    """(native bit-equal, large finite, UNet calls native, ControlNets' native or None) of one kind."""
    make, arguments = KINDS[kind]
    pipe = make()
    plain = painted(pipe, arguments(NATIVE))
    with windowed(pipe):
        equal = torch.equal(plain, painted(pipe, arguments(NATIVE)))
        calls, shown = recorded(pipe, [pipe.unet]), recorded(pipe, nets(pipe))
        large = painted(pipe, arguments(LARGE))
    assert calls and bool(shown) == bool(nets(pipe))
    finite = bool(large.isfinite().all()) and tuple(large.shape[-2:]) == tuple(side // CELL for side in LARGE)
    control = set(shown) == {("sample", (WINDOW, WINDOW)), ("shown", NATIVE)} if shown else None
    return equal, finite, set(calls) == {("sample", (WINDOW, WINDOW))}, control


@pytest.mark.parametrize("kind", KINDS)
def test_pipelines_are_plain_at_native_size_and_see_windows_of_larger_ones(kind):
    assert row(kind) in [(True, True, True, True), (True, True, True, None)]


# Beside our own pipeline


def same_as_our_own(pipe, arguments, bridging="shift", wrap=(False, False)):
    """Whether the pipeline paints on windows what an `InstantASPipeline` of it does."""
    with windowed(pipe, bridging=bridging, wrap=wrap):
        given = painted(pipe, arguments)
    return difference(given, painted(InstantASPipeline(pipe), arguments | dict(bridging=bridging, wrap=wrap))) < 1e-4


@pytest.mark.parametrize("bridging", ["none", "shift", "economy", "centred", "dilated", "moments"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_text_to_image_is_that_of_our_own_pipeline(bridging, prediction_type):
    guidance = 1.0 if bridging == "moments" else 3.0  # which it adjusts each branch before, and our own loop after
    arguments = sized(LARGE) | dict(num_inference_steps=6, guidance_scale=guidance)
    assert same_as_our_own(tiny_pipeline(prediction_type), arguments, bridging)


@pytest.mark.parametrize("kind", ["EulerDiscreteScheduler", "HeunDiscreteScheduler", "PNDMScheduler"])
@pytest.mark.parametrize("bridging", ["shift", "economy"])
def test_with_other_schedulers_too(kind, bridging):
    pipe = tiny_pipeline(scheduler=tiny.scheduler(kind=getattr(diffusers, kind)))
    assert same_as_our_own(pipe, sized(LARGE) | dict(num_inference_steps=5, guidance_scale=1.0), bridging)


@pytest.mark.parametrize(
    "kind", ["ControlNet", "ControlNets, two", "ControlNet, guess mode", "LCM", "SDXL", "SDXL ControlNet"]
)
def test_other_kinds_that_our_own_pipeline_paints(kind):
    make, arguments = KINDS[kind]
    assert same_as_our_own(make(), arguments(LARGE), wrap=(False, True))


class Resting:
    """A bridge that rests at its first step whatever is known then: a host does not say what its run began with."""

    def __init__(self, name):
        self.step = bridge(name).step


@pytest.mark.parametrize("bridging", ["shift", "economy", "dilated"])
@pytest.mark.parametrize("kind", ["DDIMScheduler", "HeunDiscreteScheduler", "PNDMScheduler"])
def test_a_run_that_begins_with_a_picture_counts_its_own_steps(kind, bridging):
    theirs, ours = (
        tiny_pipeline(kind=kind_of_pipe, scheduler=tiny.scheduler(kind=getattr(diffusers, kind)))
        for kind_of_pipe in (diffusers.StableDiffusionImg2ImgPipeline, diffusers.StableDiffusionPipeline)
    )
    arguments = started(LARGE) | dict(num_inference_steps=6, strength=0.6)
    with windowed(theirs, bridging=bridging):
        given = painted(theirs, arguments)
    own = painted(InstantASPipeline(ours), arguments | sized(LARGE) | dict(bridging=Resting(bridging)))
    assert difference(given, own) < 1e-4


def test_several_prompts_and_windows_at_once():
    pipe, arguments = tiny_pipeline(), sized(LARGE) | dict(prompt=["red stone", "blue water"])
    assert same_as_our_own(pipe, arguments)
    with windowed(pipe, window_batch_size=1):
        one = painted(pipe, arguments)
    with windowed(pipe, window_batch_size=9):
        assert difference(one, painted(pipe, arguments)) < 1e-5


# Regions


REGIONS = [Region("blue water", box=(0.0, 0.4, 1.0, 1.0), feather=24), Region("green grass", box=(0.5, 0.0, 1.0, 0.7))]


@pytest.mark.parametrize("outer", ["windowed", "regional_prompts"])
@pytest.mark.parametrize("batch", [2, 9])
def test_regions_in_either_order(outer, batch):
    """Whatever the batches of windows: the regions lie on the canvas as in our own pipeline."""
    pipe, arguments = tiny_pipeline(), sized(LARGE) | dict(num_inference_steps=4, prompt=["red stone", "wood"])
    blocks = [lambda: windowed(pipe, window_batch_size=batch), lambda: regional_prompts(pipe, REGIONS)]
    first, second = blocks if outer == "windowed" else reversed(blocks)
    with first(), second():
        given = painted(pipe, arguments)
        small = painted(pipe, arguments | sized(NATIVE))
    assert difference(given, painted(InstantASPipeline(pipe), arguments | dict(regions=REGIONS))) < 1e-4
    with regional_prompts(pipe, REGIONS):
        assert torch.equal(small, painted(pipe, arguments | sized(NATIVE)))
    assert difference(given, painted(InstantASPipeline(pipe), arguments)) > 1e-3


def test_regions_of_a_controlnet_lie_on_the_canvas():
    """The same region everywhere is its prompt alone, for the UNet and the ControlNet."""
    make, arguments = KINDS["ControlNet, guess mode"]
    pipe = make()
    everywhere = [Region("blue water", box=(0.0, 0.0, 1.0, 1.0))]
    with windowed(pipe), regional_prompts(pipe, everywhere), regional_prompts(pipe.controlnet, everywhere, pipe=pipe):
        given = painted(pipe, arguments(LARGE))
    with windowed(pipe):
        assert difference(given, painted(pipe, arguments(LARGE) | dict(prompt="blue water"))) < 1e-4


# What is put in comes off


def parts(pipe):
    return {
        n: dict(vars(net)) for n, net in (("unet", pipe.unet), ("controlnet", getattr(pipe, "controlnet", None))) if net
    }


def test_networks_are_as_they_were_after_any_end():
    pipe = KINDS["ControlNets, two"][0]()
    before = parts(pipe)
    with windowed(pipe):
        assert parts(pipe) != before
    assert parts(pipe) == before
    with pytest.raises(KeyboardInterrupt), windowed(pipe):
        raise KeyboardInterrupt
    with pytest.raises(ValueError, match="window: expected a positive integer"), windowed(pipe, 0):
        pass
    assert parts(pipe) == before


def test_a_second_block_is_refused_and_the_first_goes_on():
    pipe = tiny_pipeline()
    with windowed(pipe):
        with pytest.raises(ValueError, match="pipe: expected networks that see whole canvases"), windowed(pipe):
            pass
        calls = recorded(pipe, [pipe.unet])
        painted(pipe, sized(LARGE))
    assert set(calls) == {("sample", (WINDOW, WINDOW))}


def test_other_threads_have_the_network_as_it_was():
    pipe = tiny_pipeline()
    seen = recorded(pipe, [pipe.unet])
    with windowed(pipe):
        thread = threading.Thread(target=painted, args=(pipe, sized(LARGE)))
        thread.start()
        thread.join()
    assert set(seen) == {("sample", (24, 40))}


@pytest.mark.parametrize("outer", ["windowed", "regional_prompts"])
@pytest.mark.parametrize("how", ["wrapped", "in place"])
def test_compiled_networks(how, outer):
    pipe, plain = tiny_pipeline(), tiny_pipeline()
    if how == "wrapped":
        pipe.unet = torch.compile(pipe.unet, backend="eager", dynamic=False)
    else:
        pipe.unet.compile(backend="eager", dynamic=False)
    before = dict(vars(pipe.unet))
    results = []
    for each in (pipe, plain):
        blocks = [lambda: windowed(each), lambda: regional_prompts(each, REGIONS)]  # noqa: B023
        first, second = blocks if outer == "windowed" else reversed(blocks)
        with first(), second():
            results.append(painted(each, sized(LARGE)))
    assert difference(*results) < 1e-5
    assert vars(pipe.unet).get(SLOT) is before.get(SLOT)


def test_a_new_run_reuses_nothing():
    pipe, arguments = tiny_pipeline(), sized(LARGE) | dict(num_inference_steps=6)
    with windowed(pipe, bridging="economy"):
        one, two = (painted(pipe, arguments) for _ in range(2))
    assert torch.equal(one, two)


# What belongs to the canvas


def test_size_and_crop_conditions_are_of_each_window():
    plan = WindowPlan.minimum_coverage(24, 40, WINDOW)
    place = Place.of(Stage(plan), 2, 0.0, None, torch.device("cpu"))
    ids = torch.tensor([[192, 320, 0, 0, 192, 320], [192, 320, 8, 16, 100, 100]], dtype=torch.float16)
    fitted = arguments({"added_cond_kwargs": {"time_ids": ids, "text_embeds": torch.zeros(2, 3)}}, place, 2, CELL)
    fitted = fitted["added_cond_kwargs"]
    expected = [[192, 320, 8 * y, 8 * x, 128, 128] for y, x in plan.origins.tolist()]
    expected += [[192, 320, 8 * y + 8, 8 * x + 16, 100, 100] for y, x in plan.origins.tolist()]
    assert fitted["time_ids"].tolist() == expected and fitted["text_embeds"].shape == (2 * plan.count, 3)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_residuals_are_cut_at_every_level(k):
    """Where windows begin at multiples of a level's cells they are the level's own; between them the mean."""
    plan = WindowPlan(24, 40, (16, 16), [[0, 0], [8, 8], [8, 24], [8, 2], [0, 24], [0, 16], [8, 0]])
    place = Place.of(Stage(plan), 1, 0.0, None, torch.device("cpu"))
    level = torch.randn(1, 3, 24 // k, 40 // k, generator=torch.Generator().manual_seed(0))
    (cut,) = arguments({"down_intrablock_additional_residuals": [level]}, place, 1, CELL).values()
    for window, (y, x) in zip(cut[0][[0, 1, 2, 5]], [(0, 0), (8, 8), (8, 24), (0, 16)]):
        expected = level[0, :, y // k : (y + 16) // k, x // k : (x + 16) // k]
        torch.testing.assert_close(window, expected)
    between = level[0, :, 8 // k : 24 // k, : 20 // k]
    if k == 4:
        torch.testing.assert_close(cut[0][3], (between[..., :-1] + between[..., 1:]) / 2)


def test_masks_of_adapters_are_cut():
    plan = WindowPlan.minimum_coverage(24, 40, WINDOW)
    place = Place.of(Stage(plan), 2, 0.0, None, torch.device("cpu"))
    masks = torch.rand(2, 1, 192, 320)
    given = {"cross_attention_kwargs": {"ip_adapter_masks": masks, "scale": 0.5}}
    fitted = arguments(given, place, 2, CELL)["cross_attention_kwargs"]
    assert fitted["scale"] == 0.5 and len(fitted["ip_adapter_masks"]) == 2
    for mask, own in zip(fitted["ip_adapter_masks"], masks):
        assert torch.equal(mask, place.cut(own[None]))


# What is refused


@pytest.mark.parametrize("name", ["StableDiffusionSAGPipeline", "StableDiffusionPanoramaPipeline", "InstantASPipeline"])
def test_what_windows_cannot_serve_is_refused_with_the_reason(name):
    pipe = type(name, (), {"unet": None})()
    with pytest.raises(TypeError, match=f"got {name}, which {REFUSED[name]}"), windowed(pipe):
        pass


def test_refused_pipelines_are_known_to_diffusers():
    assert all(hasattr(diffusers, name) for name in set(REFUSED) - {"InstantASPipeline"})


def test_other_objects_are_refused():
    pipe = KINDS["ControlNet"][0]()
    pipe.controlnet = torch.nn.Identity()
    for wrong, message in [(pipe, "expected ControlNetModels, got a Identity"), ("pipe", "got str with unet NoneType")]:
        with pytest.raises(TypeError, match=f"pipe: .*{message}"), windowed(wrong):
            pass
    pipe = tiny_pipeline()
    pipe.unet.register_to_config(sample_size=None)
    with (
        pytest.raises(ValueError, match="window: expected cells, as the UNet's config has no sample_size"),
        windowed(pipe),
    ):
        pass


def test_the_page_says_what_was_tried():
    page = (Path(__file__).parents[2] / "docs" / "hosts.md").read_text(encoding="utf-8")
    assert re.findall(r"(?m)^\| (.+?) \| yes \| yes \| yes \| (?:yes)? ?\|$", page) == list(KINDS)


def table():
    """Of `docs/hosts.md`, in Markdown."""
    lines = [
        "| pipeline | native: bit-equal | 192x320 px: finite | UNet sees windows alone | ControlNets too |",
        "|---|" + "---|" * 4,
    ]
    for kind in KINDS:
        lines.append(
            "| " + " | ".join([kind, *({True: "yes", False: "NO", None: ""}[each] for each in row(kind))]) + " |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())

"""Maps of regions: shares that follow windows, resolutions and steps; what is refused; the command line's forms."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from instantas.regions import MAX_PROMPTS, Region, RegionMap, load_regions, region_lists
from instantas.regions.masks import average
from instantas.sampling.bridging import View
from instantas.windows import WindowPlan
from tests.regions.test_masks import LEFT, half

RIGHT = (0.5, 0.0, 1.0, 1.0)


# Shares


def shares(regions, progress=0.0, **settings):
    return RegionMap(regions, 64, 128, **settings).shares(progress)[0]


@pytest.mark.parametrize("made_inside", [False, True])
def test_shares_asked_for_in_inference_mode_hold_outside(made_inside):
    regions = None if made_inside else RegionMap([Region("a", box=(0.0, 0.0, 0.5, 1.0))], 64, 64)
    with torch.inference_mode():
        regions = regions or RegionMap([Region("a", box=(0.0, 0.0, 0.5, 1.0))], 64, 64)
        regions.windows(WindowPlan.minimum_coverage(8, 8, 4), torch.tensor([[0, 1]]))
    gain = torch.ones((), requires_grad=True)
    (gain * regions.shares()).sum().backward()
    assert gain.grad == 64


def test_base_prompt_takes_what_no_region_covers():
    base, left = shares([Region("a", box=LEFT)])
    assert torch.equal(left, torch.from_numpy(half(8, 16))) and torch.equal(base, 1 - left)
    base, left, right = shares([Region("a", box=LEFT), Region("b", box=RIGHT)])
    assert not base.any() and torch.equal(left + right, torch.ones(8, 16))


def test_base_weight_is_there_everywhere():
    base, left = shares([Region("a", box=LEFT)], base_weight=0.25)
    assert torch.equal(base, 1.25 - left)


def test_weight_below_one_leaves_the_rest_to_the_base():
    base, left = shares([Region("a", box=LEFT, weight=0.25)])
    assert left.max() == 0.25 and torch.equal(base, 1 - left)
    base, left = shares([Region("a", box=LEFT, weight=3)])
    assert left.max() == 3 and base.min() == 0


def test_start_and_end():
    regions = RegionMap([Region("a", box=LEFT, start=0.2), Region("b", box=LEFT, end=0.5)], 64, 64)
    counts = {step: [bool(weight) for weight in regions.weights(step / 10)[0]] for step in range(10)}
    assert [step for step in counts if counts[step][0]] == list(range(2, 10))
    assert [step for step in counts if counts[step][1]] == list(range(5))
    assert regions.dynamic and torch.equal(regions.shares(0.1)[0, 1], torch.zeros(8, 8))
    assert torch.equal(regions.shares(0.6)[0, 0], 1 - regions.shares(0.6)[0, 1])


@pytest.mark.parametrize("schedule, halfway, quarter", [("linear", 0.5, 0.25), ("cosine", 0.5, 0.1464466)])
def test_semantic_schedule(schedule, halfway, quarter):
    for progress, share in ((0.0, 0.0), (0.25, quarter), (0.5, halfway)):
        base, left = shares([Region("a", box=LEFT)], progress, semantic_schedule=schedule)
        assert left.max() == pytest.approx(share) and torch.allclose(base + left, torch.ones(8, 16))


def test_regions_for_each_picture():
    regions = RegionMap([[Region("a", box=LEFT)], [], [Region("b", box=LEFT), Region("c", box=RIGHT)]], 64, 128)
    assert regions.shares().shape == (3, 3, 8, 16)
    assert regions.shares()[:, 0].mean((1, 2)).tolist() == [0.5, 1, 0]
    assert not regions.shares()[0, 2].any()


def test_no_regions():
    assert torch.equal(RegionMap([], 64, 128).shares(), torch.ones(1, 1, 8, 16))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_some_prompt_always_has_weight(data):
    """Any soft masks, weights, schedule, window and resolution: never negative, never nothing."""
    height, width = data.draw(st.integers(9, 90)), data.draw(st.integers(9, 90))
    fraction = st.floats(0, 1, width=32)
    regions = [
        Region(
            "a",
            mask=torch.rand(height, width, generator=torch.Generator().manual_seed(seed)) ** power,
            weight=data.draw(st.floats(0.01, 4)),
            start=0.5 * data.draw(fraction),
            end=0.75,
            feather=data.draw(st.integers(0, 9)),
        )
        for seed, power in enumerate(data.draw(st.lists(st.sampled_from([0.01, 1, 50]), max_size=4)))
    ]
    regions = RegionMap(
        regions,
        height,
        width,
        wrap=(True, True),
        base_weight=data.draw(st.sampled_from([0.0, 0.3])),
        semantic_schedule=data.draw(st.sampled_from(["constant", "linear", "cosine"])),
    )
    plan = WindowPlan.minimum_coverage(*regions.latents, 7, wrap=(True, True), shift=(3, 5))
    rows = torch.tensor([[0, i] for i in range(plan.count)])
    weights = regions.windows(plan, rows, data.draw(st.sampled_from([0.0, 0.4, 0.9])))
    while True:
        assert weights.isfinite().all() and (weights >= 0).all()
        assert (weights.sum(1) >= 1 - 1e-5).all()
        if weights.shape[-2:] == (1, 1):
            break
        weights = average(weights, 2)


def test_windows_are_cut_from_the_canvas():
    mask = torch.rand(80, 176)
    regions = RegionMap([[Region("a", mask=mask)], [Region("b", box=LEFT)]], 80, 176, wrap=(False, True))
    plan = WindowPlan.minimum_coverage(10, 22, 8, wrap=(False, True), shift=(0, 5))
    rows = torch.tensor([[0, 1], [1, 4], [0, 5]])
    windows = regions.windows(plan, rows)
    for (picture, window), cut in zip(rows.tolist(), windows):
        y, x = plan.origins[window]
        rolled = regions.shares()[picture].roll((-int(y), -int(x)), (1, 2))
        assert torch.equal(cut, rolled[:, :8, :8])


def test_windows_of_a_view():
    regions = RegionMap([Region("a", mask=torch.rand(64, 128))], 64, 128)
    order = torch.arange(16).reshape(8, 2).T.flatten()
    view = View(torch.arange(8), order)
    plan = WindowPlan.minimum_coverage(8, 16, 8)
    windows = regions.windows(plan, torch.tensor([[0, 1]]), view=view)
    assert torch.equal(windows[0], regions.shares()[0][:, :, 1::2])


def test_windows_of_another_canvas():
    with pytest.raises(ValueError, match="^plan: expected 8 x 16 cells, got 16 x 16"):
        RegionMap([], 64, 128).windows(WindowPlan.minimum_coverage(16, 16, 8), torch.tensor([[0, 0]]))


def test_latents_past_the_picture_continue_its_edge():
    regions = RegionMap([Region("a", box=(0.5, 0.0, 1.0, 1.0))], 60, 100, latents=(8, 16))
    assert regions.masks[0, 0, 0].tolist() == [0] * 6 + [0.75] + [1] * 9
    assert torch.equal(regions.masks[0, 0], regions.masks[0, 0, :1].expand(8, 16))
    with pytest.raises(ValueError, match=r"^latents: expected at least \(8, 13\) cells"):
        RegionMap([], 60, 100, latents=(8, 12))


# Guidance


def test_guidance_of_regions():
    assert RegionMap([Region("a", box=LEFT)], 64, 128).guidance(7.5) == 7.5
    guidance = RegionMap([Region("a", box=LEFT, guidance_scale=2.0), Region("b", box=RIGHT)], 64, 128).guidance(7.5)
    assert torch.equal(guidance, torch.where(torch.from_numpy(half(8, 16)) > 0, 2.0, 7.5))
    mixed = RegionMap([Region("a", box=LEFT, guidance_scale=2.0)], 64, 128, base_weight=1.0).guidance(8.0)
    assert mixed[0, 0] == 5 and mixed[0, -1] == 8


def test_guidance_must_be_the_same_for_all_pictures():
    lists = [[Region("a", box=LEFT, guidance_scale=2.0)], [Region("b", box=LEFT)]]
    with pytest.raises(ValueError, match="^guidance_scale: expected the same of all pictures"):
        RegionMap(lists, 64, 128).guidance(7.5)


# What a map is made of


def test_number_of_regions():
    regions = [Region("a", box=LEFT)] * (MAX_PROMPTS - 1)
    assert RegionMap(regions, 64, 64).masks.shape[1] == 63
    with pytest.raises(ValueError, match="^regions: expected at most 63 for a picture, got 64"):
        RegionMap([*regions, regions[0]], 64, 64)


@pytest.mark.parametrize(
    "change, error, words",
    [
        (dict(regions=["a"]), TypeError, "regions: expected a list of Region"),
        (dict(regions=[Region("a", box=LEFT), []]), TypeError, "regions: expected a list of Region"),
        (dict(height=0), ValueError, "height: expected a positive number"),
        (dict(width=1.5), TypeError, "width: expected a positive number"),
        (dict(base_weight=-1), ValueError, r"base_weight: expected 0 to 1e\+30, got -1"),
        (dict(base_weight=1e31), ValueError, "base_weight: expected 0 to"),
        (dict(base_weight=float("nan")), ValueError, r"base_weight: expected 0 to 1e\+30, got nan"),
        (dict(semantic_schedule="steep"), ValueError, "semantic_schedule: expected one of constant, linear, cosine"),
    ],
)
def test_bad_maps(change, error, words):
    with pytest.raises(error, match=f"^{words}"):
        RegionMap(**dict(regions=[], height=64, width=64) | change)


# The command line's forms


def test_parse(tmp_path):
    Image.fromarray((half() * 255).astype(np.uint8)).save(tmp_path / "sky.png")
    assert Region.parse("grass@0,0.5,1,1").box == (0.0, 0.5, 1.0, 1.0)
    assert Region.parse(" me@home @ 0,64,128,256", weight=2.0).box == (0, 64, 128, 256)
    region = Region.parse(f"night sky@{tmp_path / 'sky.png'}")
    assert region.prompt == "night sky" and torch.equal(region.mask, torch.from_numpy(half()))


@pytest.mark.parametrize("text", ["grass", "@0,0,1,1", "grass@", "grass@1,2,3", "grass@nowhere.png"])
def test_bad_parse(text):
    with pytest.raises(ValueError, match="^(region|box|mask): expected"):
        Region.parse(text)


def test_load_regions(tmp_path):
    Image.fromarray((half() * 255).astype(np.uint8)).save(tmp_path / "sky.png")
    entries = [
        {"prompt": "grass", "box": [0, 0.5, 1, 1], "negative_prompt": "snow", "weight": 2, "feather": 16},
        {"prompt": "sky", "mask": "sky.png", "start": 0.1, "end": 0.9, "guidance_scale": 5},
    ]
    (tmp_path / "regions.json").write_text(json.dumps(entries))
    grass, sky = load_regions(tmp_path / "regions.json")
    assert grass.box == (0.0, 0.5, 1.0, 1.0) and (grass.negative_prompt, grass.feather) == ("snow", 16)
    assert sky.mask.shape == (16, 16) and (sky.start, sky.guidance_scale) == (0.1, 5)


@pytest.mark.parametrize(
    "text, words",
    [
        ("[", "regions: expected a JSON file"),
        ('{"prompt": "a"}', "regions: expected a list of objects"),
        ('[{"prompt": "a", "boxes": [0, 0, 1, 1]}]', "region 1: expected prompt, mask, box, .* got boxes"),
        ('[{"box": [0, 0, 1, 1]}]', "region 1: expected a prompt"),
        ('[{"prompt": "a", "box": [0, 0, 1, 1]}, {"prompt": "b", "box": [1, 0, 0, 1]}]', "region 2: box: expected"),
        ('[{"prompt": "a", "mask": "nowhere.png"}]', "region 1: mask: expected a picture file"),
    ],
)
def test_bad_region_files(tmp_path, text, words):
    (tmp_path / "regions.json").write_text(text)
    with pytest.raises(ValueError, match=f"^{words}"):
        load_regions(tmp_path / "regions.json")
    with pytest.raises(ValueError, match="^regions: expected a JSON file"):
        load_regions(tmp_path / "missing.json")


def test_preview(tmp_path):
    regions = RegionMap([Region("grass", box=LEFT, feather=16), Region("sky", box=(0.4, 0.0, 1.0, 0.5))], 128, 256)
    regions.preview(tmp_path / "layout.png", WindowPlan.minimum_coverage(16, 32, 16))
    with Image.open(tmp_path / "layout.png") as picture:
        colours = picture.convert("RGB").getcolors(1 << 20)
    assert len(colours) > 50
    with pytest.raises(ValueError, match="^path: expected a picture ending"):
        regions.preview(tmp_path / "layout.txt")
    regions.preview(tmp_path / "LAYOUT.PNG")
    with Image.open(tmp_path / "LAYOUT.PNG") as picture:
        assert picture.format == "PNG"


# What is no region, and embeddings


@pytest.mark.parametrize(
    "regions, words",
    [
        ({"prompt": "a", "box": LEFT}, "got the dict {'prompt'"),
        ([{"prompt": "a", "box": LEFT}], "got as region 1 the dict {'prompt'"),
        ([Region("a", box=LEFT), {"prompt": "b"}], "got as region 2 the dict"),
        ([("a", LEFT)], "got as region 1 the str 'a'"),
        ([Region("a", box=LEFT), ("b", LEFT)], "got as region 2 the tuple"),
        ([[Region("a", box=LEFT)], [("b", LEFT)]], "got as region 1 of picture 2 the tuple"),
        ([[Region("a", box=LEFT)], [Region("a", box=LEFT), None]], "got as region 2 of picture 2 the NoneType None"),
        ([[], {"prompt": "b"}], "got as region 1 the list"),
        ("a@0,0,1,1", "got the str 'a@0,0,1,1'"),
        (["a@0,0,1,1"], "got as region 1 the str 'a@0,0,1,1'"),
        (3, "got the int 3"),
        (Region, "got the type"),
    ],
)
def test_what_is_no_list_of_regions(regions, words):
    with pytest.raises(TypeError, match=f"^regions: expected a list of Region.*{words}"):
        region_lists(regions)


@pytest.mark.parametrize("weight", [0.0, -1.0, 1e31, 1e300, float("inf")])
def test_weights_that_float32_cannot_blend_with_are_refused(weight):
    with pytest.raises(ValueError, match="^weight: expected"):
        Region("a", box=LEFT, weight=weight)


def test_the_largest_weights_are_blended():
    shares = RegionMap([Region("a", box=LEFT, weight=1e30)] * 63, 64, 128, base_weight=1e30).shares()
    assert shares.isfinite().all() and shares.sum(1).max() < torch.finfo(torch.float32).max


def test_lists_of_regions():
    a, b = (Region(word, box=LEFT) for word in "ab")
    assert region_lists(a) == region_lists([a]) == region_lists((a,)) == region_lists(iter([a])) == ((a,),)
    assert region_lists([[a, b], (), [b]]) == ((a, b), (), (b,)) and region_lists([]) == ((),)


@pytest.mark.parametrize(
    "change, error, words",
    [
        (dict(embeds=None), TypeError, "prompt: expected a string or embeds, got neither"),
        (dict(embeds=[0.0]), TypeError, r"embeds: expected a tensor of floats \(L, D\), got <class 'list'>"),
        (dict(embeds=torch.zeros(2, 3, dtype=torch.int64)), TypeError, "embeds: expected a tensor of floats .*int64"),
        (dict(embeds=torch.zeros(2, 2, 3)), ValueError, r"embeds: expected \(L, D\) or \(1, L, D\), got \(2, 2, 3\)"),
        (dict(embeds=torch.zeros(3)), ValueError, r"embeds: expected \(L, D\) or \(1, L, D\), got \(3,\)"),
        (dict(embeds=torch.zeros(0, 3)), ValueError, r"embeds: expected \(L, D\)"),
        (dict(embeds=torch.full((2, 3), float("nan"))), ValueError, "embeds: expected finite values"),
        (dict(negative_embeds=torch.zeros(3)), ValueError, r"negative_embeds: expected \(L, D\)"),
    ],
)
def test_bad_embeddings(change, error, words):
    with pytest.raises(error, match=f"^{words}"):
        Region(**dict(box=LEFT, embeds=torch.zeros(2, 3)) | change)


def test_embeddings_in_place_of_text():
    embeds = torch.randn(2, 3)
    region = Region("a label", box=LEFT, embeds=embeds[None], negative_prompt="no")
    assert torch.equal(region.positive, embeds) and region.negative == "no"
    assert Region("a", box=LEFT).positive == "a" and Region("a", box=LEFT).negative is None

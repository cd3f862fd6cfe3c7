"""Regions: masks read, drawn, fitted and averaged; shares that follow windows, resolutions and steps."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from instantas.regions import MAX_PROMPTS, Region, RegionMap, load_regions, region_lists
from instantas.regions.masks import average, feather
from instantas.sampling.bridging import View
from instantas.windows import WindowPlan

LEFT, RIGHT = (0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)


def half(h=16, w=16):
    mask = np.zeros((h, w), dtype=np.float32)
    mask[:, : w // 2] = 1
    return mask


# Masks


@pytest.mark.parametrize(
    "mask",
    [
        half(),
        half().astype(bool),
        half().astype(np.int64),
        (half() * 255).astype(np.uint8),
        half()[None],
        half()[..., None],
        torch.from_numpy(half()),
        torch.from_numpy(half()).half(),
        torch.from_numpy(half())[None, None],
        Image.fromarray((half() * 255).astype(np.uint8)),
        Image.fromarray((half() * 255).astype(np.uint8)).convert("1"),
        Image.fromarray((half() * 255).astype(np.uint8)).convert("RGB"),
        Image.fromarray((half() * 255).astype(np.uint8)).convert("P"),
        Image.fromarray((half() * 65535).astype(np.uint16)),
        Image.fromarray(half()),
    ],
)
def test_mask_of_any_kind(mask):
    read = Region("a", mask=mask).mask
    assert read.dtype == torch.float32 and torch.equal(read, torch.from_numpy(half()))


def test_soft_mask_is_not_binarised(tmp_path):
    gray = Image.fromarray(np.full((8, 8), 51, dtype=np.uint8))
    gray.save(tmp_path / "mask.png")
    assert torch.equal(Region("a", mask=tmp_path / "mask.png").mask, torch.full((8, 8), 0.2))


def test_transparency_counts(tmp_path):
    white = Image.new("RGBA", (8, 8), (255, 255, 255, 0))
    white.paste((255, 255, 255, 255), (0, 0, 4, 8))
    white.save(tmp_path / "mask.png")
    assert torch.equal(Region("a", mask=str(tmp_path / "mask.png")).mask, torch.from_numpy(half(8, 8)))


@pytest.mark.parametrize(
    "mask, words",
    [
        (np.zeros((8, 8)), "empty"),
        (np.full((8, 8), np.nan), "NaN"),
        (np.full((8, 8), 1.5), "0 to 1"),
        (np.full((8, 8), -0.5), "0 to 1"),
        (np.full((8, 8), 256), "0 to 255"),
        (np.ones((8, 8, 3)), r"\(height, width\)"),
        (np.ones(8), r"\(height, width\)"),
        (np.ones((0, 8)), r"\(height, width\)"),
        ("no such file.png", "picture file"),
    ],
)
def test_bad_masks(mask, words):
    with pytest.raises(ValueError, match=f"^mask: expected .*{words}"):
        Region("a", mask=mask)


def test_file_that_is_no_picture(tmp_path):
    (tmp_path / "mask.png").write_text("text")
    with pytest.raises(ValueError, match="^mask: expected a picture file"):
        Region("a", mask=tmp_path / "mask.png")


@pytest.mark.parametrize(
    "change, error, words",
    [
        (dict(prompt=3), TypeError, "prompt: expected a string, got int"),
        (dict(negative_prompt=["a"]), TypeError, "negative_prompt: expected a string, got list"),
        (dict(mask=half()), ValueError, "mask: expected either a mask or a box, got both"),
        (dict(box=None), ValueError, "mask: expected either a mask or a box, got neither"),
        (dict(box=None, mask=3), TypeError, "mask: expected a picture"),
        (dict(box="all"), TypeError, "box: expected"),
        (dict(box=(0, 1)), ValueError, "box: expected .* got 2 numbers"),
        (dict(box=(0.0, 0.0, "1", 1.0)), TypeError, "box: expected a number"),
        (dict(box=(0.0, 0.0, np.nan, 1.0)), ValueError, "box: expected a finite number"),
        (dict(box=(0.5, 0.0, 0.5, 1.0)), ValueError, "box: expected left < right"),
        (dict(box=(0, 64, 64, 0)), ValueError, "box: expected left < right and top < bottom"),
        (dict(box=(0.0, 0.0, 512.0, 512.0)), ValueError, "box: expected fractions from 0 to 1"),
        (dict(weight=0.0), ValueError, "weight: expected more than 0"),
        (dict(weight=float("nan")), ValueError, "weight: expected a finite number"),
        (dict(weight="1"), TypeError, "weight: expected a number"),
        (dict(start=0.6, end=0.4), ValueError, "start: expected 0 <= start < end <= 1"),
        (dict(start=0.5, end=0.5), ValueError, "start: expected 0 <= start < end <= 1"),
        (dict(end=1.5), ValueError, "start: expected 0 <= start < end <= 1"),
        (dict(feather=-1), ValueError, "feather: expected whole pixels, 0 or more"),
        (dict(feather=1.5), TypeError, "feather: expected whole pixels"),
        (dict(guidance_scale=float("inf")), ValueError, "guidance_scale: expected a finite number"),
    ],
)
def test_bad_regions(change, error, words):
    with pytest.raises(error, match=f"^{words}"):
        Region(**dict(prompt="a", box=LEFT) | change)


# Boxes


@pytest.mark.parametrize(
    "box, pixels",
    [
        ((0.0, 0.5, 1.0, 1.0), (0, 8, 16, 16)),
        ((0, 0.5, 1, 1), (0, 8, 16, 16)),
        ((0, 0, 1, 1), (0, 0, 16, 16)),
        ((2, 3, 5, 16), (2, 3, 5, 16)),
        (np.array([2, 3, 5, 16]), (2, 3, 5, 16)),
        ((0.25, 0.0, 0.75, 1.0), (4, 0, 12, 16)),
    ],
)
def test_boxes_in_fractions_and_pixels(box, pixels):
    left, top, right, bottom = pixels
    expected = torch.zeros(16, 16)
    expected[top:bottom, left:right] = 1
    assert torch.equal(Region("a", box=box).draw(16, 16), expected)


def test_box_between_pixels_has_their_share():
    assert Region("a", box=(0.0, 0.0, 0.3, 1.0)).draw(1, 5)[0].tolist() == [1, 0.5, 0, 0, 0]


@pytest.mark.parametrize("box", [(0, 0, 17, 16), (-2, 0, 5, 16), (0.5, 0.0, 1.1, 1.0), (20, 0, 30, 16)])
def test_box_outside_the_canvas(box):
    with pytest.raises(ValueError, match="^box: expected 0 to 16 pixels on the horizontal axis"):
        RegionMap([Region("a", box=box)], 16, 16)


def test_box_over_a_border_that_wraps():
    over = Region("a", box=(0.75, 0.0, 1.25, 1.0)).draw(8, 16, (False, True))
    assert over[0].tolist() == [1] * 4 + [0] * 8 + [1] * 4
    assert torch.equal(Region("a", box=(-4, 0, 4, 8)).draw(8, 16, (False, True)), over)
    with pytest.raises(ValueError, match="^box: expected at most one turn"):
        Region("a", box=(-0.2, 0.0, 1.2, 1.0)).draw(8, 16, (False, True))
    with pytest.raises(ValueError, match="^box: expected 0 to 8 pixels on the vertical axis"):
        Region("a", box=(0.0, 0.5, 1.0, 1.5)).draw(8, 16, (False, True))


# Fitting, feathering, averaging


def test_mask_of_another_size_is_resized_by_area():
    assert torch.equal(RegionMap([Region("a", mask=half(4, 8))], 64, 128).masks[0, 0], torch.from_numpy(half(8, 16)))
    fine = np.zeros((128, 256))
    fine[:, :100] = 1
    assert RegionMap([Region("a", mask=fine)], 64, 128).masks[0, 0, 0].tolist() == [1] * 6 + [0.25] + [0] * 9


def test_mask_with_the_rounding_of_latents_fits():
    assert RegionMap([Region("a", mask=np.ones((126, 175)))], 1001, 1400).masks.shape == (1, 1, 126, 175)


@pytest.mark.parametrize("shape", [(16, 16), (16, 40), (64, 120)])
def test_mask_of_other_proportions(shape):
    with pytest.raises(ValueError, match=r"^mask: expected the canvas's proportions, 128x64 pixels"):
        RegionMap([Region("a", mask=np.ones(shape))], 64, 128)


def test_feather_is_a_ramp_on_the_edge():
    mask = torch.from_numpy(half(4, 32))
    soft = feather(mask, 8)
    assert torch.equal(soft[:, :12], torch.ones(4, 12)) and torch.equal(soft[:, 20:], torch.zeros(4, 12))
    assert (soft[0].diff() <= 0).all() and torch.allclose(soft[0, 15] + soft[0, 16], torch.tensor(1.0))
    assert torch.equal(feather(mask, 0), mask)
    around = feather(mask, 8, (False, True))
    assert torch.allclose(around[0], 1 - around[0].roll(16)) and 0 < around[0, 0] < 1


def test_feather_longer_than_the_canvas():
    with pytest.raises(ValueError, match="^feather: expected at most 64 pixels, got 65"):
        RegionMap([Region("a", box=LEFT, feather=65)], 64, 128)


def test_average_is_ceil_halved():
    values = torch.arange(15.0).reshape(1, 3, 5)
    assert average(values, 2).tolist() == [[[3, 5, 6.5], [10.5, 12.5, 14]]]


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
        (dict(base_weight=-1), ValueError, "base_weight: expected 0 or more"),
        (dict(base_weight=float("nan")), ValueError, "base_weight: expected a finite number"),
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

"""The measures of large pictures: each has to see what it is for, and nothing in pictures that have nothing of it."""

import functools

import numpy as np
import pytest
from PIL import Image, ImageColor
from scipy import ndimage

from bench import bridging, quality
from instantas.windows import WindowPlan

data = pytest.importorskip("skimage.data")

WINDOW = 128


@functools.cache
def photograph(name):
    picture = getattr(data, name)() / 255
    return picture[..., :3] if picture.ndim == 3 else np.repeat(picture[..., None], 3, axis=2)


TEXTURES = ("grass", "gravel")
PHOTOGRAPHS = (*TEXTURES, "astronaut", "coffee", "chelsea", "camera", "moon")


def clouds(seed, height=256, width=256, breadth=6):
    """Smooth noise with some grain, periodic in both directions."""
    rng = np.random.default_rng(seed)
    smooth = ndimage.gaussian_filter(rng.standard_normal((height, width)), breadth, mode="wrap")
    picture = 0.5 + 0.15 * smooth / smooth.std() + 0.02 * rng.standard_normal((height, width))
    return np.repeat(picture[..., None], 3, axis=2)


def test_borders_are_those_of_the_minimum_cover():
    for cells in (16, 17, 31, 32, 40, 48, 49, 64):
        plan = WindowPlan.minimum_coverage(16, cells, 16)
        starts, ends = plan.origins[:, 1], plan.origins[:, 1] + 16
        wanted = sorted({*starts, *ends} - {0, cells})
        assert list(quality.window_borders(cells * 8, WINDOW)) == [8 * border for border in wanted]


@pytest.mark.parametrize("axis", [0, 1])
def test_planted_seam_scores_far_above_one_and_only_across_it(axis):
    planted = np.mean([clouds(i) for i in range(4)], axis=0)
    half = [slice(None)] * 2
    half[axis] = slice(128, None)
    planted[tuple(half)] += 0.1
    assert quality.seam_ratio(planted, [128], axis) > 3
    assert 0.5 < quality.seam_ratio(planted, [128], 1 - axis) < 1.5
    profile = quality.seam_profile(planted, [128], axis, WINDOW)
    assert profile.argmax() == len(profile) // 2


def test_seam_ratio_is_that_of_the_definition():
    picture = np.zeros((32, 80, 3))
    picture[:, 8::8] += np.arange(1, 10)[None, :, None]  # columns at multiples of 8 rise by 1, 2, .. 9, and fall again
    across = quality.steps_across(picture, 1)
    controls = [16, 24, 56, 64]
    assert list(quality.control_positions(80, [40])) == controls
    assert quality.seam_ratio(picture, [40], 1) == pytest.approx(across[40] / across[controls].mean())
    assert across[40] == 5


def test_photographs_have_no_seams():
    ratios = [
        quality.seam_ratio(photograph(name), [border], axis)
        for name in PHOTOGRAPHS
        for axis in (0, 1)
        for border in range(24, photograph(name).shape[axis] - 24, 8)
    ]
    assert np.mean(ratios) == pytest.approx(1, abs=0.03)
    fine = [
        quality.seam_ratio(photograph(name), np.arange(128, 512, 128), axis) for name in TEXTURES for axis in (0, 1)
    ]
    assert max(abs(r - 1) for r in fine) < 0.1


def test_photographs_put_side_by_side_have_seams():
    left, right = photograph("coffee")[:256, 64:192], photograph("chelsea")[:256, 64:192]
    assert quality.seam_ratio(np.concatenate([left, right], axis=1), [128], 1) > 2


def test_scatter_is_how_far_ratios_without_a_seam_spread():
    pictures = [clouds(i) for i in range(40)]
    ratios = [quality.seam_ratio(p, [128], 1) for p in pictures]
    assert np.std(ratios) == pytest.approx(np.mean([quality.seam_scatter(p, [128], 1) for p in pictures]), rel=0.25)
    brick, grass = (quality.seam_scatter(photograph(name), [128, 256, 384], 0) for name in ("brick", "grass"))
    assert brick > 5 * grass


def test_decoder_grid_cancels():
    picture = clouds(0)
    picture[:, ::8] += 0.2
    assert quality.seam_ratio(picture, [128], 1) == pytest.approx(1, abs=0.1)


def test_unrelated_windows_diverge_and_copies_do_not():
    tiles = [photograph(name)[100:228, 100:228] for name in ("grass", "coffee", "chelsea", "moon")]
    unrelated = np.concatenate([np.concatenate(tiles[:2], 1), np.concatenate(tiles[2:], 1)])
    even = np.mean([quality.window_divergence(photograph(name)[:256, :256], WINDOW) for name in TEXTURES])
    assert quality.window_divergence(unrelated, WINDOW) > 3 * even
    assert quality.window_divergence(np.tile(tiles[0], (2, 2, 1)), WINDOW) == pytest.approx(0, abs=1e-9)


def test_divergence_sees_colour_and_detail():
    grass = photograph("grass")[:128, :256]
    tinted, blurred = grass.copy(), grass.copy()
    tinted[:, 128:, 0] += 0.2
    blurred[:, 128:] = ndimage.gaussian_filter(grass[:, 128:], (2, 2, 0))
    plain = quality.window_divergence(grass, WINDOW)
    assert quality.window_divergence(tinted, WINDOW) > 1.5 * plain
    assert quality.window_divergence(blurred, WINDOW) > 1.5 * plain


def test_repetition_finds_copies_that_moved():
    tile = photograph("gravel")[:128, :128]
    moved = np.concatenate([tile, np.roll(tile, (37, 11), (0, 1))], axis=1)
    assert quality.repetition(moved, WINDOW) == pytest.approx(1, abs=0.05)
    assert quality.repetition(photograph("gravel")[:128, :256], WINDOW) < 0.3


def test_repetition_compares_the_crops_farthest_apart():
    tiles = [photograph("gravel")[y : y + 128, x : x + 128] for y in (0, 256) for x in (0, 256)]
    ends_repeat = np.concatenate([tiles[0], tiles[1], tiles[2], tiles[0]], axis=1)
    middle_repeats = np.concatenate([tiles[0], tiles[1], tiles[1], tiles[2]], axis=1)
    assert quality.repetition(ends_repeat, WINDOW) > quality.repetition(middle_repeats, WINDOW) + 0.2


def test_gradient_energy_falls_with_blur_and_leaves_seams_out():
    grass = photograph("grass")[:256, :256]
    blurred = ndimage.gaussian_filter(grass, (1, 1, 0))
    assert quality.gradient_energy(blurred) < 0.5 * quality.gradient_energy(grass)
    split = grass.copy()
    split[:, 128:] += 1
    inside = quality.window_gradient_energy
    assert inside(split, WINDOW) == pytest.approx(inside(grass, WINDOW))
    assert quality.gradient_energy(split) > quality.gradient_energy(grass)


@pytest.mark.parametrize("axis", [0, 1])
def test_glued_edges_are_close(axis):
    periodic = [clouds(i, breadth=16) for i in range(6)]
    cut = [clouds(i, 400, 400, breadth=16)[70:326, 70:326] for i in range(6)]
    glued, free = ([quality.edge_distance(p, axis, WINDOW) for p in group] for group in (periodic, cut))
    assert np.mean(glued) < 0.6
    assert np.mean(free) == pytest.approx(1, abs=0.2)


def test_region_fidelity_is_the_share_of_crops_that_show_the_regions_name():
    picture = np.zeros((64, 128, 3))
    picture[:, 64:] = 1
    masks = np.zeros((2, 64, 128), bool)
    masks[0, :, :64] = masks[1, :, 64:] = True

    def classify(crops):
        assert crops.dtype == np.uint8 and crops.shape[1:] == (32, 32, 3)
        return ["white" if crop.mean() > 250 else "black" for crop in crops]

    fidelity = functools.partial(quality.region_fidelity, picture, classify=classify, side=32)
    assert fidelity(masks, ["black", "white"]) == 1
    assert fidelity(masks, ["black", "black"]) == 0.5
    assert fidelity(masks, ["white", "black"]) == 0
    crossing = np.roll(masks, 32, axis=2)  # half of each region's crops, but for those on the border, show the other
    assert 0 < fidelity(crossing, ["black", "white"]) < 1
    with pytest.raises(ValueError, match="room for 32 x 32 pixels"):
        fidelity([masks[0], np.zeros((64, 128), bool)], ["black", "white"])


def test_bootstrap_brackets_the_mean():
    values = np.random.default_rng(1).normal(1, 0.2, 40)
    low, high = quality.bootstrap(values)
    assert low < values.mean() < high
    assert high - low == pytest.approx(2 * 1.96 * values.std() / np.sqrt(40), rel=0.15)
    assert quality.bootstrap(values) == (low, high)
    weights = np.r_[np.ones(20), np.zeros(20)]
    low, high = quality.bootstrap(values, weights)
    assert low < values[:20].mean() < high
    assert quality.bootstrap(np.r_[np.ones(20), np.full(20, 9.0)], weights) == (1, 1)


@pytest.mark.parametrize(
    "measure",
    [
        lambda: quality.seam_ratio(clouds(0), [], 1),
        lambda: quality.seam_ratio(clouds(0), list(range(8, 256, 8)), 1),
        lambda: quality.window_divergence(clouds(0, 128, 128), WINDOW),
        lambda: quality.native_crops(clouds(0, 100, 256), WINDOW),
        lambda: quality.repetition(clouds(0, 128, 128), WINDOW),
        lambda: quality.edge_distance(clouds(0, 128, 128), 0, WINDOW),
    ],
)
def test_what_cannot_be_measured_is_refused(measure):
    with pytest.raises(ValueError, match="expected"):
        measure()


def test_folder_of_pictures(tmp_path, capsys):
    for i in range(3):
        image = (clouds(i, 128, 256).clip(0, 1) * 255).astype(np.uint8)
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    assert quality.main([str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert printed.count("seam_columns") == 4 and "seam_rows" not in printed
    assert "interval" in printed


def test_a_sheet_has_every_picture_in_its_place_under_the_ticks_of_its_windows(tmp_path):
    colours = [["navy", "teal"], ["olive", "gray"]]
    files = [[tmp_path / f"{colour}.png" for colour in line] for line in colours]
    for line in files:
        for file in line:
            Image.new("RGB", (256, 128), file.stem).save(file)
    bridging.sheet(files, tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as sheet:
        gap = bridging.GAP
        assert sheet.size == (2 * 256 + gap, 2 * (128 + gap))
        for y, line in enumerate(colours):
            for x, colour in enumerate(line):
                left, top = x * (256 + gap), y * (128 + gap)
                tile = sheet.crop((left, top + gap, left + 256, top + gap + 128))
                assert tile.getcolors() == [(256 * 128, ImageColor.getrgb(colour))]
                above = np.asarray(sheet.crop((left, top, left + 256, top + gap)))
                red = (above == (255, 0, 0)).all(-1).any(0)
                assert list(np.flatnonzero(red)) == [127, 128]

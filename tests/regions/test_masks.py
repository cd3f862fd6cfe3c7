"""Masks of regions: read, drawn, fitted, feathered and averaged."""

import numpy as np
import pytest
import torch
from PIL import Image

from instantas.regions import Region, RegionMap
from instantas.regions.masks import average, feather

LEFT = (0.0, 0.0, 0.5, 1.0)


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
        (dict(weight=float("nan")), ValueError, "weight: expected more than 0 to 1e\\+30, got nan"),
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

"""The measures of regional control: which crops count, what a border is, what is claimed of the scenes."""

import numpy as np
import pytest

pytest.importorskip("scipy")

from bench.regions import CROP, MATERIAL, SCENES, borders, crops, labels, stack  # noqa: E402
from instantas.demo import MATERIALS  # noqa: E402


def noise(height=192, width=256):
    return np.random.default_rng(0).integers(96, 160, (height, width, 3)).astype(np.uint8)


def halves(height=192, width=256):
    owner = np.zeros((height, width), dtype=int)
    owner[:, width // 2 :] = 1
    return owner


def test_a_picture_that_does_not_know_of_the_border():
    border, band = borders(noise(), halves())
    assert border == pytest.approx(1, abs=0.1) and band == pytest.approx(1, abs=0.05)


def test_a_hard_edge_and_a_strip_without_content():
    hard = noise()
    hard[:, 128:] //= 2
    border, band = borders(hard, halves())
    assert border > 1.5 and border > band
    empty = noise()
    empty[:, 112:144] = 128
    assert borders(empty, halves())[1] < 0.1


def test_crops_lie_within_one_region():
    owner = halves(CROP, 3 * CROP)
    assert owner[0].sum() == 1.5 * CROP
    picture = np.repeat(owner[..., None], 3, 2).astype(np.uint8)
    found = list(crops(picture, owner))
    assert [index for _, index in found] == [0] * 5 + [1] * 5
    assert all(crop.shape == (CROP, CROP, 3) and (crop == index).all() for crop, index in found)


@pytest.mark.parametrize("scene", list(SCENES))
def test_every_region_of_a_scene_is_judged(scene):
    (width, height), base, regions = SCENES[scene]
    owner, prompts = labels((width, height), base, regions)
    judged = {prompts[index] for _, index in crops(np.zeros((height, width, 3)), owner)}
    assert judged == {prompt for prompt in prompts if prompt}
    assert {MATERIAL[prompt] for prompt in judged} <= set(MATERIALS)


def test_tiles_are_stacked_on_white():
    column = stack([np.zeros((2, 3, 3), np.uint8), np.zeros((1, 5, 3), np.uint8)], 0, gap=1)
    assert column.shape == (5, 5, 3)
    assert column[..., 0].tolist() == [[0, 0, 0, 255, 255]] * 2 + [[255] * 5, [0] * 5, [255] * 5]

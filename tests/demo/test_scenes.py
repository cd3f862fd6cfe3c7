"""Scenes: drawn the same every time, with the subject where its box says, called by their names."""

import numpy as np
import pytest
import torch
from PIL import Image

from instantas import demo

pytest.importorskip("skimage", reason="needs instantas[train]")

from instantas.demo.training import captions, latents, planting, scenes  # noqa: E402
from instantas.demo.training.drawing import SIZE  # noqa: E402
from instantas.demo.training.scenery import LIGHTS, SCENES, SETTINGS  # noqa: E402


@pytest.mark.parametrize("subject", SCENES)
def test_scenes_are_the_same_every_time(subject):
    one, same, next_, seeded = (scenes.render_scene(subject, i, seed) for i, seed in ((3, 0), (3, 0), (4, 0), (3, 1)))
    assert one.image.dtype == np.uint8 and one.image.shape == (SIZE, SIZE, 3)
    assert np.array_equal(one.image, same.image) and one[1:] == same[1:]
    assert not np.array_equal(one.image, next_.image) and not np.array_equal(one.image, seeded.image)
    assert (one.setting, one.light) in SCENES[subject].settings and len(one.boxes) == bool(subject)


@pytest.mark.parametrize("subject", demo.SUBJECTS)
def test_the_subject_is_where_its_box_says(subject):
    setting, light = SCENES[subject].settings[0]
    view = scenes.View((SIZE, SIZE))
    place = scenes.Place(0.5, SCENES[subject].y[0], SCENES[subject].heights[0])
    shown, (box,) = scenes.draw_scene(np.random.default_rng(1), setting, light, subject, [place], view)
    moved = place._replace(x=0.56)
    other, _ = scenes.draw_scene(np.random.default_rng(1), setting, light, subject, [moved], view)
    y, x = np.nonzero(np.abs(shown - other).max(2) > 40)
    assert abs(np.median(x) - box.x) < 0.1 * scenes.UNIT and abs(np.median(y) - box.y) < 0.2 * scenes.UNIT
    inside = (np.abs(y - box.y) < 0.6 * box.height) & (np.abs(x - box.x) < 0.6 * box.width + 0.06 * scenes.UNIT)
    assert inside.mean() > 0.7


def test_a_whole_scene_fills_a_native_window():
    window = scenes.UNIT // 2
    assert window == 8 * latents.WINDOW == SIZE // 2 - 2 * 8 * latents.RIM
    for subject in demo.SUBJECTS:
        for i in range(3):
            (box,) = scenes.render_scene(subject, i).boxes
            middle, extents = np.array(box[:2]) - scenes.MARGIN, np.array(box[2:])
            assert (middle - extents / 2 > -4).all() and (middle + extents / 2 < scenes.UNIT + 4).all(), subject


def test_a_scene_of_another_scale_is_the_same_place_at_another_size():
    for subject in demo.SUBJECTS:
        twice, thrice = (scenes.render_scene(subject, 5, scale=scale) for scale in (2, 3))
        assert thrice.image.shape == (3 * SIZE // 2, 3 * SIZE // 2, 3) and thrice[1:4] == twice[1:4]
        (small,), (large,) = twice.boxes, thrice.boxes
        assert np.allclose(np.array(large)[:3], 1.5 * np.array(small)[:3], rtol=1e-6)
        assert all(latents.native(scene.image).shape == (SIZE // 2, SIZE // 2, 3) for scene in (twice, thrice))


def test_an_unknown_subject_is_refused():
    with pytest.raises(ValueError, match="subject: expected one of lighthouse, .* or '', got 'cat'"):
        scenes.render_scene("cat", 0)


def test_a_contact_sheet_has_a_row_for_each_subject(tmp_path, capsys):
    assert scenes.main([str(tmp_path / "sheet.png"), "--columns", "1"]) == 0
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (132, 132 * len(SCENES))
    assert scenes.main([str(tmp_path / "missing" / "sheet.png")]) == 2
    assert capsys.readouterr().err.startswith("path: expected an existing folder")


def test_captions_name_the_subject_and_never_another_setting_or_light():
    rng = np.random.default_rng(0)
    for subject, kind in SCENES.items():
        for setting, light in set(kind.settings):
            said = [captions.scene_caption(rng, subject, setting, light) for _ in range(40)]
            assert all(any(noun in text for noun in kind.nouns) for text in said)
            for others in (LIGHTS[other].words for other in LIGHTS if other != light):
                assert not any(word in text for word in others for text in said)
            named = [any(word in text for word in (*SETTINGS[setting][0], *SETTINGS[setting][1])) for text in said]
            assert any(named) and (all(named) if not subject else not all(named))
    assert {word for prompt in demo.SCENE_PROMPTS for word in prompt.split()} <= set(captions.words())


def test_a_mirrored_picture_is_moved_by_half_a_cell():
    image = np.arange(SIZE * SIZE * 3, dtype=np.uint8).reshape(1, SIZE, SIZE, 3)
    assert np.array_equal(latents.mirrored(image)[0, 4:, 4:], image[0, :-4, ::-1][:, :-4])


def test_parts_of_scenes_are_learned_at_low_noise_alone():
    from instantas.demo.training import diffusion

    torch.manual_seed(0)
    alphas = torch.linspace(1, 0, 1000)
    for _ in range(20):
        _, t, _ = diffusion.add_noise(torch.zeros(diffusion.BATCH, 4, 2, 2), alphas)
        assert t[-diffusion.DETAILS :].max() < 1000 * diffusion.DETAILS_UNTIL
    assert t[: -diffusion.DETAILS].max() > 900


# Pictures with a known number of subjects


def test_as_many_are_planted_as_have_room_and_none_over_another():
    rng = np.random.default_rng(2)
    for subject in demo.SUBJECTS:
        for count in (1, 2, 3):
            scene = planting.plant(rng, subject, count, (96, 320), 64)
            assert len(scene.boxes) == count and scene.image.shape == (96, 320, 3)
            for i, one in enumerate(scene.boxes):
                assert all(abs(one.x - other.x) > 0.5 * (one.width + other.width) * 0.8 for other in scene.boxes[:i])
        assert len(planting.plant(rng, subject, 9, (64, 64), 64).boxes) < 9
    assert planting.plant(rng, "", 3, (64, 64), 64).boxes == ()


def test_a_mosaic_has_its_subjects_in_their_quarters():
    image, found = planting.mosaic(np.random.default_rng(0), 96, ["moon", "", "boat", "tree"])
    assert image.shape == (192, 192, 3) and [subject for subject, _ in found] == ["moon", "boat", "tree"]
    quarters = [(int(box.y // 96), int(box.x // 96)) for _, box in found]
    assert quarters == [(0, 0), (1, 0), (1, 1)]


def test_examples_have_their_subjects_inside():
    rng = np.random.default_rng(5)
    counts = []
    for _ in range(12):
        image, found = planting.example(rng, 128)
        assert image.shape == (128, 128, 3) and image.dtype == np.uint8
        counts.append(len(found))
    assert 0 in counts and max(counts) > 1

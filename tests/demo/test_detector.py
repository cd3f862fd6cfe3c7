"""The detector of subjects: right on pictures with a known number, the same at any size, clear about bad input."""

import math

import numpy as np
import pytest
import torch

from instantas import demo
from instantas.demo.detector import STRIDE, Detector, Found, Network, overlap

pytest.importorskip("skimage", reason="needs instantas[train]")
pytest.importorskip("sklearn", reason="needs instantas[train]")

from instantas.demo.training import detection, planting, scenes  # noqa: E402


@pytest.fixture(scope="module")
def detector():
    return Detector.load()


def subjects(found):
    return sorted(each.subject for each in found)


def test_planted_subjects_are_counted(detector):
    right = 0
    for subject in demo.SUBJECTS:
        rng = np.random.default_rng(demo.SUBJECTS.index(subject))
        for count in (1, 2, 3):
            scene = planting.plant(rng, subject, count, (128, 384), 96)
            right += subjects(detector.find(scene.image)) == [subject] * len(scene.boxes)
    assert right >= 22, f"{right} of 24"


def test_boxes_are_where_the_subjects_are(detector):
    for subject in ("lighthouse", "balloon"):
        scene = scenes.render_scene(subject, 1000)
        (found,) = detector.find(scene.image)
        assert overlap(found, Found(subject, 1.0, *scene.boxes[0])) > 0.5 and 0.4 <= found.confidence <= 1


def test_landscapes_and_materials_have_no_subject(detector):
    from instantas.demo.training.materials import render

    empty = [scenes.render_scene("", 1000 + i).image for i in range(6)]
    empty += [render(material, 1000).image for material in ("lava", "brick", "snow")]
    assert sum(bool(detector.find(image)) for image in empty) <= 1


def test_a_picture_of_any_size_is_seen(detector):
    scene = planting.plant(np.random.default_rng(1), "balloon", 2, (128, 512), 128)
    twice = scene.image.repeat(2, 0).repeat(2, 1)
    (small, large) = (sorted((f.x, f.y) for f in detector.find(image)) for image in (scene.image, twice))
    assert len(small) == len(large) == 2
    assert np.allclose(np.array(large), 2 * np.array(small), atol=12)
    assert isinstance(detector.find(np.zeros((1, 1, 3), np.uint8)), list)


def test_saved_and_loaded_it_finds_the_same(detector, tmp_path):
    detector.save(tmp_path / "again.safetensors")
    image = scenes.render_scene("moon", 1000).image
    assert Detector.load(tmp_path / "again.safetensors").find(image) == detector.find(image)
    with pytest.raises(FileNotFoundError):
        Detector.load(tmp_path / "none.safetensors")


@pytest.mark.parametrize(
    "image, error, words",
    [
        (np.zeros((8, 8), np.uint8), ValueError, r"image: expected \(h, w, 3\), got \(8, 8\)"),
        (np.zeros((0, 8, 3), np.uint8), ValueError, "image: expected"),
        (np.zeros((8, 8, 3)), TypeError, "image: expected uint8, got float64"),
    ],
)
def test_bad_pictures(detector, image, error, words):
    with pytest.raises(error, match=f"^{words}"):
        detector.find(image)


def test_a_file_of_something_else_is_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"no")
    for name in ("other", "broken"):
        with pytest.raises(ValueError, match="^path: expected a file that `save` has written, got '"):
            Detector.load(tmp_path / f"{name}.safetensors")


def test_a_confidence_out_of_range_is_refused(detector):
    with pytest.raises(ValueError, match="^confidence: expected"):
        detector.find(np.zeros((8, 8, 3), np.uint8), confidence=1.5)


# Training


def test_what_the_targets_say_is_what_is_found():
    boxes = [("boat", (40.0, 30.0, 24.0, 16.0)), ("moon", (20.0, 100.0, 12.0, 12.0))]
    bumps, sides, counts = detection.targets(boxes, 128)
    assert bumps.shape == (len(demo.SUBJECTS), 32, 32) and counts.sum() == 18

    class Told(Network):
        def forward(self, x):
            return torch.cat([torch.logit(bumps, 1e-4), sides])[None]

    found = Detector(Told()).find(np.zeros((128, 128, 3), np.uint8))
    assert subjects(found) == ["boat", "moon"]
    for subject, (y, x, height, width) in boxes:
        (each,) = (f for f in found if f.subject == subject)
        assert abs(each.y - y) <= STRIDE and abs(each.x - x) <= STRIDE
        assert each.height == pytest.approx(height) and each.width == pytest.approx(width)
    outside = detection.targets([("boat", (200.0, 30.0, 24.0, 16.0))], 128)
    assert outside[0].sum() == outside[2].sum() == 0


def test_the_loss_is_least_for_what_is_wanted():
    bumps, sides, counts = (each[None] for each in detection.targets([("tree", (64.0, 64.0, 40.0, 30.0))], 128))
    right = torch.cat([torch.logit(bumps, 1e-6), sides], 1)
    least = detection.loss(right, bumps, sides, counts)
    for wrong in (torch.zeros_like(right), -right, right.roll(8, 3), right + math.log(2) * (counts == 1)):
        assert detection.loss(wrong, bumps, sides, counts) > 2 * least
    assert torch.isfinite(detection.loss(1e4 * right, bumps, sides, counts))


def test_overlap_is_intersection_over_union():
    a = Found("sun", 1.0, 10.0, 10.0, 4.0, 4.0)
    assert overlap(a, a) == pytest.approx(1) and overlap(a, a._replace(x=12.0)) == pytest.approx(1 / 3)
    assert overlap(a, a._replace(y=14.0)) == 0


def test_training_makes_a_detector(tmp_path):
    path = tmp_path / "detector.safetensors"
    assert detection.main(["--out", str(path), "--minutes", "1e-4", "--pictures", "4"]) == 0
    assert Detector.load(path).find(np.zeros((64, 64, 3), np.uint8)) is not None
    assert path.stat().st_size < 2e6


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--minutes", "0"], "minutes: expected"),
        (["--pictures", "0"], "pictures: expected"),
        (["--seed", "-1"], "seed: expected"),
        (["--out", "missing/detector.safetensors"], "out: expected an existing folder"),
    ],
)
def test_bad_options_are_one_line_before_the_work(arguments, words, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(detection, "example", lambda *_: pytest.fail("it has begun to draw"))
    assert detection.main(["--out", str(tmp_path / "detector.safetensors"), *arguments]) == 2
    assert capsys.readouterr().err.startswith(words) and not list(tmp_path.iterdir())

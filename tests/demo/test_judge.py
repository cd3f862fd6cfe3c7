"""The judge of materials: right on renders that it has not seen, the same for the same seed, clear about bad input."""

import numpy as np
import pytest

pytest.importorskip("sklearn")
pytest.importorskip("skimage")

from instantas.demo import MATERIALS  # noqa: E402
from instantas.demo.judge import SIDE, Judge, features, render_crops  # noqa: E402


@pytest.fixture(scope="module")
def judge():
    return Judge.train(per_material=3)


@pytest.fixture(scope="module")
def fresh():
    return render_crops(1, seed=77)


def test_fresh_renders_are_recognised(judge, fresh):
    crops, names = fresh
    assert set(names) == set(MATERIALS)
    assert np.mean([seen == name for seen, name in zip(judge.classify(crops), names)]) > 0.85


def test_what_it_sees_is_in_the_picture_alone(judge, fresh):
    crops, _ = fresh
    one_by_one = [judge.classify(crops[i : i + 1])[0] for i in range(6)]
    assert one_by_one == judge.classify(list(crops[:6])) and judge.classify([]) == []
    assert np.isfinite(features(np.zeros((SIDE, SIDE, 3), dtype=np.uint8))).all()


@pytest.mark.parametrize(
    "images, error, words",
    [
        (np.zeros((1, 64, 64, 3), dtype=np.uint8), ValueError, r"images: expected \(n, 128, 128, 3\)"),
        (np.zeros((1, 128, 128, 3)), TypeError, "images: expected uint8, got float64"),
    ],
)
def test_bad_pictures(judge, images, error, words):
    with pytest.raises(error, match=f"^{words}"):
        judge.classify(images)


@pytest.mark.parametrize(
    "settings, words", [(dict(seed=-1), "seed: expected 0"), (dict(per_material=0), "per_material")]
)
def test_bad_training(settings, words):
    with pytest.raises(ValueError, match=f"^{words}"):
        Judge.train(**settings)

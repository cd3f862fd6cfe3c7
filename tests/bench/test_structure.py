"""What the comparisons of coarse starts count: evaluations, boxes found again, subjects by prompt."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("skimage", reason="needs instantas[train]")
pytest.importorskip("sklearn", reason="needs instantas[train]")

from bench import detection, failures, scenes, structure_pictures, structure_rivals  # noqa: E402
from instantas import demo  # noqa: E402
from instantas.demo.detector import Found  # noqa: E402
from instantas.sampling.spectrum import carry  # noqa: E402
from instantas.windows import WindowPlan  # noqa: E402


def test_evaluations_over_minimum_coverage():
    found = {name: structure_pictures.cost(name, 2) for name in structure_pictures.METHODS}
    assert found["none"] == found["shift"] == found["dilated"] == 1
    assert found["MultiDiffusion"] == 81 / 4 and found["anchor"] == 1.25 and found["refined"] == 12 / 25 + 1 / 4
    assert found["coarse, economy"] < found["coarse, sigma 1.1"] < found["coarse"] < 0.7


def test_a_box_is_found_again_once():
    box = (10.0, 10.0, 8.0, 8.0)
    found = [Found("sun", 0.9, 11.0, 10.0, 8.0, 8.0), Found("moon", 0.8, 40.0, 10.0, 8.0, 8.0)]
    assert detection.matched(found, [("sun", box)]) == ["sun"]
    assert detection.matched(found, [("sun", box), ("sun", box)]) == ["sun"]
    assert detection.matched(found, [("moon", box), ("boat", (40.0, 10.0, 8.0, 8.0))]) == []


def test_seams_of_a_planted_border():
    rng = np.random.default_rng(0)
    picture = rng.random((256, 256, 3)) * 0.1
    ratios, weights = structure_pictures.seams(picture + (np.arange(256) >= 128)[:, None, None] * 0.5)
    assert ratios[0] > 3 > 1.5 > ratios[1] and len(weights) == 2
    assert structure_pictures.seams(picture[:128, :128]) == ([], [])


def test_prompts_name_each_subject_once():
    assert sorted(scenes.PROMPTS.values()) == sorted(demo.SUBJECTS)
    found = dict(prompts=np.array([*scenes.PROMPTS, *scenes.PROMPTS]), subjects=np.arange(16))
    assert scenes.by_prompt(found).startswith("lighthouse 4.00, boat 5.00")


def test_a_sheet_keeps_proportions_and_fills_shorter_rows(tmp_path):
    for name, size in (("square", (40, 40)), ("wide", (80, 40))):
        Image.new("RGB", size, "blue").save(tmp_path / f"{name}.png")
    square, wide = tmp_path / "square.png", tmp_path / "wide.png"
    structure_pictures.sheet([[square, wide], [square]], tmp_path / "sheet.png", height=20, quality=90)
    shown = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert shown.shape == (46, 66, 3)
    assert (shown[8, [5, 40], 2] > 200).all() and (shown[8, [5, 40], 0] < 60).all() and (shown[30, 40] > 200).all()


def test_a_failure_case_is_counted_whole(tmp_path):
    case = failures.Case("sea", (128, 128), {"boat": 1})
    failures.paint(tmp_path / "a.png", case, "none", 0)
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.size == (128, 128)
    before = (tmp_path / "a.png").stat().st_mtime_ns
    failures.paint(tmp_path / "a.png", case, "none", 0)
    assert (tmp_path / "a.png").stat().st_mtime_ns == before

    class Two:
        def find(self, picture):
            return [Found("boat", 0.9, 1, 1, 1, 1), Found("sun", 0.9, 1, 1, 1, 1)]

    assert failures.counts(tmp_path / "a.png", Two()) == {"boat": 1, "sun": 1} != case.wanted
    assert failures.cell([tmp_path / "a.png", tmp_path / "b.png"], case, Two()) == "0 of 1 (1)"
    assert failures.cell([tmp_path / "a.png"], case._replace(wanted={"boat": 1, "sun": 1}), Two()) == "1 of 1 (2)"
    assert failures.cell([tmp_path / "b.png"], case, Two()) == "not painted"


def test_an_anchor_gives_a_canvas_the_low_frequencies_of_the_native_picture():
    itself = SimpleNamespace(clean=lambda prediction, sample: prediction, prediction=lambda clean, sample: clean)
    native, canvas = torch.randn(1, 4, 16, 16, dtype=torch.float64), torch.randn(1, 4, 32, 32, dtype=torch.float64)
    anchor, plan = structure_rivals.Anchor([native] * 5), WindowPlan.minimum_coverage(32, 32, 16)
    context = SimpleNamespace(level=itself)
    pulled = anchor.step(0, 5, plan).adjust(canvas, None, context)
    low = carry(pulled, (16, 16), (False, False))
    assert torch.allclose(low, 2 * native, atol=1e-12)  # a cell of the canvas is as bright as one of the native picture
    high = [x - carry(carry(x, (16, 16), (False, False)), (32, 32), (False, False)) for x in (canvas, pulled)]
    assert torch.allclose(*high, atol=1e-12)
    late = anchor.step(4, 5, plan).adjust(canvas, None, context)
    assert 0 < (late - canvas).norm() < 0.2 * (pulled - canvas).norm()


def test_what_a_border_adds_is_told_from_what_is_painted_there(tmp_path):
    """A subject in the middle is in the run with overlapping windows too; a step of one picture alone is a seam."""
    smooth = np.linspace(0, 100, 256).astype(np.uint8)
    subject = np.broadcast_to(smooth[:, None, None] // 2 + smooth[None, :, None] // 2, (256, 256, 3)).copy()
    subject[120:136, 120:136] += 100
    seam = subject + 20 * (np.arange(256) >= 128)[None, :, None].astype(np.uint8)
    for name, picture in (
        ("shift", subject),
        ("none", seam),
        *((f"{n}, overlapping", subject) for n in ("shift", "none")),
    ):
        structure_pictures.keep(Image.fromarray(picture), structure_pictures.file_of(tmp_path, name, 2, "sea", 0))
    assert structure_pictures.border(tmp_path, "shift", 2, ["sea"], 1) == "1.000 (1.000 to 1.000)"
    assert float(structure_pictures.border(tmp_path, "none", 2, ["sea"], 1).split()[0]) > 2
    assert structure_pictures.border(tmp_path, "coarse", 2, ["sea"], 1) == ""

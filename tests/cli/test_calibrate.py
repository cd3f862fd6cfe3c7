"""`instantas calibrate`: what it prints and keeps, and what `generate --start coarse` makes of it."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
from PIL import Image

from instantas import demo
from instantas.cli import main
from instantas.pipelines import calibration
from instantas.sampling.calibration import Calibration
from instantas.sampling.coarse import SIGMA

FOUND = Calibration(((0.5, 0.9), (1.0, 0.5), (4.0, 0.3)))
KEPT = "model/instantas.json"


@pytest.fixture
def model():
    """A copy of the embedded model, never measured."""
    shutil.copytree(demo.folder(), "model")
    Path(KEPT).write_text('{"num_inference_steps": 4, "note": "mine"}')


@pytest.fixture
def measured(monkeypatch):
    """What is measured is `FOUND`; the arguments that it was asked with."""
    asked = []
    monkeypatch.setattr(calibration, "calibrate", lambda *given, **settings: asked.append((given, settings)) or FOUND)
    return asked


def test_a_model_is_measured_and_keeps_its_level(model, capsys):
    options = ("--steps", "3", "--pictures", "1", "--prompt", "turquoise ocean", "--device", "cpu")
    main(["calibrate", "model", *options])
    heading, *rows, result, kept = capsys.readouterr().out.splitlines()
    assert heading.split() == ["sigma", "share"] and len(rows) == 3
    sigmas, shares = zip(*([float(number) for number in row.split()] for row in rows))
    assert sigmas == tuple(sorted(sigmas, reverse=True)) and shares[-1] == pytest.approx(1, abs=0.1)
    sigma = float(re.match(r"sigma ([\d.]+): ", result)[1])
    assert kept == f'{KEPT}: "coarse_sigma": {sigma}' and sigmas[-1] < sigma < sigmas[0]
    assert json.loads(Path(KEPT).read_text()) == {"num_inference_steps": 4, "note": "mine", "coarse_sigma": sigma}


def test_what_was_kept_is_replaced(model, measured, capsys):
    for was in ("", ", in place of 2.0"):
        main(["calibrate", "model", "--scheduler", "euler", "--guidance", "3", "--scale", "3", "--seed", "5"])
        assert capsys.readouterr().out.splitlines()[-1] == f'{KEPT}: "coarse_sigma": 2.0{was}'
    (pipe, prompts), settings = measured[0]
    assert type(pipe.scheduler).__name__ == "EulerDiscreteScheduler" and prompts == calibration.PROMPTS
    asked = dict(pictures=2, seed=5, scale=3.0, num_inference_steps=None, guidance_scale=3.0, window_batch_size=4)
    assert settings == asked


def test_a_level_that_cannot_be_kept_is_printed(model, measured, capsys):
    cache = Path("models--my--model/snapshots")
    cache.mkdir(parents=True)
    shutil.move("model", cache / "abc")
    before = (cache / "abc" / "instantas.json").read_bytes()
    main(["calibrate", str(cache / "abc")])
    told = capsys.readouterr().out
    assert "--coarse-sigma 2.0" in told and "CoarseStart(sigma=2.0)" in told and '"coarse_sigma": 2.0' in told
    assert (cache / "abc" / "instantas.json").read_bytes() == before


def test_no_level_keeps_nothing(model, measured, monkeypatch, refused):
    monkeypatch.setattr(calibration, "calibrate", lambda *given, **settings: Calibration(((0.5, 0.9), (1.0, 0.5))))
    before = Path(KEPT).read_bytes()
    assert "scheduler: expected levels up to one where less than 0.4" in refused("calibrate", "model")
    assert Path(KEPT).read_bytes() == before


@pytest.mark.parametrize(
    "content, got",
    [("{", "model: expected JSON in 'model/instantas.json', got Expecting property name"), ("3", "got int")],
)
def test_broken_settings_are_refused_before_the_model_is_loaded(model, measured, refused, content, got):
    Path(KEPT).write_text(content)
    assert got in refused("calibrate", "model")
    assert Path(KEPT).read_text() == content and not measured


def test_a_folder_that_cannot_be_written_is_refused_before_the_model_is_loaded(model, measured, monkeypatch, refused):
    os.remove(KEPT)
    os.mkdir(KEPT)
    assert "model: expected a file, got the folder 'model/instantas.json'" in refused("calibrate", "model")
    os.rmdir(KEPT)

    def readonly(*_, **__):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("tempfile.NamedTemporaryFile", readonly)
    line = refused("calibrate", "model")
    assert "model: expected a file that can be written, got 'model/instantas.json' (Read-only file system)" in line
    assert not measured


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["nowhere/at/all"], "model: expected a folder in diffusers' layout or a hub id or a checkpoint file"),
        (["./my.safetensors"], "model: expected a folder in diffusers' layout or a hub id or a checkpoint file"),
        (["."], "model: expected a folder with a model_index.json, got '.' without one"),
        ([""], "model: expected a folder with a model_index.json, got '' without one"),
        ([], "Missing argument 'MODEL'"),
        (["model", "--scale", "1"], "scale: expected more than 1"),
        (["model", "--guidance", "nan"], "guidance: expected a finite number, got nan"),
    ],
)
def test_wrong_arguments(refused, arguments, words):
    assert words in refused("calibrate", *arguments)


def test_a_coarse_start_goes_on_from_the_level_that_was_kept(model, capsys):
    """And a picture is painted again from its own, whatever is kept then."""

    def generate(*options):
        main(["generate", *options, "--device", "cpu"])
        return capsys.readouterr().out

    own = ("lava", "--size", "256x256", "--seed", "1", "--start", "coarse", "--model", "model")
    told = generate(*own, "-o", "before.png")
    assert f"then from sigma {SIGMA}, which `instantas calibrate` has not measured for this model" in told
    Path(KEPT).write_text('{"num_inference_steps": 4, "coarse_sigma": 0.4}')
    assert "then from sigma 0.4, memory" in generate(*own, "-o", "kept.png")
    generate("--like", "before.png", "-o", "again.png")
    generate(*own, "--coarse-sigma", str(SIGMA), "-o", "given.png")
    with Image.open("before.png") as before, Image.open("kept.png") as kept, Image.open("again.png") as again:
        sigmas = [json.loads(picture.text["settings"])["coarse_sigma"] for picture in (before, kept, again)]
        assert sigmas == [SIGMA, 0.4, SIGMA]
        assert before.tobytes() == again.tobytes() == Image.open("given.png").tobytes() != kept.tobytes()

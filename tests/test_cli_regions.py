"""Regions on the command line: given as text or as a file, drawn beforehand, recorded in the picture."""

import json

import numpy as np
import pytest
from PIL import Image
from test_cli import generate, in_tmp, refused  # noqa: F401

from instantas.pipeline import InstantASPipeline

SIZE = ("--size", "256x128")
RIGHT = "lava@0.5,0,1,1"


def pixels(name):
    return np.asarray(Image.open(name)).astype(int)


def asked(monkeypatch):
    """What the pipeline is called with."""
    calls, call = [], InstantASPipeline.__call__

    def remember(self, *arguments, **settings):
        calls.append(settings)
        return call(self, *arguments, **settings)

    monkeypatch.setattr(InstantASPipeline, "__call__", remember)
    return calls


def test_a_region_changes_its_part_of_the_picture():
    generate(*SIZE, "--seed", "1", "--bridging", "none", "-o", "plain.png")
    generate(*SIZE, "--seed", "1", "--bridging", "none", "-o", "lava.png", "--region", RIGHT)
    change = abs(pixels("lava.png") - pixels("plain.png")).mean((0, 2))
    assert change[160:].mean() > 10 > 2 > change[:96].mean()


def test_regions_reach_the_pipeline_and_the_picture_records_them(monkeypatch):
    calls = asked(monkeypatch)
    Image.fromarray(np.full((128, 256), 128, dtype=np.uint8)).save("half.png")
    listed = [{"prompt": "snow", "mask": "half.png", "feather": 8, "guidance_scale": 4}]
    with open("regions.json", "w") as file:
        json.dump(listed, file)
    options = ("--region-mode", "joint", "--base-weight", "0.25", "--semantic-schedule", "cosine")
    generate(*SIZE, "--region", RIGHT, "--region", "night sky@0,0,64,64", "--regions", "regions.json", *options)
    (settings,) = calls
    assert [region.prompt for region in settings["regions"]] == ["lava", "night sky", "snow"]
    assert settings["regions"][1].box == (0, 0, 64, 64) and settings["regions"][2].guidance_scale == 4
    with Image.open("instantas.png") as picture:
        recorded = json.loads(picture.text["settings"])
    assert recorded["regions"] == [RIGHT, "night sky@0,0,64,64", *listed]
    for given, name, value in (
        (settings, "region_mode", "joint"),
        (settings, "base_weight", 0.25),
        (settings, "semantic_schedule", "cosine"),
    ):
        assert given[name] == recorded[name] == value


def test_a_region_may_cross_a_border_that_wraps():
    generate(*SIZE, "--wrap", "x", "--region", "lava@0.8,0,1.2,1")
    assert pixels("instantas.png").shape == (128, 256, 3)


def test_preview_is_drawn_before_the_picture_is_painted(monkeypatch, capsys):
    def fail(*arguments, **settings):
        raise ValueError("prompt: stopped")

    monkeypatch.setattr(InstantASPipeline, "__call__", fail)
    refused(capsys, "generate", "wall", *SIZE, "--device", "cpu", "--region", RIGHT, "--preview", "layout.png")
    with Image.open("layout.png") as picture:
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 20


@pytest.mark.parametrize(
    "options, words",
    [
        (("--region", "lava"), 'region: expected "prompt@left,top,right,bottom"'),
        (("--region", "lava@0.5,0,0.2,1"), "box: expected left < right"),
        (("--region", "lava@0,0,300,100"), "box: expected 0 to 256 pixels"),
        (("--region", "lava@nowhere.png"), "mask: expected a picture file"),
        (("--regions", "nowhere.json"), "regions: expected a JSON file"),
        (("--region", RIGHT, "--base-weight", "-1"), "base_weight: expected 0 or more"),
        (("--region-mode", "add"), "'add' is not one of"),
        (("--preview", "layout.txt", "--region", RIGHT), "path: expected a picture ending"),
        (("--preview", "nowhere/layout.png"), "path: expected an existing folder"),
        (("--preview", "instantas.png"), "preview: expected another file than the output"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(capsys, options, words):
    assert words in refused(capsys, "generate", "wall", *SIZE, "--steps", "1", "--device", "cpu", *options)


def test_an_existing_preview_is_kept(capsys):
    with open("layout.png", "w") as file:
        file.write("mine")
    options = (*SIZE, "--device", "cpu", "--preview", "layout.png")
    assert "layout.png" in refused(capsys, "generate", "wall", *options)
    assert open("layout.png").read() == "mine"

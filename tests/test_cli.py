"""The command line, run in this process as a user would type it."""

import json
import os

import numpy as np
import pytest
from PIL import Image

from instantas.cli import main
from instantas.pipelines.pipeline import InstantASPipeline


@pytest.fixture(autouse=True)
def in_tmp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def refused(capsys, *arguments) -> str:
    """Run a command that must fail in one line with exit code 2; the line."""
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    out, err = capsys.readouterr()
    assert stop.value.code == 2
    *shown, line = err.splitlines()
    assert all("%|" in part for part in shown if part.strip())  # nothing before it but the progress bar
    assert line.startswith("instantas: ") and "Traceback" not in err
    return line


def generate(*arguments, prompt="red brick wall"):
    main(["generate", prompt, "--steps", "2", "--device", "cpu", *arguments])


def test_picture_of_the_asked_size_with_its_settings_inside(capsys):
    generate("--size", "300x200", "--seed", "7", "--negative", "grass", "-o", "a.png")
    assert "seed 7" in capsys.readouterr().out
    with Image.open("a.png") as picture:
        assert picture.size == (300, 200)
        assert picture.text["prompt"] == "red brick wall"
        assert picture.text["seed"] == "7"
        assert picture.text["size"] == "300x200"
        settings = json.loads(picture.text["settings"])
    assert settings["negative_prompt"] == "grass" and settings["num_inference_steps"] == 2
    assert settings["guidance_scale"] == 2.5  # the model's own


def test_one_seed_gives_identical_bytes_and_another_batch_the_same_picture():
    generate("--size", "300x200", "--seed", "1", "-o", "a.png")
    generate("--size", "300x200", "--seed", "1", "-o", "b.png")
    generate("--size", "300x200", "--seed", "1", "-o", "c.png", "--window-batch", "1")
    generate("--size", "300x200", "--seed", "2", "-o", "d.png")
    a, b, c, d = (open(f"{name}.png", "rb").read() for name in "abcd")
    assert a == b and a != d
    pixels = [np.asarray(Image.open(f"{name}.png")).astype(int) for name in "acd"]
    assert abs(pixels[0] - pixels[1]).max() <= 1  # another batch size rounds differently in the last bit
    assert abs(pixels[0] - pixels[2]).max() > 10


@pytest.mark.parametrize("size", ["1x1", "7x900", "1000x33"])
def test_any_size(size):
    generate("--size", size, "-o", "a.png")
    with Image.open("a.png") as picture:
        assert "x".join(map(str, picture.size)) == size


def test_a_seed_that_was_not_given_is_told(capsys):
    generate("--size", "8x8", "-o", "a.png")
    seed = capsys.readouterr().out.split("seed ")[1].strip()
    generate("--size", "8x8", "-o", "b.png", "--seed", seed)
    assert open("a.png", "rb").read() == open("b.png", "rb").read()


def test_a_file_is_replaced_only_by_force(capsys):
    with open("a.png", "w") as file:
        file.write("mine")
    assert "exists" in refused(capsys, "generate", "grass", "--size", "8x8", "-o", "a.png")
    assert open("a.png").read() == "mine"
    generate("--size", "8x8", "-o", "a.png", "--force")
    assert Image.open("a.png").size == (8, 8)


def test_a_failure_while_writing_leaves_nothing(capsys, monkeypatch):
    def broken(self, path, **settings):
        with open(path, "wb") as file:
            file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", broken)
    arguments = ["generate", "grass", "--steps", "1", "--device", "cpu", "--size", "8x8", "-o", "a.png"]
    assert "disk full" in refused(capsys, *arguments)
    assert os.listdir() == []


@pytest.mark.parametrize(
    "arguments, told",
    [
        (["--size", "0x8"], "from 1 up"),
        (["--size", "-8x8"], "from 1 up"),
        (["--size", "8.5x8"], "whole pixels"),
        (["--size", "eight"], "WIDTHxHEIGHT"),
        (["--size", "8x8", "--steps", "0"], "steps"),
        (["--size", "8x8", "--guidance", "strong"], "guidance"),
        (["--size", "8x8", "--guidance", "nan"], "guidance"),
        (["--size", "8x8", "--scheduler", "magic"], "scheduler"),
        (["--size", "8x8", "--method", "magic"], "method"),
        (["--size", "8x8", "--dtype", "int8"], "dtype"),
        (["--size", "8x8", "--device", "cuda:99"], "device"),
        (["--size", "8x8", "--device", "abacus"], "device"),
        (["--size", "8x8", "--wrap", "z"], "wrap"),
        (["--size", "8x8", "--window-batch", "0"], "window-batch"),
        (["--size", "8x8", "--bridging", "glue"], "bridging"),
        (["--size", "8x8", "--seed", "-1"], "seed"),
        (["--size", "8x8", "-o", "missing/a.png"], "missing"),
        (["--size", "8x8", "-o", "a.jpg"], ".png"),
        (["--size", "8x8", "--model", "no/such/folder"], "no/such/folder"),
        ([], "--size"),
    ],
)
def test_wrong_options_are_refused_in_one_line(capsys, arguments, told):
    assert told in refused(capsys, "generate", "grass", *arguments)
    assert os.listdir() == []


def test_an_incomplete_model_folder_is_named(capsys):
    os.mkdir("model")
    assert "model" in refused(capsys, "generate", "grass", "--size", "8x8", "--model", "./model")


def test_plan(capsys):
    main(["plan", "--size", "2048x512", "--plot", "plan.png"])
    out = capsys.readouterr().out
    assert "4 of 64 x 64" in out and "1250 with 25 windows" in out and "6.25" in out
    with Image.open("plan.png") as picture:
        assert picture.width > 100


def test_plan_refuses_a_file_that_cannot_be_made(capsys):
    assert "missing" in refused(capsys, "plan", "--size", "8x8", "--plot", "missing/a.png")


def test_info_names_every_backend_and_why_one_is_absent(capsys):
    main(["info"])
    out = capsys.readouterr().out
    for name in ("reference", "cpp", "triton", "cuda", "torch", "diffusers"):
        assert name in out


def test_unknown_command(capsys):
    assert "magic" in refused(capsys, "magic")


# Regions: given as text or as a file, drawn beforehand, recorded in the picture

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

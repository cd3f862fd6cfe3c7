"""`instantas generate --like`: what a picture carries is painted again, but for what is asked otherwise."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from instantas.cli import main
from instantas.cli.like import OPTIONS
from instantas.cli.pictures import read_record, write_picture

REGIONS = ("--region", "snow@0,0,0.5,1", "--base-weight", "0.25", "--region-mode", "joint")
SETTINGS = {  # every one that a run may have, none of them the default
    "plain": ("--size", "40x24", "--negative", "grass", "--guidance", "1.5", "--scheduler", "euler", "--steps", "2"),
    "wide": ("--size", "136x16", "--wrap", "x", "--bridging", "economy", "--window-batch", "3", "--dtype", "bfloat16"),
    "regions": ("--size", "64x64", *REGIONS, "--semantic-schedule", "cosine"),
    "multidiffusion": ("--size", "136x64", "--method", "multidiffusion", "--region", "snow@0,0,9,9"),
}

MULTIDIFFUSION = {"method": "multidiffusion", "start": "none", "coarse_sigma": None}  # what goes with the method


def generate(*arguments):
    main(["generate", *arguments, "--device", "cpu"])


def paint(*arguments, prompt="lava", steps=1):
    generate(prompt, "--size", "40x24", "--steps", str(steps), *arguments)


def settings(name):
    text = read_record(Path(name))
    return {name: text[name] for name in ("prompt", "seed", "size")} | json.loads(text["settings"])


def same(one, other):
    with Image.open(one) as a, Image.open(other) as b:
        return a.size == b.size and np.array_equal(a, b)


@pytest.mark.parametrize("options", SETTINGS.values(), ids=SETTINGS)
def test_a_picture_is_painted_again_to_the_pixel(options):
    generate("lava", "--steps", "1", *options, "-o", "a.png")
    generate("--like", "a.png", "-o", "b.png")
    assert same("a.png", "b.png") and read_record(Path("a.png")) == read_record(Path("b.png"))


@pytest.mark.parametrize("ending", [".jpg", ".webp", ".tif"])
def test_from_every_format(ending):
    paint("-o", "a" + ending, prompt="  Lava, « é »")
    generate("--like", "a" + ending, "-o", "b.png")
    assert read_record(Path("a" + ending)) == read_record(Path("b.png"))
    if ending != ".jpg":
        assert same("a" + ending, "b.png")


@pytest.mark.parametrize(
    "asked, changed",
    [
        (["grass"], {"prompt": "grass"}),
        (["--seed", "5", "--size", "8x16"], {"seed": "5", "size": "8x16"}),
        (["--steps", "2", "--guidance", "7"], {"num_inference_steps": 2, "guidance_scale": 7.0}),
        (["--negative", "sand", "--wrap", "y"], {"negative_prompt": "sand", "wrap": [True, False]}),
        (["--scheduler", "ddpm"], {"scheduler": "ddpm", "scheduler_class": "DDPMScheduler"}),
        (["--method", "multidiffusion"], {"bridging": "none", **MULTIDIFFUSION}),
        (["--method", "multidiffusion", "--bridging", "shift"], {"bridging": "shift", **MULTIDIFFUSION}),
    ],
)
def test_what_is_given_is_taken_in_place(asked, changed):
    paint("--seed", "9", "--bridging", "economy", "-o", "a.png")
    generate("--like", "a.png", *asked, "-o", "b.png")
    assert settings("b.png") == settings("a.png") | changed
    if asked[0] != "grass":
        kept = () if "--method" in asked else ("--bridging", "economy")
        paint("--seed", "9", *kept, *asked, "-o", "c.png")
        assert same("b.png", "c.png")


def test_regions_are_replaced_all_together():
    paint("--region", "snow@0,0,0.5,1", "--region", "grass@0.5,0,1,1", "-o", "a.png")
    generate("--like", "a.png", "--region", "sand@0,0,1,0.5", "-o", "b.png")
    assert [region["prompt"] for region in settings("b.png")["regions"]] == ["sand"]


def mask(name, value):
    Image.fromarray(np.full((24, 40), value, np.uint8)).save(name)


@pytest.mark.parametrize("state", ["which has changed", "which is gone"])
def test_a_mask_that_is_another_now_is_refused(refused, state):
    mask("half.png", 128)
    paint("--region", "snow@half.png", "-o", "a.png")
    generate("--like", "a.png", "-o", "b.png")
    assert same("a.png", "b.png")
    mask("half.png", 127) if "changed" in state else os.remove("half.png")
    line = refused("generate", "--like", "a.png", "-o", "c.png")
    assert line.startswith("instantas: like: expected what the picture was painted from, got ") and line.endswith(state)
    assert "half.png" in line and not Path("c.png").exists()
    mask("half.png", 127)
    generate("--like", "a.png", "--region", "snow@half.png", "-o", "c.png")  # asked for anew


def test_it_does_not_matter_where_it_is_run(tmp_path, monkeypatch):
    mask("half.png", 128)
    paint("--region", "snow@half.png", "-o", "a.png")
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    generate("--like", "../a.png", "-o", "b.png")
    assert same("../a.png", "b.png")


def test_an_unfinished_picture_is_finished():
    paint("-o", "a.png")
    text = read_record(Path("a.png"))
    unfinished = json.loads(text["settings"]) | {"unfinished": "step 1 of 2"}
    write_picture(Image.new("RGB", (40, 24)), Path("u.png"), text | {"settings": json.dumps(unfinished)}, False)
    generate("--like", "u.png", "-o", "b.png")
    assert same("a.png", "b.png") and settings("b.png") == settings("a.png")


@pytest.mark.parametrize(
    "change, told",
    [
        ({"Software": "instantas 0.0.1"}, "expected a picture of instantas 0.1.0, got one of instantas 0.0.1"),
        ({"settings": "{"}, "expected settings in 'a.png', got {"),
        ({"settings": "7"}, "expected settings in 'a.png', got 7"),
        ({"settings": "[]"}, "expected a picture of `instantas generate`, got one without num_inference_steps"),
        ({"size": "forty"}, "expected WIDTHxHEIGHT in whole pixels"),
        ({"seed": "-1"}, "-1 is not in the range"),
    ],
)
def test_other_records_are_refused(refused, change, told):
    paint("-o", "a.png")
    write_picture(Image.new("RGB", (8, 8)), Path("a.png"), read_record(Path("a.png")) | change, True)
    assert told in refused("generate", "--like", "a.png", "-o", "b.png")
    assert not Path("b.png").exists()


@pytest.mark.parametrize(
    "name, value",
    [
        ("regions", [{"prompt": "lava"}]),
        ("regions", 3),
        ("files", 3),
        ("wrap", 5),
        ("wrap", [True]),
        ("loras", [{}]),
        ("guidance_interval", 5),
        ("extend", [1]),
        ("bridging", 5),
        ("negative_prompt", 5),
    ],
)
def test_settings_of_no_run_are_refused(refused, name, value):
    fields = {"num_inference_steps": 1, "guidance_scale": 1.0, "negative_prompt": None, "window_batch_size": 1}
    fields |= {option: None for option in OPTIONS if option not in ("picture", "scale")} | {"files": {}, "regions": []}
    fields |= {"wrap": [False, False], "guidance_interval": [0.0, 1.0], "loras": [], "controls": [], name: value}
    text = {"prompt": "lava", "seed": "1", "size": "8x8", "Software": "instantas 0.1.0"}
    write_picture(Image.new("RGB", (8, 8)), Path("a.png"), text | {"settings": json.dumps(fields)}, False)
    line = refused("generate", "--like", "a.png", "-o", "b.png")
    assert line == f"instantas: like: expected settings in 'a.png' that are a run's, got {name} {json.dumps(value)}"


def test_a_mask_takes_the_place_of_sides_to_extend():
    Image.new("RGB", (40, 24), "red").save("photo.png")
    mask("all.png", 255)
    start = "lava", "--image", "photo.png", "--steps", "1", "--seed", "1"
    generate(*start, "--extend", "8,0,0,0", "-o", "wide.png")
    generate(*start, "--mask", "all.png", "-o", "filled.png")
    generate("--like", "wide.png", "--mask", "all.png", "-o", "a.png")
    os.remove("all.png")
    generate("--like", "filled.png", "--extend", "8,0,0,0", "-o", "b.png")
    assert same("a.png", "filled.png") and same("b.png", "wide.png")
    assert settings("a.png")["extend"] is None and settings("b.png")["mask"] is None


def test_pictures_of_others_are_refused(refused):
    for ending in (".png", ".jpg", ".webp", ".tif", ".gif"):
        Image.new("RGB", (8, 8)).save("plain" + ending)
        told = refused("generate", "--like", "plain" + ending)
        assert f"like: expected a picture with its settings inside, got 'plain{ending}' without prompt" in told
    exif = Image.Exif()
    exif[0x010E] = "A summer's day"
    Image.new("RGB", (8, 8)).save("camera.jpg", exif=exif)
    assert "without prompt" in refused("generate", "--like", "camera.jpg")
    Path("text.png").write_text("no picture")
    for name in ("text.png", "missing.png", "."):
        assert f"like: expected a picture file, got {name!r}" in refused("generate", "--like", name)


def test_an_enlarged_picture_is_refused(refused):
    paint("-o", "a.png")
    main(["upscale", "a.png", "--scale", "2", "--steps", "2", "--strength", "0.5", "--device", "cpu", "-o", "b.png"])
    assert "got one without" in refused("generate", "--like", "b.png", "-o", "c.png")


def test_a_seed_that_was_not_given_is_taken_over():
    torch.manual_seed(0)
    paint("-o", "a.png")
    generate("--like", "a.png", "-o", "b.jpg")
    assert settings("a.png")["seed"] == settings("b.jpg")["seed"]


def test_a_coarse_start_gives_way_to_what_is_asked_for(refused):
    """A picture's own does, where the two do not go together; one that is typed is an error."""
    size = ("--size", "256x256", "--steps", "6")
    generate("lava", *size, "-o", "a.png")
    Image.new("RGB", (256, 256), "red").save("red.png")
    for number, asked in enumerate((("--scheduler", "pndm"), ("--image", "red.png"), ("--method", "multidiffusion"))):
        few = ("--size", "136x136", "--steps", "1") if "multidiffusion" in asked else ()
        generate("--like", "a.png", *asked, *few, "-o", f"{number}.png")
        assert settings(f"{number}.png")["start"] == "none"
        assert "start: expected" in refused("generate", "lava", *size, *asked, "--start", "coarse", "-o", "b.png")
    generate("--like", "a.png", "--size", "128x128", "-o", "native.png")
    generate("--like", "native.png", "--size", "256x256", "-o", "again.png")
    noted = [settings(name) for name in ("a.png", "native.png", "again.png")]
    assert [(n["start"], n["coarse_sigma"]) for n in noted] == [("coarse", 1.5)] * 3
    assert Image.open("again.png").tobytes() == Image.open("a.png").tobytes()

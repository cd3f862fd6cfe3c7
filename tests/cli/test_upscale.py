"""`instantas upscale`: what it writes, prints and refuses."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from instantas import InstantASPipeline, demo
from instantas.cli import main


def photo(width=60, height=40, mode="RGB"):
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 256, (4, 6, 3), dtype=np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def upscale(*arguments):
    main(["upscale", "photo.png", "--steps", "4", "--device", "cpu", "--seed", "3", *arguments])


def test_a_picture_becomes_larger_as_the_pipeline_makes_it(capsys):
    photo().save("photo.png")
    upscale("--scale", "4", "--prompt", "lava", "--strength", "0.5", "-o", "big.png")
    told = capsys.readouterr().out
    assert "stages: 120x80, 240x160, evaluations: 10 in 2 steps each" in told  # 1 window, then 2 x 2 of 128 pixels
    assert "big.png: 240x160, seed 3" in told
    pipe = InstantASPipeline.from_pretrained(demo.folder())
    settings = dict(num_inference_steps=4, strength=0.5, generator=torch.Generator().manual_seed(3))
    by_hand = pipe.upscale(photo(), 4, "lava", **settings).images[0]
    with Image.open("big.png") as picture:
        np.testing.assert_array_equal(np.asarray(picture), np.asarray(by_hand))
        settings, text = json.loads(picture.text["settings"]), picture.text
    assert (text["prompt"], text["seed"], text["size"]) == ("lava", "3", "240x160")
    assert settings["scale"] == 4 and settings["strength"] == 0.5 and settings["bridging"] == "shift"
    digest = hashlib.sha256(Path("photo.png").read_bytes()).hexdigest()
    assert settings["files"] == {settings["picture"]: digest} == {str(Path("photo.png").resolve()): digest}


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["none.png"], "picture: expected a picture file, got 'none.png'"),
        (["broken.png"], "picture: expected a picture file, got 'broken.png'"),
        (["deep.png"], "picture: expected 8 bits a channel, got mode 'I;16'"),
        (["photo.png", "--scale", "1"], "scale: expected more than 1"),
        (["photo.png", "--strength", "2"], "strength: expected"),
        (["photo.png", "--strength", "0.01", "--steps", "4"], "strength: expected at least 0.25, one of 4 steps"),
        (["photo.png", "--prompt", "a cat"], "prompt: expected something that the embedded model paints"),
        (["photo.png", "-o", "big.gif"], "output: expected a file name that ends in .png"),
        (["photo.png", "-o", "photo.png"], "photo.png"),
        (["photo.png", "-o", "photo.png", "--force"], "output: expected a file of its own, got 'photo.png'"),
        (["photo.png", "--guidance", "inf"], "guidance: expected a finite number, got inf"),
        (["photo.png", "--scale", "1e300"], "size: expected a picture that fits"),
        (["photo.png", "--scale", "100000"], "size: expected a picture that fits"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(refused, arguments, words):
    photo().save("photo.png")
    Path("broken.png").write_bytes(Path("photo.png").read_bytes()[:200])
    Image.fromarray(np.zeros((4, 4), np.uint16)).save("deep.png")
    before = Path("photo.png").read_bytes()
    assert words in refused("upscale", *arguments, "--device", "cpu")
    assert Path("photo.png").read_bytes() == before and not Path("large.png").exists()

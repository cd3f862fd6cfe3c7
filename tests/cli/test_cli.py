"""What the commands paint, print and refuse."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torch.distributed.run import parse_args

from instantas import __version__, demo
from instantas.cli import app, main
from instantas.pipelines.pipeline import InstantASPipeline

ROOT = Path(__file__).parents[2]


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
    assert settings == {  # what was given, and every default
        "instantas": __version__,
        "model": "demo",
        "dtype": "float32",
        "scheduler": None,
        "scheduler_class": "DDIMScheduler",
        "num_inference_steps": 2,
        "guidance_scale": 2.5,  # the model's own
        "negative_prompt": "grass",
        "wrap": [False, False],
        "method": "instantas",
        "bridging": "shift",
        "start": "none",
        "coarse_sigma": None,
        "guidance_interval": [0.0, 1.0],
        "regions": [],
        "files": {},
        "image": None,
        "mask": None,
        "extend": None,
        "strength": None,
        "loras": [],
        "controls": [],
        "region_mode": "blend",
        "base_weight": 0.0,
        "semantic_schedule": "constant",
        "window_batch_size": 4,
        "cuda_graph": False,
    }


@pytest.mark.parametrize(
    "options, noted",
    [
        (("--method", "multidiffusion"), {"bridging": "none", "method": "multidiffusion"}),
        (("--scheduler", "dpm"), {"scheduler": "dpm", "scheduler_class": "DPMSolverMultistepScheduler"}),
        (("--bridging", "economy", "--wrap", "x"), {"bridging": "economy", "wrap": [False, True]}),
        (("--guidance", "1.5", "--dtype", "bfloat16"), {"guidance_scale": 1.5, "dtype": "bfloat16"}),
    ],
)
def test_settings_that_follow_from_others_are_noted_too(options, noted):
    generate("--size", "128x128", *options)
    with Image.open("instantas.png") as picture:
        settings = json.loads(picture.text["settings"])
    assert {name: settings[name] for name in noted} == noted


def test_one_seed_gives_identical_bytes_and_another_batch_the_same_picture():
    generate("--size", "300x200", "--seed", "1", "-o", "a.png")
    generate("--size", "300x200", "--seed", "1", "-o", "b.png")
    generate("--size", "300x200", "--seed", "1", "-o", "c.png", "--window-batch", "1")
    generate("--size", "300x200", "--seed", "2", "-o", "d.png")
    a, b, c, d = (Path(f"{name}.png").read_bytes() for name in "abcd")
    assert a == b and a != d
    a, c, d = (pixels(f"{name}.png") for name in "acd")
    assert abs(a - c).max() <= 1  # another batch size rounds differently in the last bit
    assert abs(a - d).max() > 10


@pytest.mark.parametrize("size", ["64X64", "64*64", "64×64", " 64 x 64 "])
def test_a_size_may_be_written_in_other_ways(size, capsys):
    main(["plan", "--size", size])
    assert "64x64 px" in capsys.readouterr().out


@pytest.mark.parametrize("size", ["1x1", "7x900", "1000x33"])
def test_any_size(size):
    generate("--size", size, "-o", "a.png")
    with Image.open("a.png") as picture:
        assert "x".join(map(str, picture.size)) == size


def test_a_seed_that_was_not_given_is_told(capsys):
    generate("--size", "8x8", "-o", "a.png")
    seed = capsys.readouterr().out.split("seed ")[1].strip()
    generate("--size", "8x8", "-o", "b.png", "--seed", seed)
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()


def test_a_file_is_replaced_only_by_force(refused):
    with open("a.png", "w") as file:
        file.write("mine")
    assert "exists" in refused("generate", "grass", "--size", "8x8", "-o", "a.png")
    assert Path("a.png").read_text() == "mine"
    generate("--size", "8x8", "-o", "a.png", "--force")
    assert pixels("a.png").shape == (8, 8, 3)


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
        (["--size", "8x8", "-o", "a.gif"], ".png"),
        (["--size", "8x8", "--model", "no/such/folder"], "no/such/folder"),
        (["--size", "8x8", "-o", "a" * 250 + ".png"], "file that can be written"),
        (["--size", "8y8"], "WIDTHxHEIGHT"),
        (["--size", "8xx8"], "WIDTHxHEIGHT"),
        ([], "--size"),
    ],
)
def test_wrong_options_are_refused_in_one_line(refused, arguments, told):
    assert told in refused("generate", "grass", *arguments)
    assert os.listdir() == []


def test_a_model_is_loaded_from_what_was_given(monkeypatch, refused):
    def load(model, **settings):
        raise ValueError(f"model: got {model}")

    monkeypatch.setattr(InstantASPipeline, "from_pretrained", load)
    for model in ("my.safetensors", "some/model", "./folder"):
        assert f"model: got {model}" in refused("generate", "a cat", "--size", "8x8", "--model", model)


def test_an_incomplete_model_folder_is_named(refused):
    os.mkdir("model")
    assert "model" in refused("generate", "grass", "--size", "8x8", "--model", "./model")


def test_plan(capsys):
    main(["plan", "--size", "2048x512", "--plot", "plan.png"])
    out = capsys.readouterr().out
    assert "4 of 64 x 64" in out and "1250 with 25 windows" in out and "6.25" in out
    with Image.open("plan.png") as picture:
        assert picture.width > 100


def test_plan_refuses_a_file_that_cannot_be_made(refused):
    assert "missing" in refused("plan", "--size", "8x8", "--plot", "missing/a.png")
    assert "plot: expected a picture ending" in refused("plan", "--size", "8x8", "--plot", "a.txt")


def test_info_names_every_backend_and_why_one_is_absent(capsys):
    main(["info"])
    out = capsys.readouterr().out
    for name in ("reference", "cpp", "triton", "cuda", "torch", "diffusers"):
        assert name in out


def test_without_arguments_the_help_is_printed(capsys):
    main([])
    out = capsys.readouterr().out
    assert out.startswith("Usage: instantas") and "generate" in out and "plan" in out


@pytest.mark.parametrize("command", [[], ["info"], ["generate", "lava", "--size", "8x8"]])
@pytest.mark.parametrize("missing", ["click", "PIL"])
def test_without_the_extra_it_is_said_what_to_install(command, missing):
    run = (
        f"import sys; sys.modules[{missing!r}] = None; sys.argv[1:] = {command!r}; from instantas.__main__ import main"
    )
    done = subprocess.run([sys.executable, "-c", f"{run}; main()"], capture_output=True, text=True, cwd=ROOT)
    if missing == "click" or command[:1] == ["generate"]:
        assert done.returncode == 2 and missing in done.stderr
        assert len(done.stderr.splitlines()) == 1 and "pip install 'instantas[diffusers]'" in done.stderr
    else:
        assert done.returncode == 0


# Words: what the embedded model has never seen is said


def test_words_that_the_embedded_model_has_never_seen_are_named(capsys):
    generate("--size", "8x8", "--negative", "dogs", prompt="A fluffy cat, on GREEN grass")
    line = capsys.readouterr().err.splitlines()[0]
    assert line.startswith(
        "instantas: the embedded model has never seen 'fluffy', 'cat', 'dogs'; it paints brick, grass,"
    )
    assert os.path.exists("instantas.png")


@pytest.mark.parametrize("prompt", ["a cat", "small red cat", "photo", "Zugspitze"])
def test_a_prompt_of_which_it_knows_nothing_is_refused(refused, prompt):
    line = refused("generate", prompt, "--size", "8x8")
    assert repr(prompt) in line and "it paints brick, grass" in line and "info --prompts" in line
    assert repr(prompt) in refused("generate", "lava", "--size", "8x8", "--region", prompt + "@0,0,1,1")
    assert os.listdir() == []


def test_prompts_of_known_words_and_none_at_all_are_painted_without_a_word(capsys):
    for prompt in (
        *demo.PROMPTS,
        *demo.SCENE_PROMPTS,
        "sea at dusk",
        "green field at noon",
        "Sea, next to a snow field",
        "",
    ):
        assert demo.unknown_words(prompt) == []
        assert not prompt or demo.paintable(prompt)
    generate("--size", "8x8", prompt="")
    assert "never seen" not in capsys.readouterr().err


def test_the_prompts_are_listed(capsys):
    main(["info", "--prompts"])
    out = capsys.readouterr().out
    assert all(
        name in out
        for name in (
            *demo.MATERIALS,
            *demo.SUBJECTS,
            *demo.PROMPTS,
            *demo.SCENE_PROMPTS,
            "meadow",
            "sailboat",
            "in winter",
        )
    )


def test_unknown_command(refused):
    assert "magic" in refused("magic")


# Regions: given as text or as a file, drawn beforehand, recorded in the picture

SIZE = ("--size", "256x128")
RIGHT = "lava@0.5,0,1,1"


def pixels(name):
    with Image.open(name) as picture:
        return np.asarray(picture).astype(int)


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
    mask = str(Path("half.png").resolve())
    plain = dict(
        negative_prompt=None, weight=1.0, start=0.0, end=1.0, feather=0, guidance_scale=None, box=None, mask=None
    )
    assert [plain | region for region in recorded["regions"]] == recorded["regions"]  # every argument is there
    assert recorded["regions"] == [
        dict(recorded["regions"][0], prompt="lava", box=[0.5, 0, 1, 1]),
        dict(recorded["regions"][1], prompt="night sky", box=[0, 0, 64, 64]),
        dict(recorded["regions"][2], prompt="snow", mask=mask, feather=8, guidance_scale=4),
    ]
    assert recorded["files"] == {mask: hashlib.sha256(Path("half.png").read_bytes()).hexdigest()}
    for given, name, value in (
        (settings, "region_mode", "joint"),
        (settings, "base_weight", 0.25),
        (settings, "semantic_schedule", "cosine"),
    ):
        assert given[name] == recorded[name] == value


def test_a_region_may_cross_a_border_that_wraps():
    generate(*SIZE, "--wrap", "x", "--region", "lava@0.8,0,1.2,1")
    assert pixels("instantas.png").shape == (128, 256, 3)


def test_preview_is_drawn_before_the_picture_is_painted(monkeypatch, refused):
    def fail(*arguments, **settings):
        raise ValueError("prompt: stopped")

    monkeypatch.setattr(InstantASPipeline, "__call__", fail)
    refused("generate", "snow", *SIZE, "--device", "cpu", "--region", RIGHT, "--preview", "layout.png")
    with Image.open("layout.png") as picture:
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 20


@pytest.mark.parametrize(
    "options, words",
    [
        (("--region", "lava"), "region 1, 'lava': region: expected \"prompt@left,top,right,bottom\""),
        (("--region", RIGHT, "--region", "snow@"), "region 2, 'snow@': region: expected \"prompt@left,"),
        (("--region", "@0,0,1,1"), "region 1, '@0,0,1,1': region: expected \"prompt@left,"),
        (("--region", "lava@0,0,half,1"), "region 1, 'lava@0,0,half,1': region: expected \"prompt@left,"),
        (("--region", "lava@0,0,1"), "region 1, 'lava@0,0,1': box: expected"),
        (("--region", "lava@0.5,0,0.2,1"), "region 1, 'lava@0.5,0,0.2,1': box: expected left < right"),
        (("--region", "lava@0,0,300,100"), "box: expected 0 to 256 pixels"),
        (("--region", "lava@nowhere.png"), "mask: expected a picture file"),
        (("--regions", "nowhere.json"), "regions: expected a JSON file"),
        (("--region", RIGHT, "--base-weight", "-1"), "base_weight: expected 0 to 1e+30, got -1"),
        (("--region-mode", "add"), "'add' is not one of"),
        (("--preview", "layout.txt", "--region", RIGHT), "preview: expected a picture ending such as .png"),
        (("--preview", "layout"), "preview: expected a picture ending such as .png"),
        (("--preview", "nowhere/layout.png"), "preview: expected an existing folder"),
        (("-o", "nowhere/a.png"), "output: expected an existing folder"),
        (("--guidance", "nan"), "guidance: expected a finite number, got nan"),
        (("--guidance-interval", "0", "nan"), "guidance_interval: expected 0 to 1, got nan"),
        (("--start", "coarse", "--method", "multidiffusion"), "start: expected none with --image or --method"),
        (("--start", "coarse", "--coarse-sigma", "0"), "coarse_sigma: expected more than 0, got 0"),
        (("--start", "none", "--coarse-sigma", "1.2"), "coarse_sigma: expected none without a coarse start, got 1.2"),
        (("--device", "meta"), "expected a device that computes, got 'meta'"),
        (("--device", "x" * 500), "expected a device that this machine has, got 'xxx"),
        (("--preview", "instantas.png"), "preview: expected a file of its own, got 'instantas.png'"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(refused, options, words):
    assert words in refused("generate", "snow", *SIZE, "--steps", "1", "--device", "cpu", *options)


def test_an_existing_preview_is_kept(refused):
    with open("layout.png", "w") as file:
        file.write("mine")
    options = (*SIZE, "--device", "cpu", "--preview", "layout.png")
    assert "layout.png" in refused("generate", "snow", *options)
    assert Path("layout.png").read_text() == "mine"


@pytest.mark.parametrize("name", ["generate", "upscale"])
def test_torchrun_leaves_options_to_the_command(name):
    """All but --start, which it takes for the beginning of its own --start-method; behind -- that one too."""
    refused = set()
    for option in (opt for parameter in app.commands[name].params for opt in parameter.opts if opt.startswith("-")):
        words = [name, "lava", option, "1"]
        assert parse_args(["--nproc_per_node", "2", "-m", "--", "instantas", *words]).training_script_args == words
        try:
            assert parse_args(["--nproc_per_node", "2", "-m", "instantas", *words]).training_script_args == words
        except SystemExit:
            refused.add(option)
    assert refused <= {"--start"}

"""What a size costs is known beforehand; what memory runs out of is kept."""

import json
import os
import shlex
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import save_file

from instantas import demo
from instantas.cli import cost, main, record
from instantas.cli.errors import message
from instantas.cli.record import read_latents
from instantas.pipelines.pipeline import InstantASPipeline
from instantas.windows import WindowPlan


def generate(*arguments, prompt="red brick wall"):
    main(["generate", prompt, "--steps", "2", "--device", "cpu", *arguments])


@pytest.mark.parametrize("wrap", [(False, False), (False, True), (True, True)])
@pytest.mark.parametrize("height", [1, 15, 16, 17, 33, 40, 64])
def test_windows_are_counted_as_plans_count_them(height, wrap):
    for width in (1, 16, 20, 31, 32, 47):
        for window in ((16, 16), (8, 24)):
            plan = WindowPlan.minimum_coverage(height, width, window, wrap=wrap)
            assert cost.window_count((height, width), window, wrap) == plan.count == plan.lower_bound
            for stride in ((1, 1), (2, 3), (8, 8), (5, 7)):
                plan = WindowPlan.strided(height, width, window, stride, wrap=wrap)
                assert cost.window_count((height, width), window, wrap, stride) == plan.count


def test_a_plan_of_any_size_needs_only_counts(capsys):
    main(["plan", "--size", "10000000x10000000"])
    out = capsys.readouterr().out
    assert f"windows         {19532**2} of 64 x 64" in out and f"with {156243**2} windows at stride 8" in out
    main(["plan", "--size", "1000000000000x8", "--wrap", "x"])
    out = capsys.readouterr().out
    assert f"windows         {10**12 // 8 // 64} of 1 x 64" in out and f"with {10**12 // 64} windows" in out


def test_a_plan_refuses_to_draw_what_nobody_can_see_and_strides_with_gaps(refused):
    assert "plot: expected at most 10000 windows" in refused("plan", "--size", "9999999x9999999", "--plot", "a.png")
    assert "stride: expected at most the window's 64 cells" in refused("plan", "--size", "9x9", "--stride", "65")
    assert os.listdir() == []


@pytest.mark.parametrize("size", ["1000000000x1000000000", "60000000x60000", "1x999999999999999999"])
def test_what_no_memory_holds_is_refused_before_it_is_begun(refused, size):
    line = refused("generate", "lava", "--size", size)
    assert "size: expected a picture that fits into the" in line and size in line and "needs at least" in line
    assert os.listdir() == []


def test_what_this_machine_does_not_hold_is_refused(refused, monkeypatch):
    for limits, told in (
        ([(2**20, "the machine")], "fits into the 1 MiB of the machine, got 512x512, which needs at least 6.12 MiB"),
        ([(2**22, "this process"), (2**40, "the machine")], "fits into the 4 MiB of this process, got 512x512"),
    ):
        monkeypatch.setattr(cost, "memory_limits", lambda limits=limits: limits)
        assert told in refused("generate", "lava", "--size", "512x512", "--preview", "layout.png")
        assert os.listdir() == []
    monkeypatch.setattr(cost, "memory_limits", list)  # a system that does not say
    generate("--size", "64x64")


def test_predictions_of_overlapping_windows_count():
    pipe = InstantASPipeline.from_pretrained(demo.folder())
    ours = cost.Memory.of(pipe, 1024, 1024, (False, False), "instantas")
    theirs = cost.Memory.of(pipe, 1024, 1024, (False, False), "multidiffusion")
    assert ours.canvas == 2 * 128 * 128 * 4 * 4  # the latents, and as many predictions
    assert theirs.canvas == (128 * 128 + 57 * 57 * 16 * 16) * 4 * 4
    assert ours.picture == theirs.picture == 1024 * 1024 * 3 * 4 * 2


def test_what_a_run_needs_is_said_before_it_starts(capsys, monkeypatch):
    def stop(*arguments, **settings):
        raise ValueError("stopped")

    monkeypatch.setattr(InstantASPipeline, "__call__", stop)
    for options, told in (
        (
            ("--size", "256x256"),
            "windows: 4, evaluations: 8 in 2 steps, memory: at least 32 KiB for the canvas and 1.5 MiB",
        ),
        (("--size", "256x128", "--bridging", "none", "--scheduler", "heun"), "windows: 2, evaluations: 6 in 3 steps"),
        (("--size", "256x128", "--method", "multidiffusion"), "windows: 9, evaluations: 18 in 2 steps"),
        (
            ("--size", "128x128", "--method", "multidiffusion", "--region", "lava@0,0,1,0.5"),
            "windows: 1, evaluations: 4",
        ),
        (("--size", "4000x4000", "--bridging", "none"), "windows: 1024, evaluations: 2048 in 2 steps"),
    ):
        with pytest.raises(SystemExit):
            generate(*options)
        assert told in capsys.readouterr().out


# Latents are kept until the picture is there


NO_MEMORY = (
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    MemoryError("Unable to allocate 3 GiB"),
)


DECODE, SAVE = (InstantASPipeline, "decode"), (Image.Image, "save")


@pytest.mark.parametrize(
    "place, error",
    [
        *((DECODE, error) for error in (*NO_MEMORY, KeyboardInterrupt())),
        (SAVE, NO_MEMORY[2]),
        (SAVE, OSError(28, "No space left on device")),
    ],
)
def test_latents_outlive_what_could_not_become_a_picture(refused, monkeypatch, place, error):
    generate("--size", "200x136", "--seed", "3", "-o", "whole.png", "--wrap", "y")
    assert os.listdir() == ["whole.png"]

    def fail(*arguments, **settings):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(*place, fail)
        line = refused("generate", "red brick wall", "--steps", "2", "--device", "cpu", "--size", "200x136",
                       "--seed", "3", "-o", "a.png", "--wrap", "y")  # fmt: skip
        assert line.endswith("go on with: instantas generate --resume a.latents.safetensors -o a.png")
        assert (error in NO_MEMORY) == line.startswith("instantas: out of memory: ")
        assert sorted(os.listdir()) == ["a.latents.safetensors", "whole.png"]
        refused("generate", "--resume", "a.latents.safetensors", "-o", "a.png")
        assert sorted(os.listdir()) == ["a.latents.safetensors", "whole.png"]
    assert "a.latents.safetensors', which exists" in refused("generate", "lava", "--size", "8x8", "-o", "a.png")
    main(["generate", "--resume", "a.latents.safetensors", "-o", "a.png"])
    assert Path("a.png").read_bytes() == Path("whole.png").read_bytes()


def test_memory_that_runs_out_while_painting_is_a_line(refused, monkeypatch):
    def fail(*arguments, **settings):
        raise NO_MEMORY[0]

    monkeypatch.setattr(InstantASPipeline, "__call__", fail)
    assert refused("generate", "lava", "--size", "8x8") == f"instantas: out of memory: {NO_MEMORY[0]}"
    assert os.listdir() == []


# What stops a run leaves the latents of its last finished step


def stopped_at(patch, step, error):
    """From the given step on, counted from 0, the network fails."""
    seen = []

    def fail(self, sample, timestep, *arguments, **settings):
        if float(timestep.max()) not in seen:
            seen.append(float(timestep.max()))
        if len(seen) > step:
            raise error
        return forward(self, sample, timestep, *arguments, **settings)

    forward = UNet2DConditionModel.forward
    patch.setattr(UNet2DConditionModel, "forward", fail)


@pytest.fixture
def stopped(refused, monkeypatch):
    """Runs a command whose network fails from some step on: (the line, the command in it)."""

    def run(step, error, *arguments):
        with monkeypatch.context() as patch:
            stopped_at(patch, step, error)
            line = refused("generate", "lava", "--device", "cpu", "--seed", "3", *arguments)
        assert line.endswith("; to begin again: the same command with --seed 3 --force")
        return line, shlex.split(line.split("to see them: ")[1].split(";")[0])[1:]

    return run


def after_steps(monkeypatch, *arguments):
    """The latents after each step of a run that nothing stops, whose picture is instantas.png."""
    latents, call = [], InstantASPipeline.__call__

    def remember(self, *rest, callback_on_step_end, **settings):
        def after_step(pipe, step, timestep, tensors):
            latents.append(tensors["latents"].clone())
            return {}

        return call(self, *rest, callback_on_step_end=after_step, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(InstantASPipeline, "__call__", remember)
        main(["generate", "lava", "--device", "cpu", "--seed", "3", *arguments])
    return latents


@pytest.mark.parametrize("error", [*NO_MEMORY, KeyboardInterrupt(), OSError(5, "Input/output error")])
def test_what_stops_a_run_leaves_its_last_step(stopped, error):
    line, _ = stopped(1, error, "--size", "64x64", "--steps", "2", "-o", "a.png")
    assert (error in NO_MEMORY) == line.startswith("instantas: out of memory: ")
    assert "the latents after step 1 of 2 are kept, unfinished; to see them: instantas generate --resume" in line
    assert os.listdir() == ["a.latents.safetensors"]


def test_an_unfinished_picture_can_be_seen_and_begun_again(stopped, monkeypatch, capsys):
    arguments = ("--size", "200x136", "--steps", "4", "--wrap", "y")
    wanted = after_steps(monkeypatch, *arguments)[1]
    _, command = stopped(2, KeyboardInterrupt(), *arguments, "-o", "a.png")
    assert torch.equal(read_latents(Path("a.latents.safetensors"))[0], wanted)
    main(command)
    assert "a.png: 200x136, seed 3, not finished: after step 2 of 4" in capsys.readouterr().out
    picture = InstantASPipeline.from_pretrained(demo.folder()).decode(wanted, 136, 200, wrap=(True, False))[0]
    with Image.open("a.png") as seen, Image.open("instantas.png") as whole:
        assert np.array_equal(seen, picture) and not np.array_equal(seen, whole)
        settings = json.loads(seen.text["settings"])
        assert settings.pop("unfinished") == "step 2 of 4"
        assert settings == json.loads(whole.text["settings"]) and seen.text["seed"] == "3"
    main(["generate", "lava", "--device", "cpu", *arguments, "-o", "a.png", "--seed", "3", "--force"])
    assert Path("a.png").read_bytes() == Path("instantas.png").read_bytes()
    assert sorted(os.listdir()) == ["a.png", "instantas.png"]


@pytest.mark.parametrize(
    "options, of",
    [
        (("--scheduler", "euler", "--bridging", "none"), 3),
        (("--scheduler", "heun", "--bridging", "centred"), 5),  # evaluates every step but the last twice
        (("--scheduler", "dpm++", "--region", "snow@0,0,0.5,1"), 3),
        (("--scheduler", "euler-a", "--method", "multidiffusion", "--region", "snow@0,0,0.5,1"), 3),
        (("--dtype", "bfloat16", "--bridging", "shift+moments"), 3),
    ],
)
def test_the_last_step_of_any_run_is_kept(stopped, monkeypatch, capsys, options, of):
    options = ("--size", "160x128", "--steps", "3", *options)
    wanted = after_steps(monkeypatch, *options)
    assert len(wanted) == of
    line, command = stopped(1, KeyboardInterrupt(), *options, "-o", "a.png")
    latents, text = read_latents(Path("a.latents.safetensors"))
    step = int(line.split("after step ")[1].split(f" of {of} ")[0])
    assert torch.equal(latents, wanted[step - 1]) and latents.dtype == wanted[0].dtype
    main(command)
    assert f"not finished: after step {step} of {of}" in capsys.readouterr().out


def test_the_command_in_the_line_can_be_run_as_it_stands(stopped):
    generate("--size", "64x64", "-o", "my lava.png")
    _, command = stopped(1, KeyboardInterrupt(), "--size", "64x64", "--steps", "2", "-o", "my lava.png", "--force")
    assert command == ["generate", "--resume", "my lava.latents.safetensors", "-o", "my lava.png", "--force"]
    main(command)
    with Image.open("my lava.png") as picture:
        assert json.loads(picture.text["settings"])["unfinished"] == "step 1 of 2"


def test_nothing_is_kept_of_a_run_without_a_finished_step_or_with_an_error_of_ours(refused, monkeypatch):
    command = ["generate", "lava", "--size", "64x64", "--steps", "2", "--device", "cpu"]
    with monkeypatch.context() as patch:
        stopped_at(patch, 0, KeyboardInterrupt())
        assert refused(*command) == "instantas: stopped"
    stopped_at(monkeypatch, 1, RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="mat1"):
        main(command)
    assert os.listdir() == []


@pytest.mark.parametrize(
    "failure", [OSError(28, "No space left on device"), SafetensorError("I/O error"), NO_MEMORY[1]]
)
def test_latents_that_cannot_be_kept_do_not_hide_what_happened(refused, monkeypatch, failure):
    def fail(*arguments, **settings):
        raise failure

    monkeypatch.setattr("safetensors.torch.save_file", fail)
    stopped_at(monkeypatch, 1, NO_MEMORY[2])
    line = refused("generate", "lava", "--size", "64x64", "--steps", "2", "--device", "cpu", "--seed", "3")
    assert line.startswith(f"instantas: out of memory: {NO_MEMORY[2]}; the latents could not be kept: ")
    assert str(failure) in line and line.endswith("; to begin again: the same command with --seed 3 --force")
    assert os.listdir() == []


def test_what_filled_the_memory_is_let_go_before_latents_are_written(refused, monkeypatch):
    def fail(self, *arguments, **settings):
        if float(arguments[1].max()) < 500:
            activations = torch.zeros(9)
            held.append(weakref.ref(activations))
            raise NO_MEMORY[2]
        return forward(self, *arguments, **settings)

    held, forward, save = [], UNet2DConditionModel.forward, record._save
    monkeypatch.setattr(UNet2DConditionModel, "forward", fail)
    monkeypatch.setattr(record, "_save", lambda *rest: (held.append(held[0]() is None), save(*rest)))
    refused("generate", "lava", "--size", "64x64", "--steps", "2", "--device", "cpu")
    assert held[-1] is True


def test_other_errors_of_the_library_are_not_hidden():
    assert message(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None
    assert message(AssertionError()) is None


def test_only_kept_latents_can_be_resumed(refused):
    with open("text.safetensors", "w") as file:
        file.write("not latents")
    save_file({"latents": torch.zeros(1, 4, 16, 16)}, "bare.safetensors")
    settings = json.dumps({"model": "demo", "dtype": "float32", "wrap": [False, False]})
    text = {"prompt": "lava", "seed": "1", "size": "256x128", "settings": settings, "Software": "instantas"}
    save_file({"latents": torch.zeros(1, 4, 16, 16)}, "small.safetensors", text)
    for file, told in (
        ("missing.safetensors", "resume: expected latents that a run has kept"),
        ("text.safetensors", "resume: expected latents that a run has kept"),
        ("bare.safetensors", "'bare.safetensors' without prompt"),
        ("small.safetensors", "latents: expected (pictures, C, 16, 32), got (1, 4, 16, 16)"),
    ):
        assert told in refused("generate", "--resume", file)
    assert "resume: expected only" in refused("generate", "lava", "--resume", "small.safetensors")
    assert "got steps" in refused("generate", "--steps", "3", "--resume", "small.safetensors")
    assert "PROMPT" in refused("generate", "--size", "8x8").upper()
    assert np.all([name.endswith(".safetensors") for name in os.listdir()])

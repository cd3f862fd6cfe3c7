"""A command that is stopped leaves a file, from which it goes on to the same picture."""

import errno
import os
import shlex
import signal
import sys
import weakref
from pathlib import Path

import click
import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image

from instantas.cli import main
from instantas.cli.errors import message
from instantas.pipelines.pipeline import InstantASPipeline
from instantas.sampling import checkpoint as sampling
from instantas.sampling.checkpoint import read

NO_MEMORY = (
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    MemoryError("Unable to allocate 3 GiB"),
)
DECODE, SAVE = (InstantASPipeline, "decode"), (Image.Image, "save")


def command(*arguments, prompt="lava"):
    return ["generate", prompt, "--device", "cpu", "--seed", "3", *arguments]


def bytes_of(name):
    return Path(name).read_bytes()


def stopped_at(patch, step, stop):
    """From the given step on, counted from 0, the network stops the run."""
    seen = []

    def fail(self, sample, timestep, *arguments, **settings):
        if float(timestep.max()) not in seen:
            seen.append(float(timestep.max()))
        if len(seen) > step:
            stop()
        return forward(self, sample, timestep, *arguments, **settings)

    forward = UNet2DConditionModel.forward
    patch.setattr(UNet2DConditionModel, "forward", fail)


def raising(error):
    def fail(*arguments, **settings):
        raise error

    return fail


@pytest.fixture
def stopped(refused, monkeypatch):
    """Runs a command that is stopped from some step on: (the line, the command in it)."""

    def run(step, stop, *arguments):
        with monkeypatch.context() as patch:
            stopped_at(patch, step, stop)
            line = refused(*arguments)
        return line, shlex.split(line.split("go on with: ")[1])[1:]

    return run


@pytest.mark.parametrize("error", [*NO_MEMORY, KeyboardInterrupt(), OSError(5, "Input/output error")])
def test_what_stops_a_run_leaves_one_that_goes_on(stopped, capsys, error):
    arguments = "--size", "136x200", "--steps", "3", "--wrap", "y", "--start", "none"
    main(command(*arguments, "-o", "whole.png"))
    line, resume = stopped(2, raising(error), *command(*arguments, "-o", "a.png"))
    assert (error in NO_MEMORY) == line.startswith("instantas: out of memory: ")
    assert "; the run is kept after step 2 of 3, go on with: instantas generate --resume a.checkpoint -o a.png" in line
    assert sorted(os.listdir()) == ["a.checkpoint", "whole.png"]
    main(resume)
    assert "a.png: 136x200, seed 3" in capsys.readouterr().out
    assert bytes_of("a.png") == bytes_of("whole.png") and sorted(os.listdir()) == ["a.png", "whole.png"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_signals_that_end_a_process_leave_one_that_goes_on(stopped, number):
    main(command("--size", "64x64", "--steps", "2", "-o", "whole.png"))
    before = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
    signal.signal(number, before)  # nohup and the like have it ignored
    line, resume = stopped(
        1, lambda: os.kill(os.getpid(), number), *command("--size", "64x64", "--steps", "2", "-o", "a.png")
    )
    assert (
        line.startswith("instantas: stopped; the run is kept after step 1 of 2") and signal.getsignal(number) is before
    )
    main(resume)
    assert bytes_of("a.png") == bytes_of("whole.png")


@pytest.mark.parametrize(
    "options, of",
    [
        (("--scheduler", "euler", "--bridging", "none"), 3),
        (("--scheduler", "heun", "--bridging", "centred"), 5),  # evaluates every step but the last twice
        (("--scheduler", "dpm++", "--region", "snow@0,0,0.5,1"), 3),
        (("--scheduler", "euler-a", "--method", "multidiffusion", "--region", "snow@0,0,0.5,1"), 3),
        (("--dtype", "bfloat16", "--bridging", "shift+moments"), 3),
        (("--image", "photo.png", "--strength", "0.9", "--checkpoint", "1"), 2),
    ],
)
def test_every_kind_of_run_goes_on(stopped, options, of):
    Image.new("RGB", (50, 40), "red").save("photo.png")
    arguments = "--size", "160x128", "--steps", "3", *options
    main(command(*arguments, "-o", "whole.png"))
    line, resume = stopped(1, raising(KeyboardInterrupt()), *command(*arguments, "-o", "my lava.png"))
    assert f" of {of}, go on with: instantas generate --resume 'my lava.checkpoint' -o 'my lava.png'" in line
    main(resume)
    assert bytes_of("my lava.png") == bytes_of("whole.png") and not Path("my lava.checkpoint").exists()


def test_a_coarse_start_that_is_stopped_on_its_smaller_canvas_goes_on(stopped, capsys):
    """In the midst of it, and where the first step on the larger one is one too many; never more than is left."""
    arguments = command("--size", "160x136", "--steps", "5", "--start", "coarse", "--scheduler", "euler-a")
    main([*arguments, "-o", "whole.png"])
    steps = int(capsys.readouterr().out.split(" steps, 2 of them on 19x16 cells")[0].split()[-1])
    _, resume = stopped(1, raising(KeyboardInterrupt()), *arguments, "-o", "a.png")
    saved = read("a.checkpoint")
    assert (saved["done"], saved["steps"], saved["canvas"].shape) == (1, steps, (1, 4, 16, 19))
    line, again = stopped(1, raising(NO_MEMORY[0]), *resume)
    assert (
        f"out of memory: CUDA out of memory. Tried to allocate 2 GiB; the run is kept after step 2 of {steps}" in line
    )
    assert read("a.checkpoint")["canvas"].shape == (1, 4, 16, 19) and again == resume
    main(again)
    assert bytes_of("a.png") == bytes_of("whole.png") and sorted(os.listdir()) == ["a.png", "whole.png"]


@pytest.mark.parametrize("level", [(), ("--coarse-sigma", "1.2")])
def test_a_coarse_start_goes_on_also_from_a_level_that_was_not_measured(stopped, level):
    arguments = "--size", "144x136", "--steps", "4", "--start", "coarse", *level
    main(command(*arguments, "-o", "whole.png"))
    line, resume = stopped(2, raising(KeyboardInterrupt()), *command(*arguments, "-o", "a.png"))
    assert "the run is kept after step 3 of 5" in line
    main(resume)
    assert bytes_of("a.png") == bytes_of("whole.png")


def test_a_run_can_be_stopped_more_than_once_and_go_on_elsewhere(stopped):
    arguments = "--size", "160x128", "--steps", "4"
    main(command(*arguments, "-o", "whole.png"))
    _, resume = stopped(1, raising(KeyboardInterrupt()), *command(*arguments, "-o", "a.png"))
    line, resume = stopped(1, raising(NO_MEMORY[0]), *resume, "--checkpoint", "1")
    assert "the run is kept after step 2 of 4" in line
    os.mkdir("elsewhere")
    os.rename("a.checkpoint", "elsewhere/b.checkpoint")
    main(["generate", "--resume", "elsewhere/b.checkpoint", "-o", "b.png", "--window-batch", "4"])
    assert bytes_of("b.png") == bytes_of("whole.png") and os.listdir("elsewhere") == []


def test_it_is_kept_on_the_way_where_that_is_asked_for(monkeypatch):
    written, replace = [], os.replace
    monkeypatch.setattr(os, "replace", lambda part, path: (written.append(Path(path).name), replace(part, path)))
    main(command("--size", "64x64", "--steps", "4", "--checkpoint", "2"))
    assert written == ["instantas.checkpoint"] * 2 + ["instantas.png"]
    written.clear()
    main(command("--size", "64x64", "--steps", "4", "--force"))
    assert written == ["instantas.checkpoint", "instantas.png"] and os.listdir() == ["instantas.png"]


@pytest.mark.parametrize(
    "place, error",
    [
        *((DECODE, error) for error in (NO_MEMORY[0], KeyboardInterrupt())),
        (SAVE, OSError(28, "No space left on device")),
    ],
)
def test_what_could_not_become_a_picture_is_decoded_later(refused, monkeypatch, place, error):
    arguments = command("--size", "200x136", "--steps", "2", "--wrap", "y")
    main([*arguments, "-o", "whole.png"])
    with monkeypatch.context() as patch:
        patch.setattr(*place, raising(error))
        line = refused(*arguments, "-o", "a.png")
        assert line.endswith("the run is kept after step 2 of 2, go on with: instantas generate --resume a.checkpoint "
                             "-o a.png")  # fmt: skip
        refused("generate", "--resume", "a.checkpoint", "-o", "a.png")
        assert sorted(os.listdir()) == ["a.checkpoint", "whole.png"]
    assert "output: expected no 'a.checkpoint', the file of a run that was stopped" in refused(
        "generate", "lava", "--size", "8x8", "-o", "a.png"
    )
    stopped_at(monkeypatch, 0, raising(AssertionError("the network was evaluated")))
    main(["generate", "--resume", "a.checkpoint", "-o", "a.png"])
    assert bytes_of("a.png") == bytes_of("whole.png") and sorted(os.listdir()) == ["a.png", "whole.png"]


def test_latents_of_a_run_that_is_done_may_be_decoded_in_another_precision(refused, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(*DECODE, raising(NO_MEMORY[0]))
        refused(*command("--size", "64x64", "--steps", "2", "-o", "a.png"))
    main(["generate", "--resume", "a.checkpoint", "-o", "a.png", "--dtype", "bfloat16"])
    assert os.listdir() == ["a.png"]


def test_enlargements_go_on_too(stopped, refused, monkeypatch):
    Image.new("RGB", (40, 32), "red").save("small.png")
    arguments = ["upscale", "small.png", "--prompt", "lava", "--steps", "4", "--strength", "0.5", "--seed", "3"]
    arguments += ["--device", "cpu"]
    for scale, stage, files in (
        ("4", " of stage 2", ["a.1.checkpoint", "a.2.checkpoint"]),
        ("2", "", ["a.checkpoint"]),
    ):
        main([*arguments, "--scale", scale, "-o", "whole.png", "--force"])
        timesteps = 1 if scale == "2" else 3
        evaluated = []

        def stop(evaluated=evaluated, timesteps=timesteps):
            evaluated.append(1)
            if len(evaluated) > timesteps:
                raise KeyboardInterrupt

        line, resume = stopped(0, stop, *arguments, "--scale", scale, "-o", "a.png")
        assert f"the run is kept after step 1 of 2{stage}, go on with: instantas upscale --resume {files[-1]}" in line
        assert sorted(os.listdir()) == sorted([*files, "small.png", "whole.png"])
        assert f"{files[-1]}', the file of a run that was stopped: go on with --resume {files[-1]}" in refused(
            *arguments, "--scale", scale, "-o", "a.png"
        )
        main(resume)
        assert bytes_of("a.png") == bytes_of("whole.png")
        assert sorted(os.listdir()) == ["a.png", "small.png", "whole.png"]
        os.remove("a.png")


def test_a_stages_file_by_another_name_is_refused_and_does_not_begin_anew(stopped, refused):
    Image.new("RGB", (20, 16), "red").save("small.png")
    arguments = ["upscale", "small.png", "--scale", "4", "--prompt", "lava", "--steps", "4", "--strength", "0.5"]
    stopped(1, raising(KeyboardInterrupt()), *arguments, "-o", "a.png")
    os.rename("a.1.checkpoint", "mine.checkpoint")
    line = refused("upscale", "--resume", "mine.checkpoint", "-o", "a.png")
    assert "resume: expected a stage's file by its name, 'mine.1.checkpoint' or 'mine.2.checkpoint', got" in line
    os.rename("mine.checkpoint", "mine.1.checkpoint")
    main(["upscale", "--resume", "mine.1.checkpoint", "-o", "a.png"])
    assert sorted(os.listdir()) == ["a.png", "small.png"]


def test_a_picture_is_done_with_where_nobody_listens(monkeypatch):
    """Of `instantas generate ... | head -1`: the last line finds no reader."""

    def echo(line="", **settings):
        if "seed 3" in line:
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr(sys, "stdout", sys.stdout)  # click puts others in their place
    monkeypatch.setattr(sys, "stderr", sys.stderr)
    monkeypatch.setattr(click, "echo", echo)
    with pytest.raises(SystemExit) as ended:
        main(command("--size", "64x64", "--steps", "2", "-o", "a.png"))
    assert ended.value.code == 1 and os.listdir() == ["a.png"]


def test_nothing_is_kept_of_a_run_without_a_finished_step(refused, monkeypatch):
    stopped_at(monkeypatch, 0, raising(KeyboardInterrupt()))
    assert refused(*command("--size", "64x64", "--steps", "2")) == "instantas: stopped"
    assert os.listdir() == []
    monkeypatch.setattr(InstantASPipeline, "__call__", raising(NO_MEMORY[0]))
    assert refused(*command("--size", "8x8")) == f"instantas: out of memory: {NO_MEMORY[0]}"
    assert os.listdir() == []


def test_an_error_of_ours_is_not_hidden_and_the_run_is_kept(monkeypatch):
    arguments = command("--size", "64x64", "--steps", "2")
    with monkeypatch.context() as patch:
        stopped_at(patch, 1, raising(RuntimeError("mat1 and mat2 shapes cannot be multiplied")))
        with pytest.raises(RuntimeError, match="mat1"):
            main(arguments)
    assert read("instantas.checkpoint")["done"] == 1
    assert message(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None
    assert message(AssertionError()) is None


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), NO_MEMORY[1]])
def test_a_run_that_cannot_be_kept_does_not_hide_what_happened(refused, monkeypatch, failure):
    monkeypatch.setattr(torch, "save", raising(failure))
    stopped_at(monkeypatch, 1, raising(NO_MEMORY[2]))
    with pytest.warns(UserWarning, match="checkpoint: the run could not be kept: "):
        line = refused(*command("--size", "64x64", "--steps", "2"))
    assert line == f"instantas: out of memory: {NO_MEMORY[2]}" and os.listdir() == []


def test_what_filled_the_memory_is_let_go_before_the_run_is_kept(refused, monkeypatch):
    held, write = [], sampling.Recorder._write

    def fail():
        activations = torch.zeros(9)
        held.append(weakref.ref(activations))
        raise NO_MEMORY[2]

    stopped_at(monkeypatch, 1, fail)
    monkeypatch.setattr(sampling.Recorder, "_write", lambda self: (held.append(held[0]() is None), write(self)))
    refused(*command("--size", "64x64", "--steps", "2"))
    assert held[-1] is True


def test_only_a_run_of_the_command_goes_on(refused, stopped):
    Path("text.checkpoint").write_text("not a run")
    for file in ("missing.checkpoint", "text.checkpoint"):
        assert "checkpoint: expected one that a run has kept" in refused("generate", "--resume", file)
    Image.new("RGB", (50, 40), "red").save("photo.png")
    arguments = command("--size", "64x64", "--steps", "2", "--image", "photo.png", "--strength", "1", "-o", "a.png")
    stopped(1, raising(KeyboardInterrupt()), *arguments)
    assert "resume: expected only" in refused("generate", "snow", "--resume", "a.checkpoint")
    assert "got steps" in refused("generate", "--steps", "3", "--resume", "a.checkpoint")
    assert "resume: expected a picture of `instantas upscale`, got one without picture" in refused(
        "upscale", "--resume", "a.checkpoint"
    )
    line = refused("generate", "--resume", "a.checkpoint", "--dtype", "bfloat16")
    assert "resume: expected only" in line and line.endswith("got dtype") and "go on with" not in line
    Image.new("RGB", (50, 40), "blue").save("photo.png")
    line = refused("generate", "--resume", "a.checkpoint")
    assert "resume: expected what the picture was painted from" in line and line.endswith("which has changed")
    assert sorted(os.listdir()) == ["a.checkpoint", "photo.png", "text.checkpoint"]
    assert "PROMPT" in refused("generate", "--size", "8x8").upper() and "PICTURE" in refused("upscale").upper()


@pytest.mark.parametrize(
    "options",
    [
        ("--guidance", "nan"),
        ("--guidance-interval", "0.5", "0.2"),
        ("--region", "snow@0,0,1,1", "--base-weight", "-1"),  # refused by the pipeline's call
        ("--model", "a.checkpoint"),
        ("--lora", "a.checkpoint"),
        ("--regions", "a.checkpoint"),
    ],
)
def test_force_takes_no_file_for_a_run_that_is_refused(refused, options):
    Path("a.checkpoint").write_text("[]")
    line = refused(*command("--size", "8x8", "--steps", "1", "-o", "a.png", "--force", *options))
    assert ("output: expected a file of its own, got 'a.checkpoint'" in line) == ("a.checkpoint" in options)
    assert os.listdir() == ["a.checkpoint"] and Path("a.checkpoint").read_text() == "[]"


def test_force_takes_the_file_of_another_run_once_there_is_more_to_keep(stopped, refused, monkeypatch):
    arguments = command("--size", "64x64", "--steps", "2", "-o", "a.png")
    stopped(1, raising(KeyboardInterrupt()), *arguments)
    before = bytes_of("a.checkpoint")
    again = [*arguments, "--force", "--guidance", "2"]
    with monkeypatch.context() as patch:
        stopped_at(patch, 0, raising(KeyboardInterrupt()))
        refused(*again)
    assert os.listdir() == ["a.checkpoint"] and bytes_of("a.checkpoint") == before
    stopped(1, raising(KeyboardInterrupt()), *again)
    assert os.listdir() == ["a.checkpoint"] and bytes_of("a.checkpoint") != before
    assert "expected only output, force, model, device, window_batch, checkpoint beside it, got dtype" in refused(
        "generate", "--resume", "a.checkpoint", "--dtype", "bfloat16", "-o", "a.png"
    )
    main(arguments + ["--force"])
    assert os.listdir() == ["a.png"]
    line = refused("generate", "--resume", "a.png", "-o", "b.png")
    assert line == "instantas: checkpoint: expected one that a run has kept, got 'a.png', another file"

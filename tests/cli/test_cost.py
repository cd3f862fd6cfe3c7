"""What a size costs is known beforehand."""

import contextlib
import os

import pytest
import torch

from instantas import demo
from instantas.cli import cost, main
from instantas.pipelines.pipeline import InstantASPipeline
from instantas.testing.tiny import tiny_pipeline
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


def test_the_middle_of_an_autoencoder_counts(monkeypatch):
    pipe = InstantASPipeline.from_pipe(tiny_pipeline())
    memory = cost.Memory.of(pipe, 128, 256, (False, False), "instantas")
    assert memory.middle == 7 * 8 * 16 * 32 * 4  # activations of 8 channels in float32
    assert (
        str(memory)
        == "at least 16 KiB for the canvas, 112 KiB for the autoencoder's middle and 768 KiB for the picture"
    )
    cpu, large = torch.device("cpu"), cost.Memory(canvas=2, middle=9, decoded=1, picture=3)
    for there in (9, 8):
        monkeypatch.setattr(cost, "memory_limits", lambda there=there: [(there, "the machine")])
        with pytest.raises(ValueError, match="needs at least 9 B$") if there < 9 else contextlib.nullcontext():
            large.check(cpu, "8x8")


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
        (
            ("--size", "256x256", "--steps", "25"),
            "windows: 4, evaluations: 62 in 23 steps, 10 of them on 16x16 cells, then from sigma 1.5, memory",
        ),
        (("--size", "256x256", "--steps", "25", "--start", "none"), "windows: 4, evaluations: 100 in 25 steps"),
        (("--size", "256x256", "--steps", "25", "--scheduler", "pndm"), "windows: 4, evaluations: 136 in 34 steps"),
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

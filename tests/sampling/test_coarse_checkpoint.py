"""Starts on a smaller canvas that are stopped: they go on from the canvas at hand, to the same bits."""

import pytest
import torch

from instantas.sampling import coarse
from instantas.sampling.checkpoint import Checkpoint, read
from instantas.sampling.coarse import CoarseStart
from instantas.sampling.sampler import sample
from instantas.sampling.spectrum import carry
from instantas.windows import WindowPlan
from tests.sampling.runs import noise, of

STEPS = 10
LARGE = WindowPlan.minimum_coverage(32, 32, 8)  # after canvases of 8 and 16 cells


class Killed(BaseException):
    pass


START = CoarseStart(scale=2.0)


def kept(path=None, stop=None, start=START, kind="EulerAncestralDiscrete", generators=1, seed=7, **settings):
    """(latents, states of the generators, [(canvas, step) of every call]) of a run that is stopped at one of these."""
    seeds, seen = [torch.Generator().manual_seed(seed) for seed in (0, 1)], []

    def denoiser(windows, t, context):
        seen.append((context.size[0], context.step))
        if seen[-1] == stop:
            raise Killed
        return 0.3 * torch.tanh(windows), 0.1 * windows

    given = dict(num_inference_steps=STEPS, bridging="shift", guidance_scale=2.0, window_batch_size=64)
    given["generator"] = (None, seeds[0], seeds)[generators]
    torch.manual_seed(seed)
    latents = noise(LARGE, pictures=2)
    found = sample(denoiser, latents, LARGE, of(kind), start=start, checkpoint=path, **(given | settings))
    return found, torch.stack([seed.get_state() for seed in seeds]), seen


@pytest.mark.parametrize("kind", ["EulerAncestralDiscrete", "DPMSolverMultistep", "HeunDiscrete", "SASolver"])
def test_a_run_that_is_stopped_on_any_canvas_goes_on_to_the_same_bits(tmp_path, kind):
    """From the step after the last that was done, ancestral noise and re-used predictions included."""
    whole, drawn, seen = kept(kind=kind)
    assert {size for size, _ in seen} == {8, 16, 32}
    for number, stop in enumerate(seen[1:], 1):
        path = Checkpoint(tmp_path / f"{number}", (1, None)[number % 2])
        with pytest.raises(Killed):
            kept(path, stop, kind=kind)
        saved = read(path.path)
        assert (saved["done"], saved["steps"]) == (number, len(seen))
        assert saved["canvas"].shape[2] == seen[number - 1][0]
        found, state, again = kept(path, kind=kind)
        assert torch.equal(found, whole) and torch.equal(state, drawn) and again == seen[number:]
    assert torch.equal(kept(path, (32, 0), kind=kind)[0], whole)  # of a run that is done


@pytest.mark.parametrize("settings", [dict(generators=2), dict(generators=0), dict(guidance_rescale=0.7)], ids=str)
def test_every_stop_in_a_row_changes_nothing(tmp_path, settings):
    """A run that does one step in each of its lives."""
    whole, drawn, seen = kept(**settings)
    for life, stop in enumerate(seen[1:]):
        with pytest.raises(Killed):
            kept(tmp_path / "run", stop, seed=7 + life, **settings)
    found, state, _ = kept(tmp_path / "run", **settings)
    assert torch.equal(found, whole) and torch.equal(state, drawn)


def test_a_run_that_ends_between_two_canvases_goes_on(tmp_path, monkeypatch):
    """Memory runs out where the larger canvas is made; nothing had to be written on the way."""
    whole, *_, seen = kept()
    path, enlarge, calls = Checkpoint(tmp_path / "run", None), coarse.with_detail, []

    def fail(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise torch.OutOfMemoryError
        return enlarge(*arguments)

    with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
        patch.setattr(coarse, "with_detail", fail)
        kept(path)
    found, _, again = kept(path)
    assert torch.equal(found, whole) and {size for size, _ in again} == {32} == {size for size, _ in seen} - {8, 16}


def test_a_callback_that_ends_the_run_on_a_smaller_canvas_leaves_one_that_goes_on(tmp_path):
    def ending(step, t, latents):
        steps.append(step)
        if step == 1:
            raise StopIteration(latents * 2)

    steps = []
    ended = kept(tmp_path / "run", callback=ending)[0]
    saved = read(tmp_path / "run")["canvas"]
    torch.testing.assert_close(ended, carry(saved, (32, 32), LARGE.wrap) * 4)
    doubled, _, seen = kept(callback=lambda step, t, latents: latents * 2 if step == 1 else None)
    assert torch.equal(kept(tmp_path / "run", callback=ending)[0], doubled) and steps == list(range(len(seen)))


@pytest.mark.parametrize(
    "other, named",
    [
        (dict(start=CoarseStart(scale=5.0)), "start"),
        (dict(start=CoarseStart(scale=2.0, sigma=0.2)), "plan, another timesteps"),
        (dict(start=CoarseStart(scale=2.0, steps=0.5)), "start"),
        (dict(start=None), "plan, another timesteps, another start"),
        (dict(kind="EulerDiscrete"), "scheduler, another start"),
        (dict(guidance_scale=3.0), "guidance_scale"),
    ],
    ids=str,
)
@pytest.mark.parametrize("stop", [(8, 1), (16, 1), (32, 1)])
def test_a_file_of_another_start_is_refused_on_every_canvas(tmp_path, stop, other, named):
    with pytest.raises(Killed):
        kept(tmp_path / "run", stop)
    before = (tmp_path / "run").read_bytes()
    with pytest.raises(ValueError, match=f"checkpoint: expected one of this run, got .* of one with another {named}$"):
        kept(tmp_path / "run", (8, 0), **other)
    assert (tmp_path / "run").read_bytes() == before


def test_a_start_that_says_the_same_in_other_words_goes_on(tmp_path):
    """As `--resume` does, of a file that says from which level the run goes on."""
    with pytest.raises(Killed):
        kept(tmp_path / "run", (16, 1))
    said = CoarseStart(sigma=coarse.SIGMA, steps=0.42, scale=3.0)
    assert torch.equal(kept(tmp_path / "run", start=said)[0], kept()[0])

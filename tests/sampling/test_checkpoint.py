"""A run that was stopped goes on from its file to the same bits, whatever stopped it and whenever."""

import os
import subprocess
import sys
from pathlib import Path

import diffusers
import pytest
import torch

import instantas
from instantas.sampling import checkpoint as module
from instantas.sampling.bridging import Shift
from instantas.sampling.checkpoint import Checkpoint, read
from instantas.sampling.sampler import sample
from instantas.testing.tiny import scheduler
from instantas.windows import WindowPlan

PLAN = WindowPlan.minimum_coverage(20, 50, 16)  # 2 x 4 windows that overlap
STEPS = 5
SCHEDULERS = (  # a recurrence, one with history, two evaluations a step; noise, a history of its own, clean latents
    "DDIM",
    "DPMSolverMultistep",
    "HeunDiscrete",
    "EulerAncestralDiscrete",
    "SASolver",
    "LCM",
)


class StoppedError(Exception):
    pass


def of(name, **config):
    return scheduler(kind=getattr(diffusers, name + "Scheduler"), **config)


def run(path=None, stop=None, *, name="DDIM", config=(), generators=False, every=1, where=PLAN, **settings):
    """(latents, state of the generators) of a run whose denoiser, or callback, fails at a step."""
    seeds = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    generator = seeds if generators else seeds[0]

    def denoiser(windows, timestep, context):
        if context.step == stop:
            raise StoppedError
        share = timestep / 1000
        return torch.tanh(windows) * (1 - share), torch.sin(windows) * share + 0.1

    latents = torch.randn(2, 4, where.height, where.width, generator=seeds[0])
    given = dict(
        num_inference_steps=STEPS,
        guidance_scale=3.0,
        generator=generator,
        bridging="shift",
        checkpoint=path and Checkpoint(path, every),
    )
    found = sample(denoiser, latents, where, of(name, **dict(config)), **(given | settings))
    return found, torch.stack([seed.get_state() for seed in seeds])


def same(one, other):
    return all(map(torch.equal, one, other))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run.checkpoint"


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_stopped_run_goes_on_to_the_same_bits(path, name):
    whole = run(name=name)
    for stop, every in ((1, 1), (3, 2), (4, None)):
        with pytest.raises(StoppedError):
            run(path, stop, name=name, every=every)
        assert read(path)["done"] == stop
        assert same(run(path, name=name, every=every), whole)
        assert read(path)["done"] == read(path)["steps"]
        if stop < 4:
            path.unlink()
    assert same(run(path, 0, name=name), whole)  # of a run that is done


@pytest.mark.parametrize(
    "settings",
    [
        dict(name="DDIM", eta=1.0),
        dict(name="DPMSolverMultistep", config=dict(thresholding=True)),
        dict(name="DPMSolverMultistep", config=dict(algorithm_type="sde-dpmsolver++"), generators=True),
        dict(name="DDPM", generator=None),
        dict(name="EulerAncestralDiscrete", bridging="economy", guidance_rescale=0.7),
        dict(bridging="shift+moments"),
        dict(bridging="dilated"),
        dict(bridging=None, weight=PLAN.weight("gaussian")),
        dict(name="LCM", num_inference_steps=None, timesteps=[900, 500, 300, 200, 10]),
        dict(name="PNDM", begin=2, evaluations=3),
        dict(where=WindowPlan.minimum_coverage(20, 48, 16, wrap=(False, True))),
        dict(callback=lambda step, timestep, latents: latents + step),
    ],
    ids=", ".join,
)
def test_every_kind_of_run_can_be_stopped(path, settings):
    torch.manual_seed(7)
    whole, drawn = run(**settings), torch.get_rng_state()
    torch.manual_seed(7)
    with pytest.raises(StoppedError):
        run(path, 2, **settings)
    torch.manual_seed(8 if settings.get("generator", 0) is None else 7)
    assert same(run(path, **settings), whole) and torch.equal(torch.get_rng_state(), drawn)


def test_gradients_inference_mode_and_half_precision_are_no_hindrance(path):
    for mode in (torch.enable_grad, torch.inference_mode, torch.no_grad):
        with mode():
            whole = run()
            with pytest.raises(StoppedError):
                run(path, 2)
            assert same(run(path), whole)
            path.unlink()
    given = torch.randn(1, 4, 20, 50).bfloat16().requires_grad_()
    settings = dict(num_inference_steps=3, guidance_scale=2.0)

    def halved(windows, timestep, context):
        return windows / 2

    with torch.enable_grad():
        wanted = sample(halved, given, PLAN, of("DDIM"), **settings)
        found = sample(halved, given, PLAN, of("DDIM"), checkpoint=path, **settings)
        assert torch.equal(found, wanted) and read(path)["canvas"].dtype == torch.bfloat16


# When it is written


def test_it_is_written_when_it_is_its_turn_when_the_run_ends_and_when_it_is_stopped(path, monkeypatch):
    written, replaced = [], os.replace
    monkeypatch.setattr(os, "replace", lambda *names: (replaced(*names), written.append(read(path)["done"])))
    for every, turns in ((1, [1, 2, 3, 4, 5]), (2, [2, 4, 5]), (5, [5]), (None, [5])):
        run(path, every=every)
        assert written == turns
        path.unlink()
        written.clear()
    with pytest.raises(StoppedError):
        run(path, 0)
    assert not written and not path.exists()  # nothing to go on from
    with pytest.raises(StoppedError):
        run(path, 3, every=2)
    assert written == [2, 3]
    with pytest.raises(StoppedError):
        run(path, 3)
    assert written == [2, 3]  # nothing new


def test_a_callback_that_ends_the_run_leaves_one_that_goes_on(path):
    def ending(step, timestep, latents):
        if step == 2:
            raise StopIteration(latents * 2)

    ended = run(path, callback=ending)[0]
    assert torch.equal(ended, run(callback=ending)[0]) and torch.equal(ended, read(path)["canvas"])
    doubled = run(callback=lambda step, timestep, latents: latents * 2 if step == 2 else None)
    assert same(run(path), doubled)


def test_what_a_callback_keeps_is_kept(path):
    class Counting:
        def __init__(self):
            self.sum = torch.zeros(())

        def __call__(self, step, timestep, latents):
            self.sum = self.sum + latents.mean()
            return latents + self.sum

        def state_dict(self):
            return dict(sum=self.sum)

        def load_state_dict(self, state):
            self.sum = state["sum"]

    whole = run(callback=Counting())
    with pytest.raises(StoppedError):
        run(path, 3, callback=Counting())
    assert same(run(path, callback=Counting()), whole)


class Adding:
    """Changes what it keeps in place, and gives it away as it is."""

    def __init__(self, end=None):
        self.kept, self.end = {"sum": torch.zeros(()), "steps": [[]]}, end

    def __call__(self, step, timestep, latents):
        self.kept["sum"].add_(latents.mean())
        self.kept["steps"][0].append(step)
        if step == self.end:
            raise StoppedError
        return latents + self.kept["sum"]

    def state_dict(self):
        return self.kept

    def load_state_dict(self, state):
        self.kept = state


@pytest.mark.parametrize("every", [None, 1])
def test_a_callback_that_fails_halfway_has_kept_nothing_of_that_step(path, every):
    whole, callback = run(callback=Adding()), Adding()
    with pytest.raises(StoppedError):
        run(path, callback=Adding(end=3), every=every)
    assert read(path)["done"] == 3
    assert same(run(path, callback=callback), whole) and callback.kept["steps"] == [[0, 1, 2, 3, 4]]


@pytest.mark.parametrize("name", ["PNDM", "UniPCMultistep", "DPMSolverMultistep"])
def test_a_step_whose_callback_fails_has_left_nothing_in_what_is_kept(path, name):
    """The scheduler has taken it already, and may have written over what it looks back on, as PNDM does."""

    def failing(at):
        def callback(step, timestep, latents):
            if step == at:
                raise StoppedError

        return callback

    whole = run(name=name)
    for at in (1, 3):
        with pytest.raises(StoppedError):
            run(path, name=name, every=None, callback=failing(at))
        assert read(path)["done"] == at
        assert same(run(path, name=name, callback=failing(None)), whole)
        path.unlink()


def test_a_callback_that_has_kept_something_is_needed_to_go_on(path):
    with pytest.raises(StoppedError):
        run(path, 3, callback=Adding())
    for other, got in ((None, "NoneType"), (lambda step, timestep, latents: None, "function")):
        with pytest.raises(ValueError, match=f"callback: expected one with load_state_dict, .* got {got}"):
            run(path, callback=other)


def test_a_file_says_what_it_is_of(path):
    run(checkpoint=Checkpoint(path, None, {"prompt": "lava"}))
    saved = read(path)
    assert saved["note"] == {"prompt": "lava"} and (saved["done"], saved["steps"]) == (5, 5)
    assert torch.equal(saved["canvas"], run()[0])
    assert Checkpoint(path).stage(2).path == path.with_name("run.2.checkpoint")


def test_a_view_does_not_bring_all_that_it_is_a_part_of(path):
    def partly(step, timestep, latents):
        return torch.cat([latents] * 100)[:2]

    run(path, callback=partly)
    size = path.stat().st_size
    path.unlink()
    run(path)
    assert size == path.stat().st_size


# What is refused


OTHER = torch.randn(2, 4, 20, 50, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "settings, named",
    [
        (dict(num_inference_steps=6), "plan, another scheduler, another timesteps"),
        (dict(guidance_scale=2.0), "guidance_scale"),
        (dict(guidance_rescale=0.1), "guidance_rescale"),
        (dict(generators=True), "generator"),
        (dict(bridging=Shift(share=0.5)), "plan, another bridging"),
        (dict(weight=PLAN.weight("cosine")), "plan"),
        (dict(name="EulerDiscrete"), "scheduler, another timesteps"),
        (dict(config=dict(prediction_type="v_prediction")), "scheduler"),
    ],
    ids=str,
)
def test_another_runs_file_is_refused_by_name(path, settings, named):
    run(path)
    before = path.read_bytes()
    with pytest.raises(ValueError) as error:
        run(path, 0, **settings)
    assert f"checkpoint: expected one of this run, got {str(path)!r} of one with another {named}" in str(error.value)
    assert path.read_bytes() == before


def never(windows, timestep, context):
    raise AssertionError("the denoiser was called")


def test_another_denoiser_is_known_by_its_fingerprint(path):
    class Denoiser:
        def __init__(self, prompt):
            self.prompt = prompt

        def fingerprint(self):
            return dict(prompt=self.prompt)

        def __call__(self, windows, timestep, context):
            return windows * 0.1

    settings = dict(num_inference_steps=2, checkpoint=path)
    sample(Denoiser("lava"), OTHER, PLAN, of("DDIM"), **settings)
    sample(Denoiser("lava"), OTHER, PLAN, of("DDIM"), **settings)
    with pytest.raises(ValueError, match="of one with another prompt$"):
        sample(Denoiser("snow"), OTHER, PLAN, of("DDIM"), **settings)
    with pytest.raises(ValueError, match="of one with another latents$"):
        sample(Denoiser("lava"), OTHER + 1, PLAN, of("DDIM"), **settings)


def test_what_is_no_checkpoint_is_refused_before_the_denoiser_is_called(path, monkeypatch, tmp_path):
    for content, told in ((b"not one", ""), (b"", ""), (None, "another file")):
        if content is None:
            torch.save({"a": 1}, path)
        else:
            path.write_bytes(content)
        with pytest.raises(ValueError, match=f"checkpoint: expected one that a run has kept, got .*{told}"):
            run(path, 0)
    torch.save({"code": Path}, path)  # nothing but tensors, numbers and texts is ever made of a file
    with pytest.raises(ValueError, match="checkpoint: expected one that a run has kept"):
        run(path, 0)
    path.unlink()
    run(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="checkpoint: expected one that a run has kept"):
        run(path, 0)
    path.write_bytes(whole)
    monkeypatch.setattr(module, "__version__", "9.9.9")
    with pytest.raises(ValueError, match=r"checkpoint: expected one of instantas 9\.9\.9, got one of 0"):
        run(path, 0)
    for given, error, told in (
        (tmp_path / "missing" / "a", ValueError, "checkpoint: expected an existing folder"),
        (tmp_path, ValueError, "checkpoint: expected a file, got the folder"),
        (7, TypeError, "checkpoint: expected a path, got int"),
    ):
        with pytest.raises(error, match=told):
            sample(never, OTHER, PLAN, of("DDIM"), num_inference_steps=2, checkpoint=given)
    for every in (0, -1, 1.5, True):
        with pytest.raises((TypeError, ValueError), match="every: expected a positive integer or None"):
            Checkpoint(path, every)


def test_a_scheduler_that_keeps_more_than_numbers_is_refused_before_the_denoiser_is_called(path):
    class Drawing(diffusers.EulerAncestralDiscreteScheduler):
        source = None

        def step(self, *arguments, **settings):
            self.source = object()
            return super().step(*arguments, **settings)

    told = "checkpoint: expected a scheduler that keeps tensors and numbers, got Drawing with source, a object"
    with pytest.raises(TypeError, match=told):
        sample(never, OTHER, PLAN, Drawing(), num_inference_steps=2, checkpoint=path)
    sample(lambda windows, *rest: windows / 2, OTHER, PLAN, Drawing(), num_inference_steps=2)


# Killed at any moment


def test_a_run_that_is_killed_at_fifty_moments_gives_the_same_bits(tmp_path):
    """In a process of its own, which forks one for each life of a run; `killed.py` says how."""
    script, root = Path(__file__).with_name("killed.py"), Path(instantas.__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, script, tmp_path], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    killed, told = done.stdout.split(maxsplit=1)
    assert int(killed) >= 50 and told == "kills, the same bits\n"

"""Runs on the host's tensors are the same whatever torch's default device is: meta stands for a GPU."""

import diffusers
import pytest
import torch

from instantas.sampling.hosted import Windowed, keep_eps, step_of
from instantas.sampling.known import Known
from instantas.sampling.sampler import sample
from instantas.testing.tiny import scheduler
from instantas.windows import WindowPlan

META, PLAN = torch.device("meta"), WindowPlan.minimum_coverage(20, 30, 16)


def painted():
    left = torch.zeros(1, 1, 20, 30, dtype=torch.bool)
    left[..., :8] = True
    return Known(torch.ones(1, 4, 20, 30), torch.zeros(1, 4, 20, 30), left)


@pytest.mark.parametrize(
    "settings",
    [
        dict(),
        dict(bridging="economy"),
        dict(bridging="dilated", name="EulerAncestralDiscrete"),
        dict(begin=1, known=painted(), name="DPMSolverMultistep"),
    ],
    ids=", ".join,
)
def test_a_run(settings, tmp_path):
    settings = dict(settings)
    kind = getattr(diffusers, settings.pop("name", "DDIM") + "Scheduler")

    def run(where, path):
        generator, kept = torch.Generator().manual_seed(2), scheduler(kind=kind)
        latents = torch.randn(1, 4, 20, 30, generator=generator)
        with where:
            return sample(
                lambda windows, timestep, context: (windows.tanh(), windows.sin()),
                latents,
                PLAN,
                kept,
                num_inference_steps=4,
                guidance_scale=3.0,
                generator=generator,
                checkpoint=path,
                **settings,
            )

    assert run(META, tmp_path / "one").equal(run(torch.device("cpu"), tmp_path / "other"))


@pytest.mark.parametrize("bridging", [None, "dilated"])
def test_a_loop_of_its_own(bridging):
    x, sigmas = torch.linspace(-1, 1, 2400).reshape(1, 4, 20, 30), torch.linspace(9.0, 0.0, 6)

    def run(where):
        levels = list(sigmas[:-1])
        with where:
            host = Windowed(16, bridging=bridging)
            return [
                host(lambda w, place: w.sin(), x, step_of(sigmas, float(s)), 5, carry=keep_eps, mark=s) for s in levels
            ]

    assert all(map(torch.equal, run(META), run(torch.device("cpu"))))

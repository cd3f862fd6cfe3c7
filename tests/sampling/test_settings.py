"""What `sample` refuses, before the denoiser is called."""

import re

import pytest
import torch

from instantas.sampling.sampler import sample
from instantas.testing.tiny import WINDOW
from tests.sampling.runs import NATIVE, WIDE, noise, of, plain_loop, pointwise, seeded


def used(name="DPMSolverMultistep", steps=3):
    schedule = of(name)
    plain_loop(pointwise, noise(NATIVE), schedule, steps=steps)
    return schedule


def holed():
    weight = torch.ones(WIDE.count, WINDOW, WINDOW)
    weight[0] = 0
    return weight


LATENTS = noise(WIDE)
REFUSED = [
    (TypeError, "denoiser: expected a function, got int", dict(denoiser=1)),
    (TypeError, "latents: expected a tensor of floats, got list", dict(latents=[1.0])),
    (TypeError, "latents: expected a tensor of floats, got torch.int64", dict(latents=LATENTS.long())),
    (ValueError, "latents: expected (B, C, 20, 50), got (4, 20, 50)", dict(latents=LATENTS[0])),
    (ValueError, "latents: expected (B, C, 20, 50), got (1, 4, 20, 49)", dict(latents=LATENTS[..., 1:])),
    (TypeError, "plan: expected a WindowPlan, got str", dict(plan="minimum")),
    (TypeError, "scheduler: expected a diffusers scheduler, got str", dict(scheduler="DDIM")),
    (ValueError, "num_inference_steps: expected a positive integer, got 0", dict(num_inference_steps=0)),
    (ValueError, "num_inference_steps: expected a positive integer, got -1", dict(num_inference_steps=-1)),
    (TypeError, "num_inference_steps: expected a positive integer, got 2.5", dict(num_inference_steps=2.5)),
    (TypeError, "num_inference_steps: expected a positive integer, got True", dict(num_inference_steps=True)),
    (ValueError, "num_inference_steps: expected a number, as the scheduler has no", dict(num_inference_steps=None)),
    (
        ValueError,
        "num_inference_steps: expected a number, as the scheduler has taken steps",
        dict(num_inference_steps=None, scheduler=used()),
    ),
    (
        ValueError,
        "num_inference_steps: expected a number, as the scheduler has taken steps",
        dict(num_inference_steps=None, scheduler=used("PNDM")),
    ),
    (
        ValueError,
        "num_inference_steps: expected a number that PNDMScheduler takes, got 3: ",
        dict(scheduler=of("PNDM", skip_prk_steps=False)),
    ),
    (
        ValueError,
        "num_inference_steps: expected a number that DDIMScheduler takes, got 1001: ",
        dict(num_inference_steps=1001),
    ),
    (
        ValueError,
        "scheduler: expected one that takes what the model predicts, got EulerAncestralDiscreteScheduler: ",
        dict(scheduler=of("EulerAncestralDiscrete", "sample")),
    ),
    (ValueError, "timesteps: expected either timesteps or num_inference_steps, got both", dict(timesteps=[3, 2])),
    (
        ValueError,
        "timesteps: expected None, as UniPCMultistepScheduler takes none",
        dict(timesteps=[9, 2], num_inference_steps=None, scheduler=of("UniPCMultistep")),
    ),
    (
        ValueError,
        "timesteps: expected at least one, got none",
        dict(timesteps=[], num_inference_steps=None, scheduler=of("DPMSolverMultistep")),
    ),
    (ValueError, "guidance_scale: expected a finite number, got nan", dict(guidance_scale=float("nan"))),
    (TypeError, "guidance_scale: expected a number, got 'high'", dict(guidance_scale="high")),
    (
        ValueError,
        "guidance_scale: expected a float or (height, width) = (20, 50), got (50, 20)",
        dict(guidance_scale=torch.ones(50, 20)),
    ),
    (ValueError, "guidance_rescale: expected 0 to 1, got 1.5", dict(guidance_rescale=1.5)),
    (TypeError, "guidance_rescale: expected a number from 0 to 1, got None", dict(guidance_rescale=None)),
    (ValueError, "eta: expected 0 to 1, got nan", dict(eta=float("nan"))),
    (TypeError, "generator: expected a torch.Generator or a list of them, got int", dict(generator=3)),
    (TypeError, "generator: expected a torch.Generator or a list of them, got str", dict(generator=["a"])),
    (ValueError, "generator: expected one for each of 1 pictures, got 2", dict(generator=[seeded(), seeded()])),
    (ValueError, "weight: expected (h, w) or (n, h, w) = (16, 16), got (16, 15)", dict(weight=torch.ones(16, 15))),
    (ValueError, "weight: expected values >= 0", dict(weight=-torch.ones(16, 16))),
    (ValueError, "weight: expected values >= 0", dict(weight=torch.full((16, 16), float("nan")))),
    (ValueError, "weight: expected some weight over every cell", dict(weight=holed())),
    (TypeError, "weight: expected torch.float32 or torch.float64, got", dict(weight=torch.ones(16, 16).half())),
    (ValueError, "window_batch_size: expected a positive integer or None, got 0", dict(window_batch_size=0)),
    (TypeError, "window_batch_size: expected a positive integer or None, got 1.0", dict(window_batch_size=1.0)),
    (ValueError, "bridging: expected one of", dict(bridging="glue")),
    (TypeError, "bridging: expected a name or a bridge, got int", dict(bridging=3)),
]  # fmt: skip


@pytest.mark.parametrize("error, message, wrong", REFUSED, ids=lambda value: value if isinstance(value, str) else "")
def test_what_is_wrong_is_said_before_any_evaluation(error, message, wrong):
    def denoise(*args):
        pytest.fail("the denoiser was called")

    call = dict(denoiser=denoise, latents=LATENTS, plan=WIDE, scheduler=of("DDIM"), num_inference_steps=3) | wrong
    with pytest.raises(error, match="^" + re.escape(message)):
        sample(call.pop("denoiser"), call.pop("latents"), call.pop("plan"), call.pop("scheduler"), **call)


class Marked(torch.Tensor):
    """A tensor of a kind of its own that computes as any."""


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -1.0])
def test_a_weight_of_a_kind_of_its_own_is_looked_at_too(value):
    weight = torch.ones(WINDOW, WINDOW)
    right = sample(pointwise, noise(WIDE), WIDE, of("DDIM"), num_inference_steps=2, weight=weight)
    marked = sample(pointwise, noise(WIDE), WIDE, of("DDIM"), num_inference_steps=2, weight=weight.as_subclass(Marked))
    assert torch.equal(right, marked.as_subclass(torch.Tensor))
    weight[2, 3] = value
    with pytest.raises(ValueError, match="weight: expected values >= 0"):
        sample(pytest.fail, noise(WIDE), WIDE, of("DDIM"), num_inference_steps=2, weight=weight.as_subclass(Marked))

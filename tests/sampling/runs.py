"""What the tests of the loop and of its bridges share: plans, noise, schedulers, and a loop without windows."""

import diffusers
import numpy as np
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

from instantas.sampling.schedulers import step_keywords
from instantas.testing.tiny import WINDOW, scheduler
from instantas.windows import WindowPlan

NATIVE = WindowPlan.minimum_coverage(WINDOW, WINDOW)
WIDE = WindowPlan.minimum_coverage(20, 50, WINDOW)  # 2 x 4 windows that overlap
SCALE = 3.0


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def noise(plan, pictures=1, seed=0, dtype=torch.float32):
    return torch.randn(pictures, 4, plan.height, plan.width, generator=seeded(seed), dtype=dtype)


def plan_of(height, width, window=8, **keywords):
    return WindowPlan.minimum_coverage(height, width, window, **keywords)


def random_plans(count):
    rng = np.random.default_rng(3)
    while count:
        window = tuple(rng.integers(1, 21, 2).tolist())
        height, width = rng.integers(1, 75, 2).tolist()
        plan = plan_of(height, width, window, wrap=tuple(map(bool, rng.integers(0, 2, 2))))
        if plan.count > 1:
            count -= 1
            yield plan, int(rng.integers(1, 14))


def of(name, prediction_type="epsilon", **config):
    if name == "PNDM":
        config = dict(skip_prk_steps=True) | config  # as Stable Diffusion has it
    return scheduler(prediction_type, kind=getattr(diffusers, name + "Scheduler"), **config)


def pointwise(windows, timestep, context=None):
    """Predictions that depend on their own cell alone, so that the windows cannot matter."""
    share = timestep / 1000
    return torch.tanh(windows) * (1 - share), torch.sin(windows) * share + 0.1


def plain_loop(denoise, latents, schedule, *, guidance=SCALE, steps=6, seed=7, eta=0.0, rescale=0.0):
    """What one would write without windows: `scheduler.step` on the whole canvas."""
    schedule.set_timesteps(steps)
    keywords = step_keywords(schedule, seeded(seed), eta)
    x = latents * schedule.init_noise_sigma
    for t in schedule.timesteps:
        cond, uncond = denoise(schedule.scale_model_input(x, t), t)
        guided = uncond + guidance * (cond - uncond)
        if rescale:
            guided = rescale_noise_cfg(guided, cond, rescale)
        x = schedule.step(guided, t, x, return_dict=False, **keywords)[0]
    return x

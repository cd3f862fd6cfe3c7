"""From which noise level coarse starts go on with a pipeline's model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from instantas.checks import integer, positive
from instantas.pipelines.arguments import check_pipeline
from instantas.pipelines.pipeline import InstantASPipeline
from instantas.sampling.calibration import Calibration, measure
from instantas.sampling.settings import set_timesteps

PROMPTS = ("red brick wall", "turquoise ocean", "grass next to gravel", "sunset clouds")
"""What is painted to measure on, where nothing else is asked for: much detail and little, one subject and two."""


def calibrate(
    pipe: InstantASPipeline,
    prompts: Sequence[str] = PROMPTS,
    *,
    pictures: int = 2,
    seed: int = 0,
    scale: float = 2.0,
    num_inference_steps: int | None = None,
    **settings: Any,
) -> Calibration:
    """Measure how much of the detail above a smaller canvas's frequencies the model makes out at each noise level.

    Native pictures are painted as ever. Then the network is evaluated once more at each of the scheduler's timesteps,
    with the prompt alone, on these pictures with fresh noise (`instantas.sampling.calibration`). The result's `sigma()`
    is where `start="coarse"` goes on if the model's `instantas.json` has it as "coarse_sigma"; of a pipeline
    at hand `pipe.defaults["coarse_sigma"] = calibrate(pipe).sigma()`.

    Args:
        pipe: for text to image.
        prompts: what is painted, in words that the model knows.
        pictures: of each prompt.
        seed: of the pictures and of the noise on them.
        scale: how many times as long as a smaller canvas's side a side is, more than 1.
        num_inference_steps: levels; by default the model's own number, else diffusers'.
        settings: of the pipeline's call, such as `guidance_scale` of the pictures, `negative_prompt`,
            `window_batch_size`.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came, before the UNet is evaluated.
    """
    check_pipeline(pipe.pipe, whole=True)
    prompts = [prompts] if isinstance(prompts, str) else prompts
    if not isinstance(prompts, (list, tuple)) or not prompts:
        raise ValueError(f"prompts: expected a list of at least one, got {prompts!r:.80}")
    if not -(2**63) <= integer("seed", seed) < 2**64:
        raise ValueError(f"seed: expected -2^63 to 2^64 - 1, got {seed}")
    generator = torch.Generator("cpu").manual_seed(seed)
    steps = pipe.defaults["num_inference_steps"] if num_inference_steps is None else num_inference_steps
    set_timesteps(pipe.scheduler, steps, None, pipe.pipe._execution_device)
    settings |= dict(num_inference_steps=steps, num_images_per_prompt=positive("pictures", pictures))
    settings |= dict(generator=generator, output_type="latent", return_dict=True)

    def paint(latents, bridging=None, callback=None):
        def step_end(_, step, timestep, tensors):
            return {"latents": callback(step, timestep, tensors["latents"])}

        watched = dict(bridging=bridging, callback_on_step_end=step_end, guidance_scale=1.0)
        return pipe(list(prompts), latents=latents, **settings | (watched if callback else {})).images

    shape = len(prompts) * pictures, pipe.unet.config.out_channels, *pipe.window
    noise = torch.randn(shape, generator=generator)
    return measure(paint, noise, pipe.scheduler, scale=scale, generator=generator)

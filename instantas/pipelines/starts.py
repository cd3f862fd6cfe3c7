"""Where a run begins that goes on from a picture (img2img, SDEdit): its first timestep, and its noised latents."""

from __future__ import annotations

import math
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor

from instantas.checks import real
from instantas.pipelines import codec
from instantas.pipelines.control import prepared


def first_timestep(scheduler: Any, strength: float) -> int:
    """Number of the timestep at which the last `strength` of a scheduler's steps begins, as in diffusers.

    Raises:
        TypeError, ValueError: for a strength outside of 0 to 1, and for one that leaves no step.
    """
    order, steps = getattr(scheduler, "order", 1), scheduler.num_inference_steps or len(scheduler.timesteps)
    taken = min(int(steps * real("strength", strength, 0, 1)), steps)
    if not taken:
        raise ValueError(f"strength: expected at least {1 / steps:.2g}, one of {steps} steps, got {strength}")
    return (steps - taken) * order


def stages(size: tuple[int, int], scale: float) -> list[tuple[int, int]]:
    """Sizes, of (height, width) pixels, through which a picture becomes `scale` times as large: each at most twice the
    one before.

    Raises:
        TypeError, ValueError: for a scale that is not above 1.
    """
    if real("scale", scale, 1) == 1:
        raise ValueError(f"scale: expected more than 1, got {scale}")
    count = math.ceil(math.log2(scale) - 1e-9)
    return [(round(size[0] * scale ** (i / count)), round(size[1] * scale ** (i / count))) for i in range(1, count + 1)]


def noised(
    pipe: Any,
    image: Any,
    begin: int,
    size: tuple[int, int],
    canvas: tuple[int, int],
    *,
    pictures: int,
    copies: int,
    wrap: tuple[bool, bool],
    generator: torch.Generator | list[torch.Generator] | None,
) -> torch.Tensor:
    """(pictures, C, H, W): the latents of the pictures with the noise of a timestep of the pipeline's scheduler.

    What is drawn comes in the order of diffusers: the autoencoder's latents, then the noise.

    Args:
        image: a picture (PIL, numpy (height, width, 3) or tensor (3, height, width)), a list of them or a batch, one
            for all prompts or one for each; of another size than `size` they are resized (Lanczos).
        begin: number of the timestep.
        size, canvas: (height, width) in pixels of the picture, and of the whole cells that hold it.
        pictures, copies: how many are painted, and of each prompt.

    Raises:
        TypeError, ValueError: naming the argument of the pipeline's call, what was expected and what came.
    """
    device, scheduler = pipe._execution_device, pipe.scheduler
    given = prepared(pipe, pipe.image_processor, image, 3, pipe.vae.dtype, size, canvas, pictures // copies)
    each = pictures // len(given)
    if isinstance(generator, list):  # each picture draws its own
        given, each = given.repeat_interleave(each, dim=0), 1
    latents = codec.encode(pipe.vae, given, wrap=wrap, generator=generator).repeat_interleave(each, dim=0)
    latents = latents.to(device, pipe.unet.dtype)
    noise = randn_tensor(latents.shape, generator=generator, device=device, dtype=latents.dtype)
    timestep = scheduler.timesteps[begin : begin + 1].to(device).repeat(pictures)
    return scheduler.add_noise(latents, noise, timestep)

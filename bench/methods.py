"""Ways to paint a canvas larger than the network's window, as their users have them, all on one diffusers model.

`METHODS` has, by name, a function (model, size, prompts, steps) -> latents. One prompt is for the whole picture; of
several each has an upright stripe. Where a method has no regions it takes one prompt.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
import torch

from instantas.pipelines.pipeline import InstantASPipeline
from instantas.regions import Region
from instantas.sampling.sampler import sample
from instantas.windows import WindowPlan

GUIDANCE = 7.5
BATCH = 4  # windows in one call of the network, for all
OVERLAP = 8  # cells, of evenly spread tiles


@dataclass
class Model:
    """A diffusers StableDiffusionPipeline, and the prompts embedded beforehand."""

    pipe: object
    embeds: torch.Tensor  # (1, L, D)
    negative: torch.Tensor

    @property
    def window(self) -> int:
        return self.pipe.unet.config.sample_size

    def noise(self, rows: int, columns: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.randn(1, 4, rows, columns, generator=generator).to(self.pipe.device, self.pipe.unet.dtype)

    def call(self, size, steps, **more):
        """Arguments that diffusers' pipelines and ours have in common."""
        return dict(
            prompt_embeds=self.embeds,
            negative_prompt_embeds=self.negative,
            height=size[0],
            width=size[1],
            latents=self.noise(size[0] // 8, size[1] // 8),
            num_inference_steps=steps,
            guidance_scale=GUIDANCE,
            output_type="latent",
            **more,
        )


def stripes(prompts):
    """Regions of equal width from left to right; none for a single prompt."""
    n = len(prompts)
    return [Region(p, box=(i / n, 0.0, (i + 1) / n, 1.0)) for i, p in enumerate(prompts)] if n > 1 else None


def instantas(model: Model, size, prompts, steps, **options):
    pipe = InstantASPipeline.from_pipe(model.pipe)
    return pipe(**model.call(size, steps, regions=stripes(prompts), window_batch_size=BATCH, **options)).images


def panorama(model: Model, size, prompts, steps):
    """diffusers' StableDiffusionPanoramaPipeline."""
    from diffusers import StableDiffusionPanoramaPipeline

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe = StableDiffusionPanoramaPipeline(**model.pipe.components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe(**model.call(size, steps, view_batch_size=BATCH)).images


def multidiffusion(model: Model, size, prompts, steps, stride=None):
    """MultiDiffusion at a stride of 8 cells; several prompts: its region mode."""
    pipe = InstantASPipeline.from_pipe(model.pipe)
    options = dict(regions=stripes(prompts), method="multidiffusion", stride=stride, window_batch_size=BATCH)
    return pipe(**model.call(size, steps, **options)).images


def cyclic_shift(model: Model, size, prompts, steps):
    """Windows that do not overlap, on a canvas that is rolled by another random distance at each step."""
    sides = [max(model.window, -(-side // 8 // model.window) * model.window) for side in size]
    generator = np.random.default_rng(0)

    def views(step):
        shift = tuple(int(generator.integers(side)) if side > model.window else 0 for side in sides)
        return shift, [(y, x) for y in range(0, sides[0], model.window) for x in range(0, sides[1], model.window)]

    return loop_over_views(model, model.noise(*sides), views, steps)


def spread_tiles(model: Model, size, prompts, steps):
    """Tiles spread evenly, so many that neighbours overlap by 8 cells or more."""
    plan = spread_plan(size[0] // 8, size[1] // 8, model.window)
    return loop_over_views(
        model, model.noise(plan.height, plan.width), lambda step: ((0, 0), plan.origins.tolist()), steps
    )


def spread_plan(rows, columns, window):
    axes = []
    for length in (rows, columns):
        n = 1 if length <= window else -(-(length - OVERLAP) // (window - OVERLAP))
        axes.append(np.round(np.linspace(0, max(0, length - window), n)).astype(int))
    return WindowPlan.grid(rows, columns, (min(window, rows), min(window, columns)), *axes)


def loop_over_views(model: Model, noise, views, steps):
    """Predict each view, average the guided predictions at each cell, and take one scheduler step on the canvas.

    views: function of the step that gives how far the canvas is rolled and the views' origins (y, x).
    """
    pipe, window = model.pipe, model.window
    pipe.scheduler.set_timesteps(steps)
    canvas = noise * pipe.scheduler.init_noise_sigma
    with torch.no_grad():
        for i, t in enumerate(pipe.scheduler.timesteps):
            shift, origins = views(i)
            rolled = canvas.roll(shift, (2, 3))
            total, count = torch.zeros_like(canvas), torch.zeros_like(canvas)
            for start in range(0, len(origins), BATCH):
                some = origins[start : start + BATCH]
                seen = torch.cat([rolled[:, :, y : y + window, x : x + window] for y, x in some])
                text = torch.cat([self.expand(len(some), -1, -1) for self in (model.negative, model.embeds)])
                predicted = pipe.unet(torch.cat([seen, seen]), t, encoder_hidden_states=text).sample
                uncond, cond = predicted.chunk(2)
                for (y, x), part in zip(some, uncond + GUIDANCE * (cond - uncond)):
                    total[:, :, y : y + window, x : x + window] += part
                    count[:, :, y : y + window, x : x + window] += 1
            merged = (total / count).roll([-s for s in shift], (2, 3))
            canvas = pipe.scheduler.step(merged, t, canvas).prev_sample
    return canvas


METHODS = {
    "instantas": instantas,
    "diffusers panorama": panorama,
    "MultiDiffusion": multidiffusion,
    "cyclic shift": cyclic_shift,
    "tiles, overlap 8": spread_tiles,
}
WITH_REGIONS = ("instantas", "MultiDiffusion")


def disagreements(model: Model, size=(512, 1024), steps=3) -> dict[str, float]:
    """Largest relative difference of methods that should give the same latents."""
    rows, columns = size[0] // 8, size[1] // 8
    plan = spread_plan(rows, columns, model.window)
    fewest = WindowPlan.minimum_coverage(rows, columns, model.window)

    def denoise(windows, t, context):
        text = torch.cat([e.expand(len(windows), -1, -1) for e in (model.negative, model.embeds)])
        uncond, cond = model.pipe.unet(torch.cat([windows] * 2), t, encoder_hidden_states=text).sample.chunk(2)
        return cond, uncond

    with torch.no_grad():
        options = dict(num_inference_steps=steps, guidance_scale=GUIDANCE)
        ours = sample(denoise, model.noise(rows, columns), plan, model.pipe.scheduler, **options)
    plain = loop_over_views(model, model.noise(rows, columns), lambda step: ((0, 0), fewest.origins.tolist()), steps)
    pairs = {
        "tiles, overlap 8": (spread_tiles(model, size, [""], steps), ours),
        "loop over views": (plain, instantas(model, size, [""], steps, bridging="none")),
        "MultiDiffusion": (multidiffusion(model, size, [""], steps, stride=8), panorama(model, size, [""], steps)),
    }
    return {name: ((a - b).norm() / b.norm()).item() for name, (a, b) in pairs.items()}

"""What coarse starts are held against, as short as it can be.

Rivals: a native picture as an anchor of every step, and one enlarged. And the same run without borders at rest, which
tells a seam from what is painted there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from instantas.sampling.bridging import PREDICTION, WINDOWS, Joined, Shift, Stage
from instantas.sampling.spectrum import carry
from instantas.windows import WindowPlan

Generators = list[torch.Generator]

STRENGTH = 0.5
"""Of `refined`: the part of the steps that the enlarged picture is painted again for."""


@dataclass(frozen=True)
class Kept:
    """A bridge that changes nothing and keeps the predicted x_0 of every step, (B, C, h, w)."""

    predictions: list[torch.Tensor] = field(default_factory=list)

    def step(self, step: int, steps: int, plan: WindowPlan) -> Stage:
        def adjust(prediction, sample, context):
            self.predictions.append(context.level.clean(prediction, sample))
            return prediction

        return Stage(plan, adjust=adjust)


@dataclass(frozen=True)
class Overlapping:
    """`Shift` whose resting windows overlap by half: the same run, without the borders that its last step leaves.

    Attributes:
        share: as of `Shift`.
    """

    share: float = 1.0

    chooses = WINDOWS

    def step(self, step: int, steps: int, plan: WindowPlan) -> Stage:
        stage = Shift(self.share).step(step, steps, plan)
        if stage.plan is not plan or plan.count == 1:
            return stage
        blended = WindowPlan.strided(plan.height, plan.width, plan.window, (plan.window[0] // 2, plan.window[1] // 2))
        return Stage(blended, blended.weight("linear"))


@dataclass(frozen=True)
class Anchor:
    """A bridge that pulls low frequencies of the predicted x_0 to those of a native run's predictions.

        x_0 <- x_0 + lambda_t U(x_0_native - D(x_0)),    lambda_t = (1 + cos(pi step / steps)) / 2

    D and U keep the frequencies that both canvases have (`spectrum.carry`).
    """

    native: Sequence[torch.Tensor]

    chooses = PREDICTION

    def step(self, step: int, steps: int, plan: WindowPlan) -> Stage:
        pull = (1 + math.cos(math.pi * step / steps)) / 2

        def adjust(prediction, sample, context):
            clean, native = context.level.clean(prediction, sample), self.native[step]
            size, small = clean.shape[-2:], native.shape[-2:]
            louder = math.sqrt(math.prod(size) / math.prod(small))
            apart = louder * native - carry(clean, small, plan.wrap)
            return context.level.prediction(clean + pull * carry(apart, size, plan.wrap), sample)

        return Stage(plan, adjust=adjust)


def anchored(pipe: Any, prompt: str, generators: Generators, height: int, width: int, **settings: Any) -> Any:
    """The pipeline's result for height x width px: every step is held to a native one of the same noise.

    1 + 1/n of minimum coverage's evaluations with n windows.
    """
    shape = 4, height // 8, width // 8
    noise = torch.stack([torch.randn(shape, generator=generator) for generator in generators])
    kept = Kept()
    many = dict(num_images_per_prompt=len(generators), **settings)
    window = pipe.plan(height, width).window
    pipe(prompt, latents=carry(noise, window, (False, False)), bridging=kept, **many)
    bridges = Joined((Shift(), Anchor(kept.predictions)))
    return pipe(prompt, latents=noise, height=height, width=width, bridging=bridges, start="none", **many)


def refined(pipe: Any, prompt: str, generators: Generators, height: int, width: int, **settings: Any) -> Any:
    """The pipeline's result for height x width px: native pictures enlarged, and painted again from STRENGTH on.

    STRENGTH + 1/n of minimum coverage's evaluations with n windows.
    """
    native = pipe(prompt, num_images_per_prompt=len(generators), generator=generators, **settings).images
    larger = dict(image=native, strength=STRENGTH, height=height, width=width)
    return pipe([prompt] * len(native), generator=generators, **larger, **settings)


RIVALS: dict[str, Callable[..., Any]] = {"anchor": anchored, "refined": refined}

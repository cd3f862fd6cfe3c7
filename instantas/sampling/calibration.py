"""From which noise level a coarse start goes on with a model: measured on pictures of its own.

A clean picture x_0 of a native window gets fresh noise of each of a scheduler's levels, as a coarse start gives it, and
the network predicts the clean one from it. With d the detail of x_0, its frequencies above those that a canvas so many
times smaller has,

    share(sigma) = <prediction, d> / <d, d>

is the part of the detail that the network makes out through the noise: 1 without noise, 0 where all of it is still to
be made. Of a Gaussian field of power P and its exact denoiser it is P / (P + sigma^2) at every frequency. What the
network gets wrong has nothing to do with d and drops out, where it would add to the prediction's power. Pictures count
alike, however much detail they have.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from instantas.checks import real
from instantas.sampling.bridging import Stage
from instantas.sampling.coarse import known_levels, noised
from instantas.sampling.spectrum import carry, normal
from instantas.sampling.step import StepContext
from instantas.windows import WindowPlan

SHARE = 0.4
"""At which a coarse start goes on: that of the embedded model at the level that its pictures were best with, sigma 1.5
(docs/structure.md). At 0.5, where noise is as strong as the detail of a Gaussian field, pictures of 3 x 3 windows had
a lattice of the small canvas's cells in them; at a share near 0 a run has hardly begun, and nothing is saved."""


@dataclass(frozen=True)
class Calibration:
    """What `measure` found.

    Attributes:
        shares: (sigma, share) of each level, sigma = noise / signal rising.
    """

    shares: tuple[tuple[float, float], ...]

    def sigma(self, share: float = SHARE) -> float:
        """The lowest level at which less than a share is made out, between two levels by their logarithm.

        What is measured above it does not count: noise there may leave a share of anything.

        Raises:
            ValueError: where that is so of the lowest level of all, or of none.
        """
        (least, largest), (most, smallest) = self.shares[0], self.shares[-1]
        if largest < share:
            raise ValueError(
                f"model: expected a network that makes out {share} of the detail at the lowest level, sigma "
                f"{least:.3f}, got {largest:.3f}"
            )
        for (low, above), (high, below) in zip(self.shares, self.shares[1:]):
            if below < share:
                return low * (high / low) ** ((above - share) / (above - below))
        raise ValueError(
            f"scheduler: expected levels up to one where less than {share} of the detail is made out, got "
            f"{smallest:.3f} at the highest, sigma {most:.3f}"
        )

    def table(self) -> str:
        """A line for each level, the highest first, as a run has them."""
        return "\n".join(["  sigma   share", *(f"{sigma:7.3f} {share:7.3f}" for sigma, share in self.shares[::-1])])


def measure(
    paint: Callable[..., torch.Tensor],
    noise: torch.Tensor,
    scheduler: Any,
    *,
    scale: float = 2.0,
    generator: torch.Generator | list[torch.Generator] | None = None,
) -> Calibration:
    """The share of detail that a network makes out at each level of a scheduler.

    Args:
        paint: function of (latents, bridging, callback) that runs `sampler.sample` with them on the window of `noise`
            at the scheduler's timesteps and gives the latents. It is called with latents alone, and then with all
            three, for a run without guidance: that exaggerates, and what it predicts is no estimate.
        noise: (B, C, h, w) standard normal, of the pictures that are measured on.
        scheduler: with its timesteps set.
        scale: how many times as long as the smaller canvas's sides these are, more than 1.
        generator: of the noise that is put on the pictures; a list has one for each.

    Raises:
        ValueError: for a scheduler whose noise levels are not known, a scale that leaves no detail or nothing else, and
            pictures or predictions that are not finite or have no detail.
    """
    known_levels("scheduler", scheduler)
    rows, columns = noise.shape[-2:]
    real("scale", scale, 1, 1e9, above=True)
    smaller, wrap = (round(rows / scale), round(columns / scale)), (False, False)
    if smaller == (rows, columns) or 0 in smaller:
        raise ValueError(f"scale: expected one by which {rows} x {columns} cells become fewer, got {scale}")
    clean = paint(noise)
    watch = _Watch(clean.float() - carry(carry(clean.float(), smaller, wrap), (rows, columns), wrap))
    power = watch.detail.square().sum((1, 2, 3))
    if not (power.isfinite() & (power > 0)).all():
        raise ValueError("model: expected pictures that are finite and have detail, got others")

    def noisy(number):
        return noised(scheduler, clean, normal(clean, generator), number)

    def renewed(step, timestep, latents):
        return noisy(step + 1) if step + 1 < len(scheduler.timesteps) else latents

    paint(noisy(0) / getattr(scheduler, "init_noise_sigma", 1.0), watch, renewed)
    if not all(math.isfinite(share) for _, share in watch.shares):
        raise ValueError("model: expected finite predictions, got others")
    return Calibration(tuple(sorted(watch.shares)))


class _Watch:
    """A bridge that changes nothing, and notes the share of the detail in every prediction."""

    def __init__(self, detail: torch.Tensor):
        self.detail = detail
        self.shares: list[tuple[float, float]] = []

    def step(self, step: int, steps: int, plan: WindowPlan) -> Stage:
        return Stage(plan, adjust=self.note)

    def note(self, prediction: torch.Tensor, sample: torch.Tensor, context: StepContext) -> torch.Tensor:
        assert context.level is not None, "the scheduler's levels are known"
        clean = context.level.clean(prediction.float(), sample.float())
        shares = (clean * self.detail).sum((1, 2, 3)) / self.detail.square().sum((1, 2, 3))
        self.shares.append((context.level.sigma, float(shares.mean())))
        return prediction

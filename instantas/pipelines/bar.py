"""A run in a progress bar: its denoiser and its callback, which count what is done."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from instantas.pipelines.callbacks import StepEnd
from instantas.sampling.step import StepContext


class Counted:
    """A denoiser whose windows are counted, where the bar's unit is the window.

    Args:
        denoiser: of `sampler.sample`, with a `fingerprint`.
        told: what else the run is told that makes it another one.
        done: function of a step's context that gives how many windows are evaluated before it, of a run that goes on.
    """

    def __init__(self, denoiser: Any, bar: Any, told: Mapping[str, Any], done: Callable[[StepContext], int]):
        self.denoiser, self.bar, self.told, self.done = denoiser, bar, told, done
        self.phase = getattr(denoiser, "phase", None)

    def fingerprint(self) -> dict[str, Any]:
        """What tells this run from others."""
        return self.denoiser.fingerprint() | self.told

    def __call__(
        self, windows: torch.Tensor, timestep: torch.Tensor, context: StepContext
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        predicted = self.denoiser(windows, timestep, context)
        if self.bar.unit == "window":
            _begin(self.bar, lambda: self.done(context))
            self.bar.update(len(windows))
        return predicted


class Shown:
    """`StepEnd`, and the steps in the bar."""

    def __init__(self, step_end: StepEnd, bar: Any, steps: int):
        self.step_end, self.bar, self.steps = step_end, bar, steps
        self.state_dict, self.load_state_dict = step_end.state_dict, step_end.load_state_dict

    def __call__(
        self, step: int, timestep: torch.Tensor, latents: torch.Tensor, denoised: torch.Tensor | None = None
    ) -> torch.Tensor:
        if self.bar.unit == "step":
            _begin(self.bar, lambda: step)
            self.bar.update()
        self.bar.set_postfix_str(f"step {step + 1}/{self.steps}")
        return self.step_end(step, timestep, latents, denoised)


def _begin(bar, done):
    """Let a bar that shows nothing yet begin after what is done: the time left is told of what follows."""
    if not bar.n:
        bar.n = bar.initial = done()

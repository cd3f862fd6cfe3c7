"""How far a run is, seen from inside of somebody else's loop."""

from __future__ import annotations

import sys
from typing import Any

import torch


class Progress:
    """The share of a run's evaluations that lie behind, told by the scheduler that the loop steps.

    As in `sampler.sample` evaluations count: the second one of a step of Heun is one further. A run is what the loop
    goes through: a part of the scheduler's timesteps where a picture is the start, or where the end is left to another
    model. It begins with new timesteps, or with a timestep that lies before the last one.

    Attributes:
        step, steps: how many evaluations of the run lay behind the one that was asked for last, of how many.
        index: of that one's timestep in the scheduler's; None: none was asked for.
    """

    step, steps = 0, 1

    def __init__(self):
        self._timesteps = self._values = self._first = self.index = None

    def __call__(self, scheduler: Any, timestep: torch.Tensor | float, evaluations: int | None = None) -> float:
        """From 0 to below 1; waits for the device that timesteps are on.

        Args:
            scheduler: of diffusers, with its timesteps set.
            timestep: that the network is evaluated at.
            evaluations: of the run, where the loop says so; None: up to the last timestep.
        """
        if scheduler.timesteps is not self._timesteps:
            self._timesteps, self._values = scheduler.timesteps, [float(t) for t in scheduler.timesteps]
            self._first = self.index = None
        now = float(timestep.flatten()[0] if isinstance(timestep, torch.Tensor) else timestep)
        nearest = min(abs(t - now) for t in self._values)
        places = [i for i, t in enumerate(self._values) if abs(t - now) == nearest]
        index = self._index(scheduler, places)
        if self.index is None or index < self.index:
            self._first = self._begin(scheduler, places, evaluations)
            index = max(self._first, self._index(scheduler, places))
        self.index = index
        self.steps = min(evaluations or len(self._values), len(self._values) - self._first)
        self.step = min(index - self._first, self.steps - 1)
        return self.step / self.steps

    def _index(self, scheduler, places):
        """Which of the places with this timestep the scheduler has come to."""
        taken = getattr(scheduler, "step_index", None)
        if taken is None and self._first is not None:  # PNDM counts its steps
            taken = self._first + getattr(scheduler, "counter", 0)
        if taken in places:
            return taken
        return next((place for place in places if self.index is None or place >= self.index), places[0])

    def _begin(self, scheduler, places, evaluations):
        """Where in the timesteps the run has begun."""
        count, begin = len(self._values), getattr(scheduler, "begin_index", None)
        if evaluations == count:
            return 0
        if begin is not None:
            return begin
        if evaluations is not None:
            return count - evaluations if count - evaluations in places else 0
        # of a doubled timestep the second is where a step begins: the first ends the one before
        return places[min(1, len(places) - 1)] if hasattr(scheduler, "index_for_timestep") else places[0]


def is_running(pipe: Any) -> bool:
    """Whether the pipeline's own call runs in this thread: only then what it says of a call is of this one."""
    frame = None if pipe is None else sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "__call__" and _held(frame.f_locals.get("self")) is _held(pipe):
            return True
        frame = frame.f_back
    return False


def _held(pipe):
    """The diffusers pipeline inside of an `InstantASPipeline`."""
    return getattr(pipe, "pipe", pipe)

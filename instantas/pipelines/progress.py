"""How far a run is, seen from inside of somebody else's loop."""

from __future__ import annotations

from typing import Any

import torch


class Progress:
    """The share of a run's evaluations that lie behind, told by the scheduler that the loop steps.

    As in `sampler.sample` evaluations count: the second one of a step of Heun is one further. A run is what the loop
    goes through: a part of the scheduler's timesteps where a picture is the start, or where the end is left to another
    model. It begins with new timesteps, or with a timestep that lies before the last one.

    Attributes:
        index: in the scheduler's timesteps, of the evaluation that was asked for last; None: none was.
    """

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
        length = min(evaluations or len(self._values), len(self._values) - self._first)
        return min(index - self._first, length - 1) / length

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

"""What the trainings of the autoencoder and of the diffusion model share: the clock, the rate, the moving average."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator

import torch


class Stage:
    """A loop that ends when its time is over: `for done in stage:` with `done` rising from 0 to 1.

    Values given to `record` are averaged; a line with them is reported every minute and at the end.

    Attributes:
        step: number of the round, from 0; there are at least two.
        most: the number of rounds after which the loop ends earlier, if any.
    """

    def __init__(self, name: str, seconds: float, report: Callable[[str], None]):
        self.name, self.seconds, self.report = name, seconds, report
        self.step = -1
        self.averages: dict[str, float] = {}
        self.most: int | None = None

    def __iter__(self) -> Iterator[float]:
        start = time.monotonic()
        next_line = 60.0
        while ((elapsed := time.monotonic() - start) < self.seconds or self.step < 1) and self.step + 1 != self.most:
            if elapsed >= next_line:
                self._line(elapsed)
                next_line += 60.0
            self.step += 1
            yield min(1.0, elapsed / self.seconds)
        self._line(time.monotonic() - start, "done")

    def record(self, **values: float) -> None:
        """Take the values into averages over the last hundred steps or so."""
        for name, value in values.items():
            self.averages[name] = self.averages.get(name, value) * 0.99 + value * 0.01

    def _line(self, elapsed: float, note: str = "") -> None:
        values = "  ".join(f"{name} {value:.4f}" for name, value in self.averages.items())
        self.report(f"{self.name:12s}{elapsed:6.0f} s  step {self.step + 1:6d}  {values}  {note}".rstrip())


def set_learning_rate(optimizer: torch.optim.Optimizer, peak: float, step: int, done: float, warmup: int = 50) -> None:
    """A linear rise over `warmup` steps, then half a cosine down to 2 % of the peak when the time is over."""
    rate = peak * min(1.0, (step + 1) / warmup) * (0.51 + 0.49 * math.cos(math.pi * done))
    for group in optimizer.param_groups:
        group["lr"] = rate


class MovingAverage:
    """Exponential moving average of parameters; its memory grows with the steps up to `decay`."""

    def __init__(self, parameters: Iterable[torch.nn.Parameter], decay: float):
        self.parameters = list(parameters)
        self.averages = [parameter.detach().clone() for parameter in self.parameters]
        self.decay, self.steps = decay, 0

    @torch.no_grad()
    def update(self) -> None:
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        torch._foreach_lerp_(self.averages, [parameter.detach() for parameter in self.parameters], 1 - decay)
        self.steps += 1

    @torch.no_grad()
    def copy_to_parameters(self) -> None:
        for parameter, average in zip(self.parameters, self.averages):
            parameter.copy_(average)

"""Noise levels of a scheduler's steps: from a prediction to the clean sample and from one level to another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

PREDICTIONS = ("epsilon", "sample", "v_prediction", "flow_prediction")
_LEAST = 1e-4  # of the signal or the noise, where a formula divides by it


@dataclass(frozen=True)
class Level:
    """The network's input is x = signal x_0 + noise eps, and its prediction one of `PREDICTIONS`.

    epsilon: eps. sample: x_0. v_prediction: signal eps - noise x_0 (Salimans and Ho 2022, signal^2 + noise^2 = 1).
    flow_prediction: eps - x_0 (signal + noise = 1).
    """

    signal: float
    noise: float
    predicts: str

    @property
    def sigma(self) -> float:
        """noise / signal."""
        return self.noise / max(self.signal, 1e-6)

    def clean(self, prediction: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """The x_0 that a prediction says; both of any one shape."""
        match self.predicts:
            case "epsilon":
                return (x - self.noise * prediction) / max(self.signal, _LEAST)
            case "v_prediction":
                return self.signal * x - self.noise * prediction
            case "flow_prediction":
                return x - self.noise * prediction
        return prediction

    def prediction(self, clean: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """The prediction that says x_0: the inverse of `clean`."""
        match self.predicts:
            case "epsilon":
                return (x - self.signal * clean) / max(self.noise, _LEAST)
            case "v_prediction":
                return (self.signal * x - clean) / max(self.noise, _LEAST)
            case "flow_prediction":
                return (x - clean) / max(self.noise, _LEAST)
        return clean

    @property
    def carry(self) -> tuple[float, float]:
        """(p, q): p x + q prediction is what a prediction says that stays the same at another level.

        Only v changes with the level: what stays is eps = noise x + signal v. A DDIM step on it, at another level, is
        the longer DDIM step from where it was made.
        """
        return (self.noise, max(self.signal, _LEAST)) if self.predicts == "v_prediction" else (0.0, 1.0)


def levels(scheduler: Any) -> list[Level] | None:
    """The level of each of a scheduler's timesteps, which are set; None if it has no table that this module knows.

    Read off `alphas_cumprod` (between its entries, the angle whose tangent is noise / signal is interpolated), or off
    the `sigmas` of flow matching. Timesteps are copied to the CPU once.
    """
    predicts = getattr(getattr(scheduler, "config", None), "prediction_type", "flow_prediction")
    if predicts not in PREDICTIONS:
        return None
    if predicts != "flow_prediction" and getattr(scheduler, "alphas_cumprod", None) is not None:
        alphas = scheduler.alphas_cumprod.double().cpu().numpy()
        angles = np.arctan2(np.sqrt(1 - alphas), np.sqrt(alphas))
        steps = torch.as_tensor(scheduler.timesteps, device="cpu").double().numpy()
        angles = np.interp(steps, np.arange(len(alphas)), angles)
        return [Level(float(np.cos(angle)), float(np.sin(angle)), predicts) for angle in angles]
    sigmas = getattr(scheduler, "sigmas", None)
    if predicts == "flow_prediction" and sigmas is not None:
        return [Level(1 - float(s), float(s), predicts) for s in sigmas[: len(scheduler.timesteps)]]
    return None

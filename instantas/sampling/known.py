"""Cells of a canvas that are known: what surrounds the part that is painted (inpainting, outpainting)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from instantas.sampling.bridging import Stage
from instantas.sampling.noise import Level


@dataclass(frozen=True, eq=False)
class Known:
    """Clean latents that a canvas keeps wherever it is not painted.

    After every step those cells are the latents with the noise of the level that the step leads to, after the
    scheduler's last one the latents themselves. Windows that hold no cell to be painted, of any picture, are never
    evaluated; those of a view (`bridging.View`) each see the whole canvas, and are.

    Attributes:
        latents: (B, C, H, W), clean.
        noise: (B, C, H, W), standard normal, with which they are noised.
        painted: (B or 1, 1, H, W) bool, the cells that are painted.
        told: whether the network is told what it is to keep, as an inpainting UNet is: what the windows of a step cover
            then is left to it.

    Raises:
        TypeError, ValueError: for other shapes, and for masks that are not bool.
    """

    latents: torch.Tensor
    noise: torch.Tensor
    painted: torch.Tensor
    told: bool = False

    def __post_init__(self):
        for name in ("latents", "noise", "painted"):
            if not isinstance(value := getattr(self, name), torch.Tensor):
                raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
        if not self.latents.is_floating_point():
            raise TypeError(f"latents: expected a tensor of floats, got {self.latents.dtype}")
        if self.painted.dtype != torch.bool:
            raise TypeError(f"painted: expected bool, got {self.painted.dtype}")
        batch, _, *size = shape = tuple(self.latents.shape)
        if tuple(self.noise.shape) != shape:
            raise ValueError(f"noise: expected {shape}, as the latents have, got {tuple(self.noise.shape)}")
        if tuple(self.painted.shape) not in ((1, 1, *size), (batch, 1, *size)):
            wanted = f"(1 or {batch}, 1, {size[0]}, {size[1]})"
            raise ValueError(f"painted: expected {wanted}, got {tuple(self.painted.shape)}")

    @property
    def cells(self) -> torch.Tensor:
        """(H, W) bool on the CPU, the cells that are painted in some picture."""
        return self.painted.flatten(0, 1).any(0).cpu()


def prediction_of(clean: torch.Tensor, noise: torch.Tensor, level: Level | None) -> torch.Tensor:
    """(1, B, C, H, W): what a network would predict that knew both, in the form that is carried on."""
    match "epsilon" if level is None else level.predicts:
        case "sample":
            return clean[None]
        case "flow_prediction":
            return (noise - clean)[None]
    return noise[None]


class Restorer:
    """Puts known latents back after each step of a run.

    Args:
        known: what is known.
        amounts: (steps, 2) float64, the signal and the noise that a sample has after each step.
        stages: of the run.
    """

    def __init__(self, known: Known, amounts: torch.Tensor, stages: Sequence[Stage]):
        self.known, device = known, known.latents.device
        self.amounts, self.clean = amounts.to(device), torch.tensor([1.0, 0.0], dtype=torch.float64, device=device)
        self.painted = [known.painted] * len(stages)
        if known.told:
            whole = torch.ones_like(known.painted)
            covered = {stage.plan: torch.from_numpy(stage.plan.coverage() > 0).to(device) for stage in stages}
            self.painted = [
                whole if stage.view is not None else known.painted | covered[stage.plan] for stage in stages
            ]

    def __call__(self, step: int, canvas: torch.Tensor) -> torch.Tensor:
        """The canvas (B, C, H, W) after a step."""
        return self._restored(step, canvas, self.amounts[step])

    def denoised(self, step: int, latents: torch.Tensor) -> torch.Tensor:
        """The clean latents (B, C, H, W) that a step gave."""
        return self._restored(step, latents, self.clean)

    def _restored(self, step, canvas, amounts):
        signal, noise = amounts
        kept = (signal * self.known.latents + noise * self.known.noise).to(canvas.dtype)
        return torch.where(self.painted[step], canvas, kept)

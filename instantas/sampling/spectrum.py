"""Canvases carried to another size by their spectra: shared low frequencies, and random detail above them."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

BINS = 16  # of frequency, in which the power of detail is measured


def normal(like: torch.Tensor, generator: torch.Generator | list[torch.Generator] | None) -> torch.Tensor:
    """Standard normal numbers of a tensor's shape, drawn where the generator is; a list draws picture by picture."""
    if isinstance(generator, list):
        return torch.cat([normal(one, each) for one, each in zip(like.split(1), generator)])
    device = like.device if generator is None else generator.device
    return torch.randn(like.shape, generator=generator, device=device, dtype=like.dtype).to(like.device)


def carry(x: torch.Tensor, size: tuple[int, int], wrap: tuple[bool, bool]) -> torch.Tensor:
    """(..., H, W) -> (..., *size): the frequencies that both sizes have, in orthonormal bases.

    White noise carried down is white noise; carried up it is white in the corner of its frequencies, and 0 elsewhere.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    rows, columns = (
        (basis(new, wraps)[:old].T @ basis(old, wraps)[:new]).to(x.device, wide)
        for new, old, wraps in zip(size, x.shape[-2:], wrap)
    )
    return (rows @ x.to(wide) @ columns.T).to(x.dtype)


def with_detail(
    clean: torch.Tensor,
    size: tuple[int, int],
    wrap: tuple[bool, bool],
    generator: torch.Generator | list[torch.Generator] | None = None,
) -> torch.Tensor:
    """(B, C, H, W) -> (B, C, *size): clean latents enlarged, with random detail above their frequencies.

    The power of detail is what each picture and channel has itself at that distance from frequency 0, in `BINS` bins.
    """
    (height, width), device = clean.shape[-2:], clean.device
    wide = torch.promote_types(clean.dtype, torch.float32)
    bases = [basis(side, wraps).to(device, wide) for side, wraps in zip((height, width), wrap)]
    wider = [basis(side, wraps).to(device, wide) for side, wraps in zip(size, wrap)]
    spectrum = bases[0] @ clean.to(wide) @ bases[1].T
    own, others = (_radius(each, wrap).to(device) for each in ((height, width), size))
    bins, wanted = ((radius * (BINS / own.max())).long().clamp(max=BINS - 1) for radius in (own, others))
    members = F.one_hot(bins.flatten(), BINS).to(wide)
    power = (spectrum.square().flatten(2) @ members / members.sum(0).clamp(min=1))[..., wanted]
    larger = normal(power, generator) * power.sqrt()
    larger[..., :height, :width] = spectrum * math.sqrt(size[0] * size[1] / (height * width))
    return (wider[0].T @ larger @ wider[1]).to(clean.dtype)


def basis(length: int, wraps: bool) -> torch.Tensor:
    """(length, length) float64, orthonormal rows of rising frequency: the DCT-II, or on a circle sines and cosines."""
    place = (torch.arange(length, dtype=torch.float64) + 0.5) / length
    number = torch.arange(length, dtype=torch.float64)[:, None]
    if wraps:
        turns = 2 * math.pi * torch.ceil(number / 2) * place
        # sines first: the last row of an even length has no cosine, and is the sine of a larger canvas too
        rows = torch.where(number % 2 == 1, turns.sin(), turns.cos())
    else:
        rows = torch.cos(math.pi * number * place)
    return rows / rows.norm(dim=1, keepdim=True)


def _radius(size, wrap):
    """(H, W): distance of each number of a spectrum from frequency 0, in cycles per cell."""
    frequency = [
        torch.ceil(torch.arange(length) / 2) / length if wraps else torch.arange(length) / (2 * length)
        for length, wraps in zip(size, wrap)
    ]
    return torch.hypot(frequency[0][:, None], frequency[1][None])

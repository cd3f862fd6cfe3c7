"""Latents to pictures: the autoencoder's decoder on canvases of any size, in tiles where they are large."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import torch

from instantas import ops
from instantas.windows import WindowPlan

TILE = 128  # cells: 1024 px, what SDXL's decoder is made for
HALO = 8  # cells from a tile's border to where it counts: a decoder without attention or norms sees no further
RAMP = 16  # cells over which one tile gives way to the next: what group norms make of each fades unseen


def decode(
    vae: Any,
    latents: torch.Tensor,
    wrap: tuple[bool, bool] = (False, False),
    generator: torch.Generator | list[torch.Generator] | None = None,
) -> torch.Tensor:
    """(B, C, H, W) latents as the diffusion model has them -> (B, 3, H cell, W cell) pictures in -1..1.

    A canvas of at most TILE^2 cells is decoded at once. A larger one is decoded in tiles whose outer HALO cells do not
    count and which are blended over RAMP cells, so that no border shows. An axis that wraps is continued round its
    circle. A float16 autoencoder that says it overflows (`force_upcast`) runs in float32.

    Args:
        vae: a diffusers autoencoder (AutoencoderKL, AutoencoderTiny).
        wrap: (vertical, horizontal).
        generator: for decoders that draw noise; a list has one for each picture.
    """
    generators = generator if isinstance(generator, list) else [generator] * len(latents)
    with _precise(vae):
        latents = _unscaled(vae, latents).to(vae.dtype)
        height, width = latents.shape[-2:]
        tiled = height * width > TILE * TILE
        # round a circle that tiles do not go round, the latents are continued
        rims = [HALO if wraps and not (tiled and n > TILE) else 0 for wraps, n in zip(wrap, (height, width))]
        rows, columns = (torch.arange(-r, n + r, device=latents.device) % n for r, n in zip(rims, (height, width)))
        latents = latents[:, :, rows[:, None], columns] if any(rims) else latents
        wrap = wrap[0] and not rims[0], wrap[1] and not rims[1]
        images = torch.cat(
            [
                _in_tiles(vae, picture, wrap, source) if tiled else _decoded(vae, picture, source)
                for picture, source in zip(latents.split(1), generators)
            ]
        )
        cell = images.shape[-1] // len(columns)
        (y, x), (h, w) = (rim * cell for rim in rims), (height * cell, width * cell)
        return images[:, :, y : y + h, x : x + w]


def _in_tiles(vae, latents, wrap, generator):
    plan = WindowPlan.strided(*latents.shape[-2:], TILE, TILE - 2 * HALO - RAMP, wrap=wrap)
    tiles = [_decoded(vae, tile, generator) for tile in ops.gather_windows(latents, plan)[0].split(1)]
    cell = tiles[0].shape[-1] // plan.window[1]
    h, w = (side * cell for side in plan.window)
    pixels = WindowPlan(plan.height * cell, plan.width * cell, (h, w), plan.origins * cell, wrap)
    weight = torch.from_numpy(_tile_weights(plan, cell)).to(latents.device)
    return ops.scatter_windows(torch.cat(tiles)[None], pixels, weight)


def _tile_weights(plan: WindowPlan, cell: int) -> np.ndarray:
    """(n, h cell, w cell) float32: 1 inside a tile, falling to 0 at HALO cells from the borders inside the canvas."""
    axes = []
    for axis, length in enumerate((plan.height, plan.width)):
        window, origins = plan.window[axis], plan.origins[:, axis]
        centre = (np.arange(window * cell) + 0.5) / cell
        sides = []
        for distance, edge in ((centre, 0), (window - centre, length - window)):
            outer = (origins == edge) & (not plan.wrap[axis])  # the canvas's own edge: no other tile is there
            ramp = ((distance - HALO) / RAMP).clip(0, 1)
            sides.append(np.where(outer[:, None], 1.0, ramp))
        axes.append(np.minimum(*sides))
    return (axes[0][:, :, None] * axes[1][:, None, :]).astype(np.float32)


def _decoded(vae, latents, generator):
    return vae.decode(latents, return_dict=False, generator=generator)[0]


def _unscaled(vae, latents):
    """Latents as the decoder takes them."""
    config = vae.config
    latents = latents / config.scaling_factor
    mean, spread = (getattr(config, name, None) for name in ("latents_mean", "latents_std"))
    if mean is None or spread is None:
        return latents
    mean, spread = (torch.tensor(v).view(1, -1, 1, 1).to(latents) for v in (mean, spread))
    return latents * spread + mean


@contextlib.contextmanager
def _precise(vae):
    """The autoencoder in float32 while it is used, if float16 is too small for it."""
    narrow = vae.dtype == torch.float16 and getattr(vae.config, "force_upcast", False)
    if narrow:
        vae.to(dtype=torch.float32)
    try:
        yield
    finally:
        if narrow:
            vae.to(dtype=torch.float16)

"""MultiDiffusion's region mode (Bar-Tal et al. 2023, section 4.2), the baseline of regional control.

The network is evaluated once for every region and window. Where it is evaluated for a region, what surrounds it is
replaced by a noised plain colour in the first steps (bootstrapping), so that the region's content is drawn inside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from instantas.pipelines.conditions import Prompts, embed
from instantas.pipelines.denoiser import WindowDenoiser
from instantas.regions import Region, RegionMap
from instantas.sampling.prediction import cut
from instantas.sampling.step import StepContext

BOOTSTRAPPING = 20  # steps, of the authors' 50


class RegionDenoiser:
    """A denoiser of windows that evaluates one denoiser for each prompt and blends by the regions' shares.

    The shares at a cell are the same in every window that covers it, so that the overlap mean of what is blended inside
    the windows is MultiDiffusion's mean over windows and regions.

    Args:
        denoisers: of the base prompt, then of each region's.
        regions: their shares.
        noise: (pictures, C, H, W), what the run starts from.
        backgrounds: (BOOTSTRAPPING, C) latents of plain colours, one for each of the first steps.
    """

    def __init__(
        self,
        denoisers: Sequence[WindowDenoiser],
        regions: RegionMap,
        noise: torch.Tensor,
        backgrounds: torch.Tensor,
    ):
        self.denoisers, self.regions = denoisers, regions
        self.noise, self.backgrounds = noise, backgrounds

    def fingerprint(self) -> dict[str, Any]:
        """As `WindowDenoiser.fingerprint`."""
        regions = self.regions, self.backgrounds, [denoiser.prompts for denoiser in self.denoisers]
        return self.denoisers[0].fingerprint() | dict(regions=regions)

    def __call__(
        self, windows: torch.Tensor, timestep: torch.Tensor, context: StepContext
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(cond, uncond or None) of windows (m, C, h, w)."""
        lists, progress = context.pictures * self.regions.pictures // len(self.noise), context.step / context.steps
        shares = self.regions.windows_at(context.plan, lists, context.origins, progress)
        shares = (shares / shares.sum(1, keepdim=True)).to(windows.dtype)[:, :, None]
        surroundings = self._surroundings(windows, context)
        total: Any = None
        for slot, denoiser in enumerate(self.denoisers):
            share = shares[:, slot]
            given = windows
            if slot and surroundings is not None:
                given = torch.where(share > 0, windows, surroundings)
            parts = [p if p is None else share * p for p in denoiser(given, timestep, context)]
            total = parts if total is None else [p if p is None else p + q for p, q in zip(parts, total)]
        return tuple(total)

    def _surroundings(self, windows, context):
        """The step's plain colour at the step's noise level; None after bootstrapping."""
        if context.step >= len(self.backgrounds) or context.level is None:
            return None
        colour = self.backgrounds[context.step].to(windows)[:, None, None]
        noise = cut(self.noise, context.pictures, context.origins, context.plan.window)
        return context.level.signal * colour + context.level.noise * noise


def plain_colours(
    vae: Any, generator: torch.Generator | list[torch.Generator] | None, device: torch.device
) -> torch.Tensor:
    """(BOOTSTRAPPING, C) latents of random plain colours, drawn from the generator (of a list, the first)."""
    generator = generator[0] if isinstance(generator, list) else generator
    where = device if generator is None else generator.device
    colours = torch.rand(BOOTSTRAPPING, 3, 1, 1, generator=generator, device=where).to(device, vae.dtype)
    encoded = vae.encode((2 * colours - 1).expand(-1, -1, 64, 64), return_dict=False)[0]
    latents = encoded if isinstance(encoded, torch.Tensor) else encoded.mean
    return latents.mean((-2, -1)) * vae.config.scaling_factor


def region_prompts(pipe: Any, lists: Sequence[Sequence[Region]], slot: int, base: Prompts, **settings: Any) -> Prompts:
    """Embedded prompts of every picture's region number `slot`; of a picture without one, the empty prompt.

    Where a region has no negative prompt the picture's own stays.

    Raises:
        ValueError: for regions of embeddings, and for a picture's of another length than the regions' prompts have.
    """
    regions = [entries[slot] if slot < len(entries) else None for entries in lists]
    if any(region and (region.embeds, region.negative_embeds) != (None, None) for region in regions):
        raise ValueError("embeds: expected None with method='multidiffusion', whose regions are texts, got a tensor")
    copies = len(base.embeds) // len(lists)
    negatives = [region and region.negative_prompt for region in regions]
    texts = {
        "prompt": [region.prompt if region else "" for region in regions],
        "negative_prompt": [text or "" for text in negatives],
    }
    found = embed(pipe, texts, copies=copies, guided=base.negative is not None, **settings)
    if base.negative is not None and base.negative.shape[1] != found.embeds.shape[1]:
        raise ValueError(
            f"prompt_embeds: expected {found.embeds.shape[1]} tokens, as the regions' prompts have in multidiffusion, "
            f"got {base.negative.shape[1]}"
        )
    own = torch.tensor([text is not None for text in negatives], device=base.embeds.device).repeat_interleave(copies)

    def chosen(region, picture):
        return region if region is None else torch.where(own.view(-1, *[1] * (region.dim() - 1)), region, picture)

    negative = chosen(found.negative, base.negative)
    return Prompts(found.embeds, negative, found.pooled, chosen(found.negative_pooled, base.negative_pooled))

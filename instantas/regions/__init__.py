"""Regions: which prompt has a say where on the canvas, how much, and when.

Plain data, no kernels and no network: `instantas.regions.weights` lays a `RegionMap`'s shares out for the
cross-attention layers.
"""

from __future__ import annotations

import copy
import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from instantas import ops
from instantas.checks import integer, real
from instantas.regions.masks import box_mask, feather, fit_mask, over_cells, read_box, read_mask
from instantas.windows import WindowPlan

MAX_PROMPTS = 64  # for one picture: the base prompt and 63 regions
MAX_WEIGHT = 1e30  # so that sums of them, and times of logits, are finite in float32
_NOTHING = 1e-6  # what rounding leaves of the base prompt's share where regions cover a cell

SCHEDULES = {
    "constant": lambda progress: 1.0,
    "linear": lambda progress: progress,
    "cosine": lambda progress: (1 - math.cos(math.pi * progress)) / 2,
}
"""The regions' share over the run; the base prompt has the rest. progress: step / steps, from 0 to below 1."""


@dataclass(frozen=True, eq=False)
class Region:
    """A part of the canvas with a prompt of its own.

    Attributes:
        prompt: what to paint there; with `embeds` a label, or None.
        mask: picture, array, tensor or file (`instantas.regions.masks.read_mask`), hard or soft, never binarised; of
            the canvas's size, or of its proportions and then resized by area. Kept as float32 (h, w).
        box: (left, top, right, bottom), exclusive at the right and the bottom. If any of the four is a float they are
            fractions of the canvas; four integers are pixels, unless none is above 1: then they are fractions too.
            Where the canvas wraps, a box may reach over the border (0.9, 0.0, 1.1, 1.0). Either mask or box.
        negative_prompt: what not to paint there; None: the picture's.
        weight: > 0, the say relative to that of regions in the same place. Where weights times masks add up to less
            than 1 the base prompt has the rest.
        start, end: part of the run in which the region counts, fractions of its steps, 0 <= start < end <= 1.
        feather: width in pixels of the ramps into which the edges are turned.
        guidance_scale: classifier-free guidance inside; None: the picture's.
        embeds: (L, D) or (1, L, D), the embedding in place of the prompt's text: weighted, longer than the text encoder
            takes, or of a model without one. Of any length L. Kept as (L, D).
        negative_embeds: the same in place of the negative prompt's.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """

    prompt: str | None = None
    mask: Any = None
    box: Any = None
    negative_prompt: str | None = None
    weight: float = 1.0
    start: float = 0.0
    end: float = 1.0
    feather: int = 0
    guidance_scale: float | None = None
    embeds: torch.Tensor | None = None
    negative_embeds: torch.Tensor | None = None

    def __post_init__(self):
        for name in ("prompt", "negative_prompt"):
            value = getattr(self, name)
            if value is None and name == "prompt" and self.embeds is None:
                raise TypeError("prompt: expected a string or embeds, got neither")
            if not isinstance(value, str) and value is not None:
                raise TypeError(f"{name}: expected a string, got {type(value).__name__}")
        for name in ("embeds", "negative_embeds"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, _embeds(name, getattr(self, name)))
        if (self.mask is None) == (self.box is None):
            raise ValueError(f"mask: expected either a mask or a box, got {'neither' if self.box is None else 'both'}")
        if self.mask is None:
            object.__setattr__(self, "box", read_box(self.box))
        else:
            object.__setattr__(self, "mask", read_mask(self.mask))
        real("weight", self.weight, 0, MAX_WEIGHT, above=True)
        if not 0 <= real("start", self.start) < real("end", self.end) <= 1:
            raise ValueError(f"start: expected 0 <= start < end <= 1, got start {self.start} and end {self.end}")
        integer("feather", self.feather, 0, expected="whole pixels, 0 or more")
        if self.guidance_scale is not None:
            real("guidance_scale", self.guidance_scale)

    @property
    def positive(self) -> str | torch.Tensor:
        """What to paint: the embedding where there is one, else the text."""
        return self.embeds if self.embeds is not None else str(self.prompt)

    @property
    def negative(self) -> str | torch.Tensor | None:
        """What not to paint: the embedding where there is one, else the text; None: the picture's."""
        return self.negative_prompt if self.negative_embeds is None else self.negative_embeds

    @classmethod
    def parse(cls, text: str, **settings: Any) -> Region:
        """A region from "prompt@left,top,right,bottom" or "prompt@mask.png".

        The place follows the last @. Numbers with a point are fractions, as in `box`.

        Raises:
            ValueError: for text of another form.
        """
        prompt, at, place = text.rpartition("@")
        prompt, place = prompt.strip(), place.strip()
        wrong_form = ValueError(f'region: expected "prompt@left,top,right,bottom" or "prompt@mask.png", got {text!r}')
        if not at or not prompt or not place:
            raise wrong_form
        parts = place.split(",")
        try:
            numbers = [float(part) if set(part) & set(".eE") else int(part) for part in parts]
        except ValueError:
            if len(parts) == 4 and not Path(place).exists():
                raise wrong_form from None
            numbers = None
        if numbers is None or (len(numbers) != 4 and Path(place).exists()):
            return cls(prompt, mask=place, **settings)
        return cls(prompt, box=tuple(numbers), **settings)

    def draw(self, height: int, width: int, wrap: tuple[bool, bool] = (False, False)) -> torch.Tensor:
        """float32 (height, width) in 0..1: the mask on a canvas of so many pixels, feathered.

        Raises:
            ValueError: for a box outside the canvas, a mask of other proportions, a feather longer than a side.
        """
        if self.feather > min(height, width):
            raise ValueError(f"feather: expected at most {min(height, width)} pixels, got {self.feather}")
        if self.mask is None:
            return feather(box_mask(self.box, height, width, wrap), self.feather, wrap)
        return feather(fit_mask(self.mask, height, width), self.feather, wrap)


def load_regions(path: str | os.PathLike) -> list[Region]:
    """Regions from a JSON file: a list of objects with the arguments of `Region` by name.

    A mask is a file name, relative to the JSON file's folder.

    Raises:
        ValueError: for a file that cannot be read or has another form, naming the region.
    """
    path = Path(path)
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"regions: expected a JSON file, got {str(path)!r} ({error})") from error
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f"regions: expected a list of objects in {str(path)!r}, got {entries!r:.40}")
    names = [name for name in Region.__dataclass_fields__ if not name.endswith("embeds")]
    regions = []
    for number, entry in enumerate(entries, 1):
        if unknown := set(entry) - set(names):
            raise ValueError(f"region {number}: expected {', '.join(names)}, got {', '.join(sorted(unknown))}")
        if "prompt" not in entry:
            raise ValueError(f"region {number}: expected a prompt, got none")
        if isinstance(entry.get("mask"), str):
            entry = entry | {"mask": path.parent / entry["mask"]}
        try:
            regions.append(Region(**entry))
        except (TypeError, ValueError) as error:
            raise type(error)(f"region {number}: {error}") from error
    return regions


@dataclass(frozen=True, eq=False)
class RegionMap:
    """Regions on a canvas: the share of every prompt at every cell, at every step, in every window.

    With the masks m_r averaged over each cell and the regions' weights w_r, at a step at which regions have the share s
    (0 for those not between start and end), the shares are

        region r:  s w_r m_r          base prompt:  max(0, 1 - sum_r s w_r m_r) + base_weight

    and their sum is above 0 everywhere.

    Args:
        regions: one list for every picture, or a list of lists, one for each picture (or for each prompt, when several
            pictures are made of one).
        height, width: the canvas in pixels.
        cell: pixels of a latent cell.
        latents: (rows, columns) of the canvas in cells; ceil(height / cell), ceil(width / cell) when None. Cells
            outside of the picture continue its edge.
        wrap: (vertical, horizontal): whether the axis is a circle.
        base_weight: >= 0, the base prompt's share everywhere beside what regions leave it.
        semantic_schedule: one of `SCHEDULES`, the regions' share over the run.
        device: of what `shares` and `windows` give.

    Attributes:
        lists: the regions of each picture; pictures: how many there are.
        masks: (pictures, R, rows, columns) float32.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came; more than 63 regions.
    """

    regions: Sequence
    height: int
    width: int
    cell: int = 8
    latents: tuple[int, int] | None = None
    wrap: tuple[bool, bool] = (False, False)
    base_weight: float = 0.0
    semantic_schedule: str = "constant"
    device: torch.device | str = "cpu"
    lists: tuple[tuple[Region, ...], ...] = field(init=False)
    masks: torch.Tensor = field(init=False, repr=False)
    _latest: dict = field(default_factory=dict, init=False, repr=False)
    _smaller: dict = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self):
        for name in ("height", "width", "cell"):
            integer(name, getattr(self, name), 1, expected="a positive number of pixels")
        check_blend(self.base_weight, self.semantic_schedule)
        least = tuple(-(-side // self.cell) for side in (self.height, self.width))
        cells = least if self.latents is None else tuple(self.latents)
        if len(cells) != 2 or any(given < needed for given, needed in zip(cells, least)):
            raise ValueError(f"latents: expected at least {least} cells, got {cells}")
        lists = region_lists(self.regions)
        masks = torch.zeros(len(lists), max(map(len, lists)), *cells, device="cpu")
        drawn = {}
        for picture, regions in enumerate(lists):
            for r, region in enumerate(regions):
                if region not in drawn:
                    drawn[region] = over_cells(region.draw(self.height, self.width, self.wrap), self.cell, cells)
                masks[picture, r] = drawn[region]
        put = object.__setattr__
        put(self, "latents", cells)
        put(self, "lists", lists)
        put(self, "masks", masks.to(self.device))

    def at(self, latents: tuple[int, int]) -> RegionMap:
        """The same regions on a canvas of so many (rows, columns) cells that shows the same in fewer; kept.

        Masks are averaged over the area of a cell.
        """
        if latents == self.latents:
            return self
        if latents not in self._smaller:
            smaller = copy.copy(self)
            masks = F.adaptive_avg_pool2d(self.masks, latents)
            for name, value in dict(latents=latents, masks=masks, _latest={}, _smaller={}).items():
                object.__setattr__(smaller, name, value)
            self._smaller[latents] = smaller
        return self._smaller[latents]

    @property
    def pictures(self) -> int:
        return len(self.lists)

    @property
    def dynamic(self) -> bool:
        """Whether the shares change over the run."""
        timed = any(region.start > 0 or region.end < 1 for regions in self.lists for region in regions)
        return timed or self.semantic_schedule != "constant"

    def weights(self, progress: float) -> tuple[tuple[float, ...], ...]:
        """The weight of each picture's regions at a point of the run, from 0 to below 1."""
        share = SCHEDULES[self.semantic_schedule](progress)
        return tuple(tuple(share * r.weight * (r.start <= progress < r.end) for r in regions) for regions in self.lists)

    @torch.inference_mode(False)  # they are kept, and may be asked for again where there are gradients
    def shares(self, progress: float = 0.0) -> torch.Tensor:
        """(pictures, 1 + R, rows, columns) float32: the base prompt's share and the regions' at a point of the run."""
        weights = self.weights(progress)
        shares = self._latest.get(weights)
        if shares is None:
            factor = self.masks.new_zeros(self.masks.shape[:2])
            for picture, row in enumerate(weights):
                for region, weight in enumerate(row):
                    factor[picture, region].fill_(weight)  # unlike a copy of the row, waits for no device
            shares = self.masks * factor[..., None, None]
            base = 1 - shares.sum(1, keepdim=True)
            base = torch.where(base > _NOTHING, base, 0.0) + self.base_weight
            shares = torch.cat([base, shares], dim=1)
            if self.semantic_schedule != "constant":
                # shares under a schedule come once; all others may come again, and be what a CUDA graph reads
                for past in [past for past in list(self._latest) if any(map(any, past))]:
                    self._latest.pop(past, None)
            self._latest[weights] = shares
        return shares

    def windows(self, plan: WindowPlan, rows: torch.Tensor, progress: float = 0.0, view: Any = None) -> torch.Tensor:
        """(m, 1 + R, h, w) float32: the shares in windows of a plan.

        Args:
            rows: (m, 2) int64 on the CPU, the (picture, window) of each.
            view: what the windows are cut from (`instantas.sampling.bridging.View`); None: the canvas.
        """
        placed = rows.to(self.masks.device)
        origins = plan.tables(placed.device).origins[placed[:, 1]]
        return self.windows_at(plan, placed[:, 0], origins, progress, view)

    def windows_at(
        self, plan: WindowPlan, pictures: torch.Tensor, origins: torch.Tensor, progress: float = 0.0, view: Any = None
    ) -> torch.Tensor:
        """As `windows`, of windows said on the masks' device: (m,) int64 pictures, (m, 2) integer origins (y, x)."""
        shares = self.shares(progress)
        shares = shares if view is None else view.apply(shares)
        if (plan.height, plan.width) != shares.shape[-2:]:
            raise ValueError(
                f"plan: expected {shares.shape[-2]} x {shares.shape[-1]} cells, got {plan.height} x {plan.width}"
            )
        # one pass for all windows of all lists, few as those are
        windows = ops.gather_windows(shares, plan.with_tables(plan.tables(origins.device)._replace(origins=origins)))
        return (
            windows[0] if len(windows) == 1 else windows[pictures, torch.arange(len(pictures), device=pictures.device)]
        )

    def guidance(self, guidance_scale: float) -> float | torch.Tensor:
        """The guidance scale of each cell, (rows, columns) float32; the given one if no region has its own.

        The mean over the prompts, by the shares that they have with every region counting.

        Raises:
            ValueError: if it is not the same for all pictures.
        """
        if all(region.guidance_scale is None for regions in self.lists for region in regions):
            return guidance_scale
        maps = []
        for masks, regions in zip(self.masks, self.lists):
            weights = torch.tensor([region.weight for region in regions], device=masks.device)[:, None, None]
            scales = [guidance_scale if r.guidance_scale is None else float(r.guidance_scale) for r in regions]
            shares = weights * masks[: len(regions)]
            base = (1 - shares.sum(0)).clamp(min=0) + self.base_weight
            total = guidance_scale * base + (shares * torch.tensor(scales, device=masks.device)[:, None, None]).sum(0)
            maps.append(total / (base + shares.sum(0)))
        if any(not torch.equal(maps[0], other) for other in maps[1:]):
            raise ValueError(
                "guidance_scale: expected the same of all pictures of a batch, got regions that differ in it; make the "
                "pictures one by one"
            )
        return maps[0]

    def preview(self, path: str | os.PathLike, plan: WindowPlan | None = None) -> None:
        """Draw regions, their shares and the plan's windows to a picture file (needs matplotlib)."""
        from instantas.plots import plot_regions

        plot_regions(self, plan, path)


def region_lists(regions: Any) -> tuple[tuple[Region, ...], ...]:
    """The regions of each picture, from one list for all or a list of lists.

    Raises:
        TypeError, ValueError: naming what is no `Region`, and where; more than 63 for a picture.
    """
    entries = [regions] if isinstance(regions, Region) else _entries(regions, "")
    lists = [entries]
    if entries and all(isinstance(entry, (list, tuple)) for entry in entries):
        lists = [_entries(entry, f" for picture {number}") for number, entry in enumerate(entries, 1)]
    for picture, entries in enumerate(lists, 1):
        for number, entry in enumerate(entries, 1):
            if not isinstance(entry, Region):
                where = f"region {number}" + f" of picture {picture}" * (len(lists) > 1)
                raise TypeError(
                    f"regions: expected a list of Region, or one such list for each picture, got as {where} the "
                    f"{type(entry).__name__} {entry!r:.60}"
                )
        if len(entries) >= MAX_PROMPTS:
            raise ValueError(f"regions: expected at most {MAX_PROMPTS - 1} for a picture, got {len(entries)}")
    return tuple(map(tuple, lists))


def _entries(regions, whose):
    if isinstance(regions, (str, dict)) or not isinstance(regions, Iterable):
        raise TypeError(f"regions: expected a list of Region{whose}, got the {type(regions).__name__} {regions!r:.60}")
    return list(regions)


def _embeds(name: str, embeds: Any) -> torch.Tensor:
    if not isinstance(embeds, torch.Tensor) or not embeds.is_floating_point():
        raise TypeError(f"{name}: expected a tensor of floats (L, D), got {getattr(embeds, 'dtype', type(embeds))}")
    found = embeds[0] if embeds.dim() == 3 and len(embeds) == 1 else embeds
    if found.dim() != 2 or 0 in found.shape:
        raise ValueError(f"{name}: expected (L, D) or (1, L, D), got {tuple(embeds.shape)}")
    if not found.detach().isfinite().all():
        raise ValueError(f"{name}: expected finite values, got NaN or infinite ones")
    return found


def check_blend(base_weight: float, semantic_schedule: str) -> None:
    """Refuse what `RegionMap` cannot be made with."""
    real("base_weight", base_weight, 0, MAX_WEIGHT)
    if semantic_schedule not in SCHEDULES:
        raise ValueError(f"semantic_schedule: expected one of {', '.join(SCHEDULES)}, got {semantic_schedule!r}")

"""Who attends to which prompt, and how much: rows of the bank and their weights at every resolution of a network."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from instantas import ops
from instantas.ops import backend
from instantas.regions import RegionMap
from instantas.regions.masks import average
from instantas.regions.prompts import PromptBank
from instantas.windows import WindowPlan

TILE = 64  # queries of a feature map that attention takes at once: so few have no order
KEPT = 64  # layouts at most


class WindowBatch(NamedTuple):
    """Which windows a batch is of, and when.

    Attributes:
        plan: the windows.
        rows: (m, 2) int64 on the CPU, the (picture, window) of each.
        origins: (m, 2) int32 on the regions' device, the (y, x) of each.
        progress: step / steps.
        view: what the windows are cut from (`instantas.sampling.bridging.View`); None: the canvas.
        captured: whether the evaluation is captured in a CUDA graph.
        branches: for each part of the batch whether it is conditional; None: [uncond, cond] or [cond], as many as come.
    """

    plan: WindowPlan
    rows: torch.Tensor
    origins: torch.Tensor
    progress: float = 0.0
    view: object = None
    captured: bool = False
    branches: tuple[bool, ...] | None = None

    @classmethod
    def whole(
        cls, pictures: int, size: tuple[int, int], progress: float, device: torch.device, branches: Any = None
    ) -> WindowBatch:
        """So many whole canvases of (rows, columns) cells."""
        rows = torch.tensor([[picture, 0] for picture in range(pictures)], device="cpu")
        origins = torch.zeros(pictures, 2, dtype=torch.int32, device=device)
        plan = WindowPlan.minimum_coverage(*size, size)
        return cls(plan, rows, origins, progress, branches=branches)


class Layout(NamedTuple):
    """What the elements of a batch attend to.

    Attributes:
        ids: (B, S) int32, rows of the bank; -1: none.
        weights: (h, w) -> (B, S, h w) float32 for the sizes of the feature maps, the batch's own first.
        orders: (h, w) -> (B, h w) int32 (`ops.region_order`), for sizes at which attention gains by one.
        lengths: (P,) int32, how many tokens each prompt of the bank has; None: all.
    """

    ids: torch.Tensor
    weights: dict[tuple[int, int], torch.Tensor]
    orders: dict[tuple[int, int], torch.Tensor]
    lengths: torch.Tensor | None = None

    @classmethod
    def of(cls, ids: torch.Tensor, weights: torch.Tensor, lengths: torch.Tensor | None = None) -> Layout:
        """At every resolution of a network, from the weights (B, S, h, w) at that of the batch."""
        levels: dict[tuple[int, int], torch.Tensor] = {}
        while (grid := (weights.shape[-2], weights.shape[-1])) not in levels:
            levels[grid] = weights.flatten(2)
            weights = average(weights, 2)
        orders = {}
        if ids.shape[1] > 1 and backend.ordered(ids.device):
            large = {grid: level for grid, level in levels.items() if level.shape[2] > TILE}
            orders = {grid: ops.region_order(ids, level) for grid, level in large.items()}
        return cls(ids, levels, orders, lengths)

    def weights_at(self, grid: tuple[int, int]) -> torch.Tensor:
        """(B, S, h w): the weight of each prompt in `ids` at the queries of a feature map."""
        if grid in self.weights:
            return self.weights[grid]
        whole = next(iter(self.weights))
        return torch.nn.functional.adaptive_avg_pool2d(self.weights[whole].unflatten(-1, whole), grid).flatten(2)


class PromptWeights:
    """Lays out the shares of a `RegionMap` over the prompts of a bank; what does not change is kept."""

    def __init__(self, regions: RegionMap, bank: PromptBank):
        self.regions, self.bank = regions, bank
        self._layouts: dict[tuple, Layout] = {}  # of the batches of a step, and of the steps that are like it
        self._laid_out: tuple | None = None
        self._placed: dict[tuple, tuple] = {}

    def layout(
        self, windows: WindowBatch, batch: torch.Size, device: torch.device, base: tuple[int, int] | None = None
    ) -> Layout:
        """The layout of a batch [uncond, cond] of the windows, [cond], or of `windows.branches`.

        What is captured is laid out by the graph itself, every time.

        Args:
            batch: (B, C, h, w).
            base: (pictures, branches) of which the bank has base prompts, branches with the conditional one first;
                None: those of [uncond, cond] or [cond] of the windows' pictures, as they come in the batch.

        Raises:
            ValueError: for a batch that is not of the windows, and for numbers of pictures that do not fit.
        """
        (h, w), elements, count = tuple(batch[-2:]), batch[0], len(windows.rows)
        branches = windows.branches or ((False, True) if elements == 2 * count else (True,))
        if windows.plan.window != (h, w) or elements != len(branches) * count:
            expected = f"{count} windows of {windows.plan.window}, or twice as many with the unconditional ones first"
            if windows.branches:
                expected = f"{len(branches)} times {count} windows of {windows.plan.window}"
            raise ValueError(f"sample: expected {expected}, got {elements} of {(h, w)}")
        weights = self.regions.weights(windows.progress)
        if windows.captured:
            return self._made(windows, branches, device, base)
        where = self.bank.version, windows.plan, windows.view, weights, branches, device
        laid_out = *where, base, torch.is_inference_mode_enabled()  # whose tensors are of no use outside of it
        if self._laid_out != laid_out or len(self._layouts) == KEPT:
            self._laid_out, self._layouts = laid_out, {}
        rows = tuple(windows.rows.flatten().tolist())
        if rows not in self._layouts:
            self._layouts[rows] = self._made(windows, branches, device, base)
        return self._layouts[rows]

    def _made(self, windows, branches, device, base):
        ids, slots, lists = self._attended(windows.rows, branches, device, base)
        shares = self.regions.windows_at(windows.plan, lists, windows.origins, windows.progress, windows.view)
        shares = shares.to(device).repeat(len(branches), 1, 1, 1)
        weights = torch.einsum("brs,brhw->bshw", slots, shares.double()).float().contiguous()
        return Layout.of(ids, weights, self.bank.lengths)

    def _attended(self, rows, branches, device, base):
        """On the device: the ids, the slots of the regions in them as one-hot rows, the list of each row's picture."""
        pictures = int(rows[:, 0].max()) + 1 if base is None else base[0]
        if pictures % self.regions.pictures:
            raise ValueError(
                f"regions: expected one list, or one for each of {pictures} pictures, got {self.regions.pictures}"
            )
        placed = self.bank.version, tuple(rows[:, 0].tolist()), branches, device, base
        placed += (torch.is_inference_mode_enabled(),)
        if placed not in self._placed:
            if any(version != self.bank.version for version, *_ in self._placed):
                self._placed.clear()
            lists = rows[:, 0] * self.regions.pictures // pictures
            elements = _elements(rows[:, 0].tolist(), lists.tolist(), branches, base, pictures)
            ids, slots = self.bank.attended(elements, self.regions.masks.shape[1])
            # float64: products with 0 and 1, which no reduced precision of matrix products may round
            slots = torch.nn.functional.one_hot(slots, ids.shape[1]).double()
            self._placed[placed] = ids.to(device), slots.to(device), lists.to(self.regions.masks.device)
        return self._placed[placed]


def _elements(pictures, lists, branches, base, count):
    """(base prompt, list of regions, whether conditional) of each element of the batch."""
    if base is not None and base[1] < len(branches):
        raise ValueError(
            "sample: expected conditional windows alone, as there is no negative prompt, got unconditional ones too"
        )
    elements = []
    for branch, conditional in enumerate(branches):
        for picture, regions in zip(pictures, lists):
            if base is None:
                prompt = branch * count + picture
            else:
                prompt = picture if conditional else base[0] + picture
            elements.append((prompt, regions, conditional))
    return elements

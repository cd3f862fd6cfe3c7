"""Window plans: which native windows cover the canvas, and how much each says where they overlap.

Plain geometry, no kernels. Lengths are in cells (latent pixels); an origin is the (y, x) of a window's upper left cell.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.utils._python_dispatch import _disable_current_modes

from .checks import flag, integer, pair, positive

WEIGHT_KINDS = ("uniform", "linear", "gaussian", "cosine")
GAUSSIAN_VARIANCE = 0.01  # of a window of length 1: the value in common use for latent tiles

_CPU = torch.device("cpu")
_FAKE = torch._C._TorchDispatchModeKey.FAKE


class PlanTables(NamedTuple):
    """A plan's windows as the operations read them: int32 tensors on one device.

    Attributes:
        origins: (n, 2), the (y, x) of each window.
        cover_start, cover_index: which windows touch each tile of the canvas. Those of tile i (row-major) are
            cover_index[cover_start[i]:cover_start[i + 1]], ascending.
    """

    origins: torch.Tensor
    cover_start: torch.Tensor
    cover_index: torch.Tensor


def outside_of_modes() -> contextlib.AbstractContextManager:
    """Where tensors are made that others will use later: no inference mode, fake tensors, functorch or tracing."""
    modes = torch._C._len_torch_dispatch_stack() or torch._C._functorch.peek_interpreter_stack()
    if not modes and not torch.is_inference_mode_enabled():
        return contextlib.nullcontext()
    outside = contextlib.ExitStack()
    for leave in (torch.inference_mode(False), _disable_current_modes(), temporarily_clear_interpreter_stack()):
        outside.enter_context(leave)
    return outside


def _even_origins(name: str, length: int, window: int, wrap: bool, shift: int) -> np.ndarray:
    """Origins of the ceil(length / window) windows spread evenly over one axis."""
    n = -(-length // window)
    if wrap:  # the circle has no ends: spread over its whole length
        return (np.arange(n) * length // n + shift) % length
    if shift:
        raise ValueError(
            f"shift: expected 0 on the {name} axis, which does not wrap (a shifted minimum cover would leave "
            f"cells uncovered), got {shift}"
        )
    if n == 1:
        return np.zeros(1, dtype=np.int64)
    return np.arange(n) * (length - window) // (n - 1)


def _strided_origins(length: int, window: int, stride: int, wrap: bool) -> np.ndarray:
    if wrap:
        return np.arange(0, length, stride) if length > window else np.zeros(1, dtype=np.int64)
    origins = np.arange(0, length - window + 1, stride)
    return origins if origins[-1] == length - window else np.append(origins, length - window)


@dataclass(frozen=True, eq=False)
class WindowPlan:
    """Windows of one size that together cover every cell of a canvas, or, of a partial plan, some.

    Args:
        height, width: the canvas, in cells.
        window: (h, w) of every window, or one integer for both; not larger than the canvas.
        origins: (n, 2) integers, the (y, x) of each window's upper left cell. On an axis that does not wrap,
            0 <= origin <= length - window; on one that wraps, origins are taken modulo the length.
        wrap: (vertical, horizontal): whether the axis is a circle, so that a window may cross its border.
        partial: whether cells may be left uncovered, for which `ops.guided_step` takes the latest prediction; there may
            be no window at all.

    Attributes:
        count: number of windows: network evaluations per step and branch.
        partial: whether a cell is left uncovered.

    Raises:
        TypeError, ValueError: for sizes that are not positive integers, windows outside the canvas, and for origins
            that leave a cell uncovered where `partial` does not allow it.

    Plans compare and hash by value. `minimum_coverage` and `strided` make the two usual ones.
    """

    height: int
    width: int
    window: tuple[int, int]
    origins: np.ndarray
    wrap: tuple[bool, bool] = (False, False)
    partial: bool = False
    count: int = field(init=False, repr=False)
    calls: dict[Any, Any] = field(init=False, repr=False)  # what ran before on this plan (ops.registration.repeated)
    _tables: dict[torch.device, PlanTables] = field(init=False, repr=False)

    def __post_init__(self):
        put = functools.partial(object.__setattr__, self)
        put("height", positive("height", self.height))
        put("width", positive("width", self.width))
        put("window", pair("window", self.window, positive))
        put("wrap", pair("wrap", self.wrap, flag))
        size = np.array([self.height, self.width])
        if (np.array(self.window) > size).any():
            raise ValueError(f"window: expected at most the canvas ({self.height}, {self.width}), got {self.window}")
        given = np.asarray(self.origins)
        least = 0 if flag("partial", self.partial) else 1
        if given.ndim != 2 or given.shape[1] != 2 or given.shape[0] < least:
            raise ValueError(f"origins: expected shape (n, 2) with n >= {least}, got {given.shape}")
        if not np.issubdtype(given.dtype, np.integer):
            raise TypeError(f"origins: expected integers, got {given.dtype}")
        origins = given.astype(np.int64)
        for axis, (length, window, wraps) in enumerate(zip(size, self.window, self.wrap)):
            if wraps:
                origins[:, axis] %= length
            elif len(origins) and (origins[:, axis].min() < 0 or origins[:, axis].max() > length - window):
                raise ValueError(
                    f"origins: expected 0 to {length - window} on axis {axis}, which does not wrap, "
                    f"got {origins[:, axis].min()} to {origins[:, axis].max()}"
                )
        origins.setflags(write=False)
        put("origins", origins)
        put("count", len(origins))
        put("calls", {})
        axes = self._axes()
        holes = _leaves_holes(*axes)
        if holes and not self.partial:
            uncovered = np.argwhere(self.coverage() == 0)
            y, x = uncovered[0]
            raise ValueError(f"origins: expected every cell covered, got {len(uncovered)} uncovered, first ({y}, {x})")
        put("partial", holes)
        # at once: made at first use they could be made inside of a mode, and hold for nothing outside of it
        arrays = (origins, *_covering_windows(*axes))
        with outside_of_modes():
            put("_tables", {_CPU: PlanTables(*(torch.from_numpy(np.array(a, dtype=np.int32)) for a in arrays))})

    def __reduce__(self):
        return type(self), (self.height, self.width, self.window, self.origins, self.wrap, self.partial)

    @classmethod
    def minimum_coverage(
        cls,
        height: int,
        width: int,
        window: int | tuple[int, int] = 64,
        *,
        wrap: bool | tuple[bool, bool] = (False, False),
        shift: int | tuple[int, int] = (0, 0),
    ) -> WindowPlan:
        """The fewest windows that cover the canvas: ceil(height / h) * ceil(width / w) (InstantAS, minimum coverage).

        An axis not longer than the window has one window, of the axis's length. Otherwise the windows keep their native
        length and spread evenly; they do not overlap where the window divides the length.

        Args:
            shift: (vertical, horizontal) cells by which the windows move; only along axes that wrap.
        """
        height, width = positive("height", height), positive("width", width)
        (h, w), wraps = pair("window", window, positive), pair("wrap", wrap, flag)
        shifts = pair("shift", shift, integer)
        h, w = min(h, height), min(w, width)
        ys = _even_origins("vertical", height, h, wraps[0], shifts[0])
        xs = _even_origins("horizontal", width, w, wraps[1], shifts[1])
        return cls.grid(height, width, (h, w), ys, xs, wrap=wraps)

    @classmethod
    def strided(
        cls,
        height: int,
        width: int,
        window: int | tuple[int, int] = 64,
        stride: int | tuple[int, int] = 8,
        *,
        wrap: bool | tuple[bool, bool] = (False, False),
    ) -> WindowPlan:
        """A window at every multiple of the stride (MultiDiffusion), the last one flush with the edge.

        Args:
            stride: (vertical, horizontal) or one integer, at most the window.
        """
        height, width = positive("height", height), positive("width", width)
        (h, w), wraps = pair("window", window, positive), pair("wrap", wrap, flag)
        strides = pair("stride", stride, positive)
        h, w = min(h, height), min(w, width)
        ys = _strided_origins(height, h, strides[0], wraps[0])
        xs = _strided_origins(width, w, strides[1], wraps[1])
        return cls.grid(height, width, (h, w), ys, xs, wrap=wraps)

    @classmethod
    def grid(
        cls,
        height: int,
        width: int,
        window: int | tuple[int, int],
        ys: Sequence[int] | np.ndarray,
        xs: Sequence[int] | np.ndarray,
        *,
        wrap: bool | tuple[bool, bool] = (False, False),
        partial: bool = False,
    ) -> WindowPlan:
        """A window at every (y, x) of ys times xs, row by row."""
        origins = np.stack([np.repeat(ys, len(xs)), np.tile(xs, len(ys))], axis=1)
        return cls(height, width, pair("window", window, positive), origins, pair("wrap", wrap, flag), partial)

    def subset(self, chosen: Sequence[bool] | np.ndarray | torch.Tensor) -> WindowPlan:
        """The plan of some of the windows, which may be partial.

        Args:
            chosen: (n,) booleans, or indices.

        Raises:
            ValueError, IndexError: for anything else.
        """
        chosen = np.asarray(chosen, dtype=None if len(chosen) else np.int64)
        if chosen.dtype == bool and chosen.shape != (self.count,):
            raise ValueError(f"chosen: expected ({self.count},) booleans, got {chosen.shape}")
        return WindowPlan(self.height, self.width, self.window, self.origins[chosen], self.wrap, partial=True)

    def holding(self, cells: np.ndarray) -> np.ndarray:
        """(n,) bool, which windows hold one of the cells (height, width) that are True."""
        (h, w), (y, x) = self.window, self.origins.T
        # sums over all rectangles that begin in the corner of the unrolled canvas; a window is made of four
        sums = np.pad(np.pad(cells, ((0, h), (0, w)), mode="wrap").cumsum(0).cumsum(1), ((1, 0), (1, 0)))
        return sums[y + h, x + w] - sums[y, x + w] - sums[y + h, x] + sums[y, x] > 0

    @property
    def lower_bound(self) -> int:
        """ceil(height / h) * ceil(width / w): no cover by such windows has fewer."""
        h, w = self.window
        return -(-self.height // h) * -(-self.width // w)

    @property
    def overlap(self) -> float:
        """Cells painted more than once, as a share of the canvas: count * h * w / (height * width) - 1."""
        return self.count * self.window[0] * self.window[1] / (self.height * self.width) - 1

    def coverage(self) -> np.ndarray:
        """(height, width) int64: how many windows cover each cell."""
        (h, w), (y, x) = self.window, self.origins.T
        # each window adds +1 -1 -1 +1 at its corners on the unrolled canvas; two cumulative sums fill it in
        cover = np.zeros((self.height + h + 1, self.width + w + 1), dtype=np.int64)
        for dy, dx, sign in ((0, 0, 1), (0, w, -1), (h, 0, -1), (h, w, 1)):
            np.add.at(cover, (y + dy, x + dx), sign)
        cover = cover.cumsum(0).cumsum(1)
        cover[:h] += cover[self.height : self.height + h]
        cover[:, :w] += cover[:, self.width : self.width + w]
        return cover[: self.height, : self.width].copy()

    def _axes(self) -> list[_Axis]:
        axes = zip((self.height, self.width), self.window, self.tile, self.origins.T)
        return [_axis(length, window, tile, origins.tobytes()) for length, window, tile, origins in axes]

    def weight(self, kind: str = "uniform") -> torch.Tensor:
        """(h, w) float32 overlap weight of a window, positive everywhere.

        uniform: 1. linear: a ramp from each edge to the middle. cosine: half a period of a sine over each axis.
        gaussian: variance 0.01 of the window's length, as is usual for latent tiles. Always float32: in half precision
        the Gaussian is 0 in the window's corners. ValueError for another kind.
        """
        with torch.inference_mode(False):
            return torch.outer(*(_axis_weight(kind, length) for length in self.window)).float()

    @property
    def geometry(self) -> list[int]:
        """[height, width, h, w, wrap_y, wrap_x, tile_y, tile_x]: what every operation on windows is given."""
        return [self.height, self.width, *self.window, *map(int, self.wrap), *self.tile]

    @property
    def tile(self) -> tuple[int, int]:
        """(rows, columns) of the canvas tiles for which `tables` lists the covering windows.

        Wide enough for whole 128-byte lines, no wider than a window (rounded down to a power of two), so that at
        minimum coverage a tile meets few windows.
        """
        return 8, min(64, max(8, 1 << (self.window[1].bit_length() - 1)))

    def tables(self, device: torch.device) -> PlanTables:
        """What the operations are given, on the device. Copied there once."""
        if torch.compiler.is_dynamo_compiling():
            found = self._tables.get(device)
            return PlanTables(*(table.to(device) for table in self._tables[_CPU])) if found is None else found
        if torch._C._get_dispatch_mode(_FAKE) is not None:  # fake tensors go together with fake ones alone
            return PlanTables(*(torch.ops.aten.lift_fresh(table).to(device) for table in self._tables[_CPU]))
        if device not in self._tables:
            with outside_of_modes():
                host = self._tables[_CPU]
                self._tables[device] = PlanTables(*(table.to(device, non_blocking=True) for table in host))
        return self._tables[device]

    def with_tables(self, tables: PlanTables) -> WindowPlan:
        """This plan, with tables of its owner's for the operations on their device.

        For windows whose places are known there alone, as in a CUDA graph that moves them: as many windows, of the same
        size, on the same canvas. `origins`, and what compares plans, stay what they are.
        """
        plan = copy.copy(self)
        plan._tables[tables.origins.device] = tables
        return plan

    def plot(self, path: str | os.PathLike) -> None:
        """Draw the layout to a picture file (needs matplotlib); the shade says how many windows cover a cell."""
        from .plots import plot_plan

        plot_plan(self, path)

    def _key(self):
        return self.height, self.width, self.window, self.wrap, self.origins.tobytes()

    def __eq__(self, other):
        return self._key() == other._key() if isinstance(other, WindowPlan) else NotImplemented

    def __hash__(self):
        return hash(self._key())

    def __repr__(self):
        more = f", wrap={self.wrap}" if any(self.wrap) else ""
        more += ", partial" if self.partial else ""
        size = f"{self.height}x{self.width}"
        return f"WindowPlan({size}, {self.count} windows of {self.window}, overlap {self.overlap:.2f}{more})"


class _Axis(NamedTuple):
    """What follows from the different origins on one axis of a plan.

    Attributes:
        which: (n,), which of them each window has.
        inside: bool, (places, origins), over which places of those where coverage changes their windows lie.
        touches: bool, (origins, tiles), which tiles their windows touch.
        tile, counts, firsts: the tiles that they touch, origin by origin; how many each does, and where its first is.
    """

    which: np.ndarray
    inside: np.ndarray
    touches: np.ndarray
    tile: np.ndarray
    counts: np.ndarray
    firsts: np.ndarray


@functools.lru_cache(256)  # many plans have an axis in common
def _axis(length: int, window: int, tile: int, origins: bytes) -> _Axis:
    values, which = np.unique(np.frombuffer(origins, dtype=np.int64), return_inverse=True)
    places = np.concatenate([[0], values, (values + window) % length])  # coverage changes where windows begin and end
    inside = (places[:, None] - values) % length < window
    begin = np.arange(0, length, tile)
    after = (values[:, None] - begin) % length  # cells from a tile's beginning to a window's
    touches = (after < np.minimum(tile, length - begin)) | (length - after < window)
    count = touches.sum(1)
    return _Axis(which, inside, touches, np.nonzero(touches)[1], count, count.cumsum() - count)


def _leaves_holes(rows: _Axis, columns: _Axis) -> bool:
    """Whether a plan's coverage has a 0, without laying out the canvas."""
    there = np.zeros((len(rows.counts), len(columns.counts)), dtype=bool)
    there[rows.which, columns.which] = True
    if there.all():  # a grid: each axis by itself
        return not (rows.inside.any(1).all() and columns.inside.any(1).all())
    down, across = (axis.inside.astype(np.float32) for axis in (rows, columns))
    return bool((down @ there @ across.T == 0).any())


def _covering_windows(rows: _Axis, columns: _Axis) -> tuple[np.ndarray, np.ndarray]:
    """`PlanTables.cover_start` and `cover_index`."""
    # join, per window, its tile rows with its tile columns; then sort by tile, keeping windows ascending
    window, down = np.nonzero(rows.touches[rows.which])
    which = columns.which[window]
    count = columns.counts[which]
    pairs = count.cumsum()
    across = columns.tile[np.arange(count.sum()) + np.repeat(columns.firsts[which] - pairs + count, count)]
    tile = np.repeat(down * columns.touches.shape[1], count) + across
    start = np.bincount(tile + 1, minlength=rows.touches.shape[1] * columns.touches.shape[1] + 1).cumsum()
    return start, np.repeat(window, count)[np.argsort(tile, kind="stable")]


def _axis_weight(kind: str, length: int) -> torch.Tensor:
    centre = (torch.arange(length, dtype=torch.float64) + 0.5) / length  # cell centres, in (0, 1)
    match kind:
        case "uniform":
            return torch.ones_like(centre)
        case "linear":
            return 1 - (2 * centre - 1).abs() + 1 / length
        case "cosine":
            return torch.sin(torch.pi * centre)
        case "gaussian":
            return torch.exp(-((centre - 0.5) ** 2) / (2 * GAUSSIAN_VARIANCE))
    raise ValueError(f"weight: expected one of {', '.join(WEIGHT_KINDS)}, got {kind!r}")

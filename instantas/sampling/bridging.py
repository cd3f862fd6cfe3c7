"""Bridges: what ties windows that hardly overlap into one picture, at the cost of minimum coverage.

The InstantAS supplement names inter-domain distribution bridging and gives no formula for it; these bridges are this
library's own, chosen by the measures in `docs/bridging.md`. A bridge decides, before the run, what each step does:
which windows there are, which of them the network is run for, and whether the prediction is adjusted. Plain data, no
kernels.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
import torch

from instantas import ops
from instantas.checks import flag, real
from instantas.windows import WindowPlan, outside_of_modes

WINDOWS, VIEW, PREDICTION = "the windows", "the view", "the prediction"  # no two joined bridges choose the same


@dataclass(frozen=True, eq=False)
class View:
    """A canvas made of the cells of another: seen[i, j] = canvas[rows[i], columns[j]].

    Attributes:
        rows, columns: int64 on the CPU; every row and column of the canvas occurs.
    """

    rows: torch.Tensor
    columns: torch.Tensor
    _placed: dict = field(default_factory=dict, init=False, repr=False)

    def __reduce__(self):
        return type(self), (self.rows, self.columns)

    @functools.cached_property
    def whole(self) -> WindowPlan:
        """The plan of one window that is the canvas."""
        size = int(self.rows.max()) + 1, int(self.columns.max()) + 1
        return WindowPlan.minimum_coverage(*size, size)

    def apply(self, canvas: torch.Tensor) -> torch.Tensor:
        """(..., H, W) -> (..., len(rows), len(columns))."""
        rows, columns, _, _ = self.on(canvas.device)
        return canvas.index_select(-2, rows).index_select(-1, columns)

    def invert(self, seen: torch.Tensor) -> torch.Tensor:
        """The inverse of `apply`; of a cell that was seen more than once, the first."""
        _, _, rows, columns = self.on(seen.device)
        return seen.index_select(-2, rows).index_select(-1, columns)

    def enlarged(self, times: int) -> View:
        """The same of a canvas whose every cell is times x times cells."""
        rows, columns = (
            (index[:, None] * times + torch.arange(times, device=index.device)).flatten()
            for index in (self.rows, self.columns)
        )
        return View(rows, columns)

    def on(self, device: torch.device) -> tuple[torch.Tensor, ...]:
        """rows and columns, and the places in them where each cell is seen first; copied to a device once."""
        if device not in self._placed:
            cells = self.rows.numpy(), self.columns.numpy()
            first = (np.unique(index, return_index=True)[1] for index in cells)
            with outside_of_modes():
                self._placed[device] = tuple(torch.from_numpy(index).to(device) for index in (*cells, *first))
        return self._placed[device]


@dataclass(frozen=True, eq=False)
class Stage:
    """What one step does.

    Attributes:
        plan: the windows for which the network is run, on the canvas of the run or on what the view makes of it. Cells
            that none of them covers, of a partial plan, re-use the latest prediction made there, carried to the step's
            noise level. That of the first step covers all, unless the run begins with predictions (`going_on`).
        weight: overlap weight of the windows; None: the run's own.
        adjust: function of (prediction, sample, context), all (B, C, H, W) but the `step.StepContext`, that returns
            the merged and guided prediction to use.
        view: what the windows are cut from; None: the canvas itself. The windows of a view cover it.
    """

    plan: WindowPlan
    weight: torch.Tensor | None = None
    adjust: Callable | None = None
    view: View | None = None


class Bridge(Protocol):
    """Chooses what each step does."""

    def step(self, step: int, steps: int, plan: WindowPlan) -> Stage:
        """The stage of a step, asked for all steps before the first evaluation; plan: the one `sample` was given."""


@dataclass(frozen=True)
class Shift:
    """Windows that move at every step, so that what was a border is inside a window at the next.

    On an axis of length L = (n - 1) l + r with window l and 0 < r <= l, a moved grid of n windows cannot cover the
    canvas. One window stays flush with one end and n - 1 follow it from

        o = l - 1 - floor(u (l - ceil(r / 2))),    ceil(r / 2) <= o < l,

    u from a low-discrepancy sequence (Roberts' R_2). They reach o + (n - 1) l, pushed back where that is more than L;
    at most r / 2 cells beyond, the rim, re-use the latest prediction made there. The end that is flush changes at every
    step on the horizontal axis and at every second one on the vertical, so that each corner of the canvas has its turn
    in four steps. On an axis that wraps all windows move by floor(u l), and nothing is re-used. Nothing ever joins
    opposite edges that do not wrap.

    Overlaps are blended with weights that fall to the windows' borders. The first and the last step have the windows of
    the run's own plan, so that every cell starts and ends with a prediction of its own. Where the first step has
    something to re-use, `moves_first`, its windows move too, by half of what they can: it leaves no border.

    Evaluations: n windows an axis, as many as minimum coverage has, at each of the max(1, floor(share steps)) steps
    that are evaluated; at the others, spread evenly, every cell re-uses its latest prediction.

    Attributes:
        share: share of the steps that are evaluated, 0 < share <= 1.
        moves_first: whether the run begins with a prediction of every cell, as after a coarse start (`going_on`).
    """

    share: float = 1.0
    moves_first: bool = False

    chooses = WINDOWS

    def __post_init__(self):
        real("share", self.share, 0, 1, above=True)
        flag("moves_first", self.moves_first)

    def step(self, step: int, steps: int, plan: WindowPlan) -> Stage:
        if not _several(plan):
            return Stage(plan)
        count = max(1, math.floor(self.share * steps + 1e-9))  # 0.58 * 50 is 28.999...
        index = round(step * (count - 1) / max(1, steps - 1))
        if round(index * (steps - 1) / max(1, count - 1)) != step:
            return Stage(plan.subset([]))
        if index == count - 1 or (index == 0 and not self.moves_first):
            return Stage(plan)
        far_ends = (index // 2 % 2, index % 2)
        axes = zip((plan.height, plan.width), plan.window, plan.wrap, far_ends, _offsets(index))
        return _windows_at(plan, *(_moved(*axis) for axis in axes))


@dataclass(frozen=True)
class Centred:
    """The resting plan, and between its steps windows centred on its seams.

    Four steps in turn: the resting grid; windows centred on all corners; on the vertical seams; on the horizontal
    seams. Between n windows lie n - 1 seams, so that a step that centres on an axis has n - 1 windows there, and the
    rim of half a window re-uses its latest prediction. An axis with one window has no seams, and does not move; one
    that wraps moves by half a window.

    Evaluations: of n x m windows (nm + (n-1)(m-1) + n(m-1) + (n-1)m) / 4 a step, 0.56 of minimum coverage for 2 x 2.
    """

    chooses = WINDOWS

    def step(self, step: int, steps: int, plan: WindowPlan) -> Stage:
        if not _several(plan) or step % 4 == 0 or step == steps - 1:
            return Stage(plan)
        moves = ((True, True), (False, True), (True, False))[step % 4 - 1]
        kept = []
        for axis, (length, window, wraps, move) in enumerate(
            zip((plan.height, plan.width), plan.window, plan.wrap, moves)
        ):
            origins = np.unique(plan.origins[:, axis])
            if move and wraps:
                origins = (origins + window // 2) % length
            elif move and len(origins) > 1:
                origins = (origins[1:] + origins[:-1]) // 2
            kept.append(origins)
        return _windows_at(plan, *kept)


@dataclass(frozen=True)
class Dilated:
    """In early steps, windows that each see the whole canvas in strides, so that its layout is drawn as one.

    An axis of length L under n windows of length l is seen n times: view p has the cells

        floor((j n + p) L / (n l)),    j = 0 .. l - 1,

    which lie L / l apart; together the views have every cell, each once where the window divides the length. Noise is
    the same at any stride, so that at high noise levels the network takes a view for a picture. Ties far ends
    together: fewer repetitions of a scene, one scene instead. Evaluations: those of minimum coverage.

    Attributes:
        until: part of the run in which the windows are views, 0 < until <= 1.
    """

    until: float = 0.2

    chooses = VIEW

    def __post_init__(self):
        real("until", self.until, 0, 1, above=True)

    def step(self, step: int, steps: int, plan: WindowPlan) -> Stage:
        if not _several(plan) or plan.count == 1 or step >= self.until * steps:
            return Stage(plan)
        counts = [len(np.unique(plan.origins[:, axis])) for axis in (0, 1)]
        sides = [n * window for n, window in zip(counts, plan.window)]
        cells = []
        for length, side, n in zip((plan.height, plan.width), sides, counts):
            view, j = np.divmod(np.arange(side), side // n)
            cells.append(torch.from_numpy((j * n + view) * length // side))
        return Stage(WindowPlan.minimum_coverage(sides[0], sides[1], plan.window), view=View(*cells))


@dataclass(frozen=True)
class Moments:
    """Pulls the mean and spread of each window's predicted x_0 toward those of the whole canvas.

    Of each channel, with mean m_w and standard deviation s_w over a window of the run's plan, m and s over the canvas,

        x_0 <- (x_0 - m_w) (s / s_w)^k + m_w + k (m - m_w),    k = strength (1 - progress / until), never below 0,

    where the windows overlap their results are averaged. x_0 is read off the merged, guided prediction by the model's
    prediction type and turned back into it. No evaluations. Ties brightness and colour; with regions it pulls those of
    different prompts toward each other too.

    Attributes:
        strength: 0 to 1.
        until: part of the run after which it does nothing, 0 < until <= 1.
    """

    strength: float = 1.0
    until: float = 0.5

    chooses = PREDICTION

    def __post_init__(self):
        real("strength", self.strength, 0, 1)
        real("until", self.until, 0, 1, above=True)

    def step(self, step: int, steps: int, plan: WindowPlan) -> Stage:
        pull = self.strength * (1 - step / (self.until * steps))
        if not _several(plan) or pull <= 0:
            return Stage(plan)

        def adjust(prediction, sample, context):
            clean = context.level.clean(prediction, sample)
            windows = ops.gather_windows(clean, plan)
            mean, spread = windows.mean((-2, -1), keepdim=True), windows.std((-2, -1), keepdim=True)
            target_mean = clean.mean((-2, -1), keepdim=True)[:, None]
            target_spread = clean.std((-2, -1), keepdim=True)[:, None]
            ratio = (target_spread / spread.clamp(min=1e-3)) ** pull  # a flat window has no spread to widen
            matched = (windows - mean) * ratio + mean + pull * (target_mean - mean)
            return context.level.prediction(ops.scatter_windows(matched, plan), sample)

        return Stage(plan, adjust=adjust)


@dataclass(frozen=True)
class Joined:
    """Several bridges at once, each choosing something else: `bridge("shift+moments")` makes one.

    Raises:
        ValueError: for bridges that choose the same.
    """

    bridges: tuple

    def __post_init__(self):
        chosen = [getattr(bridge, "chooses", type(bridge)) for bridge in self.bridges]
        for i, what in enumerate(chosen):
            if what in chosen[:i]:
                pair = [type(b).__name__ for b, w in zip(self.bridges, chosen) if w == what]
                raise ValueError(f"bridging: expected bridges that choose different things, got {pair}, both {what}")

    def step(self, step: int, steps: int, plan: WindowPlan) -> Stage:
        stages = [bridge.step(step, steps, plan) for bridge in self.bridges]
        adjust = next((s.adjust for s in stages if s.adjust is not None), None)
        moved = next((s for s in stages if s.plan is not plan and s.view is None), stages[0])
        seen = next((s for s in stages if s.view is not None), None)
        chosen = moved if seen is None or not moved.plan.count else seen
        return replace(chosen, adjust=adjust)


def _several(plan: WindowPlan) -> bool:
    """Whether there is anything to bridge: more than one window, or one whose own edges should meet."""
    if plan.count != plan.lower_bound:
        raise ValueError(
            f"bridging: expected a plan of the fewest windows, {plan.lower_bound}, got {plan.count}; windows that "
            "overlap need no bridge"
        )
    return plan.count > 1 or any(plan.wrap)


def _offsets(index: int) -> tuple[float, float]:
    """Point of Roberts' R_2 sequence: shares in [0, 1) that fill the unit square evenly."""
    plastic = 1.324717957244746  # x^3 = x + 1
    return (0.5 + index / plastic) % 1, (0.5 + index / plastic**2) % 1


def _moved(length: int, window: int, wraps: bool, far_end: int, u: float) -> np.ndarray:
    """Origins of the windows that are evaluated on one axis."""
    n = -(-length // window)
    if wraps:
        return (np.arange(n) * length // n + int(u * window)) % length
    if n == 1:
        return np.zeros(1, dtype=np.int64)
    reach = window - -(-(length - (n - 1) * window) // 2)
    first = window - min(1 + int(u * reach), reach)
    origins = np.append(0, np.minimum(first + window * np.arange(n - 1), length - window))
    return length - window - origins[::-1] if far_end else origins


def _windows_at(plan: WindowPlan, rows: np.ndarray, columns: np.ndarray) -> Stage:
    """The stage of windows at rows x columns."""
    axes = np.unique(rows), np.unique(columns)
    moved = WindowPlan.grid(plan.height, plan.width, plan.window, *axes, wrap=plan.wrap, partial=True)
    return Stage(moved, moved.weight("linear"))


BRIDGES: dict[str, Bridge] = {
    "shift": Shift(),
    "economy": Shift(share=0.65),
    "centred": Centred(),
    "dilated": Dilated(),
    "moments": Moments(),
}
DEFAULT = "shift"


def bridge(name: str | Bridge | None) -> Bridge | None:
    """The bridge of a name: one of `BRIDGES`, "default", "none" (None), or several joined by "+".

    A bridge object or None is returned as it is.

    Raises:
        ValueError: for an unknown name, and for bridges that cannot be joined.
        TypeError: for anything else.
    """
    if not isinstance(name, str):
        if name is None or callable(getattr(name, "step", None)):
            return name
        raise TypeError(f"bridging: expected a name or a bridge, got {type(name).__name__}")
    if name == "none":
        return None
    names = [DEFAULT if each == "default" else each for each in name.split("+")]
    if not all(each in BRIDGES for each in names):
        offered = ", ".join(["none", "default", *BRIDGES])
        raise ValueError(f"bridging: expected one of {offered}, or several joined by '+', got {name!r}")
    return BRIDGES[names[0]] if len(names) == 1 else Joined(tuple(BRIDGES[each] for each in names))


def going_on(bridge: Bridge | None) -> Bridge | None:
    """The bridge of a run that begins with a prediction of every cell, which its first step may re-use."""
    if isinstance(bridge, Joined):
        return replace(bridge, bridges=tuple(map(going_on, bridge.bridges)))
    return replace(bridge, moves_first=True) if isinstance(bridge, Shift) else bridge


def evaluations(
    bridging: str | Bridge | None,
    plan: WindowPlan,
    steps: int,
    first: int | None = None,
    painted: torch.Tensor | None = None,
) -> int:
    """Windows evaluated in a whole run of that many scheduler evaluations, for one picture and one branch of guidance.

    Minimum coverage without re-use has steps * plan.lower_bound.

    Args:
        bridging: a name or an object as `bridge` takes it.
        first: those in its first so many steps; None: in all.
        painted: (H, W) bool on the CPU, the cells that are painted of a canvas that is known elsewhere; None: all.
    """
    bridging, first = bridge(bridging), steps if first is None else first
    stages = [Stage(plan)] * first if bridging is None else [bridging.step(i, steps, plan) for i in range(first)]
    return sum(stage.plan.count for stage in (stages if painted is None else limited(stages, painted)))


def limited(stages: Sequence[Stage], cells: torch.Tensor) -> list[Stage]:
    """Stages without the windows that hold none of the cells, (H, W) bool on the CPU.

    Each window of a view sees the whole canvas: they stay, unless there are no cells at all.
    """
    chosen = cells.numpy()
    found = {id(stage): _limited(stage, chosen) for stage in {id(stage): stage for stage in stages}.values()}
    return [found[id(stage)] for stage in stages]


def _limited(stage, chosen):
    if stage.view is None:
        held = stage.plan.holding(chosen)
        return stage if held.all() else replace(stage, plan=stage.plan.subset(held))
    nothing = np.empty((0, 2), dtype=np.int64)
    return stage if chosen.any() else Stage(WindowPlan(*chosen.shape, stage.plan.window, nothing, partial=True))

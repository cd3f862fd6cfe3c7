"""What `bench.gpu` measures: the operations against their rivals, and the speeds that the design asks for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch

from instantas import ops
from instantas.bench import cases
from instantas.bench.measure import Comparison, compare
from instantas.windows import WindowPlan

HARD = (1, 4, 16)  # regions


class Sizes(NamedTuple):
    """What is measured: a canvas of 64 MB in half precision, and the largest cross-attention layer of SD 2.0."""

    side: int = 1024
    channels: int = 16
    batch: int = 2
    windows: tuple[int, ...] = (8, 32)
    layer: dict[str, int] = dict(queries=4096, heads=5, depth=64, tokens=77)
    seconds: float = 2.0  # for each comparison
    compiled: bool = True


SMALL = Sizes(128, 2, 1, (1,), dict(queries=256, heads=1, depth=16, tokens=9), seconds=0.01, compiled=False)


class Line(NamedTuple):
    """A speed that the design asks for."""

    what: str
    measured: float
    wanted: str
    met: bool


class Field:
    """The contenders of a process's comparisons: who may not run, who runs at the moment, who fails.

    Args:
        lost: contenders that an earlier process did not survive, and how it ended.
        running: called with the name of a contender, and whether it is ours, before it runs.
        failed: called with the name of a contender that raises or disagrees, whether it is ours, and the error.
    """

    def __init__(
        self,
        lost: Mapping[str, str],
        running: Callable[[str, bool], object],
        failed: Callable[[str, bool, Exception], object],
    ):
        self.lost, self.running, self.failed = lost, running, failed

    def compare(self, title, inputs, contenders, exact, *, rivals=None, absent=None, **options) -> Comparison:
        """`measure.compare` of those that may run; one that fails is left out."""
        rivals = rivals or {}
        ours, theirs = ({n: run for n, run in runs.items() if n not in self.lost} for runs in (contenders, rivals))
        gone = {name: why for name, why in self.lost.items() if name in contenders or name in rivals}
        options["running"] = lambda name: self.running(name, name in ours)
        options["failed"] = lambda name, error: self.failed(name, name in ours, error)
        return compare(title, inputs, ours, exact, rivals=theirs, absent=(absent or {}) | gone, **options)


def comparisons(
    device: torch.device, sizes: Sizes, field: Field
) -> Iterator[tuple[str, str, Callable[[], Comparison]]]:
    """(operation, key, comparison) of all that is measured; of each operation the most important first."""
    common = dict(device=device, seconds=sizes.seconds, left_out=("reference",), measure=field.compare)
    layer = dict(dtype=torch.bfloat16, **common, **sizes.layer)
    for windows in sizes.windows:
        one, four = (dict(windows=windows, compiled=sizes.compiled and regions > 1, **layer) for regions in (1, 4))
        yield "attention", f"attention 1 {windows}", lambda o=one: cases.attention(1, **o)
        yield "attention", f"attention 4 {windows}", lambda o=four: cases.attention(4, **o)
        yield "attention", f"hard {windows}", lambda w=windows: _hard_regions(w, device, sizes, field)
    for mode in ("blend", "joint"):
        soft = layer | dict(soft=True, windows=sizes.windows[0], mode=mode)
        yield "attention", f"soft {mode}", lambda o=soft: cases.attention(4, **o)
    plan = WindowPlan.minimum_coverage(sizes.side, sizes.side)
    strided = WindowPlan.strided(sizes.side // 2, sizes.side // 2, 64, 32)
    for dtype in (torch.bfloat16, torch.float32):
        name, options = str(dtype)[6:], common | dict(channels=sizes.channels, batch=sizes.batch, dtype=dtype)
        yield "step", f"step {name}", lambda o=options: cases.step(plan, history=1, **o)
        yield "step", f"strided step {name}", lambda o=options: cases.step(strided, weight="gaussian", history=1, **o)
        yield "scatter", f"scatter {name}", lambda o=options: cases.scatter(plan, **o)
        yield "gather", f"gather {name}", lambda o=options: cases.gather(plan, **o)


def _hard_regions(windows, device, sizes, field):
    """The default backend with 1, 4 and 16 hard regions, in the same laps."""
    queries, heads, depth, tokens = (sizes.layer[name] for name in ("queries", "heads", "depth", "tokens"))
    calls, exact = {}, {}
    for regions in HARD:
        ids, weights = cases.stripes(regions, windows, queries, False, device)
        order = ops.region_order(ids, weights)
        given = dict(prompt_ids=ids, weights=weights, order=order)
        calls[f"R = {regions}"] = lambda q, k, v, given=given: ops.regional_attention(q, k, v, **given)
        exact[f"R = {regions}"] = cases.exact_attention(ids, weights)
    size = torch.bfloat16.itemsize * heads * depth
    return field.compare(
        f"regional_attention, {windows} x {queries} queries, {heads} x {depth}, {tokens} tokens, by number of regions",
        cases.bank_inputs(max(HARD), windows, queries, heads, depth, tokens, device, torch.bfloat16),
        calls,
        exact,
        bytes=size * (2 * windows * queries + 2 * tokens) + 4 * windows * queries,
        flops=4 * windows * queries * heads * depth * tokens,
        seconds=sizes.seconds,
    )


def lines(key: str, comparison: Comparison) -> list[Line]:
    """The design's speeds that a comparison shows; none where ours is not among those that could be timed."""
    result, ours = [], comparison.timings[0]
    rivals = [t.name for t in comparison.timings if not t.name.startswith(("instantas", "R ="))]
    operation, *_, last = key.split()

    def at_least(what, value, wanted):
        result.append(Line(what, value, f">= {wanted:g}", value >= wanted))

    if ours.name in rivals:
        return []
    if operation in ("gather", "scatter", "step"):
        at_least(f"{operation}, {last}: share of copy bandwidth", comparison.share(ours.name), 0.9)
    if operation == "step" and (eager := [name for name in rivals if "compiled" not in name]):
        at_least(f"step, {last}: times as fast as eager", comparison.best(eager).median / ours.median, 4)
    if operation == "attention":
        regions = int(key.split()[1])
        at_least(f"attention, R = {regions}, {last} windows: share of the floor", comparison.share(ours.name), 0.75)
        if rivals:
            best = comparison.best(rivals)
            what = f"attention, R = {regions}, {last} windows: times as fast as {best.name}"
            at_least(what, best.median / ours.median, 1 if regions == 1 else 3)
    if operation == "hard" and ours.name == "R = 1":
        for timing in comparison.timings[1:]:
            what = f"attention, {timing.name} / R = 1, {last} windows"
            result.append(Line(what, timing.ratio, "<= 1.15", timing.ratio <= 1.15))
    return result

"""Layers of an autoencoder on one tile of a picture after the other, as they are on all of it.

Two things reach across a picture: convolutions, by as far as `reach` says, so tiles have a halo of it; and group norms,
by their statistics, which are the whole picture's (`Statistics`). The layers themselves are not touched: what they call
is answered here, in this thread, while a mode is entered.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers.models.upsampling import Upsample2D
from torch import nn
from torch.overrides import TorchFunctionMode

from instantas.sampling.parallel import Ranks

BLOCK = 8  # cells: side of the blocks that a sample is made of
SAMPLE = 64, 128  # cells: least and greatest side of the sample whose statistics are the first guess
ROUNDS, NEAR = 3, 0.15  # at most so many passes for statistics: another one where the last found them off by more


Layers = Callable[[torch.Tensor], torch.Tensor]
Moments = tuple[torch.Tensor, torch.Tensor]


class Span(NamedTuple):
    """One tile on one axis, in cells: what it is to give, and what it is given, which has a halo and may wrap."""

    start: int
    stop: int
    first: int
    last: int


def spans(length: int, side: int, halo: int, wraps: bool) -> list[Span]:
    """Tiles of at most `side` cells, as even as can be, with a halo that ends where the picture does."""
    count = math.ceil(length / side)
    bounds = [i * length // count for i in range(count + 1)]
    low, high = (-halo, length + halo) if wraps else (0, length)
    return [Span(a, b, max(a - halo, low), min(b + halo, high)) for a, b in itertools.pairwise(bounds)]


def reach(modules: Iterable[nn.Module]) -> tuple[int, float]:
    """(pixels of input by which layers, in order, look beyond an output's own, pixels of input to one of output)."""
    pixels, step = 0.0, 1.0
    for module in itertools.chain.from_iterable(module.modules() for module in modules):
        if isinstance(module, (Upsample2D, nn.Upsample)):
            step /= 2
        elif isinstance(module, nn.Conv2d):
            size, padding, stride = (int(of[0]) for of in (module.kernel_size, module.padding, module.stride))
            pixels += step * max(padding, size - 1 - padding)
            step *= stride
    return math.ceil(pixels), step


def in_tiles(
    layers: Layers,
    given: torch.Tensor,
    rows: Sequence[Span],
    columns: Sequence[Span],
    unit: int,
    norms: bool,
    ranks: Ranks | None = None,
) -> torch.Tensor:
    """layers(given), a tile at a time; arguments as of `in_bands`, and the processes that share the tiles."""
    evaluate = _evaluator(layers, given, rows, columns, unit, norms, ranks)
    tiles = list(itertools.product(rows, columns))
    own = tiles if ranks is None else tiles[ranks.dealt(len(tiles), 1)]
    found: Iterator[torch.Tensor] = (evaluate(row, column) for row, column in own)
    if ranks is not None:
        found = _everyones(found, tiles, given.device, ranks)
    whole = torch.empty(0)
    for (row, column), tile in zip(tiles, found):
        scale = tile.shape[-1] // (column.stop - column.start)
        if not len(whole):
            whole = tile.new_empty(1, tile.shape[1], rows[-1].stop * scale, columns[-1].stop * scale)
        (top, bottom), (left, right) = ((scale * span.start, scale * span.stop) for span in (row, column))
        whole[:, :, top:bottom, left:right] = tile
    return whole


def in_bands(
    layers: Layers,
    given: torch.Tensor,
    rows: Sequence[Span],
    columns: Sequence[Span],
    unit: int,
    norms: bool,
) -> Iterator[torch.Tensor]:
    """layers(given), a tile at a time: from top to bottom what each row of tiles gives.

    With group norms the tiles are evaluated twice, first for the statistics; more often where the sample misled.

    Args:
        given: (1, C, H unit, W unit), of H x W cells.
        unit: its pixels to a cell.
        norms: whether the layers have group norms.
    """
    evaluate = _evaluator(layers, given, rows, columns, unit, norms)
    for row in rows:
        band = torch.empty(0)
        for column in columns:
            tile = evaluate(row, column)
            scale = tile.shape[-1] // (column.stop - column.start)
            if not len(band):
                band = tile.new_empty(1, tile.shape[1], tile.shape[2], columns[-1].stop * scale)
            band[:, :, :, scale * column.start : scale * column.stop] = tile
        yield band


def _evaluator(layers, given, rows, columns, unit, norms, ranks=None) -> Callable[[Span, Span], torch.Tensor]:
    """Gives what layers(given) are on a tile, once the statistics of all of them are known."""
    height, width = rows[-1].stop, columns[-1].stop

    def of(row: Span, column: Span) -> torch.Tensor:
        return _cut(given, _pixels(row.first, row.last, unit, height), _pixels(column.first, column.last, unit, width))

    statistics = Statistics()
    if norms:
        sample = _cut(given, *(_blocks(length, unit) for length in (height, width)))
        tiles = list(itertools.product(rows, columns))
        areas = [(row.stop - row.start) * (column.stop - column.start) for row, column in tiles]
        for _ in range(ROUNDS):
            with statistics.guessed():
                layers(sample)
            for row, column in tiles if ranks is None else tiles[ranks.dealt(len(tiles), 1)]:
                with statistics.measured(row, column):
                    layers(of(row, column))
            if statistics.settle(areas, ranks) < NEAR:
                break
        with statistics.guessed():
            layers(sample)
        del sample

    def evaluate(row, column):
        with statistics.used():
            tile = layers(of(row, column))
        scale = tile.shape[-1] // (column.last - column.first)
        for dim, span in ((2, row), (3, column)):
            tile = tile.narrow(dim, scale * (span.start - span.first), scale * (span.stop - span.start))
        return tile

    return evaluate


def _everyones(found, tiles, device, ranks) -> Iterator[torch.Tensor]:
    """Every process's tiles, of those that this one has found; tiles are padded to the largest to be sent."""
    cells = [[span.stop - span.start for span in tile] for tile in tiles]
    most = [max(sides) for sides in zip(*cells)]
    own, first = [], ranks.dealt(len(tiles), 1).start
    for tile, (height, width) in zip(found, cells[first:]):
        scale = tile.shape[-1] // width
        own.append(F.pad(tile, (0, scale * (most[1] - width), 0, scale * (most[0] - height))))
    padded, _ = ranks.gathered([torch.cat(own)] if own else [], len(tiles), 1, device)
    scale = padded.shape[-1] // most[1]
    for tile, (height, width) in zip(padded.split(1), cells):
        yield tile[:, :, : scale * height, : scale * width]


def _cut(given, rows, columns):
    return given[:, :, rows.to(given.device)[:, None], columns.to(given.device)]


def _pixels(first, last, unit, length):
    return torch.arange(first * unit, last * unit) % (length * unit)


def _blocks(length: int, unit: int) -> torch.Tensor:
    """Pixels of blocks spread evenly over an axis."""
    side = min(max(length // 5, SAMPLE[0]), SAMPLE[1])
    if length <= side:
        return torch.arange(length * unit)
    count = side // BLOCK
    starts = torch.arange(count) * (length - BLOCK) // (count - 1)
    return (starts[:, None] * unit + torch.arange(BLOCK * unit)).flatten()


class Statistics:
    """Mean and variance of the whole picture in every group norm, found without holding the picture.

    Each norm changes what later ones see, so statistics that are taken from the pass before swing ever farther off. A
    small sample of the picture, evaluated at once, follows such changes itself: its statistics are the first guess; the
    tiles, evaluated with them, say by how much the whole picture's differ in each norm; the sample, evaluated with
    those differences, gives statistics that are off by the square of the first error.
    """

    def __init__(self) -> None:
        # of each norm, (mean, deviation) of its groups: what is taken for the whole picture's, and the sample's own
        self._known: list[Moments] = []
        self._sample: list[Moments] = []
        self._differences: list[Moments] = []  # whole - sample in deviations of the sample, whole / sample
        self._found: list[list[Moments]] = []  # of each tile, of every norm

    def guessed(self) -> TorchFunctionMode:
        """Within, norms of the sample take their own statistics, with the differences that are known."""
        self._known, self._sample = [], []

        def norm(number, x, eps):
            mean, deviation = own = _moments(x, eps)
            self._sample.append(own)
            if self._differences:
                shift, ratio = self._differences[number]
                mean, deviation = mean + shift * deviation, ratio * deviation
            self._known.append((mean, deviation))
            return mean, deviation

        return _GroupNorms(norm)

    def measured(self, row: Span, column: Span) -> TorchFunctionMode:
        """Within, norms of this tile take the statistics that are known, and its own are kept."""
        found: list[Moments] = []
        self._found.append(found)

        def norm(number, x, eps):
            inner = x
            for dim, span in ((3, row), (4, column)):
                scale = x.shape[dim] / (span.last - span.first)
                inner = inner.narrow(dim, int((span.start - span.first) * scale), int((span.stop - span.start) * scale))
            found.append(_moments(inner, eps))
            return self._known[number]

        return _GroupNorms(norm)

    def settle(self, areas: Sequence[int], ranks: Ranks | None = None) -> float:
        """From the tiles, the differences of picture and sample; returns by how much what was known was off.

        Args:
            areas: of all tiles.
            ranks: the processes each of which has measured those that it was dealt.
        """
        of_tiles = self._found if ranks is None else self._gathered(len(areas), ranks)
        differences, off = [], []
        for sample, known, found in zip(self._sample, self._known, zip(*of_tiles)):
            means, deviations = (torch.cat(values) for values in zip(*found))
            shares = means.new_tensor(areas)[:, None] / sum(areas)
            mean = (shares * means).sum(0)
            deviation = (shares * (deviations**2 + (means - mean) ** 2)).sum(0).sqrt()
            differences.append(((mean - sample[0]) / sample[1], deviation / sample[1]))
            off += [((mean - known[0]) / known[1]).abs().max(), (deviation / known[1] - 1).abs().max()]
        self._differences, self._found = differences, []
        return float(torch.stack(off).max())

    def _gathered(self, tiles, ranks):
        """Of each tile of all, of every norm: sent as one row of numbers a tile."""
        groups = [len(mean[0]) for mean, _ in self._known]
        rows = [torch.cat([value for moments in found for value in moments], dim=1) for found in self._found]
        own = [torch.stack(rows)[:, None]] if rows else []
        numbers, _ = ranks.gathered(own, tiles, 1, self._known[0][0].device)
        of_tiles = [row[0].split([2 * count for count in groups], dim=1) for row in numbers]
        return [[norm.chunk(2, dim=1) for norm in tile] for tile in of_tiles]

    def used(self) -> TorchFunctionMode:
        """Within, norms take the statistics that are known."""
        return _GroupNorms(lambda number, x, eps: self._known[number])


def _moments(x: torch.Tensor, eps: float) -> Moments:
    """(mean, deviation) of each group of (1, G, C / G, H, W), (1, G) each, in float32 or wider."""
    wide = torch.promote_types(x.dtype, torch.float32)
    mean = x.mean((2, 3, 4), dtype=wide)
    rows = torch.linalg.vector_norm(x, dim=4, dtype=wide)  # many times faster than var_mean on the CPU
    square = rows.square().sum((2, 3)) / x[0, 0].numel()
    return mean, (square - mean**2).clamp(min=0).add(eps).sqrt()


class _GroupNorms(TorchFunctionMode):
    """While it is entered, group norms take the mean and the deviation that `norm` gives for each of their groups.

    Args:
        norm: function of (how many group norms were called before, (1, G, C / G, H, W), eps).
    """

    def __init__(self, norm: Callable[[int, torch.Tensor, float], Moments]):
        super().__init__()
        self.norm, self.calls = norm, 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return (self._group_norm if func is F.group_norm else func)(*args, **(kwargs or {}))

    def _group_norm(self, x, groups, weight=None, bias=None, eps=1e-5):
        mean, deviation = self.norm(self.calls, x.unflatten(1, (groups, -1)), eps)
        self.calls += 1
        mean, variance = (value[0].repeat_interleave(x.shape[1] // groups) for value in (mean, deviation**2))
        weight, bias = (value if value is None else value.to(mean) for value in (weight, bias))
        return F.batch_norm(x, mean, variance, weight, bias, eps=0.0)


class Circle(TorchFunctionMode):
    """While it is entered, convolutions and padding go round the axes that wrap, to the opposite edge."""

    def __init__(self, wrap: tuple[bool, bool]):
        super().__init__()
        self.wrap = wrap

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.conv2d:
            x, weight, bias, stride, padding, *rest = args
            x = self._continued(x, [padding[1], padding[1], padding[0], padding[0]])
            padding = tuple(0 if wraps else width for wraps, width in zip(self.wrap, padding))
            return func(x, weight, bias, stride, padding, *rest, **kwargs)
        if func is F.pad:
            x, padding, *rest = args
            x = self._continued(x, padding)
            padding = [0 if self.wrap[1 - i // 2] else width for i, width in enumerate(padding)]
            return func(x, padding, *rest, **kwargs)
        return func(*args, **kwargs)

    def _continued(self, x: torch.Tensor, padding: Sequence[int]) -> Any:
        """(left, right, top, bottom) pixels more, on axes that wrap."""
        return F.pad(x, [width if self.wrap[1 - i // 2] else 0 for i, width in enumerate(padding)], mode="circular")

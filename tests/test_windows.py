"""Window plans: geometry, weights, tables, and what is refused."""

import copy
import dataclasses
import math
import pickle
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from instantas.windows import WEIGHT_KINDS, WindowPlan

CPU = torch.device("cpu")


def brute_coverage(plan):
    cover = np.zeros((plan.height, plan.width), dtype=int)
    for y, x in plan.origins:
        cells = np.ix_((y + np.arange(plan.window[0])) % plan.height, (x + np.arange(plan.window[1])) % plan.width)
        cover[cells] += 1
    return cover


@pytest.mark.parametrize("wrap", [(False, False), (True, True)], ids=["flat", "wrapped"])
@pytest.mark.parametrize("window", [(64, 64), (7, 13), (48, 200), (96, 30)], ids=str)
@pytest.mark.parametrize("start", range(1, 201, 50))
def test_minimum_coverage_of_every_size(start, window, wrap):
    """Exactly ceil(H / h) ceil(W / w) windows for every height and width from 1 to 200.

    A plan that leaves a cell uncovered is refused when it is made (see below), so that each of these covers.
    """
    for height in range(start, start + 50):
        down = math.ceil(height / window[0])
        for width in range(1, 201):
            plan = WindowPlan.minimum_coverage(height, width, window, wrap=wrap)
            assert len(plan.origins) == down * math.ceil(width / window[1])


sizes = st.integers(1, 40)
flags = st.booleans()


@st.composite
def plans(draw):
    """A plan of any kind."""
    height, width, wrap = draw(sizes), draw(sizes), (draw(flags), draw(flags))
    window = draw(sizes), draw(sizes)
    if draw(flags):
        shift = tuple(draw(st.integers(-50, 50)) if wraps else 0 for wraps in wrap)
        return WindowPlan.minimum_coverage(height, width, window, wrap=wrap, shift=shift)
    stride = tuple(draw(st.integers(1, size)) for size in window)
    return WindowPlan.strided(height, width, window, stride, wrap=wrap)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(plans())
def test_every_plan_covers_and_its_tables_are_right(plan):
    cover = brute_coverage(plan)
    assert (plan.coverage() == cover).all() and cover.min() >= 1
    assert (
        plan.count
        >= plan.lower_bound
        == math.ceil(plan.height / plan.window[0]) * math.ceil(plan.width / plan.window[1])
    )
    assert plan.overlap == pytest.approx(cover.mean() - 1)
    origins, start, index = plan.tables(CPU)
    assert all(table.dtype == torch.int32 and table.is_contiguous() for table in (origins, start, index))
    assert np.array_equal(origins, plan.origins)
    (tile_y, tile_x), across = plan.tile, -(-plan.width // plan.tile[1])
    assert len(start) == -(-plan.height // tile_y) * across + 1
    for tile in range(len(start) - 1):
        y, x = tile // across * tile_y, tile % across * tile_x
        rows, columns = range(y, min(y + tile_y, plan.height)), range(x, min(x + tile_x, plan.width))
        touching = [
            i
            for i, (oy, ox) in enumerate(plan.origins)
            if any((row - oy) % plan.height < plan.window[0] for row in rows)
            and any((column - ox) % plan.width < plan.window[1] for column in columns)
        ]
        assert index[start[tile] : start[tile + 1]].tolist() == touching


@settings(max_examples=100, deadline=None, derandomize=True)
@given(sizes, sizes, sizes, sizes)
def test_windows_stay_inside_and_share_the_overlap(height, width, h, w):
    plan = WindowPlan.minimum_coverage(height, width, (h, w))
    assert plan.window == (min(h, height), min(w, width))
    for axis, (length, window) in enumerate(zip((height, width), plan.window)):
        origins = np.unique(plan.origins[:, axis])
        assert origins[0] == 0 and origins[-1] == length - window
        steps = np.diff(origins)
        assert len(steps) == 0 or (steps.max() - steps.min() <= 1 and steps.max() <= window)
        if length % window == 0:
            assert (steps == window).all()


def test_the_counts_of_the_paper():
    """512x2048 and 2048x2048 px at 64x64 latents: 4 and 16 windows, where a stride of 8 needs 25 and 625."""
    assert WindowPlan.minimum_coverage(64, 256).count == 4 and WindowPlan.strided(64, 256).count == 25
    assert WindowPlan.minimum_coverage(256, 256).count == 16 and WindowPlan.strided(256, 256).count == 625
    assert WindowPlan.minimum_coverage(64, 256).overlap == 0


def test_a_last_window_flush_with_the_edge():
    assert WindowPlan.strided(64, 85, 64, 8).origins[:, 1].tolist() == [0, 8, 16, 21]
    assert WindowPlan.strided(64, 80, 64, 8).origins[:, 1].tolist() == [0, 8, 16]


def test_a_shift_moves_the_windows_around_the_circle():
    plan = WindowPlan.minimum_coverage(8, 24, 8, wrap=(False, True), shift=(0, 20))
    assert plan.origins[:, 1].tolist() == [20, 4, 12]
    assert plan == WindowPlan.minimum_coverage(8, 24, 8, wrap=(False, True), shift=(0, -4))


# Weights


@pytest.mark.parametrize("kind", WEIGHT_KINDS)
@pytest.mark.parametrize("window", [1, 2, 7, 64, (5, 64), 200], ids=str)
def test_weights_are_positive_symmetric_and_float32(kind, window):
    plan = WindowPlan.minimum_coverage(200, 200, window)
    weight = plan.weight(kind)
    assert weight.shape == plan.window and weight.dtype == torch.float32
    assert (weight > 0).all() and weight.isfinite().all()
    torch.testing.assert_close(weight, weight.flip(0, 1))
    if kind == "uniform":
        assert (weight == 1).all()
    elif min(plan.window) > 2:
        assert weight[0, 0] < weight[plan.window[0] // 2, plan.window[1] // 2]


def test_an_unknown_weight_is_refused():
    with pytest.raises(ValueError, match="weight: expected one of uniform, linear, gaussian, cosine, got 'flat'"):
        WindowPlan.minimum_coverage(8, 8).weight("flat")


# Values


def test_plans_compare_and_hash_by_value():
    one, same = (WindowPlan.minimum_coverage(20, 30, 8) for _ in range(2))
    assert one == same and hash(one) == hash(same) and {one: 1}[same] == 1
    others = (
        WindowPlan.minimum_coverage(20, 31, 8),
        WindowPlan.minimum_coverage(20, 30, 9),
        WindowPlan.minimum_coverage(20, 30, 8, wrap=(True, False)),
        WindowPlan.strided(20, 30, 8, 4),
    )
    assert all(one != other for other in others) and one != "plan"
    assert len({one, *others}) == 5


def test_plans_cannot_be_changed():
    origins = np.array([[0, 0], [0, 4]])
    plan = WindowPlan(8, 12, 8, origins)
    origins[1] = 0
    assert plan.origins[1].tolist() == [0, 4]
    with pytest.raises(ValueError):
        plan.origins[0, 0] = 1
    with pytest.raises(AttributeError):
        plan.height = 9
    cover = plan.coverage()
    cover[:] = 7
    assert plan.coverage().max() == 2


def test_tables_are_copied_to_a_device_once():
    plan = WindowPlan.minimum_coverage(20, 30, 8)
    assert all(a is b for a, b in zip(plan.tables(CPU), plan.tables(CPU)))
    meta = torch.device("meta")
    assert all(a is b and a.device == meta for a, b in zip(plan.tables(meta), plan.tables(meta)))


COPIES = {
    "pickle": lambda plan: pickle.loads(pickle.dumps(plan)),
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "replace": dataclasses.replace,
}


@pytest.mark.parametrize("way", COPIES)
def test_copies_are_as_frozen_and_bring_no_tables(way):
    plan = WindowPlan.strided(20, 30, 8, 4, wrap=(False, True))
    size = len(pickle.dumps(plan))
    plan.tables(torch.device("meta"))
    other = COPIES[way](plan)
    assert other == plan and other is not plan and other.count == plan.count
    assert all(torch.equal(a, b) and a is not b for a, b in zip(plan.tables(CPU), other.tables(CPU)))
    assert list(other._tables) == [CPU] and len(pickle.dumps(plan)) == size
    with pytest.raises(ValueError):
        other.origins[0, 0] = 1
    with pytest.raises(AttributeError):
        other.count = 3


def test_the_geometry_is_plain_integers():
    plan = WindowPlan.minimum_coverage(np.int64(20), 30, (8, 16), wrap=(np.True_, False))
    assert plan.geometry == [20, 30, 8, 16, 1, 0, 8, 16]
    assert all(type(number) is int for number in plan.geometry)


# What is refused


REFUSED = {
    "height: expected a positive integer, got 0": lambda: WindowPlan.minimum_coverage(0, 8),
    "width: expected a positive integer, got -3": lambda: WindowPlan.minimum_coverage(8, -3),
    "width: expected a positive integer, got 8.0": lambda: WindowPlan.minimum_coverage(8, 8.0),
    "height: expected a positive integer, got True": lambda: WindowPlan.strided(True, 8),
    "window: expected a positive integer, got 0": lambda: WindowPlan.minimum_coverage(8, 8, 0),
    "window: expected one value or a pair": lambda: WindowPlan.minimum_coverage(8, 8, (1, 2, 3)),
    "window: expected at most the canvas (8, 8), got (9, 8)": lambda: WindowPlan(8, 8, (9, 8), [[0, 0]]),
    "stride: expected a positive integer, got 0": lambda: WindowPlan.strided(8, 8, 4, 0),
    "wrap: expected True or False": lambda: WindowPlan.minimum_coverage(8, 8, wrap=1),
    "shift: expected an integer, got 0.5": lambda: WindowPlan.minimum_coverage(8, 8, 4, wrap=True, shift=0.5),
    "shift: expected 0 on the vertical axis": lambda: WindowPlan.minimum_coverage(8, 8, 4, shift=(1, 0)),
    "shift: expected 0 on the horizontal axis": lambda: WindowPlan.minimum_coverage(
        8, 8, 4, wrap=(True, False), shift=(1, 2)
    ),
    "origins: expected shape (n, 2)": lambda: WindowPlan(8, 8, 8, [0, 0]),
    "origins: expected integers, got float64": lambda: WindowPlan(8, 8, 8, [[0.0, 0.0]]),
    "origins: expected 0 to 4 on axis 1, which does not wrap, got 0 to 5": lambda: WindowPlan(
        4, 8, 4, [[0, 0], [0, 5]]
    ),
    "origins: expected 0 to 4 on axis 0": lambda: WindowPlan(8, 4, 4, [[-1, 0], [4, 0]]),
    "origins: expected every cell covered, got 12 uncovered, first (0, 3)": lambda: WindowPlan(
        4, 10, (4, 3), [[0, 0], [0, 6], [0, 7]]
    ),
    "origins: expected every cell covered, got 8 uncovered, first (0, 4)": lambda: WindowPlan.strided(4, 10, 4, 6),
}


@pytest.mark.parametrize("message", REFUSED)
def test_bad_plans_are_refused(message):
    with pytest.raises((TypeError, ValueError), match="^" + re.escape(message)):
        REFUSED[message]()

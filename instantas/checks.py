"""Checks of numbers and flags, the same for every public function.

Each returns the value as a plain Python one. Errors are `name: expected X, got Y`: a TypeError for another kind of
value, a ValueError for one out of range.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any, TypeVar

import numpy as np

T = TypeVar("T")


def integer(name: str, value: Any, low: int | None = None, *, expected: str | None = None) -> int:
    """An integer, of at least `low`; `expected`: what to say in place of "a positive integer" and the like."""
    expected = expected or {None: "an integer", 1: "a positive integer"}.get(low, f"an integer from {low} up")
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name}: expected {expected}, got {value!r}")
    if low is not None and value < low:
        raise ValueError(f"{name}: expected {expected}, got {value}")
    return int(value)


def real(name: str, value: Any, low: float | None = None, high: float | None = None, *, above: bool = False) -> float:
    """A finite number, not below `low` (`above`: more than `low`) and not over `high`."""
    span = "a finite number"
    if low is not None:
        span = f"more than {low}" if above else f"{low} or more" if high is None else f"{low}"
        span += f" to {high}" if high is not None else ""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: expected a number{'' if high is None else f' from {low} to {high}'}, got {value!r}")
    number = float(value)
    inside = (low is None or (number > low if above else number >= low)) and (high is None or number <= high)
    if not (inside and math.isfinite(number)):  # NaN fails every comparison
        span = span if high is not None or math.isfinite(number) else "a finite number"
        raise ValueError(f"{name}: expected {span}, got {value}")
    return number


def flag(name: str, value: Any) -> bool:
    """True or False."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name}: expected True or False, got {value!r}")
    return bool(value)


def pair(name: str, value: Any, check: Callable[[str, Any], T]) -> tuple[T, T]:
    """(vertical, horizontal), or one value for both; `check` looks at each."""
    values = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    if len(values) != 2:
        raise ValueError(f"{name}: expected one value or a pair (vertical, horizontal), got {value!r}")
    return check(name, values[0]), check(name, values[1])


def positive(name: str, value: Any) -> int:
    """An integer from 1 up."""
    return integer(name, value, 1)

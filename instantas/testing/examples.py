"""Random examples of the operations: each function draws (call, arguments) that `oracle.judge` takes.

They have a thousand results or more, so that the error is no accident of a few.
"""

import random
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch

from instantas import ops
from instantas.testing import oracle
from instantas.testing.oracle import attention_inputs, normal, positive, region_weights
from instantas.windows import WEIGHT_KINDS, WindowPlan

Example = tuple[Callable, list[Any]]


def plan_of(draw: random.Random) -> WindowPlan:
    """A few windows, of any shape, on canvases of 250 to 800 cells: the interpreter takes its time for each of both."""
    height = draw.choice([draw.randint(1, 8), draw.randint(1, 16)])
    width = draw.randint(-(-250 // height), max(-(-250 // height), 56))
    wrap = draw.random() < 0.3, draw.random() < 0.3
    window = draw.randint(-(-height // 2), height + 2), draw.randint(-(-width // 2), width + 2)
    if draw.random() < 0.7:
        shift = draw.randint(-9, 9) * wrap[0], draw.randint(-9, 9) * wrap[1]
        return WindowPlan.minimum_coverage(height, width, window, wrap=wrap, shift=shift)
    stride = draw.randint(-(-2 * window[0] // 3), window[0]), draw.randint(-(-2 * window[1] // 3), window[1])
    return WindowPlan.strided(height, width, window, stride, wrap=wrap)


def weight_of(draw: random.Random, plan: WindowPlan) -> torch.Tensor | None:
    kind = draw.choice(["none", "each", *WEIGHT_KINDS])
    if kind in WEIGHT_KINDS:
        return plan.weight(kind)
    return None if kind == "none" else positive(plan.count, *plan.window, seed=draw.randint(0, 99))


def gather(draw: random.Random) -> Example:
    plan = plan_of(draw)
    canvas = normal(1, draw.choice([4, 4, 4, 4, 5]), plan.height, plan.width, seed=draw.randint(0, 99))
    return lambda x: ops.gather_windows(x, plan), [canvas]


def scatter(draw: random.Random) -> Example:
    plan = plan_of(draw)
    windows = normal(1, plan.count, draw.choice([4, 4, 4, 4, 5]), *plan.window, seed=draw.randint(0, 99))
    return lambda x, w: ops.scatter_windows(x, plan, w), [windows, weight_of(draw, plan)]


def step(draw: random.Random) -> Example:
    plan, seed, c, k = plan_of(draw), draw.randint(0, 99), draw.choice([4, 4, 4, 4, 5]), draw.randint(0, 3)
    guided, keeps = draw.random() < 0.5, draw.random() < 0.5
    if keeps:
        plan = plan.subset([draw.random() < 0.7 for _ in range(plan.count)])
    coefficients, keep = normal(2 + k, seed=seed).tolist(), normal(2, seed=seed + 1).tolist()
    cond, uncond = (normal(1, plan.count, c, *plan.window, seed=seed + i) for i in (2, 3))
    sample, history = (normal(*s, 1, c, plan.height, plan.width, seed=seed + 4) for s in ((), (k,)))
    latest = normal(1 + guided, *sample.shape, seed=seed + 5) if keeps else None
    guidance = draw.choice([0.0, 1.0, 7.5, positive(plan.height, plan.width) * 7])

    def call(cond, uncond, sample, history, latest, weight, guidance):
        state = dict(history=history, keep=keep, latest=latest, carry=(0.6, 0.8))
        return ops.guided_step(cond, uncond, sample, plan, coefficients, guidance, weight=weight, **state)

    either, past = uncond if guided else None, history if k else None
    return call, [cond, either, sample, past, latest, weight_of(draw, plan), guidance]


def attention(draw: random.Random) -> Example:
    seed, mode, scale = draw.randint(0, 99), draw.choice(["blend", "joint"]), draw.choice([None, 0.1, 0.5])
    b, n, heads, d = 1, draw.randint(120, 150), 1, draw.randint(16, 24)
    p, length, r = draw.randint(1, 3), draw.randint(1, 33), draw.choice([1, 2, 3, 20])
    weights = region_weights(b, r, n, seed=seed, hard=draw.random() < 0.5)
    call = partial(ops.regional_attention, mode=mode, scale=scale)
    return call, [*attention_inputs(b, n, heads, d, p, length, r, seed=seed), weights]


OPERATIONS = gather, scatter, step, attention


def judge(backends: Iterable[str], operation: Callable[[random.Random], Example], draw: random.Random) -> None:
    """Holds backends to the error budget on one example of the operation, in a dtype drawn with it."""
    call, arguments = operation(draw)
    dtype = draw.choice(oracle.DTYPES)
    for backend in backends:
        oracle.judge(backend, call, arguments, dtype, attention=operation is attention)

"""The operations as a user would write them in PyTorch without this library: what benchmarks compare with.

Each function returns (name -> callable on the tensors alone, name -> why it is absent). What can be prepared before
sampling starts (masks, cell numbers, sums of weights) is prepared here and costs a rival nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from instantas.windows import WindowPlan

Forms = tuple[dict[str, Callable[..., Any]], dict[str, str]]
COMPILED_VIEWS = 16  # a loop over more views takes minutes to compile


def gather(plan: WindowPlan, device: torch.device, *, compiled: bool = False) -> Forms:
    """canvas -> windows."""
    (h, w), cells = plan.window, _cells(plan, device)

    def views(canvas):
        return torch.stack([canvas[:, :, y : y + h, x : x + w] for y, x in plan.origins.tolist()], dim=1)

    def index(canvas):
        picked = canvas.flatten(2).index_select(2, cells).unflatten(2, (plan.count, h, w))
        return picked.transpose(1, 2).contiguous()

    def unfold(canvas):
        columns = F.unfold(canvas, (h, w), stride=_strides(plan)).unflatten(1, (canvas.shape[1], h, w))
        return columns.permute(0, 4, 1, 2, 3).contiguous()

    def reshape(canvas):
        b, c = canvas.shape[:2]
        tiles = canvas.reshape(b, c, plan.height // h, h, plan.width // w, w)
        return tiles.permute(0, 2, 4, 1, 3, 5).reshape(b, plan.count, c, h, w).contiguous()

    return _named(plan, compiled, views, index, unfold, reshape)


def scatter(
    plan: WindowPlan, weight: torch.Tensor | None, device: torch.device, dtype: torch.dtype, *, compiled: bool = False
) -> Forms:
    """windows -> canvas, the weighted mean of the windows over each cell."""
    (h, w), cells = plan.window, _cells(plan, device)
    weight = torch.ones(h, w, device=device) if weight is None else weight
    norm = torch.zeros(plan.height * plan.width, device=device)
    norm = norm.index_add_(0, cells, weight.expand(plan.count, h, w).flatten()).to(dtype)
    weight, flat = weight.to(dtype), norm.view(plan.height, plan.width)

    def views(windows):
        canvas = windows.new_zeros(windows.shape[0], windows.shape[2], plan.height, plan.width)
        count = torch.zeros_like(canvas)
        for i, (y, x) in enumerate(plan.origins.tolist()):
            canvas[:, :, y : y + h, x : x + w] += windows[:, i] * weight
            count[:, :, y : y + h, x : x + w] += weight
        return torch.where(count > 0, canvas / count, canvas)

    def index(windows):
        b, _, c = windows.shape[:3]
        values = (windows * weight).transpose(1, 2).reshape(b, c, -1)
        canvas = windows.new_zeros(b, c, plan.height * plan.width).index_add_(2, cells, values)
        return (canvas / norm).unflatten(2, (plan.height, plan.width))

    def fold(windows):
        columns = (windows * weight).permute(0, 2, 3, 4, 1).flatten(1, 3)
        return F.fold(columns, (plan.height, plan.width), (h, w), stride=_strides(plan)) / flat

    def reshape(windows):  # without overlap the mean is the window itself
        b, _, c = windows.shape[:3]
        tiles = windows.reshape(b, plan.height // h, plan.width // w, c, h, w)
        return tiles.permute(0, 3, 1, 4, 2, 5).reshape(b, c, plan.height, plan.width)

    return _named(plan, compiled, views, index, fold, reshape)


def step(
    plan: WindowPlan,
    weight: torch.Tensor | None,
    coefficients: Sequence[float],
    guidance: float,
    keep: Sequence[float],
    device: torch.device,
    dtype: torch.dtype,
    *,
    compiled: bool = False,
) -> Forms:
    """(cond, uncond, sample, history or none) -> (new sample, newest entry): guide, merge, scheduler's update."""
    merges, absent = scatter(plan, weight, device, dtype)
    a, b, *cs = coefficients

    def with_merge(merge):
        def run(cond, uncond, sample, history=None):
            m = merge(uncond + guidance * (cond - uncond))
            if history is None:
                return (a * sample + b * m,)
            new = a * sample + b * m + sum(c * h for c, h in zip(cs, history))
            return new, keep[0] * sample + keep[1] * m

        return run

    runs = {name: with_merge(merge) for name, merge in merges.items()}
    return runs | (_compiled(plan, runs) if compiled else {}), absent


def attention(
    prompt_ids: torch.Tensor,
    weights: torch.Tensor,
    length: int,
    dtype: torch.dtype,
    *,
    mode: str = "blend",
    compiled: bool = False,
) -> Forms:
    """(query, key, value) -> attention of every query with the prompts of its region."""
    slots, total = weights.shape[1], weights.sum(1)[..., None, None]
    hard = bool(((weights == 0) | (weights == 1)).all() and (weights.sum(1) == 1).all())
    ids = prompt_ids.long()

    def heads_first(*tensors):
        return (t.transpose(1, 2) for t in tensors)

    def per_region(query, key, value):
        out: Any = 0
        for r in range(slots):
            each = F.scaled_dot_product_attention(*heads_first(query, key[ids[:, r]], value[ids[:, r]]))
            out = out + weights[:, r, :, None, None].to(query.dtype) * each.transpose(1, 2)
        return out / total.to(query.dtype)

    def plain(query, key, value):
        each = F.scaled_dot_product_attention(*heads_first(query, key[ids[:, 0]], value[ids[:, 0]]))
        return each.transpose(1, 2).contiguous()

    def joined(bank):  # (B, R L, heads, D)
        return bank[ids].flatten(1, 2)

    runs: dict[str, Callable[..., Any]] = {}
    absent: dict[str, str] = {}
    if slots == 1 and hard:
        runs["SDPA"] = plain
    elif mode == "blend":
        runs["SDPA per region"] = per_region
    if slots > 1 and (hard or mode == "joint"):
        mask = weights.transpose(1, 2).repeat_interleave(length, 2)[:, None]  # (B, 1, N, R L)
        mask = mask > 0 if hard else mask.log().to(dtype)

        def dense_mask(query, key, value):
            operands = heads_first(query, joined(key), joined(value))
            return F.scaled_dot_product_attention(*operands, attn_mask=mask).transpose(1, 2).contiguous()

        runs["SDPA, dense mask"] = dense_mask
    if compiled and "SDPA per region" in runs:
        runs["SDPA per region, compiled"] = torch.compile(per_region)
    if compiled and slots > 1 and hard:
        runs["FlexAttention, block mask"] = _flex(weights.argmax(1), joined, length, slots)
    elif compiled and slots > 1:
        absent["FlexAttention, block mask"] = "a block mask holds no soft weights"
    return runs, absent


def _flex(region, joined, length, slots):
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def same_region(b, h, query, token):
        return region[b, query] == token // length

    b, n = region.shape
    mask = create_block_mask(same_region, b, None, n, slots * length, device=region.device.type)
    kernel = torch.compile(flex_attention)

    def run(query, key, value):
        operands = (t.transpose(1, 2) for t in (query, joined(key), joined(value)))
        return kernel(*operands, block_mask=mask).transpose(1, 2).contiguous()

    return run


def _cells(plan, device):
    """(n h w,) cell numbers of every window, row by row."""
    (h, w), origins = plan.window, torch.from_numpy(plan.origins.copy())
    rows = (origins[:, 0, None] + torch.arange(h)) % plan.height
    columns = (origins[:, 1, None] + torch.arange(w)) % plan.width
    return (rows[:, :, None] * plan.width + columns[:, None]).flatten().to(device)


def _strides(plan):
    """(vertical, horizontal) distance of the windows where they are a regular grid up to the edges, else None."""
    if any(plan.wrap):
        return None
    strides = []
    for axis, (length, window) in enumerate(zip((plan.height, plan.width), plan.window)):
        places = np.unique(plan.origins[:, axis])
        steps = set(np.diff(places).tolist())
        if len(steps) > 1 or places[0] != 0 or places[-1] != length - window:
            return None
        strides.append(steps.pop() if steps else window)
    regular = WindowPlan.strided(plan.height, plan.width, plan.window, tuple(strides))
    return tuple(strides) if regular == plan else None


def _named(plan, compiled, views, index, fold, reshape):
    """The forms that fit the plan, by name."""
    runs, absent = {"index": index}, {}
    if any(plan.wrap):
        absent["loop over views"] = "slices do not cross a border that wraps"
    else:
        runs["loop over views"] = views
    if _strides(plan):
        runs["unfold" if fold.__name__ == "unfold" else "fold"] = fold
    else:
        absent[fold.__name__] = "the windows are no regular grid"
    if plan.overlap == 0 and _strides(plan):
        runs["reshape"] = reshape
    else:
        absent["reshape"] = "the windows overlap or wrap"
    return runs | (_compiled(plan, runs) if compiled else {}), absent


def _compiled(plan, runs):
    """torch.compile of the form that suits it best: reshape where the windows do not overlap."""
    if "reshape" in runs:
        return {"reshape, compiled": torch.compile(runs["reshape"])}
    forms = {"index, compiled": torch.compile(runs["index"])}
    if plan.count <= COMPILED_VIEWS and "loop over views" in runs:
        forms["loop over views, compiled"] = torch.compile(runs["loop over views"])
    return forms

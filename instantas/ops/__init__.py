"""The operations, over whichever backend runs them.

All are functional, deterministic, differentiable, work under `torch.compile(fullgraph=True)` and inside a CUDA graph,
and are registered as `torch.ops.instantas.*`. Tensors are float32, float16 or bfloat16 (float64 on the CPU and on the
reference backend); arithmetic is float32 (float64 for float64). Under the transforms of `torch.func` (`grad`, `vmap`,
`jacrev`), which see through nothing but PyTorch, the reference runs, whatever backend serves the tensors. Needs only
torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload

import torch

from ..windows import WindowPlan
from .backend import backends, use_backend
from .order import region_order
from .registration import call, repeated
from .validation import (
    check_constant,
    check_lengths,
    check_order,
    check_plan,
    check_prompt_ids,
    check_tensor,
    check_weight,
    finite,
    traced_number,
    tracing,
    vector,
)

__all__ = [
    "backends",
    "gather_windows",
    "guided_step",
    "region_order",
    "regional_attention",
    "scatter_windows",
    "use_backend",
]

MAX_HEAD_SIZE = 256


def gather_windows(canvas: torch.Tensor, plan: WindowPlan) -> torch.Tensor:
    """Cut the canvas into the plan's windows.

    Args:
        canvas: (B, C, height, width).
        plan: the windows.

    Returns:
        (B, n, C, h, w), contiguous, of the canvas's dtype.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Equivalent PyTorch code (an axis that wraps takes indices modulo its length)::

        torch.stack([canvas[:, :, y : y + h, x : x + w] for y, x in plan.origins], dim=1)
    """
    if known := repeated("gather_windows", canvas, plan):
        operator, rest = known
        return operator(canvas, *rest)
    check_plan(plan)
    check_tensor("canvas", canvas, "(B, C, height, width)", (None, None, plan.height, plan.width))
    return call("gather_windows", canvas, *plan.tables(canvas.device), plan.geometry, plan=plan)


def scatter_windows(windows: torch.Tensor, plan: WindowPlan, weight: torch.Tensor | None = None) -> torch.Tensor:
    """Merge windows into one canvas: the weighted mean of the windows that cover a cell (MultiDiffusion, eq. 5).

    Args:
        windows: (B, n, C, h, w).
        plan: the windows' places.
        weight: overlap weight of a window's cells, (h, w) or (n, h, w), float32 or float64, finite, >= 0, and not all
            zero over any cell; None: 1 everywhere. Its values are checked once per tensor and plan, not inside
            `torch.compile` or a CUDA graph capture.

    Returns:
        (B, C, height, width), contiguous, of the windows' dtype.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Equivalent PyTorch code (without wrap)::

        total, norm = torch.zeros(B, C, height, width), torch.zeros(height, width)
        for i, (y, x) in enumerate(plan.origins):
            total[:, :, y : y + h, x : x + w] += weight[i] * windows[:, i]
            norm[y : y + h, x : x + w] += weight[i]
        canvas = total / norm
    """
    if weight is None and (known := repeated("scatter_windows", windows, plan)):
        operator, rest = known
        return operator(windows, *rest)
    check_plan(plan, partial=False)
    check_tensor("windows", windows, "(B, n, C, h, w)", (None, plan.count, None, *plan.window))
    check_weight(weight, plan, windows)
    arguments = windows, weight, *plan.tables(windows.device), plan.geometry, True
    return call("scatter_windows", *arguments, plan=plan if weight is None else None)


@overload
def guided_step(
    cond: torch.Tensor,
    uncond: torch.Tensor | None,
    sample: torch.Tensor,
    plan: WindowPlan,
    coefficients: Sequence[float] | torch.Tensor,
    guidance_scale: float | torch.Tensor,
    *,
    weight: torch.Tensor | None = None,
    history: torch.Tensor | None = None,
    keep: Sequence[float] | torch.Tensor = (0.0, 1.0),
    latest: None = None,
    carry: Sequence[float] | torch.Tensor = (0.0, 1.0),
) -> tuple[torch.Tensor, torch.Tensor | None]: ...


@overload
def guided_step(
    cond: torch.Tensor,
    uncond: torch.Tensor | None,
    sample: torch.Tensor,
    plan: WindowPlan,
    coefficients: Sequence[float] | torch.Tensor,
    guidance_scale: float | torch.Tensor,
    *,
    weight: torch.Tensor | None = None,
    history: torch.Tensor | None = None,
    keep: Sequence[float] | torch.Tensor = (0.0, 1.0),
    latest: torch.Tensor,
    carry: Sequence[float] | torch.Tensor = (0.0, 1.0),
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]: ...


def guided_step(
    cond: torch.Tensor,
    uncond: torch.Tensor | None,
    sample: torch.Tensor,
    plan: WindowPlan,
    coefficients: Sequence[float] | torch.Tensor,
    guidance_scale: float | torch.Tensor,
    *,
    weight: torch.Tensor | None = None,
    history: torch.Tensor | None = None,
    keep: Sequence[float] | torch.Tensor = (0.0, 1.0),
    latest: torch.Tensor | None = None,
    carry: Sequence[float] | torch.Tensor = (0.0, 1.0),
) -> tuple[torch.Tensor, torch.Tensor | None] | tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Merge window predictions, guide them, and take the scheduler's step: one pass over the canvas.

    m = the weighted mean over the covering windows of u + g (c - u) (classifier-free guidance);
    new sample = a x + b m + sum_j c_j h_j; the history entry d x + e m goes in front and the oldest is dropped.

    With `latest`, the plan may be partial: c and u of a cell that no window covers (or none with any weight) are the
    latest ones made there. What is kept of a prediction c is p x + q c, in which form it need not change from step to
    step: a prediction of noise or of x_0 is kept as it is, of v = signal eps - noise x_0 the noise it says,
    eps = noise x + signal v.

    Args:
        cond, uncond: (B, n, C, h, w) predictions with and without the prompt; uncond None: no guidance, m = mean of
            cond.
        sample: (B, C, height, width), x.
        plan: the windows' places.
        coefficients: (a, b, c_1 .. c_k), floats or a tensor of 2 + k values on the sample's device.
        guidance_scale: g, a float or a (height, width) tensor.
        weight: as in `scatter_windows`.
        history: (k, B, C, height, width), newest first; None exactly when k = 0.
        keep: (d, e), floats or a tensor of 2 values on the sample's device.
        latest: (2, B, C, height, width), of cond and uncond, or (1, B, C, height, width) without uncond. Its cells that
            are covered are not read.
        carry: (p, q), floats or a tensor of 2 values on the sample's device; q is not 0 where a cell is read.

    Returns:
        The new sample, and the new history (None when k = 0), of the sample's dtype. With `latest` its new values too:
        those of this step where a window covers the cell, the old ones elsewhere.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Equivalent PyTorch code::

        c, u = scatter_windows(cond, plan, weight), scatter_windows(uncond, plan, weight)
        m = u + guidance_scale * (c - u)
        # with latest, each of c and u before that: covered = plan.coverage() > 0
        c = torch.where(covered, c, (latest[0] - carry[0] * sample) / carry[1])
        new_latest = torch.stack([carry[0] * sample + carry[1] * c, carry[0] * sample + carry[1] * u])
        a, b, *cs = coefficients
        new_sample = a * sample + b * m + sum(c * h for c, h in zip(cs, history))
        new_history = torch.cat([(keep[0] * sample + keep[1] * m)[None], history[:-1]])
    """
    check_plan(plan, partial=latest is not None)
    check_tensor("sample", sample, "(B, C, height, width)", (None, None, plan.height, plan.width))
    b, c = sample.shape[:2]
    window_shape = (b, plan.count, c, *plan.window)
    check_tensor("cond", cond, "(B, n, C, h, w)", window_shape, like=sample)
    if uncond is not None:
        check_tensor("uncond", uncond, "(B, n, C, h, w)", window_shape, like=sample)
    check_weight(weight, plan, sample)
    coefficients = vector("coefficients", coefficients, sample.device)
    keep = _pair("keep", "d, e", keep, sample.device)
    carry = keep if latest is None else _pair("carry", "p, q", carry, sample.device)
    k = coefficients.shape[0] - 2
    if k < 0:
        raise ValueError(f"coefficients: expected at least 2 numbers (a, b, c_1 .. c_k), got {coefficients.shape[0]}")
    if k > 0 if history is None else k == 0:
        raise ValueError(
            f"history: expected {k} entries, one for each coefficient after the second, got "
            f"{None if history is None else tuple(history.shape)}"
        )
    if history is not None:
        check_tensor("history", history, "(k, B, C, height, width)", (k, *sample.shape), like=sample)
    if latest is not None:
        branches = 1 if uncond is None else 2
        check_tensor("latest", latest, "(branches, B, C, height, width)", (branches, *sample.shape), like=sample)
    none = sample.new_empty(0, *sample.shape)
    guidance, guidance_map = _guidance(guidance_scale, plan, sample.device)
    new_sample, new_history, new_latest = call(
        "guided_step",
        cond,
        uncond,
        sample,
        weight,
        none if history is None else history,
        none if latest is None else latest,
        coefficients,
        keep,
        carry,
        guidance,
        guidance_map,
        *plan.tables(sample.device),
        plan.geometry,
    )
    new_history = None if history is None else new_history
    return (new_sample, new_history) if latest is None else (new_sample, new_history, new_latest)


def _pair(name: str, letters: str, values: Any, device: torch.device) -> torch.Tensor:
    pair = vector(name, values, device)
    if pair.shape != (2,):
        raise ValueError(f"{name}: expected 2 numbers ({letters}), got {pair.shape[0]}")
    return pair


def _guidance(scale: Any, plan: WindowPlan, device: torch.device) -> tuple[float, torch.Tensor | None]:
    """The guidance scale as a number, or as a map of the canvas, which counts in its place."""
    is_tensor, shape = isinstance(scale, torch.Tensor), (plan.height, plan.width)
    if is_tensor and scale.dim():
        check_tensor("guidance_scale", scale, "a float or (height, width)", shape, device=device)
        check_constant("guidance_scale", scale)
        return 1.0, scale
    if torch.compiler.is_compiling() or is_tensor and tracing(scale):
        return 1.0, traced_number("guidance_scale", scale, device).expand(shape)
    return finite("guidance_scale", scale), None


def regional_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    prompt_ids: torch.Tensor,
    weights: torch.Tensor,
    *,
    mode: str = "blend",
    scale: float | None = None,
    order: torch.Tensor | None = None,
    lengths: torch.Tensor | None = None,
) -> torch.Tensor:
    """Cross-attention of every query with only the prompts of its region (InstantAS, guided cross-attention).

    Args:
        query: (B, N, heads, D).
        key, value: (P, L, heads, D), a bank that holds each distinct prompt once.
        prompt_ids: (B, R) integers, rows of the bank; -1: unused.
        weights: (B, R, N) >= 0, the share of each prompt at each query. Constants: no gradient.
        mode: "blend": sum_r w_r softmax(q K_r / sqrt D) V_r / sum_r w_r. "joint": one softmax over all tokens of all
            prompts, log w_r added to the logits. For disjoint 0/1 weights they are equal.
        scale: factor of the logits, 1 / sqrt(D) when None.
        order: (B, N) int32 or int64, a permutation of 0 .. N - 1 for each image, in which the queries are visited; as
            `region_order` makes it, a tile of them visits few prompts. None: raster order. The result does not depend
            on it, bit for bit, nor does the gradient of the query; those of key and value are sums over the queries,
            whose rounding follows it.
        lengths: (P,) int32 or int64, how many of a prompt's L tokens take part, from 1; None: all. What lies beyond is
            not looked at, and has no gradient.

    Returns:
        (B, N, heads, D), contiguous, of the query's dtype. A query without any weight gives zeros. NaN and infinity in
        a prompt are seen where it has weight; kernels for a GPU see them in the whole tile of queries in which it has
        some.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came. On a GPU the values of prompt_ids,
            order and lengths are not read back: ids outside the bank count as unused there, numbers outside 0 .. N - 1
            are skipped, what an order leaves out is not computed, and lengths are taken as the nearest of 1 .. L. On
            the CPU all are looked at, an order once for each tensor. Values of weights are not checked.

    Equivalent PyTorch code (blend)::

        logits = torch.einsum("bnhd,brlhd->brhnl", query, key[prompt_ids]) * scale
        each = torch.einsum("brhnl,brlhd->brnhd", logits.softmax(-1), value[prompt_ids])
        out = (weights[..., None, None] * each).sum(1) / weights.sum(1)[..., None, None]
    """
    check_tensor("query", query, "(B, N, heads, D)", (None, None, None, None))
    b, n, heads, d = query.shape
    if not 1 <= d <= MAX_HEAD_SIZE:
        raise ValueError(f"query: expected a head size D from 1 to {MAX_HEAD_SIZE}, got {d}")
    check_tensor("key", key, "(P, L, heads, D)", (None, None, heads, d), like=query)
    check_tensor("value", value, "(P, L, heads, D)", tuple(key.shape), like=query)
    check_tensor("prompt_ids", prompt_ids, "(B, R)", (b, None), dtypes=(torch.int32, torch.int64), device=query.device)
    check_tensor("weights", weights, "(B, R, N)", (b, prompt_ids.shape[1], n), device=query.device)
    check_constant("weights", weights)
    if key.shape[1] == 0:
        raise ValueError("key: expected at least one token, got L = 0")
    check_prompt_ids(prompt_ids, key.shape[0])
    check_order(order, query)
    check_lengths(lengths, key)
    if mode not in ("blend", "joint"):
        raise ValueError(f"mode: expected 'blend' or 'joint', got {mode!r}")
    factor = None
    if scale is None:
        scale = d**-0.5
    elif torch.compiler.is_compiling():
        scale, factor = 1.0, traced_number("scale", scale, "cpu")
    else:
        scale = finite("scale", scale)
    if prompt_ids.dtype == torch.int64:  # an id too large for int32 must not come out as another
        prompt_ids = prompt_ids.clamp(-1, key.shape[0]).int()
    if order is not None and order.dtype == torch.int64:
        order = order.clamp(-1, n).int()
    if lengths is not None and lengths.dtype == torch.int64:
        lengths = lengths.clamp(1, key.shape[1]).int()
    shares, traced = (prompt_ids, weights, mode == "joint", scale), () if factor is None else (factor,)
    return call("regional_attention", query, key, value, *shares, order, lengths, *traced)

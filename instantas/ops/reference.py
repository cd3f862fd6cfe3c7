"""The operations in plain PyTorch: the definition of correct, written to read like the formulas.

Same names and arguments as `instantas.ops`, which checks them; here nothing is checked. Arithmetic is in float32, in
float64 for float64 inputs, and the result is rounded once, at the end.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def _accumulator(tensor):
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _cells(plan):
    """The rows (h, 1) and columns (w,) of the canvas under each window, modulo its size."""
    (h, w), device = plan.window, plan.origins.device if isinstance(plan.origins, torch.Tensor) else None
    for y, x in plan.origins.tolist():
        rows = (y + torch.arange(h, device=device)) % plan.height
        columns = (x + torch.arange(w, device=device)) % plan.width
        yield rows[:, None], columns


def gather_windows(canvas: Tensor, plan: Any) -> Tensor:
    """windows[b, i] = canvas[b, :, y_i : y_i + h, x_i : x_i + w], modulo the size on wrapping axes."""
    windows = [canvas[:, :, rows, columns] for rows, columns in _cells(plan)]
    return torch.stack(windows, dim=1) if windows else canvas.new_empty(len(canvas), 0, canvas.shape[1], *plan.window)


def scatter_windows(windows: Tensor, plan: Any, weight: Tensor | None = None, normalize: bool = True) -> Tensor:
    """canvas[p] = sum_i w_i(p) windows_i(p) / sum_i w_i(p) over the windows that cover p.

    `normalize=False` leaves the division out: the adjoint of `gather_windows`, up to the weight.
    """
    dtype, (h, w) = _accumulator(windows), plan.window
    weight = torch.ones((), device=windows.device) if weight is None else weight
    weight = weight.to(dtype).expand(windows.shape[1], h, w)
    total = windows.new_zeros(windows.shape[0], windows.shape[2], plan.height, plan.width, dtype=dtype)
    norm = windows.new_zeros(plan.height, plan.width, dtype=dtype)
    for i, (rows, columns) in enumerate(_cells(plan)):
        total[..., rows, columns] += weight[i] * windows[:, i].to(dtype)
        norm[rows, columns] += weight[i]
    return (total / norm if normalize else total).to(windows.dtype)


def guided_step(
    cond: Tensor,
    uncond: Tensor | None,
    sample: Tensor,
    plan: Any,
    coefficients: Sequence[float] | Tensor,
    guidance_scale: float | Tensor,
    *,
    weight: Tensor | None = None,
    history: Tensor | None = None,
    keep: Sequence[float] | Tensor = (0.0, 1.0),
    latest: Tensor | None = None,
    carry: Sequence[float] | Tensor = (0.0, 1.0),
) -> tuple[Tensor, Tensor | None] | tuple[Tensor, Tensor | None, Tensor]:
    """m = scatter(u + g (c - u)); x' = a x + b m + sum_j c_j h_j; the history takes d x + e m in front.

    Where no window covers a cell, c and u are what `latest` says there: of l = p x + q c the (l - p x) / q.
    """
    dtype = _accumulator(sample)
    a, b, *cs, d, e, p, q = (
        torch.as_tensor(number, dtype=dtype, device=sample.device) for number in (*coefficients, *keep, *carry)
    )
    x = sample.to(dtype)
    branches = [scatter_windows(each.to(dtype), plan, weight) for each in (cond, uncond) if each is not None]
    if latest is not None:
        unit = cond.new_ones(1, cond.shape[1], 1, *plan.window, dtype=dtype)
        covered = scatter_windows(unit, plan, weight, normalize=False) > 0
        kept = [torch.where(covered, p * x + q * m, old.to(dtype)) for m, old in zip(branches, latest)]
        branches = [torch.where(covered, m, (old.to(dtype) - p * x) / q) for m, old in zip(branches, latest)]
        latest = torch.stack(kept).to(sample.dtype)
    merged = branches[0]
    if uncond is not None:
        g = torch.as_tensor(guidance_scale, dtype=dtype, device=sample.device)
        merged = branches[1] + g * (merged - branches[1])
    new_sample = a * x + b * merged
    if history is not None and cs:
        new_sample = new_sample + sum(c * h.to(dtype) for c, h in zip(cs, history))
        history = torch.cat([(d * x + e * merged).to(sample.dtype)[None], history[:-1]])
    else:
        history = None
    new_sample = new_sample.to(sample.dtype)
    return (new_sample, history) if latest is None else (new_sample, history, latest)


def regional_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prompt_ids: Tensor,
    weights: Tensor,
    *,
    mode: str = "blend",
    scale: float | None = None,
    order: Tensor | None = None,
    lengths: Tensor | None = None,
) -> Tensor:
    """Each query attends to the prompts of its region; the order in which they are visited changes nothing.

    blend: out = sum_r w_r softmax(q K_r^T scale) V_r / sum_r w_r.
    joint: out = softmax over all (r, l) of (q K_r^T scale + log w_r), times V.
    Of a prompt the first `lengths` tokens take part. One without weight has no say, whatever it holds: 0 times NaN
    is 0 here.
    """
    ids = _bank_rows(prompt_ids, key)
    if not query.numel() or ids is None:
        return torch.zeros_like(query)
    key, value, beyond = _within(key, value, lengths)
    probabilities, share = _probabilities(query, key, ids, prompt_ids, weights, mode, scale, beyond)
    each = torch.einsum("bhnrl,brlhd->bhnrd", probabilities, value[ids].to(probabilities.dtype))
    return torch.where(share > 0, each, 0.0).sum(-2).transpose(1, 2).to(query.dtype)


def regional_attention_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prompt_ids: Tensor,
    weights: Tensor,
    *,
    mode: str = "blend",
    scale: float | None = None,
    order: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients with respect to query, key and value: dS = P (dP - the mean of dP under each softmax)."""
    ids = _bank_rows(prompt_ids, key)
    if not query.numel() or ids is None:
        return torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    key, value, beyond = _within(key, value, lengths)
    p, share = _probabilities(query, key, ids, prompt_ids, weights, mode, scale, beyond)
    q, g, k, v = (t.to(p.dtype) for t in (query, grad, key[ids], value[ids]))
    dp = torch.where(share > 0, torch.einsum("bnhd,brlhd->bhnrl", g, v), 0.0)
    if mode == "blend":
        mean = (p * dp).sum(-1, keepdim=True) / torch.where(share > 0, share, 1.0)
    else:
        mean = (p * dp).sum((-2, -1), keepdim=True)
    ds = torch.where(share > 0, p * (dp - mean) * scale, 0.0)
    dq = torch.where(share > 0, torch.einsum("bhnrl,brlhd->bhnrd", ds, k), 0.0).sum(-2).transpose(1, 2)
    q, g = (torch.where(share > 0, t.transpose(1, 2)[:, :, :, None], 0.0) for t in (q, g))  # (B, heads, N, R, D)
    dk, dv = (
        torch.zeros_like(key, dtype=p.dtype).index_put_((ids,), rows, accumulate=True)
        for rows in (torch.einsum("bhnrl,bhnrd->brlhd", a, b) for a, b in ((ds, q), (p, g)))
    )
    return dq.to(query.dtype), dk.to(query.dtype), dv.to(query.dtype)


def _bank_rows(prompt_ids, key):
    """The ids as indices of the bank, the nearest in place of those outside it; None without prompts or ids."""
    return prompt_ids.clamp(0, len(key) - 1).long() if len(key) and prompt_ids.numel() else None


def _within(key, value, lengths):
    """The bank with zeros beyond its prompts' lengths, and where these are, (P, L)."""
    if lengths is None:
        return key, value, None
    beyond = torch.arange(key.shape[1], device=key.device) >= lengths.clamp(1, key.shape[1])[:, None]
    return *(t.masked_fill(beyond[:, :, None, None], 0) for t in (key, value)), beyond


def _probabilities(query, key, ids, prompt_ids, weights, mode, scale, beyond=None):
    """(B, heads, N, R, L): what the values are summed with; and the share (B, 1, N, R, 1) of each prompt."""
    dtype, scale = _accumulator(query), query.shape[-1] ** -0.5 if scale is None else scale
    w = torch.where((ids == prompt_ids)[:, :, None], weights.to(dtype), 0.0)  # (B, R, N)
    logits = torch.einsum("bnhd,brlhd->bhnrl", query.to(dtype), key[ids].to(dtype)) * scale
    if beyond is not None:
        logits = logits.masked_fill(beyond[ids][:, None, None], -torch.inf)
    w = w.permute(0, 2, 1)[:, None, :, :, None]
    total = w.sum(-2, keepdim=True)
    if mode == "blend":
        share = w / torch.where(total > 0, total, 1.0)
        return torch.where(share > 0, logits.softmax(-1), 0.0) * share, share
    # relative to the largest weight: tiny ones lose nothing, and a row without weight is all zeros
    share = w / torch.where(total > 0, w.amax(-2, keepdim=True), 1.0)
    peak = logits.masked_fill(share <= 0, -torch.inf).flatten(-2).amax(-1)
    peak = torch.where(peak.isfinite(), peak, 0.0).detach()
    mass = share * torch.where(share > 0, (logits - peak[..., None, None]).exp(), 0.0)
    norm = mass.sum((-2, -1), keepdim=True)
    return mass / torch.where(norm > 0, norm, 1.0), share

"""The operations: validation, documentation and autograd over whichever backend runs them.

All are functional, deterministic, differentiable, work under `torch.compile(fullgraph=True)` and inside a CUDA graph,
and are registered as `torch.ops.instantas.*`. Tensors are float32, float16 or bfloat16 (float64 on the CPU and on the
reference backend); arithmetic is float32 (float64 for float64). Needs only torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from instantas.backends import SCHEMAS, backends, implementation, use_backend
from instantas.windows import WindowPlan

__all__ = ["backends", "gather_windows", "guided_step", "regional_attention", "scatter_windows", "use_backend"]

MAX_HEAD_SIZE = 256
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


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
    _check_plan(plan)
    _check_tensor("canvas", canvas, "(B, C, height, width)", (None, None, plan.height, plan.width))
    return torch.ops.instantas.gather_windows(canvas, *plan.tables(canvas.device), plan.geometry)


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
    _check_plan(plan)
    _check_tensor("windows", windows, "(B, n, C, h, w)", (None, plan.count, None, *plan.window))
    _check_weight(weight, plan, windows)
    return torch.ops.instantas.scatter_windows(windows, weight, *plan.tables(windows.device), plan.geometry, True)


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
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Merge window predictions, guide them, and take the scheduler's step: one pass over the canvas.

    m = the weighted mean over the covering windows of u + g (c - u) (classifier-free guidance);
    new sample = a x + b m + sum_j c_j h_j; the history entry d x + e m goes in front and the oldest is dropped.

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

    Returns:
        The new sample, and the new history (None when k = 0), of the sample's dtype.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Equivalent PyTorch code::

        c, u = scatter_windows(cond, plan, weight), scatter_windows(uncond, plan, weight)
        m = u + guidance_scale * (c - u)
        a, b, *cs = coefficients
        new_sample = a * sample + b * m + sum(c * h for c, h in zip(cs, history))
        new_history = torch.cat([(keep[0] * sample + keep[1] * m)[None], history[:-1]])
    """
    _check_plan(plan)
    _check_tensor("sample", sample, "(B, C, height, width)", (None, None, plan.height, plan.width))
    b, c = sample.shape[:2]
    window_shape = (b, plan.count, c, *plan.window)
    _check_tensor("cond", cond, "(B, n, C, h, w)", window_shape, like=sample)
    if uncond is not None:
        _check_tensor("uncond", uncond, "(B, n, C, h, w)", window_shape, like=sample)
    _check_weight(weight, plan, sample)
    coefficients = _numbers("coefficients", coefficients, sample.device)
    keep = _numbers("keep", keep, sample.device)
    if keep.shape != (2,):
        raise ValueError(f"keep: expected 2 numbers (d, e), got {keep.shape[0]}")
    k = coefficients.shape[0] - 2
    if k < 0:
        raise ValueError(f"coefficients: expected at least 2 numbers (a, b, c_1 .. c_k), got {coefficients.shape[0]}")
    if (history is None) != (k == 0):
        raise ValueError(
            f"history: expected {k} entries, one for each coefficient after the second, got "
            f"{None if history is None else tuple(history.shape)}"
        )
    if history is not None:
        _check_tensor("history", history, "(k, B, C, height, width)", (k, *sample.shape), like=sample)
    guidance_map = None
    if isinstance(guidance_scale, torch.Tensor) and guidance_scale.dim():
        shape = (plan.height, plan.width)
        _check_tensor("guidance_scale", guidance_scale, "a float or (height, width)", shape, device=sample.device)
        _check_constant("guidance_scale", guidance_scale)
        guidance_map, guidance_scale = guidance_scale, 1.0
    new_sample, new_history = torch.ops.instantas.guided_step(
        cond,
        uncond,
        sample,
        weight,
        sample.new_empty(0, *sample.shape) if history is None else history,
        coefficients,
        keep,
        _finite("guidance_scale", guidance_scale),
        guidance_map,
        *plan.tables(sample.device),
        plan.geometry,
    )
    return new_sample, None if history is None else new_history


def regional_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    prompt_ids: torch.Tensor,
    weights: torch.Tensor,
    *,
    mode: str = "blend",
    scale: float | None = None,
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

    Returns:
        (B, N, heads, D), contiguous, of the query's dtype. A query without any weight gives zeros.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came. On a GPU the values of prompt_ids
            are not read back: ids outside the bank count as unused there. Values of weights are not checked.

    Equivalent PyTorch code (blend)::

        logits = torch.einsum("bnhd,brlhd->brhnl", query, key[prompt_ids]) * scale
        each = torch.einsum("brhnl,brlhd->brnhd", logits.softmax(-1), value[prompt_ids])
        out = (weights[..., None, None] * each).sum(1) / weights.sum(1)[..., None, None]
    """
    _check_tensor("query", query, "(B, N, heads, D)", (None, None, None, None))
    b, n, heads, d = query.shape
    if not 1 <= d <= MAX_HEAD_SIZE:
        raise ValueError(f"query: expected a head size D from 1 to {MAX_HEAD_SIZE}, got {d}")
    _check_tensor("key", key, "(P, L, heads, D)", (None, None, heads, d), like=query)
    _check_tensor("value", value, "(P, L, heads, D)", tuple(key.shape), like=query)
    _check_tensor("prompt_ids", prompt_ids, "(B, R)", (b, None), dtypes=(torch.int32, torch.int64), device=query.device)
    _check_tensor("weights", weights, "(B, R, N)", (b, prompt_ids.shape[1], n), device=query.device)
    _check_constant("weights", weights)
    if key.shape[1] == 0:
        raise ValueError("key: expected at least one token, got L = 0")
    if prompt_ids.device.type == "cpu" and prompt_ids.numel() and not _tracing(prompt_ids):
        low, high = (int(v) for v in prompt_ids.aminmax())
        if low < -1 or high >= key.shape[0]:
            raise ValueError(f"prompt_ids: expected -1 to {key.shape[0] - 1}, got {low} to {high}")
    if mode not in ("blend", "joint"):
        raise ValueError(f"mode: expected 'blend' or 'joint', got {mode!r}")
    scale = d**-0.5 if scale is None else _finite("scale", scale)
    if prompt_ids.dtype == torch.int64:  # an id too large for int32 must not come out as another
        prompt_ids = prompt_ids.clamp(-1, key.shape[0]).int()
    return torch.ops.instantas.regional_attention(query, key, value, prompt_ids, weights, mode == "joint", scale)


# Validation


def _tracing(tensor) -> bool:
    """Whether values cannot be read now: under torch.compile, for fake tensors, in a CUDA graph capture."""
    return (
        torch.compiler.is_compiling()
        or type(tensor) not in (torch.Tensor, torch.nn.Parameter)
        or (tensor.is_cuda and torch.cuda.is_current_stream_capturing())
    )


def _check_plan(plan):
    if not isinstance(plan, WindowPlan):
        raise TypeError(f"plan: expected a WindowPlan, got {type(plan).__name__}")


def _check_tensor(name, tensor, layout, shape, *, dtypes=_DTYPES, like=None, device=None):
    """shape: the expected sizes, None where any will do; like: a tensor whose dtype and device it must share."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name}: expected a tensor {layout}, got {type(tensor).__name__}")
    if tensor.dim() != len(shape) or any(s is not None and t != s for t, s in zip(tensor.shape, shape)):
        wanted = ", ".join("any" if s is None else str(s) for s in shape)
        raise ValueError(f"{name}: expected {layout} = ({wanted}), got {tuple(tensor.shape)}")
    if like is not None:
        dtypes, device = (like.dtype,), like.device
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name}: expected {' or '.join(map(str, dtypes))}, got {tensor.dtype}")
    if device is not None and tensor.device != device:
        raise ValueError(f"{name}: expected a tensor on {device}, got one on {tensor.device}")


def _check_constant(name, tensor):
    if tensor.requires_grad:
        raise ValueError(f"{name}: expected a constant (its gradient is not computed), got requires_grad=True")


def _finite(name, value) -> float:
    if isinstance(value, torch.Tensor):
        _check_constant(name, value)
    try:
        value = float(value)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name}: expected a number, got {value!r}") from error
    if not abs(value) < math.inf:  # unlike math.isfinite also for symbols, under torch.compile(dynamic=True)
        raise ValueError(f"{name}: expected a finite number, got {value}")
    return value


_sound_weights = WeakTensorKeyDictionary()  # weight -> its version, the (plan, dtype) with which it was found right


def _check_weight(weight, plan, like):
    """like: the tensor to be weighted, whose dtype says in which precision the weights are used."""
    if weight is None:
        return
    device, dtype = like.device, torch.float64 if like.dtype == torch.float64 else torch.float32
    shape = plan.window if isinstance(weight, torch.Tensor) and weight.dim() == 2 else (plan.count, *plan.window)
    dtypes = (torch.float32, torch.float64)
    _check_tensor("weight", weight, "(h, w) or (n, h, w)", shape, dtypes=dtypes, device=device)
    _check_constant("weight", weight)
    if _tracing(weight):
        return
    version, uses = _sound_weights.get(weight, (None, None))
    if version == weight._version and (plan, dtype) in uses:
        return
    total = _weight_total(weight.to(dtype), plan.tables(device), plan.geometry)
    if not (total.isfinite().all() and (weight >= 0).all()):
        raise ValueError(f"weight: expected values >= 0, finite in {dtype}, got negative, infinite or NaN ones")
    if not (total > 0).all():
        y, x = (total <= 0).nonzero()[0].tolist()
        raise ValueError(f"weight: expected some weight over every cell of the canvas, got none at ({y}, {x})")
    _sound_weights[weight] = weight._version, (uses if version == weight._version else set()) | {(plan, dtype)}


def _numbers(name, values, device) -> torch.Tensor:
    """A float64 vector on the device; a tensor that is one already is taken as it is, unread."""
    if isinstance(values, torch.Tensor):
        if values.dim() != 1:
            raise ValueError(f"{name}: expected a vector, got shape {tuple(values.shape)}")
        if values.device != device:
            raise ValueError(f"{name}: expected a tensor on {device}, got one on {values.device}")
        _check_constant(name, values)
        return values.double()
    try:
        values = list(values)
    except TypeError as error:
        raise TypeError(f"{name}: expected numbers or a tensor of them, got {values!r}") from error
    values = [_finite(name, v) for v in values]
    return torch.tensor(values, dtype=torch.float64, device=device)


# Registration: schema, dispatch, fake and autograd of torch.ops.instantas.*

_library = torch.library.Library("instantas", "DEF")


def _dispatcher(operation):
    def run(*args):
        return implementation(operation, args[0])(*args)

    return run


for _name, _schema in SCHEMAS.items():
    _library.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(_name, _dispatcher(_name), "CompositeExplicitAutograd")


def _weight_total(weight, tables, geometry):
    """(height, width): the sum of the overlap weights over each cell."""
    origins = tables[0]
    n, (h, w) = origins.shape[0], geometry[2:4]
    windows = weight.expand(n, h, w).contiguous()[None, :, None]
    return torch.ops.instantas.scatter_windows(windows, None, *tables, geometry, False)[0, 0]


def _adjoint_scatter(grad, weight, tables, geometry, normalize):
    """What the mean over the covering windows passes back to each window."""
    grad = grad if grad.dtype == torch.float64 else grad.float()
    h, w = geometry[2:4]
    unit = torch.ones(h, w, dtype=grad.dtype, device=grad.device) if weight is None else weight.to(grad.dtype)
    if normalize:
        grad = grad / _weight_total(unit, tables, geometry)
    windows = torch.ops.instantas.gather_windows(grad, *tables, geometry)
    return windows * (unit if unit.dim() == 2 else unit[:, None])


@torch.library.register_fake("instantas::gather_windows")
def _(canvas, origins, cover_start, cover_index, geometry):
    return canvas.new_empty(canvas.shape[0], origins.shape[0], canvas.shape[1], *geometry[2:4])


@torch.library.register_fake("instantas::scatter_windows")
def _(windows, weight, origins, cover_start, cover_index, geometry, normalize):
    return windows.new_empty(windows.shape[0], windows.shape[2], *geometry[:2])


@torch.library.register_fake("instantas::guided_step")
def _(cond, uncond, sample, weight, history, *rest):
    return sample.new_empty(sample.shape), history.new_empty(history.shape)


@torch.library.register_fake("instantas::regional_attention")
def _(query, *rest):
    return query.new_empty(query.shape)


@torch.library.register_fake("instantas::regional_attention_backward")
def _(grad, query, key, value, *rest):
    return tuple(t.new_empty(t.shape) for t in (query, key, value))


def _gather_setup(ctx, inputs, output):
    _, *tables, ctx.geometry = inputs
    ctx.save_for_backward(*tables)


def _gather_backward(ctx, grad):
    tables = ctx.saved_tensors
    return torch.ops.instantas.scatter_windows(grad, None, *tables, ctx.geometry, False), None, None, None, None


def _scatter_setup(ctx, inputs, output):
    windows, weight, *tables, ctx.geometry, ctx.normalize = inputs
    ctx.dtype = windows.dtype
    ctx.save_for_backward(weight, *tables)


def _scatter_backward(ctx, grad):
    weight, *tables = ctx.saved_tensors
    windows = _adjoint_scatter(grad, weight, tables, ctx.geometry, ctx.normalize)
    return windows.to(ctx.dtype), None, None, None, None, None, None


def _step_setup(ctx, inputs, output):
    _, uncond, sample, weight, _, coefficients, keep, ctx.scale, guidance_map, *tables, ctx.geometry = inputs
    ctx.guided, ctx.dtype = uncond is not None, sample.dtype
    ctx.save_for_backward(weight, coefficients, keep, guidance_map, *tables)


def _step_backward(ctx, grad_sample, grad_history):
    weight, coefficients, keep, guidance_map, *tables = ctx.saved_tensors
    dtype = torch.float64 if ctx.dtype == torch.float64 else torch.float32
    coefficients, keep = coefficients.to(dtype), keep.to(dtype)
    grad_sample, grad_history = grad_sample.to(dtype), grad_history.to(dtype)
    from_x, from_m = coefficients[0] * grad_sample, coefficients[1] * grad_sample
    from_history = coefficients[2:, None, None, None, None] * grad_sample
    if len(grad_history):
        from_x, from_m = from_x + keep[0] * grad_history[0], from_m + keep[1] * grad_history[0]
        from_history = torch.cat([from_history[:-1] + grad_history[1:], from_history[-1:]])
    guidance = ctx.scale if guidance_map is None else guidance_map.to(dtype)
    cond = _adjoint_scatter(from_m * guidance if ctx.guided else from_m, weight, tables, ctx.geometry, True)
    uncond = None
    if ctx.guided:
        uncond = _adjoint_scatter(from_m * (1 - guidance), weight, tables, ctx.geometry, True).to(ctx.dtype)
    grads = cond.to(ctx.dtype), uncond, from_x.to(ctx.dtype), None, from_history.to(ctx.dtype)
    return *grads, *[None] * 8


def _attention_setup(ctx, inputs, output):
    *tensors, ctx.joint, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _attention_backward(ctx, grad):
    grads = torch.ops.instantas.regional_attention_backward(grad, *ctx.saved_tensors, ctx.joint, ctx.scale)
    return *grads, None, None, None, None


for _name, _backward, _setup in (
    ("gather_windows", _gather_backward, _gather_setup),
    ("scatter_windows", _scatter_backward, _scatter_setup),
    ("guided_step", _step_backward, _step_setup),
    ("regional_attention", _attention_backward, _attention_setup),
):
    torch.library.register_autograd(f"instantas::{_name}", _backward, setup_context=_setup)

"""The operators `torch.ops.instantas.*`: schema, dispatch, fake tensors and autograd, the same for every backend."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from instantas.ops import reference
from instantas.ops.backend import REFERENCE, implementation
from instantas.ops.schemas import SCHEMAS

_library = torch.library.Library("instantas", "DEF")

# The scale of a compiled graph is a tensor, float64 on the CPU, that the number in `scale` is multiplied by.
_FACTOR = ("float scale)", "float scale, Tensor? factor=None)")


def _dispatcher(operation, chosen=None):
    """The operator's kernel; chosen: the function that it runs, in place of the backend's that serves the tensors."""

    def run(*args):
        return (chosen or implementation(operation, args[0]))(*args)

    def run_scaled(*args):
        *args, scale, factor = (*args, None) if isinstance(args[-1], float) else args  # without what is its default
        return run(*args, _scaled(scale, factor))

    return run_scaled if "attention" in operation else run


def _scaled(scale, factor):
    return scale if factor is None else scale * factor.item()


for _name, _schema in SCHEMAS.items():
    _library.define(_name + _schema.replace(*_FACTOR), tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(_name, _dispatcher(_name), "CompositeExplicitAutograd")
    # torch.func cannot transform the derivatives registered below: where it is at work, the reference's steps are
    _library.impl(_name, _dispatcher(_name, REFERENCE[_name]), "FuncTorchDynamicLayerFrontMode")


def weight_total(weight: torch.Tensor, tables: Sequence[torch.Tensor], geometry: list[int]) -> torch.Tensor:
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
        grad = grad / weight_total(unit, tables, geometry)
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
    *tensors, ctx.joint, ctx.scale, factor = inputs
    ctx.save_for_backward(*tensors, factor)


def _attention_backward(ctx, grad):
    *tensors, factor = ctx.saved_tensors
    grads = torch.ops.instantas.regional_attention_backward(grad, *tensors, ctx.joint, ctx.scale, factor)
    return *grads, *[None] * 5


def _attention_second_backward(ctx, *grads):
    """Through the reference, whose every step torch can differentiate, as often as asked for."""
    *tensors, prompt_ids, weights, factor = ctx.saved_tensors
    mode, scale = "joint" if ctx.joint else "blend", _scaled(ctx.scale, factor)

    def first(*tensors):
        return reference.regional_attention_backward(*tensors, prompt_ids, weights, mode=mode, scale=scale)

    return *torch.func.vjp(first, *tensors)[1](grads), *[None] * 5


for _name, _backward, _setup in (
    ("gather_windows", _gather_backward, _gather_setup),
    ("scatter_windows", _scatter_backward, _scatter_setup),
    ("guided_step", _step_backward, _step_setup),
    ("regional_attention", _attention_backward, _attention_setup),
    ("regional_attention_backward", _attention_second_backward, _attention_setup),
):
    torch.library.register_autograd(f"instantas::{_name}", _backward, setup_context=_setup)

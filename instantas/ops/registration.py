"""The operators `torch.ops.instantas.*`: schema, dispatch, fake tensors and autograd, the same for every backend.

Their namespace is the package's name: a copy that is loaded under another one has operators of its own (`make hub`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import is_grad_enabled
from torch._C import (
    _get_tracing_state,
    _is_any_autocast_enabled,
    _len_torch_dispatch_stack,
    _len_torch_function_stack,
)
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad
from torch.compiler import is_dynamo_compiling

from ..windows import WindowPlan
from . import reference
from .backend import REFERENCE, forced, implementation
from .schemas import SCHEMAS

NAMESPACE = __package__.rpartition(".")[0].replace(".", "_")
operators = getattr(torch.ops, NAMESPACE)
_library = torch.library.Library(NAMESPACE, "DEF")

# The scale of a compiled graph is a tensor, float64 on the CPU, that the number in `scale` is multiplied by.
_FACTOR = ("Tensor? lengths=None)", "Tensor? lengths=None, Tensor? factor=None)")


def _dispatcher(operation, chosen=None):
    """The operator's kernel; chosen: the function that it runs, in place of the backend's that serves the tensors."""

    def run(*args):
        kernel, device = chosen or implementation(operation, args[0]), args[0].device.type
        if _autocast(device):  # which would have products of the kernels in PyTorch rounded to half precision
            with torch.autocast(device, enabled=False):
                return kernel(*args)
        return kernel(*args)

    def run_scaled(*args):
        at = next(i for i, value in enumerate(args) if isinstance(value, float))
        order, lengths, factor = (*args[at + 1 :], None, None, None)[:3]  # they come without what is their default
        rest = (order, lengths) if lengths is not None else () if order is None else (order,)
        return run(*args[:at], _scaled(args[at], factor), *rest)

    return run_scaled if "attention" in operation else run


def _autocast(device):
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def _scaled(scale, factor):
    return scale if factor is None else scale * factor.item()


for _name, _schema in SCHEMAS.items():
    _library.define(_name + _schema.replace(*_FACTOR), tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(_name, _dispatcher(_name), "CompositeExplicitAutograd")
    # torch.func cannot transform the derivatives registered below: where it is at work, the reference's steps are
    _library.impl(_name, _dispatcher(_name, REFERENCE[_name]), "FuncTorchDynamicLayerFrontMode")


def call(operation: str, *args: Any, plan: WindowPlan | None = None) -> Any:
    """The operator. A library's own one at once, where nothing could tell: on the CPU a call costs half the time.

    plan: given where all of args but the first follow from it, so that `repeated` may find them again.
    """
    if not _watched() and all(_plain(value) for value in args if isinstance(value, torch.Tensor)):
        own = implementation(operation, args[0])
        if isinstance(own, torch._ops.OpOverload):
            if plan is not None and not forced:
                plan.calls[_kind(operation, args[0])] = own._op, args[1:]
            return own._op(*args)
    return getattr(operators, operation)(*args)


def repeated(operation: str, tensor: Any, plan: Any) -> tuple[Callable[..., Any], tuple[Any, ...]] | None:
    """What runs the operation on such a tensor, and its further arguments, if it was called with one on this plan.

    Such a call was found right: with cold caches its checks and tables take longer than a small canvas takes to copy.
    """
    if type(plan) is not WindowPlan or _watched() or forced or not _plain(tensor):
        return None
    return plan.calls.get(_kind(operation, tensor))


def _kind(operation, tensor):
    return operation, tensor.shape, tensor.dtype, tensor.device, tensor.layout


def _plain(tensor):
    """Whether it is of no class of its own, and has no gradient to be computed."""
    return type(tensor) is torch.Tensor and not (tensor.requires_grad and is_grad_enabled())


def _watched():
    """Whether a compiler, a tracer, a mode, a transform, autocast or forward-mode autograd looks on."""
    return (
        is_dynamo_compiling()
        or _len_torch_dispatch_stack() > 0
        or _len_torch_function_stack() > 0
        or peek_interpreter_stack() is not None
        or _get_tracing_state() is not None
        or _is_any_autocast_enabled()
        or forward_ad._current_level >= 0
    )


def weight_total(weight: torch.Tensor, tables: Sequence[torch.Tensor], geometry: list[int]) -> torch.Tensor:
    """(height, width): the sum of the overlap weights over each cell."""
    origins = tables[0]
    n, (h, w) = origins.shape[0], geometry[2:4]
    windows = weight.expand(n, h, w).contiguous()[None, :, None]
    return operators.scatter_windows(windows, None, *tables, geometry, False)[0, 0]


def _wide(tensor):
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _unit(weight, like, geometry):
    """The overlap weight, 1 everywhere where there is none."""
    return torch.ones(geometry[2:4], dtype=like.dtype, device=like.device) if weight is None else weight.to(like.dtype)


def _weighted_windows(canvas, weight, tables, geometry):
    """The adjoint of the weighted sum of windows over each cell."""
    windows = operators.gather_windows(canvas, *tables, geometry)
    return windows * (weight if weight.dim() == 2 else weight[:, None])


@torch.library.register_fake(f"{NAMESPACE}::gather_windows")
def _(canvas, origins, cover_start, cover_index, geometry):
    return canvas.new_empty(canvas.shape[0], origins.shape[0], canvas.shape[1], *geometry[2:4])


@torch.library.register_fake(f"{NAMESPACE}::scatter_windows")
def _(windows, weight, origins, cover_start, cover_index, geometry, normalize):
    return windows.new_empty(windows.shape[0], windows.shape[2], *geometry[:2])


@torch.library.register_fake(f"{NAMESPACE}::guided_step")
def _(cond, uncond, sample, weight, history, latest, *rest):
    return tuple(t.new_empty(t.shape) for t in (sample, history, latest))


@torch.library.register_fake(f"{NAMESPACE}::regional_attention")
def _(query, *rest):
    return query.new_empty(query.shape)


@torch.library.register_fake(f"{NAMESPACE}::regional_attention_backward")
def _(grad, query, key, value, *rest):
    return tuple(t.new_empty(t.shape) for t in (query, key, value))


def _gather_setup(ctx, inputs, output):
    _, *tables, ctx.geometry = inputs
    ctx.save_for_backward(*tables)


def _gather_backward(ctx, grad):
    tables = ctx.saved_tensors
    return operators.scatter_windows(grad, None, *tables, ctx.geometry, False), None, None, None, None


def _scatter_setup(ctx, inputs, output):
    windows, weight, *tables, ctx.geometry, ctx.normalize = inputs
    ctx.dtype = windows.dtype
    ctx.save_for_backward(weight, *tables)


def _scatter_backward(ctx, grad):
    weight, *tables = ctx.saved_tensors
    grad = _wide(grad)
    weight = _unit(weight, grad, ctx.geometry)
    if ctx.normalize:
        grad = grad / weight_total(weight, tables, ctx.geometry)
    windows = _weighted_windows(grad, weight, tables, ctx.geometry)
    return windows.to(ctx.dtype), None, None, None, None, None, None


def _step_setup(ctx, inputs, output):
    _, uncond, sample, weight, _, latest, *rest, ctx.geometry = inputs
    coefficients, keep, carry, ctx.scale, guidance_map, *tables = rest
    ctx.guided, ctx.keeps, ctx.dtype = uncond is not None, len(latest) > 0, sample.dtype
    ctx.save_for_backward(weight, guidance_map, coefficients, keep, carry, *tables)


def _step_backward(ctx, grad_sample, grad_history, grad_latest):
    weight, guidance_map, *numbers = ctx.saved_tensors
    numbers, tables = numbers[:3], numbers[3:]
    grad_sample, grad_history, grad_latest = map(_wide, (grad_sample, grad_history, grad_latest))
    coefficients, keep, (p, q) = (number.to(grad_sample.dtype) for number in numbers)
    from_x, from_m = coefficients[0] * grad_sample, coefficients[1] * grad_sample
    from_history = coefficients[2:, None, None, None, None] * grad_sample
    if len(grad_history):
        from_x, from_m = from_x + keep[0] * grad_history[0], from_m + keep[1] * grad_history[0]
        from_history = torch.cat([from_history[:-1] + grad_history[1:], from_history[-1:]])
    branches = from_m[None]
    if ctx.guided:
        guidance = ctx.scale if guidance_map is None else guidance_map.to(from_m.dtype)
        branches = torch.stack([from_m * guidance, from_m * (1 - guidance)])
    weight = _unit(weight, grad_sample, ctx.geometry)
    total = weight_total(weight, tables, ctx.geometry)
    if ctx.keeps:  # l' = p x + q m where a window covers a cell, elsewhere m = (l - p x) / q
        covered = total > 0
        total = torch.where(covered, total, 1)
        from_x = from_x + p * torch.where(covered, grad_latest, -branches / q).sum(0)
        from_latest = torch.where(covered, 0, grad_latest + branches / q)
        branches = torch.where(covered, branches + q * grad_latest, 0)
    else:
        from_latest = grad_latest
    cond, *uncond = (_weighted_windows(each / total, weight, tables, ctx.geometry) for each in branches)
    grads = cond, *(uncond or [None]), from_x, None, from_history, from_latest
    return *(g if g is None else g.to(ctx.dtype) for g in grads), *[None] * 9


def _attention_setup(ctx, inputs, output):
    *tensors, ctx.joint, ctx.scale, order, lengths, factor = inputs
    ctx.save_for_backward(*tensors, order, lengths, factor)


def _attention_backward(ctx, grad):
    *tensors, order, lengths, factor = ctx.saved_tensors
    grads = operators.regional_attention_backward(grad, *tensors, ctx.joint, ctx.scale, order, lengths, factor)
    return *grads, *[None] * 7


def _attention_second_backward(ctx, *grads):
    """Through the reference, whose every step torch can differentiate, as often as asked for."""
    *tensors, prompt_ids, weights, _, lengths, factor = ctx.saved_tensors
    how = dict(mode="joint" if ctx.joint else "blend", scale=_scaled(ctx.scale, factor), lengths=lengths)

    def first(*tensors):
        return reference.regional_attention_backward(*tensors, prompt_ids, weights, **how)

    return *torch.func.vjp(first, *tensors)[1](grads), *[None] * 7


for _name, _backward, _setup in (
    ("gather_windows", _gather_backward, _gather_setup),
    ("scatter_windows", _scatter_backward, _scatter_setup),
    ("guided_step", _step_backward, _step_setup),
    ("regional_attention", _attention_backward, _attention_setup),
    ("regional_attention_backward", _attention_second_backward, _attention_setup),
):
    torch.library.register_autograd(f"{NAMESPACE}::{_name}", _backward, setup_context=_setup)

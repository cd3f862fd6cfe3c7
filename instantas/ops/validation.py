"""What the operations may be given: checks that name the argument, what was expected and what came."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.utils.weak import WeakTensorKeyDictionary

from ..windows import WindowPlan
from .registration import weight_total

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def tracing(tensor: torch.Tensor) -> bool:
    """Whether values cannot be read now: under torch.compile, of fake or meta tensors and those that torch.func has
    wrapped, in a CUDA graph capture."""
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or tensor.is_meta
        or torch._C._functorch.is_functorch_wrapped_tensor(tensor)
        or type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__
        or (tensor.is_cuda and torch.cuda.is_current_stream_capturing())
    )


def check_plan(plan: Any, partial: bool = True) -> None:
    """partial: whether the plan may leave cells uncovered."""
    if not isinstance(plan, WindowPlan):
        raise TypeError(f"plan: expected a WindowPlan, got {type(plan).__name__}")
    if plan.partial and not partial:
        raise ValueError(
            "plan: expected one that covers every cell (only guided_step fills cells, from latest), got a partial one"
        )


def check_tensor(
    name: str,
    tensor: Any,
    layout: str,
    shape: Sequence[int | None],
    *,
    dtypes: Sequence[torch.dtype] = DTYPES,
    like: torch.Tensor | None = None,
    device: torch.device | None = None,
) -> None:
    """shape: the expected sizes, None where any will do; like: a tensor whose dtype and device it must share."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name}: expected a tensor {layout}, got {type(tensor).__name__}")
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None:
        raise NotImplementedError(f"{name}: expected no forward-mode derivative, as only the reverse mode has them")
    if tensor.dim() != len(shape) or any(s is not None and t != s for t, s in zip(tensor.shape, shape)):
        wanted = ", ".join("any" if s is None else str(s) for s in shape)
        raise ValueError(f"{name}: expected {layout} = ({wanted}), got {tuple(tensor.shape)}")
    if like is not None:
        dtypes, device = (like.dtype,), like.device
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name}: expected {' or '.join(map(str, dtypes))}, got {tensor.dtype}")
    if tensor.layout is not torch.strided:
        raise TypeError(f"{name}: expected a dense tensor, got one of layout {tensor.layout}")
    if device is not None and tensor.device != device:
        raise ValueError(f"{name}: expected a tensor on {device}, got one on {tensor.device}")


def check_constant(name: str, tensor: torch.Tensor) -> None:
    if tensor.requires_grad:
        raise ValueError(f"{name}: expected a constant (its gradient is not computed), got requires_grad=True")


def check_prompt_ids(prompt_ids: torch.Tensor, prompts: int) -> None:
    """Whether ids are rows of a bank of so many prompts, or -1; read on the CPU alone, where nothing waits for it."""
    if prompt_ids.device.type == "cpu" and prompt_ids.numel() and not tracing(prompt_ids):
        low, high = (int(v) for v in prompt_ids.aminmax())
        if low < -1 or high >= prompts:
            raise ValueError(f"prompt_ids: expected -1 to {prompts - 1}, got {low} to {high}")


def check_lengths(lengths: torch.Tensor | None, key: torch.Tensor) -> None:
    """Whether each prompt of the bank has tokens, and no more than the bank; read on the CPU alone."""
    if lengths is None:
        return
    check_tensor("lengths", lengths, "(P,)", key.shape[:1], dtypes=(torch.int32, torch.int64), device=key.device)
    if lengths.device.type == "cpu" and lengths.numel() and not tracing(lengths):
        low, high = (int(v) for v in lengths.aminmax())
        if low < 1 or high > key.shape[1]:
            raise ValueError(f"lengths: expected 1 to {key.shape[1]}, got {low} to {high}")


_sound_orders = WeakTensorKeyDictionary()  # order -> its version with which it was found right


def check_order(order: torch.Tensor | None, query: torch.Tensor) -> None:
    """Whether it numbers each image's queries; the numbers are read on the CPU alone, where nothing waits for it."""
    if order is None:
        return
    shape, integers = query.shape[:2], (torch.int32, torch.int64)
    check_tensor("order", order, "(B, N)", shape, dtypes=integers, device=query.device)
    if order.device.type != "cpu" or not order.numel() or tracing(order):
        return
    version = math.nan if order.is_inference() else order._version
    if _sound_orders.get(order) != version:
        low, high = (int(v) for v in order.aminmax())
        if low < 0 or high >= shape[1]:
            raise ValueError(f"order: expected 0 to {shape[1] - 1}, got {low} to {high}")
        if not order.new_zeros(shape, dtype=torch.bool).scatter_(1, order.long(), True).all():
            raise ValueError("order: expected each query's number once, got some more often and some never")
        _sound_orders[order] = version


def finite(name: str, value: Any) -> float:
    if isinstance(value, torch.Tensor):
        check_constant(name, value)
    if isinstance(value, (str, bytes)):  # which float would read
        raise TypeError(f"{name}: expected a number, got {value!r}")
    try:
        value = float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name}: expected a number, got {value!r}") from error
    if not math.isfinite(value):
        raise ValueError(f"{name}: expected a finite number, got {value}")
    return value


def traced_number(name: str, value: Any, device: torch.device | str) -> torch.Tensor:
    """A float64 scalar that a compiled graph computes: a Python number in it would be a graph for each value."""
    if isinstance(value, torch.Tensor):
        if value.dim():
            raise ValueError(f"{name}: expected a number, got shape {tuple(value.shape)}")
        check_constant(name, value)
        return value.to(device, torch.float64)
    value = value if isinstance(value, (int, float)) else finite(name, value)
    return torch.ones((), dtype=torch.float64, device=device) * value


_sound_weights = WeakTensorKeyDictionary()  # weight -> its version, the (plan, dtype) with which it was found right


def check_weight(weight: torch.Tensor | None, plan: WindowPlan, like: torch.Tensor) -> None:
    """like: the tensor to be weighted, whose dtype says in which precision the weights are used."""
    if weight is None:
        return
    device, dtype = like.device, torch.float64 if like.dtype == torch.float64 else torch.float32
    shape = plan.window if isinstance(weight, torch.Tensor) and weight.dim() == 2 else (plan.count, *plan.window)
    dtypes = (torch.float32, torch.float64)
    check_tensor("weight", weight, "(h, w) or (n, h, w)", shape, dtypes=dtypes, device=device)
    check_constant("weight", weight)
    if tracing(weight):
        return
    # an inference tensor does not say whether it was changed: it is looked at every time
    version = math.nan if weight.is_inference() else weight._version
    seen, uses = _sound_weights.get(weight, (version, frozenset()))
    if seen == version and (plan, dtype) in uses:
        return
    total = weight_total(weight.to(dtype), plan.tables(device), plan.geometry)
    if not (total.isfinite().all() and (weight >= 0).all()):
        raise ValueError(f"weight: expected values >= 0, finite in {dtype}, got negative, infinite or NaN ones")
    if not plan.partial and not (total > 0).all():
        y, x = (total <= 0).nonzero()[0].tolist()
        raise ValueError(f"weight: expected some weight over every cell of the canvas, got none at ({y}, {x})")
    _sound_weights[weight] = version, (uses if seen == version else frozenset()) | {(plan, dtype)}


def vector(name: str, values: Any, device: torch.device) -> torch.Tensor:
    """A float64 vector on the device; a tensor that is one already is taken as it is, unread."""
    if isinstance(values, torch.Tensor):
        if values.dim() != 1:
            raise ValueError(f"{name}: expected a vector, got shape {tuple(values.shape)}")
        if values.device != device:
            raise ValueError(f"{name}: expected a tensor on {device}, got one on {values.device}")
        if values.is_complex():
            raise TypeError(f"{name}: expected real numbers, got {values.dtype}")
        check_constant(name, values)
        return values.double()
    try:
        values = list(values)
    except TypeError as error:
        raise TypeError(f"{name}: expected numbers or a tensor of them, got {values!r}") from error
    if torch.compiler.is_compiling():
        return torch.stack([traced_number(name, v, device) for v in values])
    return torch.tensor([finite(name, v) for v in values], dtype=torch.float64, device=device)

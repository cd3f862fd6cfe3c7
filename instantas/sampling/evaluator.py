"""Calls of the denoiser on batches of windows, smaller ones once memory has run out."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch

from instantas import ops
from instantas.checks import integer
from instantas.windows import WindowPlan

WINDOW_BATCH_SIZE = 4  # windows in one call when the caller does not say: bounds memory whatever the canvas


class Batches:
    """Calls on some of a tensor's rows at a time, on fewer once memory has run out.

    A batch for which memory runs out is halved, for all that follows; one warning says so.

    Args:
        size: rows in one call, a positive integer, or None: `WINDOW_BATCH_SIZE`.
    """

    def __init__(self, size: int | None = None):
        size = WINDOW_BATCH_SIZE if size is None else size
        self.size = integer("window_batch_size", size, 1, expected="a positive integer or None")
        self.failed, self.warned = 0, False

    def __call__(self, call: Callable, rows: torch.Tensor, captured: bool = False) -> list[Any]:
        """What call(some of the rows, which) gives, of all: tensors with a row for each, or None.

        captured: whether a CUDA graph is captured, in which nothing can be done again.
        """
        whole: list[Any] = []
        start = 0
        while start < len(rows):
            some = slice(start, start + self.size)
            given = rows[some]
            try:
                results = call(given, some)
            except RuntimeError as error:
                if len(given) == 1 or captured or not out_of_memory(error):
                    raise
                results = None
            if results is None:  # outside of the handler, which keeps what the failed call had allocated
                self._halve(len(given), rows.device)
                continue
            self._warn()
            if len(given) == len(rows):
                return list(results)
            if not whole:  # filled batch by batch, so that no result is held twice
                whole = [r if r is None else r.new_empty(len(rows), *r.shape[1:]) for r in results]
            if any((w is None) != (r is None) for w, r in zip(whole, results)):
                raise ValueError("denoiser: expected uncond for all windows or for none, got it for a part of them")
            for target, result in zip(whole, results):
                if result is not None:
                    target[some] = result
            start += len(given)
        return whole

    def _halve(self, size, device):
        if device.type == "cuda":
            torch.cuda.empty_cache()
        self.failed = self.failed or size
        self.size = size // 2

    def _warn(self):
        """Say once, at the first batch that fits, which one did not."""
        if self.failed and not self.warned:
            self.warned = True
            warnings.warn(f"out of memory with {self.failed} windows at once; going on with {self.size}", stacklevel=8)


class Evaluator:
    """Predictions of any number of windows, through calls of at most `batch` windows: see `Batches`.

    Args:
        denoiser: function of (windows (m, C, h, w), timestep, context), as `sampler.sample` takes it.
        batch: a positive integer, or None: `WINDOW_BATCH_SIZE`.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """

    def __init__(self, denoiser: Callable, batch: int | None = None):
        if not callable(denoiser):
            raise TypeError(f"denoiser: expected a function, got {type(denoiser).__name__}")
        self.denoiser, self.batches = denoiser, Batches(batch)

    def gather(self, canvas: torch.Tensor, plan: WindowPlan, context: Any) -> torch.Tensor:
        """(m, C, h, w), the windows to be evaluated, of a canvas (B, C, H, W)."""
        return ops.gather_windows(canvas, plan).flatten(0, 1)

    def __call__(self, windows: torch.Tensor, context: Any) -> list[Any]:
        """[cond, uncond or None] of windows (m, C, h, w); context: the `step.StepContext` with all their rows.

        Raises:
            ValueError: for predictions of another shape, or with uncond for a part of the windows.
        """

        def call(given, some):
            return _pair(self.denoiser(given, context.timestep, context.subset(some)), given)

        return self.batches(call, windows, context.captured)


def out_of_memory(error: BaseException) -> bool:
    """Of a GPU, or of the host, for which torch's allocator raises a plain RuntimeError."""
    kinds = MemoryError, torch.OutOfMemoryError
    return isinstance(error, kinds) or "DefaultCPUAllocator: can't allocate memory" in str(error)


def _pair(prediction, windows):
    pair = prediction if isinstance(prediction, (tuple, list)) else (prediction, None)
    if len(pair) != 2:
        raise ValueError(f"denoiser: expected a prediction or a pair (cond, uncond), got {len(pair)} values")
    for each in pair:
        if not isinstance(each, torch.Tensor) and not (each is None and pair[0] is not None):
            raise TypeError(f"denoiser: expected a tensor of predictions, got {type(each).__name__}")
        if each is not None and each.shape != windows.shape:
            raise ValueError(f"denoiser: expected predictions of shape {tuple(windows.shape)}, got {tuple(each.shape)}")
    return tuple(each if each is None else each.to(windows.dtype) for each in pair)

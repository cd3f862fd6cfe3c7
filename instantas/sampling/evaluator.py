"""Calls of the denoiser on batches of windows, smaller ones once memory has run out."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch

from instantas.checks import integer

WINDOW_BATCH_SIZE = 4  # windows in one call when the caller does not say: bounds memory whatever the canvas


class Evaluator:
    """Predictions of any number of windows, through calls of at most `batch` windows.

    A batch for which memory runs out is halved, for the rest of the run; one warning says so.

    Args:
        denoiser: function of (windows (m, C, h, w), timestep, context), as `sampler.sample` takes it.
        batch: a positive integer, or None: `WINDOW_BATCH_SIZE`.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """

    def __init__(self, denoiser: Callable, batch: int | None = None):
        if not callable(denoiser):
            raise TypeError(f"denoiser: expected a function, got {type(denoiser).__name__}")
        batch = WINDOW_BATCH_SIZE if batch is None else batch
        self.batch = integer("window_batch_size", batch, 1, expected="a positive integer or None")
        self.denoiser = denoiser
        self.failed, self.warned = 0, False

    def __call__(self, windows: torch.Tensor, context: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(cond, uncond or None) of windows (m, C, h, w); context: the `sampler.StepContext` with all their rows.

        Raises:
            ValueError: for predictions of another shape, or with uncond for a part of the windows.
        """
        whole: list[Any] = []  # cond, uncond or None
        start = 0
        while start < len(windows):
            some = slice(start, start + self.batch)
            given = windows[some]
            try:
                predicted = _pair(self.denoiser(given, context.timestep, context.subset(some)), given)
            except RuntimeError as error:
                if len(given) == 1 or context.captured or not _out_of_memory(error):
                    raise
                predicted = None
            if predicted is None:  # outside of the handler, which keeps what the failed call had allocated
                self._halve(len(given), windows.device)
                continue
            self._warn()
            if len(given) == len(windows):
                return predicted
            if not whole:  # filled batch by batch, so that no prediction is held twice
                whole = [p if p is None else torch.empty_like(windows) for p in predicted]
            if (whole[1] is None) != (predicted[1] is None):
                raise ValueError("denoiser: expected uncond for all windows or for none, got it for a part of them")
            for target, p in zip(whole, predicted):
                if p is not None:
                    target[some] = p
            start += len(given)
        return whole[0], whole[1]

    def _halve(self, size, device):
        if device.type == "cuda":
            torch.cuda.empty_cache()
        self.failed = self.failed or size
        self.batch = size // 2

    def _warn(self):
        """Say once, at the first batch that fits, which one did not."""
        if self.failed and not self.warned:
            self.warned = True
            warnings.warn(f"out of memory with {self.failed} windows at once; going on with {self.batch}", stacklevel=6)


def _out_of_memory(error):
    """Of a GPU, or of the CPU, whose allocator raises a plain RuntimeError."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator: can't allocate memory" in str(error)


def _pair(prediction, windows):
    pair = prediction if isinstance(prediction, (tuple, list)) else (prediction, None)
    if len(pair) != 2:
        raise ValueError(f"denoiser: expected a prediction or a pair (cond, uncond), got {len(pair)} values")
    for each in pair:
        if each is not None and each.shape != windows.shape:
            raise ValueError(f"denoiser: expected predictions of shape {tuple(windows.shape)}, got {tuple(each.shape)}")
    return tuple(each if each is None else each.to(windows.dtype) for each in pair)

"""The nodes that give a model windows."""

from __future__ import annotations

from typing import Any

from instantas.comfyui.hooks import CELL, Hooks, Strided
from instantas.sampling.hosted import Windowed

BRIDGINGS = ["shift", "economy", "centred", "dilated", "none"]  # "moments" needs the guided prediction
WRAPS = {"none": (False, False), "horizontal": (False, True), "vertical": (True, False), "both": (True, True)}


def _pixels(name: str, value: int) -> int:
    """In cells."""
    if value % CELL or value < CELL:
        raise ValueError(f"{name}: expected a multiple of {CELL} pixels, got {value}")
    return value // CELL


def _side(default: int, tooltip: str) -> tuple:
    return "INT", {"default": default, "min": CELL, "max": 8192, "step": CELL, "tooltip": tooltip}


_WINDOW = {
    "model": ("MODEL",),
    "width": _side(512, "Width of a window in pixels: what the model was trained on."),
    "height": _side(512, "Height of a window in pixels: what the model was trained on."),
}
_SETTINGS = {
    "window_batch": ("INT", {"default": 4, "min": 1, "max": 256, "tooltip": "Windows in one call of the network."}),
    "wrap": (list(WRAPS), {"tooltip": "Axes along which the picture is a circle."}),
}


class Windows:
    """Pictures of any size in the fewest windows, tied together by a bridge."""

    CATEGORY, FUNCTION, RETURN_TYPES = "instantas", "patch", ("MODEL",)
    DESCRIPTION = "Samples latents of any size through windows of the size that the model knows, in the fewest of them."

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        bridging = BRIDGINGS, {"default": "shift", "tooltip": "What ties windows that hardly overlap into one picture."}
        return {"required": {**_WINDOW, "bridging": bridging, **_SETTINGS}}

    def patch(
        self, model: Any, width: int, height: int, bridging: str = "shift", window_batch: int = 4, wrap: str = "none"
    ) -> tuple:
        if bridging not in BRIDGINGS:
            raise ValueError(f"bridging: expected one of {', '.join(BRIDGINGS)}, got {bridging!r}")
        window = _pixels("height", height), _pixels("width", width)
        host = Windowed(window, bridging=bridging, window_batch_size=window_batch, wrap=WRAPS[wrap])
        return (Hooks.install(model, host),)


class MultiDiffusion:
    """The baseline: windows at every multiple of a stride, averaged."""

    CATEGORY, FUNCTION, RETURN_TYPES = "instantas", "patch", ("MODEL",)
    DESCRIPTION = "MultiDiffusion: windows at every multiple of a stride, averaged where they overlap; the baseline."

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {"required": {**_WINDOW, "stride": _side(64, "Pixels from a window to the next."), **_SETTINGS}}

    def patch(
        self, model: Any, width: int, height: int, stride: int = 64, window_batch: int = 4, wrap: str = "none"
    ) -> tuple:
        window, cells = (_pixels("height", height), _pixels("width", width)), _pixels("stride", stride)
        if cells > min(window):
            raise ValueError(f"stride: expected at most the window's {min(window) * CELL} pixels, got {stride}")
        host = Strided(window, cells, window_batch_size=window_batch, wrap=WRAPS[wrap])
        return (Hooks.install(model, host),)

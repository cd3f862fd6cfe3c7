"""Masks: reading them from anything that holds one, boxes, fitting, feathering and averaging them.

A mask is float32 (height, width) in 0..1 and is never binarised.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from numbers import Integral
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from instantas.checks import real


def read_mask(mask: Any) -> torch.Tensor:
    """A mask from a picture file, PIL image, array or tensor, as float32 (h, w) in 0..1 on the CPU.

    Pictures in colour count with their luminance, transparent ones with luminance times opacity. Integers are 0 and 1
    if there is nothing above 1, else 0 to 255 (0 to 65535 for uint16 and 16-bit pictures); floats are 0 to 1. Axes of
    length 1 around (h, w) are dropped.

    Raises:
        TypeError, ValueError: for what is not a mask: an unreadable file, other axes, values out of range or not
            finite, nothing above 0.
    """
    if isinstance(mask, (str, os.PathLike)):
        mask = _open(mask)
    if hasattr(mask, "convert"):
        return _checked(*_from_picture(mask))
    if isinstance(mask, torch.Tensor):
        mask = mask.detach().cpu()
        mask = (mask.float() if mask.is_floating_point() else mask).numpy()
    if not isinstance(mask, np.ndarray):
        raise TypeError(f"mask: expected a picture, an array, a tensor or a file, got {type(mask).__name__}")
    while mask.ndim > 2 and mask.shape[0] == 1:
        mask = mask[0]
    if mask.ndim == 3 and mask.shape[2] == 1:
        mask = mask[..., 0]
    return _checked(mask)


def _open(path):
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as picture:
            picture.load()
            return picture
    except (OSError, UnidentifiedImageError) as error:
        raise ValueError(f"mask: expected a picture file, got {str(path)!r} ({error})") from error


def _from_picture(picture):
    """(array, opacity or None)"""
    if picture.mode == "P":
        picture = picture.convert("RGBA" if "transparency" in picture.info else "RGB")
    if picture.mode in ("LA", "RGBA", "PA", "La", "RGBa"):
        picture = picture.convert("RGBA")
        return np.asarray(picture.convert("RGB").convert("L")), np.asarray(picture.getchannel("A"))
    if picture.mode == "I":
        return np.asarray(picture).astype(np.uint16), None
    return np.asarray(picture if picture.mode in ("1", "L", "F") or ";" in picture.mode else picture.convert("L")), None


def _checked(values: np.ndarray, opacity: np.ndarray | None = None) -> torch.Tensor:
    if values.ndim != 2 or 0 in values.shape:
        raise ValueError(f"mask: expected (height, width), got shape {values.shape}")
    if not np.isfinite(values).all():
        raise ValueError("mask: expected finite values, got NaN or infinite ones")
    top = 1.0
    if np.issubdtype(values.dtype, np.integer) and values.max() > 1:
        top = 65535.0 if values.dtype == np.uint16 else 255.0
    if values.min() < 0 or values.max() > top:
        raise ValueError(f"mask: expected values from 0 to {top:g}, got {values.min()} to {values.max()}")
    mask = torch.from_numpy(values.astype(np.float64) / top)
    if opacity is not None:
        mask = mask * torch.from_numpy(opacity / 255.0)
    if not mask.any():
        raise ValueError("mask: expected some part above 0, got an empty mask")
    return mask.float()


def read_box(box: Any) -> tuple[int, ...] | tuple[float, ...]:
    """(left, top, right, bottom) as four integers, which are pixels, or as four floats, fractions of the canvas.

    Fractions where one of the four is no integer, and where none is above 1.

    Raises:
        TypeError, ValueError: for what are no four numbers, no side before the other, fractions far outside of 0 to 1.
    """
    if isinstance(box, str) or not isinstance(box, Sequence) and not hasattr(box, "tolist"):
        raise TypeError(f"box: expected (left, top, right, bottom), got {box!r}")
    sides = tuple(box.tolist() if hasattr(box, "tolist") else box)
    if len(sides) != 4:
        raise ValueError(f"box: expected (left, top, right, bottom), got {len(sides)} numbers")
    for side in sides:
        real("box", side)
    left, top, right, bottom = sides
    if left >= right or top >= bottom:
        raise ValueError(f"box: expected left < right and top < bottom, got {sides}")
    if not all(isinstance(side, Integral) for side in sides) or max(map(abs, sides)) <= 1:
        sides = tuple(float(side) for side in sides)
        if min(sides) < -1 or max(sides) > 2:
            raise ValueError(f"box: expected fractions from 0 to 1 (write pixels as integers), got {sides}")
        return sides
    return tuple(int(side) for side in sides)


def box_mask(box: tuple, height: int, width: int, wrap: tuple[bool, bool] = (False, False)) -> torch.Tensor:
    """float32 (height, width): the share of each pixel inside a box, as `read_box` gives it.

    On an axis that wraps, the box may reach over the border, and is continued on the other side.

    Raises:
        ValueError: for a box that reaches outside on an axis that does not wrap, or more than once round one that does.
    """
    fractions = any(isinstance(side, float) for side in box)
    units = (width, height, width, height) if fractions else (1, 1, 1, 1)
    left, top, right, bottom = (side * unit for side, unit in zip(box, units))
    rows = _interval(top, bottom, height, wrap[0], "vertical")
    columns = _interval(left, right, width, wrap[1], "horizontal")
    return torch.outer(rows, columns).float()


def _interval(low, high, length, wraps, axis):
    low, high = round(low, 6), round(high, 6)  # fractions of a length are not exact; a millionth of a pixel is nothing
    if not wraps and not 0 <= low < high <= length:
        raise ValueError(f"box: expected 0 to {length} pixels on the {axis} axis, got {low:g} to {high:g}")
    if wraps and not (-length <= low < high <= 2 * length and high - low <= length):
        raise ValueError(f"box: expected at most one turn of {length} pixels ({axis}), got {low:g} to {high:g}")
    pixel = torch.arange(length, dtype=torch.float64, device="cpu")
    turns = [(pixel + turn * length, pixel + turn * length + 1) for turn in (-1, 0, 1)]
    inside = [end.clamp(max=high) - start.clamp(min=low) for start, end in turns]
    return sum(part.clamp(min=0) for part in inside).clamp(max=1)


def fit_mask(mask: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """The mask at another size, by area. Sides are in proportion, up to the rounding of one pixel of the mask.

    Raises:
        ValueError: for other proportions.
    """
    h, w = mask.shape
    if (h, w) == (height, width):
        return mask
    if abs(h * width - w * height) > max(height, width):
        raise ValueError(
            f"mask: expected the canvas's proportions, {width}x{height} pixels (width x height), got {w}x{h}"
        )
    return F.interpolate(mask[None, None], (height, width), mode="area")[0, 0]


def feather(mask: torch.Tensor, pixels: int, wrap: tuple[bool, bool] = (False, False)) -> torch.Tensor:
    """Edges turned into ramps of so many pixels, half of it on each side: a box filter along both axes.

    Past the canvas the mask goes on as it is at the edge, or on the other side of an axis that wraps.
    """
    reach = -(-pixels // 2)
    if not reach:
        return mask
    for axis, wraps in enumerate(wrap):
        length = mask.shape[axis]
        index = torch.arange(-reach, length + reach, device=mask.device)
        index = index % length if wraps else index.clamp(0, length - 1)
        # sums of 0 and 1 are exact in float64, so that the mask stays exactly 0 and 1 away from its edges
        total = F.pad(mask.double().index_select(axis, index).movedim(axis, -1).cumsum(-1), (1, 0))
        side = 2 * reach + 1
        mask = ((total[..., side:] - total[..., :-side]) / side).movedim(-1, axis)
    return mask.float()


def average(mask: torch.Tensor, side: int) -> torch.Tensor:
    """(..., h, w) -> (..., ceil(h / side), ceil(w / side)): means over squares, of what there is at the far edges."""
    flat = mask.reshape(-1, 1, *mask.shape[-2:])
    flat = F.avg_pool2d(flat, side, ceil_mode=True, count_include_pad=False)
    return flat.reshape(*mask.shape[:-2], *flat.shape[-2:])


def over_cells(mask: torch.Tensor, side: int, cells: Sequence[int]) -> torch.Tensor:
    """(h, w) -> (rows, columns) `cells` of `side` pixels each: means; cells beyond the mask continue its edge."""
    mask = average(mask, side)
    rows, columns = (torch.arange(n, device=mask.device).clamp(max=length - 1) for n, length in zip(cells, mask.shape))
    return mask.index_select(0, rows).index_select(1, columns)

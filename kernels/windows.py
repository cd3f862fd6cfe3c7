"""Triton kernels between a canvas (B, C, H, W) and its windows (B, n, C, h, w).

Every program makes one block of the result and reads what it needs: no atomics. Axes that wrap need no case of their
own: a position is moved back by the length once, which never happens on an axis that does not wrap.
"""

import torch
import triton
import triton.language as tl

from .tiles import (
    as_multiple,
    canvas_grid,
    canvas_launch,
    exact_dtype,
    load_shares,
    load_window,
    locate_block,
    packed,
    place_in_window,
    range,
    weight_row,
    weight_stride,
)


@triton.jit
def _copy(canvas, windows, x0, x, width, inside):
    x += x0
    value = tl.load(canvas + tl.where(x >= width, x - width, x), inside, other=0)
    tl.store(windows, value, inside)


@triton.jit
def _gather_kernel(
    canvas,
    origins,
    windows,
    n,
    channels,
    height,
    width,
    h,
    w,
    CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ALIGN: tl.constexpr,
):
    width, w = as_multiple(width, ALIGN), as_multiple(w, ALIGN)
    image, c, i, j, _ = locate_block(tl.program_id(0), channels, h, w, CHANNELS, ROWS, COLUMNS)
    origin = origins + image % n * 2
    y0, x0 = tl.load(origin), tl.load(origin + 1)
    y = y0 + i
    y = tl.where(y >= height, y - height, y)
    inside = (c < channels) & (i < h) & (j < w)
    canvas += ((image // n * channels + c) * height + y) * width
    windows += ((image * channels + c) * h + i) * w + j
    if x0 % ALIGN == 0:
        _copy(canvas, windows, as_multiple(x0, ALIGN), j, width, inside)
    else:
        _copy(canvas, windows, x0, j, width, inside)


def gather_windows(canvas, origins, cover_start, cover_index, geometry):
    """windows[b, i] = canvas[b, :, y_i : y_i + h, x_i : x_i + w], modulo the size on wrapping axes."""
    height, width, h, w, _, _, tile_y, tile_x = geometry
    b, channels = canvas.shape[:2]
    n = origins.shape[0]
    windows = canvas.new_empty(b, n, channels, h, w)
    if windows.numel():
        launch = canvas_launch(channels, tile_y, tile_x, width, w)
        grid = canvas_grid(b * n, channels, h, w, launch)
        with torch.cuda.device_of(canvas):
            _gather_kernel[grid](packed(canvas), origins, windows, n, channels, height, width, h, w, **launch)
    return windows


@triton.jit
def _add(total, norm, windows, weight, x0, x, width, w, inside_c, inside_y):
    j = place_in_window(x, x0, width)
    inside = inside_y & (j < w)
    share = load_shares(weight, j, inside)
    total += share * tl.load(windows + j, inside_c & inside, other=0).to(tl.float32)
    return total, norm + share


@triton.jit
def _scatter_kernel(
    windows,
    weight,
    origins,
    cover_start,
    cover_index,
    canvas,
    n,
    channels,
    height,
    width,
    h,
    w,
    weight_stride,
    NORMALIZE: tl.constexpr,
    CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ALIGN: tl.constexpr,
):
    width, w = as_multiple(width, ALIGN), as_multiple(w, ALIGN)
    image, c, y, x, tile = locate_block(tl.program_id(0), channels, height, width, CHANNELS, ROWS, COLUMNS)
    total = tl.zeros([CHANNELS, ROWS, COLUMNS], tl.float32)
    on_canvas = (y < height) & (x < width)
    norm = tl.where(on_canvas, 0.0, 1.0)
    for covering in range(tl.load(cover_start + tile), tl.load(cover_start + tile + 1)):
        window, y0, x0 = load_window(cover_index, origins, covering)
        i = place_in_window(y, y0, height)
        source = windows + (((image * n + window) * channels + c) * h + i) * w
        weights = None if weight is None else weight_row(weight, window, weight_stride, i, w)
        if x0 % ALIGN == 0:
            x0 = as_multiple(x0, ALIGN)
            total, norm = _add(total, norm, source, weights, x0, x, width, w, c < channels, i < h)
        else:
            total, norm = _add(total, norm, source, weights, x0, x, width, w, c < channels, i < h)
    if NORMALIZE:
        total = tl.div_rn(total, norm)
    tl.store(canvas + ((image * channels + c) * height + y) * width + x, total, (c < channels) & on_canvas)


def scatter_windows(windows, weight, origins, cover_start, cover_index, geometry, normalize):
    """canvas[p] = sum_i w_i(p) windows_i(p), divided by sum_i w_i(p) if normalize, over the windows that cover p."""
    height, width, h, w, _, _, tile_y, tile_x = geometry
    b, n, channels = windows.shape[:3]
    canvas = windows.new_empty(b, channels, height, width, dtype=exact_dtype(windows.dtype))
    if canvas.numel():
        launch = canvas_launch(channels, tile_y, tile_x, width, w)
        grid = canvas_grid(b, channels, height, width, launch)
        with torch.cuda.device_of(windows):
            _scatter_kernel[grid](
                packed(windows),
                packed(weight),
                origins,
                cover_start,
                cover_index,
                canvas,
                n,
                channels,
                height,
                width,
                h,
                w,
                weight_stride(weight),
                NORMALIZE=normalize,
                **launch,
            )
    return canvas.to(windows.dtype)

"""Triton kernels between a canvas (B, C, H, W) and its windows (B, n, C, h, w).

Every program makes one block of the result and reads what it needs: no atomics. Axes that wrap need no case of their
own: a position is moved back by the length once, which never happens on an axis that does not wrap.
"""

import torch
import triton
import triton.language as tl


def _blocks(channels, tile_y, tile_x, *widths):
    """The shape of every program's block, and the launch options.

    A tile of the plan times at most 4 channels is 2048 elements: 16 a thread, enough 16-byte loads in flight to cover
    the latency of memory, few enough registers for 16 programs on a multiprocessor. Rows that start at multiples of 8
    elements (16 bytes in half precision) are read and written 16 bytes at a time; ALIGN is what the widths allow.
    """
    align = next(a for a in (8, 4, 2, 1) if all(width % a == 0 for width in widths))
    depth = min(4, triton.next_power_of_2(channels))
    return dict(CHANNELS=depth, ROWS=tile_y, COLUMNS=tile_x, ALIGN=align, num_warps=4, num_stages=1)


def _stored(dtype):
    """The interpreter cuts float32 off where the device rounds it to bfloat16: there torch rounds instead."""
    interpreted = not isinstance(_scatter_kernel, triton.JITFunction)
    return torch.float32 if interpreted and dtype == torch.bfloat16 else dtype


@triton.jit
def _multiple(value, ALIGN: tl.constexpr):
    return value // ALIGN * ALIGN  # the same number, which the compiler now knows to be a multiple


@triton.jit
def _block(block, channels, height, width, CHANNELS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Block number -> image, channels, rows, columns, number of the tile; columns vary fastest, then rows."""
    across, down, deep = tl.cdiv(width, COLUMNS), tl.cdiv(height, ROWS), tl.cdiv(channels, CHANNELS)
    tile = block % (down * across)
    image = block // (down * across)
    c = image % deep * CHANNELS + tl.arange(0, CHANNELS)
    y = tile // across * ROWS + tl.arange(0, ROWS)
    x = tile % across * COLUMNS + tl.arange(0, COLUMNS)
    return (image // deep).to(tl.int64), c[:, None, None], y[None, :, None], x[None, None, :], tile


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
    width, w = _multiple(width, ALIGN), _multiple(w, ALIGN)
    image, c, i, j, _ = _block(tl.program_id(0), channels, h, w, CHANNELS, ROWS, COLUMNS)
    origin = origins + image % n * 2
    y0, x0 = tl.load(origin), tl.load(origin + 1)
    y = y0 + i
    y = tl.where(y >= height, y - height, y)
    inside = (c < channels) & (i < h) & (j < w)
    canvas += ((image // n * channels + c) * height + y) * width
    windows += ((image * channels + c) * h + i) * w + j
    if x0 % ALIGN == 0:
        _copy(canvas, windows, _multiple(x0, ALIGN), j, width, inside)
    else:
        _copy(canvas, windows, x0, j, width, inside)


def gather_windows(canvas, origins, cover_start, cover_index, geometry):
    """windows[b, i] = canvas[b, :, y_i : y_i + h, x_i : x_i + w], modulo the size on wrapping axes."""
    height, width, h, w, _, _, tile_y, tile_x = geometry
    b, channels = canvas.shape[:2]
    n = origins.shape[0]
    windows = canvas.new_empty(b, n, channels, h, w)
    if windows.numel():
        launch = _blocks(channels, tile_y, tile_x, width, w)
        grid = (b * n * triton.cdiv(channels, launch["CHANNELS"]) * triton.cdiv(h, tile_y) * triton.cdiv(w, tile_x),)
        with torch.cuda.device_of(canvas):
            _gather_kernel[grid](canvas.contiguous(), origins, windows, n, channels, height, width, h, w, **launch)
    return windows


@triton.jit
def _add(total, norm, windows, weight, x0, x, width, w, inside_c, inside_y):
    j = x - x0
    j = tl.where(j < 0, j + width, j)
    inside = inside_y & (j < w)
    share = inside.to(tl.float32)
    if weight is not None:
        share = tl.load(weight + j, inside, other=0).to(tl.float32)
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
    width, w = _multiple(width, ALIGN), _multiple(w, ALIGN)
    image, c, y, x, tile = _block(tl.program_id(0), channels, height, width, CHANNELS, ROWS, COLUMNS)
    total = tl.zeros([CHANNELS, ROWS, COLUMNS], tl.float32)
    on_canvas = (y < height) & (x < width)
    norm = tl.where(on_canvas, 0.0, 1.0)
    for covering in range(tl.load(cover_start + tile), tl.load(cover_start + tile + 1)):
        window = tl.load(cover_index + covering).to(tl.int64)
        y0, x0 = tl.load(origins + 2 * window), tl.load(origins + 2 * window + 1)
        i = y - y0
        i = tl.where(i < 0, i + height, i)
        source = windows + (((image * n + window) * channels + c) * h + i) * w
        weight_row = weight
        if weight is not None:
            weight_row = weight + window * weight_stride + i.to(tl.int64) * w
        if x0 % ALIGN == 0:
            x0 = _multiple(x0, ALIGN)
            total, norm = _add(total, norm, source, weight_row, x0, x, width, w, c < channels, i < h)
        else:
            total, norm = _add(total, norm, source, weight_row, x0, x, width, w, c < channels, i < h)
    if NORMALIZE:
        total = tl.div_rn(total, norm)
    tl.store(canvas + ((image * channels + c) * height + y) * width + x, total, (c < channels) & on_canvas)


def scatter_windows(windows, weight, origins, cover_start, cover_index, geometry, normalize):
    """canvas[p] = sum_i w_i(p) windows_i(p), divided by sum_i w_i(p) if normalize, over the windows that cover p."""
    height, width, h, w, _, _, tile_y, tile_x = geometry
    b, n, channels = windows.shape[:3]
    canvas = windows.new_empty(b, channels, height, width, dtype=_stored(windows.dtype))
    if canvas.numel():
        launch = _blocks(channels, tile_y, tile_x, width, w)
        depth = triton.cdiv(channels, launch["CHANNELS"])
        grid = (b * depth * triton.cdiv(height, tile_y) * triton.cdiv(width, tile_x),)
        weight_stride = h * w if weight is not None and weight.dim() == 3 else 0
        with torch.cuda.device_of(windows):
            _scatter_kernel[grid](
                windows.contiguous(),
                None if weight is None else weight.contiguous(),
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
                NORMALIZE=normalize,
                **launch,
            )
    return canvas.to(windows.dtype)

"""Triton kernel of the guided step: merge, classifier-free guidance and the scheduler's update in one pass.

A program owns a tile of the canvas, as in scatter_windows, and everything between the network's predictions and the
new sample stays in its registers.
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
def _add(merged, unguided, norm, cond, uncond, weight, offset, x0, x, width, w, inside_c, inside_y):
    j = place_in_window(x, x0, width)
    inside = inside_y & (j < w)
    share = load_shares(weight, j, inside)
    merged += share * tl.load(cond + offset + j, inside_c & inside, other=0).to(tl.float32)
    if uncond is not None:
        unguided += share * tl.load(uncond + offset + j, inside_c & inside, other=0).to(tl.float32)
    return merged, unguided, norm + share


@triton.jit
def _keep(mean, norm, sample, carry, latest, new_latest, offset, inside):
    """The mean where a window covers the cell, else the prediction that was kept; what is kept of it goes on."""
    p, q = tl.load(carry).to(tl.float32), tl.load(carry + 1).to(tl.float32)
    old = tl.load(latest + offset, inside, other=0).to(tl.float32)
    tl.store(new_latest + offset, tl.where(norm > 0, p * sample + q * mean, old), inside)
    return tl.where(norm > 0, mean, tl.div_rn(old - p * sample, q))


@triton.jit
def _step_kernel(
    cond,
    uncond,
    sample,
    weight,
    history,
    latest,
    coefficients,
    keep,
    carry,
    guidance,
    guidance_map,
    origins,
    cover_start,
    cover_index,
    new_sample,
    new_history,
    new_latest,
    history_stride,
    n,
    channels,
    height,
    width,
    h,
    w,
    weight_stride,
    K: tl.constexpr,
    CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ALIGN: tl.constexpr,
):
    width, w = as_multiple(width, ALIGN), as_multiple(w, ALIGN)
    image, c, y, x, tile = locate_block(tl.program_id(0), channels, height, width, CHANNELS, ROWS, COLUMNS)
    merged = tl.zeros([CHANNELS, ROWS, COLUMNS], tl.float32)
    unguided = tl.zeros([CHANNELS, ROWS, COLUMNS], tl.float32)
    on_canvas = (y < height) & (x < width)
    norm = tl.where(on_canvas, 0.0, 1.0)
    for covering in range(tl.load(cover_start + tile), tl.load(cover_start + tile + 1)):
        window, y0, x0 = load_window(cover_index, origins, covering)
        i = place_in_window(y, y0, height)
        source = (((image * n + window) * channels + c) * h + i) * w
        weights = None if weight is None else weight_row(weight, window, weight_stride, i, w)
        inside_c, inside_y = c < channels, i < h  # here and not in the branches, where bfloat16 would spill
        if x0 % ALIGN == 0:
            x0 = as_multiple(x0, ALIGN)
            merged, unguided, norm = _add(
                merged, unguided, norm, cond, uncond, weights, source, x0, x, width, w, inside_c, inside_y
            )
        else:
            merged, unguided, norm = _add(
                merged, unguided, norm, cond, uncond, weights, source, x0, x, width, w, inside_c, inside_y
            )

    inside = (c < channels) & on_canvas
    offset = ((image * channels + c) * height + y) * width + x
    value = tl.load(sample + offset, inside, other=0).to(tl.float32)
    total = norm if latest is None else tl.where(norm > 0, norm, 1.0)
    merged = tl.div_rn(merged, total)
    if latest is not None:
        merged = _keep(merged, norm, value, carry, latest, new_latest, offset, inside)
    if uncond is not None:
        unguided = tl.div_rn(unguided, total)
        if latest is not None:
            latest += history_stride
            new_latest += history_stride
            unguided = _keep(unguided, norm, value, carry, latest, new_latest, offset, inside)
        g = guidance
        if guidance_map is not None:
            g = tl.load(guidance_map + y.to(tl.int64) * width + x, on_canvas, other=0).to(tl.float32)
        merged = unguided + g * (merged - unguided)

    result = tl.load(coefficients).to(tl.float32) * value + tl.load(coefficients + 1).to(tl.float32) * merged
    if K > 0:
        newest = tl.load(keep).to(tl.float32) * value + tl.load(keep + 1).to(tl.float32) * merged
        tl.store(new_history + offset, newest, inside)
    for j in tl.static_range(K):
        past = tl.load(history + offset, inside, other=0)
        result += tl.load(coefficients + 2 + j).to(tl.float32) * past.to(tl.float32)
        history += history_stride
        new_history += history_stride
        if j + 1 < K:
            tl.store(new_history + offset, past, inside)
    tl.store(new_sample + offset, result, inside)


def guided_step(
    cond,
    uncond,
    sample,
    weight,
    history,
    latest,
    coefficients,
    keep,
    carry,
    guidance_scale,
    guidance_map,
    origins,
    cover_start,
    cover_index,
    geometry,
):
    """m = scatter(u + g (c - u)); x' = a x + b m + sum_j c_j h_j; the history takes d x + e m in front.

    latest: what is kept of c and u, p x + q c, and read where no window covers a cell; of no branch: nothing is kept.
    """
    height, width, h, w, _, _, tile_y, tile_x = geometry
    b, n, channels = cond.shape[:3]
    new = [t.new_empty(t.shape, dtype=exact_dtype(t.dtype)) for t in (sample, history, latest)]
    new_sample, new_history, new_latest = new
    if new_sample.numel():
        # the block of scatter_windows and for its reasons; with two accumulators 4 programs still fit a multiprocessor
        launch = canvas_launch(channels, tile_y, tile_x, width, w)
        grid = canvas_grid(b, channels, height, width, launch)
        with torch.cuda.device_of(sample):
            _step_kernel[grid](
                packed(cond),
                packed(uncond),
                packed(sample),
                packed(weight),
                packed(history),
                packed(latest) if len(latest) else None,
                packed(coefficients),
                packed(keep),
                packed(carry),
                guidance_scale,
                packed(guidance_map),
                origins,
                cover_start,
                cover_index,
                new_sample,
                new_history,
                new_latest,
                sample.numel(),
                n,
                channels,
                height,
                width,
                h,
                w,
                weight_stride(weight),
                K=history.shape[0],
                **launch,
            )
    return tuple(t.to(sample.dtype) for t in new)

"""Triton kernel of the guided step: merge, classifier-free guidance and the scheduler's update in one pass.

A program owns a tile of the canvas, as in scatter_windows, and everything between the network's predictions and the
new sample stays in its registers.
"""

import torch
import triton
import triton.language as tl


def _stored(dtype):
    """The interpreter cuts float32 off where the device rounds it to bfloat16: there torch rounds instead."""
    interpreted = not isinstance(_step_kernel, triton.JITFunction)
    return torch.float32 if interpreted and dtype == torch.bfloat16 else dtype


@triton.jit
def _multiple(value, ALIGN: tl.constexpr):
    return value // ALIGN * ALIGN  # the same number, which the compiler now knows to be a multiple


@triton.jit
def _add(merged, unguided, norm, cond, uncond, weight, offset, x0, x, width, w, inside_c, inside_y):
    j = x - x0
    j = tl.where(j < 0, j + width, j)
    inside = inside_y & (j < w)
    share = inside.to(tl.float32)
    if weight is not None:
        share = tl.load(weight + j, inside, other=0).to(tl.float32)
    merged += share * tl.load(cond + offset + j, inside_c & inside, other=0).to(tl.float32)
    if uncond is not None:
        unguided += share * tl.load(uncond + offset + j, inside_c & inside, other=0).to(tl.float32)
    return merged, unguided, norm + share


@triton.jit
def _step_kernel(
    cond,
    uncond,
    sample,
    weight,
    history,
    coefficients,
    keep,
    guidance,
    guidance_map,
    origins,
    cover_start,
    cover_index,
    new_sample,
    new_history,
    entry,
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
    width, w = _multiple(width, ALIGN), _multiple(w, ALIGN)
    # block number -> image, channels, rows, columns; columns vary fastest, then rows
    across, down, deep = tl.cdiv(width, COLUMNS), tl.cdiv(height, ROWS), tl.cdiv(channels, CHANNELS)
    tile = tl.program_id(0) % (down * across)
    image = tl.program_id(0) // (down * across)
    c = (image % deep * CHANNELS + tl.arange(0, CHANNELS))[:, None, None]
    y = (tile // across * ROWS + tl.arange(0, ROWS))[None, :, None]
    x = (tile % across * COLUMNS + tl.arange(0, COLUMNS))[None, None, :]
    image = (image // deep).to(tl.int64)

    merged = tl.zeros([CHANNELS, ROWS, COLUMNS], tl.float32)
    unguided = tl.zeros([CHANNELS, ROWS, COLUMNS], tl.float32)
    on_canvas = (y < height) & (x < width)
    norm = tl.where(on_canvas, 0.0, 1.0)
    for covering in range(tl.load(cover_start + tile), tl.load(cover_start + tile + 1)):
        window = tl.load(cover_index + covering).to(tl.int64)
        y0, x0 = tl.load(origins + 2 * window), tl.load(origins + 2 * window + 1)
        i = y - y0
        i = tl.where(i < 0, i + height, i)
        row = (((image * n + window) * channels + c) * h + i) * w
        weight_row = weight
        if weight is not None:
            weight_row = weight + window * weight_stride + i.to(tl.int64) * w
        in_c, in_y = c < channels, i < h
        if x0 % ALIGN == 0:
            x0 = _multiple(x0, ALIGN)
            merged, unguided, norm = _add(
                merged, unguided, norm, cond, uncond, weight_row, row, x0, x, width, w, in_c, in_y
            )
        else:
            merged, unguided, norm = _add(
                merged, unguided, norm, cond, uncond, weight_row, row, x0, x, width, w, in_c, in_y
            )

    merged = tl.div_rn(merged, norm)
    if uncond is not None:
        unguided = tl.div_rn(unguided, norm)
        g = guidance
        if guidance_map is not None:
            g = tl.load(guidance_map + y.to(tl.int64) * width + x, on_canvas, other=0).to(tl.float32)
        merged = unguided + g * (merged - unguided)

    inside = (c < channels) & on_canvas
    offset = ((image * channels + c) * height + y) * width + x
    value = tl.load(sample + offset, inside, other=0).to(tl.float32)
    result = tl.load(coefficients).to(tl.float32) * value + tl.load(coefficients + 1).to(tl.float32) * merged
    if K > 0:
        newest = tl.load(keep).to(tl.float32) * value + tl.load(keep + 1).to(tl.float32) * merged
        tl.store(new_history + offset, newest, inside)
    for j in tl.static_range(K):
        past = tl.load(history + offset, inside, other=0)
        result += tl.load(coefficients + 2 + j).to(tl.float32) * past.to(tl.float32)
        history += entry
        new_history += entry
        if j + 1 < K:
            tl.store(new_history + offset, past, inside)
    tl.store(new_sample + offset, result, inside)


def guided_step(
    cond,
    uncond,
    sample,
    weight,
    history,
    coefficients,
    keep,
    guidance_scale,
    guidance_map,
    origins,
    cover_start,
    cover_index,
    geometry,
):
    """m = scatter(u + g (c - u)); x' = a x + b m + sum_j c_j h_j; the history takes d x + e m in front."""
    height, width, h, w, _, _, tile_y, tile_x = geometry
    b, n, channels = cond.shape[:3]
    new_sample, new_history = (t.new_empty(t.shape, dtype=_stored(t.dtype)) for t in (sample, history))
    if new_sample.numel():
        # the block of scatter_windows and for its reasons; with two accumulators 4 programs still fit a multiprocessor
        depth = min(4, triton.next_power_of_2(channels))
        grid = (b * triton.cdiv(channels, depth) * triton.cdiv(height, tile_y) * triton.cdiv(width, tile_x),)

        def packed(tensor):
            return None if tensor is None else tensor.contiguous()

        with torch.cuda.device_of(sample):
            _step_kernel[grid](
                packed(cond),
                packed(uncond),
                packed(sample),
                packed(weight),
                packed(history),
                packed(coefficients),
                packed(keep),
                guidance_scale,
                packed(guidance_map),
                origins,
                cover_start,
                cover_index,
                new_sample,
                new_history,
                sample.numel(),
                n,
                channels,
                height,
                width,
                h,
                w,
                h * w if weight is not None and weight.dim() == 3 else 0,
                K=history.shape[0],
                CHANNELS=depth,
                ROWS=tile_y,
                COLUMNS=tile_x,
                ALIGN=next(a for a in (8, 4, 2, 1) if width % a == 0 and w % a == 0),
                num_warps=4,
                num_stages=1,
            )
    return new_sample.to(sample.dtype), new_history.to(sample.dtype)

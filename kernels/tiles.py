"""What the kernels share: tiles of a canvas, the windows that cover one, and how programs are launched.

The floor beneath the other modules, which import this one alone (attention is three: attention_tiles.py is the floor of
its two passes).
"""

import builtins

import torch
import triton
import triton.language as tl


@triton.jit
def as_multiple(value, ALIGN: tl.constexpr):
    return value // ALIGN * ALIGN  # the same number, which the compiler now knows to be a multiple


@triton.jit
def locate_block(block, channels, height, width, CHANNELS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Block number -> image, channels, rows, columns, number of the tile; columns vary fastest, then rows."""
    across, down, deep = tl.cdiv(width, COLUMNS), tl.cdiv(height, ROWS), tl.cdiv(channels, CHANNELS)
    tile = block % (down * across)
    image = block // (down * across)
    c = image % deep * CHANNELS + tl.arange(0, CHANNELS)
    y = tile // across * ROWS + tl.arange(0, ROWS)
    x = tile % across * COLUMNS + tl.arange(0, COLUMNS)
    return (image // deep).to(tl.int64), c[:, None, None], y[None, :, None], x[None, None, :], tile


@triton.jit
def load_window(cover_index, origins, covering):
    """An entry of the list of windows that cover a tile -> the window's number, and its origin."""
    window = tl.load(cover_index + covering).to(tl.int64)
    return window, tl.load(origins + 2 * window), tl.load(origins + 2 * window + 1)


@triton.jit
def place_in_window(position, origin, length):
    """Where positions of an axis of the canvas lie in a window; outside of it unless less than the window's length."""
    place = position - origin
    return tl.where(place < 0, place + length, place)


@triton.jit
def weight_row(weight, window, weight_stride, i, w):
    """The window's rows i of the overlap weight. (Triton 3.6 has no functions that give None.)"""
    return weight + window * weight_stride + i.to(tl.int64) * w


@triton.jit
def load_shares(weight_row, j, inside):
    """The overlap weights of columns j: 1 without a weight, 0 outside the window."""
    share = inside.to(tl.float32)
    if weight_row is not None:
        share = tl.load(weight_row + j, inside, other=0).to(tl.float32)
    return share


INTERPRETED = not isinstance(as_multiple, triton.JITFunction)


def _interpreted_range(*bounds):
    """range() of the interpreter's numbers, which are arrays of one element: numpy 2.4 makes no int of one."""
    return builtins.range(*(int(b.handle.data.item()) if isinstance(b, tl.tensor) else b for b in bounds))


range = _interpreted_range if INTERPRETED else builtins.range


def alignment(*lengths):
    """The most elements, at most 8, of which all lengths are multiples: 8 of half precision are the widest access."""
    return next(width for width in (8, 4, 2, 1) if all(length % width == 0 for length in lengths))


def canvas_launch(channels, tile_y, tile_x, *widths):
    """The shape of every program's block, and the launch options.

    A tile of the plan times at most 4 channels is 2048 elements: 16 a thread, enough 16-byte loads in flight to cover
    the latency of memory, few enough registers for 16 programs on a multiprocessor. Rows that start at multiples of 8
    elements (16 bytes in half precision) are read and written 16 bytes at a time; ALIGN is what the widths allow.
    """
    depth = min(4, triton.next_power_of_2(channels))
    return dict(CHANNELS=depth, ROWS=tile_y, COLUMNS=tile_x, ALIGN=alignment(*widths), num_warps=4, num_stages=1)


def canvas_grid(images, channels, height, width, launch):
    """A program for every block of `images` images."""
    blocks = triton.cdiv(height, launch["ROWS"]) * triton.cdiv(width, launch["COLUMNS"])
    return (images * triton.cdiv(channels, launch["CHANNELS"]) * blocks,)


def weight_stride(weight):
    """Elements from one window's overlap weight to the next one's: 0 where all have the same."""
    return weight.shape[1] * weight.shape[2] if weight is not None and weight.dim() == 3 else 0


def packed(tensor):
    return None if tensor is None else tensor.contiguous()


def exact_dtype(dtype):
    """The dtype to compute and store in where a tensor's is `dtype`: the same on a device.

    The interpreter multiplies bfloat16 wrongly and cuts float32 off where the device rounds it to bfloat16: there the
    kernels are given float32, and torch rounds.
    """
    return torch.float32 if INTERPRETED and dtype == torch.bfloat16 else dtype

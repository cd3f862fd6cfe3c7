"""What the kernels of regional cross-attention share: rows of a tile, its prompts, its softmax, and launch shapes.

A program owns a tile of queries of one head, finds the prompts that have weight in the tile with one load of all
weights, and visits only these: the cost follows the regions that meet in the tile, not the number of regions. Logits
are in base 2.
"""

import torch
import triton
import triton.language as tl

from .tiles import alignment, exact_dtype, range


@triton.jit
def query_tile(program, heads, order, n, TILE: tl.constexpr):
    """Number of a program -> head, image, numbers of its queries; heads vary fastest."""
    head = (program % heads).to(tl.int64)
    tile = program // heads
    image = (tile // tl.cdiv(n, TILE)).to(tl.int64)
    return head, image, visited_rows(order, image, tile % tl.cdiv(n, TILE) * TILE + tl.arange(0, TILE), n)


@triton.jit
def visited_rows(order, image, place, n):
    """The numbers of the queries visited at these places: n past the last, and for what is no number of a query."""
    if order is None:  # no return here: the compiler would go on below
        row = place
    else:
        row = tl.load(order + image * n + place, place < n, other=n)
        row = tl.where(row < 0, n, row)
    return row


@triton.jit
def tokens_of(lengths, prompt, L):
    """How many tokens of a prompt take part."""
    if lengths is None:
        tokens = L
    else:
        tokens = tl.minimum(tl.maximum(tl.load(lengths + prompt), 1), L)
    return tokens


@triton.jit
def load_rows(pointers, inside, first, D: tl.constexpr, WIDTH: tl.constexpr, OPERAND: tl.constexpr):
    """Elements first .. first + WIDTH of the rows that begin at `pointers`: zeros past D and for rows not inside."""
    d = first + tl.arange(0, WIDTH)
    return tl.load(pointers[:, None] + d[None, :], inside[:, None] & (d < D)[None, :], other=0).to(OPERAND)


@triton.jit
def store_rows(out, rows, image, row, head, n, heads, D: tl.constexpr, DEPTH: tl.constexpr):
    """Into rows of one head of out (B, N, heads, D)."""
    d = tl.arange(0, DEPTH)
    offset = ((image * n + row) * heads + head)[:, None] * D + d[None, :]
    tl.store(out + offset, rows, (row < n)[:, None] & (d < D)[None, :])


@triton.jit
def dot_rows(
    x, y, x_rows, x_inside, y_rows, y_inside, size, D: tl.constexpr, CHUNK: tl.constexpr, OPERAND: tl.constexpr
):
    """x y^T. In float32, which has no tensor cores, in chunks read again from the cache: whole rows would spill.

    size is D at run time: a loop whose end is known would be unrolled, and spill.
    """
    if x.shape[1] == CHUNK:
        return tl.dot(x, tl.trans(y), input_precision="ieee")
    total = tl.zeros([x.shape[0], y.shape[0]], tl.float32)
    for first in range(0, size, CHUNK):
        x_chunk = load_rows(x_rows, x_inside, first, D, CHUNK, OPERAND)
        y_chunk = load_rows(y_rows, y_inside, first, D, CHUNK, OPERAND)
        total = tl.dot(x_chunk, tl.trans(y_chunk), total, input_precision="ieee")
    return total


@triton.jit
def add_product(total, a, b, OPERAND: tl.constexpr):
    """total + a b, a in float32. To half precision a is rounded in two parts: one would cost more than the result."""
    high = a.to(OPERAND)
    total = tl.dot(high, b, total, input_precision="ieee")
    if OPERAND != tl.float32:
        total = tl.dot((a - high).to(OPERAND), b, total)
    return total


@triton.jit
def load_slots(prompt_ids, weights, first, slots, low, high, row, n, stride_r, stride_n, SLOTS: tl.constexpr):
    """Prompt slots from first on, and their weights (SLOTS, rows): 0 for slots whose prompt is not in [low, high)."""
    slot = first + tl.arange(0, SLOTS)
    prompt = tl.load(prompt_ids + slot, slot < slots, other=-1)
    inside = ((prompt >= low) & (prompt < high))[:, None] & (row < n)[None, :]
    offset = slot.to(tl.int64)[:, None] * stride_r + row.to(tl.int64)[None, :] * stride_n
    return slot, tl.load(weights + offset, inside, other=0).to(tl.float32)


@triton.jit
def slot_weights(weights, slot, row, n, stride_r, stride_n):
    """The weights of one slot's prompt for the queries."""
    weight = tl.load(weights + slot.to(tl.int64) * stride_r + row.to(tl.int64) * stride_n, row < n, other=0)
    return weight.to(tl.float32)


@triton.jit
def find_active(weight):
    """Which slots have weight in the tile, and how many."""
    active = tl.max((weight != 0).to(tl.int32), axis=1) > 0
    return active, tl.sum(active.to(tl.int32), axis=0)


@triton.jit
def next_active(active, slot, current, slots):
    """The first active slot after the current one."""
    return tl.min(tl.where(active & (slot > current), slot, slots), axis=0)


@triton.jit
def weight_norms(
    prompt_ids,
    weights,
    slots,
    prompts,
    row,
    n,
    stride_r,
    stride_n,
    TILE: tl.constexpr,
    SLOTS: tl.constexpr,
    JOINT: tl.constexpr,
):
    """What a query's weights are relative to: their sum, or in joint mode the largest; 1 for a query without weight."""
    norm = tl.zeros([TILE], tl.float32)
    for first in range(0, slots, SLOTS):
        _, weight = load_slots(prompt_ids, weights, first, slots, 0, prompts, row, n, stride_r, stride_n, SLOTS)
        if JOINT:
            norm = tl.maximum(norm, tl.max(weight, axis=0))
        else:
            norm += tl.sum(weight, axis=0)
    return tl.where(norm > 0, norm, 1.0)


@triton.jit
def scale_logits(dots, inside, share, scale, JOINT: tl.constexpr):
    """-inf past the last token and, in joint mode, for queries for which the prompt has no weight."""
    s = tl.where(inside[None, :], dots * scale, float("-inf"))
    if JOINT:
        s = tl.where((share > 0)[:, None], s, float("-inf"))
    return s


@triton.jit
def softmax_block(s, share, peak, JOINT: tl.constexpr):
    """One block of the online softmax: the new peak, the factor of what was summed before, the block's terms.

    In joint mode a term carries its share as a factor, not as log share, which would cost digits; the peak is that of
    logit + log share, so that no term exceeds 1 and rounding to half precision loses none that counts.
    """
    highest = tl.max(s, axis=1)
    if JOINT:
        highest += tl.log2(tl.where(share > 0, share, 1.0))
    highest = tl.maximum(peak, highest)
    anchor = tl.where(highest == float("-inf"), 0.0, highest)
    p = tl.exp2(s - anchor[:, None])
    if JOINT:
        p *= share[:, None]
    return highest, tl.exp2(peak - anchor), p


def packed_rows(tensors):
    """The tensors with a contiguous last axis, the alignment of their rows, the strides in units of it."""
    tensors = [t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous() for t in tensors]
    strides = [stride for t in tensors for stride in t.stride()[:-1]]
    align = alignment(*strides, tensors[0].shape[-1])
    return tensors, align, [stride // align for stride in strides]


_OPERANDS = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def head_shape(query, slots):
    """What all three kernels are specialised for.

    16 slots are looked at together: their weights in a tile of 64 queries are 8 registers a thread. A chunk of 32 is
    what float32 products unroll without spilling.
    """
    size = query.shape[-1]
    operand = _OPERANDS[exact_dtype(query.dtype)]
    depth = max(16, triton.next_power_of_2(size))
    chunk = 32 if operand is tl.float32 else depth
    slots = min(16, triton.next_power_of_2(slots))
    return dict(size=size, D=size, DEPTH=depth, CHUNK=min(chunk, depth), SLOTS=slots, OPERAND=operand)


def launch_options(depth, dtype, backward, lengths=False):
    """Queries and tokens a program takes at once, its warps, and the registers a thread may have.

    Registers are what there is least of: a program keeps one or two (TILE, DEPTH) accumulators, and none may spill on
    sm_80, sm_90 and sm_100. Left to itself the assembler spills a little where that fits one program more, hence the
    limits: 168 registers are 3 programs of 128 threads a multiprocessor, 255 are all there are. The forward pass takes
    16 tokens at once, so that 77 cost 80, and fetches the next blocks meanwhile (stages). float32 has no tensor cores.
    A length for each prompt takes more registers than 3 programs have.
    """
    if dtype == torch.float32:
        launch = dict(TILE=32, TOKENS=32, num_warps=8, num_stages=1, maxnreg=255)
    elif backward:
        tile = 64 if depth <= 64 else 32 if depth <= 128 else 16
        launch = dict(TILE=tile, TOKENS=32, num_warps=8, num_stages=1, maxnreg=255)
    elif depth <= 64:
        launch = dict(TILE=64, TOKENS=16, num_warps=4, num_stages=3, maxnreg=255 if lengths else 168)
    else:
        launch = dict(TILE=64 if depth <= 128 else 32, TOKENS=16, num_warps=8, num_stages=2, maxnreg=255)
    if torch.version.hip:
        del launch["maxnreg"]  # AMD's compiler has no such option
    return launch

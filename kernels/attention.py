"""Triton kernels of regional cross-attention, forward and backward.

A program owns a tile of queries of one head, finds the prompts that have weight in the tile with one load of all
weights, and visits only these: the cost follows the regions that meet in the tile, not the number of regions. The
probabilities never leave the chip; the backward pass computes them again. Logits are in base 2.
"""

import math

import torch
import triton
import triton.language as tl


@triton.jit
def _rows(at, inside, first, D: tl.constexpr, WIDTH: tl.constexpr, OPERAND: tl.constexpr):
    """Elements first .. first + WIDTH of the rows at these addresses: zeros past D and for rows that are not inside."""
    d = first + tl.arange(0, WIDTH)
    return tl.load(at[:, None] + d[None, :], inside[:, None] & (d < D)[None, :], other=0).to(OPERAND)


@triton.jit
def _dot(x, y, x_at, x_inside, y_at, y_inside, size, D: tl.constexpr, CHUNK: tl.constexpr, OPERAND: tl.constexpr):
    """x y^T. In float32, which has no tensor cores, in chunks read again from the cache: whole rows would spill.

    size is D at run time: a loop whose end is known would be unrolled, and spill.
    """
    if x.shape[1] == CHUNK:
        return tl.dot(x, tl.trans(y), input_precision="ieee")
    total = tl.zeros([x.shape[0], y.shape[0]], tl.float32)
    for first in range(0, size, CHUNK):
        x_chunk = _rows(x_at, x_inside, first, D, CHUNK, OPERAND)
        y_chunk = _rows(y_at, y_inside, first, D, CHUNK, OPERAND)
        total = tl.dot(x_chunk, tl.trans(y_chunk), total, input_precision="ieee")
    return total


@triton.jit
def _slots(prompt_ids, weights, first, slots, low, high, row, n, stride_r, stride_n, SLOTS: tl.constexpr):
    """Prompt slots from first on, and their weights (SLOTS, rows): 0 for slots whose prompt is not in [low, high)."""
    slot = first + tl.arange(0, SLOTS)
    prompt = tl.load(prompt_ids + slot, slot < slots, other=-1)
    inside = ((prompt >= low) & (prompt < high))[:, None] & (row < n)[None, :]
    offset = slot.to(tl.int64)[:, None] * stride_r + row.to(tl.int64)[None, :] * stride_n
    return slot, tl.load(weights + offset, inside, other=0).to(tl.float32)


@triton.jit
def _active(weight):
    """Which slots have weight in the tile, and how many."""
    active = tl.max((weight != 0).to(tl.int32), axis=1) > 0
    return active, tl.sum(active.to(tl.int32), axis=0)


@triton.jit
def _next(active, slot, current, slots):
    return tl.min(tl.where(active & (slot > current), slot, slots), axis=0)


@triton.jit
def _norm(
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
        _, weight = _slots(prompt_ids, weights, first, slots, 0, prompts, row, n, stride_r, stride_n, SLOTS)
        if JOINT:
            norm = tl.maximum(norm, tl.max(weight, axis=0))
        else:
            norm += tl.sum(weight, axis=0)
    return tl.where(norm > 0, norm, 1.0)


@triton.jit
def _logits(dots, inside, share, scale, JOINT: tl.constexpr):
    """-inf past the last token and, in joint mode, for queries to which the prompt says nothing."""
    s = tl.where(inside[None, :], dots * scale, float("-inf"))
    if JOINT:
        s = tl.where((share > 0)[:, None], s, float("-inf"))
    return s


@triton.jit
def _softmax(s, share, peak, JOINT: tl.constexpr):
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


@triton.jit
def _attention_kernel(
    query,
    key,
    value,
    prompt_ids,
    weights,
    out,
    prompts,
    slots,
    n,
    heads,
    scale,
    stride_qb,
    stride_qn,
    stride_qh,
    stride_kp,
    stride_kl,
    stride_kh,
    stride_vp,
    stride_vl,
    stride_vh,
    stride_wb,
    stride_wr,
    stride_wn,
    L,
    size,
    D: tl.constexpr,
    DEPTH: tl.constexpr,
    CHUNK: tl.constexpr,
    ALIGN: tl.constexpr,
    SLOTS: tl.constexpr,
    TILE: tl.constexpr,
    TOKENS: tl.constexpr,
    JOINT: tl.constexpr,
    OPERAND: tl.constexpr,
):
    head = (tl.program_id(0) % heads).to(tl.int64)
    tile = tl.program_id(0) // heads
    b = (tile // tl.cdiv(n, TILE)).to(tl.int64)
    row = tile % tl.cdiv(n, TILE) * TILE + tl.arange(0, TILE)
    query += (b * stride_qb + head * stride_qh) * ALIGN
    key += head * stride_kh * ALIGN
    value += head * stride_vh * ALIGN
    prompt_ids += b * slots
    weights += b * stride_wb

    q_at = query + row.to(tl.int64) * stride_qn * ALIGN
    q = _rows(q_at, row < n, 0, D, DEPTH, OPERAND)
    norm = _norm(prompt_ids, weights, slots, prompts, row, n, stride_wr, stride_wn, TILE, SLOTS, JOINT)
    result = tl.zeros([TILE, DEPTH], tl.float32)
    peak = tl.full([TILE], float("-inf"), tl.float32)
    mass = tl.zeros([TILE], tl.float32)
    for first in range(0, slots, SLOTS):
        slot, weight = _slots(prompt_ids, weights, first, slots, 0, prompts, row, n, stride_wr, stride_wn, SLOTS)
        active, count = _active(weight)
        current = first - 1
        for _ in range(count):
            current = _next(active, slot, current, slots)
            prompt = tl.load(prompt_ids + current).to(tl.int64)
            share = tl.load(weights + current.to(tl.int64) * stride_wr + row.to(tl.int64) * stride_wn, row < n, other=0)
            share = tl.div_rn(share.to(tl.float32), norm)
            mixed = result  # joint: one softmax over all prompts; blend: one of its own for each
            if not JOINT:
                mixed = tl.zeros([TILE, DEPTH], tl.float32)
                peak = tl.full([TILE], float("-inf"), tl.float32)
                mass = tl.zeros([TILE], tl.float32)
            for start in range(0, L, TOKENS):
                token = start + tl.arange(0, TOKENS)
                k_at = key + (prompt * stride_kp + token.to(tl.int64) * stride_kl) * ALIGN
                v_at = value + (prompt * stride_vp + token.to(tl.int64) * stride_vl) * ALIGN
                k = _rows(k_at, token < L, 0, D, DEPTH, OPERAND)
                v = _rows(v_at, token < L, 0, D, DEPTH, OPERAND)
                dots = _dot(q, k, q_at, row < n, k_at, token < L, size, D, CHUNK, OPERAND)
                peak, factor, p = _softmax(_logits(dots, token < L, share, scale, JOINT), share, peak, JOINT)
                mass = mass * factor + tl.sum(p, axis=1)
                mixed = tl.dot(p.to(OPERAND), v, mixed * factor[:, None], input_precision="ieee")
            if JOINT:
                result = mixed
            else:
                result += mixed * tl.div_rn(share, mass)[:, None]
    if JOINT:
        result = tl.div_rn(result, tl.where(mass == 0, 1.0, mass)[:, None])
    d = tl.arange(0, DEPTH)
    offset = ((b * n + row) * heads + head)[:, None] * D + d[None, :]
    tl.store(out + offset, result, (row < n)[:, None] & (d < D)[None, :])


@triton.jit
def _statistics(
    peak,
    mass,
    delta,
    q,
    g,
    q_at,
    g_at,
    inside,
    key,
    value,
    share,
    scale,
    stride_kl,
    stride_vl,
    L,
    size,
    D: tl.constexpr,
    DEPTH: tl.constexpr,
    CHUNK: tl.constexpr,
    TOKENS: tl.constexpr,
    JOINT: tl.constexpr,
    OPERAND: tl.constexpr,
):
    """Adds a prompt to the softmax's peak and mass, and to delta, the sum of its terms times grad . value."""
    for start in range(0, L, TOKENS):
        token = start + tl.arange(0, TOKENS)
        k_at, v_at = key + token.to(tl.int64) * stride_kl, value + token.to(tl.int64) * stride_vl
        k = _rows(k_at, token < L, 0, D, DEPTH, OPERAND)
        v = _rows(v_at, token < L, 0, D, DEPTH, OPERAND)
        dots = _dot(q, k, q_at, inside, k_at, token < L, size, D, CHUNK, OPERAND)
        peak, factor, p = _softmax(_logits(dots, token < L, share, scale, JOINT), share, peak, JOINT)
        mass = mass * factor + tl.sum(p, axis=1)
        delta = delta * factor + tl.sum(p * _dot(g, v, g_at, inside, v_at, token < L, size, D, CHUNK, OPERAND), axis=1)
    return peak, mass, delta


@triton.jit
def _add_product(total, a, b, OPERAND: tl.constexpr):
    """total + a b. float16 would round small gradients away: there each row of a is scaled to 1 first."""
    if OPERAND == tl.float16:
        largest = tl.max(tl.abs(a), axis=1)
        largest = tl.where(largest > 1e-30, largest, 1.0)
        return total + tl.dot((a * (1 / largest)[:, None]).to(OPERAND), b) * largest[:, None]
    return tl.dot(a.to(OPERAND), b, total, input_precision="ieee")


@triton.jit
def _grad_query_kernel(
    grad,
    query,
    key,
    value,
    prompt_ids,
    weights,
    statistics,
    out,
    prompts,
    slots,
    n,
    heads,
    scale,
    scale_base2,
    plane,
    stride_qb,
    stride_qn,
    stride_qh,
    stride_kp,
    stride_kl,
    stride_kh,
    stride_vp,
    stride_vl,
    stride_vh,
    stride_gb,
    stride_gn,
    stride_gh,
    stride_wb,
    stride_wr,
    stride_wn,
    L,
    size,
    D: tl.constexpr,
    DEPTH: tl.constexpr,
    CHUNK: tl.constexpr,
    ALIGN: tl.constexpr,
    SLOTS: tl.constexpr,
    TILE: tl.constexpr,
    TOKENS: tl.constexpr,
    JOINT: tl.constexpr,
    OPERAND: tl.constexpr,
):
    """Also writes statistics (3, B, heads, R, N): peak, share / mass and delta, where the weight is not zero."""
    head = (tl.program_id(0) % heads).to(tl.int64)
    tile = tl.program_id(0) // heads
    b = (tile // tl.cdiv(n, TILE)).to(tl.int64)
    row = tile % tl.cdiv(n, TILE) * TILE + tl.arange(0, TILE)
    query += (b * stride_qb + head * stride_qh) * ALIGN
    grad += (b * stride_gb + head * stride_gh) * ALIGN
    key += head * stride_kh * ALIGN
    value += head * stride_vh * ALIGN
    prompt_ids += b * slots
    weights += b * stride_wb
    statistics += (b * heads + head) * slots * n

    q_at = query + row.to(tl.int64) * stride_qn * ALIGN
    g_at = grad + row.to(tl.int64) * stride_gn * ALIGN
    q = _rows(q_at, row < n, 0, D, DEPTH, OPERAND)
    g = _rows(g_at, row < n, 0, D, DEPTH, OPERAND)
    stride_kl *= ALIGN
    stride_vl *= ALIGN
    norm = _norm(prompt_ids, weights, slots, prompts, row, n, stride_wr, stride_wn, TILE, SLOTS, JOINT)
    result = tl.zeros([TILE, DEPTH], tl.float32)
    peak = tl.full([TILE], float("-inf"), tl.float32)
    mass = tl.zeros([TILE], tl.float32)
    delta = tl.zeros([TILE], tl.float32)
    if JOINT:  # one softmax over all prompts, which must be known before the first gradient
        for first in range(0, slots, SLOTS):
            slot, weight = _slots(prompt_ids, weights, first, slots, 0, prompts, row, n, stride_wr, stride_wn, SLOTS)
            active, count = _active(weight)
            current = first - 1
            for _ in range(count):
                current = _next(active, slot, current, slots)
                prompt = tl.load(prompt_ids + current).to(tl.int64)
                at = current.to(tl.int64) * stride_wr + row.to(tl.int64) * stride_wn
                share = tl.div_rn(tl.load(weights + at, row < n, other=0).to(tl.float32), norm)
                k, v = key + prompt * stride_kp * ALIGN, value + prompt * stride_vp * ALIGN
                peak, mass, delta = _statistics(
                    peak, mass, delta, q, g, q_at, g_at, row < n, k, v, share, scale_base2, stride_kl, stride_vl,
                    L, size, D, DEPTH, CHUNK, TOKENS, JOINT, OPERAND,
                )  # fmt: skip
    for first in range(0, slots, SLOTS):
        slot, weight = _slots(prompt_ids, weights, first, slots, 0, prompts, row, n, stride_wr, stride_wn, SLOTS)
        active, count = _active(weight)
        current = first - 1
        for _ in range(count):
            current = _next(active, slot, current, slots)
            prompt = tl.load(prompt_ids + current).to(tl.int64)
            at = current.to(tl.int64) * stride_wr + row.to(tl.int64) * stride_wn
            share = tl.div_rn(tl.load(weights + at, row < n, other=0).to(tl.float32), norm)
            k_prompt, v_prompt = key + prompt * stride_kp * ALIGN, value + prompt * stride_vp * ALIGN
            if not JOINT:
                peak, mass, delta = _statistics(
                    tl.full([TILE], float("-inf"), tl.float32), tl.zeros([TILE], tl.float32),
                    tl.zeros([TILE], tl.float32), q, g, q_at, g_at, row < n, k_prompt, v_prompt, share, scale_base2,
                    stride_kl, stride_vl, L, size, D, DEPTH, CHUNK, TOKENS, JOINT, OPERAND,
                )  # fmt: skip
            anchor = tl.where(mass == 0, 0.0, peak)
            inverse = tl.div_rn(1.0, tl.where(mass == 0, 1.0, mass))
            mean = delta * inverse
            factor = share * inverse
            saved = statistics + current.to(tl.int64) * n + row
            tl.store(saved, anchor, row < n)
            tl.store(saved + plane, factor, row < n)
            tl.store(saved + plane + plane, mean, row < n)
            for start in range(0, L, TOKENS):
                token = start + tl.arange(0, TOKENS)
                k_at, v_at = k_prompt + token.to(tl.int64) * stride_kl, v_prompt + token.to(tl.int64) * stride_vl
                k = _rows(k_at, token < L, 0, D, DEPTH, OPERAND)
                v = _rows(v_at, token < L, 0, D, DEPTH, OPERAND)
                dots = _dot(q, k, q_at, row < n, k_at, token < L, size, D, CHUNK, OPERAND)
                p = tl.exp2(_logits(dots, token < L, share, scale_base2, JOINT) - anchor[:, None]) * factor[:, None]
                dp = _dot(g, v, g_at, row < n, v_at, token < L, size, D, CHUNK, OPERAND)
                result = _add_product(result, p * (dp - mean[:, None]) * scale, k, OPERAND)
    d = tl.arange(0, DEPTH)
    offset = ((b * n + row) * heads + head)[:, None] * D + d[None, :]
    tl.store(out + offset, result, (row < n)[:, None] & (d < D)[None, :])


@triton.jit
def _grad_key_value_kernel(
    grad,
    query,
    key,
    value,
    prompt_ids,
    weights,
    statistics,
    grad_key,
    grad_value,
    prompts,
    slots,
    batch,
    n,
    heads,
    splits,
    scale,
    scale_base2,
    plane,
    stride_qb,
    stride_qn,
    stride_qh,
    stride_kp,
    stride_kl,
    stride_kh,
    stride_vp,
    stride_vl,
    stride_vh,
    stride_gb,
    stride_gn,
    stride_gh,
    stride_wb,
    stride_wr,
    stride_wn,
    L,
    size,
    D: tl.constexpr,
    DEPTH: tl.constexpr,
    CHUNK: tl.constexpr,
    ALIGN: tl.constexpr,
    SLOTS: tl.constexpr,
    TILE: tl.constexpr,
    TOKENS: tl.constexpr,
    OPERAND: tl.constexpr,
):
    """One block of one prompt's tokens, over one of `splits` shares of all query tiles, in order."""
    head = (tl.program_id(0) % heads).to(tl.int64)
    block = tl.program_id(0) // heads
    token = block % tl.cdiv(L, TOKENS) * TOKENS + tl.arange(0, TOKENS)
    block = block // tl.cdiv(L, TOKENS)
    prompt = block % prompts
    split = block // prompts
    k_at = key + (prompt.to(tl.int64) * stride_kp + token.to(tl.int64) * stride_kl + head * stride_kh) * ALIGN
    v_at = value + (prompt.to(tl.int64) * stride_vp + token.to(tl.int64) * stride_vl + head * stride_vh) * ALIGN
    k = _rows(k_at, token < L, 0, D, DEPTH, OPERAND)
    v = _rows(v_at, token < L, 0, D, DEPTH, OPERAND)
    dk = tl.zeros([TOKENS, DEPTH], tl.float32)
    dv = tl.zeros([TOKENS, DEPTH], tl.float32)
    tiles = tl.cdiv(n, TILE)
    each = tl.cdiv(batch * tiles, splits)
    for item in range(split * each, min((split + 1) * each, batch * tiles)):
        b = (item // tiles).to(tl.int64)
        row = item % tiles * TILE + tl.arange(0, TILE)
        ids, w = prompt_ids + b * slots, weights + b * stride_wb
        for first in range(0, slots, SLOTS):
            slot, weight = _slots(ids, w, first, slots, prompt, prompt + 1, row, n, stride_wr, stride_wn, SLOTS)
            active, count = _active(weight)
            current = first - 1
            for _ in range(count):
                current = _next(active, slot, current, slots)
                at = current.to(tl.int64) * stride_wr + row.to(tl.int64) * stride_wn
                used = tl.load(w + at, row < n, other=0).to(tl.float32) != 0
                saved = statistics + ((b * heads + head) * slots + current) * n + row
                peak = tl.load(saved, used, other=0)
                factor = tl.load(saved + plane, used, other=0)
                mean = tl.load(saved + plane + plane, used, other=0)
                used = factor != 0  # a weight may be too small to count
                q_at = query + (b * stride_qb + row.to(tl.int64) * stride_qn + head * stride_qh) * ALIGN
                g_at = grad + (b * stride_gb + row.to(tl.int64) * stride_gn + head * stride_gh) * ALIGN
                q = _rows(q_at, row < n, 0, D, DEPTH, OPERAND)
                g = _rows(g_at, row < n, 0, D, DEPTH, OPERAND)
                s = _dot(q, k, q_at, row < n, k_at, token < L, size, D, CHUNK, OPERAND) * scale_base2
                s = tl.where(used[:, None] & (token < L)[None, :], s, float("-inf"))
                p = tl.exp2(s - peak[:, None]) * factor[:, None]
                dv = _add_product(dv, tl.trans(p), g, OPERAND)
                dp = _dot(g, v, g_at, row < n, v_at, token < L, size, D, CHUNK, OPERAND)
                dk = _add_product(dk, tl.trans(p * (dp - mean[:, None]) * scale), q, OPERAND)
    d = tl.arange(0, DEPTH)
    offset = (((split.to(tl.int64) * prompts + prompt) * L + token) * heads + head)[:, None] * D + d[None, :]
    inside = (token < L)[:, None] & (d < D)[None, :]
    tl.store(grad_key + offset, dk, inside)
    tl.store(grad_value + offset, dv, inside)


def _packed(tensors):
    """The tensors with a contiguous last axis, the power of two that divides all their strides, the strides in it."""
    tensors = [t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous() for t in tensors]
    strides = [stride for t in tensors for stride in t.stride()[:-1]]
    # 8 elements of half precision are 16 bytes, the widest access
    align = next(a for a in (8, 4, 2, 1) if all(s % a == 0 for s in (*strides, tensors[0].shape[-1])))
    return tensors, align, [stride // align for stride in strides]


def _exact(dtype):
    """The interpreter multiplies bfloat16 wrongly and cuts off where the device rounds: there it is given float32."""
    interpreted = not isinstance(_attention_kernel, triton.JITFunction)
    return torch.float32 if interpreted and dtype == torch.bfloat16 else dtype


_OPERANDS = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def _shape(query, slots):
    """What all three kernels are specialised for.

    16 slots are looked at together: their weights in a tile of 64 queries are 8 registers a thread. A chunk of 32 is
    what float32 products unroll without spilling.
    """
    operand = _OPERANDS[_exact(query.dtype)]
    depth = max(16, triton.next_power_of_2(query.shape[-1]))
    chunk = 32 if operand is tl.float32 else depth
    slots = min(16, triton.next_power_of_2(slots))
    size = query.shape[-1]
    return dict(size=size, D=size, DEPTH=depth, CHUNK=min(chunk, depth), SLOTS=slots, OPERAND=operand)


def _launch(depth, dtype, backward):
    """Queries and tokens a program takes at once, its warps, and the registers a thread may have.

    Registers are what there is least of: a program keeps one or two (TILE, DEPTH) accumulators, and none may spill on
    sm_80, sm_90 and sm_100. Left to itself the assembler spills a little where that fits one program more, hence the
    limits: 168 registers are 3 programs of 128 threads a multiprocessor, 255 are all there are. The forward pass takes
    16 tokens at once, so that 77 cost 80, and fetches the next blocks meanwhile (stages). float32 has no tensor cores.
    """
    if dtype == torch.float32:
        return dict(TILE=32, TOKENS=32, num_warps=8, num_stages=1, maxnreg=255)
    if backward:
        tile = 64 if depth <= 64 else 32 if depth <= 128 else 16
        return dict(TILE=tile, TOKENS=32, num_warps=8, num_stages=1, maxnreg=255)
    if depth <= 64:
        return dict(TILE=64, TOKENS=16, num_warps=4, num_stages=3, maxnreg=168)
    return dict(TILE=64 if depth <= 128 else 32, TOKENS=16, num_warps=8, num_stages=2, maxnreg=255)


def regional_attention(query, key, value, prompt_ids, weights, joint, scale):
    """sum_r w_r softmax(q K_r scale) V_r / sum_r w_r; joint: one softmax over all r, log w_r added to the logits."""
    b, n, heads, d = query.shape
    prompts, length = key.shape[:2]
    slots = prompt_ids.shape[1]
    out = query.new_empty(query.shape, dtype=_exact(query.dtype))
    if not (out.numel() and slots):
        return query.new_zeros(query.shape)
    (query, key, value), align, strides = _packed([query, key, value])
    shape = _shape(query, slots)
    launch = _launch(shape["DEPTH"], query.dtype, backward=False)
    grid = (b * heads * triton.cdiv(n, launch["TILE"]),)
    with torch.cuda.device_of(query):
        _attention_kernel[grid](
            query,
            key,
            value,
            prompt_ids.contiguous(),
            weights,
            out,
            prompts,
            slots,
            n,
            heads,
            scale * math.log2(math.e),
            *strides,
            *weights.stride(),
            L=length,
            ALIGN=align,
            JOINT=joint,
            **shape,
            **launch,
        )
    return out.to(query.dtype)


def regional_attention_backward(grad, query, key, value, prompt_ids, weights, joint, scale):
    """Gradients of regional_attention with respect to query, key and value."""
    b, n, heads, d = query.shape
    prompts, length = key.shape[:2]
    slots = prompt_ids.shape[1]
    if not (query.numel() and key.numel() and slots):
        return tuple(t.new_zeros(t.shape) for t in (query, key, value))
    grad_query = query.new_empty(query.shape, dtype=_exact(query.dtype))
    (query, key, value, grad), align, strides = _packed([query, key, value, grad])
    shape = dict(_shape(query, slots), L=length, ALIGN=align)
    statistics = query.new_empty(3, b, heads, slots, n, dtype=torch.float32)
    inputs = grad, query, key, value, prompt_ids.contiguous(), weights, statistics
    numbers = scale, scale * math.log2(math.e), statistics.stride(0), *strides, *weights.stride()
    with torch.cuda.device_of(query):
        launch = _launch(shape["DEPTH"], query.dtype, backward=True)
        grid = (b * heads * triton.cdiv(n, launch["TILE"]),)
        _grad_query_kernel[grid](
            *inputs, grad_query, prompts, slots, n, heads, *numbers, JOINT=joint, **shape, **launch
        )

        programs = prompts * heads * triton.cdiv(length, launch["TOKENS"])
        # two programs for each of 128 multiprocessors; the partial sums are added in order, so the result is one
        splits = max(1, min(triton.cdiv(256, programs), b * triton.cdiv(n, launch["TILE"]), 32))
        partial = [query.new_empty(splits, *key.shape, dtype=torch.float32) for _ in range(2)]
        _grad_key_value_kernel[(splits * programs,)](
            *inputs, *partial, prompts, slots, b, n, heads, splits, *numbers, **shape, **launch
        )
    return tuple(t.to(query.dtype) for t in (grad_query, *(p.sum(0) for p in partial)))

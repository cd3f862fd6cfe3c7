"""Triton kernels of the backward pass of regional cross-attention, which compute the probabilities again.

One makes the gradient of the queries, as the forward pass makes the result, and saves what the other needs of every
softmax; the other sums the gradients of keys and values over the queries, in order: no atomics.
"""

import math

import torch
import triton
import triton.language as tl

from .attention_tiles import (
    add_product,
    dot_rows,
    find_active,
    head_shape,
    launch_options,
    load_rows,
    load_slots,
    next_active,
    packed_rows,
    query_tile,
    scale_logits,
    slot_weights,
    softmax_block,
    store_rows,
    tokens_of,
    visited_rows,
    weight_norms,
)
from .tiles import exact_dtype, range


@triton.jit
def _add_statistics(
    peak,
    mass,
    delta,
    q,
    g,
    q_rows,
    g_rows,
    inside,
    key,
    value,
    share,
    scale,
    stride_kl,
    stride_vl,
    tokens,
    size,
    D: tl.constexpr,
    DEPTH: tl.constexpr,
    CHUNK: tl.constexpr,
    TOKENS: tl.constexpr,
    JOINT: tl.constexpr,
    OPERAND: tl.constexpr,
):
    """Adds a prompt to the softmax's peak and mass, and to delta, the sum of its terms times grad . value."""
    for start in range(0, tokens, TOKENS):
        token = start + tl.arange(0, TOKENS)
        k_rows, v_rows = key + token.to(tl.int64) * stride_kl, value + token.to(tl.int64) * stride_vl
        k = load_rows(k_rows, token < tokens, 0, D, DEPTH, OPERAND)
        v = load_rows(v_rows, token < tokens, 0, D, DEPTH, OPERAND)
        dots = dot_rows(q, k, q_rows, inside, k_rows, token < tokens, size, D, CHUNK, OPERAND)
        peak, factor, p = softmax_block(scale_logits(dots, token < tokens, share, scale, JOINT), share, peak, JOINT)
        mass = mass * factor + tl.sum(p, axis=1)
        delta *= factor
        delta += tl.sum(p * dot_rows(g, v, g_rows, inside, v_rows, token < tokens, size, D, CHUNK, OPERAND), axis=1)
    return peak, mass, delta


@triton.jit
def _add_scaled(total, a, b, OPERAND: tl.constexpr):
    """total + a b. float16 would round small gradients away: there each row of a is scaled to 1 first."""
    if OPERAND == tl.float16:
        largest = tl.max(tl.abs(a), axis=1)
        largest = tl.where(largest > 1e-30, largest, 1.0)
        zero = tl.zeros([total.shape[0], total.shape[1]], tl.float32)
        return total + add_product(zero, a * (1 / largest)[:, None], b, OPERAND) * largest[:, None]
    return add_product(total, a, b, OPERAND)


@triton.jit
def _grad_query_kernel(
    grad,
    query,
    key,
    value,
    prompt_ids,
    weights,
    order,
    lengths,
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
    head, b, row = query_tile(tl.program_id(0), heads, order, n, TILE)
    query += (b * stride_qb + head * stride_qh) * ALIGN
    grad += (b * stride_gb + head * stride_gh) * ALIGN
    key += head * stride_kh * ALIGN
    value += head * stride_vh * ALIGN
    prompt_ids += b * slots
    weights += b * stride_wb
    statistics += (b * heads + head) * slots * n

    q_rows = query + row.to(tl.int64) * stride_qn * ALIGN
    g_rows = grad + row.to(tl.int64) * stride_gn * ALIGN
    q = load_rows(q_rows, row < n, 0, D, DEPTH, OPERAND)
    g = load_rows(g_rows, row < n, 0, D, DEPTH, OPERAND)
    stride_kl *= ALIGN
    stride_vl *= ALIGN
    norm = weight_norms(prompt_ids, weights, slots, prompts, row, n, stride_wr, stride_wn, TILE, SLOTS, JOINT)
    result = tl.zeros([TILE, DEPTH], tl.float32)
    peak = tl.full([TILE], float("-inf"), tl.float32)
    mass = tl.zeros([TILE], tl.float32)
    delta = tl.zeros([TILE], tl.float32)
    if JOINT:  # one softmax over all prompts, which must be known before the first gradient
        for first in range(0, slots, SLOTS):
            slot, weight = load_slots(
                prompt_ids, weights, first, slots, 0, prompts, row, n, stride_wr, stride_wn, SLOTS
            )
            active, count = find_active(weight)
            current = first - 1
            for _ in range(count):
                current = next_active(active, slot, current, slots)
                prompt = tl.load(prompt_ids + current).to(tl.int64)
                tokens = tokens_of(lengths, prompt, L)
                share = tl.div_rn(slot_weights(weights, current, row, n, stride_wr, stride_wn), norm)
                k, v = key + prompt * stride_kp * ALIGN, value + prompt * stride_vp * ALIGN
                peak, mass, delta = _add_statistics(
                    peak, mass, delta, q, g, q_rows, g_rows, row < n, k, v, share, scale_base2, stride_kl, stride_vl,
                    tokens, size, D, DEPTH, CHUNK, TOKENS, JOINT, OPERAND,
                )  # fmt: skip
    for first in range(0, slots, SLOTS):
        slot, weight = load_slots(prompt_ids, weights, first, slots, 0, prompts, row, n, stride_wr, stride_wn, SLOTS)
        active, count = find_active(weight)
        current = first - 1
        for _ in range(count):
            current = next_active(active, slot, current, slots)
            prompt = tl.load(prompt_ids + current).to(tl.int64)
            tokens = tokens_of(lengths, prompt, L)
            share = tl.div_rn(slot_weights(weights, current, row, n, stride_wr, stride_wn), norm)
            k_prompt, v_prompt = key + prompt * stride_kp * ALIGN, value + prompt * stride_vp * ALIGN
            if not JOINT:
                peak, mass, delta = _add_statistics(
                    tl.full([TILE], float("-inf"), tl.float32), tl.zeros([TILE], tl.float32),
                    tl.zeros([TILE], tl.float32), q, g, q_rows, g_rows, row < n, k_prompt, v_prompt, share, scale_base2,
                    stride_kl, stride_vl, tokens, size, D, DEPTH, CHUNK, TOKENS, JOINT, OPERAND,
                )  # fmt: skip
            anchor = tl.where(mass == 0, 0.0, peak)
            inverse = tl.div_rn(1.0, tl.where(mass == 0, 1.0, mass))
            mean = delta * inverse
            factor = share * inverse
            saved = statistics + current.to(tl.int64) * n + row
            tl.store(saved, anchor, row < n)
            tl.store(saved + plane, factor, row < n)
            tl.store(saved + plane + plane, mean, row < n)
            for start in range(0, tokens, TOKENS):
                token = start + tl.arange(0, TOKENS)
                k_rows, v_rows = k_prompt + token.to(tl.int64) * stride_kl, v_prompt + token.to(tl.int64) * stride_vl
                k = load_rows(k_rows, token < tokens, 0, D, DEPTH, OPERAND)
                v = load_rows(v_rows, token < tokens, 0, D, DEPTH, OPERAND)
                dots = dot_rows(q, k, q_rows, row < n, k_rows, token < tokens, size, D, CHUNK, OPERAND)
                s = scale_logits(dots, token < tokens, share, scale_base2, JOINT)
                p = tl.exp2(s - anchor[:, None]) * factor[:, None]
                dp = dot_rows(g, v, g_rows, row < n, v_rows, token < tokens, size, D, CHUNK, OPERAND)
                result = _add_scaled(result, p * (dp - mean[:, None]) * scale, k, OPERAND)
    store_rows(out, result, b, row, head, n, heads, D, DEPTH)


@triton.jit
def _grad_key_value_kernel(
    grad,
    query,
    key,
    value,
    prompt_ids,
    weights,
    order,
    lengths,
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
    k_rows = key + (prompt.to(tl.int64) * stride_kp + token.to(tl.int64) * stride_kl + head * stride_kh) * ALIGN
    v_rows = value + (prompt.to(tl.int64) * stride_vp + token.to(tl.int64) * stride_vl + head * stride_vh) * ALIGN
    tokens = tokens_of(lengths, prompt, L)
    k = load_rows(k_rows, token < tokens, 0, D, DEPTH, OPERAND)
    v = load_rows(v_rows, token < tokens, 0, D, DEPTH, OPERAND)
    dk = tl.zeros([TOKENS, DEPTH], tl.float32)
    dv = tl.zeros([TOKENS, DEPTH], tl.float32)
    tiles = tl.cdiv(n, TILE)
    tiles_of_split = tl.cdiv(batch * tiles, splits)
    for tile in range(split * tiles_of_split, min((split + 1) * tiles_of_split, batch * tiles)):
        b = (tile // tiles).to(tl.int64)
        row = visited_rows(order, b, tile % tiles * TILE + tl.arange(0, TILE), n)
        ids, w = prompt_ids + b * slots, weights + b * stride_wb
        for first in range(0, slots, SLOTS):
            slot, weight = load_slots(ids, w, first, slots, prompt, prompt + 1, row, n, stride_wr, stride_wn, SLOTS)
            active, count = find_active(weight)
            current = first - 1
            for _ in range(count):
                current = next_active(active, slot, current, slots)
                used = slot_weights(w, current, row, n, stride_wr, stride_wn) != 0
                saved = statistics + ((b * heads + head) * slots + current) * n + row
                peak = tl.load(saved, used, other=0)
                factor = tl.load(saved + plane, used, other=0)
                mean = tl.load(saved + plane + plane, used, other=0)
                used = factor != 0  # a weight may be too small to count
                q_rows = query + (b * stride_qb + row.to(tl.int64) * stride_qn + head * stride_qh) * ALIGN
                g_rows = grad + (b * stride_gb + row.to(tl.int64) * stride_gn + head * stride_gh) * ALIGN
                q = load_rows(q_rows, row < n, 0, D, DEPTH, OPERAND)
                g = load_rows(g_rows, row < n, 0, D, DEPTH, OPERAND)
                s = dot_rows(q, k, q_rows, row < n, k_rows, token < tokens, size, D, CHUNK, OPERAND) * scale_base2
                s = tl.where(used[:, None] & (token < tokens)[None, :], s, float("-inf"))
                p = tl.exp2(s - peak[:, None]) * factor[:, None]
                dv = _add_scaled(dv, tl.trans(p), g, OPERAND)
                dp = dot_rows(g, v, g_rows, row < n, v_rows, token < tokens, size, D, CHUNK, OPERAND)
                dk = _add_scaled(dk, tl.trans(p * (dp - mean[:, None]) * scale), q, OPERAND)
    d = tl.arange(0, DEPTH)
    offset = (((split.to(tl.int64) * prompts + prompt) * L + token) * heads + head)[:, None] * D + d[None, :]
    inside = (token < L)[:, None] & (d < D)[None, :]
    tl.store(grad_key + offset, dk, inside)
    tl.store(grad_value + offset, dv, inside)


def regional_attention_backward(grad, query, key, value, prompt_ids, weights, joint, scale, order=None, lengths=None):
    """Gradients of regional_attention with respect to query, key and value."""
    b, n, heads, d = query.shape
    prompts, length = key.shape[:2]
    slots = prompt_ids.shape[1]
    if not (query.numel() and key.numel() and slots):
        return tuple(t.new_zeros(t.shape) for t in (query, key, value))
    grad_query = query.new_empty(query.shape, dtype=exact_dtype(query.dtype))
    (query, key, value, grad), align, strides = packed_rows([query, key, value, grad])
    shape = dict(head_shape(query, slots), L=length, ALIGN=align)
    statistics = query.new_empty(3, b, heads, slots, n, dtype=torch.float32)
    places = (t if t is None else t.contiguous() for t in (order, lengths))
    inputs = grad, query, key, value, prompt_ids.contiguous(), weights, *places, statistics
    numbers = scale, scale * math.log2(math.e), statistics.stride(0), *strides, *weights.stride()
    with torch.cuda.device_of(query):
        launch = launch_options(shape["DEPTH"], query.dtype, backward=True)
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

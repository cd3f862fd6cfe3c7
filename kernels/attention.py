"""Triton kernel of regional cross-attention, and both operations. The probabilities never leave the chip."""

import math

import torch
import triton
import triton.language as tl

from .attention_backward import regional_attention_backward
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
    weight_norms,
)
from .tiles import exact_dtype, range

__all__ = ["regional_attention", "regional_attention_backward"]


@triton.jit
def _attention_kernel(
    query,
    key,
    value,
    prompt_ids,
    weights,
    order,
    lengths,
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
    head, b, row = query_tile(tl.program_id(0), heads, order, n, TILE)
    query += (b * stride_qb + head * stride_qh) * ALIGN
    key += head * stride_kh * ALIGN
    value += head * stride_vh * ALIGN
    prompt_ids += b * slots
    weights += b * stride_wb

    q_rows = query + row.to(tl.int64) * stride_qn * ALIGN
    q = load_rows(q_rows, row < n, 0, D, DEPTH, OPERAND)
    norm = weight_norms(prompt_ids, weights, slots, prompts, row, n, stride_wr, stride_wn, TILE, SLOTS, JOINT)
    result = tl.zeros([TILE, DEPTH], tl.float32)
    peak = tl.full([TILE], float("-inf"), tl.float32)
    mass = tl.zeros([TILE], tl.float32)
    for first in range(0, slots, SLOTS):
        slot, weight = load_slots(prompt_ids, weights, first, slots, 0, prompts, row, n, stride_wr, stride_wn, SLOTS)
        active, count = find_active(weight)
        current = first - 1
        for _ in range(count):
            current = next_active(active, slot, current, slots)
            prompt = tl.load(prompt_ids + current).to(tl.int64)
            share = tl.div_rn(slot_weights(weights, current, row, n, stride_wr, stride_wn), norm)
            mixed = result  # joint: one softmax over all prompts; blend: one of its own for each
            if not JOINT:
                mixed = tl.zeros([TILE, DEPTH], tl.float32)
                peak = tl.full([TILE], float("-inf"), tl.float32)
                mass = tl.zeros([TILE], tl.float32)
            tokens = tokens_of(lengths, prompt, L)
            for start in range(0, tokens, TOKENS):
                token = start + tl.arange(0, TOKENS)
                k_rows = key + (prompt * stride_kp + token.to(tl.int64) * stride_kl) * ALIGN
                v_rows = value + (prompt * stride_vp + token.to(tl.int64) * stride_vl) * ALIGN
                k = load_rows(k_rows, token < tokens, 0, D, DEPTH, OPERAND)
                v = load_rows(v_rows, token < tokens, 0, D, DEPTH, OPERAND)
                dots = dot_rows(q, k, q_rows, row < n, k_rows, token < tokens, size, D, CHUNK, OPERAND)
                s = scale_logits(dots, token < tokens, share, scale, JOINT)
                peak, factor, p = softmax_block(s, share, peak, JOINT)
                mass = mass * factor + tl.sum(p, axis=1)
                mixed = add_product(mixed * factor[:, None], p, v, OPERAND)
            if JOINT:
                result = mixed
            else:
                result += mixed * tl.div_rn(share, mass)[:, None]
    if JOINT:
        result = tl.div_rn(result, tl.where(mass == 0, 1.0, mass)[:, None])
    store_rows(out, result, b, row, head, n, heads, D, DEPTH)


def regional_attention(query, key, value, prompt_ids, weights, joint, scale, order=None, lengths=None):
    """sum_r w_r softmax(q K_r scale) V_r / sum_r w_r; joint: one softmax over all r, log w_r added to the logits."""
    b, n, heads, d = query.shape
    prompts, length = key.shape[:2]
    slots = prompt_ids.shape[1]
    out = query.new_empty(query.shape, dtype=exact_dtype(query.dtype))
    if not (out.numel() and slots):
        return query.new_zeros(query.shape)
    (query, key, value), align, strides = packed_rows([query, key, value])
    shape = head_shape(query, slots)
    launch = launch_options(shape["DEPTH"], query.dtype, backward=False, lengths=lengths is not None)
    grid = (b * heads * triton.cdiv(n, launch["TILE"]),)
    with torch.cuda.device_of(query):
        _attention_kernel[grid](
            query,
            key,
            value,
            prompt_ids.contiguous(),
            weights,
            *(t if t is None else t.contiguous() for t in (order, lengths)),
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

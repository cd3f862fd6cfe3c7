"""Regional attention of the host build: the queries of each prompt together, through PyTorch's matrix products.

In Python, since the time goes into those, which know the processor's instructions, and which a compiled caller could
only reach by the same road. The queries of a prompt are picked a chunk at a time, few enough for their logits to stay
in cache. An order is taken and left alone: it puts the queries of a set of prompts together, for tiles that know no
larger group, while here those of a prompt come together from all sets and all images.
"""

import torch

CHUNK = 512  # queries; the same for any number of threads, so that results do not depend on it
FLASH = 1024  # queries, of flash attention, which keeps no logits

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def regional_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    prompt_ids: torch.Tensor,
    weights: torch.Tensor,
    joint: bool,
    scale: float,
    order: torch.Tensor | None = None,
) -> torch.Tensor:
    """Each query attends to the prompts of its region. Shapes and modes as in `instantas.ops.regional_attention`."""
    query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
    out = torch.empty_like(query)
    if query.numel() == 0:
        return out
    regions, wide = _Regions(query, key, prompt_ids, weights, joint), _wide(query.dtype)
    queries, results = query.flatten(0, 1), out.flatten(0, 1)
    results.index_fill_(0, _numbers(regions.count == 0), 0)
    # where the processor multiplies bfloat16, flash attention gains by it; it rounds probabilities, which the rounding
    # of the results covers up as long as there are many of them
    half = query.dtype == torch.bfloat16
    for prompt, share in regions.shares.items():
        for rows in _chunks((share > 0) & (regions.count == 1), FLASH if half else CHUNK):
            flash = half and len(rows) >= CHUNK
            dtype = query.dtype if flash else wide
            q, k, v = (t.to(dtype) for t in (_take(queries, rows), key[prompt], value[prompt]))
            _put(results, rows, _flash_attend(q, k, v, scale) if flash else _attend(q, k, v, scale))
    several = regions.count > 1
    if several.any():
        rows = _numbers(several)
        merged, _, _ = _merge(_take(queries, rows).to(wide), key.to(wide), value.to(wide), regions, rows, joint, scale)
        _put(results, rows, merged)
    return out


def regional_attention_backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    prompt_ids: torch.Tensor,
    weights: torch.Tensor,
    joint: bool,
    scale: float,
    order: torch.Tensor | None = None,
) -> tuple[torch.Tensor, ...]:
    """The gradients of query, key and value; probabilities are computed again, all in the type of the arithmetic."""
    wide = _wide(query.dtype)
    grad_query, grad_key, grad_value = (t.new_zeros(t.shape, dtype=wide) for t in (query, key, value))
    if query.numel():
        regions = _Regions(query, key, prompt_ids, weights, joint)
        rows = _numbers(regions.count > 0)
        queries, grads = (t.flatten(0, 1)[rows].to(wide) for t in (query, grad))
        key, value = (t.to(wide).contiguous() for t in (key, value))
        if joint:
            merged, peak, total = _merge(queries, key, value, regions, rows, joint, scale)
        grad_queries = torch.zeros_like(queries)
        for prompt, share in regions.shares.items():
            share, k, v = share[rows], _by_head(key[prompt]), _by_head(value[prompt])
            for some in _spans(share > 0):
                q, g = _by_head(queries[some]), _by_head(grads[some] * share[some, None, None])
                logits = _logits(queries[some], key[prompt], scale)
                if joint:
                    # the prompts share one softmax: what a logit gains is relative to the result of all of them
                    g = g / total[some].T[..., None]
                    probabilities = logits.sub_(peak[some].T[..., None]).exp_()
                    mean = (_by_head(merged[some]) * g).sum(-1, keepdim=True)
                    of_logits = probabilities * torch.bmm(g, v.mT).sub_(mean)
                else:
                    probabilities = logits.softmax(-1)
                    of_logits = torch._softmax_backward_data(torch.bmm(g, v.mT), probabilities, -1, wide)
                grad_queries[some] += _by_head(torch.bmm(of_logits, k))
                grad_key[prompt] += _by_head(torch.bmm(of_logits.mT, q))
                grad_value[prompt] += _by_head(torch.bmm(probabilities.mT, g))
        grad_query.flatten(0, 1)[rows] = grad_queries.mul_(scale)
        grad_key.mul_(scale)
    return tuple(t.to(query.dtype) for t in (grad_query, grad_key, grad_value))


class _Regions:
    """Shares by prompt instead of weights by region: a prompt named twice counts with the sum of its weights.

    A share is the weight relative to the query's sum of weights, jointly to the largest.
    """

    def __init__(self, query, key, prompt_ids, weights, joint):
        (b, n), wide = query.shape[:2], _wide(query.dtype)
        self.shares = {}  # prompt -> (B N,), for prompts with some weight
        whole = torch.zeros(b * n, dtype=wide)
        for prompt in prompt_ids.unique().tolist():
            if 0 <= prompt < key.shape[0]:
                image, region = (prompt_ids == prompt).nonzero(as_tuple=True)
                weight = torch.zeros(b, n, dtype=wide).index_add_(0, image, weights[image, region].to(wide)).flatten()
                if weight.any():
                    self.shares[prompt] = weight
                    whole = torch.maximum(whole, weight) if joint else whole + weight
        whole.masked_fill_(whole == 0, 1)
        self.count = torch.zeros(b * n, dtype=torch.int32)  # of the prompts that have a share in a query
        for share in self.shares.values():
            self.count += share.div_(whole) > 0


def _merge(queries, key, value, regions, rows, joint, scale):
    """The mean over the prompts of their attention to the queries; jointly, what its parts are relative to, their sum.

    Jointly a prompt counts with the sum of the exponentials of its logits too, relative to the largest logit of all.
    """
    merged = torch.zeros_like(queries)
    peak, total = queries.new_full(queries.shape[:2], -torch.inf), queries.new_zeros(queries.shape[:2])
    for prompt, share in regions.shares.items():
        share = share[rows]
        for some in _spans(share > 0):
            part = share[some, None]
            if joint:
                logits = _logits(queries[some], key[prompt], scale)
                own = logits.amax(-1)
                highest = torch.maximum(peak[some], own.T)
                exponentials = logits.sub_(own[..., None]).exp_()
                before, part = (peak[some] - highest).exp(), part * (own.T - highest).exp()
                total[some] = total[some] * before + part * exponentials.sum(-1).T
                merged[some] *= before[..., None]
                peak[some] = highest
                result = _by_head(torch.bmm(exponentials, _by_head(value[prompt])))
            else:
                result = _attend(queries[some], key[prompt], value[prompt], scale)
            merged[some] += part[..., None] * result
    return (merged / total[..., None] if joint else merged), peak, total


def _attend(query, key, value, scale):
    """softmax(q K^T scale) V: (n, heads, D), (L, heads, D) -> (n, heads, D)."""
    return _by_head(torch.bmm(_logits(query, key, scale).softmax(-1), _by_head(value)))


def _flash_attend(query, key, value, scale):
    out, mass = _flash(*(_by_head(t)[None] for t in (query, key, value)), scale=scale)
    out, suspect = _by_head(out[0]), _numbers((mass[0] == 0).any(0))  # the logarithm of a sum of exponentials
    if len(suspect):  # few tokens and a NaN among the logits: the operation answers 0
        wide = (t.to(_wide(query.dtype)) for t in (query[suspect], key, value))
        out[suspect] = _attend(*wide, scale).to(out.dtype)
    return out


def _logits(query, key, scale):
    """q K^T scale: (n, heads, D), (L, heads, D) -> (heads, n, L)."""
    return torch.baddbmm(query.new_empty(()), _by_head(query), _by_head(key).mT, beta=0, alpha=scale)


def _by_head(rows):
    """(n, heads, D) -> (heads, n, D), and back."""
    return rows.transpose(0, 1)


def _numbers(chosen):
    return chosen.nonzero()[:, 0]


def _chunks(chosen, size=CHUNK):
    rows = _numbers(chosen)
    return rows.split(size) if len(rows) else ()


def _spans(chosen):
    """Chunks as slices where they are contiguous, which index without a copy."""
    for rows in _chunks(chosen):
        first, last = int(rows[0]), int(rows[-1])
        yield slice(first, last + 1) if last - first + 1 == len(rows) else rows


def _take(tensor, rows):
    first, last = int(rows[0]), int(rows[-1])
    if last - first + 1 == len(rows):
        return tensor[first : last + 1]
    return torch.ops.instantas_cpp.take_rows(tensor, rows)


def _put(tensor, rows, values):
    first, last = int(rows[0]), int(rows[-1])
    if last - first + 1 == len(rows):
        tensor[first : last + 1] = values
    else:
        torch.ops.instantas_cpp.put_rows(tensor, rows, values.to(tensor.dtype).contiguous())


def _wide(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32

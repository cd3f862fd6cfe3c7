"""Regional attention of the host build: the queries of each prompt together, through PyTorch's own flash attention.

In Python, since the time goes into that one operation, whose matrix products know the processor's instructions, and
which a compiled caller could only reach by the same road. The queries of a region are picked a chunk at a time, few
enough to stay in cache.
"""

import torch

CHUNK = 1024  # queries; the same for any number of threads, so that results do not depend on it
MANY = 512  # queries

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def regional_attention(query, key, value, prompt_ids, weights, joint, scale):
    """Each query attends to the prompts of its region. Shapes and modes as in `instantas.ops.regional_attention`."""
    query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
    out = torch.empty_like(query)
    if query.numel() == 0:
        return out
    regions, wide = _Regions(query, key, prompt_ids, weights), _wide(query.dtype)
    queries, results = query.flatten(0, 1), out.flatten(0, 1)
    results.index_fill_(0, _numbers(regions.count == 0), 0)
    for prompt, weight in regions.weights.items():
        for rows in _chunks((weight > 0) & (regions.count == 1)):
            # bfloat16 is faster where the processor multiplies it, float16 never was; probabilities are rounded then,
            # which the rounding of the results covers up as long as there are many of them
            dtype = query.dtype if query.dtype == torch.bfloat16 and len(rows) >= MANY else wide
            operands = _take(queries, rows), key[prompt], value[prompt]
            _put(results, rows, _attend(*(t.to(dtype) for t in operands), scale))
    several = regions.count > 1
    if several.any():
        rows = _numbers(several)
        merged, _, _ = _merge(_take(queries, rows).to(wide), key.to(wide), value.to(wide), regions, rows, joint, scale)
        _put(results, rows, merged)
    return out


def regional_attention_backward(grad, query, key, value, prompt_ids, weights, joint, scale):
    """The gradients of query, key and value; probabilities are computed again, all in the type of the arithmetic."""
    wide = _wide(query.dtype)
    grad_query, grad_key, grad_value = (t.new_zeros(t.shape, dtype=wide) for t in (query, key, value))
    if query.numel():
        regions = _Regions(query, key, prompt_ids, weights)
        rows = _numbers(regions.count > 0)
        queries, grads = (t.flatten(0, 1)[rows].to(wide) for t in (query, grad))
        key, value = (t.to(wide).contiguous() for t in (key, value))
        merged, peak, total = _merge(queries, key, value, regions, rows, joint, scale)
        grad_queries = torch.zeros_like(queries)
        for prompt, weight in regions.weights.items():
            share = weight[rows] / regions.largest[rows]
            for some in _spans(share > 0):
                q, g, k, v = queries[some], grads[some], key[prompt], value[prompt]
                exponentials, highest = _exponentials(q, k, scale)
                part = share[some, None] / total[some]
                if joint:
                    part *= (highest - peak[some]).exp()
                else:
                    exponentials /= exponentials.sum(-1, keepdim=True)
                wanted = torch.einsum("nhd,lhd->nhl", g, v)
                # jointly the prompts share one softmax: what a logit gains is relative to the result of all of them
                mean = (merged[some] * g if joint else exponentials * wanted).sum(-1, keepdim=True)
                of_logits = exponentials * (wanted - mean) * part[..., None] * scale
                probabilities = exponentials * part[..., None]
                grad_queries[some] += torch.einsum("nhl,lhd->nhd", of_logits, k)
                grad_key[prompt] += torch.einsum("nhl,nhd->lhd", of_logits, q)
                grad_value[prompt] += torch.einsum("nhl,nhd->lhd", probabilities, g)
        grad_query.flatten(0, 1)[rows] = grad_queries
    return tuple(t.to(query.dtype) for t in (grad_query, grad_key, grad_value))


class _Regions:
    """Weights by prompt instead of by region: a prompt named twice counts with the sum of its weights."""

    def __init__(self, query, key, prompt_ids, weights):
        (b, n), wide = query.shape[:2], _wide(query.dtype)
        self.weights = {}  # prompt -> (B N,), for prompts with some weight
        self.count = torch.zeros(b * n, dtype=torch.int32)  # of the prompts that have weight for a query
        self.largest = torch.zeros(b * n, dtype=wide)
        for prompt in prompt_ids.unique().tolist():
            if 0 <= prompt < key.shape[0]:
                image, region = (prompt_ids == prompt).nonzero(as_tuple=True)
                weight = torch.zeros(b, n, dtype=wide).index_add_(0, image, weights[image, region].to(wide)).flatten()
                active = weight > 0
                if active.any():
                    self.weights[prompt] = weight
                    self.count += active
                    self.largest = torch.maximum(self.largest, weight)


def _merge(queries, key, value, regions, rows, joint, scale):
    """The mean over the prompts of their attention to the queries; per head, what its parts are relative to, their sum.

    A prompt counts with its weight relative to the query's largest; jointly also with the sum of the exponentials of
    its logits, relative to the largest logit of all.
    """
    merged, start = torch.zeros_like(queries), -torch.inf if joint else 0
    peak, total = queries.new_full(queries.shape[:2], start), queries.new_zeros(queries.shape[:2])
    for prompt, weight in regions.weights.items():
        share = weight[rows] / regions.largest[rows]
        for some in _spans(share > 0):
            part = share[some, None]
            if joint:
                exponentials, own = _exponentials(queries[some], key[prompt], scale)
                result, mass = torch.einsum("nhl,lhd->nhd", exponentials, value[prompt]), exponentials.sum(-1)
                highest = torch.maximum(peak[some], own)
                before, part = (peak[some] - highest).exp(), part * (own - highest).exp()
                merged[some], total[some], peak[some] = merged[some] * before[..., None], total[some] * before, highest
            else:
                result, mass = _attend(queries[some], key[prompt], value[prompt], scale), 1
            merged[some] += part[..., None] * result
            total[some] += part * mass
    return merged / total[..., None], peak, total


def _attend(query, key, value, scale):
    """softmax(q K^T scale) V: (n, heads, D), (L, heads, D) -> (n, heads, D)."""
    out, mass = _flash(*(t.transpose(0, 1)[None] for t in (query, key, value)), scale=scale)
    out, mass = out[0].transpose(0, 1), mass[0].T  # the log-sum of the exponentials of the logits, (n, heads)
    suspect = _numbers((mass == 0).any(-1))
    if len(suspect):  # few tokens and a NaN among the logits: the operation answers 0
        exponentials, _ = _exponentials(query[suspect], key, scale)
        probabilities = exponentials / exponentials.sum(-1, keepdim=True)
        out[suspect] = torch.einsum("nhl,lhd->nhd", probabilities, value)
    return out


def _exponentials(query, key, scale):
    """(n, heads, L) exponentials of the logits, relative to the largest; (n, heads) that one."""
    logits = torch.einsum("nhd,lhd->nhl", query, key) * scale
    highest = logits.amax(-1)
    return (logits - highest[..., None]).exp(), highest


def _numbers(chosen):
    return chosen.nonzero()[:, 0]


def _chunks(chosen):
    rows = _numbers(chosen)
    return rows.split(CHUNK) if len(rows) else ()


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
    torch.ops.instantas_cpp.put_rows(tensor, rows, values.to(tensor.dtype).contiguous())


def _wide(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32

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
    lengths: torch.Tensor | None = None,
) -> torch.Tensor:
    """Each query attends to the prompts of its region. Shapes and modes as in `instantas.ops.regional_attention`."""
    query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
    out = torch.empty_like(query)
    if query.numel() == 0:
        return out
    regions, wide = _Regions(query, key, prompt_ids, weights, joint), _wide(query.dtype)
    keys, values = _tokens(key, lengths), _tokens(value, lengths)
    queries, results = query.flatten(0, 1), out.flatten(0, 1)
    results.index_fill_(0, _numbers(regions.count == 0), 0)
    # where the processor multiplies bfloat16, flash attention gains by it; it rounds probabilities, which the rounding
    # of the results covers up as long as there are many of them
    half = query.dtype == torch.bfloat16
    for prompt, share in regions.shares.items():
        for rows in _chunks((share > 0) & (regions.count == 1), FLASH if half else CHUNK):
            flash = half and len(rows) >= CHUNK
            dtype = query.dtype if flash else wide
            q, k, v = (t.to(dtype) for t in (_take(queries, rows), keys[prompt], values[prompt]))
            _put(results, rows, _flash_attend(q, k, v, scale)[0] if flash else _attend(q, k, v, scale))
    several = regions.count > 1
    if several.any():
        rows = _numbers(several)
        q, k, v = _take(queries, rows).to(wide), *(_tokens(t.to(wide), lengths) for t in (key, value))
        if joint:
            for some, result, _ in _join(q, k, v, regions, rows, scale):
                _put(results, rows[some], result)
        else:
            _put(results, rows, _blend(q, k, v, regions, rows, scale))
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
    lengths: torch.Tensor | None = None,
) -> tuple[torch.Tensor, ...]:
    """The gradients of query, key and value; probabilities are computed again, all in the type of the arithmetic."""
    wide = _wide(query.dtype)
    grad_query, grad_key, grad_value = (t.new_zeros(t.shape, dtype=wide) for t in (query, key, value))
    if query.numel():
        regions = _Regions(query, key, prompt_ids, weights, joint)
        rows = _numbers(regions.count > 0)
        queries, grads = (t.flatten(0, 1)[rows].to(wide) for t in (query, grad))
        key, value = (_tokens(t.to(wide).contiguous(), lengths) for t in (key, value))
        of_keys, of_values = _tokens(grad_key, lengths), _tokens(grad_value, lengths)
        if joint:
            joined, mass = torch.empty_like(queries), queries.new_empty(queries.shape[:2])
            for some, *results in _join(queries, key, value, regions, rows, scale):
                joined[some], mass[some] = results
        grad_queries = torch.zeros_like(queries)
        for prompt, share in regions.shares.items():
            share, k, v = share[rows], _by_head(key[prompt]), _by_head(value[prompt])
            for some in _spans(share > 0):
                q, g = _by_head(queries[some]), _by_head(grads[some] * share[some, None, None])
                logits = _logits(queries[some], key[prompt], scale)
                if joint:
                    # the prompts share one softmax: what a logit gains is relative to the result of all of them
                    probabilities = logits.sub_(mass[some].T[..., None]).exp_()
                    mean = (_by_head(joined[some]) * g).sum(-1, keepdim=True)
                    of_logits = probabilities * torch.bmm(g, v.mT).sub_(mean)
                else:
                    probabilities = logits.softmax(-1)
                    of_logits = torch._softmax_backward_data(torch.bmm(g, v.mT), probabilities, -1, wide)
                grad_queries[some] += _by_head(torch.bmm(of_logits, k))
                of_keys[prompt] += _by_head(torch.bmm(of_logits.mT, q))
                of_values[prompt] += _by_head(torch.bmm(probabilities.mT, g))
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


def _blend(queries, key, value, regions, rows, scale):
    """The mean over the prompts of their attention to the queries."""
    blended = torch.zeros_like(queries)
    for prompt, share in regions.shares.items():
        share = share[rows]
        for some in _spans(share > 0):
            blended[some] += share[some, None, None] * _attend(queries[some], key[prompt], value[prompt], scale)
    return blended


def _join(queries, key, value, regions, rows, scale):
    """One softmax over all prompts of a query: (their numbers, results, as of `_flash_attend`) of a chunk at a time.

    Its queries have the same prompts, whose tokens are as one prompt's to them.
    """
    if not regions.shares:
        return
    prompts = list(regions.shares)
    shares = torch.stack([share[rows] for share in regions.shares.values()])
    groups = torch.zeros_like(rows)
    for share in shares:
        groups = (2 * groups + (share > 0)).unique(return_inverse=True)[1]
    for group in groups.argsort(stable=True).split(groups.bincount().tolist()):
        own = [i for i, share in enumerate(shares[:, group[0]].tolist()) if share > 0]
        k, v = (torch.cat([t[prompts[i]] for i in own]) for t in (key, value))
        for some in group.split(FLASH):
            logs = ((shares[i, some].log_(), len(key[prompts[i]])) for i in own)
            bias = torch.cat([log[:, None].expand(-1, tokens) for log, tokens in logs], dim=1)
            yield some, *_flash_attend(_take(queries, some), k, v, scale, bias)


def _attend(query, key, value, scale):
    """softmax(q K^T scale) V: (n, heads, D), (L, heads, D) -> (n, heads, D)."""
    return _by_head(torch.bmm(_logits(query, key, scale).softmax(-1), _by_head(value)))


def _flash_attend(query, key, value, scale, bias=None):
    """softmax(q K^T scale + bias) V, and (n, heads) logarithms of its sums of exponentials; bias: (n, L)."""
    mask = None if bias is None else bias[None, None]
    out, mass = _flash(*(_by_head(t)[None] for t in (query, key, value)), attn_mask=mask, scale=scale)
    out, mass = _by_head(out[0]), mass[0].T
    suspect = _numbers((mass == 0).any(1))
    if len(suspect):  # few tokens and a NaN among the logits: the operation answers 0
        q, k, v = (t.to(_wide(query.dtype)) for t in (query[suspect], key, value))
        logits = _logits(q, k, scale)
        logits += 0 if bias is None else bias[suspect]
        out[suspect] = _by_head(torch.bmm(logits.softmax(-1), _by_head(v))).to(out.dtype)
        mass[suspect] = logits.logsumexp(-1).T.to(mass.dtype)
    return out, mass


def _logits(query, key, scale):
    """q K^T scale: (n, heads, D), (L, heads, D) -> (heads, n, L)."""
    return torch.baddbmm(query.new_empty(()), _by_head(query), _by_head(key).mT, beta=0, alpha=scale)


def _by_head(rows):
    """(n, heads, D) -> (heads, n, D), and back."""
    return rows.transpose(0, 1)


def _tokens(bank, lengths):
    """Of each prompt the tokens that take part, as a view."""
    if lengths is None:
        return bank
    return [tokens[:length] for tokens, length in zip(bank, lengths.clamp(1, bank.shape[1]).tolist())]


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

"""The derivative of the host build's attention: the queries of each prompt together, through PyTorch's matrix products.

In Python, since the time goes into those. The queries of a prompt are picked a chunk at a time, few enough for their
logits to stay in cache. An order is taken and left alone: it puts the queries of a set of prompts together, for tiles
that know no larger group, while here those of a prompt come together from all sets and all images.
"""

import torch

CHUNK = 512  # queries; the same for any number of threads, so that results do not depend on it


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
        rows = _numbers(regions.any)
        queries, grads = (t.flatten(0, 1)[rows].to(wide) for t in (query, grad))
        key, value = key.to(wide), value.to(wide)
        if joint:
            attend = torch.ops.instantas_cpp.attention_with_mass
            results = attend(query.to(wide), key, value, prompt_ids, weights, joint, scale, lengths)
            joined, mass = (t.flatten(0, 1)[rows] for t in results)
        key, value, of_keys, of_values = (_tokens(t, lengths) for t in (key, value, grad_key, grad_value))
        grad_queries = torch.zeros_like(queries)
        for prompt, share in regions.shares.items():
            share, k, v = share[rows], _by_head(key[prompt]), _by_head(value[prompt])
            for some in _spans(share > 0):
                part = share[some, None]
                q, g = _by_head(queries[some]), _by_head(grads[some] if joint else grads[some] * part[..., None])
                logits = _logits(queries[some], key[prompt], scale)
                if joint:
                    # the prompts share one softmax: what a logit gains is relative to the result of all of them; with
                    # the share's logarithm it is at most 0, where e^logit by itself might be infinite
                    probabilities = logits.add_((part.log() - mass[some]).T[..., None]).exp_()
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
        self.any = torch.zeros(b * n, dtype=torch.bool)  # whether a query has a share of some prompt
        for share in self.shares.values():
            self.any |= share.div_(whole) > 0


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


def _spans(chosen):
    """Chunks of the chosen numbers, as slices where they are contiguous, which index without a copy."""
    numbers = _numbers(chosen)
    for rows in numbers.split(CHUNK) if len(numbers) else ():
        first, last = int(rows[0]), int(rows[-1])
        yield slice(first, last + 1) if last - first + 1 == len(rows) else rows


def _wide(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32

"""The derivative of the host build's attention: the queries of a softmax together, through PyTorch's matrix products.

In Python, since the time goes into those. The queries of a prompt, jointly of a set of prompts, are picked a chunk at a
time, few enough for their logits to stay in cache. An order is taken and left alone: it puts the queries of a set
together, for tiles that know no larger group, while here they come together from all images.
"""

import itertools
import math

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
        keys, values, of_keys, of_values = (
            [_by_head(prompt) for prompt in _tokens(bank, lengths)]
            for bank in (key.to(wide), value.to(wide), grad_key, grad_value)
        )
        grad_queries, shares = torch.zeros_like(queries), {p: share[rows] for p, share in regions.shares.items()}
        for prompts, numbers in _softmaxes(shares, joint):
            tokens = [keys[prompt].shape[1] for prompt in prompts]
            k, v = (torch.cat([bank[prompt] for prompt in prompts], 1) for bank in (keys, values))
            for some in map(_slice, numbers.split(CHUNK // len(prompts) + 1)):
                q, g = _by_head(queries[some]), _by_head(grads[some])
                logits = torch.baddbmm(q.new_empty(()), q, k.mT, beta=0, alpha=scale)
                if joint:
                    for prompt, columns in zip(prompts, logits.split(tokens, -1)):
                        columns += shares[prompt][some, None].log()
                    probabilities = _softmax(logits)
                else:
                    g = g * shares[prompts[0]][some, None]
                    probabilities = logits.softmax(-1)
                of_logits = torch._softmax_backward_data(torch.bmm(g, v.mT), probabilities, -1, wide)
                grad_queries[some] += _by_head(torch.bmm(of_logits, k))
                of_k, of_v = torch.bmm(of_logits.mT, q), torch.bmm(probabilities.mT, g)
                for prompt, of_key, of_value in zip(prompts, of_k.split(tokens, 1), of_v.split(tokens, 1)):
                    of_keys[prompt] += of_key
                    of_values[prompt] += of_value
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


def _softmaxes(shares, joint):
    """(prompts, numbers of the queries) that share a softmax: jointly all prompts of a query, otherwise each prompt."""
    if not (joint and shares):
        return [([prompt], _numbers(share > 0)) for prompt, share in shares.items()]
    positive = torch.stack([*shares.values()]) > 0
    which = torch.zeros(positive.shape[1], dtype=torch.int64)  # the number of each query's set
    for chosen in positive:
        which = torch.unique(2 * which + chosen, return_inverse=True)[1]
    groups = which.argsort(stable=True).split(which.bincount().tolist())
    sets = positive[:, torch.stack([numbers[0] for numbers in groups])].T.tolist()
    return [([*itertools.compress(shares, chosen)], numbers) for chosen, numbers in zip(sets, groups)]


def _by_head(rows):
    """(n, heads, D) -> (heads, n, D), and back."""
    return rows.transpose(0, 1)


def _tokens(bank, lengths):
    """Of each prompt the tokens that take part, as a view."""
    if lengths is None:
        return bank
    return [tokens[:length] for tokens, length in zip(bank, lengths.clamp(1, bank.shape[1]).tolist())]


def _softmax(logits):
    """Of logits of which some or all may be -inf: then there is no probability."""
    peak = logits.amax(-1, keepdim=True)
    mass = logits.sub_(peak.masked_fill_(peak == -math.inf, 0)).exp_()
    whole = mass.sum(-1, keepdim=True)
    return mass.div_(whole.masked_fill_(whole == 0, 1))


def _numbers(chosen):
    return chosen.nonzero()[:, 0]


def _slice(rows):
    """Numbers that are contiguous as a slice, which indexes without a copy."""
    first, last = (int(rows[0]), int(rows[-1])) if len(rows) else (0, -1)
    return slice(first, last + 1) if last - first + 1 == len(rows) else rows


def _wide(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32

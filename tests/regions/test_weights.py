"""Prompts of different lengths in one bank: exact in both modes, also where they mix."""

import pytest
import torch

from instantas import ops
from instantas.regions import Region, RegionMap
from instantas.regions.prompts import PromptBank
from instantas.regions.weights import Place, PromptWeights

SOFT = torch.rand(64, 64, generator=torch.Generator().manual_seed(0))


def attention(query, prompts, weights, mode):
    """(N, D) of queries (N, D), prompts (L, D) of any lengths and weights (N,), each at its own length, in float64."""
    logits = [query @ prompt.T / query.shape[-1] ** 0.5 for prompt in prompts]
    if mode == "blend":
        parts = [w[:, None] * (a.softmax(-1) @ prompt) for a, prompt, w in zip(logits, prompts, weights)]
        return sum(parts) / sum(weights)[:, None]
    logits = torch.cat([a + w.log()[:, None] for a, w in zip(logits, weights)], dim=-1)
    return logits.softmax(-1) @ torch.cat(prompts)


@pytest.mark.parametrize("mode", ["blend", "joint"])
@pytest.mark.parametrize("lengths", [(4, 4), (4, 8), (8, 4), (4, 12), (2, 2), (4, 1)])
def test_prompts_of_different_lengths_where_they_mix(mode, lengths):
    base, *embeds = (
        torch.randn(length, 16, generator=torch.Generator().manual_seed(length)) for length in (4, *lengths)
    )
    regions = RegionMap(
        [Region(mask=SOFT, embeds=embeds[0]), Region(mask=1 - SOFT, weight=0.5, embeds=embeds[1])], 64, 64
    )
    bank = PromptBank(regions.lists)
    bank.update(base[None])
    place = Place.whole(1, (8, 8), 0.0, torch.device("cpu"))
    layout = PromptWeights(regions, bank, mode == "joint").layout(place, (1, 4, 8, 8), torch.device("cpu"))
    query = torch.randn(64, 16, generator=torch.Generator().manual_seed(9))
    keys = bank.embeddings[:, :, None]
    got = ops.regional_attention(query[None, :, None], keys, keys, layout.ids, layout.weights[8, 8], mode=mode)[0, :, 0]
    shares = regions.shares()[0].flatten(1).double()
    wanted = attention(query.double(), [p.double() for p in (base, *embeds)], list(shares), mode)
    assert torch.allclose(got.double(), wanted, atol=1e-5)


def test_repeated_prompts_are_not_taken_for_long_ones():
    """A prompt of two equal halves weighs twice what one half does, where they share a softmax."""
    half = torch.randn(4, 16, generator=torch.Generator().manual_seed(1))
    regions = RegionMap([Region(mask=SOFT, embeds=half.repeat(2, 1))], 64, 64)
    bank = PromptBank(regions.lists)
    bank.update(half[None])
    assert len(bank.embeddings) == 2 and bank.repeats == [2, 1]
    assert torch.equal(bank.embeddings[0], bank.embeddings[1])

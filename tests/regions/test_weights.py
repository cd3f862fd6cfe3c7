"""Prompts of different lengths in one bank: exact in both modes, also where they mix."""

import contextlib
import dataclasses
from unittest import mock

import pytest
import torch

from instantas import ops
from instantas.ops.backend import BACKENDS
from instantas.pipelines.pipeline import InstantASPipeline
from instantas.regions import Region, RegionMap, weights
from instantas.regions.prompts import PromptBank
from instantas.regions.weights import PromptWeights, WindowBatch
from instantas.testing import recorded, tiny

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
@pytest.mark.parametrize("lengths", [(4, 4), (4, 8), (8, 4), (4, 12), (2, 2), (4, 1), (3, 7), (5, 4), (77, 6)])
def test_prompts_of_different_lengths_where_they_mix(mode, lengths):
    base, *embeds = (
        torch.randn(length, 16, generator=torch.Generator().manual_seed(length)) for length in (4, *lengths)
    )
    regions = RegionMap(
        [Region(mask=SOFT, embeds=embeds[0]), Region(mask=1 - SOFT, weight=0.5, embeds=embeds[1])], 64, 64
    )
    bank = PromptBank(regions.lists)
    bank.update(base[None])
    whole = WindowBatch.whole(1, (8, 8), 0.0, torch.device("cpu"))
    layout = PromptWeights(regions, bank).layout(whole, (1, 4, 8, 8), torch.device("cpu"))
    query = torch.randn(64, 16, generator=torch.Generator().manual_seed(9))
    keys = bank.embeddings[:, :, None]
    how = dict(mode=mode, lengths=layout.lengths)
    got = ops.regional_attention(query[None, :, None], keys, keys, layout.ids, layout.weights[8, 8], **how)[0, :, 0]
    shares = regions.shares()[0].flatten(1).double()
    wanted = attention(query.double(), [p.double() for p in (base, *embeds)], list(shares), mode)
    assert torch.allclose(got.double(), wanted, atol=1e-5)


def test_long_prompts_are_not_taken_for_their_beginnings():
    """A prompt of two equal halves weighs twice what one half does, where they share a softmax."""
    half = torch.randn(4, 16, generator=torch.Generator().manual_seed(1))
    regions = RegionMap([Region(mask=SOFT, embeds=half.repeat(2, 1))], 64, 64)
    bank = PromptBank(regions.lists)
    bank.update(half[None])
    assert bank.embeddings.shape == (2, 8, 16) and bank.lengths.tolist() == [4, 8]
    assert torch.equal(bank.embeddings[0, :4], bank.embeddings[1, :4]) and not bank.embeddings[0, 4:].any()


# The order of the queries


def spying(orders):
    """A backend that gains by an order, and keeps what order it was given beside the one that would be right."""
    right = BACKENDS["cpp" if ops.backends()["cpp"] == "available" else "reference"]

    def attention(query, key, value, ids, weights, joint, scale, order=None):
        orders.append((order if order is None else order.clone(), ops.region_order(ids, weights)))
        return right.functions()["regional_attention"](query, key, value, ids, weights, joint, scale, order)

    functions = {**right.functions(), "regional_attention": attention}
    return dataclasses.replace(right, functions=lambda: functions, ordered=True)


@pytest.mark.parametrize("bridging", ["none", "shift"])
@pytest.mark.parametrize("graph", [False, True])
def test_every_layer_visits_queries_in_the_order_of_the_present_windows(bridging, graph):
    pipe = InstantASPipeline.from_pipe(tiny.tiny_pipeline())
    regions = [Region("grass", box=(0.0, 0.0, 0.4, 1.0), feather=16), Region("stone", box=(0.4, 0.2, 1.0, 0.7))]

    def paint():
        settings = dict(height=200, width=332, regions=regions, bridging=bridging, num_inference_steps=6)
        generator = torch.Generator().manual_seed(0)
        return pipe("wall", **settings, output_type="latent", generator=generator, cuda_graph=graph).images

    orders: list[tuple] = []
    with contextlib.ExitStack() as stack:
        made = stack.enter_context(recorded.recording()) if graph else None
        plain = paint()
        made_orders = stack.enter_context(mock.patch.object(weights.ops, "region_order", wraps=ops.region_order))
        stack.enter_context(ops.use_backend(spying(orders)))
        got = paint()
    assert torch.equal(got, plain) and (made or not graph)
    given = [(order, right) for order, right in orders if right.shape[1] > weights.TILE]
    assert given and all(torch.equal(order, right) for order, right in given)
    assert all(order is None for order, right in orders if right.shape[1] <= weights.TILE)
    if not graph:  # once for each batch of windows, of one resolution, that differs from those before
        assert made_orders.call_count - len(orders) == {"none": 2, "shift": 2 * 6}[bridging]

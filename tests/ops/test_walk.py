"""The CUDA kernel of attention walks over many tiles a block: what it keeps staged changes no bit, and is read once.

The emulated device is one multiprocessor, so that a few tiles are more than run at once. Its memory has room for two
blocks up to D = 96 and for one above, and for a second buffer for queries at D = 48, 128 and 160, not at 64 and 80.
"""

from functools import partial

import pytest
import torch

from instantas import ops
from instantas.testing import emulated, oracle
from instantas.testing.oracle import attention_inputs, region_weights

pytestmark = pytest.mark.skipif(not oracle.EMULATED, reason="the emulation needs a compiler and no GPU")
DEPTHS = {48: 2, 64: 2, 128: 1}  # blocks that run at once


def attend(inputs, dtype=torch.float16, **how):
    (out,) = oracle.run("cuda", partial(ops.regional_attention, **how), inputs, dtype)
    return out


def tile_by_tile(inputs, rows, **how):
    """The same of a call for every tile of every head, which starts with nothing staged."""
    query, key, value, ids, weights = inputs
    images = []
    for image in range(len(query)):
        heads = []
        for head in range(query.shape[2]):
            bank = [tensor[:, :, head : head + 1] for tensor in (key, value)]
            tiles = [
                attend([q[None, :, head : head + 1], *bank, ids[image : image + 1], w[None]], **how)[0]
                for q, w in zip(query[image].split(rows), weights[image].split(rows, 1))
            ]
            heads.append(torch.cat(tiles))
        images.append(torch.cat(heads, 1))
    return torch.stack(images)


@pytest.mark.parametrize("mode", ["blend", "joint"])
@pytest.mark.parametrize("depth", DEPTHS)
def test_one_prompt_for_all_tiles(depth, mode):
    """Three tiles of two heads of two images, the last of a head not full; each image has a prompt of its own."""
    rows = emulated.attention_rows(depth)
    *bank, ids = attention_inputs(2, 2 * rows + 5, 2, depth, 2, 77, 1)
    ids[1] = 1
    inputs = [*bank, ids, torch.ones(2, 1, 2 * rows + 5)]
    walked = attend(inputs, mode=mode)
    assert torch.equal(walked, tile_by_tile(inputs, rows, mode=mode))
    for seed in (1, 2):
        with emulated.order(seed):
            assert torch.equal(attend(inputs, mode=mode), walked)


@pytest.mark.parametrize("tokens", [77, 90])
@pytest.mark.parametrize("depth", DEPTHS)
def test_tiles_of_one_prompt_several_and_none(depth, tokens):
    """Thirty tiles whose prompts change: kept, another, two, none; a prompt of 90 tokens is staged in two parts."""
    rows = emulated.attention_rows(depth)
    visited = [[0], [0], [2], [1], [0, 1], [1], [], [1], [0, 2], [0]] * 3
    *bank, ids = attention_inputs(1, len(visited) * rows, 1, depth, 2, tokens, 3)
    ids[0] = torch.tensor([0, 1, 0])
    weights = torch.zeros(1, 3, len(visited) * rows)
    for tile, slots in enumerate(visited):
        weights[0, slots, tile * rows : (tile + 1) * rows] = region_weights(1, len(slots), rows, seed=tile)[0] + 0.1
    inputs = [*bank, ids, weights]
    walked = attend(inputs)
    assert torch.equal(walked, tile_by_tile(inputs, rows))
    assert not walked[0, 6 * rows : 7 * rows].any()
    with emulated.order(3):
        assert torch.equal(attend(inputs), walked)


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("prompts, tokens", [(1, 20), (2, 90)])
def test_memory_that_is_not_aligned(depth, prompts, tokens):
    """It is written at once, not when it is waited for: over what other warps may be reading still."""
    rows = emulated.attention_rows(depth)
    query, key, value, _ = attention_inputs(1, 10 * rows, 1, depth - 1, prompts, tokens, prompts)
    ids = torch.arange(prompts, dtype=torch.int32)[None]
    weights = region_weights(1, prompts, 10 * rows)
    weights[0, 0].view(-1, 16)[::2] = 0  # warps that skip a prompt run ahead of the others
    inputs = [query, key, value, ids, weights]
    walked = attend(inputs)
    assert torch.equal(walked, tile_by_tile(inputs, rows))
    for seed in (1, 2):
        with emulated.order(seed):
            assert torch.equal(attend(inputs), walked)


@pytest.mark.parametrize("depth", DEPTHS)
def test_a_prompt_is_staged_once_for_all_tiles_of_a_block(depth):
    """Bytes that are copied: the queries once, keys and values once for each block, not for each of eleven tiles."""
    queries, tokens = 11 * emulated.attention_rows(depth), 77
    inputs = [*attention_inputs(1, queries, 1, depth, 1, tokens, 1), torch.ones(1, 1, queries)]
    before = emulated.copied()
    attend(inputs)
    assert emulated.copied() - before == 2 * depth * (queries + DEPTHS[depth] * 2 * tokens)

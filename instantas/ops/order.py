"""The order in which attention visits the queries: those with the same set of prompts together."""

from __future__ import annotations

import torch

from .validation import check_tensor

WORD = 62  # bits of a key that int64 compares as a number >= 0


def region_order(prompt_ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The order in which `regional_attention` visits the queries, so that a tile of them meets few prompts.

    Queries with the same set of prompts of weight > 0 come together, in raster order among themselves; sets that share
    prompts come near each other, and queries without any come last. To be made once for a layout of the regions, and
    used for all heads, layers and steps; on the device, without waiting for it.

    Args:
        prompt_ids: (B, R) integers; -1: unused.
        weights: (B, R, N).

    Returns:
        (B, N) int32, a permutation of 0 .. N - 1 for each image.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Equivalent PyTorch code (up to the order of the sets, which keeps neighbours together)::

        sets = (weights > 0) & (prompt_ids >= 0)[..., None]
        keys = (sets * 2 ** torch.arange(R)[:, None]).sum(1)
        order = keys.argsort(dim=1, stable=True)
    """
    integers = torch.int32, torch.int64
    check_tensor("prompt_ids", prompt_ids, "(B, R)", (None, None), dtypes=integers)
    b, r = prompt_ids.shape
    check_tensor("weights", weights, "(B, R, N)", (b, r, None), device=prompt_ids.device)
    n = weights.shape[2]
    order = torch.arange(n, device=weights.device).expand(b, n)
    if n == 0 or r == 0:
        return order.int()
    # by slot, not by prompt: kernels visit a prompt for each slot that names it
    sets = (weights > 0) & (prompt_ids >= 0)[..., None]
    # slots numbered by where they first occur, so that what is near has near numbers, however the caller numbers them
    first = torch.where(sets, order[:, None], n).amin(2)
    sets = sets.gather(1, first.argsort(dim=1, stable=True)[..., None].expand_as(sets))
    for key in _keys(sets):
        order = order.gather(1, key.gather(1, order).argsort(dim=1, stable=True))
    return order.int()


def _keys(sets):
    """(B, N) each, from the least significant to the most: neighbours in the order of sets differ in few slots.

    By the lowest slot, then the highest, then as a Gray code counts.
    """
    r = sets.shape[1]
    slots = torch.arange(r, device=sets.device)[:, None]
    rank = sets.flip(1).cumsum(1).flip(1) % 2  # the bits of a set's number in the Gray code: parities of the bits above
    for start in range(0, r, WORD):
        yield (rank[:, start : start + WORD] << slots[: min(WORD, r - start)]).sum(1)
    yield torch.where(sets, slots, r).amin(1) * (r + 1) + torch.where(sets, slots, -1).amax(1)

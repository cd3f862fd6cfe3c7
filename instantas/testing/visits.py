"""How many prompts attention visits in a tile of queries, counted as its kernels find them; regions to count it for."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F


def visited(
    prompt_ids: torch.Tensor, weights: torch.Tensor, rows: int, order: torch.Tensor | None = None
) -> torch.Tensor:
    """(B,) float64: the prompts visited in a tile of so many queries, in the mean over the tiles of an image.

    Args:
        prompt_ids, weights, order: as `ops.regional_attention` takes them.
        rows: queries of a tile.
    """
    used = (weights > 0) & (prompt_ids >= 0)[..., None]
    if order is not None:
        used = used.gather(2, order.long()[:, None].expand_as(used))
    tiles = F.pad(used, (0, -used.shape[2] % rows)).unflatten(2, (-1, rows))
    return tiles.any(3).sum(1).double().mean(1)


def layouts(regions: int, side: int = 64) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, (R, side, side) weights): every cell belongs to one of so many regions, a square number."""
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    across = round(regions**0.5)
    yield "stripes", one_each(x * regions // side, regions)
    yield "layers", one_each(y * regions // side, regions)
    yield "quarters", one_each(y * across // side * across + x * across // side, regions)
    for cell in (16, 4):
        yield f"chequerboard of {cell}", one_each((y // cell * across + x // cell) % regions, regions)
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        centres = torch.rand(regions, 2, generator=generator) * side
        apart = (y[..., None] - centres[:, 0]) ** 2 + (x[..., None] - centres[:, 1]) ** 2
        yield f"blobs {seed}", one_each(apart.argmin(-1), regions)


def one_each(region: torch.Tensor, regions: int) -> torch.Tensor:
    """(R, h, w) weights of cells (h, w) that belong to a region each."""
    return F.one_hot(region, regions).permute(2, 0, 1).float()


def feathered(weights: torch.Tensor, cells: int) -> torch.Tensor:
    """Weights that fade into each other over so many cells to either side."""
    return F.avg_pool2d(F.pad(weights[None], [cells] * 4, mode="replicate"), 2 * cells + 1, 1)[0]

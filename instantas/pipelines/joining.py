"""How what is painted joins the picture around it, whose own pixels stay: new ones are drawn to their colours."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def joined(
    images: torch.Tensor, pictures: torch.Tensor, new: torch.Tensor, blend: int, wrap: tuple[bool, bool]
) -> torch.Tensor:
    """Images that were painted, with the pictures' own pixels where these stay.

    New pixels nearer than `blend` to one that stays are moved as the border had to be, on average over as wide a part
    of it as they are away from it, and the less the further away: what the autoencoder loses of a picture, and colours
    that do not meet, would show as an edge.

    Args:
        images, pictures: (B, 3, height, width) in 0..1.
        new: (B or 1, 1, height, width) bool, False where the pictures' pixels stay, exactly.
        blend: pixels, along the farther of both axes; 0: none is moved.
        wrap: (vertical, horizontal), whether opposite edges join.
    """
    if len(new) > 1:
        each = zip(images.split(1), pictures.split(1), new.split(1))
        return torch.cat([joined(*one, blend, wrap) for one in each])
    if not new.any():
        return pictures
    spans = [_span(new[0, 0].any(axis), wraps) for axis, wraps in zip((1, 0), wrap)]
    place, result = (..., *spans), pictures.clone()
    goes_round = [span == slice(None) and wraps for span, wraps in zip(spans, wrap)]
    result[place] = _joined(images[place], pictures[place], new[place], blend, goes_round)
    return result


def _span(new, wraps):
    """The part of an axis that holds what is new, and the pixels beside it; where that goes round, the whole axis."""
    numbers = new.nonzero()[:, 0]
    begin, end = int(numbers[0]) - 1, int(numbers[-1]) + 2
    return slice(None) if wraps and not 0 <= begin < end <= len(new) else slice(max(begin, 0), end)


def _joined(images, pictures, new, blend, wrap):
    rows, columns = images.shape[-2:]
    painted = new.to(images)
    moved = (pictures - images) * (1 - painted)
    down, across = (min(blend, side) * wraps for side, wraps in zip((rows, columns), wrap))
    moved, painted = (F.pad(each, (across, across, down, down), mode="circular") for each in (moved, painted))
    away, stays = torch.zeros_like(painted), 1 - painted
    for _ in range(min(blend, max(painted.shape[-2:]))):  # no pixel is farther away
        away, stays = away + (1 - stays), F.max_pool2d(stays, 3, stride=1, padding=1)
    rim = (1 - painted) * F.max_pool2d(painted, 3, stride=1, padding=1)
    moved = _spread(moved, rim) * (1 - away / max(blend, 1)) if blend else torch.zeros_like(moved)
    moved = moved[..., down : down + rows, across : across + columns]
    return torch.where(new, images + moved, pictures).clamp(0, 1)


def _spread(values, known):
    """Values (B, C, H, W) that go on smoothly from where known, (1, 1, H, W), is 1 to where it is 0."""
    if known.all() or not known.any():
        return values
    weight = F.avg_pool2d(known, 2, ceil_mode=True)
    coarse = F.avg_pool2d(values * known, 2, ceil_mode=True) / weight.clamp(min=1e-6)
    coarse = _spread(coarse, (weight > 0).to(known))
    filled = F.interpolate(coarse, values.shape[-2:], mode="bilinear", align_corners=False)
    for _ in range(8):  # toward the mean of the neighbours, which is what smooth means
        filled = F.avg_pool2d(torch.where(known > 0, values, filled), 3, stride=1, padding=1, count_include_pad=False)
    return torch.where(known > 0, values, filled)

"""A picture inside of a larger canvas: where it lies, which cells are new, and how what is painted joins it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from instantas.checks import integer


@dataclass(frozen=True)
class Margins:
    """Pixels by which a picture grows on each side.

    Raises:
        TypeError, ValueError: for what are no integers from 0 up, and for no growth at all.
    """

    left: int
    top: int
    right: int
    bottom: int

    def __post_init__(self):
        sides = {name: integer(name, getattr(self, name), 0) for name in ("left", "top", "right", "bottom")}
        if not any(sides.values()):
            raise ValueError("left: expected pixels to extend the picture by on some side, got 0 on all")

    def size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) of a picture that has grown."""
        return height + self.top + self.bottom, width + self.left + self.right

    def grown(self, pictures: torch.Tensor) -> torch.Tensor:
        """Pictures (n, 3, height, width), going on as their edges."""
        return F.pad(pictures, (self.left, self.right, self.top, self.bottom), mode="replicate")

    def mask(self, height: int, width: int, cell: int) -> torch.Tensor:
        """(1, 1, *size) bool: the cells of `cell` pixels a side that are not wholly the picture's, which are painted.

        Raises:
            ValueError: where there is no other.
        """
        sides = zip(self.size(height, width), (self.top, self.left), (height, width))
        down, across = (_whole(length, begin, begin + own, cell) for length, begin, own in sides)
        kept = down[:, None] & across
        if not kept.any():
            raise ValueError(f"image: expected a whole cell of {cell}x{cell} pixels in its place, got {width}x{height}")
        return ~kept[None, None]

    def joined(self, images: torch.Tensor, pictures: torch.Tensor, blend: int, wrap: tuple[bool, bool]) -> torch.Tensor:
        """Images (B, 3, *size) that were painted, with the pictures (B, 3, height, width) in them.

        The pictures' pixels are exactly theirs. New ones nearer than `blend` pixels are moved as the picture's had to
        be, on average over as wide a part of its border as they are away from it, and the less the further away.
        """
        height, width = pictures.shape[-2:]
        rows, columns = images.shape[-2:]
        place = ..., slice(self.top, self.top + height), slice(self.left, self.left + width)
        moved, new = torch.zeros_like(images), images.new_ones(1, 1, rows, columns)
        moved[place], new[place] = pictures - images[place], 0
        down, across = (min(blend, side) * wraps for side, wraps in zip((rows, columns), wrap))
        moved, new = (F.pad(each, (across, across, down, down), mode="circular") for each in (moved, new))
        rim = (1 - new) * F.max_pool2d(new, 3, stride=1, padding=1)
        moved = _spread(moved, rim)[..., down : down + rows, across : across + columns]
        away = _away(rows, self.top, height, wrap[0])[:, None], _away(columns, self.left, width, wrap[1])
        joined = images + moved * (1 - torch.maximum(*away).to(images) / max(blend, 1)).clamp(min=0)
        joined[place] = pictures
        return joined.clamp(0, 1)


def _whole(length, begin, end, cell):
    """(length,) bool, whether the cell that a pixel of an axis lies in is wholly inside of begin to end."""
    first = torch.arange(length) // cell * cell
    return (first >= begin) & ((first + cell).clamp(max=length) <= end)


def _spread(values, known):
    """Values (B, C, H, W) that go on smoothly from where they are known, 1 in (1, 1, H, W), to where they are not."""
    if known.all() or not known.any():
        return values
    weight = F.avg_pool2d(known, 2, ceil_mode=True)
    coarse = F.avg_pool2d(values * known, 2, ceil_mode=True) / weight.clamp(min=1e-6)
    coarse = _spread(coarse, (weight > 0).to(known))
    filled = F.interpolate(coarse, values.shape[-2:], mode="bilinear", align_corners=False)
    for _ in range(8):  # toward the mean of the neighbours, which is what smooth means
        filled = F.avg_pool2d(torch.where(known > 0, values, filled), 3, stride=1, padding=1, count_include_pad=False)
    return torch.where(known > 0, values, filled)


def _away(length, begin, own, wraps):
    """(length,) int64, pixels of an axis between each and the nearest of `own` from `begin` on."""
    position = torch.arange(length) - begin
    before, after = -position, position - own + 1
    apart = torch.maximum(before, after).clamp(min=0)
    return torch.where(apart > 0, torch.minimum(before % length, after % length), 0) if wraps else apart

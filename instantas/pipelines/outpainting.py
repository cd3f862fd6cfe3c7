"""A picture inside of a larger canvas: where it lies, and which cells are new."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from instantas.checks import integer
from instantas.pipelines.joining import joined


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
        """Images (B, 3, *size) that were painted, with the pictures in them (`joining.joined`)."""
        height, width = pictures.shape[-2:]
        place = ..., slice(self.top, self.top + height), slice(self.left, self.left + width)
        own, new = images.clone(), torch.ones_like(images[:1, :1], dtype=torch.bool)
        own[place], new[place] = pictures, False
        return joined(images, own, new, blend, wrap)


def _whole(length, begin, end, cell):
    """(length,) bool, whether the cell that a pixel of an axis lies in is wholly inside of begin to end."""
    first = torch.arange(length) // cell * cell
    return (first >= begin) & ((first + cell).clamp(max=length) <= end)

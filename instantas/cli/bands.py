"""Pictures that are never held: decoded in bands, and written to a BigTIFF file as they come."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from instantas.cli.pictures import TIFF, described, format_of, write_picture
from instantas.files import whole_file

LARGE = 2**26  # pixels, 8192 x 8192: pictures with more leave in bands
TILE = 256  # pixels: side of the file's own tiles
BUFFER = 2**24  # bytes of tiles that are compressed at once
PREVIEW = 2048  # pixels: the longest side of what is written beside the file


def is_large(output: Path, width: int, height: int) -> bool:
    """Whether a picture can leave in bands: a large one, to TIFF."""
    return format_of(output) is TIFF and width * height > LARGE


def in_bands(pipe: Any, output: Path, width: int, height: int) -> bool:
    """Whether a picture is written in bands: a large one, to TIFF, that nothing has to see as a whole."""
    return is_large(output, width, height) and not pipe.needs_whole_pictures


def preview_path(output: Path) -> Path:
    """Where the small picture of a large one is written."""
    return output.with_suffix(".preview.png")


def write_bands(
    bands: Iterable[np.ndarray], output: Path, width: int, height: int, text: dict[str, str], force: bool
) -> None:
    """A BigTIFF file, compressed and in tiles, of bands of a picture, and a preview of it; both whole or none.

    Args:
        bands: (rows, width, 3) uint8, from top to bottom.
        text: the record, which both carry.
    """
    import tifffile
    from PIL import Image

    preview = Preview(width, height)
    with whole_file(output, overwrite=force) as part:
        with tifffile.TiffWriter(part, bigtiff=True) as file:
            file.write(
                tiles(preview.seen(bands)),
                shape=(height, width, 3),
                dtype=np.uint8,
                tile=(TILE, TILE),
                photometric="rgb",
                compression="zlib",
                description=described(text),
                software=text["Software"],
                metadata=None,
                buffersize=BUFFER,
            )
        write_picture(Image.fromarray(preview.picture()), preview_path(output), text, force)


def tiles(bands: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Tiles of the file, row by row, of bands of any height; those at its end are smaller."""
    held = None
    for band in bands:
        held = band if held is None else np.concatenate([held, band])
        whole = len(held) // TILE * TILE
        yield from _cut(held[:whole])
        held = held[whole:]
    if held is not None:
        yield from _cut(held)


def _cut(rows):
    for top in range(0, len(rows), TILE):
        for left in range(0, rows.shape[1], TILE):
            yield rows[top : top + TILE, left : left + TILE]


class Preview:
    """A small picture of a large one, of which bands are seen: means over squares of so many pixels."""

    def __init__(self, width: int, height: int):
        self.side = -(-max(width, height) // PREVIEW)
        self.size = width, height
        self.sums = np.zeros((-(-height // self.side), -(-width // self.side), 3), np.uint32)
        self.row = 0

    def seen(self, bands: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """The bands, as they pass."""
        for band in bands:
            across = np.add.reduceat(band, np.arange(0, band.shape[1], self.side), axis=1, dtype=np.uint32)
            rows = (self.row + np.arange(len(band))) // self.side
            first = np.flatnonzero(np.diff(rows, prepend=-1))
            self.sums[rows[first]] += np.add.reduceat(across, first, axis=0)
            self.row += len(band)
            yield band

    def picture(self) -> np.ndarray:
        """(height, width, 3) uint8, once all bands were seen."""
        columns, rows = (np.minimum(self.side, length - np.arange(0, length, self.side)) for length in self.size)
        means = (sums / (count * columns)[:, None] for count, sums in zip(rows, self.sums))
        return np.stack([row.round().astype(np.uint8) for row in means])

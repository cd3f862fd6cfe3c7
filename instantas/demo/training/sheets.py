"""Contact sheets of training pictures, and the command that writes one."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

from PIL import Image

from instantas.files import whole_file

WINDOW, GAP = 128, 4
"""Side of a picture and the space between two, in pixels."""


def contact_sheet(rows: Sequence[Sequence[Image.Image]]) -> Image.Image:
    """Pictures of WINDOW pixels a side in rows and columns."""
    step = WINDOW + GAP
    sheet = Image.new("RGB", (step * max(map(len, rows)), step * len(rows)), "white")
    for i, row in enumerate(rows):
        for j, picture in enumerate(row):
            sheet.paste(picture, (step * j, step * i))
    return sheet


def write_sheet(
    program: str, description: str, draw: Callable[[int, int], Image.Image], arguments: list[str] | None
) -> int:
    """A command line, `PROGRAM OUT.png`; errors are one line and exit code 2.

    Args:
        program: what it is called by.
        description: what it draws.
        draw: function of (columns, seed) that gives the sheet.
        arguments: by default those of the process.
    """
    parser = argparse.ArgumentParser(prog=program, description=description)
    parser.add_argument("out", help="the picture to write")
    parser.add_argument("--columns", type=int, default=8, help="pictures in a row")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    try:
        with whole_file(options.out) as path:
            draw(options.columns, options.seed).save(path)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    return 0

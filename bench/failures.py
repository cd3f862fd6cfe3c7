"""The failure cases that the InstantAS paper names (supplement, section 4), on the embedded model, method by method.

    python -m bench.failures --out out/failures --seeds 4 --table bench/results/failures.md \\
        --sheet docs/pictures/failures.jpg

A single subject with its whole structure; as many subjects as were asked for; a scene against the canvas's shape.
Subjects are counted by `instantas.demo.detector`. A picture that is in the folder is not painted again.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from bench.structure_pictures import METHODS, keep, pipeline, sheet
from instantas.demo.detector import Detector
from instantas.regions import Region

SHOWN = ("none", "shift", "MultiDiffusion", "coarse")


class Case(NamedTuple):
    """What is asked for: prompt, (width, height) in pixels, regions, and the subjects that a right picture has."""

    prompt: str
    size: tuple[int, int]
    wanted: dict[str, int]
    regions: tuple[Region, ...] = ()


CASES = {
    "one subject": Case("lighthouse by the sea at dusk", (384, 384), {"lighthouse": 1}),
    "a quantity": Case(
        "sea by day",
        (512, 256),
        {"boat": 2},
        tuple(Region("sailing boat at sea by day", box=(left, 0.0, left + 0.5, 1.0)) for left in (0.0, 0.5)),
    ),
    "tall on a wide canvas": Case("lighthouse by the sea", (512, 256), {"lighthouse": 1}),
    "the same, placed": Case(
        "sea by day",
        (512, 256),
        {"lighthouse": 1},
        (Region("lighthouse by the sea by day", box=(0.5, 0.0, 1.0, 1.0), feather=16),),
    ),
}
"""The model knows no numbers: a quantity is stated by regions, of which each has the subject once."""


def paint(path: Path, case: Case, name: str, seed: int) -> None:
    """The picture of a method, unless it is there."""
    if path.exists():
        return
    width, height = case.size
    settings = METHODS[name]._asdict() | ({"regions": list(case.regions)} if case.regions else {})
    generator = torch.Generator().manual_seed(seed)
    picture = pipeline()(
        case.prompt, height=height, width=width, generator=generator, window_batch_size=20, **settings
    ).images[0]
    keep(picture, path)


def counts(path: Path, detector: Detector) -> Counter[str]:
    """How many of each subject a picture has."""
    return Counter(each.subject for each in detector.find(np.asarray(Image.open(path).convert("RGB"))))


def cell(paths: list[Path], case: Case, detector: Detector) -> str:
    """How many of the pictures that are there show what is wanted and nothing else; in brackets their subjects."""
    found = [counts(path, detector) for path in paths if path.exists()]
    numbers = ", ".join(str(sum(each[subject] for subject in case.wanted)) for each in found)
    return f"{sum(each == case.wanted for each in found)} of {len(found)} ({numbers})" if found else "not painted"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--only", nargs="+", choices=SHOWN, default=list(SHOWN), help="methods to paint; by default all"
    )
    parser.add_argument("--seeds", type=int, default=4, help="pictures of every case and method")
    parser.add_argument("--table", type=Path)
    parser.add_argument("--sheet", type=Path, help="of the first seed")
    options = parser.parse_args(arguments)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    detector = Detector.load()

    def files(title: str, name: str) -> list[Path]:
        return [options.out / f"{title}-{name}-{seed}.png" for seed in range(options.seeds)]

    lines = ["| case | wanted | " + " | ".join(SHOWN) + " |", "|---" * (2 + len(SHOWN)) + "|"]
    for title, case in CASES.items():
        for name in options.only:
            for seed, path in enumerate(files(title, name)):
                paint(path, case, name, seed)
        wanted = ", ".join(f"{count} {subject}" for subject, count in case.wanted.items())
        row = [title, wanted, *(cell(files(title, name), case, detector) for name in SHOWN)]
        lines.append(f"| {' | '.join(row)} |")
    print(*lines, sep="\n")
    if options.table:
        options.table.write_text("\n".join(lines) + "\n")
    if options.sheet:
        first = [[files(title, name)[0] for name in SHOWN] for title in CASES]
        sheet([[path for path in row if path.exists()] for row in first], options.sheet, height=192, quality=85)
    return 0


if __name__ == "__main__":
    sys.exit(main())

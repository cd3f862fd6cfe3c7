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

from bench.structure_pictures import METHODS, pipeline, sheet
from instantas.demo.detector import Detector
from instantas.files import whole_file
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
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path, overwrite=True) as part:
        picture.save(part, format="PNG")


def counts(path: Path, detector: Detector) -> Counter[str]:
    """How many of each subject a picture has."""
    return Counter(each.subject for each in detector.find(np.asarray(Image.open(path).convert("RGB"))))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="+", choices=SHOWN, default=list(SHOWN), help="methods; by default all")
    parser.add_argument("--seeds", type=int, default=4, help="pictures of every case and method")
    parser.add_argument("--table", type=Path)
    parser.add_argument("--sheet", type=Path, help="of the first seed")
    options = parser.parse_args(arguments)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    detector = Detector.load()

    def file(title: str, name: str, seed: int) -> Path:
        return options.out / f"{title}-{name}-{seed}.png"

    lines = ["| case | wanted | " + " | ".join(options.only) + " |", "|---" * (2 + len(options.only)) + "|"]
    for title, case in CASES.items():
        row = [title, ", ".join(f"{count} {subject}" for subject, count in case.wanted.items())]
        for name in options.only:
            right, numbers = 0, []
            for seed in range(options.seeds):
                paint(file(title, name, seed), case, name, seed)
                found = counts(file(title, name, seed), detector)
                numbers.append(sum(found[subject] for subject in case.wanted))
                right += found == Counter(case.wanted)
            row.append(f"{right} of {options.seeds} right ({', '.join(map(str, numbers))})")
        lines.append(f"| {' | '.join(row)} |")
    print(*lines, sep="\n")
    if options.table:
        options.table.write_text("\n".join(lines) + "\n")
    if options.sheet:
        sheet(
            [[file(title, name, 0) for name in options.only] for title in CASES], options.sheet, height=192, quality=85
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())

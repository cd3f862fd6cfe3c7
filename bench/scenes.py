"""Scenes of one subject on the embedded model: how many subjects a large picture shows, by method.

    python -m bench.scenes --out out/scenes --only none shift coarse --size 2      # paints what is missing of them
    python -m bench.scenes --out out/scenes --table bench/results/scenes.md --sheet docs/pictures/subjects.jpg

The same seeds for every method; a picture that is in the folder is not painted again. Subjects are counted by
`instantas.demo.detector`. Needs `instantas[train]` for the seams' and spectra's measures.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from PIL import Image

from bench.quality import gradient_energy, load_picture
from bench.structure_pictures import (
    MEASURES,
    arguments_of,
    border,
    bracket,
    cost,
    file_of,
    measures,
    octaves,
    paint_all,
    seams,
    sheet,
)
from instantas.demo.detector import Detector

PROMPTS = {
    "lighthouse by the sea": "lighthouse",
    "sailing boat at sea": "boat",
    "tree in a field": "tree",
    "house on a hill": "house",
    "sun over mountains": "sun",
    "moon at night": "moon",
    "hot air balloon in the desert": "balloon",
    "bridge over a river": "bridge",
}
"""Prompt to the subject that is counted."""

SIZES = {
    2: [
        *("none", "shift", "dilated", "MultiDiffusion", "anchor", "refined", "coarse", "coarse, economy"),
        *("shift, overlapping", "coarse, overlapping", "coarse, economy, overlapping"),
    ],
    3: [
        *("none", "shift", "anchor", "refined", "coarse", "coarse, economy"),
        *("shift, overlapping", "coarse, overlapping"),
    ],
}


def measure(out: Path, name: str, size: int, seeds: int, detector: Detector) -> dict[str, np.ndarray]:
    """Of every picture that is there: its subjects, detail, octaves, and seam ratios with their weights."""
    found: dict[str, list] = dict(subjects=[], detail=[], octaves=[], seams=[], weights=[], prompts=[])
    for prompt, subject in PROMPTS.items():
        for seed in range(seeds):
            if not (path := file_of(out, name, size, prompt, seed)).exists():
                continue
            picture = load_picture(path)
            seen = detector.find(np.asarray(Image.open(path).convert("RGB")))
            found["prompts"].append(prompt)
            found["subjects"].append(sum(each.subject == subject for each in seen))
            found["detail"].append(gradient_energy(picture))
            found["octaves"].append(octaves(picture))
            for quantity, values in zip(("seams", "weights"), seams(picture)):
                found[quantity] += values
    return {key: np.array(values) for key, values in found.items()}


def by_prompt(found: dict[str, np.ndarray]) -> str:
    """The mean number of subjects for each prompt."""
    means = [found["subjects"][found["prompts"] == prompt].mean() for prompt in PROMPTS]
    return ", ".join(f"{subject} {mean:.2f}" for subject, mean in zip(PROMPTS.values(), means))


def table(out: Path, sizes: dict[int, list[str]], seeds: int, detector: Detector) -> list[str]:
    """Lines of markdown: a table for each size, of the methods that have pictures of every prompt."""
    native = measure(out, "native", 1, seeds, detector)
    one = (native["subjects"] == 1).mean()
    lines = [
        f"Native pictures, {len(native['subjects'])}: {bracket(native['subjects'])} subjects, "
        f"exactly one in {one:.0%} ({by_prompt(native)})."
    ]
    for size, names in sizes.items():
        head = f"method | pictures | evaluations | subjects | exactly one | {MEASURES}"
        lines += ["", f"{size} x {size} windows:", "", f"| {head} |", "|---" * (1 + head.count("|")) + "|"]
        shift = measure(out, "shift", size, seeds, detector)
        notes = []
        for name in names:
            found = measure(out, name, size, seeds, detector)
            if set(found["prompts"]) != set(PROMPTS):
                continue
            subjects = f"{bracket(found['subjects'])} | {(found['subjects'] == 1).mean():.0%}"
            rest = measures(found, shift, border(out, name, size, PROMPTS, seeds))
            row = f"{len(found['subjects'])} | {cost(name, size):.2f} | {subjects} | {rest}"
            lines.append(f"| {name} | {row} |")
            notes.append(f"* {name}: {by_prompt(found)}")
        lines += ["", "Subjects by prompt:", "", *notes]
    return lines


def main(arguments: list[str] | None = None) -> int:
    options = arguments_of(__doc__.split("\n")[0], SIZES, 13, "of every prompt").parse_args(arguments)
    paint_all(options, PROMPTS, SIZES, lambda size: options.seeds)
    lines = table(options.out, {size: SIZES[size] for size in options.size}, options.seeds, Detector.load())
    print(*lines, sep="\n")
    if options.table:
        options.table.write_text("\n".join(lines) + "\n")
    if options.sheet:
        named = [(1, "native"), *((max(options.size), name) for name in ("none", "shift", "coarse"))]
        rows = [[file_of(options.out, name, size, prompt, 0) for prompt in PROMPTS] for size, name in named]
        sheet(rows, options.sheet, height=160, quality=85)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Every bridge and the baselines on the embedded model: paints the pictures, then reports their measures.

    python -m bench.bridging --out out/bridging                   # paints what is missing, about an hour of one core
    python -m bench.bridging --out out/bridging --table bench/results/bridging.md --sheets docs/pictures

DDIM, 50 steps, guidance 2.5; the same seeds for every method. A picture that is in the folder is not painted again.
"""

from __future__ import annotations

import argparse
import functools
import sys
import textwrap
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from bench.bridging_pictures import (
    BOXES,
    CELL,
    GUIDANCE,
    LARGER,
    MATERIALS,
    METHODS,
    PROMPTS,
    QUARTERS,
    SCENE_SIZES,
    SCENES,
    SIZES,
    STEPS,
    WINDOW,
    evaluation_ratio,
    file_of,
    paint_missing,
    pictures_of,
)
from bench.quality import (
    bootstrap,
    control_positions,
    edge_distance,
    load_picture,
    repetition,
    seam_ratio,
    seam_scatter,
    steps_across,
    window_borders,
    window_divergence,
    window_gradient_energy,
)
from instantas import demo
from instantas.files import whole_file

SIDE = WINDOW * CELL  # of a native window, in pixels
BESIDE = 4  # cells from a border that the profile shows
STRIDED = [name for name in METHODS if METHODS[name].stride]
CORNER = 2 * CELL  # how far from a border of the other axis a corner reaches


class Seams:
    """Seam ratios of a group of pictures, at most one a picture and axis, with their weights."""

    def __init__(self):
        self.ratios, self.weights = [], []

    def add(self, picture: np.ndarray, axis: int, moved: int = 0, parts=None) -> None:
        """The ratio of one picture: at its windows' borders or `moved` pixels from them.

        parts: (left, top, right, bottom) of the parts that are measured each for itself, with its own control
        positions, and then averaged; None: the whole picture. Where no border is there is no ratio.
        """
        borders = window_borders(picture.shape[axis], SIDE) + moved
        ratios, scatters = [], []
        for left, top, right, bottom in parts or [(0, 0, picture.shape[1], picture.shape[0])]:
            start, end = ((top, bottom), (left, right))[axis]
            inside = borders[(borders >= start + 2 * CELL) & (borders < end - 2 * CELL)] - start
            if len(inside):
                part = picture[top:bottom, left:right]
                ratios.append(seam_ratio(part, inside, axis))
                scatters.append(seam_scatter(part, inside, axis))
        if ratios:
            self.ratios.append(float(np.mean(ratios)))
            self.weights.append(len(ratios) / float(np.linalg.norm(scatters)))

    def plain(self) -> str:
        return _interval(self.ratios)

    def weighted(self) -> str:
        return _interval(self.ratios, self.weights)


def _interval(values, weights=None, digits=2) -> str:
    if not len(values):
        return "-"
    low, high = bootstrap(values, weights)
    return f"{np.average(values, weights=weights):.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def corners(picture: np.ndarray, axis: int) -> list[tuple[int, int, int, int]]:
    """The bands across the picture in which windows meet four by four: parts for `Seams.add`."""
    height, width = picture.shape[:2]
    bands = []
    for border in window_borders(picture.shape[1 - axis], SIDE):
        near, far = border - CORNER, border + CORNER
        bands.append((0, near, width, far) if axis == 1 else (near, 0, far, height))
    return bands


def seams(pictures, moved: int = 0, parts=None) -> tuple[Seams, Seams, Seams]:
    """Of the columns, of the rows, of both. parts: function of (picture, axis)."""
    columns, rows, both = Seams(), Seams(), Seams()
    for picture in pictures:
        for axis, one in ((1, columns), (0, rows)):
            chosen = None if parts is None else parts(picture, axis)
            if chosen != []:
                one.add(picture, axis, moved, chosen)
    both.ratios, both.weights = columns.ratios + rows.ratios, columns.weights + rows.weights
    return columns, rows, both


def quarters(picture: np.ndarray, axis: int):
    return BOXES[picture.shape[1], picture.shape[0]]


@functools.cache
def real_divergence(count: int = 8) -> float:
    """Divergence of the training pictures, 256 x 256 px of each: 2 x 2 windows."""
    from instantas.demo.training.materials import render

    pictures = [render(material, i).image[:256, :256] / 255 for material in demo.MATERIALS for i in range(count)]
    return float(np.mean([window_divergence(picture, SIDE) for picture in pictures]))


def load(out: Path, name: str, chosen) -> list[np.ndarray]:
    return [load_picture(file_of(out, name, *picture)) for picture in chosen]


def is_whole(picture: np.ndarray) -> bool:
    """Whether the windows do not overlap: those are compared for detail."""
    return not (picture.shape[0] % SIDE or picture.shape[1] % SIDE)


def edges(picture: np.ndarray) -> float:
    return float(np.mean([edge_distance(picture, a, SIDE) for a in (0, 1) if picture.shape[a] > SIDE]))


HEAD = (
    "method",
    "pictures",
    "evaluations",
    "seam ratio, columns",
    "seam ratio, rows",
    "both, weighted",
    "divergence / real",
    "gradient / native",
    "repetition",
    "edges",
)


def row(out: Path, name: str, base: str, chosen) -> list[str]:
    """The measures of a method on the chosen pictures, as cells of the table; base: whose gradients are the unit."""
    pictures, plain = load(out, name, chosen), load(out, base, chosen)
    columns, rows, both = seams(pictures, parts=quarters if METHODS[name].regions else None)
    gradient = [np.mean([window_gradient_energy(p, SIDE) for p in group if is_whole(p)]) for group in (pictures, plain)]
    divergence = np.mean([window_divergence(p, SIDE) for p in pictures]) / real_divergence()
    return [
        name,
        str(len(pictures)),
        f"{evaluation_ratio(name, chosen):.2f}",
        columns.plain(),
        rows.plain(),
        both.weighted(),
        f"{divergence:.3f}",
        f"{gradient[0] / gradient[1]:.3f}",
        f"{np.mean([repetition(p, SIDE) for p in pictures]):.3f}",
        f"{np.mean([edges(p) for p in pictures]):.2f}",
    ]


def differences(out: Path, name: str, other: str) -> list[str]:
    """Mean difference of two methods' measures over the pictures that both have: the same noise, so less scatter."""
    chosen = [p for p in pictures_of(name) if p in set(pictures_of(other))]
    first, second = load(out, name, chosen), load(out, other, chosen)
    cells = [f"{name} - {other}", str(len(chosen))]
    for a, b in zip(seams(first)[:2], seams(second)[:2]):
        cells.append(_interval(np.subtract(a.ratios, b.ratios), digits=3))
    a, b = (seams(group)[2] for group in (first, second))
    cells.append(_interval(np.subtract(a.ratios, b.ratios), np.add(a.weights, b.weights), digits=3))
    for measure, unit in ((window_divergence, real_divergence()), (repetition, 1)):
        pairs = [(measure(a, SIDE) - measure(b, SIDE)) / unit for a, b in zip(first, second)]
        cells.append(_interval(pairs, digits=3))
    return cells


def by_size(out: Path, name: str) -> list[list[str]]:
    lines = []
    for width, height in METHODS[name].sizes:
        pictures = load(out, name, [p for p in pictures_of(name) if p[:2] == (width, height)])
        columns, rows, both = seams(pictures)
        meeting = seams(pictures, parts=corners)[2]
        cells = columns.plain(), rows.plain(), both.weighted(), meeting.plain(), meeting.weighted()
        lines.append([name, f"{width}x{height}", str(len(pictures)), *cells])
    return lines


def profile(out: Path, name: str) -> list[str]:
    """The seam ratio of all pictures with the borders moved by -BESIDE to BESIDE cells."""
    pictures = load(out, name, pictures_of(name))
    lines = []
    for axis in (1, 0):
        for picture in pictures:
            length = picture.shape[axis]
            borders = window_borders(length, SIDE)
            if len(borders):
                across = steps_across(picture, axis)
                places = borders[:, None] + np.arange(-BESIDE, BESIDE + 1) * CELL
                line = across[places].mean(0) / across[control_positions(length, borders)].mean()
                lines.append((1 / seam_scatter(picture, borders, axis), line))
    weights, profiles = zip(*lines)
    return [name, str(len(pictures)), *(f"{value:.2f}" for value in np.average(profiles, axis=0, weights=weights))]


def by_prompt(out: Path, name: str) -> list[list[str]]:
    lines = []
    for i, prompt in enumerate(MATERIALS):
        pictures = load(out, name, [p for p in pictures_of(name) if p[2] % len(PROMPTS) == i])
        columns, rows, both = seams(pictures)
        lines.append([prompt, str(len(pictures)), columns.plain(), rows.plain(), both.weighted()])
    return lines


def table(head, lines) -> list[str]:
    return ["", *("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *lines))]


def _sizes(sizes) -> str:
    return ", ".join(f"{width}x{height}" for width, height in sizes)


def group_of(name: str) -> str:
    """ "larger", "regions", "scenes", "tried", or "" for the rest: only methods of one group are compared."""
    first, comma, _ = name.partition(",")
    return first if comma and not METHODS[name].stride else ""


def report(out: Path, dtype) -> str:
    """The tables, in Markdown."""
    said = (
        f"Embedded model, DDIM, {STEPS} steps, guidance {GUIDANCE}, network in {str(dtype).removeprefix('torch.')}, "
        f"{len(MATERIALS)} prompts, the same seeds for every method. Native window {SIDE} px, pictures of "
        f"{_sizes(SIZES)} px where nothing else is said. Scenes: {len(SCENES)} prompts, {_sizes(SCENE_SIZES)} px. "
        f"Regions: {len(QUARTERS)} times four materials, {_sizes(BOXES)} px; seams are measured inside the regions, "
        "each against control positions of its own.",
        "Made by `python -m bench.bridging --table bench/results/bridging.md`; the measures are defined in "
        "`bench/quality.py`. Brackets: 95% of bootstrap resamples over pictures. Weighted: by one over the scatter of "
        "each ratio, so that bricks and planks count less. Evaluations: over those of minimum coverage. Divergence: "
        f"over that of real pictures ({real_divergence():.3f}). Gradient: energy inside windows over that of the "
        "table's first method; `none` is made of native single windows. Edges: difference of opposite outer edges over "
        "that of unrelated lines; lower when glued.",
    )
    lines = ["# Bridges, measured", *(line for text in said for line in ("", *textwrap.wrap(text, 120)))]
    for title, first in (
        ("Several seeds of each prompt", "shift"),
        ("One seed of each prompt", "none"),
        ("Square and wide pictures", "moments"),
        ("The pictures that MultiDiffusion painted at stride 1/8", "MultiDiffusion, stride 1/8"),
        ("Larger pictures, 3 x 3 windows", "larger, none"),
        ("Regions", "regions, none"),
        ("Scenes of two materials", "scenes, shift"),
    ):
        wanted = pictures_of(first)
        shown = [n for n in METHODS if group_of(n) == group_of(first) and set(wanted) <= set(pictures_of(n))]
        lines += ["", f"## {title}", *table(HEAD, [row(out, name, shown[0], wanted) for name in shown])]
    lines += ["", "## Differences on the same noise"]
    head = ("methods", "pictures", "columns", "rows", "both, weighted", "divergence / real", "repetition")
    pairs = (
        ("shift", "none"),
        ("economy", "shift"),
        ("shift", "MultiDiffusion, stride 1/8"),
        ("economy", "MultiDiffusion, stride 1/8"),
        ("shift+moments", "shift"),
        ("tried, cosine weights", "shift"),
        ("tried, last step moved", "shift"),
        ("scenes, shift+dilated", "scenes, shift"),
    )
    lines += table(head, [differences(out, *pair) for pair in pairs])
    lines += ["", "## By size, and where windows meet four by four"]
    head = ("method", "size", "pictures", "columns", "rows", "both, weighted", "corners", "corners, weighted")
    names = ("none", "economy", "shift", "larger, none", "larger, economy", "larger, shift")
    lines += table(head, [line for name in names for line in by_size(out, name)])
    lines += ["", "## By prompt, `shift`"]
    lines += table(("prompt", "pictures", "columns", "rows", "both, weighted"), by_prompt(out, "shift"))
    lines += ["", "## The difference at and beside the borders", ""]
    lines += ["Over the mean of the control positions, columns and rows, weighted; in cells from the border."]
    head = ("method", "pictures", *(f"{offset:+d}" for offset in range(-BESIDE, BESIDE + 1)))
    lines += table(head, [profile(out, name) for name in ("none", "centred", "economy", "shift", *STRIDED)])
    lines += ["", "## How far the ratio scatters where no window rests", "", "`shift`, the borders moved."]
    shift, lines_moved = load(out, "shift", pictures_of("shift")), []
    for moved in (0, *range(-56, -8, 8), *range(16, 64, 8)):
        columns, rows, both = seams(shift, moved)
        lines_moved.append([f"{moved} px", columns.plain(), rows.plain(), both.plain(), both.weighted()])
    lines += table(("moved by", "columns", "rows", "both", "both, weighted"), lines_moved)
    return "\n".join(lines) + "\n"


GAP = 6  # pixels between the pictures of a sheet


def sheet(lines: list[list[Path]], path: Path) -> None:
    """Pictures of one size side by side; red ticks above them: where windows rest."""
    with Image.open(lines[0][0]) as first:
        width, height = first.size
    image = Image.new("RGB", (len(lines[0]) * (width + GAP) - GAP, len(lines) * (height + GAP)), "white")
    for y, line in enumerate(lines):
        for x, file in enumerate(line):
            left, top = x * (width + GAP), y * (height + GAP)
            with Image.open(file) as tile:
                image.paste(tile, (left, top + GAP))
            for border in window_borders(width, SIDE):
                image.paste("red", (left + border - 1, top + 1, left + border + 1, top + GAP - 1))
    with whole_file(path) as temporary:
        image.save(temporary, quality=85)


def worst(out: Path, name: str, size: tuple[int, int], count: int = 4) -> list[Path]:
    """The pictures whose seam ratio is farthest above 1, in units of its scatter, worst first."""
    scores = {}
    for picture in (p for p in pictures_of(name) if p[:2] == size):
        both = seams(load(out, name, [picture]))[2]
        scores[picture] = max((ratio - 1) * weight for ratio, weight in zip(both.ratios, both.weights))
    return [file_of(out, name, *p) for p in sorted(scores, key=scores.get, reverse=True)[:count]]


def sheets(out: Path, folder: Path) -> None:
    """The side-by-side pictures of `docs/bridging.md`."""

    def lines(names, size, chosen):
        return [[file_of(out, name, *size, i) for i in chosen] for name in names]

    def of(*prompts):
        return [PROMPTS.index(prompt) for prompt in prompts]

    every = ["none", "moments", "centred", "economy", "shift", "shift+moments", "rolled canvas", *STRIDED]
    wide = of("red brick wall", "sunset clouds", "dark wooden planks")
    sheet(lines(every, SIZES[1], wide), folder / "bridging-wide.jpg")
    square = of("purple nebula", "red desert sand", "snow", "red brick wall")
    sheet(lines(["none", "economy", "shift"], SIZES[0], square), folder / "bridging-square.jpg")
    large = of("red brick wall", "purple nebula", "sunset clouds")
    sheet(lines(["larger, none", "larger, shift"], LARGER[0], large), folder / "bridging-larger.jpg")
    scenes = [name for name in METHODS if group_of(name) == "scenes"]
    sheet(lines(scenes, SCENE_SIZES[0], of(*(SCENES[i] for i in (0, 4, 5, 6)))), folder / "bridging-scenes.jpg")
    regions = [name for name in METHODS if group_of(name) == "regions"]
    sheet(lines(regions, SIZES[0], range(4)), folder / "bridging-regions.jpg")
    sheet([worst(out, name, SIZES[0]) for name in ("none", "economy", "shift")], folder / "bridging-worst.jpg")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("out/bridging"), help="folder of the pictures")
    parser.add_argument("--methods", nargs="*", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--table", type=Path, help="Markdown file to write; by default printed only")
    parser.add_argument("--sheets", type=Path, help="folder to write side-by-side pictures to")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16", help="of the network")
    options = parser.parse_args(arguments)
    dtype = getattr(torch, options.dtype)
    paint_missing(options.out, options.methods, dtype)
    if set(options.methods) != set(METHODS):
        return 0
    table = report(options.out, dtype)
    print(table)
    if options.table:
        options.table.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(options.table) as temporary:
            temporary.write_text(table)
    if options.sheets:
        options.sheets.mkdir(parents=True, exist_ok=True)
        sheets(options.out, options.sheets)
    return 0


if __name__ == "__main__":
    sys.exit(main())

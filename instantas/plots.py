"""Pictures of plans (a `WindowPlan`) and of regions (a `RegionMap`). Needs matplotlib (the `plot` extra)."""

from __future__ import annotations

import os
from typing import Any

from .files import check_writable, whole_file


def check_figure(path: str | os.PathLike, *, overwrite: bool = True, name: str = "path") -> str:
    """The format of a figure that is written to a path, by its ending; ask before the work, not after it.

    name: of the argument, for errors.

    Raises:
        ValueError: for an ending that is no picture's, and as `check_writable`.
    """
    from matplotlib.backend_bases import FigureCanvasBase

    ending = check_writable(path, overwrite=overwrite, name=name).suffix.lstrip(".").lower()
    if ending not in FigureCanvasBase.filetypes:
        raise ValueError(f"{name}: expected a picture ending such as .png, .svg or .pdf, got {str(path)!r}")
    return ending


def save_figure(figure: Any, path: str | os.PathLike) -> None:
    """Write a matplotlib figure whole or not at all; the format follows the ending of the path.

    Raises:
        ValueError: for an ending that is no picture's, and a path that cannot be written.
    """
    ending = check_figure(path)
    with whole_file(path) as part:
        figure.savefig(part, format=ending, dpi=120, bbox_inches="tight")


def _draw_windows(axes: Any, plan: Any) -> None:
    from matplotlib.patches import Rectangle

    h, w = plan.window
    for i, (y, x) in enumerate(plan.origins.tolist()):
        # a window over a wrapping border is drawn on both sides; the axes cut what lies outside
        for dy in (0, -plan.height) if y + h > plan.height else (0,):
            for dx in (0, -plan.width) if x + w > plan.width else (0,):
                axes.add_patch(Rectangle((x + dx, y + dy), w, h, fill=False, edgecolor=f"C{i % 10}", linewidth=1.5))


def plot_plan(plan: Any, path: str | os.PathLike) -> None:
    """Draw every window of a plan over the number of windows that cover each cell."""
    from matplotlib.figure import Figure

    cover = plan.coverage()
    figure = Figure(figsize=(8, max(1.5, 8 * plan.height / plan.width)))
    axes = figure.subplots()
    image = axes.imshow(cover, cmap="Blues", vmin=0, vmax=max(2, cover.max()), extent=(0, plan.width, plan.height, 0))
    _draw_windows(axes, plan)
    axes.set(xlim=(0, plan.width), ylim=(plan.height, 0), xlabel="cells", ylabel="cells")
    windows = "{} windows of {} x {}".format(plan.count, *plan.window)
    axes.set_title(f"{plan.height} x {plan.width} cells, {windows} (lower bound {plan.lower_bound})")
    figure.colorbar(image, ax=axes, label="windows over a cell", shrink=0.8)
    save_figure(figure, path)


def plot_regions(regions: Any, plan: Any, path: str | os.PathLike) -> None:
    """Draw a RegionMap's first picture: each prompt's colour by its share of every cell, and the plan's windows."""
    import numpy as np
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    shares = regions.shares(_fullest(regions))[0].cpu().numpy()
    shares = shares / shares.sum(0)
    colours = np.array([(0.85, 0.85, 0.85), *colormaps["tab20"](np.arange(len(shares) - 1) % 20)[:, :3]])
    rows, columns = shares.shape[1:]
    figure = Figure(figsize=(8, max(2.0, 8 * rows / columns)))
    axes = figure.subplots()
    axes.imshow(np.einsum("rhw,rc->hwc", shares, colours).clip(0, 1), extent=(0, columns, rows, 0))
    if plan is not None:
        _draw_windows(axes, plan)
    names = ["base prompt", *(region.prompt or "embeds" for region in regions.lists[0])]
    patches = [
        Patch(color=colour, label=f"{name} ({share:.0%})")
        for name, colour, share in zip(names, colours, shares.mean((1, 2)))
    ]
    axes.legend(handles=patches, loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    axes.set(xlim=(0, columns), ylim=(rows, 0), xlabel="cells", ylabel="cells")
    axes.set_title(f"{regions.width} x {regions.height} px")
    save_figure(figure, path)


def _fullest(regions: Any) -> float:
    """The point of the run at which the regions have most to say."""
    return max((step / 100 for step in range(100)), key=lambda progress: sum(map(sum, regions.weights(progress))))

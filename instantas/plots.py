"""Pictures of plans. Needs matplotlib (the `plot` extra)."""

from __future__ import annotations

import os
from pathlib import Path

from instantas.files import whole_file


def save_figure(figure, path: str | os.PathLike) -> None:
    """Write a matplotlib figure whole or not at all; the format follows the ending of the path."""
    ending = Path(path).suffix.lstrip(".")
    if ending not in figure.canvas.get_supported_filetypes():
        raise ValueError(f"path: expected a picture ending such as .png, .svg or .pdf, got {str(path)!r}")
    with whole_file(path) as part:
        figure.savefig(part, format=ending, dpi=120, bbox_inches="tight")


def plot_plan(plan, path: str | os.PathLike) -> None:
    """Draw every window of a plan over the number of windows that cover each cell."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    cover = plan.coverage()
    figure = Figure(figsize=(8, max(1.5, 8 * plan.height / plan.width)))
    axes = figure.subplots()
    image = axes.imshow(cover, cmap="Blues", vmin=0, vmax=max(2, cover.max()), extent=(0, plan.width, plan.height, 0))
    h, w = plan.window
    for i, (y, x) in enumerate(plan.origins.tolist()):
        # a window over a wrapping border is drawn on both sides; the axes cut what lies outside
        for dy in (0, -plan.height) if y + h > plan.height else (0,):
            for dx in (0, -plan.width) if x + w > plan.width else (0,):
                axes.add_patch(Rectangle((x + dx, y + dy), w, h, fill=False, edgecolor=f"C{i % 10}", linewidth=1.5))
    axes.set(xlim=(0, plan.width), ylim=(plan.height, 0), xlabel="cells", ylabel="cells")
    axes.set_title(
        f"{plan.height} x {plan.width} cells, {plan.count} windows of {h} x {w} (lower bound {plan.lower_bound})"
    )
    figure.colorbar(image, ax=axes, label="windows over a cell", shrink=0.8)
    save_figure(figure, path)

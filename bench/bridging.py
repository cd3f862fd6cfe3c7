"""Every bridge and the baselines on the embedded model: pictures, and the table of their measures.

    python bench/bridging.py --out out/bridging                   # paints what is missing, about 30 minutes of one core
    python bench/bridging.py --out out/bridging --table bench/results/bridging.md --sheets docs/pictures

DDIM, 50 steps, guidance 2.5; the same seeds for every method. A picture that is in the folder is not painted again.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from quality import (
    bootstrap,
    edge_distance,
    load_picture,
    repetition,
    seam_ratio,
    seam_scatter,
    window_borders,
    window_divergence,
    window_gradient_energy,
)

from instantas import bridging, demo
from instantas.files import whole_file
from instantas.sampler import sample
from instantas.windows import WindowPlan

WINDOW, CELL = 16, 8  # native window in cells, pixels of a cell
STEPS, GUIDANCE = 50, 2.5
MATERIALS = [prompt for prompt in demo.PROMPTS if " next to " not in prompt]
SCENES = [
    "grass next to gravel",
    "sand next to water",
    "brick next to lava",
    "clouds next to purple nebula",
    "wood next to leaves",
    "snow next to gravel",
    "white marble next to grass",
    "stars next to water",
]
PROMPTS = MATERIALS + SCENES  # picture i has prompt i modulo their number, and seed i
SIZES = ((256, 256), (512, 128), (128, 512), (320, 208))  # width, height; the last is no multiple of the window
FEWER = SIZES[:2]
SCENE_SIZES = ((256, 256), (384, 384))
BATCH = 16  # windows in one network call


class Method(NamedTuple):
    """bridge: of minimum coverage, or stride: of overlapping windows; few: sizes of which four pictures must do."""

    bridge: str = "none"
    stride: int | None = None
    sizes: tuple = SIZES
    few: tuple = ()
    pictures: tuple = tuple(range(len(MATERIALS)))


TWICE = tuple(i + seed for seed in (0, len(PROMPTS)) for i in range(len(MATERIALS)))
PAIRS = tuple(range(len(MATERIALS), len(PROMPTS)))
METHODS = {
    "none": Method(),
    "shift": Method("shift", pictures=TWICE),
    "economy": Method("economy", pictures=TWICE),
    "centred": Method("centred"),
    "moments": Method("moments", sizes=FEWER),
    "shift+moments": Method("shift+moments", sizes=FEWER),
    "MultiDiffusion, stride 1/2": Method(stride=WINDOW // 2, sizes=FEWER),
    "MultiDiffusion, stride 1/8": Method(stride=WINDOW // 8, sizes=SIZES[:3], few=SIZES[:1]),
    "scenes, shift": Method("shift", sizes=SCENE_SIZES, pictures=PAIRS),
    "scenes, shift+dilated": Method("shift+dilated", sizes=SCENE_SIZES, pictures=PAIRS),
}
SCENE_METHODS = [name for name in METHODS if name.startswith("scenes")]


class Model:
    """The embedded model: a denoiser of windows for a list of prompts, and the decoder."""

    def __init__(self, dtype: torch.dtype):
        from diffusers import StableDiffusionPipeline

        pipe = StableDiffusionPipeline.from_pretrained(demo.folder(), safety_checker=None)
        self.scheduler, self.vae = pipe.scheduler, pipe.vae
        self.unet, self.dtype = pipe.unet.to(dtype), dtype
        self.prompts, self.empty = (
            torch.cat([self._encode(pipe, prompt) for prompt in prompts]).to(dtype) for prompts in (PROMPTS, [""])
        )

    @staticmethod
    @torch.no_grad()
    def _encode(pipe, prompt):
        length = pipe.tokenizer.model_max_length
        ids = pipe.tokenizer(prompt, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        return pipe.text_encoder(ids.input_ids)[0]

    @torch.no_grad()
    def paint(self, chosen: list[int], width: int, height: int, method: Method) -> np.ndarray:
        """(n, height, width, 3) uint8, the chosen pictures."""
        rows, columns = -(-height // CELL), -(-width // CELL)
        if method.stride:
            plan = WindowPlan.strided(rows, columns, WINDOW, method.stride)
        else:
            plan = WindowPlan.minimum_coverage(rows, columns, WINDOW)
        noise = [torch.randn(1, 4, rows, columns, generator=torch.Generator().manual_seed(i)) for i in chosen]
        prompts = self.prompts[[i % len(PROMPTS) for i in chosen]]

        def denoiser(windows, timestep, context):
            n, windows = len(windows), windows.to(self.dtype)
            text = torch.cat([prompts[context.rows[:, 0]], self.empty.expand(n, -1, -1)])
            return self.unet(torch.cat([windows, windows]), timestep, text).sample.float().split(n)

        latents = sample(
            denoiser,
            torch.cat(noise),
            plan,
            self.scheduler,
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            window_batch_size=BATCH,
            bridging=method.bridge,
        )
        images = self.vae.decode(latents / self.vae.config.scaling_factor).sample
        images = ((images.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1)
        return images.numpy()[:, :height, :width]


def file_of(out: Path, name: str, width: int, height: int, i: int) -> Path:
    folder = name.replace("MultiDiffusion, stride 1/", "stride-").replace(", ", "-").replace("+", "-")
    return out / folder / f"{width}x{height}-{i:02d}-{PROMPTS[i % len(PROMPTS)].replace(' ', '-')}.png"


def pictures_of(name: str):
    """(width, height, index) of a method's pictures."""
    method = METHODS[name]
    return [(*size, i) for size in method.sizes for i in method.pictures[: 4 if size in method.few else None]]


def paint_missing(out: Path, names, dtype) -> None:
    missing = {name: [p for p in pictures_of(name) if not file_of(out, name, *p).exists()] for name in names}
    if not any(missing.values()):
        return
    model = Model(dtype)
    for name, wanted in missing.items():
        for width, height in METHODS[name].sizes:
            chosen = [i for w, h, i in wanted if (w, h) == (width, height)]
            for part in (chosen[i : i + 4] for i in range(0, len(chosen), 4)):
                for i, image in zip(part, model.paint(part, width, height, METHODS[name])):
                    path = file_of(out, name, width, height, i)
                    path.parent.mkdir(parents=True, exist_ok=True)
                    with whole_file(path) as temporary:
                        Image.fromarray(image).save(temporary)
                print(name, width, height, part, flush=True)


def evaluation_ratio(name: str, pictures) -> float:
    """Windows evaluated over those of minimum coverage without re-use, for these pictures together."""
    method, spent, least = METHODS[name], 0, 0
    for width, height, _ in pictures:
        cells = -(-height // CELL), -(-width // CELL)
        plan = WindowPlan.minimum_coverage(*cells, WINDOW)
        least += STEPS * plan.count
        if method.stride:
            spent += STEPS * WindowPlan.strided(*cells, WINDOW, method.stride).count
        else:
            spent += bridging.evaluations(method.bridge, plan, STEPS)
    return spent / least


def real_divergence(count: int = 8) -> float:
    """Divergence of the training pictures, 256 x 256 px of each: 2 x 2 windows."""
    from instantas.demo.materials import render

    pictures = [render(material, i).image[:256, :256] / 255 for material in demo.MATERIALS for i in range(count)]
    return float(np.mean([window_divergence(picture, WINDOW * CELL) for picture in pictures]))


def seams(pictures: list[np.ndarray], axis: int, moved: int = 0) -> tuple[list[float], list[float]]:
    """Seam ratios, and weights: at the borders of the minimum cover, or, as a check, `moved` pixels from them."""
    ratios, weights = [], []
    for picture in pictures:
        borders = window_borders(picture.shape[axis], WINDOW * CELL) + moved
        borders = borders[borders < picture.shape[axis] - 2 * CELL]
        if len(borders):
            ratios.append(seam_ratio(picture, borders, axis))
            weights.append(1 / seam_scatter(picture, borders, axis))
    return ratios, weights


def seam_cell(ratios: list[float], weights: list[float] | None = None) -> str:
    low, high = bootstrap(ratios, weights)
    return f"{np.average(ratios, weights=weights):.2f} ({low:.2f} to {high:.2f})"


def row(out: Path, name: str, base: str, chosen, real: float) -> list[str]:
    """The measures of a method on the chosen pictures, as cells of the table; base: whose gradients are the unit."""
    window = WINDOW * CELL
    pictures = [load_picture(file_of(out, name, *p)) for p in chosen]
    plain = [load_picture(file_of(out, base, *p)) for p in chosen]
    cells = [name, str(len(pictures)), f"{evaluation_ratio(name, chosen):.2f}"]
    columns, rows = seams(pictures, 1), seams(pictures, 0)
    cells += [seam_cell(columns[0]), seam_cell(rows[0]), seam_cell(columns[0] + rows[0], columns[1] + rows[1])]
    whole = [k for k, p in enumerate(pictures) if not (p.shape[0] % window or p.shape[1] % window)]
    gradient = [np.mean([window_gradient_energy(group[k], window) for k in whole]) for group in (pictures, plain)]
    edges = [edge_distance(p, axis, window) for p in pictures for axis in (0, 1) if p.shape[axis] > window]
    divergence = np.mean([window_divergence(p, window) for p in pictures])
    cells += [f"{divergence / real:.3f}", f"{gradient[0] / gradient[1]:.3f}"]
    return [*cells, f"{np.mean([repetition(p, window) for p in pictures]):.3f}", f"{np.mean(edges):.2f}"]


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


def report(out: Path, dtype) -> str:
    """The tables, in Markdown."""
    real = real_divergence()
    tables = []
    for title, name in (
        ("Two seeds of each prompt (gradient: over that of shift)", "shift"),
        ("One seed of each prompt", "none"),
        ("Square and wide pictures", "moments"),
        ("The pictures that MultiDiffusion painted at stride 1/8", "MultiDiffusion, stride 1/8"),
        ("Scenes of two materials (gradient: over that of shift)", SCENE_METHODS[0]),
    ):
        shown = [other for other in METHODS if set(pictures_of(name)) <= set(pictures_of(other))]
        tables.append((title, shown, pictures_of(name)))
    lines = [
        "# Bridges, measured",
        "",
        f"Embedded model, DDIM, {STEPS} steps, guidance {GUIDANCE}, network in {str(dtype).removeprefix('torch.')},",
        f"{len(MATERIALS)} prompts, a seed for each, the same for every method. Native window 128 px, pictures of",
        ", ".join(f"{w}x{h}" for w, h in SIZES) + f" px; {len(SCENES)} prompts for the scenes.",
        "",
        "Made by `python bench/bridging.py`; measures are defined in `bench/quality.py`. Brackets: 95% of bootstrap",
        "resamples over pictures. Weighted: by one over the scatter of each ratio, so that bricks and planks",
        "count less. Evaluations: over those of minimum coverage. Divergence: over that of real pictures",
        f"({real:.3f}). Gradient: energy inside windows over that of the same noise in single native windows. Edges:",
        "difference of opposite outer edges over that of unrelated lines; far below 1 when glued.",
    ]
    for title, methods, chosen in tables:
        lines += ["", f"## {title}", "", "| " + " | ".join(HEAD) + " |", "|" + "---|" * len(HEAD)]
        lines += ["| " + " | ".join(row(out, name, methods[0], chosen, real)) + " |" for name in methods]
    shift = [load_picture(file_of(out, "shift", *p)) for p in pictures_of("shift")]
    lines += [
        "",
        "How far the ratio scatters where no window rests: `shift`, all its pictures, with the borders moved.",
        "",
    ]
    lines += ["| moved by | columns | rows | both, weighted |", "|---|---|---|---|"]
    for moved in (0, -56, -40, -24, 24, 40, 56):
        columns, rows = seams(shift, 1, moved), seams(shift, 0, moved)
        cells = seam_cell(columns[0]), seam_cell(rows[0]), seam_cell(columns[0] + rows[0], columns[1] + rows[1])
        lines.append(f"| {moved} px | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def sheet(out: Path, size: tuple[int, int], prompts: list[str], names, path: Path) -> None:
    """Side by side: a row for each method, a column for each prompt."""
    width, height = size
    tiles = [[Image.open(file_of(out, n, width, height, PROMPTS.index(p))) for p in prompts] for n in names]
    image = Image.new("RGB", (len(prompts) * (width + 4) - 4, len(names) * (height + 4) - 4), "white")
    for y, line in enumerate(tiles):
        for x, tile in enumerate(line):
            image.paste(tile, (x * (width + 4), y * (height + 4)))
    with whole_file(path) as temporary:
        image.save(temporary, quality=88)


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
        strided = [name for name in METHODS if METHODS[name].stride]
        shown = ["none", "centred", "economy", "shift", *strided]
        wide = ["red brick wall", "sunset clouds", "dark wooden planks"]
        sheet(options.out, SIZES[1], wide, shown, options.sheets / "bridging-wide.jpg")
        square = ["purple nebula", "red desert sand", "snow", "red brick wall"]
        sheet(options.out, SIZES[0], square, ["none", "economy", "shift"], options.sheets / "bridging-square.jpg")
        chosen = [SCENES[i] for i in (0, 4, 5, 6)]
        sheet(options.out, SCENE_SIZES[0], chosen, SCENE_METHODS, options.sheets / "bridging-scenes.jpg")
    return 0


if __name__ == "__main__":
    sys.exit(main())

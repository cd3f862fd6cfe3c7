"""Regional control beside MultiDiffusion's region mode: pictures, region fidelity, borders; and what regions cost.

    python -m bench.regions --sheet    # embedded model; about seven minutes of one core
    python -m bench.regions --speed    # architecture of Stable Diffusion 2.0, random weights, bfloat16, one thread

Figures go to bench/results/regions-cpu.json, pictures to docs/pictures, and the tables of both to
bench/results/regions.md. A picture of the sheet that is in the folder `--out` is not painted again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from scipy import ndimage

from instantas import demo
from instantas.bench.measure import keep
from instantas.files import whole_file
from instantas.pipelines.pipeline import InstantASPipeline
from instantas.regions import Region, RegionMap

ROOT = Path(__file__).parent
RESULTS, PICTURES = ROOT / "results" / "regions-cpu.json", ROOT.parent / "docs" / "pictures"
METHODS = ("instantas", "multidiffusion")
STRIDE = 4  # cells, of MultiDiffusion on the embedded model: a quarter of its window
CROP, GRID = 128, 16  # pixels: the judge's crops, and how far apart they are taken
NEAR, FAR = 8, 24  # pixels from a border: the band about it, and where the interior begins
WIDE = ("red brick wall", "turquoise ocean", "lava", "snow")
MATERIAL = {  # what a prompt shows, by the judge's name
    "red brick wall": "brick",
    "turquoise ocean": "water",
    "lava": "lava",
    "snow": "snow",
    "grass": "grass",
    "night sky": "stars",
    "red desert sand": "sand",
    "autumn leaves": "leaves",
    "dark wooden planks": "wood",
    "purple nebula": "nebula",
    "sunset clouds": "clouds",
}


def disc(width, height, x, y, radius):
    rows, columns = np.mgrid[:height, :width]
    return ((columns - x) ** 2 + (rows - y) ** 2 < radius**2).astype(np.float32)


def boxes(prompts, columns, rows):
    places = [(x / columns, y / rows, (x + 1) / columns, (y + 1) / rows) for y in range(rows) for x in range(columns)]
    return [Region(prompt, box=place) for prompt, place in zip(prompts, places)]


SCENES = {  # name -> (width, height), base prompt, regions
    "four quarters side by side": ((512, 128), "", boxes(WIDE, 4, 1)),
    "four corners": ((256, 256), "", boxes(("grass", "night sky", "red desert sand", "autumn leaves"), 2, 2)),
    "disc": ((384, 256), "dark wooden planks", [Region("purple nebula", mask=disc(384, 256, 112, 128, 96))]),
    "soft halves": (
        (256, 256),
        "",
        [Region(p, box=b.box, feather=32) for p, b in zip(("sunset clouds", "turquoise ocean"), boxes("ab", 1, 2))],
    ),
}


# Measures


def labels(size, base, regions) -> tuple[np.ndarray, list[str]]:
    """(height, width) index of the prompt with the largest share of each pixel, and the prompts."""
    shares = RegionMap(regions, size[1], size[0], cell=1).shares()[0]
    return shares.argmax(0).numpy(), [base, *(region.prompt for region in regions)]


def crops(picture, owner):
    """(crop, index of its prompt) of every crop on the grid that lies within one region."""
    height, width = owner.shape
    for y in range(0, height - CROP + 1, GRID):
        for x in range(0, width - CROP + 1, GRID):
            inside = owner[y : y + CROP, x : x + CROP]
            if (inside == inside[0, 0]).all():
                yield picture[y : y + CROP, x : x + CROP], int(inside[0, 0])


def borders(picture, owner) -> tuple[float, float]:
    """Mean gradient of the luminance on the border of regions, and in a band about it, over that of the interior.

    On the border above 1: a hard edge; in the band far below 1: a strip without content.
    """
    gradient = np.hypot(*np.gradient(np.asarray(Image.fromarray(picture).convert("L"), dtype=np.float64)))
    edge = np.zeros(owner.shape, dtype=bool)
    for axis in (0, 1):
        change = np.diff(owner, axis=axis) != 0
        for side in ((1, 0), (0, 1)):  # both pixels of the pair
            edge |= np.pad(change, [side if i == axis else (0, 0) for i in (0, 1)])
    distance = ndimage.distance_transform_edt(~edge)
    interior = gradient[distance > FAR].mean()
    return gradient[distance == 0].mean() / interior, gradient[distance <= NEAR].mean() / interior


# The sheet


def paint(pipe, scene, method, seed, path) -> None:
    """Paint a PNG file, which also says on how many samples the network was evaluated."""
    (width, height), base, regions = SCENES[scene]
    samples, text = [], PngInfo()
    hook = pipe.unet.register_forward_pre_hook(lambda module, args: samples.append(len(args[0])))
    picture = pipe(
        base,
        height=height,
        width=width,
        regions=regions,
        method=method,
        stride=STRIDE if method == "multidiffusion" else None,
        start="none",
        window_batch_size=16,
        generator=torch.Generator().manual_seed(seed),
    ).images[0]
    hook.remove()
    text.add_text("samples", str(sum(samples)))
    with whole_file(path) as part:
        picture.save(part, format="PNG", pnginfo=text)


def sheet(seeds: int, out: Path) -> dict:
    """Paint what is missing of every scene by both methods; the measures of each, and the contact sheets."""
    from instantas.demo.judge import Judge

    out.mkdir(parents=True, exist_ok=True)
    pipe = InstantASPipeline.from_pretrained(demo.folder(), torch_dtype=torch.bfloat16)
    pipe.vae.float()
    pipe.set_progress_bar_config(disable=True)
    judge, found, shown = Judge.train(), {}, {}
    for scene, (size, base, regions) in SCENES.items():
        owner, prompts = labels(size, base, regions)
        for method in METHODS:
            right, edges, samples = [], [], 0
            for seed in range(seeds):
                path = out / f"{scene.replace(' ', '-')}-{method}-{seed}.png"
                if not path.exists():
                    paint(pipe, scene, method, seed, path)
                with Image.open(path) as image:
                    samples, picture = int(image.text["samples"]), np.asarray(image.convert("RGB"))
                shown[scene, method, seed] = picture
                pieces, wanted = zip(*crops(picture, owner))
                seen = judge.classify(pieces)
                right += [name == MATERIAL[prompts[index]] for name, index in zip(seen, wanted)]
                edges.append(borders(picture, owner))
            border, band = np.mean(edges, axis=0)
            name = f"{scene}, {method}"
            found[name] = dict(scene=scene, method=method, pictures=seeds, samples=samples, crops=len(right))
            found[name] |= dict(fidelity=float(np.mean(right)), border=float(border), band=float(band))
            print(name, {k: v for k, v in found[name].items() if k not in ("scene", "method")}, flush=True)
    _save(stack([shown["four quarters side by side", "instantas", s] for s in range(seeds)], 0), "regions-wide.jpg")
    rows = [[outline(scene), *(shown[scene, method, 0] for method in METHODS)] for scene in SCENES]
    columns = [stack([row[i] for row in rows], 0) for i in range(3)]
    _save(stack(columns, 1), "regions-sheet.jpg")
    return found


def outline(scene) -> np.ndarray:
    """The layout: a colour for each prompt."""
    from matplotlib import colormaps

    size, base, regions = SCENES[scene]
    shares = RegionMap(regions, size[1], size[0], cell=1).shares()[0].numpy()
    colours = np.array([(0.85, 0.85, 0.85), *(colormaps["tab10"](i)[:3] for i in range(len(regions)))])
    return (255 * np.einsum("rhw,rc->hwc", shares / shares.sum(0), colours)).astype(np.uint8)


def stack(tiles, axis, gap=6) -> np.ndarray:
    """Tiles in a column (axis 0) or a row, on white."""
    longest = max(tile.shape[1 - axis] for tile in tiles)
    padded = []
    for tile in tiles:
        pad = [[0, 0], [0, 0], [0, 0]]
        pad[axis][1], pad[1 - axis][1] = gap, longest - tile.shape[1 - axis]
        padded.append(np.pad(tile, pad, constant_values=255))
    return np.concatenate(padded, axis)


def _save(picture, name) -> None:
    with whole_file(PICTURES / name) as part:
        Image.fromarray(picture).save(part, format="JPEG", quality=85)


# Speed


def stripes(n):
    return [Region(f"prompt {i}", box=(i / n, 0.0, (i + 1) / n, 1.0)) for i in range(n)]


def speed(laps: int) -> dict:
    """Processor seconds on one thread, which other processes take little from; ratios of neighbours in time."""
    from bench.end_to_end import SD2, model
    from instantas.pipelines.attention import regional_prompts

    torch.set_num_threads(1)
    whole = model(SD2, dtype=torch.bfloat16)
    pipe, found = whole.pipe, {}
    sample, text = whole.noise(64, 64).repeat(2, 1, 1, 1), torch.cat([whole.negative, whole.embeds])

    def seconds(run):
        start = time.process_time()
        run()
        return time.process_time() - start

    def evaluate():
        return pipe.unet(sample, 1, encoder_hidden_states=text).sample

    with torch.no_grad():
        plain = evaluate()
        with regional_prompts(pipe.unet, [], pipe=pipe, classifier_free_guidance=True):
            difference = float((evaluate() - plain).float().norm() / plain.float().norm())
        assert difference < 0.05, f"regions change the plain network by {difference:.3g}: no speed given"
        times = {n: [] for n in (0, 1, 4, 16)}
        for lap in range(laps):
            order = list(times)[lap % 4 :] + list(times)[: lap % 4]
            for n in order:
                if n == 0:
                    times[n].append(seconds(evaluate))
                    continue
                with regional_prompts(pipe.unet, stripes(n), pipe=pipe, classifier_free_guidance=True) as prompts:
                    first = (sample, 1), dict(encoder_hidden_states=text)
                    projecting = seconds(lambda p=prompts, f=first: p.prepare(*f))  # once a run
                    times[n].append(seconds(evaluate))
        for n in (1, 4, 16):
            ratios = [a / b for a, b in zip(times[n], times[0])]
            found[f"evaluation, {n} regions"] = dict(
                regions=n, laps=laps, plain=times[0], seconds=times[n], ratio=statistics.median(ratios)
            )
            print(n, times[n], ratios, flush=True)
        print("projecting 16 regions", projecting)
        found["evaluation, 16 regions"]["projecting"] = projecting

        ours = InstantASPipeline.from_pipe(pipe)
        call = dict(prompt_embeds=whole.embeds, negative_prompt_embeds=whole.negative, num_inference_steps=1)
        call |= dict(output_type="latent", guidance_scale=7.5, height=512)
        regions = stripes(4)[1:]  # three, and the base prompt in the first quarter
        for name, width, options in (
            ("instantas", 2048, {}),
            ("multidiffusion", 1024, dict(method="multidiffusion", stride=64)),  # two of its 25 windows
        ):
            batches = []
            hook = pipe.unet.register_forward_pre_hook(lambda m, args, seen=batches: seen.append(len(args[0])))
            taken = seconds(lambda w=width, o=options: ours(**call, width=w, regions=regions, **o))
            hook.remove()
            found[f"step, {name}"] = dict(samples=sum(batches), seconds=taken)
            print(name, found[f"step, {name}"], flush=True)
        windows = ours.plan(512, 2048, method="multidiffusion", stride=8).count
        needed = 2 * windows * 4
        theirs = found["step, multidiffusion"]
        theirs |= dict(whole=needed, whole_seconds=theirs["seconds"] / theirs["samples"] * needed)
        found["step, instantas"]["ratio"] = theirs["whole_seconds"] / found["step, instantas"]["seconds"]
        print("ratio", found["step, instantas"]["ratio"])
    return found


# The tables


def report() -> str:
    """Tables of what is known so far, in Markdown."""
    known = json.loads(RESULTS.read_text())
    lines = ["# Regions, measured", "", "Made by `python -m bench.regions --sheet --speed`."]
    painted = [r for r in known.values() if "fidelity" in r]
    if painted:
        lines += [
            "",
            "## Regional control beside MultiDiffusion's region mode",
            "",
            f"Embedded model, its own defaults. Pictures of each scene: {painted[0]['pictures']}, of the same seeds.",
            f"MultiDiffusion at a stride of a quarter of the window. Fidelity: share of {CROP} px crops inside one",
            "region that the classifier (`instantas.demo.judge`) gives to its prompt. Border: gradient on the regions'",
            f"border over that of the interior (more than {FAR} px away); band: the same within {NEAR} px. Above 1: a",
            "hard edge; far below 1: a strip without content. Samples: network samples of a picture.",
            "",
            "| scene | method | fidelity | crops | border | band | samples |",
            "|---|---|---:|---:|---:|---:|---:|",
        ]
        lines += [
            f"| {r['scene']} | {r['method']} | {r['fidelity']:.2f} | {r['crops']} | {r['border']:.2f} | "
            f"{r['band']:.2f} | {r['samples']} |"
            for r in painted
        ]
    if "step, instantas" in known:
        ours, theirs = known["step, instantas"], known["step, multidiffusion"]
        lines += [
            "",
            "## What regions cost",
            "",
            f"Architecture of SD 2.0, random weights, bfloat16, {ours['machine']['device']}, processor seconds. One",
            "evaluation of a batch of two at 512x512 px, over the plain network's in the same lap (median):",
            "",
            "| regions | ratio | laps | each lap |",
            "|---:|---:|---:|---|",
        ]
        for n in (1, 4, 16):
            r = known[f"evaluation, {n} regions"]
            each = ", ".join(f"{a / b:.3f}" for a, b in zip(r["seconds"], r["plain"]))
            lines.append(f"| {n} | {r['ratio']:.3f} | {r['laps']} | {each} |")
        lines += [
            "",
            "Keys and values of 16 regions are projected once a run: "
            f"{known['evaluation, 16 regions']['projecting']:.2f} s.",
            "",
            f"One step of 512x2048 px with four prompts: {ours['samples']} samples, {ours['seconds']:.1f} s.",
            f"MultiDiffusion's region mode at stride 8 needs {theirs['whole']}, each prompt in each of its 25 windows;",
            f"measured in two windows ({theirs['samples']} samples, {theirs['seconds']:.1f} s) and scaled: "
            f"{theirs['whole_seconds']:.0f} s, **{ours['ratio']:.1f} times** as long.",
        ]
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sheet", action="store_true", help="paint and measure pictures")
    parser.add_argument("--seeds", type=int, default=3, help="of the sheet")
    parser.add_argument("--out", type=Path, default=Path("out/regions"), help="folder of the sheet's pictures")
    parser.add_argument("--speed", action="store_true", help="time evaluations and steps")
    parser.add_argument("--laps", type=int, default=3, help="of the evaluations")
    options = parser.parse_args()
    if options.sheet:
        keep(RESULTS, sheet(options.seeds, options.out))
    if options.speed:
        keep(RESULTS, speed(options.laps))
    if RESULTS.exists():
        with whole_file(RESULTS.with_name("regions.md")) as part:
            part.write_text(report())
        print(report())


if __name__ == "__main__":
    main()

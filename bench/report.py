"""Tables and plots of all results that are there.

    python -m bench.report

reads bench/results/*.json, which the benchmarks write, and writes bench/results/report.md and its plots.
"""

from __future__ import annotations

import json
from pathlib import Path

from matplotlib.figure import Figure

from instantas.files import whole_file
from instantas.plots import save_figure

RESULTS = Path(__file__).parent / "results"
DEVICES = {"cpu": "CPU", "cuda": "GPU"}
COMMANDS = {
    "operations": "python -m bench.operations",
    "scaling": "python -m bench.scaling",
    "end-to-end": "python -m bench.end_to_end",
    "modes": "python -m bench.modes",
}


def load(stem: str) -> dict:
    path = RESULTS / f"{stem}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def table(heads, rows) -> str:
    """A Markdown table; the first column to the left, numbers to the right."""
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def origin(results: dict, stem: str) -> str:
    """The command, and every machine that the results are of."""
    seen = {}
    for result in results.values():
        facts = dict(result["machine"])
        date = facts.pop("date")
        seen.setdefault(", ".join(f"{k} {v}" for k, v in facts.items() if k != "threads"), []).append(date)
    machines = [f"{facts} ({min(dates)} to {max(dates)})" for facts, dates in seen.items()]
    one = next(iter(results.values()))
    command = COMMANDS[stem] + (" --processor" if one.get("clock") == "process_time" else "")
    if stem == "operations" and one["machine"]["threads"] == 1:
        command = f"OMP_NUM_THREADS=1 {command}"
    return f"`{command}`. " + "; ".join(machines) + "."


def operations(results: dict) -> str:
    """One row for each comparison."""
    rows = []
    for r in results.values():
        ours, *others = r["timings"]
        rivals = sorted((t for t in others if not t["name"].startswith("instantas")), key=lambda t: t["ratio"])
        rows.append(
            [
                f"{r['title']}, {r['dtype']}",
                ours["name"].removeprefix("instantas "),
                f"{1e3 * ours['median']:.3g}",
                f"{1e3 * ours['low']:.3g} - {1e3 * ours['high']:.3g}",
                f"{ours['share']:.0%}",
                ", ".join(f"{t['name']} **{t['ratio']:.2f}**" for t in rivals),
            ]
        )
    return table(["operation", "backend", "ms", "quartiles", "of the roofline", "times as long"], rows)


def plot_operations(results: dict, path: Path) -> None:
    """The share of the roofline that each contender reaches."""
    figure = Figure(figsize=(11, 1.5 + 0.26 * len(results)))
    axes = figure.subplots()
    for row, r in enumerate(results.values()):
        ours, *others = r["timings"]
        rivals = [t["share"] for t in others if not t["name"].startswith("instantas")]
        axes.plot(rivals, [row] * len(rivals), "o", color="0.6", markersize=4, label="rivals" if row == 0 else None)
        axes.plot(ours["share"], row, "D", color="C0", markersize=6, label="instantas" if row == 0 else None)
    axes.axvline(1, color="k", linewidth=0.8)
    axes.set(xscale="log", xlabel="share of the roofline: copies and matrix products measured in the same laps")
    axes.set_yticks(range(len(results)), [f"{r['title']}, {r['dtype']}" for r in results.values()], fontsize=7)
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    axes.legend(loc="lower left")
    save_figure(figure, path)


def scaling(results: dict) -> str:
    parts = []
    for name, study in results.items():
        points = study["points"]
        columns = {study["x"]: lambda p: p["x"], "ms": lambda p: f"{1e3 * p['seconds']:.4g}"}
        if name == "area":
            columns["ms / window"] = lambda p: f"{1e3 * p['seconds'] / p['x']:.3g}"
        if "peak" in points[0]:
            columns["peak MiB"] = lambda p: f"{p['peak'] / 2**20:.0f}"
        rows = [[cell(p) for cell in columns.values()] for p in points]
        note = ""
        if "exponent" in study:
            note = (
                f"\n\nTime grows with the {study['exponent']:.3f}th power of the area from 16 windows on, peak memory "
                f"by {study['peak_canvases']:.1f} times the canvas."
            )
        parts.append(f"### {name}\n\n{table(list(columns), rows)}{note}")
    return "\n\n".join(parts)


def plot_scaling(results: dict, path: Path) -> None:
    figure = Figure(figsize=(11, 8))
    for axes, (name, study) in zip(figure.subplots(2, 2).flat, results.items()):
        xs, ys = zip(*((p["x"], 1e3 * p["seconds"]) for p in study["points"]))
        axes.plot(xs, ys, "o-", label="measured")
        if name == "area":
            axes.plot(xs, [x * ys[-1] / xs[-1] for x in xs], "k:", label="straight line through the origin")
            other = axes.twinx()
            other.plot(xs, [p["peak"] / 2**20 for p in study["points"]], "s--", color="C1")
            other.set(yscale="log", ylabel="peak memory, MiB (squares)")
            axes.legend()
        axes.set(xscale="log", xlabel=study["x"], ylabel="ms", title=name)
        axes.set(yscale="log") if name == "area" else axes.set(ylim=(0, 1.1 * max(ys)))
        axes.set_xticks(xs, xs, rotation=45 if len(xs) > 7 else 0)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    figure.tight_layout()
    save_figure(figure, path)


def runs(measured: dict, counted: dict) -> list[dict]:
    """One entry for each size, number of prompts and method, of two steps; seconds measured in whole, or scaled."""
    whole = {key: r for key, r in measured.items() if r["samples"] == counted.get(key)}
    rate = {}  # seconds of a sample of the network, by prompts and method, where most of them were measured
    for r in sorted(measured.values(), key=lambda r: r["samples"]):
        rate[r["prompts"], r["method"]] = r["seconds"] / r["samples"]
    for prompts in (1, 4):
        panorama = rate.get((prompts, "diffusers panorama"))
        rate.setdefault((prompts, "MultiDiffusion"), panorama)  # the same work, as the tests show
    entries = []
    for key, samples in counted.items():
        if key == "machine":
            continue
        size, prompts, method = key.split(", ", 2)
        of_sample = rate.get((int(prompts.split()[0]), method))
        seconds = whole[key]["seconds"] if key in whole else of_sample and of_sample * samples
        entries.append(
            dict(size=size, prompts=prompts, method=method, samples=samples, seconds=seconds, run=whole.get(key))
        )
    return entries


def _plural(prompts):
    return "1 prompt" if prompts == "1 prompts" else prompts


def end_to_end(entries: list[dict]) -> str:
    ours = {(e["size"], e["prompts"]): e for e in entries if e["method"] == "instantas"}
    rows = []
    for e in entries:
        base, run = ours[e["size"], e["prompts"]], e["run"] or {}
        slower = e["seconds"] and base["seconds"] and e["seconds"] / base["seconds"]
        measured = bool(run) and bool(base["run"])
        rows.append(
            [
                f"{e['size']}, {_plural(e['prompts'])}, {e['method']}",
                e["samples"],
                f"{e['samples'] / base['samples']:.2f}",
                "-" if e["seconds"] is None else f"{e['seconds']:.1f}" if run else f"({e['seconds']:.0f})",
                "-" if not slower else f"**{slower:.2f}**" if measured else f"({slower:.1f})",
                f"{run['overhead']:.3f}" if "overhead" in run else "",
                f"{run['seconds'] / run['network']:.3f}" if run else "",
                f"{run['peak'] / 2**20:.0f}" if run else "",
            ]
        )
    heads = [
        "height x width, prompts, method",
        "samples",
        "x instantas",
        "seconds",
        "x instantas",
        "/ bare network",
        "/ its network calls",
        "peak MiB",
    ]
    return table(heads, rows)


def modes(results: dict) -> str:
    """One row for each run: eager, with the network compiled, in CUDA graphs."""
    ours = {
        (r["size"], r["mode"]): r["seconds"]
        for r in results.values()
        if r["method"] == "instantas" and r["prompts"] == 1
    }
    rows = [
        [
            f"{r['size']}, {_plural(str(r['prompts']) + ' prompts')}, {r['method']}, {r['mode']}",
            r["samples"],
            f"{r['seconds']:.2f}",
            f"**{r['seconds'] / ours[r['size'], r['mode']]:.2f}**" if (r["size"], r["mode"]) in ours else "-",
            f"{r['overhead']:.3f}",
            f"{r['peak'] / 2**20:.0f}",
        ]
        for r in results.values()
    ]
    return table(
        ["height x width, prompts, method, mode", "samples", "seconds", "x instantas", "/ bare network", "peak MiB"],
        rows,
    )


def plot_end_to_end(entries: list[dict], path: Path) -> None:
    """Samples of the network by size, counted; a panel for each number of prompts."""
    figure = Figure(figsize=(11, 8))
    colours = {method: f"C{i}" for i, method in enumerate(dict.fromkeys(e["method"] for e in entries))}
    for axes, prompts in zip(figure.subplots(2, 1), ("1 prompts", "4 prompts")):
        some = [e for e in entries if e["prompts"] == prompts]
        sizes = list(dict.fromkeys(e["size"] for e in some))
        methods = [m for m in colours if any(e["method"] == m for e in some)]
        for i, method in enumerate(methods):
            chosen = [e for e in some if e["method"] == method]
            places = [sizes.index(e["size"]) + 0.8 * (i + 0.5) / len(methods) - 0.4 for e in chosen]
            bars = axes.bar(
                places, [e["samples"] for e in chosen], 0.75 / len(methods), color=colours[method], label=method
            )
            axes.bar_label(bars, fontsize=7)
        axes.set(yscale="log", ylabel="network samples in 2 steps", title=f"{_plural(prompts)}, counted")
        axes.set_xticks(range(len(sizes)), sizes)
        axes.legend(fontsize=8)
    figure.tight_layout()
    save_figure(figure, path)


def report() -> str:
    parts = ["# Benchmarks\n\nWritten by `python -m bench.report` from the results beside this file."]
    counted = load("samples").get("two steps", {})
    for device, name in DEVICES.items():
        found = {stem: load(f"{stem}-{device}") for stem in COMMANDS}
        if not any(found.values()):
            parts.append(f"# {name}\n\nNot measured.")
            continue
        parts.append(f"# {name}")
        if found["end-to-end"]:
            entries = runs(found["end-to-end"], counted)
            plot_end_to_end(entries, RESULTS / "end-to-end.png")
            first = next(iter(found["end-to-end"].values()))
            clock = "seconds of one processor" if first["clock"] == "process_time" else "seconds of the clock"
            parts.append(
                "## Whole runs\n\n"
                f"{origin(found['end-to-end'], 'end-to-end')} Samples: `python -m bench.end_to_end --counts`.\n\n"
                f"Architecture of SD 2.0, random weights, {first['dtype']}, DDIM, 2 steps, guidance 7.5, "
                f"{first['batch']} windows in one call, no text encoder, no autoencoder; {clock}. In brackets: not "
                "measured, but the samples counted times the method's measured seconds a sample (MultiDiffusion's with "
                "regions measured on 4 of 25 windows and 1 of 2 steps, its other figures are the panorama pipeline's). "
                "MultiDiffusion's region mode evaluates the base prompt and four regions.\n\n"
                f"{end_to_end(entries)}\n\n![samples](end-to-end.png)"
            )
        if found["modes"]:
            first = next(iter(found["modes"].values()))
            parts.append(
                f"## Eager, compiled, in CUDA graphs\n\n{origin(found['modes'], 'modes')}\n\nArchitecture of SD 2.0, "
                f"random weights, {first['dtype']}, DDIM, {first['steps']} steps, guidance 7.5, {first['batch']} "
                f"windows in one call, no text encoder, no autoencoder. The bare network is timed in the same mode.\n\n"
                f"{modes(found['modes'])}"
            )
        if peaks := load(f"memory-{device}"):
            rows = [
                [size, f"{p['peak'] / 2**20:.0f}", f"{p['canvas'] / 2**20:.2f}"]
                for size, p in peaks["4 and 64 windows"].items()
                if size != "machine"
            ]
            parts.append(
                "## Memory\n\n`python -m bench.end_to_end --memory`: one step, 4 windows in one call.\n\n"
                + table(["height x width", "peak MiB", "canvas MiB"], rows)
            )
        if found["scaling"]:
            plot_scaling(found["scaling"], RESULTS / f"scaling-{device}.png")
            parts.append(
                f"## Scaling\n\n{origin(found['scaling'], 'scaling')}\n\n{scaling(found['scaling'])}\n\n"
                f"![scaling](scaling-{device}.png)"
            )
        if found["operations"]:
            plot_operations(found["operations"], RESULTS / f"roofline-{device}.png")
            parts.append(
                f"## Operations\n\n{origin(found['operations'], 'operations')} Every result was checked against "
                f"float64 before. With a single thread, seconds of the processor.\n\n"
                f"{operations(found['operations'])}\n\n![roofline](roofline-{device}.png)"
            )
    return "\n\n".join(parts) + "\n"


def main():
    with whole_file(RESULTS / "report.md") as part:
        part.write_text(report(), encoding="utf-8")
    print(RESULTS / "report.md")


if __name__ == "__main__":
    main()

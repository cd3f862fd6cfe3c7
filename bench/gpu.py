"""Everything that needs a GPU, in one go of at most eight minutes.

    python -m bench.gpu

checks every operation on every backend against float64, asks compute-sanitizer where it is installed, measures the
speeds, and writes bench/results/gpu.json and gpu.md. Needs torch and triton; fails if a result is wrong, and not if a
speed falls short. Without a GPU it says so and fails.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from bench import gpu_checks
from instantas import ops
from instantas.bench import cases
from instantas.bench.measure import Comparison, DisagreementError, compare, machine
from instantas.files import whole_file
from instantas.windows import WindowPlan

RESULTS = Path(__file__).parent / "results"
SECONDS = 8 * 60
CHECKING = 4 * 60  # of these seconds, at most, for what is right
EXAMPLES = 20  # random ones of each operation
PROCESSES = 8
HARD = (1, 4, 16)  # regions


class Sizes(NamedTuple):
    """What is measured: a canvas of 64 MB in half precision, and the largest cross-attention layer of SD 2.0."""

    side: int = 1024
    channels: int = 16
    batch: int = 2
    windows: tuple[int, ...] = (8, 32)
    layer: dict[str, int] = dict(queries=4096, heads=5, depth=64, tokens=77)
    seconds: float = 2.0  # for each comparison
    compiled: bool = True


class Line(NamedTuple):
    """A speed that the design asks for."""

    what: str
    measured: float
    wanted: str
    met: bool


def comparisons(device: torch.device, sizes: Sizes) -> Iterator[tuple[str, Callable[[], Comparison]]]:
    """(key, comparison) of all that is measured, the most important first: time may run out."""
    layer = dict(device=device, dtype=torch.bfloat16, seconds=sizes.seconds, left_out=("reference",), **sizes.layer)
    for windows in sizes.windows:
        one, four = (dict(windows=windows, compiled=sizes.compiled and regions > 1, **layer) for regions in (1, 4))
        yield f"attention 1 {windows}", lambda o=one: cases.attention(1, **o)
        yield f"attention 4 {windows}", lambda o=four: cases.attention(4, **o)
        yield f"hard {windows}", lambda w=windows: _hard_regions(w, device, sizes)
    plan = WindowPlan.minimum_coverage(sizes.side, sizes.side)
    strided = WindowPlan.strided(sizes.side // 2, sizes.side // 2, 64, 32)
    for dtype in (torch.bfloat16, torch.float32):
        options = dict(channels=sizes.channels, batch=sizes.batch, device=device, dtype=dtype, seconds=sizes.seconds)
        options["left_out"] = ("reference",)
        yield f"gather {str(dtype)[6:]}", lambda o=options: cases.gather(plan, **o)
        yield f"scatter {str(dtype)[6:]}", lambda o=options: cases.scatter(plan, **o)
        yield f"step {str(dtype)[6:]}", lambda o=options: cases.step(plan, history=1, **o)
        weighted = options | dict(weight="gaussian", history=1)
        yield f"strided step {str(dtype)[6:]}", lambda o=weighted: cases.step(strided, **o)
    soft = layer | dict(soft=True, windows=sizes.windows[0])
    for mode in ("blend", "joint"):
        yield f"soft {mode}", lambda m=mode: cases.attention(4, mode=m, **soft)


def _hard_regions(windows, device, sizes):
    """The default backend with 1, 4 and 16 hard regions, in the same laps."""
    queries, heads, depth, tokens = (sizes.layer[name] for name in ("queries", "heads", "depth", "tokens"))
    calls, exact = {}, {}
    for regions in HARD:
        ids, weights = cases.stripes(regions, windows, queries, False, device)
        calls[f"R = {regions}"] = lambda q, k, v, i=ids, w=weights: ops.regional_attention(q, k, v, i, w)
        exact[f"R = {regions}"] = cases.exact_attention(ids, weights)
    size = torch.bfloat16.itemsize * heads * depth
    return compare(
        f"regional_attention, {windows} x {queries} queries, {heads} x {depth}, {tokens} tokens, by number of regions",
        cases.bank_inputs(max(HARD), windows, queries, heads, depth, tokens, device, torch.bfloat16),
        calls,
        exact,
        bytes=size * (2 * windows * queries + 2 * tokens) + 4 * windows * queries,
        flops=4 * windows * queries * heads * depth * tokens,
        seconds=sizes.seconds,
    )


def lines(found: dict[str, Comparison]) -> list[Line]:
    """The design's speeds, from the comparisons that were made."""
    result = []

    def at_least(what, value, wanted):
        result.append(Line(what, value, f">= {wanted:g}", value >= wanted))

    def at_most(what, value, wanted):
        result.append(Line(what, value, f"<= {wanted:g}", value <= wanted))

    for key, comparison in found.items():
        ours = comparison.timings[0]
        rivals = [t.name for t in comparison.timings if not t.name.startswith(("instantas", "R ="))]
        operation, *_, last = key.split()
        if operation in ("gather", "scatter", "step"):
            at_least(f"{operation}, {last}: share of copy bandwidth", comparison.share(ours.name), 0.9)
        if operation == "step":
            eager = [name for name in rivals if "compiled" not in name]
            at_least(f"step, {last}: times as fast as eager", comparison.best(eager).median / ours.median, 4)
        if operation == "attention":
            regions = int(key.split()[1])
            at_least(f"attention, R = {regions}, {last} windows: share of the floor", comparison.share(ours.name), 0.75)
            wanted = 1 if regions == 1 else 3
            best = comparison.best(rivals)
            what = f"attention, R = {regions}, {last} windows: times as fast as {best.name}"
            at_least(what, best.median / ours.median, wanted)
        if operation == "hard":
            for timing in comparison.timings[1:]:
                at_most(f"attention, {timing.name} / R = 1, {last} windows", timing.ratio, 1.15)
    return result


def measure(
    device: torch.device, sizes: Sizes, deadline: float, say: Callable[[str], object] = print
) -> tuple[dict[str, Comparison], dict[str, str]]:
    """The comparisons by key, and those that were not made, with the reason."""
    found, absent = {}, {}
    for key, run in comparisons(device, sizes):
        if time.time() > deadline:
            absent[key] = "not measured: out of time"
            continue
        try:
            found[key] = run()
            say("\n" + found[key].table())
        except (DisagreementError, RuntimeError) as error:  # also a device out of memory
            absent[key] = f"not measured: {error}".splitlines()[0]
            say(f"\n{key}: {absent[key]}")
    return found, absent


def report(checks: dict[str, str], wrong: dict[str, str], found, absent, device: torch.device) -> str:
    """Markdown: what was checked, the design's speeds, all comparisons."""
    facts = ", ".join(f"{name} {value}" for name, value in machine(device).items())
    text = [f"# The operations on a GPU\n\nWritten by `python -m bench.gpu`: {facts}.\n\n## Right\n"]
    text += [f"- {name}: {result}" for name, result in checks.items()]
    text += [f"- wrong: {name}: {what}" for name, what in wrong.items()]
    text.append("\n## Fast\n\n| what | measured | wanted | met |\n|---|--:|--:|---|")
    text += [f"| {a.what} | {a.measured:.2f} | {a.wanted} | {'yes' if a.met else 'no'} |" for a in lines(found)]
    text += [f"| {key} | {reason} | | |" for key, reason in absent.items()]
    text.append("\n## Measured\n")
    text += [f"```\n{comparison.table()}\n```\n" for comparison in found.values()]
    return "\n".join(text)


def run(
    device: torch.device,
    folder: Path = RESULTS,
    sizes: Sizes | None = None,
    examples: int = EXAMPLES,
    processes: int = PROCESSES,
) -> bool:
    """Check, measure, write; whether all results were right."""
    start, sizes, states = time.time(), sizes or Sizes(), ops.backends()
    for name, state in states.items():
        print(f"{name}: {state}", flush=True)
    wanted = ("triton", "cuda") if device.type == "cuda" else ("cpp",)
    backends = [name for name in wanted if states[name] == "available"]
    checks, wrong = {"backends": ", ".join(backends)}, {}

    def tell(name, known, count, failed):
        wrong.update(failed)
        checks[name] = f"{count - len(failed)} of {count} right" + f", {known - count} not run" * (count < known)
        print(f"{name}: {checks[name]}", *failed.items(), sep="\n  ", flush=True)

    deadline = start + CHECKING
    found = gpu_checks.operation_failures(backends, examples, deadline, processes)
    tell("operations, shapes and dtypes against float64", *found)
    if device.type == "cuda":
        for name, items in (
            ("CUDA graphs and compilation", list(gpu_checks.graphs(backends, device))),
            ("whole runs in CUDA graphs", list(gpu_checks.runs(device))),
            ("tensors over 2^31 elements", list(gpu_checks.large(backends, device))),
        ):
            tell(name, len(items), *gpu_checks.failures(items, deadline))
            torch.cuda.empty_cache()
        checks |= gpu_checks.sanitize(seconds=30)
    found, absent = measure(device, sizes, start + SECONDS - 40)
    folder.mkdir(exist_ok=True)
    with whole_file(folder / "gpu.md") as path:
        path.write_text(report(checks, wrong, found, absent, device))
    results = {key: comparison.as_dict() for key, comparison in found.items()}
    document = dict(machine=machine(device), checks=checks, wrong=wrong, speeds=results, absent=absent)
    document["lines"] = [line._asdict() for line in lines(found)]
    with whole_file(folder / "gpu.json") as path:
        path.write_text(json.dumps(document, indent=1) + "\n")
    print(f"\n{folder / 'gpu.md'}: {len(wrong)} wrong, {time.time() - start:.0f} s")
    return not wrong


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", help="such as cuda:1")
    parser.add_argument("--smoke", action="store_true", help="only run every kernel once")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    if device.type != "cuda" or not torch.cuda.is_available():
        sys.exit("bench.gpu: there is no CUDA device: nothing was measured")
    torch.cuda.set_device(device)
    if options.smoke:
        backends = [name for name in ("triton", "cuda") if ops.backends()[name] == "available"]
        return gpu_checks.smoke(backends, device)
    sys.exit(0 if run(device) else 1)


if __name__ == "__main__":
    main()

"""How cost grows: with the canvas, the regions, the windows in one network call, and the tokens of a prompt.

    python -m bench.scaling

samples through a stand-in network (two convolutions, a thousandth of Stable Diffusion's UNet), so that what is not the
network shows, and writes bench/results/scaling-cpu.json. On a CPU the seconds are those that one processor worked for
this process, which other processes hardly change. About two minutes.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from pathlib import Path

import torch
from diffusers import DDIMScheduler

from instantas import ops
from instantas.bench import cases
from instantas.bench.measure import keep, peak_memory
from instantas.sampling.bridging import evaluations
from instantas.sampling.sampler import sample
from instantas.windows import WindowPlan

RESULTS = Path(__file__).parent / "results"
SIDES = [(1, 1), (2, 2), (4, 4), (8, 8), (8, 16), (16, 16), (16, 32), (32, 32)]  # windows
LINEAR_FROM = 16  # windows: below it constant costs show
STEPS = 2
LAPS = 5
CHANNELS = 64


class StandIn(torch.nn.Module):
    """A network in name: two convolutions, and an unconditional prediction that costs nothing."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.Sequential(
            torch.nn.Conv2d(4, CHANNELS, 3, padding=1), torch.nn.SiLU(), torch.nn.Conv2d(CHANNELS, 4, 3, padding=1)
        )
        self.windows, self.seconds, self.clock = 0, 0.0, time.process_time

    def forward(self, windows, timestep, context):
        start = self.clock()
        cond = self.layers(windows)
        self.windows, self.seconds = self.windows + len(windows), self.seconds + self.clock() - start
        return cond, cond


def run(sides, batch=4, device="cpu"):
    """(function that samples, its stand-in network, the plan) of a canvas of so many windows."""
    plan = WindowPlan.minimum_coverage(64 * sides[0], 64 * sides[1])
    network = StandIn().to(device)
    noise = torch.randn(1, 4, plan.height, plan.width, generator=torch.Generator().manual_seed(0)).to(device)

    def once():
        scheduler = DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False)
        options = dict(num_inference_steps=STEPS, guidance_scale=7.5, window_batch_size=batch, bridging="default")
        with torch.no_grad():
            sample(network, noise, plan, scheduler, **options)
            if noise.is_cuda:
                torch.cuda.synchronize()

    return once, network, plan


def seconds(runs: dict, device="cpu", laps: int = LAPS) -> dict:
    """Median seconds of each, run in turn."""
    clock = time.process_time if device == "cpu" else time.perf_counter
    taken = {name: [] for name in runs}
    for lap in range(laps + 1):
        for name, function in runs.items():
            start = clock()
            function()
            if lap:
                taken[name].append(clock() - start)
    return {name: statistics.median(times) for name, times in taken.items()}


def exponent(sizes, values) -> float:
    """Of the power law through the points: the slope of a straight line through their logarithms."""
    xs, ys = [math.log(x) for x in sizes], [math.log(y) for y in values]
    return statistics.linear_regression(xs, ys).slope


def area(device="cpu", sides=SIDES) -> dict:
    """Seconds, network evaluations and peak memory by the number of windows."""
    runs = {s: run(s, device=device) for s in sides}
    times = seconds({s: once for s, (once, _, _) in runs.items()}, device)
    points = []
    for s, (once, network, plan) in runs.items():
        network.windows = 0
        peak = peak_memory(once, device)
        if network.windows != evaluations("default", plan, STEPS):
            raise AssertionError(
                f"{plan}: expected {evaluations('default', plan, STEPS)} windows, got {network.windows}"
            )
        canvas = 4 * 4 * plan.height * plan.width
        points.append(dict(x=plan.count, seconds=times[s], evaluations=network.windows, peak=peak, canvas=canvas))
    large = [p for p in points if p["x"] >= LINEAR_FROM]
    fit = statistics.linear_regression([p["canvas"] for p in large], [p["peak"] for p in large])
    return dict(
        x="windows",
        points=points,
        exponent=exponent([p["x"] for p in large], [p["seconds"] for p in large]),
        peak_canvases=fit.slope,  # bytes of peak memory by byte of canvas
    )


def window_batch(device="cpu", batches=(1, 2, 4, 8, 16, 32, 64)) -> dict:
    """64 windows, so many of them in one call of the network."""
    runs = {batch: run((8, 8), batch, device)[0] for batch in batches}
    times = seconds(runs, device)
    return dict(
        x="windows in one call",
        points=[dict(x=b, seconds=times[b], peak=peak_memory(once, device)) for b, once in runs.items()],
    )


def attention(name, sizes, device="cpu", dtype=torch.float32) -> dict:
    """Seconds of one layer (64 x 64 queries, 5 heads of 64): hard regions, and the joint form that a mask allows."""
    runs = {}
    for x, (regions, tokens) in sizes.items():
        ids, weights = cases.stripes(regions, 2, 4096, False, device)
        inputs = cases.bank_inputs(regions, 2, 4096, 5, 64, tokens, torch.device(device), dtype)
        runs[x] = _attend(inputs(torch.Generator().manual_seed(0)), ids, weights)
    times = seconds(runs, device)
    return dict(x=name, points=[dict(x=x, seconds=t) for x, t in times.items()])


def _attend(tensors, ids, weights):
    def once():
        with torch.no_grad():
            ops.regional_attention(*tensors, ids, weights)
        if ids.is_cuda:
            torch.cuda.synchronize()

    return once


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    device = parser.parse_args().device
    torch.set_num_threads(1)
    studies = {
        "area": lambda: area(device),
        "window batch": lambda: window_batch(device),
        "regions": lambda: attention("regions", {r: (r, 77) for r in (1, 2, 4, 8, 16, 32, 64)}, device),
        "tokens": lambda: attention("tokens", {n: (4, n) for n in (16, 32, 77, 154, 308)}, device),
    }
    for name, study in studies.items():
        result = study()
        keep(RESULTS / f"scaling-{torch.device(device).type}.json", {name: result}, device)
        print(f"\n{name}: " + ", ".join(f"{k} {v:.3f}" for k, v in result.items() if isinstance(v, float)))
        for point in result["points"]:
            rest = f"{point['peak'] / 2**20:10.1f} MiB" if "peak" in point else ""
            print(f"{point['x']:8} {result['x']:<20}{1e3 * point['seconds']:10.2f} ms{rest}", flush=True)


if __name__ == "__main__":
    main()

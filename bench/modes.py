"""Whole runs eager, with the network compiled, and on a GPU with whole steps in CUDA graphs.

    python -m bench.modes                    # on a GPU, 50 steps on the architecture of Stable Diffusion 2.0
    python -m bench.modes --device cpu --size 512x1024 --steps 2     # on two cores, nearly half an hour

The methods, network, noise and settings are those of `bench.end_to_end`; graphs are ours alone, the other methods have
none. A run is timed as a whole, after one that is not: with compilation and capture done, as for a second picture of
the same size; a graph is captured anew in each run, which counts. The overhead is a run's time over that of its network
calls, which are timed by themselves in the same mode right after: eager, compiled, or in a CUDA graph. Results go to
bench/results/modes-cuda.json or modes-cpu.json.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import time
from pathlib import Path

import torch
from diffusers.utils import logging

from bench.end_to_end import PROMPTS, SD2, SIZES, check, model, size_of
from bench.methods import BATCH, METHODS, Model
from instantas.bench.measure import keep, peak_memory
from instantas.sampling import graphs

RESULTS = Path(__file__).parent / "results"
_RUN = [name for name in METHODS if name != "MultiDiffusion"]  # which is the panorama pipeline with one prompt
MODES = {"eager": _RUN, "compiled": _RUN, "graph": ["instantas"]}
SECONDS = 1.0  # of calls of the bare network in a row, three times


def clock(device: torch.device) -> float:
    """Seconds, when the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@contextlib.contextmanager
def compiled(network, mode: str, backend: str = "inductor"):
    """The network compiled in place, in the mode "compiled"; the regional processor is installed on it as it is."""
    if mode == "compiled":
        network.compile(backend=backend)
    try:
        yield
    finally:
        network._compiled_call_impl = None


def batches(model: Model, name, size, prompts) -> list[int]:
    """Samples in each call of the network in one step."""
    found = []
    with contextlib.ExitStack() as stack:
        hook = model.pipe.unet.register_forward_pre_hook(lambda module, args: found.append(len(args[0])))
        stack.callback(hook.remove)
        METHODS[name](model, size, prompts, 1)
    return found


@torch.no_grad()
def bare_seconds(model: Model, batch: int, mode: str) -> float:
    """One call of the bare network: the median of three times as many in a row as take `SECONDS`."""
    network, device, window = model.pipe.unet, model.pipe.device, model.window
    sample = torch.randn(batch, network.config.in_channels, window, window).to(device, network.dtype)
    step, text = torch.tensor(500, device=device), model.embeds.expand(batch, -1, -1).contiguous()
    call = lambda: network(sample, step, encoder_hidden_states=text, return_dict=False)  # noqa: E731
    for _ in range(2):
        call()
    if mode == "graph":
        call = graphs.CudaGraph(call, None).replay
    start, taken = clock(device), []
    call()
    calls = max(1, round(SECONDS / (clock(device) - start)))
    for _ in range(3):
        start = clock(device)
        for _ in range(calls):
            call()
        taken.append((clock(device) - start) / calls)
    return statistics.median(taken)


def run(model: Model, name, size, prompts, steps, mode) -> dict:
    """Measure one whole run."""
    device, options = model.pipe.device, dict(cuda_graph=True) if mode == "graph" else {}
    calls = batches(model, name, size, prompts)
    METHODS[name](model, size, prompts, min(steps, 4), **options)  # warms up
    taken = []

    def whole():
        start = clock(device)
        METHODS[name](model, size, prompts, steps, **options)
        taken.append(clock(device) - start)

    peak = peak_memory(whole, device)
    bare = steps * sum(calls.count(batch) * bare_seconds(model, batch, mode) for batch in set(calls))
    result = dict(method=name, mode=mode, size=f"{size[0]}x{size[1]}", prompts=len(prompts), steps=steps)
    result |= dict(samples=steps * sum(calls), seconds=taken[0], bare=bare, overhead=taken[0] / bare, peak=peak)
    return result | dict(dtype=str(model.pipe.unet.dtype)[6:], batch=BATCH)


def measure(model: Model, sizes, steps, path: Path, modes=MODES, backend="inductor") -> None:
    """All methods at all sizes in all modes, kept one by one."""
    for size in sizes:
        for mode, methods in modes.items():
            with compiled(model.pipe.unet, mode, backend):
                for name in methods:
                    for prompts in (PROMPTS[:1], PROMPTS) if name == "instantas" else (PROMPTS[:1],):
                        result = run(model, name, size, prompts, steps, mode)
                        key = f"{result['size']}, {len(prompts)} prompts, {name}, {mode}"
                        keep(path, {key: result}, model.pipe.device)
                        print(
                            f"{key}: {result['samples']} samples, {result['seconds']:.2f} s, "
                            f"{result['overhead']:.3f} x the bare network, peak {result['peak'] / 2**20:.0f} MiB",
                            flush=True,
                        )


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", type=size_of, action="append", help="HEIGHTxWIDTH, may be repeated")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    kind = torch.device(options.device).type
    if kind == "cuda" and not torch.cuda.is_available():
        sys.exit("bench.modes: there is no CUDA device: nothing was measured")
    logging.set_verbosity_error()
    check()
    whole = model(SD2, options.device, torch.float16 if kind == "cuda" else torch.bfloat16)
    modes = MODES if kind == "cuda" else {mode: MODES[mode] for mode in ("eager", "compiled")}
    measure(whole, options.size or SIZES, options.steps, RESULTS / f"modes-{kind}.json", modes)


if __name__ == "__main__":
    main()

"""Speed of several processes over one: the same run on 32 windows, by one process and shared by two.

    python -m bench.ranks                                     # the embedded model, a minute of two idle cores
    python -m bench.ranks --network sd2 --window 16 --steps 1 --laps 3     # Stable Diffusion 2.0's UNet, random weights

Each process has one thread and its own processor, and the others wait while one measures alone. Prints what each lap
took by the clock and by every process's processor, and the ratio of the medians. Meant for idle processors.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from diffusers import DDIMScheduler, UNet2DConditionModel

from instantas import InstantASPipeline, demo
from instantas.sampling.sampler import sample
from instantas.windows import WindowPlan

ROWS, COLUMNS = 4, 8  # windows


def network_of(name: str) -> UNet2DConditionModel:
    """The embedded model's UNet, or one of Stable Diffusion 2.0's architecture."""
    if name == "embedded":
        return InstantASPipeline.from_pretrained(demo.folder()).unet
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=64,
        block_out_channels=(320, 640, 1280, 1280),
        attention_head_dim=(5, 10, 20, 20),
        cross_attention_dim=1024,
        use_linear_projection=True,
    ).eval()


def run_of(options: argparse.Namespace) -> Callable[[object], torch.Tensor]:
    """The run, as a function of its group."""
    unet = network_of(options.network)
    window = options.window or unet.config.sample_size
    plan = WindowPlan.minimum_coverage(ROWS * window, COLUMNS * window, window)
    drawn = torch.Generator().manual_seed(0)
    noise = torch.randn(1, unet.config.in_channels, plan.height, plan.width, generator=drawn)
    words = torch.randn(2, 77, unet.config.cross_attention_dim, generator=drawn)

    def denoiser(windows, timestep, context):
        both = words.repeat_interleave(len(windows), 0)
        return unet(windows.repeat(2, 1, 1, 1), timestep, both, return_dict=False)[0].chunk(2)

    def run(group):
        settings = dict(num_inference_steps=options.steps, guidance_scale=3.0, window_batch_size=options.batch)
        scheduler = DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False)
        with torch.no_grad():
            return sample(denoiser, noise, plan, scheduler, bridging="default", group=group, **settings)

    return run


def work(rank: int, options: argparse.Namespace, folder: str) -> None:
    torch.set_num_threads(1)
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=options.processes)
    run, alone, shared = run_of(options), [], []
    for lap in range(options.laps + 1):  # the first warms up
        dist.barrier()
        begun = time.perf_counter()
        if rank == 0:
            expected = run(None)
        alone.append(time.perf_counter() - begun)
        dist.barrier()
        begun, used = time.perf_counter(), time.process_time()
        found = run(True)
        shared.append(time.perf_counter() - begun)
        everyone = [0.0] * options.processes
        dist.all_gather_object(everyone, time.process_time() - used)
        if rank == 0 and not torch.equal(found, expected):
            raise AssertionError(f"lap {lap}: {options.processes} processes got another canvas than one")
        if rank == 0 and lap:
            processors = ", ".join(f"{seconds:.2f}" for seconds in everyone)
            print(f"alone {alone[-1]:.2f} s, shared {shared[-1]:.2f} s (processors {processors} s)", flush=True)
    if rank == 0:
        laps = sorted(one / many for one, many in zip(alone[1:], shared[1:]))
        ratio = statistics.median(alone[1:]) / statistics.median(shared[1:])
        print(f"{options.network}, {options.processes} processes: {ratio:.2f} times ({laps[0]:.2f} to {laps[-1]:.2f})")
    dist.destroy_process_group()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", choices=("embedded", "sd2"), default="embedded")
    parser.add_argument("--window", type=int, help="cells a side; by default the network's own")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--laps", type=int, default=5)
    parser.add_argument("--batch", type=int, default=4, help="windows in one call of the network")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(work, (options, folder), options.processes)


if __name__ == "__main__":
    main()

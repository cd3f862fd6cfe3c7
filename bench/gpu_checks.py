"""Whether the kernels are right on a device: every operation, backend, dtype and shape against float64.

The shapes and the judge are those of the tests (tests/oracle.py, tests/examples.py), which need only torch.
"""

from __future__ import annotations

import itertools
import math
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from types import SimpleNamespace

import torch

from instantas import ops
from instantas.sampling.bridging import BRIDGES
from instantas.sampling.sampler import sample
from instantas.testing import examples, oracle
from instantas.testing.oracle import (
    ATTENTION,
    DTYPES,
    PLANS,
    attention_examples,
    attention_inputs,
    normal,
    positive,
    region_weights,
)
from instantas.windows import WindowPlan

SANITIZERS = ("memcheck", "racecheck", "initcheck")
Check = tuple[str, Callable[[], object]]


def grid(backends: Sequence[str], dtypes: Sequence[torch.dtype] = DTYPES) -> Iterator[Check]:
    """(name, check): every operation in every shape of the tests' grid, forward and backward."""
    for backend in backends:
        for dtype in dtypes:
            for case, call, arguments, gradients in _cases():
                name = f"{backend}, {str(dtype)[6:]}, {case}"
                yield name, lambda a=(backend, call, arguments, dtype, gradients, "attention" in case): oracle.judge(*a)


def _cases():
    """(name, call, arguments, how many of them are differentiated)."""
    for name, plan in PLANS.items():
        shape, weight = (2, 3, plan.height, plan.width), positive(*plan.window)
        cond, uncond = (normal(2, plan.count, 3, *plan.window, seed=seed) for seed in (1, 2))
        guidance = positive(plan.height, plan.width) * 5

        def step(cond, uncond, sample, history, guidance, weight, plan=plan):
            given = dict(weight=weight, history=history, keep=(0.7, 0.2))
            return ops.guided_step(cond, uncond, sample, plan, [0.9, -0.4, 0.3, -0.2], guidance, **given)

        yield f"gather, {name}", lambda x, p=plan: ops.gather_windows(x, p), [normal(*shape)], 1
        yield f"scatter, {name}", lambda x, w, p=plan: ops.scatter_windows(x, p, w), [cond, weight], 1
        history = normal(2, *shape, seed=3)
        yield f"guided step, {name}", step, [cond, uncond, normal(*shape), history, guidance, weight], 0
    for mode in ("blend", "joint"):
        for shape in ATTENTION:
            for call, arguments in attention_examples(shape, mode, [0]):
                yield f"attention, {shape}, {mode}", call, arguments, 3


def random_examples(backends: Sequence[str], count: int) -> Iterator[Check]:
    """`count` random plans, shapes, weights, dtypes and modes of each operation, each on all of the backends."""
    for operation in examples.OPERATIONS:
        for i in range(count):
            draw = lambda i=i, operation=operation: examples.judge(backends, operation, random.Random(i))  # noqa: E731
            yield f"example {i} of {operation.__name__}", draw


def operations(backends: Sequence[str], count: int) -> Iterator[Check]:
    """The grid, then `count` random examples of each operation."""
    yield from grid(backends)
    yield from random_examples(backends, count)


def graphs(backends: Sequence[str], device: torch.device) -> Iterator[Check]:
    """Every operation captured in a CUDA graph, which is played on other values; and compiled without graph breaks."""
    plan = PLANS["ragged"]
    windows, canvas = normal(1, plan.count, 3, *plan.window), normal(1, 3, plan.height, plan.width)
    query, key, value, ids = (t.to(device) for t in attention_inputs(1, 40, 2, 16, 3, 20, 3))
    weights = region_weights(1, 3, 40).to(device)
    numbers = torch.tensor([0.9, -0.4], dtype=torch.float64, device=device)
    windows, canvas, query, key, value = (t.to(device, torch.float16) for t in (windows, canvas, query, key, value))
    calls = {
        "gather": (lambda x: ops.gather_windows(x, plan), canvas),
        "scatter": (lambda x: ops.scatter_windows(x, plan), windows),
        "guided step": (lambda x: ops.guided_step(x, -x, canvas, plan, numbers, 7.5, keep=numbers)[0], windows),
        "attention": (lambda x: ops.regional_attention(x, key, value, ids, weights), query),
    }
    for backend in backends:
        for name, (call, x) in calls.items():
            yield f"{backend}, {name} in a CUDA graph", lambda b=backend, c=call, x=x: _captured(b, c, x)
            yield f"{backend}, {name} compiled", lambda b=backend, c=call, x=x: _compiled(b, c, x)


class _Ddim:
    """DDIM on Stable Diffusion's noise levels, for machines without diffusers."""

    def __init__(self, prediction_type):
        self.config = SimpleNamespace(prediction_type=prediction_type)
        self.alphas_cumprod = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2).cumprod(0)
        self.num_inference_steps = None

    def set_timesteps(self, steps, device=None):
        self.num_inference_steps = steps
        self.timesteps = torch.arange(steps - 1, -1, -1, device=device) * (1000 // steps) + 1

    def step(self, output, t, sample, return_dict=False):
        alpha, before = (self.alphas_cumprod[max(0, int(i))] for i in (t, t - 1000 // self.num_inference_steps))
        if self.config.prediction_type == "v_prediction":
            output = alpha.sqrt() * output + (1 - alpha).sqrt() * sample
        clean = (sample - (1 - alpha).sqrt() * output) / alpha.sqrt()
        return (before.sqrt() * clean + (1 - before).sqrt() * output,)


def runs(device: torch.device) -> Iterator[Check]:
    """Whole runs of a small network, with their steps captured in CUDA graphs: as those that are not."""
    torch.manual_seed(0)
    network = torch.nn.Conv2d(4, 8, 5, padding=2).to(device)
    plan = WindowPlan.minimum_coverage(32, 50, 16)
    noise = normal(1, 4, plan.height, plan.width).to(device, torch.float32)

    def denoise(windows, timestep, context):
        cond, uncond = network(windows + context.origins.sum(1)[:, None, None, None] / 100).chunk(2, dim=1)
        return cond * (timestep / 1000), uncond

    def check(name, prediction_type):
        settings = dict(num_inference_steps=20, guidance_scale=2.0, bridging=name)
        with torch.no_grad():
            plain, replayed = (
                sample(denoise, noise, plan, _Ddim(prediction_type), cuda_graph=graph, **settings)
                for graph in (False, True)
            )
        torch.testing.assert_close(replayed, plain, rtol=1e-3, atol=1e-3)

    for name in ("none", *BRIDGES):
        for prediction_type in ("epsilon", "v_prediction"):
            yield f"a run, bridging {name}, {prediction_type}", lambda a=(name, prediction_type): check(*a)


def _captured(backend, call, x):
    with ops.use_backend(backend):
        x = x.clone()
        call(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = call(x)
        x.neg_()
        graph.replay()
        assert torch.equal(out, call(x)), "the graph gives another result than the call"


def _compiled(backend, call, x):
    with ops.use_backend(backend):
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x), call(x)), "compiled code gives another result than the call"


def large(backends: Sequence[str], device: torch.device, side: int = 16384, channels: int = 9) -> Iterator[Check]:
    """A canvas of more than 2^31 elements, cut into windows and merged again: the same, bit by bit."""

    def check(backend):
        plan = WindowPlan.minimum_coverage(side, side)
        canvas = torch.randn(1, channels, side, side, device=device, dtype=torch.bfloat16)
        with ops.use_backend(backend):
            merged = ops.scatter_windows(ops.gather_windows(canvas, plan), plan)
            again = torch.equal(merged, canvas)
            new, _ = ops.guided_step(ops.gather_windows(canvas, plan), None, merged, plan, [0.0, 1.0], 1.0)
        assert again and torch.equal(new, canvas), "the canvas is not what it was"

    for backend in backends:
        yield f"{backend}, {channels * side * side} elements", lambda b=backend: check(b)


def failures(checks: Iterable[Check], deadline: float = math.inf) -> tuple[int, dict[str, str]]:
    """Runs the checks until `time.time()` says stop: how many were run, and name -> what is wrong with one."""
    count, wrong = 0, {}
    for name, check in checks:
        if time.time() > deadline:
            break
        count += 1
        try:
            check()
        except Exception as error:  # a kernel may fail in any way, and the others are to be seen all the same
            wrong[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    return count, wrong


def operation_failures(
    backends: Sequence[str], count: int, deadline: float, processes: int
) -> tuple[int, int, dict[str, str]]:
    """`failures` of `operations` after their number; shared among processes, since Triton compiles on one core."""
    shares = [(backends, count, deadline, i, processes) for i in range(processes)]
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        results = list(pool.map(_share, *zip(*shares)))
    wrong = {name: what for _, failed in results for name, what in failed.items()}
    return sum(1 for _ in operations(backends, count)), sum(run for run, _ in results), wrong


def _share(backends, count, deadline, index, processes):
    return failures(itertools.islice(operations(backends, count), index, None, processes), deadline)


def sanitize(seconds: float) -> dict[str, str]:
    """compute-sanitizer's verdict on every kernel, or why there is none. `seconds`: for each of its tools."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    program = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=f"{home}/bin")
    if program is None:
        return dict.fromkeys(SANITIZERS, "not run: compute-sanitizer is not installed")
    verdicts = {}
    for tool in SANITIZERS:
        # without the caching allocator, in whose blocks an access past the end of a tensor goes unnoticed
        environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        command = [program, "--tool", tool, "--error-exitcode", "9", sys.executable, "-m", "bench.gpu", "--smoke"]
        try:
            done = subprocess.run(
                command, cwd=oracle.ROOT, env=environment, capture_output=True, text=True, timeout=seconds
            )
        except subprocess.TimeoutExpired:
            verdicts[tool] = f"not finished within {seconds:.0f} s"
            continue
        lines = [line for line in done.stdout.splitlines() if "ERROR SUMMARY" in line or "RACECHECK SUMMARY" in line]
        verdicts[tool] = "clean" if done.returncode == 0 else " ".join(lines) or (done.stderr or done.stdout)[-300:]
    return verdicts


def smoke(backends: Sequence[str], device: torch.device) -> None:
    """Every kernel once, small: what compute-sanitizer watches, which takes minutes for more."""
    plan = PLANS["ragged"]
    for backend in backends:
        for dtype in (torch.float32, torch.float16):
            windows, canvas = normal(1, plan.count, 3, *plan.window), normal(1, 3, plan.height, plan.width)
            windows, canvas = windows.to(device, dtype), canvas.to(device, dtype)
            bank = [t.to(device) for t in attention_inputs(1, 70, 1, 40, 2, 77, 2)]
            bank[:3] = [t.to(dtype).requires_grad_() for t in bank[:3]]
            with oracle.use_backend(backend):
                ops.gather_windows(canvas, plan)
                ops.scatter_windows(windows, plan)
                ops.guided_step(windows, windows, canvas, plan, [0.9, -0.4, 0.3], 7.5, history=canvas[None])
                for mode in ("blend", "joint"):
                    weights = region_weights(1, 2, 70).to(device)
                    ops.regional_attention(*bank, weights, mode=mode).sum().backward()

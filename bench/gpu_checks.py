"""Whether the kernels are right on a device: every operation, backend, dtype and shape against float64.

The shapes and the judge are those of the tests (`instantas.testing`), which need only torch.

    python -m bench.gpu_checks triton cuda      # every kernel of these backends once: what compute-sanitizer watches
"""

from __future__ import annotations

import functools
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import SimpleNamespace

import torch

from instantas import ops
from instantas.bench.measure import reason
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
FOUND = 9  # compute-sanitizer's exit status where it found something
OPERATIONS = ("gather", "scatter", "guided step", "attention")
ONCE = ("ragged", "(1, 70, 1, 40, 2, 77, 2)")  # the cases of the grid that run every kernel
Check = tuple[str, Callable[[], object]]


class AbsentError(Exception):
    """What a check needs is not there: nothing was found out."""


def alive(device: torch.device) -> bool:
    """Waits for the device; False once a kernel has gone wrong so that the process cannot use it any more."""
    try:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except Exception:
        return False
    return True


def grid(backends: Sequence[str], dtypes: Sequence[torch.dtype] = DTYPES, contains: str = "") -> Iterator[Check]:
    """(name, check): every operation in every shape of the tests' grid, forward and backward."""
    for backend in backends:
        for dtype in dtypes:
            for case, call, arguments, gradients in _cases():
                arguments = backend, call, arguments, dtype, gradients, "attention" in case
                if contains in case:
                    yield f"{backend}, {str(dtype)[6:]}, {case}", lambda a=arguments: oracle.judge(*a)


def smoke(backends: Sequence[str]) -> Iterator[Check]:
    """Every kernel once or twice, on small tensors."""
    for case in ONCE:
        yield from grid(backends, contains=case)


@functools.cache
def _cases():
    """(name, call, arguments, how many of them are differentiated) of each."""
    return [*_windowed(), *_attention()]


def _windowed():
    for name, plan in PLANS.items():
        shape, weight = (2, 3, plan.height, plan.width), positive(*plan.window)
        cond, uncond = (normal(2, plan.count, 3, *plan.window, seed=seed) for seed in (1, 2))
        guidance = positive(plan.height, plan.width) * 5

        def step(cond, uncond, sample, history, guidance, weight, plan=plan):
            given = dict(weight=weight, history=history, keep=(0.7, 0.2))
            return ops.guided_step(cond, uncond, sample, plan, [0.9, -0.4, 0.3, -0.2], guidance, **given)

        some = plan.subset([i % 2 == 0 for i in range(plan.count)])

        def partial_step(cond, uncond, sample, latest, plan=some):
            return ops.guided_step(cond, uncond, sample, plan, [0.9, -0.4], 7.5, latest=latest, carry=(0.6, 0.8))

        yield f"gather, {name}", lambda x, p=plan: ops.gather_windows(x, p), [normal(*shape)], 1
        yield f"scatter, {name}", lambda x, w, p=plan: ops.scatter_windows(x, p, w), [cond, weight], 1
        sample, kept = normal(*shape), normal(2, *shape, seed=3)
        yield f"guided step, {name}", step, [cond, uncond, sample, kept, guidance, weight], 0
        yield f"guided step, some of {name}", partial_step, [cond[:, ::2], uncond[:, ::2], sample, kept], 0


def _attention():
    for mode in ("blend", "joint"):
        for shape in ATTENTION:
            for call, arguments in attention_examples(shape, mode, [0]):
                yield f"attention, {shape}, {mode}", call, arguments, 3


def random_examples(backends: Sequence[str], operation: Callable, count: int) -> Iterator[Check]:
    """`count` random plans, shapes, weights, dtypes and modes of an operation of `examples`, each on all backends."""
    for i in range(count):
        yield f"example {i} of {operation.__name__}", lambda i=i: examples.judge(backends, operation, random.Random(i))


def graphs(backends: Sequence[str], device: torch.device) -> Iterator[Check]:
    """Every operation captured in a CUDA graph, which is played on other values; and compiled without graph breaks."""
    plan = PLANS["ragged"]
    windows, canvas = normal(1, plan.count, 3, *plan.window), normal(1, 3, plan.height, plan.width)
    query, key, value, ids = (t.to(device) for t in attention_inputs(1, 40, 2, 16, 3, 20, 3))
    weights = region_weights(1, 3, 40).to(device)
    order = ops.region_order(ids, weights)
    numbers = torch.tensor([0.9, -0.4], dtype=torch.float64, device=device)
    windows, canvas, query, key, value = (t.to(device, torch.float16) for t in (windows, canvas, query, key, value))
    calls = {
        "gather": (lambda x: ops.gather_windows(x, plan), canvas),
        "scatter": (lambda x: ops.scatter_windows(x, plan), windows),
        "guided step": (lambda x: ops.guided_step(x, -x, canvas, plan, numbers, 7.5, keep=numbers)[0], windows),
        "attention": (lambda x: ops.regional_attention(x, key, value, ids, weights, order=order), query),
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


def failures(checks: Iterable[Check]) -> tuple[int, dict[str, str]]:
    """Runs the checks: how many there were, and name -> what is wrong with one."""
    count, wrong = 0, {}
    for name, check in checks:
        count += 1
        try:
            check()
        except Exception as error:  # a kernel may fail in any way, and the others are to be seen all the same
            wrong[name] = reason(error)
    return count, wrong


def sanitize(tool: str, backends: Sequence[str]) -> None:
    """compute-sanitizer's verdict on every kernel; what it says goes to stderr.

    Raises:
        AbsentError: where it is not installed, or does not work.
        AssertionError: for what it found.
    """
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    program = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=f"{home}/bin")
    if program is None:
        raise AbsentError("compute-sanitizer is not installed")
    # without the caching allocator, in whose blocks an access past the end of a tensor goes unnoticed
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = [program, "--tool", tool, "--error-exitcode", str(FOUND)]
    command += [sys.executable, "-m", "bench.gpu_checks", *backends]
    said = []
    with subprocess.Popen(
        command, cwd=oracle.ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as run:
        for line in run.stdout:
            sys.stderr.write(line)
            said.append(line.strip("= \n"))
    found = " ".join(line for line in said if "SUMMARY" in line)
    assert run.returncode != FOUND, found or "it found something"
    if run.returncode:
        raise AbsentError(f"it ended with exit status {run.returncode}: {' '.join(said[-1:])}")


def main(backends: Sequence[str]) -> str | None:
    _, wrong = failures(smoke(backends))
    return "\n".join(f"{name}: {what}" for name, what in wrong.items()) or None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

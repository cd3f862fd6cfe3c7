"""Guards of speed that need no clock: instructions of the CPU kernels, operations called, queries attended."""

import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import diffusers
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from instantas import ops, testing
from instantas.regions import Region, RegionMap
from instantas.regions.prompts import PromptBank
from instantas.regions.weights import PromptWeights, WindowBatch
from instantas.sampling.bridging import Stage, bridge, evaluations
from instantas.sampling.sampler import sample
from instantas.testing.tiny import scheduler
from instantas.windows import WindowPlan

CONTROL = """
#include <valgrind/callgrind.h>
void start(void) { CALLGRIND_START_INSTRUMENTATION; CALLGRIND_ZERO_STATS; }
void stop(const char* name) { CALLGRIND_DUMP_STATS_AT(name); CALLGRIND_STOP_INSTRUMENTATION; }
"""
# Instructions for each element of the result, and in thousands for the call itself; counted with gcc 12 and AVX2.
# Whoever makes them fewer writes the new count here.
COUNTED = {
    "gather, float32": (1.6, 115),
    "gather, bfloat16": (1.6, 100),
    "scatter, float32": (1.6, 125),
    "scatter, bfloat16": (1.5, 110),
    "scatter, weighted overlap, float32": (13.0, 0),
    "scatter, weighted overlap, bfloat16": (14.6, 0),
    "step, float32": (8.5, 265),
    "step, bfloat16": (12.7, 255),
}
MORE = 1.3  # times as many instructions for each element, with another compiler
MORE_FOR_A_CALL = 1.6  # and with another Python
EVERYWHERE = 60  # thousands of instructions of a call whose own are few


def counts(folder: Path) -> dict:
    """ "operation, dtype" -> {elements: instructions}."""
    for tool in ("valgrind", "cc"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")
    if (state := ops.backends()["cpp"]) != "available":
        pytest.skip(f"cpp: {state}")
    (folder / "control.c").write_text(CONTROL)
    command = ["cc", "-O1", "-shared", "-fPIC", "control.c", "-o", "control.so"]
    if subprocess.run(command, cwd=folder, capture_output=True).returncode:
        pytest.skip("valgrind's headers are not installed")
    settings = dict(OMP_NUM_THREADS="1", PYTHONPATH=os.pathsep.join(sys.path), TRITON_INTERPRET="0")
    options = ["--tool=callgrind", "--instr-atstart=no", f"--callgrind-out-file={folder}/out"]
    script = Path(testing.__file__).with_name("counted.py")
    command = ["valgrind", "-q", *options, sys.executable, script, folder / "control.so"]
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True)
    if unknown := re.search("unhandled instruction bytes.*|Fatal error at startup.*|unhandled amd64.*", done.stderr):
        pytest.skip(f"valgrind cannot run this Python: {unknown[0]}")  # of a processor newer than valgrind
    assert done.returncode == 0, done.stderr[-2000:]
    found = {}
    for path in folder.glob("out.*"):
        text = path.read_text()
        if match := re.search(r"Client Request: (.*), (\d+)$", text, re.M):
            total = int(re.search(r"^totals: (\d+)", text, re.M)[1])
            found.setdefault(match[1], {})[int(match[2])] = total
    return found


def test_kernels_take_no_more_instructions_than_they_did(tmp_path):
    found = counts(tmp_path)
    lines = {}
    for name, ((small, few), (large, many)) in ((name, sorted(each.items())) for name, each in found.items()):
        slope = (many - few) / (large - small)
        lines[name] = slope, (few - slope * small) / 1e3
        assert slope > 0.5, f"{name}: {found[name]} was not counted"
    for dtype in ("float32", "bfloat16"):  # of which vectors have the processor's width: a query attends to one prompt
        one, four = (lines.pop(f"attention, {regions}, {dtype}")[0] for regions in ("1 region", "4 hard regions"))
        assert four < 1.2 * one
    assert set(lines) == set(COUNTED)
    grown = {}
    for name, (of_element, of_call) in COUNTED.items():
        slope, start = lines[name]
        if slope > MORE * of_element or start > MORE_FOR_A_CALL * of_call + EVERYWHERE:
            grown[name] = f"{slope:.1f} an element, {start:.0f} thousand a call"
    assert not grown


class Calls(TorchDispatchMode):
    """Counts the operations called, views left out."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view:
            self.counts[func._schema.name] += 1
        return func(*args, **(kwargs or {}))


def sampled(side: int, bridging=None, steps: int = 12):
    """(operations of the last step without the denoiser's, windows that it was given, its calls)."""
    plan = WindowPlan.minimum_coverage(16 * side, 16 * side, 16)
    given, after = [], []

    def denoiser(windows, t, context):
        given.append(len(windows))
        return windows.detach(), windows.detach()

    noise = torch.randn(1, 4, plan.height, plan.width, generator=torch.Generator().manual_seed(0))
    options = dict(num_inference_steps=steps, guidance_scale=7.5, window_batch_size=4, bridging=bridging)
    with torch.no_grad(), Calls() as calls:
        options["callback"] = lambda i, t, latents: after.append(calls.counts.copy())
        sample(denoiser, noise, plan, scheduler(), **options)
    return after[-1] - after[-2], sum(given), len(given)


@pytest.mark.parametrize("side", [1, 2, 8])
def test_a_step_gathers_once_and_steps_once_whatever_the_canvas(side):
    calls, windows, batches = sampled(side)
    assert (windows, batches) == (12 * side**2, 12 * -(-(side**2) // 4))
    assert calls["instantas::gather_windows"] == calls["instantas::guided_step"] == 1
    assert calls["instantas::scatter_windows"] == 0


@pytest.mark.parametrize("side, batches", [(1, 0), (2, 0), (4, 4), (8, 16)])
def test_operations_of_a_step_grow_with_the_batches_alone(side, batches):
    calls, _, _ = sampled(side)
    alone = 6  # gathering, the step, its empty history, and the list of windows
    joined = 2 + 2 * batches  # predictions with and without the prompt, each copied to its place once
    assert calls.total() <= alone + (joined if batches else 0)


class Half:
    """A bridge of one's own: the windows of one half at every other step."""

    def step(self, step, steps, plan):
        return Stage(plan.subset(plan.origins[:, 1] < plan.width // 2) if step % 2 else plan)


@pytest.mark.parametrize("kind, more", [("DDIM", {}), ("EulerDiscrete", {"aten::mul": 1})])
@pytest.mark.parametrize("bridging", [None, "default", "economy", "centred", pytest.param(Half(), id="own")])
def test_a_step_of_any_bridge_is_one_gather_and_one_step(bridging, kind, more):
    """And no other operation on a canvas: Euler's scale multiplies windows; the empty tensor is the absent history."""
    plan, counts = WindowPlan.minimum_coverage(40, 40, 16), [Counter()]
    noise = torch.randn(1, 4, 40, 40, generator=torch.Generator().manual_seed(0))
    options = dict(num_inference_steps=12, guidance_scale=7.5, window_batch_size=9, bridging=bridging)
    with torch.no_grad(), Calls() as calls:
        options["callback"] = lambda i, t, latents: counts.append(calls.counts.copy())
        chosen = scheduler(kind=getattr(diffusers, f"{kind}Scheduler"))
        sample(lambda windows, t, context: (windows.detach(), windows.detach()), noise, plan, chosen, **options)
    step = {"instantas::gather_windows": 1, "instantas::guided_step": 1, "aten::new_empty": 1} | more
    idle = {"instantas::guided_step": 1, "aten::new_empty": 2}
    found = [dict(after - before) for before, after in zip(counts[1:], counts[2:])]
    assert [each for each in found if each not in (step, idle)] == []
    assert found.count(idle) == (12 - int(0.65 * 12) if bridging == "economy" else 0)


def test_weights_of_windows_that_moved_are_one_gather():
    regions = RegionMap([Region(box=(0.0, 0.0, 0.5, 1.0), embeds=torch.ones(4, 16))], 320, 320)
    bank, plan = PromptBank(regions.lists), WindowPlan.minimum_coverage(40, 40, 16)
    bank.update(torch.ones(2, 4, 16))
    weights, counts, device, places = PromptWeights(regions, bank), [], torch.device("cpu"), []
    for step in (2, 3, 4):
        moved = bridge("default").step(step, 12, plan).plan
        rows = torch.cartesian_prod(torch.arange(1), torch.arange(moved.count))
        places.append(WindowBatch(moved, rows, moved.tables(device).origins, step / 12))
    with Calls() as calls:
        for place in places:
            weights.layout(place, (2 * len(place.rows), 4, 16, 16), device, (1, 2))
            counts.append(calls.counts.copy())
    step = counts[-1] - counts[-2]
    assert step["instantas::gather_windows"] == 1 and step["aten::index"] == 0
    assert step.total() - step["aten::avg_pool2d"] <= 7


@pytest.mark.parametrize("bridging", ["default", "economy", "centred"])
def test_evaluations_are_those_that_the_plan_announces(bridging):
    plan = WindowPlan.minimum_coverage(64, 64, 16)
    assert sampled(4, bridging)[1] == evaluations(bridging, plan, 12) <= 12 * plan.lower_bound

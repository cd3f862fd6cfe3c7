"""Everything that needs a GPU, in one go of eight minutes of which nothing can be lost.

    python -m bench.gpu                      # writes bench/results/gpu.json and gpu.md, after everything that happens
    python -m bench.gpu --smoke              # a minute: every kernel once, every comparison small; gpu-smoke.json, .md
    python -m bench.gpu --only grid "speeds: step"
    python -m bench.gpu --device cpu --smoke --folder out      # a rehearsal: Triton interpreted, CUDA emulated

checks every operation on every backend against float64, measures the speeds, and asks compute-sanitizer where it is
installed; `bench.gpu_groups` says what is done in which order. Each group has a process of its own, which may hang,
crash, or lose its device: what is left of it goes on in another one. Needs torch and triton; builds the CUDA library
where nvcc is there and it is not built. Fails if a result is wrong, and not if a speed falls short. Without a GPU it
says so and fails.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from bench.gpu_crew import ROOT, Crew, end
from bench.gpu_groups import Group, Setting
from bench.gpu_report import Report
from instantas import ops
from instantas.bench.measure import machine
from instantas.ops.library import CUDA
from instantas.testing import emulated

RESULTS = Path(__file__).parent / "results"
BUDGET, SMOKE = 8 * 60, 60  # seconds
BUILD = 240  # seconds
MODULE = "bench.gpu_groups"


def chosen(setting: Setting, only: Sequence[str] = (), module: str = MODULE) -> list[Group]:
    """The groups that a module describes, in order; with `only`, those whose names contain one of the texts.

    Raises:
        ValueError: for a text that no group's name contains.
    """
    groups = importlib.import_module(module).groups(setting)
    for text in only:
        if not any(text in group.name for group in groups):
            raise ValueError(f"only: expected a part of one of {', '.join(g.name for g in groups)}; got {text!r}")
    return [group for group in groups if not only or any(text in group.name for text in only)]


def run(
    setting: Setting,
    groups: Sequence[Group],
    folder: Path = RESULTS,
    *,
    budget: float = BUDGET,
    backends: dict[str, str] | None = None,
    module: str = MODULE,
    cores: int | None = None,
) -> Report:
    """Do the groups, of those that the module describes; write gpu.json and gpu.md.

    Args:
        budget: seconds after which nothing new is begun.
        backends: the state of each, for the report.
        cores: processes at the same time, at most; by default those of the machine.
    """
    folder.mkdir(parents=True, exist_ok=True)
    report = Report(folder, setting, machine(setting.device), backends or {}, [group.name for group in groups])
    crew, state = Crew(setting, report, module, budget, cores or len(os.sched_getaffinity(0))), "stopped"
    try:
        crew.run(groups)
        state = "not all was run" if report.left else "finished"
    finally:
        report.close(state)
    return report


def build() -> str | None:
    """Build the CUDA library unless it is built, where nvcc is there; why that failed."""
    home = os.environ.get("CUDA_HOME")
    if CUDA.unfit() is None or not shutil.which("nvcc", path=os.path.join(home, "bin") if home else None):
        return None
    print("bench.gpu: building the CUDA library", flush=True)
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    with subprocess.Popen(command, cwd=ROOT, stdout=sys.stderr, start_new_session=True) as setup:
        try:
            status = setup.wait(BUILD)
        except subprocess.TimeoutExpired:
            return f"setup.py took more than {BUILD} s"
        finally:
            end(setup)  # and its compilers
    return f"setup.py ended with exit status {status}" if status else None


def backends(device: torch.device) -> dict[str, str]:
    """The state of each backend of a GPU; on a CPU of what stands in for it."""
    states = {name: ops.backends()[name] for name in ("triton", "cuda")}
    if device.type == "cpu":
        states["triton"] = "available" if "interpreter" in states["triton"] else states["triton"]
        states["cuda"] = "available" if emulated.AVAILABLE else "there is no C++ compiler to emulate it with"
        with emulated.cuda() if emulated.AVAILABLE else contextlib.nullcontext():
            pass  # built now: that takes longer than an item may
    return states


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", type=torch.device, help="such as cuda:1; cpu: a rehearsal")
    parser.add_argument("--smoke", action="store_true", help="every kernel once")
    parser.add_argument("--only", nargs="+", default=[], metavar="TEXT", help="groups whose names contain a text")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="begin nothing new after (default 480; 60)")
    parser.add_argument("--folder", type=Path, help="for the report (default bench/results; none for a rehearsal)")
    options, begun = parser.parse_args(arguments), time.monotonic()
    device = options.device
    if device.type != "cpu" and not torch.cuda.is_available():
        sys.exit("bench.gpu: there is no CUDA device: nothing was measured")
    if device.type == "cpu" and options.folder is None:
        parser.error("a rehearsal needs a --folder: what it measures is no GPU")
    failure = None if device.type == "cpu" else build()
    states = backends(device)
    if failure and states["cuda"] != "available":
        states["cuda"] += f"; building it failed: {failure}"
    for name, state in states.items():
        print(f"{name}: {state}", flush=True)
    setting = Setting(str(device), tuple(n for n, state in states.items() if state == "available"), options.smoke)
    try:
        groups = chosen(setting, options.only)
    except ValueError as error:
        parser.error(str(error))
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit("bench.gpu: stopped by a signal"))
    budget = options.budget if options.budget is not None else SMOKE if options.smoke else BUDGET
    left = budget - (time.monotonic() - begun)
    report = run(setting, groups, options.folder or RESULTS, budget=left, backends=states)
    print(*(f"wrong: {name}: {why}" for name, why in report.wrong_items.items()), sep="\n")
    print(f"{report.paths[1]}: {report.document['state']}, {len(report.wrong_items)} wrong")
    sys.exit(1 if report.wrong_items else 0)


if __name__ == "__main__":
    main()

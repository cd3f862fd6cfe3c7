"""Every test here is one comparison: `measured` runs it, keeps it in bench/results/, prints it at the end.

    python -m bench.operations --device cuda

What pytest-benchmark itself shows, saves and compares between runs is the first contender of each: the operation on
the backend that is its default.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from instantas.bench.measure import compare, keep

RESULTS = Path(__file__).parents[1] / "results"
_comparisons = {}


def pytest_addoption(parser):
    parser.addoption("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.addoption("--seconds", type=float, default=1.0, help="of laps for each comparison")


def pytest_generate_tests(metafunc):
    if "dtype" in metafunc.fixturenames:
        halves = (torch.bfloat16,) if metafunc.config.getoption("device") == "cpu" else (torch.bfloat16, torch.float16)
        metafunc.parametrize("dtype", (torch.float32, *halves), ids=str)


@pytest.fixture
def measured(benchmark, pytestconfig):
    """Function of a case of `instantas.bench.cases` and its arguments: compare, record, return the Comparison."""
    device = torch.device(pytestconfig.getoption("device"))

    def measure(title, inputs, contenders, exact, **options):
        result = compare(title, inputs, contenders, exact, **options)
        generator = torch.Generator().manual_seed(1)
        sets = itertools.cycle([inputs(generator) for _ in range(4)])
        run = next(iter(contenders.values()))

        def finished(*arguments):
            run(*arguments)
            if device.type == "cuda":
                torch.cuda.synchronize(device)

        benchmark.extra_info.update(result.as_dict())
        with torch.no_grad():
            benchmark.pedantic(finished, setup=lambda: (next(sets), {}), rounds=10, warmup_rounds=1)
        return result

    def run(case, *arguments, **options):
        seconds = pytestconfig.getoption("seconds")
        result = case(*arguments, device=device, seconds=seconds, laps=(5, 50), measure=measure, **options)
        _comparisons[f"{result.title}, {result.dtype}"] = result
        return result

    return run


def pytest_terminal_summary(terminalreporter, config):
    for result in _comparisons.values():
        terminalreporter.write_line("\n" + result.table())
    if _comparisons:
        path = RESULTS / f"operations-{config.getoption('device')}.json"
        RESULTS.mkdir(exist_ok=True)
        keep(path, {title: result.as_dict() for title, result in _comparisons.items()}, config.getoption("device"))
        terminalreporter.write_line(f"\nkept in {path.relative_to(RESULTS.parent.parent)}")

"""`python -m bench.gpu`, as far as a CPU can run it: its checks, its comparisons on small sizes, its report."""

import dataclasses
import json
import subprocess
import sys
from unittest import mock

import pytest
import torch

from bench import gpu, gpu_checks
from instantas.ops.backend import BACKENDS
from instantas.testing import oracle, recorded

CPU = torch.device("cpu")
SMALL = gpu.Sizes(128, 2, 1, (1,), dict(queries=256, heads=1, depth=16, tokens=9), seconds=0.01, compiled=False)
cpp = pytest.mark.skipif("cpp" not in oracle.BACKENDS, reason="the host library is not built")


@pytest.mark.skipif(oracle.GPU, reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_fails():
    done = subprocess.run([sys.executable, "-m", "bench.gpu"], cwd=oracle.ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr == "bench.gpu: there is no CUDA device: nothing was measured\n"


def test_it_needs_only_torch():
    code = "import sys, bench.gpu; print(sorted({'diffusers', 'transformers', 'pytest', 'PIL'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=oracle.ROOT, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


@cpp
def test_everything_in_one_go(tmp_path, capsys):
    assert gpu.run(CPU, tmp_path, SMALL, examples=2, processes=1)
    found = json.loads((tmp_path / "gpu.json").read_text())
    text = (tmp_path / "gpu.md").read_text()
    count = sum(1 for _ in gpu_checks.operations(["cpp"], 2))
    right = f"{count} of {count} right"
    assert right in text and right in capsys.readouterr().out and not found["wrong"] and not found["absent"]
    assert [line["wanted"] for line in found["lines"]].count("<= 1.15") == 2
    assert all(f"| {line['what']} | {line['measured']:.2f} |" in text for line in found["lines"])
    assert {"gather bfloat16", "scatter float32", "step float32", "attention 4 1", "hard 1"} <= set(found["speeds"])


@cpp
def test_a_wrong_kernel_is_found():
    right = BACKENDS["cpp"].functions()
    broken = right | {"scatter_windows": lambda *a: right["scatter_windows"](*a) * 1.01}
    with mock.patch.dict(BACKENDS, cpp=dataclasses.replace(BACKENDS["cpp"], functions=lambda: broken)):
        count, wrong = gpu_checks.failures(gpu_checks.grid(["cpp"], [torch.float32]))
    assert count > len(wrong) > 0 and all(what.startswith("AssertionError: result") for what in wrong.values())
    assert {name.split(", ")[2] for name in wrong} >= {"gather", "scatter"}  # gather's gradient is a scatter
    assert not any("attention" in name for name in wrong)


def test_a_contender_that_disagrees_gets_no_speed():
    def refuse(*arguments, **options):
        raise gpu.DisagreementError("instantas cpp: off by 1")

    with mock.patch.object(gpu, "comparisons", lambda *a: [("gather", refuse)]):
        found, absent = gpu.measure(CPU, SMALL, deadline=float("inf"))
        late = gpu.measure(CPU, SMALL, deadline=0)
    assert found == {} and absent == {"gather": "not measured: instantas cpp: off by 1"}
    assert late == ({}, {"gather": "not measured: out of time"})


@pytest.mark.skipif("cuda" not in oracle.BACKENDS, reason="the emulation needs a compiler")
def test_what_the_sanitizer_watches_runs():
    with oracle.use_backend("cuda"):
        gpu_checks.smoke(["cuda"], torch.device(oracle.device("cuda")))


def test_runs_in_graphs_are_checked():
    with recorded.recording() as made:
        count, wrong = gpu_checks.failures(gpu_checks.runs(CPU))
        assert count == 12 and wrong == {} and made
        with mock.patch.object(recorded.Recorded, "replay", lambda self: None):
            _, wrong = gpu_checks.failures(gpu_checks.runs(CPU))
    assert len(wrong) > 6

"""guided_step against the same three things in turn: guidance, a merge of the windows, the scheduler's update."""

import pytest
import torch

from instantas.bench import cases
from instantas.windows import WindowPlan

# history 0: DDIM; 1: a solver of second order
SIZES = {
    "512x2048": dict(plan=WindowPlan.minimum_coverage(64, 256)),
    "1000x1400": dict(plan=WindowPlan.minimum_coverage(125, 175), weight="linear", history=1),
    "2048x2048": dict(plan=WindowPlan.minimum_coverage(256, 256), history=1),
    "4096x4096": dict(plan=WindowPlan.minimum_coverage(512, 512), channels=16, history=1, left_out=("reference",)),
    "512x2048 strided": dict(plan=WindowPlan.strided(64, 256)),
}


@pytest.mark.parametrize("size", SIZES)
def test_step(measured, size, dtype):
    measured(cases.step, **SIZES[size], dtype=dtype)


@pytest.mark.parametrize("size", ["2048x2048", "512x2048 strided"])
def test_compiled(measured, size):
    measured(cases.step, **SIZES[size], batch=2, dtype=torch.float32, compiled=True)

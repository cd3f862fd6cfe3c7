"""gather_windows and scatter_windows against slices, index_select, index_add, unfold, fold and reshape."""

import pytest
import torch

from instantas.bench import cases
from instantas.windows import WindowPlan

# latents of the sizes that users paint, and a canvas of many channels that fills the cache
FEWEST = {
    "512x2048": dict(plan=WindowPlan.minimum_coverage(64, 256)),
    "2048x2048": dict(plan=WindowPlan.minimum_coverage(256, 256)),
    "4096x4096": dict(plan=WindowPlan.minimum_coverage(512, 512), channels=16, left_out=("reference",)),
}
OVERLAPPING = {
    "512x2048 strided": dict(plan=WindowPlan.strided(64, 256)),
    "512x2048 wrapping": dict(plan=WindowPlan.minimum_coverage(64, 256, wrap=(False, True), shift=(0, 21))),
}
SIZES = FEWEST | OVERLAPPING


@pytest.mark.parametrize("size", SIZES)
def test_gather(measured, size, dtype):
    measured(cases.gather, **SIZES[size], dtype=dtype)


@pytest.mark.parametrize("size", SIZES)
def test_scatter(measured, size, dtype):
    weight = "gaussian" if size in OVERLAPPING else None
    measured(cases.scatter, **SIZES[size], weight=weight, dtype=dtype)


@pytest.mark.parametrize("size", ["2048x2048", "512x2048 strided"])
@pytest.mark.parametrize("case", [cases.gather, cases.scatter], ids=["gather", "scatter"])
def test_compiled(measured, case, size):
    measured(case, **SIZES[size], batch=2, dtype=torch.float32, compiled=True)

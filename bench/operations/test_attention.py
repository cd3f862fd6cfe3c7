"""regional_attention against SDPA per region, SDPA with a dense mask, and FlexAttention with a block mask."""

import pytest
import torch

from instantas.bench import cases

# cross-attention layers of SD 2.0, head size 64
LARGE, SMALL = dict(queries=4096, heads=5), dict(queries=1024, heads=10)


@pytest.fixture
def windows(pytestconfig):
    """On a CPU the two branches of guidance of one window, on a GPU those of four."""
    return 2 if pytestconfig.getoption("device") == "cpu" else 8


@pytest.mark.parametrize("layer, regions", [("64x64", 1), ("64x64", 4), ("32x32", 4), ("32x32", 16)])
def test_hard_regions(measured, windows, layer, regions, dtype):
    sizes = LARGE if layer == "64x64" else SMALL
    measured(cases.attention, regions, windows=windows, **sizes, dtype=dtype, left_out=("reference",))


@pytest.mark.parametrize("mode", ["blend", "joint"])
def test_soft_regions(measured, windows, mode, dtype):
    measured(
        cases.attention,
        4,
        windows=windows,
        **SMALL,
        soft=True,
        mode=mode,
        dtype=dtype,
        left_out=("reference",),
    )


def test_compiled(measured, windows, pytestconfig):
    dtype = torch.float32 if pytestconfig.getoption("device") == "cpu" else torch.bfloat16
    measured(cases.attention, 4, windows=windows, **LARGE, dtype=dtype, compiled=True, left_out=("reference",))

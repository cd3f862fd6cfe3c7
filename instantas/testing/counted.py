"""Run under callgrind by test_instructions.py: each operation at two sizes, the instructions of each call dumped.

valgrind --tool=callgrind --instr-atstart=no python counted.py CONTROL.so
"""

import ctypes
import sys

import torch

from instantas import ops
from instantas.windows import WindowPlan

SIZES = (128, 256)  # cells of the canvas's sides
CHANNELS = 4


def calls(side: int, dtype: torch.dtype) -> dict:
    """name -> (call, elements of its results)."""
    fewest, strided = WindowPlan.minimum_coverage(side, side), WindowPlan.strided(side, side, 64, 32)
    generator = torch.Generator().manual_seed(0)
    canvas = torch.randn(1, CHANNELS, side, side, generator=generator).to(dtype)
    cond, uncond = torch.randn(2, 1, fewest.count, CHANNELS, 64, 64, generator=generator).to(dtype)
    overlapping, weight = ops.gather_windows(canvas, strided), strided.weight("gaussian")
    coefficients = torch.tensor([0.9, -0.1, 0.1], dtype=torch.float64)
    keep = torch.tensor([0.3, 0.9], dtype=torch.float64)
    step = dict(history=canvas[None].clone(), keep=keep)
    query, bank = (torch.randn(*shape, 2, 16, generator=generator).to(dtype) for shape in ((1, 8 * side), (4, 20)))

    def attend(regions):
        ids, weights = torch.arange(regions, dtype=torch.int32)[None], torch.eye(regions)[None]
        return ops.regional_attention(query, bank, bank, ids, weights.repeat_interleave(8 * side // regions, 2))

    return {
        "attention, 1 region": (lambda: attend(1), query.numel()),
        "attention, 4 hard regions": (lambda: attend(4), query.numel()),
        "gather": (lambda: ops.gather_windows(canvas, fewest), cond.numel()),
        "scatter": (lambda: ops.scatter_windows(cond, fewest), canvas.numel()),
        "scatter, weighted overlap": (lambda: ops.scatter_windows(overlapping, strided, weight), canvas.numel()),
        "step": (lambda: ops.guided_step(cond, uncond, canvas, fewest, coefficients, 7.5, **step), canvas.numel()),
    }


def main() -> None:
    control = ctypes.CDLL(sys.argv[1])
    torch.set_num_threads(1)
    with torch.no_grad(), ops.use_backend("cpp"):
        for dtype in (torch.float32, torch.bfloat16):
            for side in SIZES:
                for name, (call, elements) in calls(side, dtype).items():
                    call()  # tables, buffers and everything lazy
                    control.start()
                    call()
                    control.stop(f"{name}, {str(dtype).removeprefix('torch.')}, {elements}".encode())


if __name__ == "__main__":
    main()

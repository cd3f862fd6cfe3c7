"""The host's guided step (csrc/step.h) for every kind of processor whose instructions this one has: the same bits."""

import ctypes

import pytest
import torch

from instantas import ops
from instantas.testing.oracle import PLANS, normal, positive
from instantas.windows import WindowPlan

SOURCE = """
#include "step.h"
using namespace instantas;
template <class T>
int run(int bits, void** p, const int64_t* n, double guidance) {
  using A = arithmetic_t<T>;
  const Plan plan{int(n[0]), int(n[1]), int(n[2]), int(n[3]), int(n[6]), int(n[7]), int(n[8]), int(n[9]),
                  (int32_t*)p[13], (int32_t*)p[14], (int32_t*)p[15]};
  const Update update{(double*)p[10], (double*)p[11], (double*)p[12], int(n[11])};
  const int64_t images = n[10], all = images * plan.channels * plan.canvas_plane();
  const Step<T> step{(T*)p[0], (T*)p[1], (T*)p[2], (T*)p[3], (T*)p[4], (T*)p[5], (T*)p[6], (T*)p[7], (A*)p[8],
                     (A*)p[9], plan.window_plane(), all, A(guidance), update, true, true};
  const Overlap<A> overlap{step.weight, step.weight_stride, n[12] != 0};
  const Numbers<A> numbers(update);
  const int64_t tiles = images * plan.tiles_y() * plan.tiles_x();
  if (bits == 128) return run_128<Advance>(step, numbers, overlap, plan, 0, tiles), 1;
#ifdef __x86_64__
  if (bits == 512 && has_avx512()) return run_512<Advance>(step, numbers, overlap, plan, 0, tiles), 1;
  if (bits == 256 && __builtin_cpu_supports("avx2")) return run_256<Advance>(step, numbers, overlap, plan, 0, tiles), 1;
#endif
  return 0;
}
#define ENTRY(NAME, T) \\
  extern "C" int NAME(int bits, void** p, const int64_t* n, double guidance) { return run<T>(bits, p, n, guidance); }
ENTRY(in_float32, float)
ENTRY(in_float16, Half)
ENTRY(in_bfloat16, BFloat16)
ENTRY(in_float64, double)
"""


@pytest.fixture(scope="module")
def kernels(compiled):
    return compiled(SOURCE, "-O3")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("bits", [128, 256, 512])
def test_a_step_has_the_same_bits_on_every_processor(kernels, bits, dtype):
    if (state := ops.backends()["cpp"]) != "available":
        pytest.skip(f"cpp: {state}")
    moved = WindowPlan.grid(43, 75, (20, 30), [0, 13, 23], [3, 30, 45], partial=True)
    for plan in (moved, PLANS["wrapped"].subset([1, 2]), PLANS["ragged"]):
        shape, windows = (2, 3, plan.height, plan.width), (2, plan.count, 3, *plan.window)
        values = [normal(*windows, seed=1), normal(*windows, seed=2), normal(*shape)]
        values += [normal(2, *shape, seed=3), normal(2, *shape, seed=4)]
        values = [value.to(dtype) for value in values]
        cond, uncond, sample, history, latest = values
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        weight, guidance = positive(plan.count, *plan.window).to(wide), positive(plan.height, plan.width).to(wide)
        if plan.partial:
            weight[:, 2:4] = 0
        numbers = [torch.tensor(n, dtype=torch.float64) for n in ([0.9, -0.4, 0.3, 0.1], [0.7, 0.2], [0.6, 0.8])]
        coefficients, keep, carry = numbers
        results = [torch.empty_like(like) for like in (sample, history, latest)]
        tensors = [*values, *results, weight, guidance, *numbers, *plan.tables(torch.device("cpu"))]
        pointers = (ctypes.c_void_p * len(tensors))(*[tensor.data_ptr() for tensor in tensors])
        counts = [*plan.geometry, plan.count, 3, len(sample), len(history), bool((weight == 0).any())]
        run = getattr(kernels, f"in_{str(dtype)[6:]}")
        if not run(bits, pointers, (ctypes.c_int64 * len(counts))(*counts), ctypes.c_double(1.0)):
            pytest.skip("this processor has no such instructions")
        settings = dict(weight=weight, history=history, keep=keep, latest=latest, carry=carry)
        with ops.use_backend("cpp"):
            right = ops.guided_step(cond, uncond, sample, plan, coefficients, guidance, **settings)
        assert all(map(torch.equal, results, right))

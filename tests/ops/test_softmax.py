"""The host's attention of a tile (csrc/softmax.h) for every kind of processor whose instructions this one has."""

import ctypes

import pytest
import torch

ROWS = 6  # of a tile
SOURCE = """
#include "softmax.h"
using namespace instantas;
template <class A>
int run(int bits, Tile<A> tile, const Prompt<A>* prompts, int64_t count, const A* bias, const A* factor, bool joint) {
  switch (bits) {
    case 128: attend_128(tile, prompts, count, bias, factor, joint); return 1;
#ifdef __x86_64__
    case 256:
      if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return 0;
      attend_256(tile, prompts, count, bias, factor, joint);
      return 1;
    case 512:
      if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512dq")) return 0;
      attend_512(tile, prompts, count, bias, factor, joint);
      return 1;
#endif
  }
  return 0;
}
#define ENTRY(NAME, A)                                                                                               \\
  extern "C" int NAME(int bits, int64_t depth, double scale, const A* queries, A* results, A* logits, int64_t pitch, \\
                      const A* keys, const A* values, int64_t tokens, const A* more_keys, const A* more_values,      \\
                      int64_t more, const A* bias, const A* factor, int joint) {                                      \\
    const Prompt<A> prompts[] = {{keys, values, tokens}, {more_keys, more_values, more}};                            \\
    return run<A>(bits, {depth, A(scale), queries, results, logits, pitch}, prompts, 2, bias, factor, joint);        \\
  }
ENTRY(in_float32, float)
ENTRY(in_float64, double)
"""


@pytest.fixture(scope="module")
def softmax(compiled):
    return compiled(SOURCE, "-O2")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("bits", [128, 256, 512])
@pytest.mark.parametrize("scale", [0.3, 0.0, -0.3])
def test_a_tile_attends_to_two_prompts_by_one_softmax(softmax, scale, bits, dtype):
    lanes, depth = bits // 8 // dtype.itemsize, 21
    whole = lambda count: -(-count // lanes) * lanes  # noqa: E731
    generator = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)  # noqa: E731
    pad = lambda matrix: torch.nn.functional.pad(matrix, (0, whole(matrix.shape[1]) - matrix.shape[1]))  # noqa: E731
    query, keys, values = normal(ROWS, depth), [normal(t, depth) for t in (77, 5)], [normal(t, depth) for t in (77, 5)]
    bias, factor, start = 3 * normal(2, ROWS), normal(ROWS).abs(), normal(ROWS, depth)
    bias[1, 2], keys[0][0] = -200.0, keys[0][0] * 30  # probabilities below the normal numbers, and close to 1
    results = pad(start)
    pitch = whole(77) + whole(5)
    packed = [(pad(k.T.contiguous()), pad(v), len(k)) for k, v in zip(keys, values)]
    arguments = [query, results, normal(ROWS, pitch), pitch, *packed[0], *packed[1], bias, factor, 1]
    given = [ctypes.c_void_p(a.data_ptr()) if isinstance(a, torch.Tensor) else ctypes.c_int64(a) for a in arguments]
    run = getattr(softmax, f"in_{str(dtype)[6:]}")
    if not run(bits, ctypes.c_int64(depth), ctypes.c_double(scale), *given):
        pytest.skip("this processor has no such instructions")
    query, bias, factor, start = (t.double() for t in (query, bias, factor, start))
    logits = torch.cat([query @ k.double().T * scale + b[:, None] for k, b in zip(keys, bias)], 1)
    right = start + factor[:, None] * (logits.softmax(1) @ torch.cat(values).double())
    close = dict(rtol=30 * torch.finfo(dtype).eps, atol=30 * torch.finfo(dtype).eps)
    torch.testing.assert_close(results[:, :depth].double(), right, **close)
    keys[0][:], keys[1][:] = -torch.inf, -torch.inf
    packed, query, results = [pad(k.T.contiguous()) for k in keys], torch.ones_like(arguments[0]), pad(start.to(dtype))
    given[0], given[1], given[4], given[7] = (ctypes.c_void_p(t.data_ptr()) for t in (query, results, *packed))
    for joint in (1, 0):  # jointly, logits that are all -inf have no say
        given[-1] = ctypes.c_int64(joint)
        run(bits, ctypes.c_int64(depth), ctypes.c_double(abs(scale)), *given)
        if scale:
            assert torch.equal(results[:, :depth].double(), start) if joint else results[:, :depth].isnan().all()

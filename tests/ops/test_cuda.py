"""The CUDA kernels: compiled for every architecture without spills, and free of races in the emulation.

What they compute is tested beside the other backends, in `test_operations.py` and `test_examples.py`.
"""

import json
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import instantas
from instantas import ops
from instantas.ops import stamp
from instantas.testing import emulated, oracle
from instantas.testing.oracle import attention_inputs, normal, positive, region_weights
from instantas.windows import WindowPlan

PROGRAM = """
import json
from bench import resources
print(json.dumps([row._asdict() for row in resources.cuda_usage()]))
"""
KERNELS = {"gather", "scatter", "step", "attention", "attention_fma", "grad_query", "grad_key_value", "sum_splits"}
PLAN = WindowPlan.minimum_coverage(23, 37, (10, 16), wrap=(False, True), shift=(0, 5))


@pytest.fixture(scope="module")
def built():
    """What the kernels of the library that was built from these sources use."""
    library = stamp.PACKAGE / "libinstantas_cuda.so"
    pytest.importorskip("triton", reason="its cuobjdump reads the library")
    if reason := stamp.unfit(library, instantas.__version__, torch.__version__):
        pytest.skip(reason)
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=oracle.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def test_no_kernel_spills(built):
    assert {row["kernel"] for row in built} == KERNELS
    for row in built:
        assert row["spilled"] == 0 and 0 < row["registers"] <= 255, row


def test_every_kernel_is_there_for_every_architecture(built):
    kernels = {(row["kernel"], row["case"]) for row in built}
    architectures = {row["architecture"] for row in built}
    assert architectures and len(built) == len(kernels) * len(architectures)


def calls():
    """Name -> (call, arguments): every kernel, over several tiles, prompts and staged blocks of tokens."""
    cond, uncond = (normal(1, PLAN.count, 3, *PLAN.window, seed=s) for s in (1, 2))
    canvas = normal(1, 3, PLAN.height, PLAN.width)

    def step(cond, uncond, sample):
        return ops.guided_step(cond, uncond, sample, PLAN, [0.9, -0.4, 0.3], 7.5, history=sample[None])

    def attention(mode, order=None):
        return lambda *a: ops.regional_attention(*a, mode=mode, order=order)

    bank = [*attention_inputs(1, 37, 1, 40, 3, 90, 4), region_weights(1, 4, 37)]
    yield "gather", lambda x: ops.gather_windows(x, PLAN), [canvas]
    yield "scatter", lambda m: ops.scatter_windows(m, PLAN, positive(*PLAN.window)), [cond]
    yield "step", step, [cond, uncond, canvas]
    yield "blend", attention("blend"), bank
    yield "joint, ordered", attention("joint", ops.region_order(*bank[3:])), bank


@pytest.mark.skipif(not oracle.EMULATED, reason="the emulation needs a compiler and no GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name, call, arguments", [pytest.param(*c, id=c[0]) for c in calls()])
def test_results_do_not_depend_on_the_order_of_threads(name, call, arguments, dtype):
    """Threads that read what another has yet to write, with no barrier between them, give another result then."""
    plain = oracle.run("cuda", call, arguments, dtype, gradients=3)
    for seed in (1, 2):
        with emulated.order(seed):
            assert all(map(torch.equal, oracle.run("cuda", call, arguments, dtype, gradients=3), plain))


@pytest.mark.skipif(not oracle.EMULATED, reason="the emulation needs a compiler and no GPU")
@given(st.integers(1, 2**31 - 1), st.integers(0, 2**31 - 1))
@settings(max_examples=500, deadline=None)
def test_division_by_what_the_host_knows(divisor, dividend):
    """Exact at multiples, just below them, and at the largest numbers; also by small numbers and powers of two."""
    for d in (divisor, divisor % 1000 + 1, 1 << divisor % 31):
        multiple = dividend // d * d
        for number in (dividend, multiple, max(multiple - 1, 0), 2**31 - 1):
            assert emulated.quotient(number, d) == number // d


@pytest.mark.skipif(not oracle.EMULATED, reason="the emulation needs a compiler and no GPU")
def test_means_in_float32_have_the_digits_of_a_division():
    plan = WindowPlan.minimum_coverage(16, 24, 64)
    weight, windows = positive(16, 24), normal(1, 1, 3, 16, 24).float()
    windows[0, 0, 0, 0, :4] = torch.tensor([torch.inf, -torch.inf, 3e38, 1e-44])
    (out,) = oracle.run("cuda", lambda m: ops.scatter_windows(m, plan, weight), [windows], torch.float32)
    assert torch.equal(out, weight * windows[:, 0] / weight)


@pytest.mark.skipif(not oracle.EMULATED, reason="the emulation needs a compiler and no GPU")
@pytest.mark.parametrize("shape", [(32, 48), (16, 20), (7, 9)], ids=["16 bytes", "4 bytes", "one element"])
def test_every_width_of_memory_access(shape):
    plan = WindowPlan.minimum_coverage(*shape, (shape[0] // 2 + 1, shape[1] // 2))
    canvas, windows = normal(1, 9, *shape), normal(1, plan.count, 9, *plan.window)
    for dtype in oracle.DTYPES:
        oracle.judge("cuda", lambda x, p=plan: ops.gather_windows(x, p), [canvas], dtype)
        oracle.judge("cuda", lambda m, p=plan: ops.scatter_windows(m, p), [windows], dtype)


@pytest.mark.skipif(not oracle.EMULATED, reason="the emulation needs a compiler and no GPU")
def test_memory_that_is_not_aligned_is_read_an_element_at_a_time():
    """A view that starts one element into its memory."""
    plan = WindowPlan.minimum_coverage(16, 32, 16)
    query, key, value, ids = attention_inputs(1, 20, 1, 16, 2, 18, 2)
    weights = region_weights(1, 2, 20)

    def shifted(tensor):
        memory = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)
        return memory[1:].view(tensor.shape).copy_(tensor)

    def run(move):
        attend = lambda q, k, v, i, w: ops.regional_attention(move(q), move(k), move(v), i, w)  # noqa: E731
        yield from oracle.run("cuda", attend, [query, key, value, ids, weights], torch.float16)
        yield from oracle.run(
            "cuda", lambda x: ops.gather_windows(move(x), plan), [normal(1, 2, 16, 32)], torch.float16
        )

    assert all(map(torch.equal, run(shifted), run(lambda tensor: tensor)))

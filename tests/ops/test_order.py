"""The order in which attention visits queries: what it groups, how few prompts a tile visits, what never changes."""

import dataclasses
from functools import partial

import pytest
import torch

from instantas import ops
from instantas.ops import backend as dispatch
from instantas.testing import emulated, oracle
from instantas.testing.oracle import BACKENDS, attention_inputs, judge, region_weights, run
from instantas.testing.visits import feathered, layouts, visited

SIDE = 64


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


def sets(ids, weights):
    return (weights > 0) & (ids >= 0)[..., None]


def raster(weights):
    return torch.arange(weights.shape[2]).expand(len(weights), -1)


# The order


@pytest.mark.parametrize("regions", [1, 2, 5, 62, 63, 130])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
def test_equal_sets_come_together_in_raster_order(regions, dtype):
    """A few sets, of up to 130 slots, among them such that differ in the last slot alone; repeated and unused ids."""
    draw = oracle.generator(regions)
    some = torch.rand(6, regions, generator=draw) < 0.5
    some[1] = some[0]
    some[1, -1] ^= True
    some[2] = False
    weights = some[torch.randint(6, (2, 300), generator=draw)].mT * torch.rand(2, regions, 300, generator=draw) + 0.0
    ids = torch.randint(-1, 3, (2, regions), generator=draw)
    order = ops.region_order(ids, weights.to(dtype))
    assert order.dtype == torch.int32 and order.shape == (2, 300)
    for image, numbers in enumerate(order.tolist()):
        assert sorted(numbers) == list(range(300))
        of = [tuple(s) for s in sets(ids, weights.to(dtype))[image].mT.tolist()]
        changes = [of[a] != of[b] for a, b in zip(numbers, numbers[1:])]
        assert 1 + sum(changes) == len(set(of))
        assert all(change or a < b for change, a, b in zip(changes, numbers, numbers[1:]))
        empty = [n for n in numbers if not any(of[n])]
        assert numbers[len(numbers) - len(empty) :] == empty  # last


@pytest.mark.parametrize("shape", [(2, 0, 5), (2, 3, 0), (0, 3, 5), (1, 1, 1)])
def test_an_order_of_little(shape):
    order = ops.region_order(torch.zeros(shape[:2], dtype=torch.int32), torch.ones(shape))
    assert torch.equal(order, torch.arange(shape[2], dtype=torch.int32).expand(shape[0], -1))


def test_neighbours_stay_in_raster_order_however_they_are_numbered():
    """Layers one above the other that fade: raster order is best already, and the regions' numbers mean nothing."""
    (weights,) = (feathered(w, 2) for name, w in layouts(9) if name == "layers")
    ids = torch.arange(9)[None]
    for seed in range(3):
        mixed = weights.flatten(1)[torch.randperm(9, generator=oracle.generator(seed))][None]
        assert torch.equal(ops.region_order(ids, mixed).long(), raster(mixed))


def test_an_order_without_values():
    ids, weights = torch.zeros(2, 3, dtype=torch.int32), torch.ones(2, 3, 8)
    assert ops.region_order(ids.to("meta"), weights.to("meta")).shape == (2, 8)
    compiled = torch.compile(ops.region_order, fullgraph=True, dynamic=True, backend="aot_eager")
    for r, n in ((3, 20), (4, 30)):
        given = torch.arange(r).expand(2, -1), region_weights(2, r, n)
        assert torch.equal(compiled(*given), ops.region_order(*given))


REFUSED = {
    "prompt_ids: expected .B, R. = .any, any., got .3,.": ((3,), (1, 3, 4), torch.int32),
    "prompt_ids: expected torch.int32 or torch.int64, got torch.float32": ((1, 3), (1, 3, 4), torch.float32),
    "weights: expected .B, R, N. = .1, 3, any., got .1, 2, 4.": ((1, 3), (1, 2, 4), torch.int32),
}


@pytest.mark.parametrize("message", REFUSED)
def test_regions_that_have_no_order(message):
    ids, weights, dtype = REFUSED[message]
    with pytest.raises((TypeError, ValueError), match="^" + message):
        ops.region_order(torch.zeros(ids, dtype=dtype), torch.ones(weights))


# Prompts visited


def tiles():
    """Queries of a tile: of the kernels in half precision, for the head sizes of SD 2 and SD 1.5."""
    sizes = {}
    if oracle.EMULATED:
        sizes |= {f"cuda, D = {depth}": emulated.attention_rows(depth) for depth in (64, 80, 160)}
    if "triton" in BACKENDS:
        from instantas.kernels.attention_tiles import launch_options

        sizes |= {
            f"triton, D = {depth}": launch_options(depth, torch.float16, backward=False)["TILE"]
            for depth in (64, 128, 256)
        }
    return sizes


@pytest.mark.parametrize("regions, target", [(4, 1.15), (16, 1.3)])
def test_hard_regions_visit_little_more_than_one_prompt_a_tile(regions, target):
    """Where every border between two sets falls into a tile there is one prompt more for each: no order has fewer.

    With 128 queries a tile that is (32 + 15) / 32 for 16 regions whose sizes are no multiples.
    """
    ids = torch.arange(regions)[None]
    for name, weights in layouts(regions, SIDE):
        weights = weights.flatten(1)[None]
        order = ops.region_order(ids, weights)
        for kernel, rows in tiles().items():
            count = visited(ids, weights, rows, order).item()
            borders = 1 + (regions - 1) * rows / SIDE**2
            assert count <= (max(target, borders) if "blobs" in name else 1.0), (name, kernel, count)
        assert visited(ids, weights, 16, order).item() <= 1.06  # of a warp of the CUDA kernel, which skips by itself


@pytest.mark.parametrize("regions", [4, 16])
@pytest.mark.parametrize("cells", [1, 3, 6])
def test_soft_regions_visit_no_more_prompts_than_in_raster_order(regions, cells):
    ids = torch.arange(regions)[None]
    for name, weights in layouts(regions, SIDE):
        weights = feathered(weights, cells).flatten(1)[torch.randperm(regions, generator=oracle.generator(cells))][None]
        order = ops.region_order(ids, weights)
        for kernel, rows in tiles().items():
            counts = [visited(ids, weights, rows, o).item() for o in (order, None)]
            assert counts[0] <= counts[1], (name, kernel, counts)


def test_visited_counts_what_the_last_tile_lacks_too():
    ids, weights = torch.tensor([[4, 4, -1], [0, -1, -1]]), torch.ones(2, 3, 5)
    weights[0, 1, 2:] = 0
    assert visited(ids, weights, 2).tolist() == [4 / 3, 1.0]


# What never changes


@pytest.mark.parametrize("mode, dtype", [("blend", torch.float16), ("joint", torch.float32)], ids=str)
@pytest.mark.parametrize("hard", [True, False])
def test_results_do_not_depend_on_the_order(backend, mode, dtype, hard):
    """Bit for bit; the gradients of keys and values, which are sums over the queries, within the budget."""
    tensors = [*attention_inputs(2, 70, 1, 16, 3, 12, 3), region_weights(2, 3, 70, hard=hard)]
    order = ops.region_order(*tensors[3:])
    order[1] = torch.randperm(70, generator=oracle.generator(1))

    def attend(query, *rest, mode):
        return ops.regional_attention(query, *rest, mode=mode, order=order.to(query.device))

    plain = run(backend, partial(ops.regional_attention, mode=mode), tensors, dtype, 3)
    got = judge(backend, partial(attend, mode=mode), tensors, dtype, 3, attention=True)
    assert all(map(torch.equal, got[:2], plain))


def test_numbers_that_are_none_of_a_query_are_skipped(backend):
    """The public function refuses them on the CPU; on a GPU they cannot be looked at."""
    if backend in ("reference", "cpp"):
        pytest.skip("takes no notice of an order")
    query, key, value, ids = attention_inputs(1, 20, 1, 8, 3, 9, 2)
    weights, order = region_weights(1, 2, 20, hard=True), torch.arange(20, dtype=torch.int32)[None].clone()
    raw = lambda q, k, v, i, w, o: torch.ops.instantas.regional_attention(q, k, v, i, w, False, 0.3, o)  # noqa: E731
    (plain,) = run(backend, raw, [query, key, value, ids, weights, order], torch.float16)
    order[0, 3], order[0, 7], order[0, 19] = -1, 2**31 - 1, 20
    (got,) = run(backend, raw, [query, key, value, ids, weights, order], torch.float16)
    kept = [n for n in range(20) if n not in (3, 7, 19)]
    assert torch.equal(got[:, kept], plain[:, kept])


@pytest.mark.parametrize("name", [name for name in BACKENDS if oracle.device(name) == "cpu"])
def test_opcheck_with_an_order(name):
    query, key, value, ids = attention_inputs(1, 5, 1, 4, 2, 3, 2)
    tensors = [t.float().requires_grad_() for t in (query, key, value)]
    weights = region_weights(1, 2, 5)
    tail = ids, weights, True, 0.5, ops.region_order(ids, weights)
    with oracle.use_backend(name):
        torch.library.opcheck(torch.ops.instantas.regional_attention.default, (*tensors, *tail))
        grads = [t.detach() for t in (tensors[0], *tensors)]
        torch.library.opcheck(torch.ops.instantas.regional_attention_backward.default, (*grads, *tail))


def test_compiled_with_an_order():
    def attend(query, key, value, ids, weights):
        order = ops.region_order(ids, weights)
        return ops.regional_attention(query, key, value, ids, weights, order=order, scale=0.4)

    query, key, value, ids = attention_inputs(2, 9, 1, 8, 2, 3, 2)
    query, key, value = (t.float().requires_grad_() for t in (query, key, value))
    given = query, key, value, ids, region_weights(2, 2, 9)
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    results = [(out, *torch.autograd.grad(out.sum(), given[:3])) for out in (f(*given) for f in (compiled, attend))]
    torch.testing.assert_close(*results)


def attend(order):
    query, key, value, ids = attention_inputs(1, 4, 1, 8, 2, 3, 2)
    return ops.regional_attention(query, key, value, ids, region_weights(1, 2, 4), order=order)


NO_ORDER = {
    "order: expected a tensor .B, N., got list": [[0, 1, 2, 3]],
    "order: expected .B, N. = .1, 4., got .4,.": torch.arange(4),
    "order: expected torch.int32 or torch.int64, got torch.float32": torch.arange(4.0)[None],
    "order: expected a tensor on cpu, got one on meta": torch.arange(4, device="meta")[None],
    "order: expected 0 to 3, got 1 to 4": torch.arange(1, 5)[None],
    "order: expected 0 to 3, got -1 to 2": torch.arange(-1, 3)[None],
    "order: expected each query's number once": torch.tensor([[0, 1, 1, 3]]),
}


@pytest.mark.parametrize("message", NO_ORDER)
def test_what_is_no_order_is_named(message):
    with pytest.raises((TypeError, ValueError), match="^" + message):
        attend(NO_ORDER[message])


def test_an_order_is_looked_at_whatever_the_default_device_is():
    inputs = attention_inputs(1, 4, 1, 8, 2, 3, 2)
    weights, order = region_weights(1, 2, 4), torch.tensor([[3, 1, 0, 2]])
    with torch.device("meta"):
        attended = ops.regional_attention(*inputs, weights, order=order)
    assert attended.equal(ops.regional_attention(*inputs, weights))


def test_an_order_that_was_changed_is_looked_at_again():
    order = torch.tensor([[3, 2, 1, 0]])
    attend(order)
    order[0, 0] = 2
    with pytest.raises(ValueError, match="^order: expected each query's number once"):
        attend(order)


def test_who_gains_by_an_order():
    cpu = torch.device("cpu")
    assert {name: record.ordered for name, record in dispatch.BACKENDS.items()} == {
        "reference": False,
        "cpp": False,
        "triton": True,
        "cuda": True,
    }
    with ops.use_backend(dataclasses.replace(dispatch.BACKENDS["reference"], ordered=True)):
        assert dispatch.ordered(cpu)
    with ops.use_backend("reference"):
        assert not dispatch.ordered(cpu)

"""A length for each prompt of the bank: what lies beyond takes no part, on any backend, whatever it holds."""

from functools import partial

import pytest
import torch

from instantas import ops
from instantas.testing import oracle
from instantas.testing.oracle import BACKENDS, attention_inputs, judge, region_weights, run

MODES = ["blend", "joint"]
LONGEST = 40
LENGTHS = torch.tensor([5, 40, 1, 33], dtype=torch.int32)


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


def inputs(hard=False, depth=24, longest=LONGEST):
    """Of a repeated prompt among four, an unused slot, and queries without weight."""
    bank = attention_inputs(1, 37, 1, depth, len(LENGTHS), longest, 4)
    return [*bank[:3], torch.tensor([[1, 3, 0, 3]], dtype=torch.int32), region_weights(1, 4, 37, hard=hard)]


def attend(query, key, value, ids, weights, lengths=LENGTHS, **how):
    return ops.regional_attention(query, key, value, ids, weights, lengths=lengths.to(query.device), **how)


def by_hand(query, key, value, ids, weights, mode, lengths=LENGTHS):
    """(B, N, heads, D) in float64, from the formula: each prompt cut to its own tokens."""
    out = torch.zeros_like(query)
    for image, row in enumerate(ids.tolist()):
        slots = [(slot, prompt) for slot, prompt in enumerate(row) if prompt >= 0]
        q, w = query[image], weights[image].double()
        keys, values = ([bank[p, : lengths[p]] for _, p in slots] for bank in (key, value))
        logits = [torch.einsum("nhd,lhd->nhl", q, k) / q.shape[-1] ** 0.5 for k in keys]
        if mode == "blend":
            each = [torch.einsum("nhl,lhd->nhd", s.softmax(-1), v) for s, v in zip(logits, values)]
            total = sum(w[slot] for slot, _ in slots)
            mixed = sum(w[slot][:, None, None] * a for (slot, _), a in zip(slots, each))
            out[image] = torch.where(total[:, None, None] > 0, mixed / total.clamp(min=1e-300)[:, None, None], 0.0)
        else:
            logits = torch.cat([s + w[slot].log()[:, None, None] for (slot, _), s in zip(slots, logits)], -1)
            some = (logits > -torch.inf).any(-1, keepdim=True)  # of a query without weight the gradients are 0 too
            shares = torch.where(some, logits, 0.0).softmax(-1) * some
            out[image] = torch.einsum("nhl,lhd->nhd", shares, torch.cat(values))
    return out


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("hard", [True, False])
def test_the_reference_is_the_formula(mode, hard):
    tensors = inputs(hard)
    need = [t.clone().requires_grad_() for t in tensors[:3]]
    with ops.use_backend("reference"):
        got = attend(*need, *tensors[3:], mode=mode)
    wanted = by_hand(*need, *tensors[3:], mode=mode)
    torch.testing.assert_close(got, wanted)
    grad = oracle.normal(*got.shape, seed=7)
    for own, right in zip(torch.autograd.grad(got, need, grad), torch.autograd.grad(wanted, need, grad)):
        torch.testing.assert_close(own, right)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
def test_every_backend_is_within_the_budget(backend, mode, dtype):
    judge(backend, partial(attend, mode=mode), inputs(), dtype, 3)


@pytest.mark.parametrize("mode", MODES)
def test_prompts_longer_than_a_kernel_takes_at_once(backend, mode):
    lengths = torch.tensor([170, 80, 81, 1])
    judge(backend, partial(attend, mode=mode, lengths=lengths), inputs(depth=64, longest=170), torch.float16)


@pytest.mark.parametrize("mode", MODES)
def test_many_queries_of_a_prompt(mode):
    """As many as the host build hands to flash attention."""
    if "cpp" not in BACKENDS:
        pytest.skip("the host's library is not built")
    bank, ids = attention_inputs(1, 1200, 1, 16, len(LENGTHS), LONGEST, 1)[:3], torch.tensor([[3, 0]])
    weights = torch.stack([torch.arange(1200) < 900, torch.arange(1200) >= 700])[None].float()
    judge("cpp", partial(attend, mode=mode), [*bank, ids, weights], torch.bfloat16)


@pytest.mark.parametrize("mode, dtype", [("blend", torch.float16), ("joint", torch.float32)], ids=str)
def test_what_lies_beyond_is_not_looked_at(backend, mode, dtype):
    """Bit for bit, also where it is NaN or infinite; it has no gradient."""
    tensors = inputs()
    plain = run(backend, partial(attend, mode=mode), tensors, dtype, 3)
    beyond = torch.arange(LONGEST) >= LENGTHS[:, None]
    poisoned = list(tensors)
    for bank, value in ((1, torch.nan), (2, torch.inf)):
        poisoned[bank] = tensors[bank].masked_fill(beyond[:, :, None, None], value)
    got = run(backend, partial(attend, mode=mode), poisoned, dtype, 3)
    assert all(map(torch.equal, got, plain)) and got[0].isfinite().all()
    for bank in got[2:]:
        assert not bank[beyond.to(bank.device)].any() and bank[~beyond.to(bank.device)].any()


@pytest.mark.parametrize("mode, dtype", [("blend", torch.bfloat16), ("joint", torch.float32)], ids=str)
def test_whole_lengths_are_none(backend, mode, dtype):
    tensors = inputs(hard=True)
    whole = torch.full((4,), LONGEST, dtype=torch.int64)
    got = run(backend, partial(attend, mode=mode, lengths=whole), tensors, dtype, 3)
    plain = run(backend, partial(ops.regional_attention, mode=mode), tensors, dtype, 3)
    assert all(map(torch.equal, got, plain))


@pytest.mark.parametrize("mode", MODES)
def test_lengths_with_an_order(backend, mode):
    tensors = inputs()
    order = ops.region_order(*tensors[3:])

    def ordered(query, *rest):
        return attend(query, *rest, mode=mode, order=order.to(query.device))

    got, plain = (run(backend, call, tensors, torch.float16) for call in (ordered, partial(attend, mode=mode)))
    assert torch.equal(got[0], plain[0])


@pytest.mark.parametrize("beyond", [-3, 2**31 - 1])
def test_lengths_that_none_could_look_at_are_the_nearest(backend, beyond):
    """The public function refuses them on the CPU; on a GPU they cannot be looked at."""
    tensors = inputs()
    raw = lambda q, k, v, i, w, n: torch.ops.instantas.regional_attention(q, k, v, i, w, True, 0.3, None, n)  # noqa: E731
    values = beyond, max(1, min(beyond, LONGEST))
    given, nearest = (torch.tensor([4, value, 7, LONGEST], dtype=torch.int32) for value in values)
    got, wanted = (run(backend, raw, [*tensors, n], torch.float32, 3) for n in (given, nearest))
    assert all(map(torch.equal, got, wanted))


@pytest.mark.parametrize("mode", MODES)
def test_second_derivatives(mode):
    query, key, value, ids = attention_inputs(1, 3, 1, 2, 2, 3, 2)
    weights, lengths = region_weights(1, 2, 3), torch.tensor([2, 3])
    call = lambda q, k, v: ops.regional_attention(q, k, v, ids, weights, mode=mode, lengths=lengths)  # noqa: E731
    tensors = [t.requires_grad_() for t in (query, key, value)]
    assert torch.autograd.gradcheck(call, tensors, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, tensors, fast_mode=True)


@pytest.mark.parametrize("name", [name for name in BACKENDS if oracle.device(name) == "cpu"])
def test_opcheck(name):
    query, key, value, ids = attention_inputs(1, 5, 1, 4, 2, 3, 2)
    tensors = [t.float().requires_grad_() for t in (query, key, value)]
    tail = ids, region_weights(1, 2, 5), True, 0.5, None, torch.tensor([2, 3], dtype=torch.int32)
    with oracle.use_backend(name):
        torch.library.opcheck(torch.ops.instantas.regional_attention.default, (*tensors, *tail))
        grads = [t.detach() for t in (tensors[0], *tensors)]
        torch.library.opcheck(torch.ops.instantas.regional_attention_backward.default, (*grads, *tail))


@pytest.mark.parametrize("scale", [None, 0.4])
def test_compiled(scale):
    query, key, value, ids = attention_inputs(2, 9, 1, 8, 2, 3, 2)
    query, key, value = (t.float().requires_grad_() for t in (query, key, value))
    given = query, key, value, ids, region_weights(2, 2, 9), torch.tensor([1, 3])
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    results = []
    for call in (compiled, attend):
        out = call(*given, scale=scale)
        results.append((out, *torch.autograd.grad(out.sum(), given[:3])))
    torch.testing.assert_close(*results)


def test_transforms():
    """Of a batch of lengths, and of gradients beside them."""
    query, key, value, ids = (t.float() if t.is_floating_point() else t for t in attention_inputs(1, 5, 1, 4, 2, 3, 2))
    weights, lengths = region_weights(1, 2, 5), torch.tensor([[1, 3], [2, 2], [3, 1]], dtype=torch.int32)
    call = lambda q, n: torch.ops.instantas.regional_attention(q, key, value, ids, weights, False, 0.5, None, n)  # noqa: E731
    each = torch.stack([call(query, n) for n in lengths])
    torch.testing.assert_close(torch.func.vmap(call, (None, 0))(query, lengths), each)
    own = torch.func.grad(lambda q: call(q, lengths[0]).square().sum())(query)
    asked = query.clone().requires_grad_()
    torch.testing.assert_close(own, torch.autograd.grad(call(asked, lengths[0]).square().sum(), asked)[0])


NO_LENGTHS = {
    "lengths: expected a tensor .P,., got list": [1, 2, 3, 4],
    "lengths: expected .P,. = .4., got .3,.": torch.ones(3, dtype=torch.int32),
    "lengths: expected torch.int32 or torch.int64, got torch.float32": torch.ones(4),
    "lengths: expected a tensor on cpu, got one on meta": torch.ones(4, dtype=torch.int32, device="meta"),
    "lengths: expected 1 to 40, got 0 to 5": torch.tensor([0, 5, 1, 1]),
    "lengths: expected 1 to 40, got 1 to 41": torch.tensor([1, 41, 1, 1]),
}


@pytest.mark.parametrize("message", NO_LENGTHS)
def test_what_are_no_lengths_is_named(message):
    with pytest.raises((TypeError, ValueError), match="^" + message):
        ops.regional_attention(*inputs(), lengths=NO_LENGTHS[message])

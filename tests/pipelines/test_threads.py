"""One network in several threads: each has its own regions or none, and the network is clean when the last is done."""

import asyncio
import contextlib
import contextvars
import itertools
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from instantas.pipelines.attention import RegionalAttnProcessor, regional_prompts
from instantas.regions import Region
from instantas.testing import tiny

ALL, LEFT, RIGHT = (0.0, 0.0, 1.0, 1.0), (0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)


@pytest.fixture(scope="module")
def embedded():
    generator = torch.Generator().manual_seed(0)
    return {word: torch.randn(1, 16, 32, generator=generator) for word in ("grass", "sky", "stone")}


@pytest.fixture(scope="module")
def sample():
    return torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def unet():
    return tiny.unet()


def regional(unet, embedded, *regions):
    return regional_prompts(
        unet, regions, encode=lambda texts: torch.cat([embedded[t] for t in texts]), classifier_free_guidance=False
    )


def marks(unet):
    hooks = [(len(m._forward_pre_hooks), len(m._forward_hooks)) for m in unet.modules()]
    return dict(unet.attn_processors), hooks, unet._compiled_call_impl


def evaluate(unet, sample, embedded):
    with torch.no_grad():
        return unet(sample, 500, embedded["stone"]).sample


def in_thread(function, *arguments):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function, *arguments).result(60)


def expected(unet, sample, embedded, *regions):
    with regional(unet, embedded, *regions):
        return evaluate(unet, sample, embedded)


def test_two_threads_each_with_its_own_regions_and_one_without(unet, sample, embedded):
    """All inside at once, and leaving in another order than they came."""
    kinds = [(Region("grass", box=ALL),), (Region("sky", box=LEFT), Region("grass", box=RIGHT)), None]
    wanted = [evaluate(unet, sample, embedded) if k is None else expected(unet, sample, embedded, *k) for k in kinds]
    before, together, turns = marks(unet), threading.Barrier(3), [threading.Event() for _ in kinds]

    def run(number):
        with contextlib.nullcontext() if kinds[number] is None else regional(unet, embedded, *kinds[number]):
            together.wait(60)
            got = [evaluate(unet, sample, embedded) for _ in range(3)]
            if number:
                turns[number - 1].wait(60)  # the first to come in leaves first
            got.append(evaluate(unet, sample, embedded))
        turns[number].set()
        return got

    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(run, range(3)))
    assert all(torch.equal(got, want) for all_got, want in zip(found, wanted) for got in all_got)
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(wanted, 2))
    assert marks(unet) == before


@torch.no_grad()
def test_a_thread_without_regions_inside_of_a_block(unet, sample, embedded):
    plain = evaluate(unet, sample, embedded)
    with regional(unet, embedded, Region("grass", box=ALL)):
        inside = evaluate(unet, sample, embedded)
        assert torch.equal(in_thread(evaluate, unet, sample, embedded), plain)
        assert torch.equal(evaluate(unet, sample, embedded), inside)
        context = contextvars.copy_context()  # what is started with a copy of the context belongs to the block
        assert torch.equal(in_thread(context.run, evaluate, unet, sample, embedded), inside)
    assert not torch.equal(inside, plain)


def test_an_evaluation_on_its_way_while_regions_come_and_go(unet, sample, embedded):
    plain, before = evaluate(unet, sample, embedded), marks(unet)
    block, context = regional(unet, embedded, Region("grass", box=ALL)), contextvars.copy_context()
    for change in (block.__enter__, lambda: block.__exit__(None, None, None)):

        def halfway(*_, change=change):
            in_thread(context.run, change)

        hook = unet.mid_block.register_forward_pre_hook(halfway)
        assert torch.equal(evaluate(unet, sample, embedded), plain)
        hook.remove()
    assert marks(unet) == before


def test_tasks_of_one_event_loop(unet, sample, embedded):
    """As in a server: a block around a pipeline's call in a worker thread, several requests in turn and at once."""
    kinds = {"grass": (Region("grass", box=ALL),), "sky": (Region("sky", box=LEFT),), "none": None}
    wanted = {name: k and expected(unet, sample, embedded, *k) for name, k in kinds.items()}
    wanted["none"], before = evaluate(unet, sample, embedded), marks(unet)

    async def request(name):
        with contextlib.nullcontext() if kinds[name] is None else regional(unet, embedded, *kinds[name]):
            await asyncio.sleep(0)
            return name, await asyncio.to_thread(evaluate, unet, sample, embedded)

    async def serve():
        return await asyncio.gather(*(request(name) for name in [*kinds] * 3))

    for name, got in asyncio.run(serve()):
        assert torch.equal(got, wanted[name]), name
    assert marks(unet) == before


def test_compiled_networks_too(unet, sample, embedded):
    plain = evaluate(unet, sample, embedded)
    inside = expected(unet, sample, embedded, Region("grass", box=ALL))
    torch._dynamo.reset()
    compiled = torch.compile(unet, backend="eager", fullgraph=True)
    with regional(compiled, embedded, Region("grass", box=ALL)):
        for _ in range(2):
            assert torch.equal(evaluate(compiled, sample, embedded), inside)
            assert torch.equal(in_thread(evaluate, compiled, sample, embedded), plain)
    torch._dynamo.reset()


@pytest.mark.parametrize("network", ["plain", "compiled in place"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_installation_leaves_nothing(unet, sample, embedded, monkeypatch, error, network):
    """At every layer, block and hook in turn."""
    if network == "compiled in place":
        unet.compile(backend="eager")
    before, points = marks(unet), 0
    kind = type(next(m for m in unet.modules() if hasattr(m, "set_processor") and hasattr(m, "to_q")))
    for owner, name in ((kind, "set_processor"), (torch.nn.Module, "register_forward_pre_hook")):
        usual = getattr(owner, name)
        for failing in itertools.count():
            calls = itertools.count()

            def interrupted(self, *args, usual=usual, calls=calls, failing=failing, **kwargs):
                if next(calls) == failing:
                    raise error("now")
                return usual(self, *args, **kwargs)

            with monkeypatch.context() as patch, contextlib.ExitStack() as stack:
                patch.setattr(owner, name, interrupted)
                try:
                    stack.enter_context(regional(unet, embedded, Region("grass", box=ALL)))
                except error:
                    points += 1
                else:
                    patch.undo()
                    break
            assert marks(unet) == before
    assert marks(unet) == before and points > 8
    assert not any(isinstance(p, RegionalAttnProcessor) for p in unet.attn_processors.values())


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_interrupt_while_a_block_is_left(unet, embedded, monkeypatch, error):
    before, kind = marks(unet), type(unet.mid_block.attentions[0].transformer_blocks[0].attn2)
    usual, layers = kind.set_processor, len([name for name in before[0] if "attn2" in name])
    for failing in range(layers):
        calls = itertools.count()

        def interrupted(self, processor, calls=calls, failing=failing):
            if next(calls) == failing + layers:
                raise error("now")
            usual(self, processor)

        with monkeypatch.context() as patch, pytest.raises(error):
            patch.setattr(kind, "set_processor", interrupted)
            with regional(unet, embedded, Region("grass", box=ALL)):
                pass
        assert marks(unet) == before


def test_one_failing_thread_does_not_disturb_the_other(unet, sample, embedded):
    inside, before = expected(unet, sample, embedded, Region("sky", box=LEFT)), marks(unet)

    def failing():
        with regional(unet, embedded, Region("grass", box=ALL)):
            raise KeyboardInterrupt

    with regional(unet, embedded, Region("sky", box=LEFT)):
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                in_thread(failing)
            assert torch.equal(evaluate(unet, sample, embedded), inside)
    assert marks(unet) == before


def test_twice_in_one_thread_is_an_error_and_changes_nothing(unet, sample, embedded):
    inside, before = expected(unet, sample, embedded, Region("sky", box=LEFT)), marks(unet)
    with regional(unet, embedded, Region("sky", box=LEFT)):
        with pytest.raises(ValueError, match="^model: expected a network without regional prompts"):
            with regional(unet, embedded, Region("grass", box=ALL)):
                pass
        assert torch.equal(evaluate(unet, sample, embedded), inside)
    assert marks(unet) == before


def test_two_networks_in_one_thread_left_in_any_order(sample, embedded):
    nets = [tiny.unet(), tiny.unet()]
    plain = evaluate(nets[0], sample, embedded)
    inside = expected(nets[0], sample, embedded, Region("sky", box=LEFT))
    first, second = (regional(net, embedded, Region("sky", box=LEFT)) for net in nets)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert torch.equal(evaluate(nets[0], sample, embedded), plain)
    assert torch.equal(evaluate(nets[1], sample, embedded), inside)
    second.__exit__(None, None, None)
    assert torch.equal(evaluate(nets[1], sample, embedded), plain)

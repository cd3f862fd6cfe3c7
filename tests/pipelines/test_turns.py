"""Threads on one pipeline, and other default devices: the picture is that of one thread on the host."""

import threading
from concurrent.futures import ThreadPoolExecutor

import diffusers
import numpy as np
import pytest
import torch

from instantas.pipelines.attention import regional_prompts
from instantas.pipelines.pipeline import InstantASPipeline
from instantas.pipelines.turns import turn
from instantas.regions import Region, RegionMap
from instantas.testing import tiny

NATIVE = tiny.WINDOW * tiny.CELL


def paint(pipe, seed=0, **call):
    call = dict(prompt="wall", num_inference_steps=3, guidance_scale=4.0, output_type="latent") | call
    return pipe(**call, generator=torch.Generator().manual_seed(seed)).images


@pytest.mark.parametrize("kind", [diffusers.DDIMScheduler, diffusers.EulerAncestralDiscreteScheduler])
def test_threads_take_turns(kind):
    """With schedules of their own, regions and guidance that changes; on two pipelines around the same components."""
    theirs = tiny.tiny_pipeline(scheduler=tiny.scheduler(kind=kind))
    pipes = [InstantASPipeline.from_pipe(theirs), InstantASPipeline.from_pipe(type(theirs)(**theirs.components))]

    def strong(pipe, i, t, tensors):
        pipe._guidance_scale = 9.0

    calls = [
        dict(num_inference_steps=2),
        dict(num_inference_steps=5, width=2 * NATIVE),
        dict(regions=[Region("grass", box=(0.0, 0.0, 0.5, 1.0))]),
        dict(callback_on_step_end=strong),
        dict(guidance_scale=1.0),
    ]
    alone = [paint(pipes[0], seed, **call) for seed, call in enumerate(calls)]
    with ThreadPoolExecutor(len(calls)) as pool:
        made = [
            pool.submit(paint, pipe, seed, **call) for pipe in pipes for seed, call in enumerate(calls) for _ in "ab"
        ]
        together = [future.result() for future in made]
    assert all(torch.equal(a, b) for a, b in zip([a for _ in pipes for a in alone for _ in "ab"], together))


def test_the_next_has_its_turn_after_an_error():
    pipe = InstantASPipeline.from_pipe(tiny.tiny_pipeline())

    def fail(*args):
        raise KeyError("mine")

    wanted = paint(pipe)
    with ThreadPoolExecutor(2) as pool:
        failing = [pool.submit(paint, pipe, callback_on_step_end=fail) for _ in range(2)]
        right = pool.submit(paint, pipe)
        assert all(isinstance(future.exception(), KeyError) for future in failing)
        assert torch.equal(right.result(), wanted)


def test_a_call_inside_of_a_callback_is_a_turn_of_the_same_thread():
    pipe = InstantASPipeline.from_pipe(tiny.tiny_pipeline())
    inner = []

    def callback(pipe, i, t, tensors):
        if i == 2:
            inner.append(paint(pipe, 5))

    paint(pipe, callback_on_step_end=callback)
    assert torch.equal(inner[0], paint(pipe, 5))


def test_turns_of_several_parts_do_not_wait_for_each_other_for_ever():
    class Part:
        pass

    first, second, third = Part(), Part(), Part()
    inside, most = [], []

    def work(*parts):
        for _ in range(200):
            with turn(*parts), turn(*reversed(parts)):
                inside.append(parts)
                most.append(len(inside))
                inside.remove(parts)

    threads = [threading.Thread(target=work, args=parts) for parts in ((first, second), (second, third, first))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
        assert not thread.is_alive()
    assert len(most) == 400 and max(most) == 1


@pytest.mark.parametrize(
    "call", [{}, dict(width=200), dict(method="multidiffusion"), dict(guidance_rescale=0.5)], ids=str
)
@pytest.mark.parametrize("make", [tiny.tiny_pipeline, tiny.tiny_xl_pipeline])
def test_another_default_device_makes_no_difference(make, call):
    pipe, seen = InstantASPipeline.from_pipe(make()), []
    mask = np.random.default_rng(0).random((NATIVE, call.get("width", NATIVE)))

    def callback(pipe, i, t, tensors):
        seen.append(torch.zeros(1).device.type)

    def regions():
        return [Region("grass", mask=mask), Region("sky", box=(0.0, 0.5, 1.0, 1.0), feather=9)]

    wanted = paint(pipe, **call, regions=regions(), output_type="np")
    with torch.device("meta"):
        got = paint(pipe, **call, regions=regions(), output_type="np", callback_on_step_end=callback)
    assert np.array_equal(got, wanted) and seen == ["meta"] * 3


def test_a_distilled_model_on_another_default_device():
    pipe = InstantASPipeline.from_pipe(
        tiny.tiny_pipeline(
            kind=diffusers.LatentConsistencyModelPipeline,
            unet=tiny.unet(time_cond_proj_dim=8),
            scheduler=tiny.scheduler(kind=diffusers.LCMScheduler),
        )
    )
    wanted = paint(pipe, output_type="np")
    with torch.device("meta"):
        assert np.array_equal(paint(pipe, output_type="np"), wanted)


def test_regions_in_a_network_of_ones_own_on_another_default_device():
    network, regions = tiny.unet(), [Region(None, embeds=torch.ones(3, 32), box=(0.0, 0.0, 0.5, 1.0), feather=9)]
    x, timestep, prompts = torch.linspace(-1, 1, 1024).reshape(1, 4, 16, 16), torch.tensor(5), torch.zeros(1, 3, 32)

    def evaluated():
        with torch.no_grad(), regional_prompts(network, regions, classifier_free_guidance=False):
            return network(x, timestep, prompts).sample

    with torch.device("meta"):
        shares = RegionMap(regions, 160, 240).shares(0.0)
    assert shares.equal(RegionMap(regions, 160, 240).shares(0.0))
    wanted = evaluated()
    with torch.device("meta"):
        assert evaluated().equal(wanted)

"""Eight threads on one pipeline, with regions and without, some of them failing: every finished picture is right.

`SOAK_SECONDS=60` makes it longer than the few seconds that it takes among the other tests.
"""

import os
import random
import threading
import time

import pytest
import torch

from instantas import InstantASPipeline, Region, regional_prompts
from instantas.testing.tiny import tiny_pipeline

SECONDS = float(os.environ.get("SOAK_SECONDS", 4))
THREADS = 8
LEFT, RIGHT = (0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)
JOBS = (  # what is asked for; each has a seed of its own
    dict(prompt="a red wall", width=128),
    dict(prompt="green grass", width=200),
    dict(prompt="a red wall", width=128, regions=[Region("green grass", box=LEFT)]),
    dict(prompt="blue water", width=200, regions=[Region("stone", box=RIGHT, start=0.5)], region_mode="joint"),
)


class Stopped(Exception):
    """Raised by a callback in the middle of a run."""


def paint(pipe, job, stop=None):
    """The picture of a job; `stop`: what is raised after its first step."""

    def callback(pipe, step, timestep, tensors):
        if stop is not None:
            raise stop
        return {}

    generator = torch.Generator().manual_seed(JOBS.index(job))
    settings = dict(height=128, num_inference_steps=2, generator=generator, output_type="pt")
    return pipe(**job, **settings, callback_on_step_end=callback).images


def hooks(network):
    return [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in network.modules()]


@pytest.mark.parametrize("surrounding", ["none", "regional_prompts"])
def test_every_finished_picture_is_the_one_of_a_single_thread(surrounding):
    """`regional_prompts`: a thread of plain diffusers calls with regions runs beside them, on the same network."""
    held = tiny_pipeline()
    pipe = InstantASPipeline.from_pipe(held)
    clean = {name: type(processor) for name, processor in held.unet.attn_processors.items()}, hooks(held.unet)
    expected = [paint(pipe, job) for job in JOBS]
    x, text = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(9)), torch.ones(2, 16, 32)

    def evaluate():
        with torch.no_grad(), regional_prompts(held, [Region("stone", box=LEFT)], classifier_free_guidance=True):
            return held.unet(x, 10, text).sample

    alone = evaluate()
    finished, stopped, wrong, end = [0] * THREADS, [0] * THREADS, [], time.monotonic() + SECONDS

    def work(number):
        draw, rounds = random.Random(number), 0
        while rounds < 1 or time.monotonic() < end:
            rounds += 1
            if surrounding == "regional_prompts" and number == 0:
                if not torch.equal(evaluate(), alone):
                    wrong.append("an evaluation inside of regional_prompts")
                continue
            which = draw.randrange(len(JOBS))
            stop = draw.choice([None, None, Stopped(), KeyboardInterrupt()])
            try:
                picture = paint(pipe, JOBS[which], stop)
            except (Stopped, KeyboardInterrupt) as error:
                assert error is stop
                stopped[number] += 1
                continue
            finished[number] += 1
            if not torch.equal(picture, expected[which]):
                wrong.append(f"job {which} in thread {number}")

    threads = [threading.Thread(target=work, args=(number,)) for number in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=SECONDS + 120)
    assert not any(thread.is_alive() for thread in threads) and not wrong
    assert sum(finished) + sum(stopped) >= THREADS - 1
    assert ({n: type(p) for n, p in held.unet.attn_processors.items()}, hooks(held.unet)) == clean
    assert torch.equal(paint(pipe, JOBS[0]), expected[0])
    print(f"{surrounding}: {sum(finished)} pictures finished, all right; {sum(stopped)} stopped")

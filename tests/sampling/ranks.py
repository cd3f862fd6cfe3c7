"""Runs that processes share, beside those of one process: what each gave, as JSON.

`python ranks.py FOLDER`. Four processes are forked from one that has imported everything; smaller groups are parts of
them. Every process seeds its latents and generators otherwise, as rank 0's count.
"""

import contextlib
import faulthandler
import functools
import gc
import json
import os
import signal
import socket
import sys
import time
import traceback
import weakref
from datetime import timedelta
from pathlib import Path

import diffusers
import torch
import torch.distributed as dist
from PIL import Image

from instantas import cli
from instantas.pipelines.pipeline import InstantASPipeline
from instantas.regions import Region
from instantas.sampling.checkpoint import Checkpoint
from instantas.sampling.parallel import Ranks
from instantas.sampling.sampler import sample
from instantas.testing import tiny
from instantas.windows import WindowPlan
from tests.sampling.coding import CODE_FAILURES, CODED
from tests.sampling.hosting import HOST_FAILURES, HOSTS

RANKS = 4
TIMEOUT = 5  # seconds, of a stopped process
PATIENCE = 300  # seconds after which a process that hangs says where
PLAN = WindowPlan.minimum_coverage(20, 40, 16)  # 2 x 3 windows that overlap
WRAPPED = WindowPlan.minimum_coverage(16, 48, 16, wrap=(False, True))
NETWORK = tiny.unet()
TEXTS = torch.randn(2, 4, 32, generator=torch.Generator().manual_seed(0))
REGIONS = [Region("green grass", box=(0.0, 0.5, 1.0, 1.0), guidance_scale=4.0), Region("sky", box=(0.5, 0.0, 1.0, 0.4))]


def guided(windows, timestep, context):
    both = NETWORK(torch.cat([windows] * 2), timestep, TEXTS.repeat_interleave(len(windows), 0), return_dict=False)[0]
    uncond, cond = both.chunk(2)
    return cond, uncond


def unguided(windows, timestep, context):
    return NETWORK(windows, timestep, TEXTS[:1].expand(len(windows), -1, -1), return_dict=False)[0]


def sampled(group, rank, denoiser=guided, scheduler="DDIM", plan=PLAN, pictures=1, generators=1, **settings):
    seeds = [torch.Generator().manual_seed(seed + 100 * rank) for seed in (3, 4)]
    generator = (None, seeds[0], seeds)[generators]
    torch.manual_seed(5 + rank)
    latents = torch.randn(pictures, 4, plan.height, plan.width, generator=seeds[0])
    given = dict(num_inference_steps=3, guidance_scale=3.0, bridging="shift", window_batch_size=2)
    schedule = tiny.scheduler(kind=getattr(diffusers, scheduler + "Scheduler"))
    with torch.no_grad():
        found = sample(denoiser, latents, plan, schedule, generator=generator, group=group, **(given | settings))
    states = [seed.get_state() for seed in seeds[:generators]] if generators else [torch.get_rng_state()]
    return [found, *states]


def painted(group, rank, make=tiny.tiny_pipeline, **settings):
    pipe, generator = InstantASPipeline(make()), torch.Generator().manual_seed(3 + 100 * rank)
    asked = dict(height=136, width=200, num_inference_steps=2, guidance_scale=3.0, output_type="pt")
    asked |= dict(window_batch_size=2, generator=generator, group=group)
    return [pipe("a red wall", **(asked | settings)).images, generator.get_state()]


def again(group, rank, **settings):
    """The second of two like runs."""
    painted(group, rank, **settings)
    return painted(group, rank, **settings)


def of(pipeline, **components):
    return functools.partial(tiny.tiny_pipeline, kind=getattr(diffusers, pipeline + "Pipeline"), **components)


def replacing(step, timestep, latents):
    return latents * 1.1 if step == 1 else None


def in_place(step, timestep, latents):
    latents.mul_(1.1)


def ending(step, timestep, latents):
    if step == 1:
        raise StopIteration(latents + 1)


def changing(pipe, step, timestep, tensors):
    if step == 0:
        pipe._guidance_scale = 6.0
        return dict(prompt_embeds=tensors["prompt_embeds"] * 0.5, latents=tensors["latents"] * 1.1)
    pipe._interrupt = step == 1
    return {}


def resumed(group, rank, **settings):
    """Stopped by a callback, and gone on from with another number of processes."""
    path, settings = Path(sys.argv[1], "run.checkpoint"), dict(scheduler="EulerAncestralDiscrete") | settings
    if group is None:
        return sampled(None, 0, **settings)
    alone = dist.new_group([0], use_local_synchronization=True) if rank == 0 else None
    if rank == 0:
        path.unlink(missing_ok=True)

        def stop(step, timestep, latents):
            if step == 0:
                raise StopIteration

        sampled(alone, 0, checkpoint=Checkpoint(path), callback=stop, **settings)
        dist.destroy_process_group(alone)
    elsewhere = path if rank == 0 else "/nowhere/run.checkpoint"  # rank 0 has the file
    return sampled(group, rank, checkpoint=elsewhere, **settings)


PHOTO = Image.linear_gradient("L").convert("RGB")
MASK = Image.linear_gradient("L").point(lambda level: 255 * (level > 150))

CASES = {
    **{f"batches of {n}": functools.partial(sampled, window_batch_size=n) for n in (1, 3, None)},
    **{
        f"bridging {name}": functools.partial(sampled, bridging=name, num_inference_steps=5)
        for name in ("none", "economy", "dilated", "shift+moments")
    },
    **{
        f"{name}, {generators} generators": functools.partial(
            sampled, scheduler=name, generators=generators, pictures=1 + (generators == 2)
        )
        for name, generators in (
            ("EulerAncestralDiscrete", 1),
            ("DDPM", 2),
            ("LCM", 0),
            ("DPMSolverMultistep", 1),
        )
    },
    "no guidance": functools.partial(sampled, denoiser=unguided),
    "rescaled guidance": functools.partial(sampled, guidance_rescale=0.7),
    "a map of guidance": functools.partial(sampled, guidance_scale=torch.linspace(1, 5, 40).expand(20, 40)),
    "an axis that wraps": functools.partial(sampled, plan=WRAPPED),
    "overlap weights": functools.partial(sampled, bridging=None, weight=PLAN.weight("gaussian")),
    "MultiDiffusion": functools.partial(sampled, plan=WindowPlan.strided(20, 24, 16, 4), bridging=None),
    "a callback that replaces": functools.partial(sampled, callback=replacing),
    "a callback that changes in place": functools.partial(sampled, callback=in_place),
    "a callback that ends the run": functools.partial(sampled, callback=ending),
    "a coarse start": functools.partial(sampled, start="coarse", num_inference_steps=5),
    "ended on a smaller canvas": functools.partial(sampled, start="coarse", num_inference_steps=5, callback=ending),
    "resumed": resumed,
    "resumed on a smaller canvas": functools.partial(resumed, start="coarse", num_inference_steps=5),
    "regions, blended": functools.partial(painted, regions=REGIONS),
    "regions, joint": functools.partial(painted, regions=REGIONS, region_mode="joint"),
    "regions of MultiDiffusion": functools.partial(painted, regions=REGIONS, method="multidiffusion", stride=8),
    "ControlNet": functools.partial(
        painted, make=of("StableDiffusionControlNet", controlnet=tiny.tiny_controlnet()), image=PHOTO
    ),
    "SDXL": functools.partial(painted, make=tiny.tiny_xl_pipeline),
    "from a picture": functools.partial(painted, image=PHOTO, strength=0.7),
    "a mask": functools.partial(painted, image=PHOTO, mask_image=MASK, height=256, width=256),
    "latent consistency": functools.partial(
        painted,
        make=of(
            "LatentConsistencyModel",
            unet=tiny.unet(time_cond_proj_dim=8),
            scheduler=tiny.scheduler(kind=diffusers.LCMScheduler),
        ),
        num_images_per_prompt=2,
    ),
    "diffusers' callback": functools.partial(
        painted,
        num_inference_steps=3,
        callback_on_step_end=changing,
        callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"],
    ),
    "the same callback in a second run": functools.partial(
        again, callback_on_step_end=changing, callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"]
    ),
}
CASES |= HOSTS | CODED


class Unlike:
    """A denoiser that says its prompt."""

    def __init__(self, prompt):
        self.prompt = prompt

    def fingerprint(self):
        return dict(prompt=self.prompt)

    def __call__(self, windows, timestep, context):
        return windows / 2


def plain(windows, timestep, context):
    return windows / 2


class Failing:
    """A denoiser, or a callback, that does something at a step in some processes."""

    def __init__(self, act=None):
        self.act = act

    def __call__(self, given, timestep, context):
        if self.act is not None and getattr(context, "step", 1) == 1:
            return self.act(given)
        return given / 2


def throw(error):
    def act(given):
        raise error

    return act


def only(rank, mine, act):
    return act if rank == mine else None


NO_MEMORY = torch.OutOfMemoryError("none left")
FAILURES = {  # what rank 1 does otherwise than the others, or all do: arguments of `sampled`
    "exception": lambda rank: dict(denoiser=Failing(only(rank, 1, throw(KeyError("mine"))))),
    "out of memory": lambda rank: dict(denoiser=Failing(only(rank, 1, throw(NO_MEMORY))), window_batch_size=1),
    "Ctrl-C": lambda rank: dict(denoiser=Failing(only(rank, 1, throw(KeyboardInterrupt())))),
    "callback": lambda rank: dict(denoiser=plain, callback=lambda *_: throw(ZeroDivisionError("in it"))(0)),
    "callback's latents": lambda rank: dict(denoiser=plain, callback=lambda step, t, x: torch.cat([x, x])),
    "two at once": lambda rank: dict(
        denoiser=Failing(only(rank > 0, True, throw(KeyError(f"of {rank}")))), window_batch_size=1
    ),
    "predictions": lambda rank: dict(denoiser=Failing(only(rank, 1, lambda windows: (windows, windows)))),
    "argument": lambda rank: dict(denoiser=plain, eta=7.0 if rank == 1 else 0.0),
    "other guidance": lambda rank: dict(denoiser=plain, guidance_scale=3.0 + (rank == 1)),
    "other batches": lambda rank: dict(denoiser=plain, window_batch_size=2 + (rank == 1)),
    "other plan": lambda rank: dict(denoiser=plain, plan=WRAPPED if rank == 1 else PLAN, bridging=None),
    "other steps": lambda rank: dict(denoiser=plain, num_inference_steps=3 + (rank == 1)),
    "other prompt": lambda rank: dict(denoiser=Unlike("lava" if rank == 1 else "snow")),
    "callback of one": lambda rank: dict(denoiser=plain, callback=in_place if rank == 0 else None),
    "cuda_graph": lambda rank: dict(denoiser=plain, cuda_graph=True),
}


def halved(group, rank):
    """Memory runs out in one process for batches of more than one: the others go on as they were."""

    def act(windows):
        if len(windows) > 1:
            raise NO_MEMORY
        return windows / 2

    with contextlib.ExitStack() as stack:
        if rank == 1:
            import pytest

            stack.enter_context(pytest.warns(UserWarning, match="out of memory with 2 windows at once"))
        return sampled(group, rank, denoiser=Failing(only(rank, 1, act)))


def let_go(group, rank):
    """Whether the windows with which one process fails are held no longer, once its error is gone."""
    seen = []

    def act(windows):
        seen.append(weakref.ref(windows))
        raise KeyError("mine")

    said(lambda: sampled(group, rank, denoiser=Failing(only(rank, 1, act))))
    gc.collect()
    return len(seen) == (rank == 1) and not any(held() is not None for held in seen)


def said(function):
    """What a function gives, or the name of its error and what it says."""
    try:
        return function()
    except BaseException as error:
        return f"{type(error).__name__}: {error}"


def equal(found, wanted):
    return all(torch.equal(a, b) for a, b in zip(found, wanted)) and len(found) == len(wanted)


def share(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    groups = {n: dist.new_group(list(range(n)), timeout=timedelta(minutes=5)) for n in (2, 3, 4)}
    mine = {name: case(None, 0) for i, (name, case) in enumerate(CASES.items()) if i % RANKS == rank}
    everyone = [None] * RANKS
    dist.all_gather_object(everyone, mine)
    wanted = {name: found for some in everyone for name, found in some.items()}
    results = {}
    for i, (name, case) in enumerate(CASES.items()):
        n = 2 + i % 3
        if rank < n:
            found = said(lambda case=case, n=n: case(groups[n], rank))
            results[f"{name} at {n}"] = found if isinstance(found, str) else equal(found, wanted[name])
    for name, told in FAILURES.items():
        if rank < 3:
            results[name] = said(lambda told=told: sampled(groups[3], rank, **told(rank)) and "nothing")
    for name, run in (HOST_FAILURES | CODE_FAILURES).items():
        if rank < 3:
            results[name] = said(lambda run=run: run(groups[3], rank) and "nothing")
    if rank < 3:
        wrong = dict(height=-8) if rank == 1 else {}
        results["other call"] = said(lambda: painted(groups[3], rank, **wrong) and "nothing")
        results["halved"] = equal(halved(groups[3], rank), sampled(None, 0, denoiser=plain))
        results["let go"] = let_go(groups[3], rank)
        results["afterwards"] = equal(sampled(groups[3], rank, window_batch_size=1), wanted["batches of 1"])
    dist.all_gather_object(everyone, results)
    if rank == 0:
        Path(folder, "results.json").write_text(json.dumps(everyone))
    dist.destroy_process_group()


def lose(rank, folder, number):
    """Rank 1 of 3 gets a signal that it cannot catch, in a step; what the others say, and after how long."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/lost{number}", rank=rank, world_size=3)
    group = Ranks(True, timeout=timedelta(seconds=TIMEOUT), startup=timedelta(minutes=5))
    since = []

    def act(windows):
        since.append(time.monotonic())
        if rank == 1:
            os.kill(os.getpid(), number)
        return windows / 2

    found = said(lambda: sampled(group, rank, denoiser=Failing(act), window_batch_size=1) and "nothing")
    seconds = time.monotonic() - since[0]
    again = said(lambda: sampled(group, rank, denoiser=Failing()) and "nothing")
    Path(folder, f"{signal.Signals(number).name} {rank}").write_text(json.dumps([found, seconds, again]))


def command(rank, folder, port):
    """Two processes run one command, as a launcher starts them; rank None: one alone."""
    os.chdir(folder)
    arguments = ["generate", "lava", "--size", "264x136", "--steps", "2", "--seed", "3", "--device", "cpu"]
    if rank is not None:
        places = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=2, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        os.environ |= {name: str(value) for name, value in places.items()}
    said = open(f"said {rank}", "w")
    with contextlib.redirect_stdout(said), said:
        cli.main([*arguments, "--window-batch", "2", "-o", "alone.png" if rank is None else "together.png"])


def fork(work, *arguments):
    child = os.fork()
    if not child:
        faulthandler.dump_traceback_later(PATIENCE, exit=True)
        try:
            work(*arguments)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return child


def main(folder):
    torch.set_num_threads(1)
    children = [fork(share, rank, folder) for rank in range(RANKS)]
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    for number in (signal.SIGKILL, signal.SIGSTOP):
        children = [fork(lose, rank, folder, number) for rank in range(3)]
        codes += [os.waitstatus_to_exitcode(os.waitpid(children[rank], 0)[1]) for rank in (0, 2)]
        os.kill(children[1], signal.SIGKILL)
        os.waitpid(children[1], 0)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = [fork(command, rank, folder, port) for rank in (None, 0, 1)]
    codes += [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    sys.exit(any(codes))


if __name__ == "__main__":
    main(sys.argv[1])

"""What `ranks.py` runs of loops that belong to a host: those that processes share, and those that fail in one."""

import contextlib
import functools

import diffusers
import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate

from instantas import InstantASPipeline, Region, regional_prompts, windowed
from instantas.pipelines.hosted import HostedPipeline
from instantas.sampling.bridging import Stage
from instantas.sampling.hosted import Windowed
from instantas.sampling.noise import levels
from instantas.testing import tiny
from instantas.windows import WindowPlan
from tests.pipelines.kinds import KINDS

SIZE = 20, 40  # 2 x 3 windows that overlap
CANVAS = tuple(side * tiny.CELL for side in SIZE)
NETWORK = tiny.unet()
TEXTS = torch.randn(2, 4, 32, generator=torch.Generator().manual_seed(0))
REGIONS = [Region("blue water", box=(0.0, 0.4, 1.0, 1.0), feather=24), Region("green grass", box=(0.5, 0.0, 1.0, 0.7))]


@torch.no_grad()
def looped(group, rank, bridging="shift", batch=2, steps=5, dtype=torch.float32, size=SIZE, **settings):
    """Somebody's Euler, whose network predicts [uncond, cond] at once."""
    euler = tiny.scheduler(kind=diffusers.EulerDiscreteScheduler)
    euler.set_timesteps(steps)
    host = Windowed(16, bridging=bridging, window_batch_size=batch, weight="linear", group=group, **settings)
    x = torch.randn(1, 4, *size, generator=torch.Generator().manual_seed(3)) * euler.init_noise_sigma
    for step, (t, level) in enumerate(zip(euler.timesteps, levels(euler))):

        def evaluate(windows, place, t=t):
            return NETWORK(windows.float(), t, place.pick(TEXTS), return_dict=False)[0].to(dtype)

        both = torch.cat([euler.scale_model_input(x, t)] * 2)
        uncond, cond = host(evaluate, both, step, steps, mark=level, carry=lambda level: level.carry).chunk(2)
        x = euler.step(uncond + 3 * (cond - uncond), t, x).prev_sample
    return [x]


def blocked(group, rank, kind="text to image", regions=(), batch=2, bridging="shift", **call):
    """A pipeline's own call; generators that nobody seeded are rank 0's."""
    make, arguments = KINDS[kind]
    pipe = make()
    torch.manual_seed(5 + rank)
    regional = regional_prompts(pipe, regions, semantic_schedule="linear") if regions else contextlib.nullcontext()
    with windowed(pipe, bridging=bridging, window_batch_size=batch, group=group), regional:
        call = dict(num_inference_steps=3, output_type="pt", prompt="red stone") | arguments(CANVAS) | call
        return [pipe(**call).images, torch.get_rng_state()]


def held(group, rank, kind="InstructPix2Pix", **settings):
    """One of the pipelines that `InstantASPipeline` has no loop for; generators are rank 0's."""
    make, arguments = KINDS[kind]
    generator = torch.Generator().manual_seed(3 + 100 * rank)
    pipe = InstantASPipeline.from_pipe(make())
    assert isinstance(pipe, HostedPipeline)
    call = dict(num_inference_steps=3, output_type="pt", prompt="red stone", generator=generator, group=group)
    return [
        pipe(**call | arguments(CANVAS), regions=REGIONS, window_batch_size=2, **settings).images,
        generator.get_state(),
    ]


class Denser:
    """More windows after the first step than at it: some processes begin late."""

    def step(self, step, steps, plan):
        return Stage(plan if step == 0 else WindowPlan.strided(plan.height, plan.width, plan.window, 8))


HOSTS = {
    **{
        f"a loop, {name}": functools.partial(looped, bridging=name)
        for name in ("none", "economy", "dilated", "shift+moments")
    },
    "a loop, in bfloat16": functools.partial(looped, batch=1, dtype=torch.bfloat16),
    "a loop, fewer batches than processes": functools.partial(looped, batch=6),
    "a loop, one native window": functools.partial(looped, size=(16, 16)),
    "windowed": blocked,
    "windowed, ControlNet": functools.partial(blocked, kind="ControlNet", bridging="economy"),
    "windowed, regions": functools.partial(
        blocked, kind="img2img", regions=REGIONS, batch=6, bridging=Denser(), num_inference_steps=4
    ),
    "windowed, InstructPix2Pix": held,
}


def once(group, rank, x=None, step=0, steps=2, act=None, **settings):
    """Two evaluations in a loop that all run together."""
    x = torch.zeros(1, 4, *SIZE) if x is None else x
    host = Windowed(16, **dict(window_batch_size=1, group=group) | settings)
    with host.group.together():
        for i in range(step, steps):
            host(lambda windows, place, i=i: act(windows) if act and i else windows, x, i, 2)


def fail(*_):
    raise KeyError("mine")


def wrapping(group, rank):
    """An error that a host makes one of its own of."""
    try:
        once(group, rank, act=fail if rank == 1 else None)
    except KeyError as error:
        raise RuntimeError("a loop's own") from error


def divided(group):
    """A pipeline with a network whose weights are in pieces."""
    pipe = tiny.tiny_pipeline()
    mesh = DeviceMesh.from_group(group, "cpu")
    bias = DTensor.from_local(pipe.unet.conv_out.bias.data, mesh, [Replicate()], run_check=False)
    pipe.unet.conv_out.bias = torch.nn.Parameter(bias)
    return pipe


def block_divided(group, rank):
    with windowed(divided(group), group=group):
        pass


def extended(group, rank):
    """Something is wrong in one process before the call that all share."""
    pipe = InstantASPipeline(tiny.tiny_pipeline())
    pipe.extend(torch.rand(1, 3, 64, 64), -8 if rank == 1 else 8, prompt="wall", group=group)


SEEDS = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
HOST_FAILURES = {  # what rank 1 does otherwise than the others
    "loop: exception": lambda group, rank: once(group, rank, act=fail if rank == 1 else None),
    "loop: exception made another": wrapping,
    "loop: argument": lambda group, rank: once(group, rank, align=3 if rank == 1 else 1),
    "loop: other wrap": lambda group, rank: once(group, rank, wrap=(False, rank == 1)),
    "loop: other canvas": lambda group, rank: once(group, rank, x=torch.full((1, 4, *SIZE), float(rank == 1))),
    "loop: other step": lambda group, rank: once(group, rank, step=int(rank == 1)),
    "loop: fewer steps": lambda group, rank: once(group, rank, steps=1 if rank == 1 else 2),
    "windowed: callback": lambda group, rank: blocked(group, rank, callback_on_step_end=fail if rank == 1 else None),
    "windowed: other prompt": lambda group, rank: blocked(group, rank, prompt="wood" if rank == 1 else "wall"),
    "windowed: other seed": lambda group, rank: blocked(group, rank, generator=SEEDS[rank == 1]),
    "held: other schedule": lambda group, rank: held(
        group, rank, semantic_schedule="linear" if rank == 1 else "constant"
    ),
    "windowed: divided weights": block_divided,
    "pipeline: divided weights": lambda group, rank: InstantASPipeline(divided(group))("wall", group=group),
    "pipeline: extended": extended,
    "pipeline: upscaled": lambda group, rank: InstantASPipeline(tiny.tiny_pipeline()).upscale(
        torch.rand(1, 3, 64, 64), 0.5 if rank == 1 else 2.0, "wall", group=group
    ),
}

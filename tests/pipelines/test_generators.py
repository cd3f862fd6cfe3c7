"""What a run draws from its generator is what diffusers' own draws: the next picture from it is the same."""

import diffusers
import pytest
import torch

from instantas.pipelines.codec import decode
from instantas.pipelines.pipeline import InstantASPipeline
from instantas.testing import tiny

NATIVE = tiny.WINDOW * tiny.CELL
SCHEDULERS = {
    "DDIM": {},
    "DDPM": {},
    "EulerDiscrete": {},
    "EulerAncestralDiscrete": {},
    "HeunDiscrete": {},
    "KDPM2Discrete": {},
    "KDPM2AncestralDiscrete": {},
    "DPMSolverMultistep": {"algorithm_type": "sde-dpmsolver++"},
    "DPMSolverSinglestep": {},
    "UniPCMultistep": {},
    "DEISMultistep": {},
    "SASolver": {},
    "LMSDiscrete": {},
    "LCM": {},
    "TCD": {},
}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def left_by(pipe, generator=None, **call):
    """Latents, and what is drawn next from the generator and from torch's own."""
    generator, call = generator or seeded(), dict(prompt="wall", output_type="latent", guidance_scale=4.0) | call
    torch.manual_seed(7)
    made = torch.as_tensor(pipe(**call, generator=generator).images)
    sources = generator if isinstance(generator, list) else [generator]
    return made, [torch.rand(3, generator=source) for source in sources], torch.rand(3)


def same(ours, theirs):
    assert (ours[0] - theirs[0]).norm() < 1e-4 * theirs[0].norm()
    assert all(map(torch.equal, ours[1], theirs[1])) and torch.equal(ours[2], theirs[2])


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_generator_is_left_as_diffusers_leaves_it(name, steps):
    kind = getattr(diffusers, name + "Scheduler")
    theirs = tiny.tiny_pipeline(scheduler=tiny.scheduler(kind=kind, **SCHEDULERS[name]))
    pipes = InstantASPipeline.from_pipe(theirs), theirs
    same(*(left_by(pipe, num_inference_steps=steps) for pipe in pipes))


@pytest.mark.parametrize(
    "call",
    [
        dict(eta=1.0),
        dict(num_images_per_prompt=2, generator=[0, 1]),
        dict(num_inference_steps=1, eta=0.3),
        dict(timesteps=[500, 1], num_inference_steps=None),
    ],
    ids=lambda call: ", ".join(call),
)
def test_of_other_calls_too(call):
    kind = diffusers.DDPMScheduler if "timesteps" in call else diffusers.DDIMScheduler
    theirs = tiny.tiny_pipeline(scheduler=tiny.scheduler(kind=kind))
    call = dict(num_inference_steps=2) | call
    made = []
    for pipe in (InstantASPipeline.from_pipe(theirs), theirs):
        own = dict(call, generator=[seeded(seed) for seed in call["generator"]]) if "generator" in call else call
        made.append(left_by(pipe, **own))
    same(*made)


def drawing(vae):
    """The autoencoder with a decoder that draws noise."""
    plain = vae.decode

    def decode(latents, return_dict=True, generator=None):
        noise = diffusers.utils.torch_utils.randn_tensor(latents.shape, generator=generator)
        return plain(latents + 0.3 * noise, return_dict=return_dict)

    vae.decode = decode
    return vae


@pytest.mark.parametrize("several", [False, True])
def test_a_decoder_that_draws_is_given_the_generator(several):
    theirs = tiny.tiny_pipeline()
    drawing(theirs.vae)
    made = []
    for pipe in (InstantASPipeline.from_pipe(theirs), theirs):
        generator = [seeded(3), seeded(4)] if several else seeded(3)
        call = dict(prompt=["wall"] * 2, num_inference_steps=1, output_type="np")
        made.append(left_by(pipe, generator, **call))
    same(*made)


def test_a_decoder_that_draws_gives_the_same_picture_again_on_a_large_canvas():
    vae = drawing(tiny.autoencoder(tiny=True))
    latents = torch.randn(1, 4, 8, 2500, generator=seeded())
    first, again, other = (decode(vae, latents, generator=seeded(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.allclose(first, other, atol=1e-3)

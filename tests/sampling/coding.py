"""What `ranks.py` runs of autoencoders: tiles that processes share, and those that fail in one."""

import functools
from unittest import mock

import torch
from PIL import Image

from instantas.pipelines import codec
from instantas.pipelines.pipeline import InstantASPipeline
from instantas.testing import tiny

LATENTS = torch.randn(2, 4, 20, 34, generator=torch.Generator().manual_seed(0))
PHOTO = Image.linear_gradient("L").convert("RGB")


@torch.no_grad()
def coded(group, rank, small=False, tiles=(8, 12), wrap=(False, False)):
    """There and back again, of two pictures."""
    vae, generator = tiny.autoencoder(tiny=small), torch.Generator().manual_seed(3 + 100 * rank)
    how = dict(tiles=tiles, wrap=wrap, generator=generator, group=group)
    pictures = codec.decode(vae, LATENTS, **how)
    return [pictures, codec.encode(vae, pictures, **how), generator.get_state()]


def painted(group, rank):
    """From a picture to a picture, both in tiles."""
    pipe, generator = InstantASPipeline(tiny.tiny_pipeline()), torch.Generator().manual_seed(3 + 100 * rank)
    asked = dict(image=PHOTO, strength=0.7, num_inference_steps=2, output_type="pt", window_batch_size=2)
    with mock.patch.object(codec, "TILE", 24):
        latents = pipe("a red wall", **asked | dict(output_type="latent"), generator=generator, group=group).images
        return [
            pipe("a red wall", **asked, generator=generator, group=group).images,
            pipe.decode(latents, 256, 256, output_type="pt", group=group),
        ]


CODED = {
    "tiles": coded,
    "tiles that wrap": functools.partial(coded, wrap=(False, True)),
    "tiles without norms": functools.partial(coded, small=True),
    "fewer tiles than processes": functools.partial(coded, tiles=(20, 20)),
    "no tiles": functools.partial(coded, tiles="whole"),
    "tiles of a pipeline": painted,
}


@torch.no_grad()
def failing(group, rank):
    """A layer that fails on the tiles of one process."""
    vae = tiny.autoencoder()
    if rank == 1:
        vae.decoder.conv_out.register_forward_pre_hook(fail)
    codec.decode(vae, LATENTS, tiles=8, group=group)


def fail(*_):
    raise KeyError("mine")


CODE_FAILURES = {  # what rank 1 does otherwise than the others
    "tiles: exception": failing,
    "tiles: other latents": lambda group, rank: codec.decode(tiny.autoencoder(), LATENTS + (rank == 1), group=group),
    "tiles: other sides": lambda group, rank: codec.decode(
        tiny.autoencoder(), LATENTS, tiles=8 + (rank == 1), group=group
    ),
    "tiles: other sample mode": lambda group, rank: codec.encode(
        tiny.autoencoder(), torch.zeros(1, 3, 16, 16), sample_mode="argmax" if rank == 1 else "sample", group=group
    ),
    "tiles: other generators": lambda group, rank: codec.encode(
        tiny.autoencoder(),
        torch.zeros(1, 3, 16, 16),
        generator=torch.Generator() if rank == 1 else None,
        group=group,
    ),
    "tiles: other weights": lambda group, rank: codec.decode(
        tiny.autoencoder(tiny=rank == 1), LATENTS, tiles=8, group=group
    ),
}

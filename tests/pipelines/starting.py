"""What the tests of starts from pictures share: a picture, a generator, and the latents of a call."""

import numpy as np
import torch
from PIL import Image

NATIVE = 128


def photo(width=NATIVE, height=NATIVE, seed=0):
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


def seeded(seed=1):
    return torch.Generator().manual_seed(seed)


def latents_of(pipe, **settings):
    common = dict(num_inference_steps=6, guidance_scale=4.0, output_type="latent", generator=seeded())
    return pipe(**dict(prompt="red brick") | common | settings).images


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)

"""Regions in a diffusers pipeline as it is: only the cross-attention of its UNet is another inside of the block.

    python docs/examples/regions_in_diffusers.py [OUT.png]
"""

import sys

import torch
from diffusers import StableDiffusionPipeline

from instantas import Region, demo, regional_prompts

pipe = StableDiffusionPipeline.from_pretrained(demo.folder(), safety_checker=None)
regions = [Region("red brick wall", box=(0.0, 0.5, 1.0, 1.0), feather=8)]  # the lower half

with regional_prompts(pipe, regions):
    settings = dict(num_inference_steps=8, guidance_scale=2.5, generator=torch.Generator().manual_seed(5))
    image = pipe("sunset clouds", height=128, width=128, **settings).images[0]

image.save(sys.argv[1] if len(sys.argv) > 1 else "regions_in_diffusers.png")

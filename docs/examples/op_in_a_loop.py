"""The operations in a sampling loop of one's own: a plain DDIM loop that paints any size through native windows.

    python docs/examples/op_in_a_loop.py [OUT.png]

Two lines make the loop one for large canvases: `gather_windows` in front of the network, `guided_step` behind it.
"""

import sys

import torch
from diffusers import StableDiffusionPipeline

from instantas import WindowPlan, demo, ops

HEIGHT, WIDTH, STEPS, GUIDANCE = 16, 40, 8, 2.5  # latent cells of 8 px: 128 x 320 px

pipe = StableDiffusionPipeline.from_pretrained(demo.folder(), safety_checker=None)
plan = WindowPlan.minimum_coverage(HEIGHT, WIDTH, window=pipe.unet.config.sample_size)
cond, uncond = pipe.encode_prompt("sunset clouds", "cpu", 1, do_classifier_free_guidance=True)
text = torch.cat([uncond.expand(plan.count, -1, -1), cond.expand(plan.count, -1, -1)])

# x = cos(a) x_0 + sin(a) eps, of which this network predicts v = cos(a) eps - sin(a) x_0 (Salimans and Ho 2022)
times = torch.linspace(len(pipe.scheduler.alphas_cumprod) - 1, 0, STEPS).long()
angles = torch.cat([pipe.scheduler.alphas_cumprod[times].sqrt().acos(), torch.zeros(1)])

sample = torch.randn(1, 4, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(5))
with torch.no_grad():
    for time, angle, following in zip(times, angles, angles[1:]):
        windows = ops.gather_windows(sample, plan)[0]  # (n, C, h, w)
        without, with_prompt = pipe.unet(torch.cat([windows, windows]), time, text).sample.chunk(2)
        # guidance, the mean over the windows and DDIM's x' = cos(a - a') x - sin(a - a') v in one pass
        turn = angle - following
        update = float(turn.cos()), float(-turn.sin())
        sample, _ = ops.guided_step(with_prompt[None], without[None], sample, plan, update, GUIDANCE)
    picture = pipe.vae.decode(sample / pipe.vae.config.scaling_factor).sample

image = pipe.image_processor.postprocess(picture, output_type="pil")[0]
image.save(sys.argv[1] if len(sys.argv) > 1 else "op_in_a_loop.png")

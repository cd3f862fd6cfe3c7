"""One of k-diffusion's samplers at a size that the network does not know: it calls a model as ever, which has windows.

    pip install k-diffusion
    python docs/examples/k_diffusion_loop.py [OUT.png]
"""

import sys

import torch
from diffusers import StableDiffusionPipeline
from k_diffusion.external import DiscreteVDDPMDenoiser
from k_diffusion.sampling import sample_dpmpp_2m

from instantas import Windowed, demo
from instantas.sampling.hosted import keep_eps, step_of

pipe = StableDiffusionPipeline.from_pretrained(demo.folder(), safety_checker=None).to(torch.float32)
cond, uncond = pipe.encode_prompt("red brick wall", "cpu", 1, True)
text = torch.cat([uncond, cond])
network = DiscreteVDDPMDenoiser(
    lambda x, t, text: pipe.unet(x, t, text, return_dict=False)[0], pipe.scheduler.alphas_cumprod, quantize=True
)
sigmas = network.get_sigmas(8)
host = Windowed(pipe.unet.config.sample_size)


def model(x, sigma):
    def guided(windows, place):
        uncond, cond = (network(windows, sigma[:1], text=own.expand(len(windows), -1, -1)) for own in text[:, None])
        return uncond + 2.5 * (cond - uncond)

    return host(guided, x, step_of(sigmas, sigma), len(sigmas) - 1, carry=keep_eps, mark=sigma[0])


with torch.no_grad():
    noise = torch.randn(1, 4, 16, 40, generator=torch.Generator().manual_seed(5))
    latents = sample_dpmpp_2m(model, noise * sigmas[0], sigmas, disable=True)
    decoded = pipe.vae.decode(latents / pipe.vae.config.scaling_factor, return_dict=False)[0]
pipe.image_processor.postprocess(decoded)[0].save(sys.argv[1] if len(sys.argv) > 1 else "k_diffusion_loop.png")

"""How many pictures of the embedded model the judge recognises, by scheduler, steps and guidance.

Every material is painted on native windows, prompted by its bare name. The judge was trained on other renders of the
same drawings and photographs: the share of fresh renders that it recognises, printed first, is no generalisation.
"""

import argparse
import itertools

import diffusers
import numpy as np
import torch

from instantas import demo
from instantas.cli.options import SCHEDULERS
from instantas.demo.judge import Judge, reconstruct, render_crops
from instantas.pipelines.pipeline import InstantASPipeline


def painted(pipe, material, pictures, seed, **settings):
    generator = torch.Generator().manual_seed(seed)
    return [np.asarray(i) for i in pipe([material] * pictures, generator=generator, **settings).images]


def main():
    defaults = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=defaults)
    parser.add_argument("--schedulers", nargs="+", default=["ddim"], choices=sorted(SCHEDULERS))
    parser.add_argument("--steps", nargs="+", type=int, default=[25])
    parser.add_argument("--guidance", nargs="+", type=float, default=[2.5])
    parser.add_argument("--pictures", type=int, default=8, help="of each material and seed")
    parser.add_argument("--seeds", nargs="+", type=int, default=[100, 500])
    parser.add_argument("--model", default=demo.folder(), help="a folder as demo.train writes it")
    options = parser.parse_args()

    judge = Judge.train(seed=0, per_material=16, model=options.model)
    pipe = InstantASPipeline.from_pretrained(options.model, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    crops, names = render_crops(16, seed=77)
    for what, shown in (("fresh renders", crops), ("the same, reconstructed", reconstruct(pipe.vae, crops))):
        print(f"{what}: {np.mean(np.array(judge.classify(shown)) == names):.3f} recognised")
    config = pipe.scheduler.config
    for name, steps, guidance in itertools.product(options.schedulers, options.steps, options.guidance):
        kind, settings = SCHEDULERS[name]
        pipe.scheduler = getattr(diffusers, kind).from_config(config, **settings)
        call = dict(num_inference_steps=steps, guidance_scale=guidance)
        found = {
            material: sum(
                judge.classify(painted(pipe, material, options.pictures, seed + i, **call)).count(material)
                for seed in options.seeds
            )
            for i, material in enumerate(demo.MATERIALS)
        }
        each = options.pictures * len(options.seeds)
        missed = ", ".join(f"{material} {count}" for material, count in found.items() if count < each) or "none"
        total = f"{sum(found.values())} of {each * len(found)}"
        print(f"{name}, {steps} steps, guidance {guidance}: {total}; of {each} each, fewer of: {missed}", flush=True)


if __name__ == "__main__":
    main()

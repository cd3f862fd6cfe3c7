"""A program of somebody else's, for the type checker: it is not run. It uses the public names as README does."""

# All that --strict asks of a program: said here, so that what `make lint` has read of torch need not be read again.
# mypy: disallow-any-generics, disallow-subclassing-any, disallow-untyped-calls, disallow-untyped-defs
# mypy: disallow-incomplete-defs, check-untyped-defs, disallow-untyped-decorators, warn-redundant-casts
# mypy: warn-unused-ignores, warn-return-any, strict-equality, strict-bytes, extra-checks

import torch

from instantas import (
    InstantASPipeline,
    Region,
    RegionMap,
    WindowPlan,
    __version__,
    demo,
    ops,
    regional_prompts,
    sample,
)

version: str = __version__

plan: WindowPlan = WindowPlan.minimum_coverage(64, 256, window=64, wrap=(False, True), shift=(0, 8))
strided: WindowPlan = WindowPlan.strided(64, 256, stride=(8, 16))
evaluations: int = plan.count * 50
share: float = plan.overlap

latents = torch.randn(1, 4, 64, 256)
windows: torch.Tensor = ops.gather_windows(latents, plan)
canvas: torch.Tensor = ops.scatter_windows(windows, plan, plan.weight("linear"))
stepped, history = ops.guided_step(windows, None, latents, plan, (0.9, -0.1), 7.5)
newest: torch.Tensor | None = history
query = torch.randn(1, 16, 2, 8)
bank = torch.randn(3, 77, 2, 8)
ids = torch.zeros(1, 1, dtype=torch.int32)
attended: torch.Tensor = ops.regional_attention(query, bank, bank, ids, torch.ones(1, 1, 16), mode="joint")
for name, state in ops.backends().items():
    print(name.upper(), state.upper())
with ops.use_backend("reference"):
    merged: torch.Tensor = ops.scatter_windows(windows, plan)

regions = [Region("grass", box=(0.0, 0.5, 1.0, 1.0), feather=8), Region("a castle", mask="castle.png", weight=2.0)]
areas: RegionMap = RegionMap(regions, 512, 2048)

pipe: InstantASPipeline = InstantASPipeline.from_pretrained(demo.folder()).to("cpu")
image = pipe("a lake", height=512, width=2048, regions=regions, bridging="shift").images[0]
with regional_prompts(pipe.pipe, regions, mode="blend") as prompts:
    print(prompts)


def denoiser(windows: torch.Tensor, timestep: torch.Tensor, context: object) -> torch.Tensor:
    return windows


result: torch.Tensor = sample(denoiser, latents, plan, pipe.scheduler, num_inference_steps=10, bridging="economy")

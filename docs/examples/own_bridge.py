"""A bridge of one's own: windows that lie where minimum coverage puts them, but start from the other end at odd steps.

    python docs/examples/own_bridge.py [OUT.png]

A bridge is any object with a method `step` that says, before the run, what each step does. This one moves the seams to
and fro; where its windows leave a rim uncovered, as a partial plan may, the latest prediction is used again.
"""

import sys

import numpy as np
import torch

from instantas import InstantASPipeline, WindowPlan, demo
from instantas.sampling.bridging import Stage


class Swing:
    """The resting windows at even steps; at odd ones windows half a window to the right, the rest re-used."""

    def step(self, step: int, steps: int, plan: WindowPlan) -> Stage:
        columns = np.unique(plan.origins[:, 1])
        if step % 2 == 0 or step == steps - 1 or len(columns) == 1:
            return Stage(plan)
        between = (columns[1:] + columns[:-1]) // 2
        moved = WindowPlan.grid(
            plan.height, plan.width, plan.window, np.unique(plan.origins[:, 0]), between, partial=True
        )
        return Stage(moved, moved.weight("linear"))


pipe = InstantASPipeline.from_pretrained(demo.folder())
generator = torch.Generator().manual_seed(5)
settings = dict(height=128, width=320, num_inference_steps=8, generator=generator)
image = pipe("sunset clouds", bridging=Swing(), **settings).images[0]
image.save(sys.argv[1] if len(sys.argv) > 1 else "own_bridge.png")

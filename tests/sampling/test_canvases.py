"""How many canvases a run holds, beside the noise that its caller has: what docs/bands.md says."""

import gc

import diffusers
import pytest
import torch

from instantas import ops
from instantas.sampling.sampler import sample
from instantas.testing.tiny import scheduler
from instantas.windows import WindowPlan

PLAN = WindowPlan.minimum_coverage(40, 56, 8)  # 5 x 7 windows that hold as many numbers as the canvas
CANVAS = 4 * 40 * 56 * 4  # bytes


class Held:
    """Counts canvases whose tensors were made after this."""

    def __init__(self):
        gc.collect()
        self.before = _tensors()  # which lie where they are, as long as they are held here

    def __call__(self, *more):
        sizes = _sizes([*_tensors(), *more])
        return sum(sizes[place] // CANVAS for place in sizes.keys() - _sizes(self.before).keys())


def _tensors():
    found = [each for each in gc.get_objects() if type(each) is torch.Tensor]
    return [each for each in found if each.device.type == "cpu" and each.layout == torch.strided]


def _sizes(tensors):
    """Where a storage lies -> its bytes."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    return {storage.data_ptr(): storage.nbytes() for storage in storages}


def run(kind, denoiser, latents, **settings):
    given = dict(num_inference_steps=4, guidance_scale=2.0, bridging="shift", window_batch_size=18) | settings
    with torch.no_grad():
        return sample(denoiser, latents, PLAN, scheduler(kind=getattr(diffusers, f"{kind}Scheduler")), **given)


@pytest.mark.parametrize(
    "kind, evaluating, stepping", [("DDIM", 6, 8), ("DPMSolverMultistep", 7, 10), ("EulerAncestralDiscrete", 7, 9)]
)
def test_canvases_of_a_run(monkeypatch, kind, evaluating, stepping):
    """Canvas, latest predictions of both branches, windows, both predictions; in the step its results, not the windows.

    DPM++ looks back on one more, which its step makes anew too. Euler's canvas is scaled for the network, beside it.
    """
    latents, evaluated, stepped, step = torch.randn(1, 4, 40, 56), [], [], ops.guided_step
    held = Held()

    def denoiser(windows, t, context):
        evaluated.append(held())
        return 0.1 * windows, 0.05 * windows

    def counted(cond, uncond, sample, *arguments, **settings):
        results = step(cond, uncond, sample, *arguments, **settings)
        stepped.append(held(*(each for each in results if each is not None)) if sample.numel() else 0)
        return results

    monkeypatch.setattr(ops, "guided_step", counted)
    run(kind, denoiser, latents, callback=lambda step, t, canvas, denoised: canvas * 0.9)
    assert (max(evaluated), max(stepped)) == (evaluating, stepping)


def test_a_coarse_start_holds_nothing_of_the_larger_canvas_while_it_is_on_a_smaller_one():
    latents, seen = torch.randn(1, 4, 40, 56), {}
    held = Held()

    def denoiser(windows, t, context):
        seen[context.size] = max(held(), seen.get(context.size, 0))
        return 0.1 * windows, 0.05 * windows

    run("DDIM", denoiser, latents, start="coarse")
    *smaller, whole = seen.values()
    assert len(smaller) == 2 and not any(smaller) and whole == 6

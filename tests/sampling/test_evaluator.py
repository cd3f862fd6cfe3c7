"""Batches of windows: the same result from any, smaller ones where memory runs out, nothing held twice."""

import gc
import re
import warnings

import diffusers
import pytest
import torch

from instantas.sampling.sampler import sample
from instantas.testing.tiny import WINDOW, scheduler
from instantas.windows import WindowPlan

WIDE = WindowPlan.minimum_coverage(20, 50, WINDOW)  # 2 x 4 windows that overlap
SCALE = 3.0


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def noise(plan, pictures=1):
    return torch.randn(pictures, 4, plan.height, plan.width, generator=seeded())


def content(windows, timestep, context=None):
    """Predictions that depend on the whole window, each window by itself."""
    far = windows.roll((5, 3), (-2, -1)) - windows.amax((-2, -1), keepdim=True)
    return torch.tanh(windows + 0.3 * far), 0.4 * windows


@pytest.mark.parametrize("name", ["DPMSolverMultistep", "EulerAncestralDiscrete"])
def test_the_result_does_not_depend_on_the_window_batch(name):
    def run(batch, seed=7):
        schedule = scheduler(kind=getattr(diffusers, name + "Scheduler"))
        run = dict(num_inference_steps=5, guidance_scale=SCALE, generator=seeded(seed))
        return sample(content, noise(WIDE, 2), WIDE, schedule, window_batch_size=batch, **run)

    first = run(1)
    for batch in (2, 3, 7, 16, 1000, None):
        torch.testing.assert_close(run(batch), first, rtol=1e-6, atol=1e-6)
    if name == "EulerAncestralDiscrete":
        assert (run(1, seed=8) - first).abs().max() > 0.1


def test_batches_go_through_all_windows_of_all_pictures():
    rows, sizes = [], []

    def denoise(windows, timestep, context):
        rows.append(context.rows)
        sizes.append(len(windows))
        for window, (picture, i) in zip(windows, context.rows.tolist()):
            y, x = WIDE.origins[i]
            assert torch.equal(window, latents[picture, :, y : y + WINDOW, x : x + WINDOW])
        return windows

    latents = noise(WIDE, 3)
    sample(denoise, latents, WIDE, scheduler(), num_inference_steps=1, window_batch_size=5)
    assert sizes == [5, 5, 5, 5, 4]
    assert torch.cat(rows).tolist() == [[picture, i] for picture in range(3) for i in range(WIDE.count)]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce] DefaultCPUAllocator: can't allocate memory"),
    ],
    ids=["gpu", "cpu"],
)
def test_out_of_memory_halves_the_batch_and_says_so_once(error):
    sizes = []

    def denoise(windows, timestep, context):
        sizes.append(len(windows))
        if len(windows) > 2:
            raise error
        return content(windows, timestep)

    run = dict(num_inference_steps=3, guidance_scale=SCALE)
    wanted = sample(content, noise(WIDE), WIDE, scheduler(), **run)
    with pytest.warns(UserWarning) as said:
        ours = sample(denoise, noise(WIDE), WIDE, scheduler(), window_batch_size=8, **run)
    assert [str(w.message) for w in said] == ["out of memory with 8 windows at once; going on with 2"]
    assert said[0].filename == __file__
    assert sizes == [8, 4] + [2] * (3 * WIDE.count // 2)
    torch.testing.assert_close(ours, wanted, rtol=1e-6, atol=1e-6)


def test_out_of_memory_with_one_window_and_other_errors_are_raised():
    def out_of_memory(*args):
        raise torch.OutOfMemoryError("full")

    def broken(*args):
        raise RuntimeError("a bug")

    for denoise, error in ((out_of_memory, torch.OutOfMemoryError), (broken, RuntimeError)):
        with pytest.raises(error, match="full|a bug"), warnings.catch_warnings():
            warnings.simplefilter("error")
            sample(denoise, noise(WIDE), WIDE, scheduler(), num_inference_steps=2)


@torch.no_grad()
def held(plan):
    """Most bytes of tensors that are alive in the last batch of a step, beyond those that were there before."""
    most = []

    def denoise(windows, timestep, context):
        if context.rows[-1, 1] == plan.count - 1:
            found = {}
            for thing in gc.get_objects():
                if issubclass(type(thing), torch.Tensor) and id(thing) not in before:
                    storage = thing.untyped_storage()
                    found[storage.data_ptr()] = storage.nbytes()
            most.append(sum(found.values()))
        return 0.5 * windows, 0.25 * windows

    # kept alive, so that no later tensor gets the id of one of them
    before = {id(thing): thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)}
    sample(denoise, noise(plan), plan, scheduler(), num_inference_steps=2, guidance_scale=SCALE, window_batch_size=2)
    return max(most)


def test_memory_grows_with_the_canvas_and_not_with_the_windows():
    window = 16 * 64 * 64
    for side in (2, 8):  # 4 and 64 windows
        plan = WindowPlan.minimum_coverage(64 * side, 64 * side)
        assert plan.count == side**2
        # latents, canvas, its windows, their two predictions; and those of the batch before
        assert held(plan) == pytest.approx(5 * side**2 * window + 4 * window, rel=0.02)
    strided = WindowPlan.strided(128, 128, 64, 8)  # windows that overlap many times
    assert held(strided) == pytest.approx((2 * 4 + 3 * strided.count + 4) * window, rel=0.02)


def test_predictions_of_another_shape_are_refused():
    def some(windows, timestep, context):
        return windows, windows if context.rows[0, 1] else None

    for denoise, message in (
        (lambda w, t, c: w[:, :3], "denoiser: expected predictions of shape (4, 4, 16, 16), got (4, 3, 16, 16)"),
        (lambda w, t, c: (w, w, w), "denoiser: expected a prediction or a pair (cond, uncond), got 3 values"),
        (some, "denoiser: expected uncond for all windows or for none"),
    ):
        with pytest.raises(ValueError, match="^" + re.escape(message)):
            sample(denoise, noise(WIDE), WIDE, scheduler(), num_inference_steps=2)


@pytest.mark.parametrize("kind", ["dict", "NoneType"])
def test_what_is_no_prediction_is_named(kind):
    """As a diffusers network's output without `return_dict=False` or `.sample`."""
    answer = dict(sample=noise(WIDE)) if kind == "dict" else None
    with pytest.raises(TypeError, match=f"^denoiser: expected a tensor of predictions, got {kind}"):
        sample(lambda windows, timestep, context: answer, noise(WIDE), WIDE, scheduler(), num_inference_steps=2)

"""Runs that go on from what is known: windows move from their first step on, and leave no border."""

import diffusers
import pytest
import torch

from instantas.sampling import bridging, coarse
from instantas.sampling.coarse import CoarseStart
from instantas.sampling.sampler import sample
from instantas.sampling.spectrum import with_detail
from instantas.windows import WindowPlan
from tests.sampling.runs import of

STEPS = 10


def draw(seed, *shape):
    return torch.randn(1, 4, *shape, generator=torch.Generator().manual_seed(seed))


def network(windows, t, context):
    return 0.3 * torch.tanh(windows)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_windows_move_from_the_first_step_on_the_larger_canvas(prediction):
    """It leaves no border; what none of its windows covers is predicted to be what was carried up."""
    plan, chosen = WindowPlan.minimum_coverage(16, 16, 8), of("DDIM", prediction_type=prediction)
    origins, after = [], []

    def denoiser(windows, t, context):
        if context.size == (16, 16) and context.step == 0:
            origins.append(context.origins.tolist())
        return network(windows, t, context)

    def kept(step, t, latents):
        after.append(latents)

    settings = dict(num_inference_steps=STEPS, bridging="shift", start="coarse", callback=kept)
    sample(denoiser, draw(0, 16, 16), plan, chosen, generator=torch.Generator().manual_seed(5), **settings)
    small, last = coarse.legs(CoarseStart(), plan, chosen)
    (moved,) = origins
    covered = torch.zeros(16, 16, dtype=torch.bool)
    for y, x in moved:
        covered[y : y + 8, x : x + 8] = True
    assert len(moved) == plan.count and not covered.all() and covered[:, 7:9].any() and covered[7:9].any()
    assert not {(8, 0), (0, 8), (8, 8)} & set(map(tuple, moved))
    generator = torch.Generator().manual_seed(5)
    clean = with_detail(after[small.steps - 1], (16, 16), plan.wrap, generator)
    noise = torch.randn(clean.shape, generator=generator)
    wanted = chosen.add_noise(clean, noise, chosen.timesteps[last.begin + 1][None])
    found = after[small.steps]
    torch.testing.assert_close(found[..., ~covered], wanted[..., ~covered], atol=2e-4, rtol=0)
    assert (found - wanted)[..., covered].abs().max() > 0.1


def test_bridges_of_a_run_that_goes_on():
    plan = WindowPlan.minimum_coverage(16, 16, 8)
    for name in ("shift", "economy", "shift+moments"):
        first = bridging.going_on(bridging.bridge(name)).step(0, 10, plan)
        assert first.plan.partial and first.plan.count == plan.count
        assert bridging.going_on(bridging.bridge(name)).step(9, 10, plan).plan is plan
        assert bridging.bridge(name).step(0, 10, plan).plan is plan
        assert bridging.evaluations(bridging.going_on(bridging.bridge(name)), plan, 10) == bridging.evaluations(
            name, plan, 10
        )
    assert (
        bridging.going_on(None) is None
        and bridging.going_on(bridging.BRIDGES["centred"]) is bridging.BRIDGES["centred"]
    )
    with pytest.raises(ValueError, match="expected every cell covered at step 0, as there is nothing to re-use"):
        sample(
            network, draw(0, 16, 16), plan, of("DDIM"), num_inference_steps=4,
            bridging=bridging.Shift(moves_first=True),
        )  # fmt: skip


def test_windows_move_at_the_first_step_of_a_run_whose_origin_is_known():
    """What none of them covers goes on from its own noise, as if the network had predicted it."""
    plan, clean, noise = WindowPlan.minimum_coverage(16, 16, 8), draw(0, 16, 16), draw(1, 16, 16)
    chosen = of("DDIM")
    chosen.set_timesteps(STEPS)
    x = chosen.add_noise(clean, noise, chosen.timesteps[4:5])
    after, seen = {}, []

    def denoiser(windows, t, context):
        seen.append(context.origins.tolist() if context.step == 0 else None)
        return network(windows, t, context)

    def keep(name):
        def callback(step, t, latents):
            after.setdefault(name, latents)

        return callback

    for name, origin in (("known", (clean, noise)), ("unknown", None)):
        sample(
            denoiser, x, plan, of("DDIM"), num_inference_steps=10, begin=4, bridging="shift", origin=origin,
            callback=keep(name),
        )  # fmt: skip
    moved, rested = filter(None, seen)
    assert len(moved) == len(rested) == 4 and {(8, 0), (0, 8), (8, 8)} < set(map(tuple, rested))
    assert not {(8, 0), (0, 8), (8, 8)} & set(map(tuple, moved))
    covered = torch.zeros(16, 16, dtype=torch.bool)
    for row, column in moved:
        covered[row : row + 8, column : column + 8] = True
    wanted = chosen.add_noise(clean, noise, chosen.timesteps[5:6])
    torch.testing.assert_close(after["known"][..., ~covered], wanted[..., ~covered], atol=2e-4, rtol=0)
    assert (after["unknown"] - wanted)[..., ~covered].abs().max() > 0.1


def test_windows_rest_where_noise_levels_are_not_known():
    """An EDM network's prediction is neither the noise nor the sample: what it would be nobody says."""
    plan, clean, noise, seen = WindowPlan.minimum_coverage(16, 16, 8), draw(0, 16, 16), draw(1, 16, 16), []
    chosen = diffusers.EDMEulerScheduler()
    chosen.set_timesteps(STEPS)
    x = chosen.add_noise(clean, noise, chosen.timesteps[4:5])

    def denoiser(windows, t, context):
        seen.append(context.origins.tolist())
        return network(windows, t, context)

    settings = dict(num_inference_steps=STEPS, begin=4, bridging="shift")
    known = sample(denoiser, x, plan, chosen, origin=(clean, noise), **settings)
    assert seen[0] == plan.origins.tolist() != seen[1]
    assert torch.equal(known, sample(network, x, plan, chosen, **settings))


@pytest.mark.parametrize(
    "given, error, message",
    [
        (dict(origin=3, begin=4), TypeError, r"origin: expected \(clean, noise\), two tensors, got int"),
        (dict(origin=(torch.zeros(1, 4, 8, 8),), begin=4), ValueError, r"origin: expected two of \(1, 4, 8, 8\)"),
        (dict(origin=(torch.zeros(1, 4, 8, 8), torch.zeros(1, 4, 4, 8)), begin=4), ValueError, "origin: expected two"),
        (dict(origin=(torch.zeros(1, 4, 8, 8),) * 2), ValueError, "origin: expected None without begin"),
        (dict(origin=(torch.zeros(1, 4, 8, 8),) * 2, start="coarse"), ValueError, "origin: expected None with a start"),
    ],
)
def test_an_origin_is_checked(given, error, message):
    plan = WindowPlan.minimum_coverage(8, 8, 8)
    with pytest.raises(error, match=message):
        sample(lambda windows, t, context: 1 / 0, draw(0, 8, 8), plan, of("DDIM"), num_inference_steps=STEPS, **given)

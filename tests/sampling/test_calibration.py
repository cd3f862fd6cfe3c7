"""The share of detail that a network makes out through the noise, on fields whose exact share is known."""

import functools

import diffusers
import pytest
import torch

from instantas.sampling.calibration import SHARE, Calibration, measure
from instantas.sampling.sampler import sample
from instantas.sampling.spectrum import basis
from instantas.testing.tiny import scheduler
from instantas.windows import WindowPlan

SIDE, STEPS, PICTURES = 16, 30, 32
COARSE, FINE = 9.0, 0.49  # the field's power within the smaller canvas's frequencies, and above
SCHEDULERS = {
    "DDIM": functools.partial(scheduler),
    "Euler": functools.partial(scheduler, "v_prediction", diffusers.EulerDiscreteScheduler),
    "PNDM": functools.partial(scheduler, kind=diffusers.PNDMScheduler, skip_prk_steps=True),
    "flow": diffusers.FlowMatchEulerDiscreteScheduler,
}


def draw(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def power(scale):
    found = torch.full((SIDE, SIDE), FINE)
    found[: round(SIDE / scale), : round(SIDE / scale)] = COARSE
    return found


def exact(scale, windows, context):
    """The clean field that is expected where noise has been added, and what the network is to predict for it."""
    level, rows, p = context.level, basis(SIDE, False).float(), power(scale)
    gain = level.signal * p / (level.signal**2 * p + level.noise**2)
    return rows.T @ (gain * (rows @ windows @ rows.T)) @ rows


def measured(chosen, scale=2.0, error=0.0):
    """On pictures of the field itself, by its exact denoiser; error: deviation of what is added to its estimate."""
    chosen.set_timesteps(STEPS)
    rows, wrong = basis(SIDE, False).float(), torch.Generator().manual_seed(3)
    field = rows.T @ (power(scale).sqrt() * draw(0, PICTURES, 4, SIDE, SIDE)) @ rows
    plan = WindowPlan.minimum_coverage(SIDE, SIDE, SIDE)

    def denoiser(windows, t, context):
        clean = exact(scale, windows, context) + error * torch.randn(windows.shape, generator=wrong)
        return context.level.prediction(clean, windows)

    def paint(latents, bridging=None, callback=None):
        if callback is None:
            return field
        settings = dict(bridging=bridging, callback=callback, window_batch_size=PICTURES)
        return sample(denoiser, latents, plan, chosen, **settings)

    return measure(paint, torch.zeros_like(field), chosen, scale=scale, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_share_of_a_gaussian_field(name):
    """P / (P + sigma^2) at every level but for the noise's own scatter, whatever lies below; one for each timestep."""
    chosen = SCHEDULERS[name]()
    found = measured(chosen)
    assert len(found.shares) == len(chosen.timesteps)
    count = PICTURES * 4 * SIDE * SIDE * 3 / 4
    for sigma, share in found.shares:
        right = FINE / (FINE + sigma**2)
        assert share == pytest.approx(right, abs=1e-4 + 5 * right * sigma / (FINE * count) ** 0.5)
    assert found.sigma() == pytest.approx((FINE * (1 - SHARE) / SHARE) ** 0.5, rel=0.02)
    assert found.sigma(0.5) == pytest.approx(FINE**0.5, rel=0.02)


def test_another_scale_has_another_band():
    assert measured(scheduler(), scale=4.0).sigma() == pytest.approx((FINE * 1.5) ** 0.5, rel=0.02)


def test_what_the_network_gets_wrong_drops_out():
    """An error as strong as the detail itself, which doubles the prediction's power where the share is near 1."""
    right, wrong = measured(scheduler()), measured(scheduler(), error=FINE**0.5)
    count = PICTURES * 4 * SIDE * SIDE * 3 / 4
    for (sigma, share), (same, other) in zip(right.shares, wrong.shares):
        assert sigma == same and other == pytest.approx(share, abs=5 / count**0.5)


def test_pictures_count_alike():
    """One of strong detail beside one of weak: the mean of what each would give."""
    chosen = scheduler()
    chosen.set_timesteps(STEPS)
    plan, rows = WindowPlan.minimum_coverage(SIDE, SIDE, SIDE), basis(SIDE, False).float()
    strengths = torch.tensor([3.0, 0.1])[:, None, None, None]
    field = strengths.sqrt() * (rows.T @ draw(0, 2, 64, SIDE, SIDE) @ rows)

    def denoiser(windows, t, context):
        level = context.level
        clean = windows * level.signal * strengths / (level.signal**2 * strengths + level.noise**2)
        return level.prediction(clean, windows)

    def paint(latents, bridging=None, callback=None):
        return (
            field if callback is None else sample(denoiser, latents, plan, chosen, bridging=bridging, callback=callback)
        )

    found = measure(paint, torch.zeros_like(field), chosen, generator=torch.Generator().manual_seed(1))
    for sigma, share in found.shares:
        right = [strength / (strength + sigma**2) for strength in (3.0, 0.1)]
        assert share == pytest.approx(sum(right) / 2, abs=0.03)


@pytest.mark.parametrize(
    "clean, factor, wanted",
    [
        (0.0, 1.0, "pictures that are finite and have detail"),
        (torch.inf, 1.0, "pictures that are finite and have detail"),
        (1.0, torch.nan, "finite predictions"),
    ],
)
def test_what_has_no_detail_or_is_not_finite_is_refused(clean, factor, wanted):
    """And not taken for a share that is crossed nowhere."""
    chosen, plan = scheduler(), WindowPlan.minimum_coverage(SIDE, SIDE, SIDE)
    chosen.set_timesteps(3)

    def paint(latents, bridging=None, callback=None):
        if callback is None:
            return draw(1, *latents.shape) * clean
        return sample(lambda x, t, context: x * factor, latents, plan, chosen, bridging=bridging, callback=callback)

    with pytest.raises(ValueError, match=f"^model: expected {wanted}, got others$"):
        measure(paint, draw(0, 1, 4, SIDE, SIDE), chosen)


def test_between_two_levels_the_logarithm_is_halved():
    found = Calibration(((0.5, 0.9), (1.0, 0.5), (4.0, 0.3), (8.0, 0.45)))
    assert found.sigma(0.4) == pytest.approx(2.0) and found.sigma(0.7) == pytest.approx(0.5**0.5)
    assert found.table().split() == "sigma share 8.000 0.450 4.000 0.300 1.000 0.500 0.500 0.900".split()


def test_no_level_where_the_share_is_crossed():
    with pytest.raises(ValueError, match="model: expected a network that makes out 0.4 of the detail .*got 0.300"):
        Calibration(((0.05, 0.3), (1.0, 0.0))).sigma()
    with pytest.raises(
        ValueError, match="scheduler: expected levels up to one .*got 0.700 at the highest, sigma 0.900"
    ):
        Calibration(((0.05, 1.0), (0.9, 0.7))).sigma()


@pytest.mark.parametrize(
    "scale, predicts, message",
    [
        (1.0, "epsilon", "scale: expected more than 1"),
        (1.01, "epsilon", "scale: expected one by which 16 x 16 cells become fewer, got 1.01"),
        (100.0, "epsilon", "scale: expected one by which 16 x 16 cells become fewer, got 100"),
        (2.0, "other", "scheduler: expected a scheduler whose noise levels are known"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_is_painted(scale, predicts, message):
    chosen = scheduler()
    chosen.set_timesteps(3)
    chosen.register_to_config(prediction_type=predicts)
    with pytest.raises(ValueError, match=message):
        measure(lambda *_: pytest.fail("painted"), torch.zeros(1, 4, 16, 16), chosen, scale=scale)

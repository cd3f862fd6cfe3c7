"""Noise levels, and what predictions say at them."""

import diffusers
import pytest
import torch

from instantas.sampling.noise import Level, levels
from instantas.testing.tiny import scheduler


@pytest.mark.parametrize("predicts", ["epsilon", "sample", "v_prediction", "flow_prediction"])
def test_levels_turn_predictions_into_clean_samples_and_back(predicts):
    pair = (0.8, 0.6) if predicts != "flow_prediction" else (0.3, 0.7)
    later = (0.96, 0.28) if predicts != "flow_prediction" else (0.9, 0.1)
    level, to = Level(*pair, predicts), Level(*later, predicts)
    clean, eps = torch.randn(2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    said = {
        "epsilon": lambda a, s: eps,
        "sample": lambda a, s: clean,
        "v_prediction": lambda a, s: a * eps - s * clean,
        "flow_prediction": lambda a, s: eps - clean,
    }[predicts]
    x = level.signal * clean + level.noise * eps
    assert torch.allclose(level.clean(said(*pair), x), clean)
    assert torch.allclose(level.prediction(clean, x), said(*pair))
    (p, q), (p_later, q_later) = level.carry, to.carry
    x_later = to.signal * clean + to.noise * eps
    assert torch.allclose((p * x + q * said(*pair) - p_later * x_later) / q_later, said(*later))


def test_levels_are_read_off_the_scheduler():
    ddim = scheduler("v_prediction")
    ddim.set_timesteps(10)
    for level, t in zip(levels(ddim), ddim.timesteps):
        assert level.signal**2 == pytest.approx(ddim.alphas_cumprod[t].item(), rel=1e-5)
        assert level.signal**2 + level.noise**2 == pytest.approx(1)
        assert level.predicts == "v_prediction"
    euler = scheduler(kind=diffusers.EulerDiscreteScheduler, timestep_spacing="linspace")
    euler.set_timesteps(7)  # timesteps between the table's entries
    for level, sigma in zip(levels(euler), euler.sigmas):
        assert level.noise / level.signal == pytest.approx(sigma.item(), rel=1e-3)
    flow = diffusers.FlowMatchEulerDiscreteScheduler()
    flow.set_timesteps(5)
    assert [level.noise for level in levels(flow)] == pytest.approx(flow.sigmas[:5].tolist())
    assert levels(object.__new__(type("Other", (), {}))) is None

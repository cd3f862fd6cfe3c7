"""k-diffusion's samplers with a model that has windows: the plain model's pictures at native size."""

import pytest
import torch

from instantas import Windowed
from instantas.sampling.hosted import keep_eps, step_of

sampling = pytest.importorskip("k_diffusion.sampling", reason="k-diffusion is not installed")

WINDOW = 8
SIGMAS = sampling.get_sigmas_karras(6, 0.03, 14.6)
SAMPLERS = ["euler", "heun", "dpm_2", "dpmpp_2m", "dpmpp_2m_sde", "dpmpp_3m_sde", "dpm_adaptive", "lms"]


def denoise(x, sigma):
    """Says something else of every place of a window."""
    ramp = torch.linspace(-1, 1, x.shape[-1])
    sigma = sigma[:, None, None, None]
    return x / (1 + sigma**2) + 0.1 * torch.tanh(x.mean((-2, -1), keepdim=True) + ramp)


def windowed(seen, bridging="shift"):
    """The same model, on windows."""
    host = Windowed(WINDOW, bridging=bridging)

    def model(x, sigma):
        def evaluate(windows, place):
            seen.append(tuple(windows.shape[-2:]))
            return denoise(windows, place.pick(sigma))

        return host(evaluate, x, step_of(SIGMAS, sigma), len(SIGMAS) - 1, carry=keep_eps, mark=sigma[0])

    return model


def noise(*size):
    return torch.randn(2, 4, *size, generator=torch.Generator().manual_seed(0)) * SIGMAS[0]


def sampled(name, model, x):
    run, given = getattr(sampling, f"sample_{name}"), {}
    if name.endswith("sde"):
        seeded = torch.Generator().manual_seed(1)
        given = {"noise_sampler": lambda *levels: torch.randn(x.shape, generator=seeded)}
    schedule = (0.03, 14.6) if name == "dpm_adaptive" else (SIGMAS,)
    return run(model, x, *schedule, disable=True, **given)


@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers_at_native_size_and_at_another(name):
    seen = []
    assert torch.equal(sampled(name, windowed(seen), noise(8, 8)), sampled(name, denoise, noise(8, 8)))
    for bridging in ("shift", "economy"):
        large = sampled(name, windowed(seen, bridging), noise(12, 20))
        assert large.shape == (2, 4, 12, 20) and large.isfinite().all()
    assert set(seen) == {(WINDOW, WINDOW)}


def test_gradients_flow_at_native_size():
    plain, ours = (noise(8, 8).requires_grad_() for _ in range(2))
    denoise(plain, SIGMAS[2].expand(2)).square().sum().backward()
    windowed([])(ours, SIGMAS[2].expand(2)).square().sum().backward()
    assert torch.equal(plain.grad, ours.grad) and plain.grad.any()

"""A diffusers scheduler's update as a short linear recurrence, read off the scheduler itself.

DDIM, Euler, DPM-Solver(++), PNDM, LMS, UniPC, DEIS, Heun and KDPM2 are linear in the starting noise and the model
outputs so far. Run on one-hot basis vectors, such a scheduler shows its coefficients; what it keeps between steps shows
what its history is made of. No scheduler is written down again here.
"""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

MAX_HISTORY = 4  # PNDM looks back four entries, as its second step counts for none
TOLERANCE = 2e-5  # relative: schedulers keep their own tables in float32
_SPREAD = 3.0  # standard deviation of the trajectory that tests a recurrence: far enough out for any clipping to show


@dataclass(frozen=True)
class Recurrence:
    """The steps x' = a x + b m + sum_j c_j h_j with history entries h = d x + e m.

    Attributes:
        coefficients: (steps, 2 + k) float64, rows (a, b, c_1 .. c_k), the newest entry first.
        keep: (steps, 2) float64, rows (d, e).
        input_scale: (steps,) float64, by which `scale_model_input` multiplies the sample.
    """

    coefficients: torch.Tensor
    keep: torch.Tensor
    input_scale: torch.Tensor

    @property
    def history(self) -> int:
        """k, the number of entries the steps look back."""
        return self.coefficients.shape[1] - 2

    def to(self, device: torch.device | str) -> Recurrence:
        return Recurrence(*(table.to(device) for table in (self.coefficients, self.keep, self.input_scale)))


def step_keywords(scheduler: Any, generator: Any = None, eta: float = 0.0) -> dict[str, Any]:
    """The keywords among generator and eta that `scheduler.step` takes."""
    accepted = inspect.signature(scheduler.step).parameters
    return {name: value for name, value in (("generator", generator), ("eta", eta)) if name in accepted}


def probe(scheduler: Any, eta: float = 0.0, begin: int = 0) -> Recurrence | None:
    """The recurrence of a scheduler whose timesteps are set, from one of them on; None if its steps are not one.

    A scheduler that draws noise (if only to multiply it by zero: the next draw from the generator depends on it), is
    not linear (thresholding, clipping) or looks back further than `MAX_HISTORY` has none. Copies of the scheduler are
    run in float64 on the CPU; neither it nor any random state is touched.

    Raises:
        ValueError: for steps that give NaN or infinite numbers, and a scheduler that does not take such predictions.
    """
    steps = len(scheduler.timesteps) - begin
    with torch.random.fork_rng(devices=[]):
        host: Any = dict(dtype=torch.float64, device="cpu")  # whatever the default device is
        noise = torch.randn(1 + steps, 64, generator=torch.Generator().manual_seed(0), **host) * _SPREAD
        trajectory, _, _, draws = _run(scheduler, noise[0], noise[1:], eta, begin)
        if not np.isfinite(trajectory).all():
            step = int(np.isfinite(trajectory[1:]).all(1).argmin())
            raise ValueError(
                f"scheduler: expected finite steps, got NaN or infinite ones of {type(scheduler).__name__} from "
                f"timestep {scheduler.timesteps[begin + step]} on, for {_said(scheduler)}"
            )
        if draws:
            return None
        basis = torch.eye(1 + steps, **host)
        x, scale, kept, _ = _run(scheduler, basis[0], basis[1:], eta, begin)
    if scale is None:
        return None
    m = basis[1:].numpy()
    for k in range(MAX_HISTORY + 1):
        for keep in _entries(x, m, kept) if k else [np.tile((0.0, 1.0), (steps, 1))]:
            coefficients = _solve(x, m, keep, k)
            if coefficients is not None and _reproduces(coefficients, keep, noise.numpy(), trajectory):
                return Recurrence(*map(torch.from_numpy, (coefficients, keep, scale)))
    return None


class _Table(torch.Tensor):
    """A tensor whose numpy functions, which DEIS calls on its noise levels, give tensors without a warning."""

    def __array_wrap__(self, array, context=None, return_scalar=False):
        return torch.as_tensor(array)


def _said(scheduler: Any) -> str:
    """What of a scheduler's configuration a division by zero comes from."""
    config = getattr(scheduler, "config", {})
    names = ("prediction_type", "rescale_betas_zero_snr", "timestep_spacing")
    return ", ".join(f"{name}={config[name]!r}" for name in names if name in config) or "its configuration"


def begin_at(scheduler: Any, begin: int) -> None:
    """Have the steps of a scheduler that counts them begin at one of its timesteps, as diffusers' img2img does."""
    if begin and hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(begin)


def copied(scheduler: Any) -> Any:
    """A copy whose tensors are on the CPU, to be run on vectors."""
    scheduler = copy.deepcopy(scheduler)
    for name, value in vars(scheduler).items():
        if isinstance(value, torch.Tensor):
            setattr(scheduler, name, value.cpu().as_subclass(_Table))
    return scheduler


def unplaced(scheduler: Any) -> Any:
    """A copy that finds the noise of a timestep by the timestep, wherever its steps were set to begin."""
    scheduler = copy.deepcopy(scheduler)
    if hasattr(scheduler, "_begin_index"):
        scheduler._begin_index = None
    return scheduler


def noise_after(scheduler: Any, begin: int, steps: int) -> torch.Tensor:
    """(steps, 2) float64: the signal and the noise that a sample has after each step, which begin at a timestep.

    Read off the scheduler's `add_noise` for the next timestep; 1 and 0 after its last.

    Raises:
        TypeError: for a scheduler that has none.
    """
    if not callable(getattr(scheduler, "add_noise", None)):
        raise TypeError(f"scheduler: expected one with add_noise, got {type(scheduler).__name__}")
    scheduler = unplaced(scheduler)
    table = torch.tensor([[1.0, 0.0]] * steps, dtype=torch.float64, device="cpu")
    timesteps = scheduler.timesteps[begin + 1 : begin + 1 + steps].cpu()
    if len(timesteps):
        signal = table[: len(timesteps)].clone()
        table[: len(timesteps)] = scheduler.add_noise(signal, signal.flip(1), timesteps)
    return table


def _run(scheduler, sample, outputs, eta, begin):
    """Run a copy on vectors.

    Returns:
        samples (steps + 1, n), input scale (steps,) or None, what it kept after each step, whether it drew noise.
    """
    scheduler = copied(scheduler)
    begin_at(scheduler, begin)
    generator = torch.Generator().manual_seed(1)
    torch.default_generator.manual_seed(1)  # the CPU's alone: torch.manual_seed would reach every GPU's
    states = [source.get_state() for source in (generator, torch.default_generator)]
    keywords = step_keywords(scheduler, generator, eta)
    samples, scales, kept = [sample], [], []
    for t, output in zip(scheduler.timesteps[begin:], outputs):
        sample = samples[-1].reshape(1, 1, 1, -1)
        scaled = scheduler.scale_model_input(sample, t) if hasattr(scheduler, "scale_model_input") else sample
        scale = (sample * scaled).sum() / (sample * sample).sum()
        scales.append(scale if torch.allclose(scaled.double(), scale * sample, rtol=TOLERANCE) else None)
        try:
            sample = scheduler.step(output.reshape(sample.shape), t, sample, return_dict=False, **keywords)[0]
        except NotImplementedError as error:
            raise ValueError(
                f"scheduler: expected one that takes what the model predicts, got {type(scheduler).__name__}: {error}"
            ) from error
        samples.append(sample.flatten().double())
        kept.append(_state(scheduler, sample.shape))
    scales = None if None in scales else torch.stack(scales).double().numpy()
    drawn = [source.get_state() for source in (generator, torch.default_generator)]
    return torch.stack(samples).numpy(), scales, kept, not all(map(torch.equal, states, drawn))


def _state(scheduler: Any, shape: torch.Size) -> dict[str, np.ndarray]:
    """Attribute name -> the newest tensor of the sample's shape that the scheduler holds under it."""
    state = {}
    for name, value in vars(scheduler).items():
        for tensor in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(tensor, torch.Tensor) and tensor.shape == shape:
                state[name] = tensor.flatten().double().numpy()
    return state


def _entries(x, m, kept):
    """Candidates for the history entries, (steps, 2) each: the model output, and whatever the scheduler keeps."""
    plain = np.tile((0.0, 1.0), (len(m), 1))
    yield plain
    for name in dict.fromkeys(name for state in kept for name in state):
        keep = plain.copy()
        for t, state in enumerate(kept):
            if name in state:
                pair = np.stack([x[t], m[t]], axis=1)
                found = np.linalg.lstsq(pair, state[name], rcond=None)[0]
                if np.allclose(pair @ found, state[name], rtol=TOLERANCE, atol=TOLERANCE):
                    keep[t] = found
        yield keep


def _solve(x, m, keep, k):
    """(steps, 2 + k) coefficients that turn each basis sample into the next, or None."""
    entries = keep[:, :1] * x[:-1] + keep[:, 1:] * m
    coefficients = np.zeros((len(m), 2 + k))
    for t in range(len(m)):
        columns = np.stack([x[t], m[t], *entries[max(0, t - k) : t][::-1]], axis=1)
        found = np.linalg.lstsq(columns, x[t + 1], rcond=None)[0]
        if abs(columns @ found - x[t + 1]).max() > TOLERANCE * max(1.0, abs(x[t + 1]).max()):
            return None
        coefficients[t, : len(found)] = found
    return coefficients


def _reproduces(coefficients: np.ndarray, keep: np.ndarray, noise: np.ndarray, trajectory: np.ndarray) -> bool:
    """Whether the recurrence follows the scheduler along a trajectory that it was not read from."""
    x, k = noise[0], coefficients.shape[1] - 2
    history = [np.zeros_like(x)] * k
    for (a, b, *cs), (d, e), m, wanted in zip(coefficients, keep, noise[1:], trajectory[1:]):
        new = a * x + b * m + sum(c * h for c, h in zip(cs, history))
        history = [d * x + e * m, *history][:k]
        x = new
        if not abs(x - wanted).max() <= TOLERANCE * max(1.0, abs(wanted).max()):
            return False
    return True

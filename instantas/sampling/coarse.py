"""A start on a smaller canvas, where few windows see the whole: one scene in place of many, for fewer evaluations.

The smaller canvas is denoised in few steps. Its clean latents are carried up to the larger one: they become the low
frequencies of its spectrum, the frequencies above get random detail, and noise over all is that of a timestep from
which the larger canvas goes on.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from instantas.checks import real
from instantas.sampling import bridging
from instantas.sampling.checkpoint import Recorder
from instantas.sampling.noise import Level, levels
from instantas.sampling.schedulers import unplaced
from instantas.sampling.spectrum import carry, normal, with_detail
from instantas.sampling.step import StepContext
from instantas.windows import WindowPlan

SIGMA = 1.5
"""From where a coarse start goes on with a model that was not measured (`instantas calibrate`), a choice for Stable
Diffusion 1.x, 2.x and XL: they share a noise schedule (scaled linear, 0.00085 to 0.012, in which it is timestep 477)
and latents of unit deviation, on which a noise level means the same. It is what pictures of the embedded model,
trained on that schedule, were best with of the levels tried (docs/structure.md); on the three it was never measured.
Other schedules have it for want of a better one."""


@dataclass(frozen=True)
class CoarseStart:
    """Begin on a smaller canvas of the same proportions.

    The smallest has the native window's length on the axis along which the canvas has fewer windows, so that one window
    or a row of them sees the whole. A canvas of a single row or column of windows has no smaller one, and starts as
    ever. With z_0 (n x n) the clean latents that a run of few steps ends with there, C_n the orthonormal DCT-II (real
    Fourier basis where the axis wraps), and s = N / n the enlargement of an axis,

        x_0 = C_N^T [ s C_n z_0 C_n^T  in the corner of low frequencies, d elsewhere ] C_N

    goes on with the noise of a later timestep. d is Gaussian, with the power that z_0 itself has at the same frequency
    in cycles per cell: a cell is as large on both canvases. Without it the network finds frequencies that the noise
    does not cover empty, and leaves them so: the picture is soft.

    Attributes:
        sigma: noise / signal at which the larger canvas goes on, at the timestep whose level is nearest. The lower, the
            fewer evaluations are left, and the more of the smaller canvas's detail stays, enlarged. None: what was
            measured of the model (`instantas.pipelines.calibration`), else `SIGMA`.
        steps: part of the scheduler's steps that a run on a smaller canvas takes, above 0, at most 1.
        scale: how many times as long a side becomes at once, more than 1; larger canvases take several stages.
    """

    sigma: float | None = None
    steps: float = 0.4
    scale: float = 3.0

    def __post_init__(self):
        if self.sigma is not None:
            real("sigma", self.sigma, 0, above=True)
        real("steps", self.steps, 0, 1, above=True)
        real("scale", self.scale, 1, 1e9, above=True)

    def sizes(self, plan: WindowPlan) -> list[tuple[int, int]]:
        """(rows, columns) of the smaller canvases, the smallest first; none where there are no smaller ones."""
        lengths = plan.height, plan.width
        ratio = min(length / window for length, window in zip(lengths, plan.window))
        if ratio <= 1:
            return []
        stages = math.ceil(math.log(ratio) / math.log(self.scale) - 1e-9)
        factors = [ratio ** (i / stages - 1) for i in range(stages)]
        return [(round(plan.height * factor), round(plan.width * factor)) for factor in factors]


STARTS: dict[str, CoarseStart | None] = {"none": None, "coarse": CoarseStart()}


def start_of(name: str | CoarseStart | None, measured: float | None = None) -> CoarseStart | None:
    """The start of a name, one of `STARTS`, or of an object, with a sigma; None is returned as it is.

    measured: the model's own sigma, for a start that has none; None: it was not measured, `SIGMA` is taken.

    Raises:
        ValueError: for an unknown name, and a measured sigma that is none.
        TypeError: for anything else.
    """
    if isinstance(name, str) and name not in STARTS:
        raise ValueError(f"start: expected one of {', '.join(STARTS)}, got {name!r}")
    start = STARTS[name] if isinstance(name, str) else name
    if start is not None and not isinstance(start, CoarseStart):
        raise TypeError(f"start: expected a name or a CoarseStart, got {type(start).__name__}")
    if start is None or start.sigma is not None:
        return start
    return replace(start, sigma=SIGMA if measured is None else real("coarse_sigma", measured, 0, above=True))


class Leg(NamedTuple):
    """A run on one canvas.

    Attributes:
        plan: its windows.
        scheduler: with its timesteps set.
        begin: number of the timestep at which it begins; None: with noise, at the first.
        end: after how many of the scheduler's timesteps it ends; None: all.
    """

    plan: WindowPlan
    scheduler: Any
    begin: int | None = None
    end: int | None = None

    @property
    def steps(self) -> int:
        """Timesteps of which the network is evaluated."""
        return (len(self.scheduler.timesteps) if self.end is None else self.end) - (self.begin or 0)


def legs(start: CoarseStart | None, plan: WindowPlan, scheduler: Any, end: int | None = None) -> list[Leg]:
    """The runs of a start, the last one on the plan's own canvas; that one alone without smaller canvases.

    Args:
        scheduler: with its timesteps set; smaller canvases have copies of it.
        end: after how many of them the last run ends; None: all.

    Raises:
        ValueError: for a scheduler whose noise levels are not known, for a plan of more than the fewest windows, and
            for an end before the last run begins.
    """
    sizes = [] if start is None else start.sizes(plan)
    if start is None or not sizes:
        return [Leg(plan, scheduler, None, end)]
    if plan.count != plan.lower_bound:
        raise ValueError(f"start: expected a plan of the fewest windows, {plan.lower_bound}, got {plan.count}")
    few, found, sigma = _few_steps(scheduler, start.steps), list[Leg](), start.sigma or SIGMA
    for size in sizes:
        small = WindowPlan.minimum_coverage(*size, plan.window, wrap=plan.wrap)
        found.append(Leg(small, copy.deepcopy(few), _begin(few, sigma) if found else None))
    last = Leg(plan, scheduler, _begin(scheduler, sigma), end)
    if last.steps < 1:
        raise ValueError(f"start: expected to go on before the run's end, after {end} timesteps, got {last.begin}")
    return [*found, last]


def evaluations(
    bridge: str | bridging.Bridge | None, runs: list[Leg], until: StepContext | None = None, **settings: Any
) -> int:
    """Windows evaluated in all runs of `legs`, for one picture and one branch of guidance: `bridging.evaluations`.

    until: those before a step of one of them; None: all.
    settings: of the last, as `bridging.evaluations` takes them.
    """
    if until is not None:
        sizes = [(leg.plan.height, leg.plan.width) for leg in runs]
        runs = runs[: sizes.index(until.size) + 1]
    *before, last = runs

    def count(leg, first=None, **settings):
        predicted = leg.begin is not None and levels(leg.scheduler) is not None
        here = bridging.going_on(bridging.bridge(bridge)) if predicted else bridge
        return bridging.evaluations(here, leg.plan, leg.steps, first, **settings)

    first = None if until is None else until.step
    return sum(map(count, before)) + count(last, first, **settings)


def begun(
    sample: Callable,
    latents: torch.Tensor,
    runs: list[Leg],
    guidance_scale: Any,
    callback: Callable | None,
    recorder: Recorder,
    first: int = 0,
    **settings: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What the last leg begins with, (B, C, H, W), the clean latents and the noise in it; runs the legs before it.

    Args:
        sample: `sampler.sample`, of everything but what is said here.
        latents: (B, C, H, W) standard normal noise of the last leg's canvas. The smallest begins with its low
            frequencies; detail and noise of larger ones are drawn from the generator.
        recorder: of the last leg; the others are kept in its file.
        first: the leg of which that file is, which goes on from it; 0 without a file.
        settings: of `sample`, `generator` among them.

    Raises:
        Interrupted: where the callback ended the run.
    """
    begins = runs[first].plan  # another than the smallest with the file's canvas, whatever is given here
    x, ended = carry(latents, (begins.height, begins.width), begins.wrap), list[bool]()
    clean = noise = x
    for number, (leg, after) in list(enumerate(zip(runs, runs[1:])))[first:]:
        wider = after.plan.height, after.plan.width
        clean = sample(
            latents=x,
            plan=leg.plan,
            scheduler=leg.scheduler,
            begin=leg.begin,
            origin=None if leg.begin is None else (clean, noise),
            weight=leg.plan.weight("linear").to(x.device) if leg.plan.overlap else None,
            guidance_scale=_fitted(guidance_scale, leg.plan),
            callback=_told(callback, sum(run.steps for run in runs[:number]), ended),
            checkpoint=recorder.of_leg(number),
            **settings,
        )
        group = settings.get("group")
        if ended if group is None else group.first(lambda: ended):  # the callback is rank 0's
            raise Interrupted(enlarged(clean, (latents.shape[-2], latents.shape[-1]), leg.plan.wrap))
        clean = with_detail(clean, wider, after.plan.wrap, settings["generator"])
        noise = normal(clean, settings["generator"])
        x = noised(after.scheduler, clean, noise, after.begin or 0)
    return x, clean, noise


class Interrupted(Exception):
    """The callback ended a run on a smaller canvas; latents: what it ended with, carried to the last canvas."""

    def __init__(self, latents: torch.Tensor):
        self.latents = latents


def counted_from(callback: Callable | None, before: int) -> Callable | None:
    """The callback of `sampler.sample`, told of so many more steps."""
    if callback is None or not before:
        return callback

    def told(step, timestep, latents, **more):
        return callback(step + before, timestep, latents, **more)

    return _like(told, callback)


def known_levels(name: str, scheduler: Any) -> list[Level]:
    """Of each of the scheduler's timesteps; `name` of the argument, for errors.

    Raises:
        ValueError: for a scheduler whose noise levels are not known, or that adds no noise.
    """
    known, add = levels(scheduler), getattr(scheduler, "scale_noise", getattr(scheduler, "add_noise", None))
    if known is None or add is None:
        raise ValueError(
            f"{name}: expected a scheduler whose noise levels are known (alphas_cumprod or flow sigmas), and that adds "
            f"noise, got {type(scheduler).__name__}"
        )
    return known


def noised(scheduler: Any, clean: torch.Tensor, noise: torch.Tensor, begin: int) -> torch.Tensor:
    """The clean sample with the noise of a scheduler's timestep, given by number."""
    timestep, scheduler = scheduler.timesteps[begin : begin + 1].to(clean.device), unplaced(scheduler)
    if hasattr(scheduler, "scale_noise"):  # of flow matching
        return scheduler.scale_noise(clean, timestep, noise)
    return scheduler.add_noise(clean, noise, timestep)


def enlarged(latents: torch.Tensor, size: tuple[int, int], wrap: tuple[bool, bool]) -> torch.Tensor:
    """Latents (B, C, H, W) of a smaller canvas, carried to a size, (rows, columns), as bright as they are; of that size
    as they are."""
    if latents.shape[2:] == size:
        return latents
    return carry(latents, size, wrap) * math.sqrt(size[0] * size[1] / (latents.shape[-2] * latents.shape[-1]))


def _few_steps(scheduler, share):
    """A copy of the scheduler with part of its steps."""
    few = copy.deepcopy(scheduler)
    number = getattr(scheduler, "num_inference_steps", None) or len(scheduler.timesteps)
    try:
        few.set_timesteps(max(1, round(share * number)), device=scheduler.timesteps.device)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"start: expected a scheduler whose set_timesteps takes a number of steps alone, for the smaller canvas, "
            f"got {type(scheduler).__name__} ({error})"
        ) from error
    return few


def _begin(scheduler, sigma):
    """Number of the timestep whose noise / signal is nearest, at which a step begins."""
    if hasattr(scheduler, "prk_timesteps") or hasattr(scheduler, "get_lms_coefficient"):
        raise ValueError(
            f"start: expected a scheduler whose steps can begin at any timestep, got {type(scheduler).__name__}, which "
            "counts them from the first: DDIMScheduler, EulerDiscreteScheduler or DPMSolverMultistepScheduler can"
        )
    order = getattr(scheduler, "order", 1)
    distance = [abs(math.log(max(each.sigma, 1e-6) / sigma)) for each in known_levels("start", scheduler)[::order]]
    return order * distance.index(min(distance))


def _fitted(guidance, plan):
    """The guidance scale, where it is a map of the larger canvas one of the plan's."""
    if callable(guidance):
        return lambda context: _fitted(guidance(context), plan)
    if isinstance(guidance, torch.Tensor) and guidance.dim() == 2:
        return F.adaptive_avg_pool2d(guidance[None], (plan.height, plan.width))[0]
    return guidance


def _told(callback, before, ended):
    """The callback on a smaller canvas; `ended` gets an entry when it ends the run."""
    if callback is None:
        return None
    counted = counted_from(callback, before)

    def told(step, timestep, latents, **more):
        try:
            return counted(step, timestep, latents, **more)
        except StopIteration:
            ended.append(True)
            raise

    return _like(told, callback)


def _like(told, callback):
    """A function with the callback's signature and, where it has one, its state."""
    functools.update_wrapper(told, callback)
    for name in ("state_dict", "load_state_dict"):
        if hasattr(callback, name):
            setattr(told, name, getattr(callback, name))
    return told

"""The sampling loop: gather windows, denoise them in batches, take one scheduler step on the whole canvas.

Model-agnostic: the denoiser is any function of a batch of windows. Everything beside its evaluation is three passes
over the canvas.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from instantas import ops
from instantas.checks import flag, integer, positive, real
from instantas.sampling import coarse
from instantas.sampling.bridging import Bridge, Stage, View, bridge, limited
from instantas.sampling.checkpoint import Checkpoint, Recorder
from instantas.sampling.coarse import CoarseStart
from instantas.sampling.evaluator import Evaluator
from instantas.sampling.fingerprint import digests
from instantas.sampling.graphs import StepGraphs
from instantas.sampling.known import Known, Restorer
from instantas.sampling.noise import Level, levels
from instantas.sampling.parallel import SharedEvaluator, call_back, shared
from instantas.sampling.prediction import Prediction, predict
from instantas.sampling.schedulers import begin_at, noise_after, probe, step_keywords
from instantas.windows import WindowPlan


@dataclass(frozen=True)
class StepContext:
    """What a denoiser may want to know about the windows it is given.

    Attributes:
        step, steps: index of the evaluation and how many there are (second-order schedulers evaluate twice a step).
        timestep: the scheduler's timestep, 0-dimensional, on the latents' device.
        plan: the windows of this step.
        rows: (m, 2) int64 on the CPU, the (picture, window) of each window given.
        level: the step's noise level, and what is predicted; None for a scheduler whose levels are not known. With
            `cuda_graph` its numbers may be tensors.
        pictures: (m,) int64 on the latents' device, the picture of each window given.
        origins: (m, 2) int32 on the latents' device, the (y, x) of each.
        view: what they are cut from (`bridging.View`, for masks to be seen through too); None: the canvas.
        guided: whether the unconditional prediction counts at this step (`guidance_interval`); where it does not, a
            denoiser may save it.
        captured: whether the call is captured in a CUDA graph. The tensors on the device then are of the step that is
            replayed, and all else is of one step for several, whose pictures are the same and whose windows may lie
            elsewhere.
    """

    step: int
    steps: int
    timestep: torch.Tensor
    plan: WindowPlan
    rows: torch.Tensor
    level: Level | None
    pictures: torch.Tensor
    origins: torch.Tensor
    view: View | None = None
    guided: bool = True
    captured: bool = False

    @property
    def size(self) -> tuple[int, int]:
        """(rows, columns) of the canvas, which may be a smaller one than the run's (`coarse.CoarseStart`)."""
        plan = self.plan if self.view is None else self.view.whole
        return plan.height, plan.width

    def subset(self, some: slice) -> StepContext:
        """The context of a part of the windows."""
        return replace(self, rows=self.rows[some], pictures=self.pictures[some], origins=self.origins[some])


@shared
def sample(
    denoiser: Callable,
    latents: torch.Tensor,
    plan: WindowPlan,
    scheduler: Any,
    *,
    num_inference_steps: int | None = None,
    timesteps: Sequence[int] | None = None,
    evaluations: int | None = None,
    begin: int | None = None,
    known: Known | None = None,
    guidance_scale: float | torch.Tensor | Callable = 1.0,
    guidance_rescale: float | Callable = 0.0,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    eta: float = 0.0,
    generator: torch.Generator | list[torch.Generator] | None = None,
    weight: torch.Tensor | None = None,
    window_batch_size: int | None = None,
    bridging: str | Bridge | None = None,
    start: str | CoarseStart | None = None,
    cuda_graph: bool = False,
    callback: Callable | None = None,
    checkpoint: str | os.PathLike | Checkpoint | None = None,
    group: Any = None,
) -> torch.Tensor:
    """Denoise a canvas of any size through the windows of a plan.

    Every step scales the canvas for the scheduler, cuts it into windows, evaluates the denoiser on them, merges the
    predictions, and takes ONE scheduler step on the whole canvas. A scheduler that is a short linear recurrence
    (`instantas.sampling.schedulers.probe`) has merging, guidance and its step done by `ops.guided_step`; any other has
    `scheduler.step` called once on the merged prediction. Ancestral noise is drawn over the whole canvas, so the result
    depends on the seed, not on the windows' batches.

    DDPM's ancestral step is diffusers': the posterior q(x_{t-1} | x_t, x_0) with standard deviation
    sqrt((1 - abar_{t-1}) / (1 - abar_t) beta_t), equation 7 of the InstantAS supplement. Its equation 9 (variance in
    the standard deviation's place, 1/sqrt(abar_t) for 1/sqrt(alpha_t), an x_0 network read as noise) is not followed.

    Args:
        denoiser: function of (windows (m, C, h, w), timestep, context: StepContext) that returns the prediction, or the
            pair (cond, uncond) for classifier-free guidance. Windows come picture by picture.
        latents: (B, C, H, W) standard normal noise, which is multiplied by the scheduler's initial standard deviation;
            with `begin` what the scheduler's `add_noise` made of a clean sample for the timestep of that number.
        plan: the windows over (H, W).
        scheduler: a diffusers scheduler.
        num_inference_steps, timesteps: at most one; given to the scheduler's `set_timesteps`. Neither: the timesteps
            that the scheduler has already.
        evaluations: after how many of the scheduler's timesteps the run ends; None: all.
        begin: number of the timestep at which a run begins that goes on from a picture (img2img, SDEdit); None: it
            begins with noise, at the first. Bridges and callbacks count the steps that are taken.
        known: the cells that are not painted, but are what they are in known latents; None: all are painted.
        guidance_scale: g of u + g (c - u), a float or a (H, W) tensor; of no effect without uncond. Or a function of
            the `StepContext` of all windows that gives it, or None for no guidance, asked before each step.
        guidance_rescale: share by which the guided prediction is rescaled to the standard deviation of cond (Lin et al.
            2024, section 3.4), over the whole canvas, beside `known` cells over the resting windows that are evaluated;
            or a function that gives it, as for `guidance_scale`.
        guidance_interval: (start, end), fractions of the run: steps that begin before its start or at its end and later
            take cond alone (Kynkäänniemi et al. 2024).
        eta: of schedulers that take it (DDIM).
        generator: for schedulers that draw noise; a list has one for each picture.
        weight: overlap weight of the windows, as `ops.scatter_windows` takes it.
        window_batch_size: windows in one call of the denoiser; None: 4. Halved, with one warning, when memory is out.
        bridging: name or object (`instantas.sampling.bridging`) that chooses plan, evaluated windows and adjustment of
            each step. None: the same plan at every step. With a plan per step, `weight` must fit them all.
        start: "coarse" or an object (`instantas.sampling.coarse.CoarseStart`): the run begins on a smaller canvas, with
            what `latents` have of its frequencies, and goes on from a later timestep on that of the plan. The denoiser
            is given windows of either (`StepContext.size`), each canvas counts its own steps, a guidance map is made
            smaller, and callbacks are given the latents of the canvas at hand. For schedulers with known noise levels.
            None or "none": all steps on the plan's canvas.
        cuda_graph: capture a step, from gathering to the scheduler's update, once for all steps that are alike, and
            replay it: `instantas.sampling.graphs`. For a denoiser that CUDA can capture, on a scheduler with a
            recurrence. No gradients.
        callback: function of (step, timestep, latents) after each step; returns latents to go on with, or None.
            StopIteration ends the run, with its value as the latents if it has one. One with a parameter `denoised` is
            told the clean latents that `scheduler.step` gave beside, None where it gives none or is not called.
        checkpoint: file in which the run is kept after every step (`instantas.sampling.checkpoint`, to say more), and
            from which it goes on, to the same bits, if it is there. What tells a denoiser from another is what its
            method `fingerprint` gives, names and values, if it has one. No gradients pass a file.
        group: the processes that share the windows: of torch.distributed, a DeviceMesh of one dimension, True for all,
            or `parallel.Ranks`. All call with the same arguments, latents and generators being rank 0's, and get the
            latents that one process gets, bit for bit. The callback is rank 0's, and so is the checkpoint's file. With
            fewer batches than processes some have nothing to do: see `window_batch_size`. No gradients pass between.

    Returns:
        (B, C, H, W) latents, of the dtype given.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came, before the denoiser is called.
        PeerError: where another process has failed or is gone, naming it and its reason.
    """
    evaluate = SharedEvaluator(denoiser, window_batch_size, group) if group else Evaluator(denoiser, window_batch_size)
    bridging, start, checkpoint = bridge(bridging), coarse.start_of(start), Checkpoint.of(checkpoint)
    _check_run(latents, plan)
    check_settings(len(latents), 0.0 if callable(guidance_rescale) else guidance_rescale, eta, generator)
    interval = check_interval(guidance_interval)
    set_timesteps(scheduler, num_inference_steps, timesteps, latents.device)
    for name, value in dict(begin=begin, known=known).items():
        if start is not None and value is not None:
            raise ValueError(f"{name}: expected None with a start, which says itself where it goes on, got {value}")
    *before, last = coarse.legs(start, plan, scheduler, evaluations)
    if before:
        begin, evaluations = last.begin, last.steps
    from_picture, begin = begin is not None, _begin(begin or 0, len(scheduler.timesteps))
    timesteps = scheduler.timesteps[begin:]
    timesteps = timesteps[: _evaluations(evaluations, len(timesteps))]
    stages = _stages(bridging, plan, len(timesteps), weight, latents.device)
    if known is not None:
        stages = _beside(known, stages, latents)
        restored = Restorer(known, noise_after(scheduler, begin, len(stages)), [stage for stage, _ in stages])
    noise_levels = _levels(scheduler, stages, begin)
    _check_step(latents, [(Stage(plan), weight), *stages], 1.0 if callable(guidance_scale) else guidance_scale)
    recurrence = probe(scheduler, eta, begin)
    _check_graph(cuda_graph, latents, scheduler, recurrence, (guidance_scale, guidance_rescale), group)

    update = _LinearUpdate(recurrence) if recurrence else _SchedulerUpdate(scheduler, generator, eta, begin)
    reuse = any(stage.plan.partial for stage, _ in stages)
    evaluated = None if known is None else _evaluated(known, plan)
    advance: Callable = _Advance(evaluate, update, guidance_scale, guidance_rescale, plan, reuse, evaluated)
    steps = _steps(latents, timesteps, stages, noise_levels, recurrence, interval)
    told = {} if callback is None or "denoised" not in inspect.signature(callback).parameters else {"denoised": None}
    deviation = 1.0 if from_picture else getattr(scheduler, "init_noise_sigma", 1.0)
    run = {}
    if group or checkpoint:
        run = digests(
            dict(
                latents=(latents.shape, latents.dtype),
                plan=[(s.plan, w, s.view) for s, w in stages],
                scheduler=scheduler,
                timesteps=timesteps,
                guidance_scale=guidance_scale,
                guidance_rescale=guidance_rescale,
                guidance_interval=interval,
                eta=eta,
                generator=len(generator) if isinstance(generator, list) else generator is None,
                bridging=bridging,
                start=start,
                denoiser=denoiser,
                known=None if known is None else (known.latents, known.noise, known.painted, known.told),
            )
            | getattr(denoiser, "fingerprint", dict)()
        )
    if group:
        ways = dict(window_batch_size=evaluate.batches.size, callback=callback is None, checkpoint=checkpoint is None)
        group.same(run | digests(ways))
        group.seeded(generator, latents.device)
        latents = group.broadcast(latents)
    if checkpoint:
        run |= digests(dict(latents=latents, generator=generator))
    recorder = Recorder(
        checkpoint,
        run,
        len(steps),
        latents.device,
        scheduler=update.scheduler,
        generators=generator if isinstance(generator, list) else [generator],
        callback=callback,
        eta=eta,
        overwritten=cuda_graph,
        ranks=group,
    )
    latest = known.prediction(noise_levels[0]).to(latents.dtype) if known is not None and reuse else None
    state, done = recorder.resume(State(latents * deviation, update.history(latents), latest))
    if before and not done:
        settings: dict[str, Any] = dict(guidance_rescale=guidance_rescale, guidance_interval=interval, eta=eta)
        settings |= dict(generator=generator, window_batch_size=window_batch_size, bridging=bridging)
        settings |= dict(cuda_graph=cuda_graph, group=group)
        begin_smaller = functools.partial(sample, denoiser)
        try:
            begun = coarse.begun(begin_smaller, latents, [*before, last], guidance_scale, callback, **settings)
        except coarse.Interrupted as stop:
            return stop.latents
        state = replace(state, canvas=begun)
    callback = coarse.counted_from(callback, sum(leg.steps for leg in before))
    if cuda_graph:
        advance = StepGraphs(advance, steps[done:], getattr(denoiser, "phase", None))
    with recorder:
        for t, step in zip(timesteps[done:], steps[done:]):
            state, denoised, stopped = advance(state, step), update.denoised, False
            if known is not None:
                state = replace(state, canvas=restored(step.context.step, state.canvas))
                denoised = denoised if denoised is None else restored.denoised(step.context.step, denoised)
            if callback is not None:
                told = {name: denoised for name in told}
                call = call_back if group is None else group.call_back
                canvas = state.canvas.clone() if cuda_graph else state.canvas
                replaced, stopped = call(callback, step.context.step, t, canvas, **told)
                state = state if replaced is None else replace(state, canvas=replaced)
            recorder.keep(state, step.context.step + 1, last=stopped)
            if stopped:
                break
    if group:
        group.check(state.canvas)
    return state.canvas


@dataclass(frozen=True)
class State:
    """What goes from step to step: the canvas (B, C, H, W), the scheduler's history (k, B, C, H, W), and where
    predictions are re-used the latest of each cell (branches of guidance, B, C, H, W), as `ops.guided_step` keeps them.
    """

    canvas: torch.Tensor
    history: torch.Tensor | None = None
    latest: torch.Tensor | None = None


@dataclass(frozen=True, eq=False)
class Step:
    """What one step does, with its numbers on the device.

    Attributes:
        context: of all windows.
        weight: overlap weight.
        carry: (2,) the form in which predictions are kept, of the canvas that `scale` has not multiplied.
        coefficients, keep, scale: of `schedulers.Recurrence`; None for a scheduler that has none.
    """

    context: StepContext
    stage: Stage
    weight: torch.Tensor | None
    carry: torch.Tensor
    coefficients: torch.Tensor | None = None
    keep: torch.Tensor | None = None
    scale: torch.Tensor | None = None


class _Advance:
    """One step of a run: a function of (state, step) that gives the next state, and waits for no device."""

    def __init__(self, evaluate, update, guidance, rescale, plan, reuse, evaluated):
        self.evaluate, self.update, self.guidance, self.rescale = evaluate, update, guidance, rescale
        self.whole = WindowPlan.minimum_coverage(plan.height, plan.width, (plan.height, plan.width))
        self.reuse, self.evaluated = reuse, evaluated

    def __call__(self, state: State, step: Step) -> State:
        stage, context, latest = step.stage, step.context, state.latest
        guidance, rescale = (v(context) if callable(v) else v for v in (self.guidance, self.rescale))
        canvas, scale = self.update.scale(state.canvas, step)
        predicted = predict(self.evaluate, canvas, step.weight, context, scale, self.evaluate.gather)
        if not context.plan.count and latest is not None and len(latest) == 2:
            predicted = replace(predicted, uncond=predicted.cond)
        if guidance is None or not context.guided:
            predicted = predicted.conditional()
        if self.reuse:
            predicted = predicted.kept(latest, step.carry, canvas)
        if predicted.uncond is not None and rescale > 0:
            guided, latest = predicted.merged(canvas, guidance)
            cond = predicted.conditional().merged(canvas, 1.0)[0]
            rescaled = _rescaled(guided, cond, rescale, self.evaluated)
            predicted = Prediction.of_canvas(rescaled, None, self.whole)
        if stage.adjust is not None:
            merged, kept = predicted.merged(canvas, guidance)
            latest = latest if kept is None else kept
            noisy = canvas if scale is None else canvas * scale
            predicted = Prediction.of_canvas(stage.adjust(merged, noisy, context), None, self.whole)
        advanced, history, kept = self.update.step(predicted, guidance, canvas, state, step)
        latest = latest if kept is None else kept
        if latest is not None and state.latest is not None and len(latest) < len(state.latest):
            latest = latest.expand_as(state.latest)  # guidance was off
        return State(advanced, history, latest)


def set_timesteps(
    scheduler: Any,
    num_inference_steps: int | None,
    timesteps: Sequence[int] | None,
    device: torch.device,
    sigmas: Sequence[float] | None = None,
    **settings: Any,
) -> None:
    """Set a number of steps or a list of timesteps or sigmas on the scheduler; none: keep those that it has."""
    if isinstance(scheduler, type):
        raise TypeError(
            f"scheduler: expected an instance, got the class; {scheduler.__name__}.from_config(...) makes one"
        )
    for method in ("set_timesteps", "step"):
        if not callable(getattr(scheduler, method, None)):
            raise TypeError(f"scheduler: expected a diffusers scheduler, got {type(scheduler).__name__}")
    ways: dict[str, Any] = dict(num_inference_steps=num_inference_steps, timesteps=timesteps, sigmas=sigmas)
    given = [name for name, value in ways.items() if value is not None]
    if len(given) > 1:
        raise ValueError(f"{given[1]}: expected either {given[1]} or {given[0]}, got both")
    accepted = inspect.signature(scheduler.set_timesteps).parameters
    for name, value in (dict(timesteps=timesteps, sigmas=sigmas) | settings).items():
        if value is not None and name not in accepted:
            raise ValueError(f"{name}: expected None, as {type(scheduler).__name__} takes none, got {value}")
    if timesteps is not None or sigmas is not None:
        scheduler.set_timesteps(**{given[0]: list(ways[given[0]])}, device=device, **settings)
    elif num_inference_steps is not None:
        scheduler.set_timesteps(positive("num_inference_steps", num_inference_steps), device=device, **settings)
    elif getattr(scheduler, "num_inference_steps", None) is None and not getattr(scheduler, "custom_timesteps", False):
        raise ValueError("num_inference_steps: expected a number, as the scheduler has no timesteps set, got None")
    elif getattr(scheduler, "step_index", None) is not None or getattr(scheduler, "counter", None):
        raise ValueError("num_inference_steps: expected a number, as the scheduler has taken steps already, got None")
    if not len(scheduler.timesteps):
        raise ValueError("timesteps: expected at least one, got none")


class _LinearUpdate:
    """Merging, guidance and the scheduler's step in one pass, with coefficients that lie on the device.

    scale: (canvas, by what it is to be multiplied for the network, or None for nothing). step: (the next canvas, its
    history, the latest predictions), from the canvas that `scale` gave. scheduler: whose steps are taken; None: none's.
    """

    denoised = scheduler = None

    def __init__(self, recurrence):
        self.scaled, self.entries = bool((recurrence.input_scale != 1).any()), recurrence.history

    def history(self, latents):
        return latents.new_zeros(self.entries, *latents.shape) if self.entries else None

    def scale(self, canvas, step):
        return canvas, step.scale if self.scaled else None

    def step(self, predicted, guidance, canvas, state, step):
        return predicted.step(canvas, step.coefficients, guidance, step.keep, state.history)


class _SchedulerUpdate:
    """The scheduler's own step, once, on the merged prediction."""

    def __init__(self, scheduler, generator, eta, begin):
        begin_at(scheduler, begin)
        self.scheduler, self.denoised = scheduler, None
        self.keywords = step_keywords(scheduler, generator, eta)

    def history(self, latents):
        return None

    def scale(self, canvas, step):
        scale = getattr(self.scheduler, "scale_model_input", None)
        return canvas if scale is None else scale(canvas, step.context.timestep).to(canvas.dtype), None

    def step(self, predicted, guidance, canvas, state, step):
        merged, latest = predicted.merged(canvas, guidance)
        stepped = self.scheduler.step(merged, step.context.timestep, state.canvas, return_dict=False, **self.keywords)
        self.denoised = stepped[1] if len(stepped) > 1 else None
        return stepped[0].to(canvas.dtype), None, latest


def _rescaled(guided, cond, share, evaluated):
    whole = [each.flatten(2) for each in (cond, guided)]
    some = whole if evaluated is None else [each[..., evaluated] for each in whole]
    spread, guided_spread = (each.std((1, 2), keepdim=True)[..., None] for each in some)
    return guided * (share * spread / guided_spread + 1 - share)


def _beside(known, stages, latents):
    """The stages of a run, without the windows that hold nothing to be painted."""
    if not isinstance(known, Known):
        raise TypeError(f"known: expected a Known, got {type(known).__name__}")
    if known.latents.shape != latents.shape:
        raise ValueError(f"known: expected latents {tuple(latents.shape)}, got {tuple(known.latents.shape)}")
    some = limited([stage for stage, _ in stages], known.cells)
    return [(stage, weight) for stage, (_, weight) in zip(some, stages)]


def _evaluated(known, plan):
    """(k,) int64, the cells of the windows of a plan that hold something to be painted; None: all cells."""
    (rest,) = limited([Stage(plan)], known.cells)
    if not rest.plan.partial or not rest.plan.count:
        return None
    return torch.from_numpy((rest.plan.coverage() > 0).ravel().nonzero()[0]).to(known.latents.device)


def _steps(latents, timesteps, stages, noise_levels, recurrence, interval):
    """All steps, with everything from the host copied before the first: the loop waits for no device."""
    device, steps, like = latents.device, [], {}
    numbers = recurrence and recurrence.to(device)
    carry = torch.tensor([level.carry if level else (0.0, 1.0) for level in noise_levels], dtype=torch.float64)
    if recurrence:
        carry[:, 0] *= recurrence.input_scale[: len(carry)]
    carry = carry.to(device)
    for i, (t, level, (stage, weight)) in enumerate(zip(timesteps, noise_levels, stages)):
        count = stage.plan.count
        if count not in like:
            rows = torch.cartesian_prod(torch.arange(len(latents)), torch.arange(count))
            like[count] = rows, rows.to(device)
        rows, placed = like[count]
        if stage.view is not None:
            stage.view.on(device)
        pictures, origins = placed[:, 0], stage.plan.tables(device).origins[placed[:, 1]]
        guided = interval[0] <= i / len(stages) < interval[1]
        context = StepContext(i, len(stages), t, stage.plan, rows, level, pictures, origins, stage.view, guided)
        step = Step(context, stage, weight, carry[i])
        if recurrence:
            table = numbers.coefficients[i], numbers.keep[i], numbers.input_scale[i]
            step = replace(step, **dict(zip(("coefficients", "keep", "scale"), table)))
        steps.append(step)
    return steps


def _stages(bridging, plan, steps, weight, device):
    """(stage, overlap weight) of every step."""
    weight = _tracked(weight)
    if bridging is None:
        return [(Stage(plan), weight)] * steps
    stages = [bridging.step(i, steps, plan) for i in range(steps)]
    for i, stage in enumerate(stages):
        size, wanted = (stage.plan.height, stage.plan.width), (plan.height, plan.width)
        if stage.view is not None:
            wanted = (len(stage.view.rows), len(stage.view.columns))
        if size != wanted:
            raise ValueError(f"bridging: expected plans of {wanted[0]} x {wanted[1]} cells, got {size} at step {i}")
        if stage.plan.partial and (i == 0 or stage.view is not None):
            why = "there is nothing to re-use" if i == 0 else "a view is seen whole"
            raise ValueError(f"bridging: expected every cell covered at step {i}, as {why}, got {stage.plan}")
    return [(stage, weight if stage.weight is None else _tracked(stage.weight.to(device))) for stage in stages]


def _tracked(weight):
    """A weight that says whether it was changed, which an inference tensor does not: its values are read once."""
    if not isinstance(weight, torch.Tensor) or not weight.is_inference():
        return weight
    with torch.inference_mode(False):
        return weight.clone()


def _levels(scheduler, stages, begin):
    """The noise level of each step, None where nothing is known of it and nobody asks."""
    found = levels(scheduler)
    found = found and found[begin:]
    if found is None and any(stage.adjust is not None for stage, _ in stages):
        raise ValueError(
            "bridging: expected a scheduler with alphas_cumprod or flow sigmas, as the bridge adjusts predictions, got "
            f"{type(scheduler).__name__}"
        )
    return found or [None] * len(stages)


def _check_run(latents, plan):
    if not isinstance(plan, WindowPlan):
        raise TypeError(f"plan: expected a WindowPlan, got {type(plan).__name__}")
    if not isinstance(latents, torch.Tensor) or not latents.is_floating_point():
        raise TypeError(
            f"latents: expected a tensor of floats, got {getattr(latents, 'dtype', type(latents).__name__)}"
        )
    if latents.dim() != 4 or latents.shape[2:] != (plan.height, plan.width):
        raise ValueError(f"latents: expected (B, C, {plan.height}, {plan.width}), got {tuple(latents.shape)}")


def check_settings(pictures: int, guidance_rescale: Any, eta: Any, generator: Any) -> None:
    """Refuse what `sample` cannot be called with; raises TypeError, ValueError."""
    for name, value in (("guidance_rescale", guidance_rescale), ("eta", eta)):
        real(name, value, 0, 1)
    generators = generator if isinstance(generator, list) else [generator]
    if wrong := [g for g in generators if not (g is None or isinstance(g, torch.Generator))]:
        raise TypeError(f"generator: expected a torch.Generator or a list of them, got {type(wrong[0]).__name__}")
    if isinstance(generator, list) and len(generator) != pictures:
        raise ValueError(f"generator: expected one for each of {pictures} pictures, got {len(generator)}")


def check_interval(interval: Any) -> tuple[float, float]:
    """(start, end) with 0 <= start < end <= 1; raises TypeError, ValueError."""
    if not isinstance(interval, (tuple, list)) or len(interval) != 2:
        raise TypeError(f"guidance_interval: expected (start, end), got {interval!r}")
    start, end = (real("guidance_interval", each, 0, 1) for each in interval)
    if start >= end:
        raise ValueError(f"guidance_interval: expected start < end, got {interval}")
    return start, end


def _begin(begin, timesteps):
    if integer("begin", begin, 0) >= timesteps:
        raise ValueError(f"begin: expected less than the scheduler's {timesteps} timesteps, got {begin}")
    return begin


def _evaluations(number, timesteps):
    if number is not None and positive("evaluations", number) > timesteps:
        raise ValueError(f"evaluations: expected at most the scheduler's {timesteps} timesteps, got {number}")
    return timesteps if number is None else number


def _check_graph(cuda_graph, latents, scheduler, recurrence, guidance=(), group=None):
    if flag("cuda_graph", cuda_graph) and group:
        raise ValueError("cuda_graph: expected False with a group, for whose exchange the host waits, got True")
    if cuda_graph and latents.device.type != "cuda":
        raise ValueError(f"cuda_graph: expected False for latents that are not on a CUDA device, got {latents.device}")
    if cuda_graph and recurrence is None:
        raise ValueError(
            "cuda_graph: expected False with a scheduler that draws noise or is no short linear recurrence, got True "
            f"with {type(scheduler).__name__}"
        )
    if cuda_graph and any(callable(value) for value in guidance):
        raise ValueError("guidance_scale: expected a number with cuda_graph, got a function")


def _check_step(latents, stages, guidance_scale):
    """Run the canvas operations once on no picture at all: they check plan, weight and guidance scale."""
    none = latents[:0]
    for stage, weight in {(id(s.plan), id(w)): (s, w) for s, w in stages if s.view is None}.values():
        windows, latest = ops.gather_windows(none, stage.plan), torch.stack([none, none])
        numbers = (1.0, 0.0), guidance_scale
        ops.guided_step(windows, windows, none, stage.plan, *numbers, weight=weight, latest=latest)

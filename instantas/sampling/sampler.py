"""The sampling loop: gather windows, denoise them in batches, take one scheduler step on the whole canvas.

Model-agnostic: the denoiser is any function of a batch of windows. Everything beside its evaluation is three passes
over the canvas.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from instantas.sampling import coarse
from instantas.sampling.bridging import Bridge, Stage, bridge, going_on
from instantas.sampling.checkpoint import Checkpoint, Recorder
from instantas.sampling.coarse import CoarseStart
from instantas.sampling.evaluator import Evaluator
from instantas.sampling.fingerprint import digests
from instantas.sampling.graphs import StepGraphs
from instantas.sampling.known import Known, Restorer, prediction_of
from instantas.sampling.noise import levels
from instantas.sampling.parallel import SharedEvaluator, call_back, shared
from instantas.sampling.schedulers import noise_after, probe
from instantas.sampling.settings import (
    beside,
    check_graph,
    check_interval,
    check_origin,
    check_run,
    check_settings,
    check_step,
    check_whole,
    checked_begin,
    checked_evaluations,
    evaluated_cells,
    levels_of,
    set_timesteps,
    stages_of,
)
from instantas.sampling.step import Advance, LinearUpdate, SchedulerUpdate, State, steps_of
from instantas.windows import WindowPlan


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
    origin: tuple[torch.Tensor, torch.Tensor] | None = None,
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
        origin: with `begin`, the clean sample and the noise that `latents` were made of, both (B, C, H, W). What a
            network would predict that knew them is there for cells that no window of the first step covers, so that
            windows can move at it too (`bridging.going_on`). None: it is not known, the first step's windows rest, as
            they do with a scheduler whose noise levels are not (EDM's).
        known: the cells that are not painted, but are what they are in known latents; None: all are painted.
        guidance_scale: g of u + g (c - u), a float or a (H, W) tensor; of no effect without uncond. Or a function of
            the `StepContext` of all windows that gives it, or None for no guidance, asked before each step.
        guidance_rescale: share by which the guided prediction is rescaled to the standard deviation of cond (Lin et al.
            2024, section 3.4), over the whole canvas, beside `known` cells over the resting windows that are evaluated;
            or a function that gives it, as for `guidance_scale`.
        guidance_interval: (start, end), fractions of the run: steps that begin before its start or at its end and later
            take cond alone (Kynkäänniemi et al. 2024).
        eta: of schedulers that take it (DDIM).
        generator: for schedulers that draw noise, and for the detail and noise of a `start`; a list has one for each
            picture.
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
            from which it goes on, to the same bits, if it is there, on any canvas of a `start`. What tells a denoiser
            from another is what its method `fingerprint` gives, names and values, if it has one. No gradients pass a
            file.
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
    check_run(latents, plan)
    check_settings(len(latents), 0.0 if callable(guidance_rescale) else guidance_rescale, eta, generator)
    interval = check_interval(guidance_interval)
    set_timesteps(scheduler, num_inference_steps, timesteps, latents.device)
    checked_evaluations(evaluations, len(scheduler.timesteps))
    for name, value in dict(begin=begin, origin=origin, known=known).items():
        if start is not None and value is not None:
            got = type(value).__name__
            raise ValueError(f"{name}: expected None with a start, which says itself where it goes on, got {got}")
    *before, last = coarse.legs(start, plan, scheduler, evaluations)
    if before:
        begin, evaluations = last.begin, last.steps
    check_origin(origin, latents, begin)
    if levels(scheduler) is None:
        origin = None  # nobody can say what the network would predict
    from_picture, begin = begin is not None, checked_begin(begin or 0, len(scheduler.timesteps))
    timesteps = scheduler.timesteps[begin:]
    timesteps = timesteps[: checked_evaluations(evaluations, len(timesteps))]
    predicted = bool(before) or origin is not None
    chosen = going_on(bridging) if predicted else bridging
    stages = stages_of(chosen, plan, len(timesteps), weight, latents.device, predicted)
    if known is not None:
        stages = beside(known, stages, latents)
        restored = Restorer(known, noise_after(scheduler, begin, len(stages)), [stage for stage, _ in stages])
    noise_levels = levels_of(scheduler, stages, begin)
    check_step(latents, [(Stage(plan), weight), *stages], 1.0 if callable(guidance_scale) else guidance_scale)
    recurrence = probe(scheduler, eta, begin)
    check_graph(cuda_graph, latents, scheduler, recurrence, (guidance_scale, guidance_rescale), group)

    update = LinearUpdate(recurrence) if recurrence else SchedulerUpdate(scheduler, generator, eta, begin)
    reuse = any(stage.plan.partial for stage, _ in stages)
    evaluated = None if known is None else evaluated_cells(known, plan)
    advance: Callable = Advance(evaluate, update, guidance_scale, guidance_rescale, plan, reuse, evaluated)
    steps = steps_of(latents, timesteps, stages, noise_levels, recurrence, interval)
    told = [] if callback is None or "denoised" not in inspect.signature(callback).parameters else ["denoised"]
    deviation = 1.0 if from_picture else getattr(scheduler, "init_noise_sigma", 1.0)
    run = {}
    if group or checkpoint:
        named = dict(denoiser=denoiser) | getattr(denoiser, "fingerprint", dict)()
        if group:
            check_whole(named)
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
                start=before,
                origin=origin,
                known=None if known is None else (known.latents, known.noise, known.painted, known.told),
            )
            | named
        )
    if group:
        ways = dict(window_batch_size=evaluate.batches.size, callback=callback is None, checkpoint=checkpoint is None)
        group.same(run | digests(ways))
        group.begin()
        group.seeded(generator, latents.device)
        latents = group.broadcast(latents)
    if checkpoint:
        run |= digests(dict(latents=latents, generator=generator))
    recorder = Recorder(
        checkpoint,
        run,
        [*(leg.steps for leg in before), len(steps)],
        latents.device,
        scheduler=update.scheduler,
        generators=generator if isinstance(generator, list) else [generator],
        callback=callback,
        eta=eta,
        overwritten=cuda_graph,
        ranks=group,
    )
    if known is not None:
        origin = origin or (known.latents, known.noise)
    latest = prediction_of(*origin, noise_levels[0]).to(latents.dtype) if origin and reuse else None
    begin_with = State(latents if before else latents * deviation, update.history(latents), latest)
    state, done, leg = recorder.resume(begin_with)
    del begin_with, latest, origin  # here and below: no name but the state's holds a canvas on
    if leg < len(before):
        settings: dict[str, Any] = dict(guidance_rescale=guidance_rescale, guidance_interval=interval, eta=eta)
        settings |= dict(generator=generator, window_batch_size=window_batch_size, bridging=bridging)
        settings |= dict(cuda_graph=cuda_graph, group=group)
        begin_smaller = functools.partial(sample, denoiser)
        try:
            runs = [*before, last]
            canvas, clean, noise = coarse.begun(
                begin_smaller, latents, runs, guidance_scale, callback, recorder, leg, **settings
            )
        except coarse.Interrupted as stop:
            return stop.latents
        latest = prediction_of(clean, noise, noise_levels[0]).to(latents.dtype) if reuse else None
        state = replace(state, canvas=canvas, latest=latest)
        del canvas, clean, noise, latest
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
                call = call_back if group is None else group.call_back
                canvas = state.canvas.clone() if cuda_graph else state.canvas
                replaced, stopped = call(callback, step.context.step, t, canvas, **dict.fromkeys(told, denoised))
                state = state if replaced is None else replace(state, canvas=replaced)
                del canvas, replaced
            denoised = update.denoised = None
            recorder.keep(state, step.context.step + 1, last=stopped)
            if stopped:
                break
    if group:
        group.check(state.canvas)
    return state.canvas

"""One step of a run: what a denoiser is told, what goes on to the next step, and the scheduler's update."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from instantas.sampling.bridging import Stage, View
from instantas.sampling.evaluator import Evaluator
from instantas.sampling.noise import Level
from instantas.sampling.prediction import Prediction, predict
from instantas.sampling.schedulers import Recurrence, begin_at, step_keywords
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


class Advance:
    """One step of a run: a function of (state, step) that gives the next state, and waits for no device."""

    def __init__(
        self,
        evaluate: Evaluator,
        update: LinearUpdate | SchedulerUpdate,
        guidance: Any,
        rescale: Any,
        plan: WindowPlan,
        reuse: bool,
        evaluated: torch.Tensor | None,
    ):
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


class LinearUpdate:
    """Merging, guidance and the scheduler's step in one pass, with coefficients that lie on the device.

    scale: (canvas, by what it is to be multiplied for the network, or None for nothing). step: (the next canvas, its
    history, the latest predictions), from the canvas that `scale` gave. scheduler: whose steps are taken; None: none's.
    """

    denoised = scheduler = None

    def __init__(self, recurrence: Recurrence):
        self.scaled, self.entries = bool((recurrence.input_scale != 1).any()), recurrence.history

    def history(self, latents: torch.Tensor) -> torch.Tensor | None:
        return latents.new_zeros(self.entries, *latents.shape) if self.entries else None

    def scale(self, canvas: torch.Tensor, step: Step) -> tuple[torch.Tensor, torch.Tensor | None]:
        return canvas, step.scale if self.scaled else None

    def step(
        self, predicted: Prediction, guidance: Any, canvas: torch.Tensor, state: State, step: Step
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        assert step.coefficients is not None and step.keep is not None, "there is a recurrence"
        return predicted.step(canvas, step.coefficients, guidance, step.keep, state.history)


class SchedulerUpdate:
    """The scheduler's own step, once, on the merged prediction."""

    def __init__(self, scheduler: Any, generator: Any, eta: float, begin: int):
        begin_at(scheduler, begin)
        self.scheduler, self.denoised = scheduler, None
        self.keywords = step_keywords(scheduler, generator, eta)

    def history(self, latents: torch.Tensor) -> None:
        return None

    def scale(self, canvas: torch.Tensor, step: Step) -> tuple[torch.Tensor, None]:
        scale = getattr(self.scheduler, "scale_model_input", None)
        return canvas if scale is None else scale(canvas, step.context.timestep).to(canvas.dtype), None

    def step(
        self, predicted: Prediction, guidance: Any, canvas: torch.Tensor, state: State, step: Step
    ) -> tuple[torch.Tensor, None, torch.Tensor | None]:
        merged, latest = predicted.merged(canvas, guidance)
        stepped = self.scheduler.step(merged, step.context.timestep, state.canvas, return_dict=False, **self.keywords)
        self.denoised = stepped[1] if len(stepped) > 1 else None
        return stepped[0].to(canvas.dtype), None, latest


def _rescaled(guided, cond, share, evaluated):
    whole = [each.flatten(2) for each in (cond, guided)]
    some = whole if evaluated is None else [each[..., evaluated] for each in whole]
    spread, guided_spread = (each.std((1, 2), keepdim=True)[..., None] for each in some)
    return guided * (share * spread / guided_spread + 1 - share)


def steps_of(
    latents: torch.Tensor,
    timesteps: Sequence[Any],
    stages: Sequence[tuple[Stage, torch.Tensor | None]],
    noise_levels: Sequence[Level | None],
    recurrence: Recurrence | None,
    interval: tuple[float, float],
) -> list[Step]:
    """All steps, with everything from the host copied before the first: the loop waits for no device."""
    device, steps, like = latents.device, [], {}
    numbers = recurrence and recurrence.to(device)
    carry = torch.tensor(
        [level.carry if level else (0.0, 1.0) for level in noise_levels], dtype=torch.float64, device="cpu"
    )
    if recurrence:
        carry[:, 0] *= recurrence.input_scale[: len(carry)]
    carry = carry.to(device)
    for i, (t, level, (stage, weight)) in enumerate(zip(timesteps, noise_levels, stages)):
        count = stage.plan.count
        if count not in like:
            rows = torch.cartesian_prod(*(torch.arange(n, device="cpu") for n in (len(latents), count)))
            like[count] = rows, rows.to(device)
        rows, placed = like[count]
        if stage.view is not None:
            stage.view.on(device)
        pictures, origins = placed[:, 0], stage.plan.tables(device).origins[placed[:, 1]]
        guided = interval[0] <= i / len(stages) < interval[1]
        context = StepContext(i, len(stages), t, stage.plan, rows, level, pictures, origins, stage.view, guided)
        table = numbers and (numbers.coefficients[i], numbers.keep[i], numbers.input_scale[i])
        steps.append(Step(context, stage, weight, carry[i], *(table or ())))
    return steps

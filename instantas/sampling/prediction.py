"""What a network predicts for a canvas: through the windows of a stage, and the latest prediction where none lies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from instantas import ops
from instantas.windows import WindowPlan


@dataclass(frozen=True)
class Prediction:
    """Predictions of windows, and what of those made before counts where none of them lies.

    Attributes:
        cond, uncond: (B, n, C, h, w), with and without the prompt; uncond None: no guidance.
        plan, weight: where they lie, and how much each says, as `ops.guided_step` takes them.
        latest: (branches, B, C, H, W), the latest predictions in the form p x + q m, in which they are kept; None:
            nothing is kept, and the plan covers the canvas.
        carry: (2,) float64, (p, q) of the canvas x that they are made from.
    """

    cond: torch.Tensor
    uncond: torch.Tensor | None
    plan: WindowPlan
    weight: torch.Tensor | None = None
    latest: torch.Tensor | None = None
    carry: torch.Tensor | None = None

    @classmethod
    def of_canvas(cls, cond: torch.Tensor, uncond: torch.Tensor | None, whole: WindowPlan) -> Prediction:
        """One of all cells, (B, C, H, W); whole: the plan of one window that is the canvas."""
        return cls(cond[:, None], uncond if uncond is None else uncond[:, None], whole)

    def conditional(self) -> Prediction:
        """That with the prompt alone."""
        return replace(self, uncond=None, latest=None if self.latest is None else self.latest[:1])

    def kept(self, latest: torch.Tensor | None, carry: torch.Tensor | None, sample: torch.Tensor) -> Prediction:
        """This, with predictions made before: of both branches what was kept of either, or of none at the first step.

        Where guidance was off, the prompt's prediction stands for both, as u + g (c - u) is c then.
        """
        branches = 1 if self.uncond is None else 2
        if latest is None:
            latest = sample.new_zeros(branches, len(sample), *self.cond.shape[2:3], *sample.shape[2:])
        latest = latest[:branches] if len(latest) >= branches else latest.expand(branches, *latest.shape[1:])
        return replace(self, latest=latest, carry=carry)

    def step(
        self,
        sample: torch.Tensor,
        coefficients: torch.Tensor,
        guidance: Any,
        keep: torch.Tensor,
        history: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """`ops.guided_step` of the sample: the new sample, history and latest predictions (None: nothing is kept)."""
        settings: dict[str, Any] = dict(weight=self.weight, history=history, keep=keep)
        if self.latest is not None:
            settings |= dict(latest=self.latest, carry=self.carry)
        guidance = 1.0 if self.uncond is None else guidance
        stepped = ops.guided_step(self.cond, self.uncond, sample, self.plan, coefficients, guidance, **settings)
        return stepped if len(stepped) == 3 else (*stepped, None)

    def merged(self, sample: torch.Tensor, guidance: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The guided prediction of every cell (B, C, H, W), and the latest predictions."""
        no_step = torch.arange(2, dtype=torch.float64, device=sample.device)  # 0 x + 1 m, made where it is needed
        prediction, _, latest = self.step(sample, no_step, guidance, no_step)
        return prediction, latest


def predict(
    evaluate: Callable,
    canvas: torch.Tensor,
    weight: torch.Tensor | None,
    context: Any,
    scale: torch.Tensor | None = None,
    gather: Callable | None = None,
) -> Prediction:
    """The network's predictions for the windows of a step.

    Args:
        evaluate: function of (windows (m, C, h, w), context), as `evaluator.Evaluator`. Not called for no window.
        canvas: (B, C, H, W), `scale` times which is what the network sees.
        weight: overlap weight of the windows.
        context: `step.StepContext`, which has the windows and the view that they are cut from.
        gather: function of (canvas or what the view makes of it, plan, context) that gives those that this process
            evaluates, of which `evaluate` gives all; None: all of them.
    """
    plan, view = context.plan, context.view
    if not plan.count:
        return Prediction(canvas.new_empty(len(canvas), 0, canvas.shape[1], *plan.window), None, plan)
    seen = canvas if view is None else view.apply(canvas)
    windows = ops.gather_windows(seen, plan).flatten(0, 1) if gather is None else gather(seen, plan, context)
    predicted = evaluate(windows if scale is None else windows * scale, context)
    branches = [p.unflatten(0, (len(canvas), plan.count)) for p in predicted if p is not None]
    if view is None:
        return Prediction(branches[0], branches[1] if len(branches) > 1 else None, plan, weight)
    cond, *uncond = (view.invert(ops.scatter_windows(p, plan)) for p in branches)
    return Prediction.of_canvas(cond, uncond[0] if uncond else None, view.whole)


def cut(images: torch.Tensor, pictures: torch.Tensor, origins: torch.Tensor, window: tuple[int, int]) -> torch.Tensor:
    """(m, C, h, w): windows of images (B, C, H, W), going on round the far edges.

    pictures (m,) and origins (m, 2), the (y, x) of each window, are integers on the images' device.
    """
    height, width = images.shape[-2:]
    y, x = (
        (origins[:, axis, None].long() + torch.arange(side, device=images.device)) % length
        for axis, (side, length) in enumerate(zip(window, (height, width)))
    )
    rows = images.movedim(1, -1)[pictures[:, None, None], y[:, :, None], x[:, None, :]]
    return rows.movedim(-1, 1).contiguous()

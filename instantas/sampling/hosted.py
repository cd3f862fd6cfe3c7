"""Windows and bridges for a host that owns the sampling loop: ComfyUI, k-diffusion, another library's pipeline.

    host = Windowed(64)
    for step, sigma in enumerate(sigmas[:-1]):
        denoised = host(lambda windows, place: network(windows, sigma, place.pick(text)), x, step, len(sigmas) - 1)
        ...                                                 # the host's own update of x, of any size

Needs torch alone.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from typing import Any

import torch

from instantas.checks import flag, integer, pair, positive
from instantas.sampling.bridging import Bridge, Stage, View, bridge
from instantas.sampling.evaluator import Batches
from instantas.sampling.fingerprint import digests
from instantas.sampling.noise import Level
from instantas.sampling.parallel import joined, shared
from instantas.sampling.prediction import Prediction, cut, predict
from instantas.windows import WEIGHT_KINDS, WindowPlan


@dataclass(frozen=True)
class Place:
    """Which windows a call of the network is of, to cut whatever else belongs to the canvas for them.

    Attributes:
        plan: the windows of this step.
        pictures: (m,) int64 on x's device, the element of the host's batch that each window is of, in its order: all
            windows of the first element, then all of the second, so that [uncond, cond] stays that.
        origins: (m, 2) int32 on x's device, the (y, x) of each.
        numbers: of the plan's windows, those that each element of the batch has here.
        progress: step / steps.
        view: what they are cut from (`bridging.View`); None: the canvas.
        level: what the host gave as `mark`.
    """

    plan: WindowPlan
    pictures: torch.Tensor
    origins: torch.Tensor
    numbers: range
    progress: float
    view: View | None = None
    level: Any = None

    @classmethod
    def of(cls, stage: Stage, batch: int, progress: float, level: Any, device: torch.device) -> Place:
        """All windows of a stage, for each of so many elements of a batch."""
        count = stage.plan.count
        pictures = torch.arange(batch, device=device).repeat_interleave(count)
        origins = stage.plan.tables(device).origins.repeat(batch, 1)
        return cls(stage.plan, pictures, origins, range(count), progress, stage.view, level)

    def subset(self, some: slice) -> Place:
        """Some of these windows, the same of all elements."""
        each = len(self.numbers)
        pictures, origins = (t.unflatten(0, (-1, each))[:, some] for t in (self.pictures, self.origins))
        return replace(self, pictures=pictures.flatten(), origins=origins.flatten(0, 1), numbers=self.numbers[some])

    @property
    def size(self) -> tuple[int, int]:
        """(rows, columns) of the canvas."""
        plan = self.plan if self.view is None else self.view.whole
        return plan.height, plan.width

    def cut(self, tensor: torch.Tensor) -> torch.Tensor:
        """The windows (m, C, k h, k w) of a tensor (B or 1, C, k H, k W), as a mask or a control picture is.

        Raises:
            ValueError: for a tensor whose sides are not the canvas's times one whole number.
        """
        (rows, columns), size = tensor.shape[-2:], self.size
        k = max(1, rows // size[0])
        if tensor.dim() != 4 or (rows, columns) != (k * size[0], k * size[1]):
            raise ValueError(
                f"tensor: expected (B, C, {size[0]}, {size[1]}), or both sides times one whole number, got "
                f"{tuple(tensor.shape)}"
            )
        if self.view is not None:
            tensor = self.view.enlarged(k).apply(tensor)
        h, w = self.plan.window
        return cut(tensor, self.pictures % len(tensor), self.origins * k, (k * h, k * w))

    def pick(self, tensor: torch.Tensor) -> torch.Tensor:
        """The windows' rows of a tensor with one for each element of the host's batch, or with one for all."""
        return tensor[self.pictures % len(tensor)]

    def fit(self, value: Any, batch: int, size: tuple[int, int]) -> Any:
        """What of the host's arguments belongs to these windows, in dictionaries, lists and tuples too.

        Args:
            value: tensors (B, C, k H, k W) are cut, others with a row for each element of the batch are picked from;
                everything else stays what it is.
            batch: elements of the host's batch.
            size: (H, W) of its canvas.
        """
        if isinstance(value, dict):
            return {name: self.fit(each, batch, size) for name, each in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(self.fit(each, batch, size) for each in value)
        if not isinstance(value, torch.Tensor) or not value.dim():
            return value
        k = value.shape[-2] // size[0] if value.dim() == 4 else 0
        if k and tuple(value.shape[-2:]) == (k * size[0], k * size[1]):
            return self.cut(value)
        return self.pick(value) if len(value) == batch else value


class Windowed:
    """Evaluates a network through the windows of a canvas, step by step, for a host that owns the loop.

    Args:
        window: (h, w) cells that the network knows, or one integer for both.
        bridging: name or object, as `sample` takes it.
        window_batch_size: windows in one call of the network, of each element of the host's batch. Halved, with one
            warning, when memory is out.
        wrap: (vertical, horizontal): whether the canvas is a circle along the axis.
        align: windows begin at multiples of so many cells; canvas and window must be multiples too.
        weight: kind of `WindowPlan.weight`, for windows that have to overlap where they rest.
        group: the processes that share the windows of each evaluation, as `sample` takes it. All run the host's loop
            alike, with noise that is seeded alike; they are made, and evaluate, together.

    Attributes:
        group: `parallel.Ranks` or None. What fails between evaluations reaches the others where the loop is inside of
            `with host.group.together():`.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
        PeerError: where another process has failed or is gone.
    """

    @shared
    def __init__(
        self,
        window: int | tuple[int, int],
        *,
        bridging: str | Bridge | None = "shift",
        window_batch_size: int | None = None,
        wrap: bool | tuple[bool, bool] = (False, False),
        align: int = 1,
        weight: str = "uniform",
        group: Any = None,
    ):
        self.window, self.wrap = pair("window", window, positive), pair("wrap", wrap, flag)
        self.bridging, self.align = bridge(bridging), positive("align", align)
        if any(side % self.align for side in self.window):
            raise ValueError(f"align: expected a divisor of the window {self.window}, got {self.align}")
        if weight not in WEIGHT_KINDS:
            raise ValueError(f"weight: expected one of {', '.join(WEIGHT_KINDS)}, got {weight!r}")
        self.weight, self.batches = weight, Batches(window_batch_size)
        self.group, self._share = group, self.batches.size  # as asked for: halving changes nobody's windows
        if group:
            asked = dict(window=self.window, bridging=self.bridging, window_batch_size=self._share)
            group.same(digests(asked | dict(wrap=self.wrap, align=self.align, weight=weight)))
        self._stages: dict[tuple, list[Stage]] = {}
        self._latest: dict[Hashable, tuple[int, torch.Size, torch.Tensor]] = {}  # (step, x's shape, predictions)

    def reset(self) -> None:
        """Forget the predictions of the run before. Not needed where a run begins at an earlier step than it ended."""
        self._latest.clear()

    def plan(self, size: tuple[int, int]) -> WindowPlan:
        """The resting windows of a canvas of (H, W) cells: minimum coverage."""
        if any(side % self.align for side in size):
            raise ValueError(f"x: expected sides that are multiples of align = {self.align}, got {size}")
        cells = [(side // self.align, min(w, side) // self.align) for side, w in zip(size, self.window)]
        (height, h), (width, w) = cells
        plan = WindowPlan.minimum_coverage(height, width, (h, w), wrap=self.wrap)
        if self.align == 1:
            return plan
        window = h * self.align, w * self.align
        return WindowPlan(*size, window, plan.origins * self.align, plan.wrap)

    def __call__(
        self,
        evaluate: Callable[[torch.Tensor, Place], torch.Tensor],
        x: torch.Tensor,
        step: int,
        steps: int,
        *,
        stream: Hashable | list[Hashable] = None,
        carry: Callable[[Any], tuple[Any, Any]] | None = None,
        mark: Any = None,
    ) -> torch.Tensor:
        """The network's prediction for a canvas of any size, merged from its windows.

        A canvas that is one window, and does not wrap, is handed to the network untouched, and so is its answer.

        With a group each process evaluates some of the windows, or none, and all get the prediction that one process
        gets, bit for bit. All call with the same `x`, step, streams and mark: they are compared before each evaluation,
        which waits for the device. A canvas that is one window is evaluated by all. No gradients pass between.

        Args:
            evaluate: function of (windows (m, C, h, w), `Place`) that gives the network's predictions (m, C', h, w).
                Windows are grouped by element of the host's batch: see `Place.pictures`.
            x: (B, C, H, W), what the network would be given.
            step, steps: how far the run is, 0 <= step < steps. `step_of` finds it from a noise level.
            stream: names the condition whose predictions these are, where the host asks for several one by one, for
                example "cond" and "uncond": each re-uses its own. A list: of each equal part of the batch, for hosts
                that ask for several at once, and not always for the same ones. None: there is one.
            carry: function of `mark` that gives (p, q), numbers or tensors of one value: p x + q prediction is what
                stays the same from one noise level to the next. None: for a network that predicts noise. `keep_eps`:
                for one that predicts x_0 of x = x_0 + sigma eps. ``lambda level: level.carry``: for a `noise.Level`.
            mark: of this call, for `carry`; a `noise.Level` for bridges that adjust predictions.

        Returns:
            (B, C', H, W).

        Raises:
            TypeError, ValueError: naming the argument, what was expected and what came.
            PeerError: where another process has failed or is gone.
        """
        with joined(self.group):
            return self._merged(evaluate, x, step, steps, stream, carry, mark)

    def _merged(self, evaluate, x, step, steps, stream, carry, mark):
        if not isinstance(x, torch.Tensor) or x.dim() != 4:
            raise TypeError(f"x: expected a tensor (B, C, H, W), got {tuple(getattr(x, 'shape', (type(x).__name__,)))}")
        if not x.is_floating_point():
            raise TypeError(f"x: expected a tensor of floats, got {x.dtype}")
        if not callable(evaluate):
            raise TypeError(f"evaluate: expected a function, got {type(evaluate).__name__}")
        if integer("step", step, 0) >= positive("steps", steps):
            raise ValueError(f"step: expected 0 to {steps - 1}, got {step}")
        size = x.shape[-2], x.shape[-1]
        streams = stream if isinstance(stream, list) else [stream]
        if not streams or len(x) % len(streams):
            raise ValueError(f"stream: expected as many as divide a batch of {len(x)}, got {len(streams)}")
        stages = self._stages_of(size, steps)
        stage, latest = stages[step], self._known(streams, step, x)
        if stage.plan.partial and latest is None:  # a run may begin at any step, and then has nothing to re-use
            stage = self._resting(size)
        if stage.adjust is not None and not isinstance(mark, Level):
            raise ValueError(f"mark: expected a noise.Level, as the bridge adjusts predictions, got {mark!r}")
        if self.group:
            told = dict(x=x, step=step, steps=steps, stream=streams, mark=mark, plan=stage.plan)
            self.group.same(digests(told))
        place = Place.of(stage, len(x), step / steps, mark, x.device)
        if stage.plan.count == 1 and stage.plan.window == size and not stage.plan.origins.any() and not stage.adjust:
            return evaluate(x, place)
        predicted = self._predicted(evaluate, x, stage, place, latest)
        sample = _as_prediction(x, predicted.cond)
        if any(each.plan.partial for each in stages):
            form = (0.0, 1.0) if carry is None else carry(mark)
            numbers = [torch.as_tensor(number, dtype=torch.float64, device=x.device).flatten()[0] for number in form]
            predicted = predicted.kept(latest, torch.stack(numbers), sample)
        merged, latest = predicted.merged(sample, 1.0)
        if latest is not None:
            for each, part in zip(streams, latest.chunk(len(streams), dim=1)):
                self._latest[each] = step, x[: part.shape[1]].shape, part
        return merged if stage.adjust is None else stage.adjust(merged, sample, place)

    def _predicted(self, evaluate, x, stage, place, latest):
        plan = stage.plan
        if not plan.count:
            return Prediction(latest.new_empty(len(x), 0, latest.shape[2], *plan.window), None, plan)
        weight = None if stage.weight is None else stage.weight.to(x.device)
        own = place.subset(self.group.dealt(plan.count, self._share)) if self.group else place

        def call(windows, some):
            given = windows.transpose(0, 1).flatten(0, 1)
            out = evaluate(given, own.subset(some))
            if not isinstance(out, torch.Tensor):
                raise TypeError(f"evaluate: expected a tensor of predictions, got {type(out).__name__}")
            if out.dim() != 4 or (len(out), *out.shape[2:]) != (len(given), *given.shape[2:]):
                raise ValueError(
                    f"evaluate: expected predictions of {len(given)} windows of {tuple(given.shape[2:])}, got "
                    f"{tuple(out.shape)}"
                )
            return [out.unflatten(0, (len(x), -1)).transpose(0, 1).flatten(1, 2)]

        def evaluated(windows, place):
            by_window = windows.unflatten(0, (len(x), len(own.numbers))).transpose(0, 1)
            predicted = self.batches(call, by_window)
            if self.group:
                predicted = self.group.gathered(predicted, plan.count, self._share, x.device)
            return predicted[0].unflatten(1, (len(x), -1)).transpose(0, 1).flatten(0, 1), None

        def gather(seen, plan, place):
            return cut(seen, own.pictures, own.origins, plan.window)

        return predict(evaluated, x, weight, place, gather=gather if self.group else None)

    def _stages_of(self, size, steps):
        if (size, steps) not in self._stages:
            resting = self._resting(size)
            stages = [resting] * steps
            if self.bridging is not None:
                stages = [self._aligned(self.bridging.step(i, steps, resting.plan)) for i in range(steps)]
            weights = [resting.weight if stage.weight is None else stage.weight for stage in stages]
            self._stages[size, steps] = [replace(stage, weight=w) for stage, w in zip(stages, weights)]
        return self._stages[size, steps]

    def _resting(self, size):
        plan = self.plan(size)
        return Stage(plan, plan.weight(self.weight) if plan.overlap and self.weight != "uniform" else None)

    def _aligned(self, stage):
        if self.align == 1 or stage.view is not None:
            return stage
        plan = stage.plan
        origins = plan.origins // self.align * self.align
        return replace(stage, plan=WindowPlan(plan.height, plan.width, plan.window, origins, plan.wrap, partial=True))

    def _known(self, streams, step, x):
        """The streams' latest predictions; None if one of them has none, but another run's."""
        form, parts = x[: len(x) // len(streams)].shape, []
        for stream in streams:
            before, shape, latest = self._latest.get(stream, (0, None, None))
            if shape != form or before > step:
                return None
            parts.append(latest)
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def step_of(sigmas: torch.Tensor, sigma: torch.Tensor | float) -> int:
    """The step of a schedule in which a noise level lies: its own, or for one between two the one that has begun.

    sigmas: falling, as a k-diffusion sampler is given them; sigma: one value, or several equal ones.
    """
    sigma = torch.as_tensor(sigma, dtype=sigmas.dtype, device=sigmas.device).flatten()[0]
    begun = int((sigmas >= sigma * (1 - 1e-5)).sum())  # schedules keep their levels in float32
    return min(max(begun - 1, 0), max(len(sigmas) - 2, 0))


def keep_eps(sigma: torch.Tensor | float) -> tuple[Any, Any]:
    """`carry` for networks that predict x_0 of x = x_0 + sigma eps, with sigma as mark: eps = (x - x_0) / sigma."""
    return 1 / sigma, -1 / sigma


def _as_prediction(x, prediction):
    """x with as many channels as predictions (B, n, C', h, w): a network may be given more, or predict variances."""
    channels = prediction.shape[2]
    missing = max(0, channels - x.shape[1])
    return torch.nn.functional.pad(x[:, :channels], (0, 0, 0, 0, 0, missing)).to(prediction.dtype)

"""What a run is told: its timesteps and stages, and everything that `sample` refuses before the first evaluation."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from instantas import ops
from instantas.checks import flag, integer, positive, real
from instantas.sampling.bridging import Bridge, Stage, limited
from instantas.sampling.known import Known
from instantas.sampling.noise import Level, levels
from instantas.sampling.schedulers import Recurrence
from instantas.windows import WindowPlan

Weighted = tuple[Stage, torch.Tensor | None]  # what is done at a step, and the overlap weight of its windows


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
        number, kind = positive("num_inference_steps", num_inference_steps), type(scheduler).__name__
        try:
            scheduler.set_timesteps(number, device=device, **settings)
        except (IndexError, ValueError) as error:
            raise ValueError(
                f"num_inference_steps: expected a number that {kind} takes, got {number}: {error}"
            ) from error
    elif getattr(scheduler, "num_inference_steps", None) is None and not getattr(scheduler, "custom_timesteps", False):
        raise ValueError("num_inference_steps: expected a number, as the scheduler has no timesteps set, got None")
    elif getattr(scheduler, "step_index", None) is not None or getattr(scheduler, "counter", None):
        raise ValueError("num_inference_steps: expected a number, as the scheduler has taken steps already, got None")
    elif begin := getattr(scheduler, "begin_index", None):
        raise ValueError(
            f"num_inference_steps: expected a number, as the scheduler is set to begin at its step {begin}, got None"
        )
    if not len(scheduler.timesteps):
        raise ValueError("timesteps: expected at least one, got none")


def check_whole(told: Mapping[str, Any]) -> None:
    """Refuse networks, among what a run is told by name, with weights that are divided between processes.

    Raises:
        ValueError: naming the network.
    """
    from torch.distributed.tensor import DTensor  # which not every build of torch has

    for name, network in told.items():
        if isinstance(network, torch.nn.Module) and any(isinstance(each, DTensor) for each in network.parameters()):
            raise ValueError(f"{name}: expected whole weights in each process of a group, got divided ones (DTensor)")


def beside(known: Any, stages: list[Weighted], latents: torch.Tensor) -> list[Weighted]:
    """The stages of a run, without the windows that hold nothing to be painted."""
    if not isinstance(known, Known):
        raise TypeError(f"known: expected a Known, got {type(known).__name__}")
    if known.latents.shape != latents.shape:
        raise ValueError(f"known: expected latents {tuple(latents.shape)}, got {tuple(known.latents.shape)}")
    for name in ("latents", "noise", "painted"):
        if (device := getattr(known, name).device) != latents.device:
            raise ValueError(f"known: expected {name} on {latents.device}, got it on {device}")
    some, cells = limited([stage for stage, _ in stages], known.cells), known.cells.numpy()
    weights = {(id(s), id(w)): _weight_of(w, s, less, cells) for less, (s, w) in zip(some, stages)}
    return [(less, weights[id(stage), id(weight)]) for less, (stage, weight) in zip(some, stages)]


def _weight_of(weight, stage, less, cells):
    """The overlap weights of the windows that are left of a stage."""
    if less is stage or not isinstance(weight, torch.Tensor) or weight.dim() != 3 or len(weight) != stage.plan.count:
        return weight
    if stage.view is not None:
        return weight[:0]
    return weight[torch.from_numpy(stage.plan.holding(cells)).to(weight.device)]


def evaluated_cells(known: Known, plan: WindowPlan) -> torch.Tensor | None:
    """(k,) int64, the cells of the windows of a plan that hold something to be painted; None: all cells."""
    (rest,) = limited([Stage(plan)], known.cells)
    if not rest.plan.partial or not rest.plan.count:
        return None
    return torch.from_numpy((rest.plan.coverage() > 0).ravel().nonzero()[0]).to(known.latents.device)


def stages_of(
    bridging: Bridge | None,
    plan: WindowPlan,
    steps: int,
    weight: torch.Tensor | None,
    device: torch.device,
    predicted: bool = False,
) -> list[Weighted]:
    """(stage, overlap weight) of every step; predicted: whether the first has a prediction of every cell to re-use."""
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
        nothing = i == 0 and not predicted
        if stage.plan.partial and (nothing or stage.view is not None):
            why = "there is nothing to re-use" if nothing else "a view is seen whole"
            raise ValueError(f"bridging: expected every cell covered at step {i}, as {why}, got {stage.plan}")
    return [(stage, weight if stage.weight is None else _tracked(stage.weight.to(device))) for stage in stages]


def _tracked(weight):
    """A weight that says whether it was changed, which an inference tensor does not: its values are read once."""
    if not isinstance(weight, torch.Tensor) or not weight.is_inference():
        return weight
    with torch.inference_mode(False):
        return weight.clone()


def levels_of(scheduler: Any, stages: list[Weighted], begin: int) -> list[Level] | list[None]:
    """The noise level of each step, None where nothing is known of it and nobody asks."""
    found = levels(scheduler)
    found = found and found[begin:]
    if found is None and any(stage.adjust is not None for stage, _ in stages):
        raise ValueError(
            "bridging: expected a scheduler with alphas_cumprod or flow sigmas, as the bridge adjusts predictions, got "
            f"{type(scheduler).__name__}"
        )
    return found or [None] * len(stages)


def check_run(latents: Any, plan: Any) -> None:
    """Whether a plan is one, and the latents have its canvas's size."""
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
    check_generators(pictures, generator)


def check_generators(pictures: int, generator: Any) -> None:
    """Whether a generator is one, or a list with one for each picture; raises TypeError, ValueError."""
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


def checked_begin(begin: Any, timesteps: int) -> int:
    """The number of a run's first timestep."""
    if integer("begin", begin, 0) >= timesteps:
        raise ValueError(f"begin: expected less than the scheduler's {timesteps} timesteps, got {begin}")
    return begin


def check_origin(origin: Any, latents: torch.Tensor, begin: int | None) -> None:
    """Whether an origin is a clean sample and its noise, of a run that goes on from them."""
    if origin is None:
        return
    if not isinstance(origin, (tuple, list)) or not all(isinstance(each, torch.Tensor) for each in origin):
        raise TypeError(f"origin: expected (clean, noise), two tensors, got {type(origin).__name__}")
    wanted = [(tuple(latents.shape), latents.device)] * 2
    found = [(tuple(each.shape), each.device) for each in origin]
    if found != wanted:
        raise ValueError(f"origin: expected two of {wanted[0][0]} on {wanted[0][1]}, got {found}")
    if begin is None:
        raise ValueError("origin: expected None without begin, as the run begins with noise, got one")


def checked_evaluations(number: Any, timesteps: int) -> int:
    """How many timesteps a run takes of those that are left; None: all."""
    if number is not None and positive("evaluations", number) > timesteps:
        raise ValueError(f"evaluations: expected at most the scheduler's {timesteps} timesteps, got {number}")
    return timesteps if number is None else number


def check_graph(
    cuda_graph: Any,
    latents: torch.Tensor,
    scheduler: Any,
    recurrence: Recurrence | None,
    guidance: Sequence[Any] = (),
    group: Any = None,
) -> None:
    """Whether the steps of a run can be captured, where that is asked for."""
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


def check_step(latents: torch.Tensor, stages: list[Weighted], guidance_scale: Any) -> None:
    """Run the canvas operations once on no picture at all: they check plan, weight and guidance scale."""
    none = latents[:0]
    for stage, weight in {(id(s.plan), id(w)): (s, w) for s, w in stages if s.view is None}.values():
        windows, latest = ops.gather_windows(none, stage.plan), torch.stack([none, none])
        numbers = (1.0, 0.0), guidance_scale
        ops.guided_step(windows, windows, none, stage.plan, *numbers, weight=weight, latest=latest)

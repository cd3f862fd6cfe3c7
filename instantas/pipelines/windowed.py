"""Any diffusers pipeline with a UNet at any size: its own call, its network on native windows.

The pipeline calls UNet and ControlNets with whole canvases as ever. In front of the UNet stands `Windowed`, which calls
it on windows with whatever belongs to them; a ControlNet waits until the UNet says which windows it wants.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers import ControlNetModel, UNet2DConditionModel, UNetMotionModel
from diffusers.models.controlnets.controlnet import ControlNetOutput
from diffusers.models.controlnets.multicontrolnet import MultiControlNetModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from diffusers.models.unets.unet_motion_model import UNetMotionOutput

from instantas.pipelines.entry import SEEN, Seen, bound, entered, module_of
from instantas.pipelines.progress import Progress, is_running
from instantas.sampling.bridging import Bridge
from instantas.sampling.fingerprint import digests
from instantas.sampling.hosted import Place, Windowed
from instantas.sampling.noise import levels
from instantas.sampling.parallel import joined

ATTENTION_MAPS = "reads attention maps of the whole canvas, which windows do not have"
REFUSED = {
    "InstantASPipeline": "paints any size by itself",
    "StableDiffusionPanoramaPipeline": "cuts windows of its own",
    "StableDiffusionSAGPipeline": ATTENTION_MAPS,
    "StableDiffusionAttendAndExcitePipeline": ATTENTION_MAPS,
    "StableDiffusionPix2PixZeroPipeline": ATTENTION_MAPS,
    "LEditsPPPipelineStableDiffusion": ATTENTION_MAPS,
    "LEditsPPPipelineStableDiffusionXL": ATTENTION_MAPS,
    "StableDiffusionGLIGENPipeline": "places its boxes in the network's whole input",
    "StableDiffusionGLIGENTextImagePipeline": "places its boxes in the network's whole input",
    "StableDiffusionParadigmsPipeline": "evaluates several steps at once",
    "TextToVideoZeroPipeline": "lets a batch's elements attend to each other",
    "TextToVideoZeroSDXLPipeline": "lets a batch's elements attend to each other",
}
"""Pipelines of diffusers whose network cannot be given windows, and why: they, or what they hold, see the canvas."""

RESIDUALS = (
    "mid_block_additional_residual",
    "down_block_additional_residuals",
    "down_intrablock_additional_residuals",
)
"""What a UNet adds to its feature maps: the first two are a ControlNet's, the last a T2I-Adapter's."""


class _Waiting(NamedTuple):
    """An evaluation of a ControlNet that waits for its windows.

    Attributes:
        behind: the ControlNet.
        call: what it is called with for the whole canvas, by name.
        cell: pixels of a latent cell.
    """

    behind: Callable
    call: dict[str, Any]
    cell: int

    def residuals(self, place: Place | None, marks: torch.Tensor, frames: int) -> dict[str, Any]:
        """For windows of those elements of the UNet's batch that are marked, zeros for others; None: of the canvas."""
        elements = marks.unflatten(0, (-1, frames))[:, 0].nonzero().flatten().tolist()
        given, here = self.call, place
        if place is not None:
            rows = len(elements) * len(place.numbers)
            here = replace(place, pictures=place.pictures[:rows], origins=place.origins[:rows])
            given = arguments(self.call, here, len(elements), self.cell, frames)
        with _seeing(None if here is None else Seen(here, self.call)):
            down, middle = self.behind(**given | {"return_dict": False})
        if len(elements) * frames < len(marks):
            middle, *down = [_among(each, elements, len(marks) // frames) for each in (middle, *down)]
        return dict(zip(RESIDUALS, (middle, list(down))))


class _ControlNet:
    """In front of a ControlNet: says which rows of the UNet's batch are its own, and waits."""

    def __init__(self, behind: Callable, pipe: Any):
        self.behind, self.pipe = behind, pipe
        self.waiting: _Waiting | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = bound(self.pipe.controlnet, args, kwargs)
        self.waiting = _Waiting(self.behind, call, self.pipe.vae_scale_factor)
        marks = torch.ones(len(call["sample"]))  # a pipeline that guesses puts zeros before them
        if call.get("return_dict", True):
            return ControlNetOutput(down_block_res_samples=(marks,), mid_block_res_sample=marks)
        return (marks,), marks


class _UNet:
    """In front of a UNet: evaluates it through `host`, with the run's step read off the pipeline's scheduler."""

    def __init__(self, behind: Callable, pipe: Any, host: Windowed):
        self.behind, self.pipe, self.host = behind, pipe, host
        self.control: _ControlNet | None = None
        self.progress, self.timesteps, self.levels = Progress(), None, None
        self.evaluation: tuple[int, int] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = bound(self.pipe.unet, args, kwargs)
        sample, waiting, marks = call["sample"], self._waiting(call), call.get(RESIDUALS[0])
        if waiting:
            call = {name: value for name, value in call.items() if name not in RESIDUALS[:2]}
        moving = sample.dim() == 5  # (B, C, frames, H, W): each window of all frames
        frames = sample.shape[2] if moving else 1
        canvas = sample.flatten(1, 2) if moving else sample

        def evaluate(windows, place):
            here, given = None, call
            if windows is not canvas:  # else one native window: whatever the pipeline gave, as it is
                here = place
                given = arguments(call | {"sample": None}, place, len(sample), self.pipe.vae_scale_factor, frames)
                given |= {"sample": windows.unflatten(1, sample.shape[1:3]) if moving else windows}
            residuals = waiting.residuals(here, marks, frames) if waiting else {}
            with _seeing(None if here is None else Seen(here, call)):
                predicted = self.behind(**given | residuals | {"return_dict": False})[0]
            return predicted.flatten(1, 2) if moving else predicted

        index, stream = self._evaluation(call["timestep"])
        if self.host.group and not self.progress.step:  # later ones are of the same conditions
            told = (waiting.call if waiting else {}) | call
            self.host.group.same(digests({name: value for name, value in told.items() if name != "sample"}))
        form: dict[str, Any] = {}
        if self.levels is not None:
            form = dict(carry=lambda level: level.carry, mark=self.levels[index])
        merged = self.host(evaluate, canvas, self.progress.step, self.progress.steps, stream=stream, **form)
        merged = merged.unflatten(1, (-1, frames)) if moving else merged
        if not call.get("return_dict", True):
            return (merged,)
        return (UNetMotionOutput if moving else UNet2DConditionOutput)(sample=merged)

    def _waiting(self, call):
        """The evaluation of the ControlNet whose residuals this one is given; None: it has none."""
        if self.control is None or call.get(RESIDUALS[0]) is None:
            return None
        waiting, self.control.waiting = self.control.waiting, None
        return waiting

    def _evaluation(self, timestep):
        """Which of the scheduler's timesteps this one is at, and how many were at it before."""
        scheduler = self.pipe.scheduler
        if scheduler.timesteps is not self.timesteps:  # a new run
            self.host.reset()
            self.timesteps, self.levels, self.evaluation = scheduler.timesteps, levels(scheduler), None
        evaluations = getattr(self.pipe, "_num_timesteps", None) if is_running(self.pipe) else None
        self.progress(scheduler, timestep, evaluations)
        index, (before, count) = self.progress.index, self.evaluation or (None, 0)
        self.evaluation = index, count + 1 if index == before else 0
        return self.evaluation


@contextlib.contextmanager
def windowed(
    pipe: Any,
    window: int | tuple[int, int] | None = None,
    *,
    bridging: str | Bridge | None = "shift",
    window_batch_size: int | None = None,
    wrap: bool | tuple[bool, bool] = (False, False),
    align: int = 1,
    group: Any = None,
) -> Iterator[Windowed]:
    """Any diffusers pipeline with a UNet at any size: inside of the `with` block its network sees native windows only.

    The pipeline is called as ever, its arguments, scheduler, callbacks and autoencoder are its own::

        with windowed(pipe):
            image = pipe("a photo of the Alps", image=sketch, height=512, width=2048).images[0]

    Whatever belongs to the canvas is cut for each window: masks and pictures that the UNet is given as channels, what
    ControlNets are shown, the residuals of T2I-Adapters, masks of IP-Adapters, SDXL's size and crop conditions (a
    window is a crop of the larger picture). A picture of one native window is the plain pipeline's, bit for bit.

    Windows are there for calls in this thread or asyncio task; another one that uses the same network at the same time
    has it as it was, or a block of its own with a pipeline and scheduler of its own. Afterwards, also of a failing
    block, the network is as it was. Nests with `regional_prompts` in either order, and takes networks that were
    compiled before.

    Args:
        pipe: a diffusers pipeline with a `UNet2DConditionModel` or `UNetMotionModel`; not one of `REFUSED`.
        window: (h, w) cells or one integer for both; None: the UNet's `sample_size`.
        bridging, window_batch_size, wrap, align: see `instantas.sampling.hosted.Windowed`.
        group: the processes that share the windows, as `sample` takes it: each enters the block, makes the same calls
            and gets the pictures. torch's own generator of the pipeline's device starts as rank 0's, generators that
            calls are given are to be seeded alike. Callbacks are each process's own and do the same in all, or a
            ValueError says what differs.

    Yields:
        Windowed: what the UNet is evaluated through.

    Raises:
        TypeError: for a pipeline of another kind, or one whose networks cannot be given windows, with the reason.
        ValueError: naming the argument, what was expected and what came; in a block for the same network.
        PeerError: where another process has failed or is gone.
    """
    with contextlib.ExitStack() as stack:
        ranks = stack.enter_context(joined(group))
        check_windows(pipe)
        size = getattr(pipe.unet.config, "sample_size", None) if window is None else window
        if size is None:
            raise ValueError("window: expected cells, as the UNet's config has no sample_size, got None")
        size = tuple(size) if isinstance(size, list) else size
        asked: dict[str, Any] = dict(bridging=bridging, window_batch_size=window_batch_size, wrap=wrap, align=align)
        host = Windowed(size, **asked, weight="linear", group=ranks)
        control = getattr(pipe, "controlnet", None)
        if ranks:
            ranks.same_networks(dict(unet=module_of(pipe.unet), controlnet=module_of(control)))
            ranks.seeded(None, pipe._execution_device)
        front = stack.enter_context(entered(pipe.unet, lambda behind: _UNet(behind, pipe, host)))
        if control is not None:
            front.control = stack.enter_context(entered(control, lambda behind: _ControlNet(behind, pipe)))
        yield host


def check_windows(pipe: Any) -> None:
    """Refuse a pipeline whose network cannot be given windows: a TypeError with the reason."""
    name = type(pipe).__name__
    for kind in type(pipe).__mro__:
        if kind.__name__ in REFUSED:
            raise TypeError(
                f"pipe: expected one whose network can be given windows, got {name}, which {REFUSED[kind.__name__]}"
            )
    unet = module_of(getattr(pipe, "unet", None))
    if not isinstance(unet, (UNet2DConditionModel, UNetMotionModel)):
        raise TypeError(
            "pipe: expected a diffusers pipeline with a UNet2DConditionModel or UNetMotionModel, got "
            f"{name} with unet {type(unet).__name__}"
        )
    if not hasattr(pipe, "vae_scale_factor"):
        raise TypeError(f"pipe: expected one that paints latents, with a vae_scale_factor, got {name}")
    control = module_of(getattr(pipe, "controlnet", None))
    for net in control.nets if isinstance(control, MultiControlNetModel) else [control]:
        if not isinstance(module_of(net), (ControlNetModel, type(None))):
            raise TypeError(f"pipe: expected ControlNetModels, got a {type(module_of(net)).__name__}")


@contextlib.contextmanager
def _seeing(seen: Seen | None) -> Iterator[None]:
    """Regional prompts are told which windows the network sees inside of the block; None: the canvas."""
    token = SEEN.set(seen)
    try:
        yield
    finally:
        SEEN.reset(token)


def arguments(call: dict[str, Any], place: Place, batch: int, cell: int, frames: int = 1) -> dict[str, Any]:
    """A network's arguments for windows, from those for the whole canvas.

    Args:
        batch: elements that the canvas has.
        cell: pixels of a latent cell.
        frames: of a video; arguments may have a row for each frame of each element.
    """
    fitted = {name: _fitted(value, place, batch, frames) for name, value in call.items() if name not in RESIDUALS}
    for name in set(RESIDUALS) & set(call):
        given = call[name]
        several = isinstance(given, (list, tuple))
        fitted[name] = [_coarse(each, place) for each in given] if several else _coarse(given, place)
    added = fitted.get("added_cond_kwargs") or {}
    if "time_ids" in added:
        fitted["added_cond_kwargs"] = added | {"time_ids": _time_ids(added["time_ids"], place, cell)}
    masks = (call.get("cross_attention_kwargs") or {}).get("ip_adapter_masks")
    if isinstance(masks, torch.Tensor):  # one for each adapter, of the canvas
        masks = [place.fit(mask, batch, place.size) for mask in masks.unsqueeze(1)]
        fitted["cross_attention_kwargs"] |= {"ip_adapter_masks": masks}
    return fitted


def _fitted(value, place, batch, frames):
    """As `Place.fit`, also of what has a row for each frame."""
    if isinstance(value, dict):
        return {name: _fitted(each, place, batch, frames) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_fitted(each, place, batch, frames) for each in value)
    if frames > 1 and isinstance(value, torch.Tensor) and value.dim() > 1 and len(value) == batch * frames:
        by_element = value.unflatten(0, (batch, frames))
        if value.dim() == 4:
            return place.fit(by_element.flatten(1, 2), batch, place.size).unflatten(1, (frames, -1)).flatten(0, 1)
        return place.pick(by_element).flatten(0, 1)
    return place.fit(value, batch, place.size)


def _coarse(residual, place):
    """The windows' part of a feature map (B, C, h, w) of a level of the network, the mean where cells are cut."""
    if residual is None:
        return None
    size = place.size
    k = -(-size[0] // residual.shape[-2])
    cells = residual.repeat_interleave(k, -2).repeat_interleave(k, -1)[..., : size[0], : size[1]]
    return F.avg_pool2d(place.cut(cells), k, ceil_mode=True)


def _time_ids(ids, place, cell):
    """SDXL's conditions of windows (m, 6), from the canvas's for each: crops of the canvas, as large as the window."""
    window, canvas = ([cell * side for side in sides] for sides in (place.plan.window, place.size))
    window, canvas = (torch.tensor(sides).to(ids) for sides in (window, canvas))
    original, crop, target = ids[:, :2], ids[:, 2:4], ids[:, 4:]
    if target.shape[1] == 2:  # an aesthetic score stays what it is
        target = torch.where((target == canvas).all(1, keepdim=True), window, target)
    if place.view is None:
        crop = crop + place.origins.repeat_interleave(len(ids) // len(place.origins), 0).to(ids) * cell
    else:  # sees all of the canvas, small
        original = torch.where((original == canvas).all(1, keepdim=True), window, original)
    return torch.cat([original, crop, target], dim=1)


def _among(residual, elements, batch):
    """Windows of some elements of a batch of windows (n for each), zeros for the others."""
    whole = residual.unflatten(0, (len(elements), -1))
    among = whole.new_zeros(batch, *whole.shape[1:])
    among[elements] = whole
    return among.flatten(0, 1)

"""Regional prompts in the cross-attention of a diffusers UNet (InstantAS, dynamic semantic guided cross-attention).

Before each evaluation of the network, outside of any compiled graph, the prompts are projected if they have changed and
every prompt's weight is laid out at each resolution; the layers (`instantas.pipelines.processors`) only look up.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from diffusers import StableDiffusionInstructPix2PixPipeline, StableDiffusionXLInstructPix2PixPipeline
from diffusers.models.attention_processor import Attention
from diffusers.utils import USE_PEFT_BACKEND, scale_lora_layers, unscale_lora_layers

from instantas.pipelines.entry import SEEN, bound, module_of, signature
from instantas.pipelines.processors import (
    Attended,
    RegionalAttnProcessor,
    installed,
    project,
    projections,
    with_prompts,
)
from instantas.pipelines.progress import Progress, is_running
from instantas.regions import RegionMap, check_blend, region_lists
from instantas.regions.prompts import PipelineEncoder, PromptBank, adapters, text_encoders, warn_of_cut
from instantas.regions.weights import PromptWeights, WindowBatch
from instantas.sampling.bridging import View
from instantas.sampling.step import StepContext
from instantas.windows import WindowPlan

EDITING = (StableDiffusionInstructPix2PixPipeline, StableDiffusionXLInstructPix2PixPipeline)
"""Guided by a prompt and by a picture: their batches are [both, the picture alone, neither]."""

__all__ = ["RegionalAttnProcessor", "RegionalPrompts", "regional_prompts"]


class RegionalPrompts:
    """The prompts that a network attends to inside of a `regional_prompts` block, which makes it.

    Unless told otherwise an evaluation is of whole canvases, a batch [uncond, cond] or [cond], and the base prompts are
    the `encoder_hidden_states` that the network is called with.

    Attributes:
        regions: the `RegionMap`; None until the first evaluation tells the size.
    """

    def __init__(
        self,
        module: Any,
        regions: Any,
        *,
        pipe: Any,
        encode: Any,
        mode: str,
        guided: bool | None,
        scheduler: Any,
        settings: dict | None,
    ):
        self.module, self.mode = module, mode
        self.regions: Any = regions if isinstance(regions, RegionMap) else None
        self._given: Any = self.regions
        self.bank = PromptBank(self.regions.lists if self.regions else region_lists(regions))
        self._pipe, self._encode, self._guided, self._scheduler = pipe, encode, guided, scheduler
        self._settings, self._progress, self._lock = settings, Progress(), threading.RLock()
        self._base: tuple[int, int] | None = None
        self._windows: WindowBatch | None = None
        self._weights: PromptWeights | None = None
        self._projected: dict[Attention, tuple] = {}

    def base(self, prompt_embeds: torch.Tensor, negative_prompt_embeds: torch.Tensor | None = None) -> None:
        """Fix the base prompts, (pictures, L, D) each, in place of what the network is called with.

        For samplers that gather embeddings anew for every evaluation.
        """
        both = [prompt_embeds] if negative_prompt_embeds is None else [prompt_embeds, negative_prompt_embeds]
        self.bank.update(torch.cat(both), self._encode or (self._pipe and PipelineEncoder(self._pipe)))
        self._base = len(prompt_embeds), len(both)

    def set_windows(
        self, plan: WindowPlan, rows: torch.Tensor, progress: float = 0.0, view: View | None = None
    ) -> None:
        """Say which windows the next evaluations are of; a batch is [uncond, cond] of them or [cond].

        Args:
            rows: (m, 2) int64 on the CPU, the (picture, window) of each.
            progress: step / steps.
            view: what the windows are cut from (`instantas.sampling.bridging.View`); None: the canvas.
        """
        if self.regions is None or self._base is None:
            missing = "RegionMap" if self.regions is None else "base prompts"
            raise ValueError(
                "regions: expected a RegionMap, and base prompts set before, where windows are evaluated, got no "
                f"{missing}"
            )
        device = self.regions.masks.device
        self._windows = WindowBatch(plan, rows, plan.tables(device).origins[rows[:, 1].to(device)], progress, view)

    def set_step(self, context: StepContext) -> None:
        """As `set_windows`, of the windows of a `step.StepContext`; waits for no device."""
        plan, rows, origins, view = context.plan, context.rows, context.origins, context.view
        self.regions = self._given.at(context.size)
        self._windows = WindowBatch(plan, rows, origins, context.step / context.steps, view, context.captured)

    def prepare(self, layers: dict[Attention, RegionalAttnProcessor], args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """The arguments with which the network is evaluated in place of these, which say what its layers attend to."""
        call, seen = bound(self.module, args, kwargs), SEEN.get()
        whole = call if seen is None else seen.call
        sample, embeddings = call["sample"], whole["encoder_hidden_states"]
        frames = sample.shape[2] if sample.dim() == 5 else 1  # of a video (B, C, frames, h, w): pictures in a row
        if call.get("encoder_attention_mask") is not None:
            raise ValueError("encoder_attention_mask: expected None with regional prompts, got a mask")
        for attn, processor in layers.items():
            if attn.processor is not processor:
                raise ValueError(
                    "model: expected the regional processors as they were installed, got a "
                    f"{type(attn.processor).__name__} that was set since"
                )
        scale = (call.get("cross_attention_kwargs") or {}).get("scale", 1.0)
        running = self._pipe if is_running(self._pipe) else None
        with self._lock:
            if self._base is None:
                expected = len(whole["sample"]) * frames
                if len(embeddings) != expected:
                    raise ValueError(f"encoder_hidden_states: expected {expected} prompts, got {len(embeddings)}")
                self.bank.update(embeddings, self._encode or self._encoder(running, scale))
            windows = self._windows or self._windows_of(whole, seen and seen.place, running, frames)
            if self._weights is None or self._weights.regions is not self.regions:
                self._weights = PromptWeights(self.regions, self.bank)
            batch = torch.Size((len(sample) * frames, sample.shape[1], *sample.shape[-2:]))
            layout = self._weights.layout(windows, batch, sample.device, self._base)
            keys, values = zip(*self._project(layers, scale))
        position = list(signature(self.module).parameters).index("encoder_hidden_states") - 1
        return with_prompts(args, kwargs, position, Attended(layout, keys, values, self.mode))

    def _encoder(self, running, scale):
        """Embeds texts as this call does: the running pipeline's, or a loop's with a LoRA scale."""
        if self._pipe is None:
            return None
        clip_skip, kwargs = getattr(running, "clip_skip", None), getattr(running, "cross_attention_kwargs", None)
        lora_scale = scale if running is None else (kwargs or {}).get("scale", 1.0)
        return PipelineEncoder(self._pipe, clip_skip, None if lora_scale == 1.0 else lora_scale)

    def _windows_of(self, call, place, running, frames):
        """Of a batch of whole canvases, which `call` is of: these, or the windows of each at a `hosted.Place`."""
        sample = call["sample"]
        size = tuple(sample.shape[-2:])
        if self.regions is None or (self._settings and self.regions.latents != size):
            cell = self._settings["cell"]
            self.regions = RegionMap(
                self.bank.lists, size[0] * cell, size[1] * cell, device=sample.device, **self._settings
            )
        branches, progress = self._branches(len(sample), call, running), place.progress if place else 0.0
        elements = len(sample) // len(branches)
        if self.regions.dynamic and place is None:  # read only where it matters, as it waits for the GPU
            scheduler = self._scheduler or getattr(self._pipe, "scheduler", None)
            if scheduler is None:
                raise ValueError("scheduler: expected the one in use, as regions change over the run, got None")
            progress = self._progress(scheduler, call["timestep"], getattr(running, "_num_timesteps", None))
        device = self.regions.masks.device
        if place is None:
            return WindowBatch.whole(elements * frames, size, progress, device, branches)
        each = range(elements), place.numbers, range(frames)
        element, number, frame = torch.cartesian_prod(*(torch.tensor(one, device="cpu") for one in each)).T
        rows = torch.stack([element * frames + frame, number], dim=1)
        origins = place.origins[: len(rows) // frames]  # the same for each of the batch's elements
        origins = origins.to(device).repeat_interleave(frames, 0)
        return WindowBatch(place.plan, rows, origins, progress, place.view, branches=branches)

    def _branches(self, batch, call, running):
        """Of each part of a batch whether it is conditional: as was said, as the pipeline says, or as alone fits."""
        guided = self._guided
        if guided is None and running is not None and hasattr(running, "do_classifier_free_guidance"):
            # a ControlNet that guesses has the conditional half alone
            guided = running.do_classifier_free_guidance and not call.get("guess_mode")
        if guided is None and batch % (2 * self.regions.pictures) == 0 and any(self.regions.lists):
            raise ValueError(
                f"classifier_free_guidance: expected True or False outside of the pipeline's own call, as a batch of "
                f"{batch} may be [uncond, cond] or {batch} pictures, got None"
            )
        if guided and isinstance(self._pipe, EDITING):
            branches = (True, False, False)
        else:
            perturbed = getattr(running, "do_perturbed_attention_guidance", False) and not call.get("guess_mode")
            branches = (False,) * bool(guided) + (True,) * (2 if perturbed else 1)
        if batch % len(branches):
            parts = ", ".join("cond" if conditional else "uncond" for conditional in branches)
            raise ValueError(
                f"sample: expected a batch [{parts}], got {batch}; classifier_free_guidance=False says that "
                "there is no guidance"
            )
        return branches

    def _project(self, layers, lora_scale):
        """Keys and values of each layer, anew where the bank, the weights or the LoRA scale have changed.

        Always where a gradient is to reach them, as its graph serves once.
        """
        bank, version = self.bank.embeddings, self.bank.version
        common = version, lora_scale, torch.is_autocast_enabled(bank.device.type), torch.is_inference_mode_enabled()
        stale = {}
        for attn in layers:
            made_of = *common, *map(_weights, projections(attn))
            if attn not in self._projected or self._projected[attn][0] != made_of or _trained(attn, bank):
                stale[attn] = made_of
        if stale:
            with _lora_scale(self.module, lora_scale):
                for attn, made_of in stale.items():
                    self._projected[attn] = None if _trained(attn, bank) else made_of, project(attn, bank)
        return [self._projected[attn][1] for attn in layers]


@contextlib.contextmanager
def regional_prompts(
    model: Any,
    regions: Sequence | RegionMap,
    *,
    pipe: Any = None,
    encode: Callable[[list[str]], torch.Tensor] | None = None,
    mode: str = "blend",
    base_weight: float = 0.0,
    semantic_schedule: str = "constant",
    classifier_free_guidance: bool | None = None,
    scheduler: Any = None,
    cell: int | None = None,
) -> Iterator[RegionalPrompts]:
    """Regional prompts in every cross-attention layer of a network, inside the `with` block.

    The network and the pipeline around it are used as ever, in one evaluation however many regions there are::

        with regional_prompts(pipe, [Region("grass", box=(0.0, 0.5, 1.0, 1.0))]):
            image = pipe("a photo of a night sky", height=512, width=512).images[0]

    Self-attention is left alone. At the end, also of a failing block, the processors that were there are there again.
    Each distinct prompt is projected to keys and values once per layer, and again when embeddings, weights (LoRA,
    fused ones too) or the LoRA scale change. Works with LoRA, fused projections, attention slicing, SDXL (whose pooled
    embedding stays the base prompt's), offloading and `torch.compile`, if the network was compiled before. With an
    IP-Adapter all queries attend to its pictures, by its scales and masks, beside the prompts of their place. A
    ControlNet is a network of its own and goes on with the base prompt, unless this is called for `pipe.controlnet`
    too.

    The regions' texts are embedded at the first evaluation, with the `clip_skip` and the LoRA scale of the pipeline's
    call, and again when these or the encoders' adapters change. Gradients reach the network's weights, the base prompts
    and `Region.embeds`, not the text encoders.

    Regions are there for evaluations in this thread or asyncio task, and in what is started with a copy of its context
    (`asyncio.to_thread`). Other threads may use the same network at the same time, without regions or with others.

    Args:
        model: a diffusers pipeline, whose `unet` is meant, or a `UNet2DConditionModel` or `ControlNetModel`, compiled
            or not.
        regions: a list of `Region`; for a batch one list for every prompt or one for each picture; or a `RegionMap`.
        pipe: the pipeline that a bare network belongs to. What follows is taken from it where it is None.
        encode: function of a list of prompts that gives their embeddings (prompts, L, D). Needed for texts without a
            pipeline; with one it is used in its place, as for a `clip_skip` in a loop of one's own.
        mode: "blend" or "joint", see `ops.regional_attention`.
        base_weight, semantic_schedule: see `RegionMap`.
        classifier_free_guidance: whether a batch is [uncond, cond]. None: as the pipeline's own call says while it
            runs; in a loop of one's own what fits the size of the batch, which is refused where both do; without a
            pipeline True.
        scheduler: where the run is, for regions that change with it.
        cell: pixels of a latent cell. Without a pipeline 8 when None.

    Yields:
        RegionalPrompts: to say which windows are evaluated, for samplers that do not evaluate whole canvases.

    Raises:
        TypeError: for a network without cross-attention in Transformer2DModel blocks, and for processors of a class
            that is not known to be plain cross-attention, or one of an IP-Adapter.
        ValueError: naming the argument, what was expected and what came; in a block for the same network.
    """
    if pipe is None and hasattr(model, "unet"):
        pipe = model
    network = getattr(model, "unet", model)
    if mode not in ("blend", "joint"):
        raise ValueError(f"mode: expected 'blend' or 'joint', got {mode!r}")
    check_blend(base_weight, semantic_schedule)
    settings = None
    if isinstance(regions, RegionMap):
        if (base_weight, semantic_schedule) != (0.0, "constant"):
            raise ValueError("base_weight: expected to be said where the RegionMap is made, got both")
    else:
        scales = [region.guidance_scale for entries in region_lists(regions) for region in entries]
        if own := [scale for scale in scales if scale is not None]:
            raise ValueError(
                f"guidance_scale: expected None, as guidance is applied outside of the network, got {own[0]}"
            )
        cell = cell or (8 if pipe is None else pipe.vae_scale_factor)
        settings = dict(cell=cell, base_weight=base_weight, semantic_schedule=semantic_schedule)
    if classifier_free_guidance is None and pipe is None:
        classifier_free_guidance = True
    prompts = RegionalPrompts(
        module_of(network),
        regions,
        pipe=pipe,
        encode=encode,
        mode=mode,
        guided=classifier_free_guidance,
        scheduler=scheduler,
        settings=settings,
    )
    _check_texts(prompts.bank.texts, pipe, encode)
    with installed(network, prompts):
        yield prompts


def _check_texts(texts, pipe, encode):
    """Refuse texts that nothing embeds; warn of those that are too long."""
    pipe = getattr(encode, "pipe", None) if encode is not None else pipe
    if texts and pipe is None and encode is None:
        raise ValueError("encode: expected a pipeline, or a function that embeds the regions' prompts, got neither")
    if texts and pipe is not None:
        if not text_encoders(pipe):
            raise ValueError(f"embeds: expected in every region, as the pipeline has no text encoder, got {texts[0]!r}")
        warn_of_cut(pipe, texts)


def _weights(module: torch.nn.Module) -> tuple:
    """Of a projection: changes whenever it gives something else."""
    return (*((id(weight), weight.data_ptr(), weight.dtype) for weight in module.parameters()), adapters(module))


def _trained(attn: Attention, bank: torch.Tensor) -> bool:
    """Whether a gradient is to reach what a layer makes of the bank."""
    if not torch.is_grad_enabled():
        return False
    return bank.requires_grad or any(p.requires_grad for module in projections(attn) for p in module.parameters())


@contextlib.contextmanager
def _lora_scale(module, scale):
    """As the network's forward does it for cross_attention_kwargs={"scale": ...}."""
    if not USE_PEFT_BACKEND or scale == 1.0:
        yield
        return
    scale_lora_layers(module, scale)
    try:
        yield
    finally:
        unscale_lora_layers(module, scale)

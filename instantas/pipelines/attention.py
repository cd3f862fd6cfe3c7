"""Regional prompts in the cross-attention of a diffusers UNet (InstantAS, dynamic semantic guided cross-attention).

`regional_prompts` installs a `RegionalAttnProcessor` on every cross-attention layer and takes it off again. Before each
evaluation of the network, outside of any compiled graph, the prompts are projected if they have changed and every
prompt's weight is laid out at each resolution; the layers only look up.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Sequence

import torch
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor,
    AttnProcessor2_0,
    FusedAttnProcessor2_0,
    SlicedAttnProcessor,
    XFormersAttnProcessor,
)
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.utils import USE_PEFT_BACKEND, scale_lora_layers, unscale_lora_layers

from instantas import ops
from instantas.regions import RegionMap, check_blend, region_lists
from instantas.regions.masks import average
from instantas.regions.prompts import PromptBank, encode_prompts
from instantas.windows import WindowPlan

KNOWN = (AttnProcessor, AttnProcessor2_0, FusedAttnProcessor2_0, SlicedAttnProcessor, XFormersAttnProcessor)
"""The processors that can be replaced: all compute the same plain cross-attention."""


class RegionalAttnProcessor:
    """Cross-attention in which every query attends to the prompts of its place, by `ops.regional_attention`.

    Args:
        prompts: what all layers of a network share.

    Attributes:
        grid: (h, w) of the feature map that the queries come from, set by the block that the layer is in.
        key, value: (P, L, heads, D), the projected bank of prompts.
    """

    def __init__(self, prompts: RegionalPrompts):
        self.prompts = prompts
        self.grid = self.key = self.value = self.made_of = None

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        query = attn.to_q(hidden_states)
        query = query.unflatten(-1, (attn.heads, -1))
        if attn.norm_q is not None:
            query = attn.norm_q(query)
        out = ops.regional_attention(
            query,
            self.key.to(query.dtype),
            self.value.to(query.dtype),
            self.prompts.ids,
            self.prompts.weights_at(self.grid),
            mode=self.prompts.mode,
            scale=attn.scale,
        )
        return attn.to_out[1](attn.to_out[0](out.flatten(-2)))

    def project(self, attn: Attention, bank: torch.Tensor) -> None:
        """Keys and values of the bank (P, L, D), in the fused projection where the layer has one."""
        prompts = attn.norm_encoder_hidden_states(bank) if attn.norm_cross else bank
        to_key = attn.to_kv if attn.fused_projections else attn.to_k
        weight = getattr(to_key, "weight", None)
        if isinstance(weight, torch.Tensor) and weight.device.type != "meta":
            prompts = prompts.to(weight.device)  # of an offloaded network, not yet where it runs
        if attn.fused_projections:
            key, value = to_key(prompts).chunk(2, dim=-1)
        else:
            key, value = to_key(prompts), attn.to_v(prompts)
        key, value = (t.unflatten(-1, (attn.heads, -1)).to(bank.device).contiguous() for t in (key, value))
        self.key, self.value = key if attn.norm_k is None else attn.norm_k(key), value


class RegionalPrompts:
    """What the cross-attention layers of a network share: the bank of prompts, and who attends to which of them.

    Made by `regional_prompts`. Unless told otherwise an evaluation is of whole canvases, a batch [uncond, cond] or
    [cond], and the base prompts are the `encoder_hidden_states` that the network is called with.

    Attributes:
        regions: the `RegionMap`; None until the first evaluation tells the size.
        ids: (B, S) int32, rows of the bank that each element of the batch attends to; -1: none.
    """

    def __init__(self, module, layers, regions, *, encode, mode, guided, scheduler, settings):
        self.module, self.mode = module, mode
        self.processors = {attn: RegionalAttnProcessor(self) for attn in layers}
        self.regions = regions if isinstance(regions, RegionMap) else None
        self.bank = PromptBank(self.regions.lists if self.regions else region_lists(regions), encode)
        self._guided, self._scheduler, self._settings = guided, scheduler, settings
        self._where = self._pictures = self._laid_out = self.ids = None
        self._weights, self._placed = {}, {}

    def base(self, prompt_embeds: torch.Tensor, negative_prompt_embeds: torch.Tensor | None = None) -> None:
        """Fix the base prompts, (pictures, L, D) each, in place of what the network is called with.

        For samplers that gather embeddings anew for every evaluation.
        """
        both = [prompt_embeds] if negative_prompt_embeds is None else [prompt_embeds, negative_prompt_embeds]
        self.bank.update(torch.cat(both))
        self._pictures, self._branches = len(prompt_embeds), len(both)

    def at(self, plan: WindowPlan, rows: torch.Tensor, progress: float = 0.0, view=None) -> None:
        """Say which windows the next evaluations are of; a batch is [uncond, cond] of them or [cond].

        Args:
            rows: (m, 2) int64 on the CPU, the (picture, window) of each.
            progress: step / steps.
            view: what the windows are cut from (`instantas.sampling.bridging.View`); None: the canvas.
        """
        if self.regions is None or self._pictures is None:
            raise ValueError("regions: expected a RegionMap, and base prompts set before, where windows are evaluated")
        device = self.regions.masks.device
        placed = rows.to(device)
        self._where = plan, rows, plan.tables(device).origins[placed[:, 1]], progress, view, False

    def at_step(self, context) -> None:
        """As `at`, of the windows of a `sampler.StepContext`; waits for no device."""
        progress = context.step / context.steps
        self._where = context.plan, context.rows, context.origins, progress, context.view, context.captured

    def weights_at(self, grid: tuple[int, int]) -> torch.Tensor:
        """(B, S, h w) float32: the weight of each prompt in `ids` at the queries of a layer."""
        if grid in self._weights:
            return self._weights[grid]
        whole = next(iter(self._weights))
        return torch.nn.functional.adaptive_avg_pool2d(self._weights[whole].unflatten(-1, whole), grid).flatten(2)

    @torch.compiler.disable
    @torch.no_grad()
    def prepare(self, args: tuple, kwargs: dict) -> None:
        """What has to be done before the network is evaluated with these arguments."""
        call = _signature(type(self.module)).bind(self.module, *args, **kwargs).arguments
        sample, embeddings = call["sample"], call["encoder_hidden_states"]
        if call.get("encoder_attention_mask") is not None:
            raise ValueError("encoder_attention_mask: expected None with regional prompts, got a mask")
        for attn, processor in self.processors.items():
            if attn.processor is not processor:
                raise ValueError(
                    "model: expected the regional processors as they were installed, got a "
                    f"{type(attn.processor).__name__} that was set since"
                )
        if self._pictures is None:
            if len(embeddings) != len(sample):
                raise ValueError(f"encoder_hidden_states: expected {len(sample)} prompts, got {len(embeddings)}")
            self.bank.update(embeddings)
        self._lay_out(sample, *(self._where or self._whole(sample, call["timestep"])))
        self._project((call.get("cross_attention_kwargs") or {}).get("scale", 1.0))

    def _whole(self, sample, timestep):
        """plan, rows, origins, progress, view and no capture, of a batch of whole canvases."""
        size = tuple(sample.shape[-2:])
        if self.regions is None or (self._settings and self.regions.latents != size):
            cell = self._settings["cell"]
            self.regions = RegionMap(
                self.bank.lists, size[0] * cell, size[1] * cell, device=sample.device, **self._settings
            )
        guided = self._guided() if callable(self._guided) else self._guided
        if guided and len(sample) % 2:
            raise ValueError(
                f"sample: expected a batch [uncond, cond], got {len(sample)}; classifier_free_guidance=False says that "
                "there is no guidance"
            )
        pictures = len(sample) // 2 if guided else len(sample)
        rows = torch.stack([torch.arange(pictures), torch.zeros(pictures, dtype=torch.int64)], dim=1)
        origins = torch.zeros(pictures, 2, dtype=torch.int32, device=self.regions.masks.device)
        return WindowPlan.minimum_coverage(*size, size), rows, origins, self._progress(timestep), None, False

    def _progress(self, timestep):
        """The part of the scheduler's steps that lies behind; read only where it matters, as it waits for the GPU."""
        if not self.regions.dynamic:
            return 0.0
        scheduler = self._scheduler() if callable(self._scheduler) else self._scheduler
        if scheduler is None:
            raise ValueError("scheduler: expected the one in use, as regions change over the run, got None")
        steps = [float(t) for t in scheduler.timesteps]
        now = float(timestep.flatten()[0] if isinstance(timestep, torch.Tensor) else timestep)
        return sum(t > now for t in steps) / len(steps)

    def _lay_out(self, sample, plan, rows, origins, progress, view, captured):
        """The ids, and the weights at every resolution, once for all layers; kept while nothing changes.

        What is captured is laid out by the graph itself, every time.
        """
        (h, w), batch = tuple(sample.shape[-2:]), len(sample)
        branches = batch // len(rows)
        if plan.window != (h, w) or batch != branches * len(rows) or branches not in (1, 2):
            raise ValueError(
                f"sample: expected {len(rows)} windows of {plan.window}, or twice as many with the unconditional ones "
                f"first, got {batch} of {(h, w)}"
            )
        says = self.regions.says(progress)
        laid_out = self.bank.number, plan, rows.tolist(), view, says, branches, sample.device
        if self._laid_out == laid_out and not captured:
            return
        self.ids, slots, lists = self._attended(rows, branches, sample.device)
        shares = self.regions.windows_at(plan, lists, origins, progress, view)
        shares = shares.to(sample.device).repeat(branches, 1, 1, 1)
        weights, self._weights = torch.einsum("brs,brhw->bshw", slots, shares.double()).float().contiguous(), {}
        while (h, w) not in self._weights:
            self._weights[h, w] = weights.flatten(2)
            weights = average(weights, 2)
            h, w = weights.shape[-2:]
        self._laid_out = None if captured else laid_out

    def _attended(self, rows, branches, device):
        """On the device: the ids, the slots of the regions in them as one-hot rows, the list of each row's picture."""
        pictures = self._pictures or len(rows)
        if pictures % self.regions.pictures:
            raise ValueError(
                f"regions: expected one list, or one for each of {pictures} pictures, got {self.regions.pictures}"
            )
        known = self.bank.number, tuple(rows[:, 0].tolist()), branches, device
        if known not in self._placed:
            if any(number != self.bank.number for number, *_ in self._placed):
                self._placed.clear()
            lists = rows[:, 0] * self.regions.pictures // pictures
            ids, slots = self.bank.attended(self._elements(rows, lists.tolist(), branches), self.regions.masks.shape[1])
            # float64: products with 0 and 1, which no reduced precision of matrix products may round
            slots = torch.nn.functional.one_hot(slots, ids.shape[1]).double()
            self._placed[known] = ids.to(device), slots.to(device), lists.to(self.regions.masks.device)
        return self._placed[known]

    def _elements(self, rows, lists, branches):
        """(base prompt, list of regions, whether conditional) of each element of the batch."""
        elements = []
        for branch in range(branches):
            conditional = branch == branches - 1
            for row, (picture, number) in enumerate(zip(rows[:, 0].tolist(), lists)):
                base = branch * len(rows) + row
                if self._pictures is not None:
                    base = picture if conditional else self._pictures + picture
                    if not conditional and self._branches == 1:
                        raise ValueError("sample: expected conditional windows alone, as there is no negative prompt")
                elements.append((base, number, conditional))
        return elements

    def _project(self, lora_scale):
        """Keys and values of the layers for which the bank, the weights or the LoRA scale have changed."""
        bank = self.bank.embeddings
        common = self.bank.number, lora_scale, torch.is_autocast_enabled(bank.device.type)
        made_of = {attn: (*common, *_weights(attn)) for attn in self.processors}
        stale = [attn for attn, processor in self.processors.items() if processor.made_of != made_of[attn]]
        if stale:
            with _lora_scale(self.module, lora_scale):
                for attn in stale:
                    self.processors[attn].project(attn, bank)
                    self.processors[attn].made_of = made_of[attn]


@contextlib.contextmanager
def regional_prompts(
    model,
    regions: Sequence | RegionMap,
    *,
    pipe=None,
    encode: Callable[[list[str]], torch.Tensor] | None = None,
    mode: str = "blend",
    base_weight: float = 0.0,
    semantic_schedule: str = "constant",
    classifier_free_guidance: bool | None = None,
    scheduler=None,
    cell: int | None = None,
) -> Iterator[RegionalPrompts]:
    """Regional prompts in every cross-attention layer of a network, inside the `with` block.

    The network and the pipeline around it are used as ever, in one evaluation however many regions there are::

        with regional_prompts(pipe, [Region("grass", box=(0.0, 0.5, 1.0, 1.0))]):
            image = pipe("a photo of a night sky", height=512, width=512).images[0]

    Self-attention is left alone. At the end, also of a failing block, the processors that were there are there again.
    Each distinct prompt is projected to keys and values once per layer, and again when embeddings, weights (LoRA,
    fused ones too) or the LoRA scale change. Works with LoRA, fused projections, attention slicing, SDXL (whose pooled
    embedding stays the base prompt's), offloading and `torch.compile`, if the network was compiled before. A ControlNet
    is a network of its own and goes on with the base prompt, unless this is called for `pipe.controlnet` too. For
    inference: no gradient reaches the prompts.

    Args:
        model: a diffusers pipeline, whose `unet` is meant, or a `UNet2DConditionModel` or `ControlNetModel`, compiled
            or not.
        regions: a list of `Region`; for a batch one list for every prompt or one for each picture; or a `RegionMap`.
        pipe: the pipeline that a bare network belongs to. What follows is taken from it where it is None.
        encode: function of a list of prompts that gives their embeddings (prompts, L, D). Needed without a pipeline.
        mode: "blend" or "joint", see `ops.regional_attention`.
        base_weight, semantic_schedule: see `RegionMap`.
        classifier_free_guidance: whether a batch is [uncond, cond]. Without a pipeline True when None.
        scheduler: where the run is, for regions that change with it.
        cell: pixels of a latent cell. Without a pipeline 8 when None.

    Yields:
        RegionalPrompts: to say which windows are evaluated, for samplers that do not evaluate whole canvases.

    Raises:
        TypeError: for a network without cross-attention in Transformer2DModel blocks, and for processors of a class
            that is not known to be plain cross-attention (IP-Adapter among them).
        ValueError: naming the argument, what was expected and what came.
    """
    if pipe is None and hasattr(model, "unet"):
        pipe = model
    network = getattr(model, "unet", model)
    if mode not in ("blend", "joint"):
        raise ValueError(f"mode: expected 'blend' or 'joint', got {mode!r}")
    check_blend(base_weight, semantic_schedule)
    blocks = _blocks(network)
    settings = None
    if isinstance(regions, RegionMap):
        if (base_weight, semantic_schedule) != (0.0, "constant"):
            raise ValueError("base_weight: expected to be said where the RegionMap is made, got both")
    else:
        if any(region.guidance_scale is not None for entries in region_lists(regions) for region in entries):
            raise ValueError("guidance_scale: expected None, as guidance is applied outside of the network")
        cell = cell or (8 if pipe is None else pipe.vae_scale_factor)
        settings = dict(cell=cell, base_weight=base_weight, semantic_schedule=semantic_schedule)
    if pipe is not None:
        encode = encode or functools.partial(encode_prompts, pipe)
        scheduler = scheduler or (lambda: pipe.scheduler)
        if classifier_free_guidance is None:
            classifier_free_guidance = functools.partial(getattr, pipe, "do_classifier_free_guidance")
    prompts = RegionalPrompts(
        getattr(network, "_orig_mod", network),
        [attn for layers in blocks.values() for attn in layers],
        regions,
        encode=encode,
        mode=mode,
        guided=True if classifier_free_guidance is None else classifier_free_guidance,
        scheduler=scheduler,
        settings=settings,
    )
    with contextlib.ExitStack() as stack:
        for block, layers in blocks.items():
            inside = [prompts.processors[attn] for attn in layers]
            stack.callback(block.register_forward_pre_hook(_note_grid(inside), with_kwargs=True).remove)
            for attn, processor in zip(layers, inside):
                stack.callback(attn.set_processor, attn.processor)
                attn.set_processor(processor)
        compiled = getattr(network, "_compiled_call_impl", None)
        if compiled is None:
            hook = network.register_forward_pre_hook(lambda _, a, k: prompts.prepare(a, k), with_kwargs=True)
            stack.callback(hook.remove)
        else:  # compiled in place, hooks included: step in front of it
            stack.callback(setattr, network, "_compiled_call_impl", compiled)

            def call(*args, **kwargs):
                prompts.prepare(args, kwargs)
                return compiled(*args, **kwargs)

            network._compiled_call_impl = call
        yield prompts


def _blocks(network) -> dict[Transformer2DModel, list[Attention]]:
    """The cross-attention layers by the block that they are in."""
    module = getattr(network, "_orig_mod", network)
    if not isinstance(module, torch.nn.Module):
        raise TypeError(f"model: expected a diffusers pipeline or UNet, got {type(module).__name__}")
    crossing = {m: None for m in module.modules() if isinstance(m, Attention) and m.is_cross_attention}
    if not crossing:
        raise TypeError(f"model: expected a network with cross-attention, got {type(module).__name__} without any")
    for attn in crossing:
        if isinstance(attn.processor, RegionalAttnProcessor):
            raise ValueError("model: expected a network without regional prompts, got one that has them already")
        if type(attn.processor) not in KNOWN:
            raise TypeError(
                f"model: expected processors {', '.join(kind.__name__ for kind in KNOWN)}, got "
                f"{type(attn.processor).__name__} (an IP-Adapter has to be unloaded first)"
            )
    blocks = {}
    for block in module.modules():
        if isinstance(block, Transformer2DModel):
            blocks[block] = [attn for attn in block.modules() if attn in crossing]
    inside = sum(map(len, blocks.values()))
    config = getattr(module, "config", {})
    if inside != len(crossing) or config.get("dual_cross_attention") or config.get("encoder_hid_dim_type"):
        raise TypeError(
            f"model: expected cross-attention to the text encoder's output in Transformer2DModel blocks alone, got "
            f"{type(module).__name__} with other layers"
        )
    return {block: layers for block, layers in blocks.items() if layers}


def _note_grid(processors):
    def note(block, args, kwargs):
        sample = args[0] if args else kwargs["hidden_states"]
        for processor in processors:
            processor.grid = (sample.shape[-2], sample.shape[-1])

    return note


@functools.cache
def _signature(kind):
    return inspect.signature(inspect.unwrap(kind.forward))


def _weights(attn) -> tuple:
    """What keys and values depend on beside the prompts: changes whenever one of the weights does."""
    modules = (attn.to_kv,) if attn.fused_projections else (attn.to_k, attn.to_v)
    marks = []
    for module in modules:
        for weight in module.parameters():
            version = -1 if weight.is_inference() else weight._version
            marks.append((id(weight), weight.data_ptr(), weight.dtype, version))
        if hasattr(module, "scaling"):  # LoRA
            marks.append((dict(module.scaling), tuple(module.active_adapters), tuple(module.merged_adapters)))
            marks.append(module.disable_adapters)
    return tuple(marks)


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

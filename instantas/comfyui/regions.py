"""The nodes that give parts of the canvas prompts of their own."""

from __future__ import annotations

from typing import Any

import torch

from instantas import ops
from instantas.comfyui.hooks import CELL, KEY, Shared, check_unet
from instantas.regions import Region as CanvasRegion
from instantas.regions import RegionMap
from instantas.regions.prompts import PromptBank
from instantas.regions.weights import Layout
from instantas.sampling.hosted import step_of

ATTENDED = "instantas_regions"  # of the bank of prompts and its `Layout` in transformer_options
MODES = ["blend", "joint"]
PLACED = "area", "mask", "control", "gligen", "set_area_to_bounds"  # what a region's conditioning may not have


class Region:
    """A mask and what is to be painted there."""

    CATEGORY, FUNCTION, RETURN_TYPES = "instantas", "add", ("INSTANTAS_REGIONS",)
    DESCRIPTION = "A part of the canvas with a prompt of its own, in a list with others."

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        share = {"default": 1.0, "min": 0.0, "max": 1.0, "step": 0.01}
        return {
            "required": {
                "conditioning": ("CONDITIONING",),
                "mask": ("MASK",),
                "weight": ("FLOAT", {"default": 1.0, "min": 0.01, "max": 100.0, "step": 0.05}),
                "start": ("FLOAT", share | {"default": 0.0, "tooltip": "Part of the run at which the region begins."}),
                "end": ("FLOAT", share | {"tooltip": "Part of the run at which it ends."}),
                "feather": ("INT", {"default": 0, "min": 0, "max": 4096, "tooltip": "Pixels of its soft edges."}),
            },
            "optional": {"regions": ("INSTANTAS_REGIONS", {"tooltip": "The regions before this one."})},
        }

    def add(
        self,
        conditioning: Any,
        mask: torch.Tensor,
        weight: float = 1.0,
        start: float = 0.0,
        end: float = 1.0,
        feather: int = 0,
        regions: tuple = (),
    ) -> tuple:
        if len(conditioning) != 1:
            raise ValueError(f"conditioning: expected one prompt, got {len(conditioning)} combined")
        embeds, options = conditioning[0]
        placed = [name for name in PLACED if options.get(name) is not None]
        if placed:
            raise ValueError(
                f"conditioning: expected a prompt alone, got one with {placed[0]}; the region has the mask"
            )
        region = CanvasRegion(
            None, mask=mask.cpu(), embeds=embeds, weight=weight, start=start, end=end, feather=feather
        )
        return ((*regions, region),)


class Regions:
    """Regions in every cross-attention layer of a model."""

    CATEGORY, FUNCTION, RETURN_TYPES = "instantas", "patch", ("MODEL",)
    DESCRIPTION = "Regional prompts in one evaluation, however many there are; the positive prompt has the rest."

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        base = {"default": 0.0, "min": 0.0, "max": 100.0, "step": 0.05}
        return {
            "required": {
                "model": ("MODEL",),
                "regions": ("INSTANTAS_REGIONS",),
                "mode": (
                    MODES,
                    {"tooltip": "blend: each prompt's own attention, averaged; joint: one for all tokens."},
                ),
                "base_weight": ("FLOAT", base | {"tooltip": "Share of the positive prompt inside of the regions."}),
            }
        }

    def patch(self, model: Any, regions: tuple, mode: str = "blend", base_weight: float = 0.0) -> tuple:
        from comfy.patcher_extension import WrappersMP

        check_unet(model)
        if mode not in MODES:
            raise ValueError(f"mode: expected 'blend' or 'joint', got {mode!r}")
        if model.model_options.get("transformer_options", {}).get("patches_replace", {}).get("attn2"):
            raise ValueError(
                "model: expected cross-attention that no other node replaces (IP-Adapter, Regions), got one that is"
            )
        model = model.clone()
        hooks = RegionHooks(regions, mode, base_weight)
        model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, ATTENDED, hooks.sample)
        model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, ATTENDED, hooks.evaluate)
        model.set_model_attn2_patch(hooks.swap)
        for block, number in sorted(_blocks(model.get_model_object("diffusion_model"))):
            model.set_model_attn2_replace(hooks.attend, block, number)
        return (model,)


class RegionHooks(Shared):
    """The hooks of one patched model.

    Before each evaluation of the network the weight of every prompt is laid out at each resolution; the layers project
    each distinct prompt once, and look up.
    """

    def __init__(self, regions: tuple, mode: str, base_weight: float):
        self.regions, self.mode, self.base_weight = regions, mode, base_weight
        self.bank = PromptBank((regions,))
        self._maps: dict[tuple, RegionMap] = {}
        self._sigmas: Any = None
        self._lengths: dict[Any, int] = {}  # tokens of each condition that regions are of, by its name in the batch

    def sample(
        self, executor: Any, noise: Any, latent_image: Any, sampler: Any, sigmas: Any, *rest: Any, **named: Any
    ) -> Any:
        """OUTER_SAMPLE: which conditions regions are of, the positive ones.

        Raises:
            ValueError: for a guider without positive conditions, and for conditions with areas.
        """
        conds = executor.class_obj.conds
        if "positive" not in conds:
            raise ValueError(f"guider: expected one with positive conditions, got {', '.join(conds) or 'none'}")
        if any(cond.get("area") or cond.get("set_area_to_bounds") for group in conds.values() for cond in group):
            raise ValueError(
                "conditioning: expected no areas beside regions, got some; masks may be, and Region has one"
            )
        self._lengths = {cond["uuid"]: cond["cross_attn"].shape[1] for cond in conds["positive"]}
        self._sigmas = sigmas
        try:
            return executor(noise, latent_image, sampler, sigmas, *rest, **named)
        finally:
            self._lengths, self._sigmas, self._maps = {}, None, {}

    def evaluate(
        self,
        executor: Any,
        x: torch.Tensor,
        timesteps: Any = None,
        context: Any = None,
        y: Any = None,
        control: Any = None,
        transformer_options: Any = None,
        **named: Any,
    ) -> torch.Tensor:
        """DIFFUSION_MODEL: lays out what the elements of a batch attend to.

        Raises:
            ValueError: for cross-attention that a node after this one replaces.
        """
        replaced = transformer_options["patches_replace"]["attn2"].values()
        if any(patch != self.attend for patch in replaced):
            raise ValueError(
                "model: expected cross-attention that no other node replaces (IP-Adapter), got one that is"
            )
        uuids, tokens = transformer_options["uuids"], context.shape[1]
        lengths = [self._lengths.get(uuid, tokens) for uuid in uuids for _ in range(len(x) // len(uuids))]
        self.bank.update(context, lengths=lengths)  # which ComfyUI repeats where one of the batch is longer
        attended = self.bank.embeddings, self._layout(x, transformer_options)
        options = transformer_options | {ATTENDED: attended}
        return executor(x, timesteps, context, y, control, options, **named)

    def swap(self, query: Any, context: Any, value: Any, options: dict) -> tuple:
        """attn2_patch: the bank in place of a prompt for every element, to be projected once."""
        bank, _ = options[ATTENDED]
        return query, bank, bank

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, options: dict) -> torch.Tensor:
        """attn2_replace: (B, N, heads D) of the queries, each attending to the prompts of its place."""
        _, layout = options[ATTENDED]
        grid = tuple(options["activations_shape"][-2:])
        query, key, value = (each.unflatten(-1, (options["n_heads"], -1)).contiguous() for each in (query, key, value))
        how = dict(mode=self.mode, order=layout.orders.get(grid), lengths=layout.lengths)
        return ops.regional_attention(query, key, value, layout.ids, layout.weights_at(grid), **how).flatten(-2)

    def _layout(self, x, options):
        uuids, elements = options["uuids"], len(x)
        each = elements // len(uuids)
        regional = [uuid in self._lengths for uuid in uuids for _ in range(each)]
        ids, slots = self.bank.attended(
            [(i, 0, is_regional) for i, is_regional in enumerate(regional)], len(self.regions)
        )
        slots = torch.nn.functional.one_hot(slots, ids.shape[1]).double()
        shares = self._shares(x, options)
        weights = torch.einsum("brs,brhw->bshw", slots.to(x.device), shares.double()).float().contiguous()
        return Layout.of(ids.to(x.device), weights, self.bank.lengths)

    def _shares(self, x, options):
        """(B or 1, 1 + R, h, w): of windows, or of the whole canvas."""
        place, size = options.get(KEY), tuple(x.shape[-2:])
        steps = max(1, len(self._sigmas) - 1)
        if place is None:
            return (
                self._map(size, x.device)
                .shares(step_of(self._sigmas, options["sigmas"]) / steps)
                .expand(len(x), -1, -1, -1)
            )
        regions = self._map(place.size, x.device)
        lists = torch.zeros_like(place.pictures)
        return regions.windows_at(place.plan, lists, place.origins, place.progress, place.view)

    def _map(self, size, device):
        if size not in self._maps:
            height, width = (side * CELL for side in size)
            self._maps[size] = RegionMap(self.regions, height, width, base_weight=self.base_weight, device=device)
        return self._maps[size]


def _blocks(network):
    """(block, number) of the transformers of a UNet, as ComfyUI names them to patches."""
    names = {"input_blocks": "input", "middle_block": "middle", "output_blocks": "output"}
    for name, _ in network.named_modules():
        part, _, rest = name.partition(".")
        if name.endswith(".attn2") and part in names:
            yield names[part], 0 if part == "middle_block" else int(rest.split(".")[0])

"""The UNet of a diffusers pipeline, and its ControlNet if it has one, as a denoiser for `sampler.sample`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from instantas.pipelines.attention import RegionalPrompts
from instantas.pipelines.conditions import MicroConditions, Prompts
from instantas.pipelines.control import Control
from instantas.sampling.prediction import cut
from instantas.sampling.step import StepContext


class WindowDenoiser:
    """Evaluates the UNet once on a batch of windows, on [uncond, cond] of them under guidance.

    Args:
        pipe: a diffusers pipeline with `unet`, and `controlnet` where there is a control.
        prompts: of the pictures; without negative ones there is no guidance.
        cell: pixels of a latent cell.
        regional: regional prompts that are installed on the UNet, to be told which windows come.
        micro: for SDXL.
        timestep_cond: (pictures, E), the guidance embedding of distilled networks.
        image_embeds: of each IP-Adapter (`conditions.adapter_embeds`).
        adapter_masks: of each, to be cut for the windows (`conditions.adapter_masks`).
        told: (pictures, C', H, W), further channels that the UNet is given, as a mask and what it leaves.

    Attributes:
        guided: whether the next evaluations have an unconditional half. This and all of the above may be replaced
            between two steps.
        time_ids_shift: (pictures or 2 pictures, 6), added to SDXL's time ids; None: nothing.
    """

    def __init__(
        self,
        pipe: Any,
        prompts: Prompts,
        cell: int,
        *,
        regional: RegionalPrompts | None = None,
        micro: MicroConditions | None = None,
        control: Control | None = None,
        timestep_cond: torch.Tensor | None = None,
        image_embeds: list[torch.Tensor] | None = None,
        adapter_masks: list[torch.Tensor | None] | None = None,
        told: torch.Tensor | None = None,
        cross_attention_kwargs: dict | None = None,
    ):
        self.unet, self.controlnet = pipe.unet, getattr(pipe, "controlnet", None)
        self.prompts, self.cell, self.regional = prompts, cell, regional
        self.micro, self.control, self.timestep_cond = micro, control, timestep_cond
        self.image_embeds, self.adapter_masks = image_embeds, adapter_masks
        self.told, self.cross_attention_kwargs = told, cross_attention_kwargs
        self.guided, self.time_ids_shift = prompts.negative is not None, None
        self._branches, self._guided = 1 + self.guided, self.guided

    def phase(self, context: StepContext) -> tuple:
        """What is done differently at some steps than at others, for `instantas.sampling.graphs`."""
        progress = context.step / context.steps
        regions = None if self.regional is None else self.regional.regions.weights(progress)
        return regions, None if self.control is None else self._scales(context)

    def fingerprint(self) -> dict[str, Any]:
        """What tells a run from others, by names of the pipeline's call (`instantas.sampling.fingerprint`)."""
        regional = self.regional
        return dict(
            prompt=self.prompts,
            regions=None
            if regional is None
            else (regional.regions, regional.mode, regional.bank.embeddings, regional.bank.lengths),
            image=(self.control, self.told),
            original_size=self.micro,
            guidance_embedding=self.timestep_cond,
            ip_adapter_image=(self.image_embeds, self.adapter_masks),
            cross_attention_kwargs=self.cross_attention_kwargs,
            unet=self.unet,
            controlnet=self.controlnet,
        )

    def __call__(
        self, windows: torch.Tensor, timestep: torch.Tensor, context: StepContext
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(cond, uncond) of windows (m, C, h, w); uncond None without guidance."""
        self._guided = self.guided and context.guided
        if self.regional is not None:
            self.regional.set_step(context)
        picture = context.pictures
        text = self._both(self.prompts.negative, self.prompts.embeds, picture)
        sample = torch.cat([windows, windows]) if self._guided else windows
        added = self._added(picture, context, text.dtype)
        residuals = {}
        if self.control is not None:
            residuals = self._controlled(sample, timestep, text, added, picture, context)
        if self.image_embeds is not None:
            embeds = [self._blocks(of_one, picture) for of_one in self.image_embeds]
            added = (added or {}) | {"image_embeds": embeds}
        if self.told is not None:
            told = self.told if context.view is None else context.view.apply(self.told)
            told = cut(told, picture, context.origins, context.plan.window)
            sample = torch.cat([sample, torch.cat([told, told]) if self._guided else told], dim=1)
        with self._second_embeddings(picture):
            predicted = self.unet(
                sample,
                timestep,
                encoder_hidden_states=text,
                timestep_cond=None if self.timestep_cond is None else self._rows(self.timestep_cond, picture),
                cross_attention_kwargs=self._attention(picture, context),
                added_cond_kwargs=added,
                return_dict=False,
                **residuals,
            )[0]
        if not self._guided:
            return predicted, None
        uncond, cond = predicted.chunk(2)
        return cond, uncond

    def _both(self, negative, positive, picture):
        return torch.cat([negative[picture], positive[picture]]) if self._guided else positive[picture]

    def _rows(self, tensor, picture):
        """Of a tensor with a row for each picture, or for each twice and the unconditional ones first."""
        conditional = self._conditional(tensor, picture)
        return tensor[torch.cat([picture, conditional]) if self._guided else conditional]

    def _blocks(self, embeds, picture):
        """Of embeddings for IP-Adapters, of which every picture of each branch has several rows in a row."""
        return self._rows(embeds.unflatten(0, (self._branches * len(self.prompts.embeds), -1)), picture).flatten(0, 1)

    def _conditional(self, tensor, picture):
        """The conditional rows of such a tensor; the unconditional ones are those of `picture`."""
        pictures = len(self.prompts.embeds)
        return picture + pictures if len(tensor) == 2 * pictures else picture

    def _attention(self, picture, context):
        """What the attention layers are told, masks of IP-Adapters cut for the windows."""
        if self.adapter_masks is None:
            return self.cross_attention_kwargs
        masks = [m if m is None else self._under(m, torch.zeros_like(picture), context) for m in self.adapter_masks]
        masks = [m if m is None or not self._guided else torch.cat([m, m]) for m in masks]
        return self.cross_attention_kwargs | {"ip_adapter_masks": masks}

    @contextlib.contextmanager
    def _second_embeddings(self, picture) -> Iterator[None]:
        """The windows' own rows of what FaceID Plus keeps on its layers."""
        layers = () if self.image_embeds is None else self.unet.encoder_hid_proj.image_projection_layers
        kept = {layer: layer.clip_embeds for layer in layers if getattr(layer, "clip_embeds", None) is not None}
        for layer, embeds in kept.items():
            layer.clip_embeds = self._blocks(embeds, picture)
        try:
            yield
        finally:
            for layer, embeds in kept.items():
                layer.clip_embeds = embeds

    def _added(self, picture, context, dtype):
        if self.micro is None:
            return None
        ids = self.micro.ids(context, self.cell)
        if self._guided:
            ids = torch.cat([(self.micro.negative or self.micro).ids(context, self.cell), ids])
        if self.time_ids_shift is not None:
            ids = ids + self._rows(self.time_ids_shift, picture)
        pooled = self._both(self.prompts.negative_pooled, self.prompts.pooled, picture)
        return {"text_embeds": pooled, "time_ids": ids.to(dtype)}

    def _controlled(self, sample, timestep, text, added, picture, context):
        control = self.control
        scales = list(self._scales(context))
        alone = len(picture) if control.guess_mode and self._guided else 0  # leaves the unconditional half out
        images = []
        for image in control.images:
            conditional = self._conditional(image, picture)
            halves = [self._under(image, conditional, context).to(sample.dtype)]
            if self._guided and not alone:
                same = conditional is picture
                halves = [halves[0] if same else self._under(image, picture, context).to(sample.dtype), *halves]
            images.append(torch.cat(halves))
        several = hasattr(self.controlnet, "nets")
        down, middle = self.controlnet(
            sample[alone:],
            timestep,
            encoder_hidden_states=text[alone:],
            controlnet_cond=images if several else images[0],
            conditioning_scale=scales if several else scales[0],
            added_cond_kwargs=added and {name: t[alone:] for name, t in added.items()},
            guess_mode=control.guess_mode,
            return_dict=False,
        )
        if alone:
            down = [torch.cat([torch.zeros_like(d), d]) for d in down]
            middle = torch.cat([torch.zeros_like(middle), middle])
        return {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}

    def _scales(self, context):
        """Of each ControlNet; 0 outside of its span."""
        begins, ends = context.step / context.steps, (context.step + 1) / context.steps
        spans = zip(self.control.scales, self.control.spans)
        return tuple(scale * (start <= begins and ends <= end) for scale, (start, end) in spans)

    def _under(self, image, picture, context):
        """The part of the control image under each window; all of it, made small, for one that sees the whole."""
        h, w = (side * self.cell for side in context.plan.window)
        if context.view is not None:
            return F.interpolate(image, (h, w), mode="area")[picture]
        canvas = tuple(side * self.cell for side in context.size)
        image = image if image.shape[-2:] == canvas else F.adaptive_avg_pool2d(image, canvas)  # of a coarse start
        return cut(image, picture, context.origins * self.cell, (h, w))

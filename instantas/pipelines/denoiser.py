"""The UNet of a diffusers pipeline, and its ControlNet if it has one, as a denoiser for `sampler.sample`."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from instantas.pipelines.attention import RegionalPrompts
from instantas.pipelines.conditions import MicroConditions, Prompts
from instantas.pipelines.control import Control
from instantas.regions.masks import cut


class WindowDenoiser:
    """Evaluates the UNet once on a batch of windows, on [uncond, cond] of them under guidance.

    Args:
        pipe: a diffusers pipeline with `unet`, and `controlnet` where there is a control.
        prompts: of the pictures; without negative ones there is no guidance.
        cell: pixels of a latent cell.
        regional: regional prompts that are installed on the UNet, to be told which windows come.
        micro: for SDXL.
        timestep_cond: (1, E), the guidance embedding of distilled networks.
    """

    def __init__(
        self,
        pipe,
        prompts: Prompts,
        cell: int,
        *,
        regional: RegionalPrompts | None = None,
        micro: MicroConditions | None = None,
        control: Control | None = None,
        timestep_cond: torch.Tensor | None = None,
        cross_attention_kwargs: dict | None = None,
    ):
        self.unet, self.controlnet = pipe.unet, getattr(pipe, "controlnet", None)
        self.prompts, self.cell, self.regional = prompts, cell, regional
        self.micro, self.control, self.timestep_cond = micro, control, timestep_cond
        self.cross_attention_kwargs = cross_attention_kwargs
        self.guided = prompts.negative is not None

    def phase(self, context):
        """What is done differently at some steps than at others, for `instantas.sampling.graphs`."""
        progress = context.step / context.steps
        regions = None if self.regional is None else self.regional.regions.says(progress)
        return regions, None if self.control is None else self._scales(context)

    def __call__(self, windows: torch.Tensor, timestep: torch.Tensor, context):
        """(cond, uncond) of windows (m, C, h, w); uncond None without guidance."""
        if self.regional is not None:
            self.regional.at_step(context)
        picture = context.pictures
        text = self._both(self.prompts.negative, self.prompts.embeds, picture)
        sample = torch.cat([windows, windows]) if self.guided else windows
        added = self._added(picture, context, text.dtype)
        residuals = {}
        if self.control is not None:
            residuals = self._controlled(sample, timestep, text, added, picture, context)
        predicted = self.unet(
            sample,
            timestep,
            encoder_hidden_states=text,
            timestep_cond=None if self.timestep_cond is None else self.timestep_cond.expand(len(sample), -1),
            cross_attention_kwargs=self.cross_attention_kwargs,
            added_cond_kwargs=added,
            return_dict=False,
            **residuals,
        )[0]
        if not self.guided:
            return predicted, None
        uncond, cond = predicted.chunk(2)
        return cond, uncond

    def _both(self, negative, positive, picture):
        return torch.cat([negative[picture], positive[picture]]) if self.guided else positive[picture]

    def _added(self, picture, context, dtype):
        if self.micro is None:
            return None
        ids = self.micro.ids(context, self.cell)
        if self.guided:
            ids = torch.cat([(self.micro.negative or self.micro).ids(context, self.cell), ids])
        pooled = self._both(self.prompts.negative_pooled, self.prompts.pooled, picture)
        return {"text_embeds": pooled, "time_ids": ids.to(dtype)}

    def _controlled(self, sample, timestep, text, added, picture, context):
        control = self.control
        scales = list(self._scales(context))
        images = [self._under(image, picture, context).to(sample.dtype) for image in control.images]
        alone = len(picture) if control.guess_mode and self.guided else 0  # leaves the unconditional half out
        if self.guided and not alone:
            images = [torch.cat([image, image]) for image in images]
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
        return cut(image, picture, context.origins * self.cell, (h, w))

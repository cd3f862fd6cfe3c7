"""diffusers' `callback_on_step_end`: the settings and tensors of a run that it is given, and what it changes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from instantas.checks import real
from instantas.pipelines.denoiser import WindowDenoiser
from instantas.regions import RegionMap
from instantas.sampling.known import Known
from instantas.sampling.step import StepContext
from instantas.windows import WindowPlan


class RunSettings:
    """What a callback may read and change while a run goes on, kept on the held pipeline under diffusers' names."""

    pipe: Any

    @property
    def guidance_scale(self) -> float:
        return self.pipe._guidance_scale

    @property
    def guidance_rescale(self) -> float:
        return self.pipe._guidance_rescale

    @property
    def do_classifier_free_guidance(self) -> bool:
        return self.pipe._guidance_scale > 1 and self.pipe.unet.config.time_cond_proj_dim is None

    @property
    def clip_skip(self) -> int | None:
        return self.pipe._clip_skip

    @property
    def cross_attention_kwargs(self) -> dict | None:
        return self.pipe._cross_attention_kwargs

    @property
    def denoising_end(self) -> float | None:
        return self.pipe._denoising_end

    @property
    def num_timesteps(self) -> int:
        return self.pipe._num_timesteps

    @property
    def interrupt(self) -> bool:
        return self.pipe._interrupt


class StepEnd:
    """Calls the user's callback after each step of `sampler.sample`, and takes over what it changes.

    Tensors are the batch as the network is given it: under guidance with the unconditional half in front. They are
    those of the whole canvas; SDXL's `add_time_ids` are a window's at its upper left corner, and what is changed of
    them is changed for every window. `mask` and `masked_image_latents` are to be looked at: which windows there are
    depends on them.

    Args:
        pipe: what the callback is given as its first argument, with the `RunSettings`.
        callback: function of (pipe, step, timestep, tensors) that returns a dictionary of tensors to go on with, or
            None.
        names: of the tensors that it is given.
        denoisers: of the run; the first has the prompts.
        regions: with guidance scales of their own; None: one scale.
        plan: of the run.
        known: what a mask leaves; None: nothing.
        constant: whether nothing but the latents may change, as in a captured graph.
        default_device: of tensors that the callback makes without saying where.

    Attributes:
        denoised: the clean latents that the last step gave, of a pipeline that decodes these.
    """

    def __init__(
        self,
        pipe: RunSettings,
        callback: Callable | None,
        names: Sequence[str],
        denoisers: Sequence[WindowDenoiser],
        regions: RegionMap | None,
        plan: WindowPlan,
        known: Known | None,
        constant: bool,
        default_device: torch.device,
    ):
        self.pipe, self.callback, self.names = pipe, callback, list(names)
        self.denoisers, self.regions, self.plan, self.constant = denoisers, regions, plan, constant
        self.known_cells = known
        self.pictures = len(denoisers[0].prompts.embeds)
        self.default_device = default_device
        self.tensors: dict[str, Any] = {}
        self.denoised: torch.Tensor | None = None
        self._scale: float | None = None
        self._guidance: float | torch.Tensor | None = None
        self.known = pipe.pipe._callback_tensor_inputs
        self.begun_with = pipe.guidance_scale, pipe.guidance_rescale

    def guidance(self, context: StepContext | None = None) -> float | torch.Tensor | None:
        """The guidance scale of the next step, None without guidance, which the denoisers are told."""
        scale = self.pipe.guidance_scale
        if scale != self._scale:
            self._scale = real("guidance_scale", scale)
            # up to 1 is no guidance, beside regions that have some
            self._guidance = scale if self.regions is None else self.regions.guidance(max(scale, 1.0))
            self._most = float(torch.as_tensor(self._guidance).max())
        base = self.denoisers[0]
        guided = base.timestep_cond is None and self._most > 1
        if guided and base.prompts.negative is None:
            if scale > 1:
                raise ValueError(
                    f"prompt_embeds: expected {2 * self.pictures} rows, the unconditional ones first, to go on with a "
                    f"guidance scale of {scale}, got {self.pictures}"
                )
            guided = False  # a callback took the unconditional half away
        for denoiser in self.denoisers:
            denoiser.guided = guided
        return self._guidance if guided else None

    def guidance_rescale(self, context: StepContext) -> float:
        """Of the next step."""
        return self.pipe.guidance_rescale

    def __call__(
        self, step: int, timestep: torch.Tensor, latents: torch.Tensor, denoised: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The latents to go on with; raises StopIteration where the run is to end."""
        self.denoised = None  # of a run that went on, what another callback has left
        if self.callback is not None:
            latents = self._told(step, timestep, latents, latents if denoised is None else denoised)
        if self.pipe.interrupt:
            raise StopIteration(latents)
        return latents

    def state_dict(self) -> dict[str, Any]:
        """What the callback has changed so far, for a run that goes on later."""
        settings = {name: real(name, getattr(self.pipe, name)) for name in ("guidance_scale", "guidance_rescale")}
        return settings | dict(tensors=dict(self.tensors), denoised=self.denoised)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with it."""
        for name in ("guidance_scale", "guidance_rescale"):
            setattr(self.pipe, f"_{name}", state[name])
        self.tensors, self.denoised = dict(state["tensors"]), state["denoised"]
        if not self.constant:
            self._take_over()

    def _told(self, step, timestep, latents, denoised):
        own = {"latents": latents, "denoised": denoised}
        for name in self.names:
            if name not in own and name not in self.tensors:
                self.tensors[name] = self._tensor(name)
        given = {name: own[name] if name in own else self.tensors[name] for name in self.names}
        with self.default_device:
            returned = self.callback(self.pipe, step, timestep, dict(given))
        if not isinstance(returned, (dict, type(None))):
            raise TypeError(f"callback_on_step_end: expected a dictionary or None, got {type(returned).__name__}")
        returned = {name: value for name, value in (returned or {}).items() if name in self.known}
        changed = {name: v for name, v in returned.items() if name not in own and v is not given.get(name)}
        for name in {"mask", "masked_image_latents"} & set(changed):
            raise ValueError(f"{name}: expected the callback to leave it as it is, got another")
        if self.constant and (changed or self.begun_with != (self.pipe.guidance_scale, self.pipe.guidance_rescale)):
            raise ValueError(
                "cuda_graph: expected a callback that changes the latents alone, got a change of "
                f"{', '.join(changed) or 'the guidance'}; leave cuda_graph out"
            )
        self.tensors |= changed
        if not self.constant:
            self._take_over()
        if "denoised" in self.known:
            self.denoised = returned.get("denoised", denoised)
        return returned.get("latents", latents)

    def _tensor(self, name):
        """The tensor that diffusers has under a name at the first step.

        Its negative ones are no more than what went into the others: what is changed of them has no effect.
        """
        base = self.denoisers[0]
        prompts, micro = base.prompts, base.micro
        match name:
            case "prompt_embeds":
                return _stacked(prompts.negative, prompts.embeds)
            case "negative_prompt_embeds":
                return _copied(prompts.negative)
            case "add_text_embeds":
                return _stacked(prompts.negative_pooled, prompts.pooled)
            case "negative_pooled_prompt_embeds":
                return _copied(prompts.negative_pooled)
            case "add_time_ids":
                negative = None if prompts.negative is None else self._time_ids(micro.negative or micro)
                return _stacked(negative, self._time_ids(micro))
            case "negative_add_time_ids" | "add_neg_time_ids":
                return self._time_ids(micro.negative or micro)
            case "mask":
                mask = self.known_cells.painted.to(prompts.embeds.dtype).expand(self.pictures, -1, -1, -1)
                return _stacked(None if prompts.negative is None else mask, mask)
            case "masked_image_latents":
                left = base.told if base.told is None else base.told[:, 1:]
                return left if left is None or prompts.negative is None else torch.cat([left, left])
            case "image" | "control_image":
                twice = prompts.negative is not None and not base.control.guess_mode
                images = [_stacked(image if twice else None, image) for image in base.control.images]
                return images if len(images) > 1 else images[0]
            case "w_embedding":
                return base.timestep_cond
        return None

    def _time_ids(self, micro):
        base = self.denoisers[0]
        corner = torch.zeros(self.pictures, dtype=torch.int64, device=base.prompts.embeds.device)
        window = [side * base.cell for side in self.plan.window]
        return micro.placed(corner, corner, window).to(base.prompts.embeds.dtype)

    def _take_over(self):
        """Give the denoisers what the callback was given and changed, in place or by returning another."""
        tensors, base = self.tensors, self.denoisers[0]
        prompts = base.prompts
        if "prompt_embeds" in tensors:
            negative, embeds = self._halves("prompt_embeds")
            prompts = replace(prompts, embeds=embeds, negative=negative)
        if "add_text_embeds" in tensors:
            negative, pooled = self._halves("add_text_embeds")
            prompts = replace(prompts, pooled=pooled, negative_pooled=negative)
        if prompts.pooled is not None and (prompts.negative is None) != (prompts.negative_pooled is None):
            prompts = replace(prompts, negative=None, negative_pooled=None)
        if prompts is not base.prompts and base.regional is not None:
            base.regional.base(prompts.embeds, prompts.negative)
        base.prompts = prompts
        for denoiser in self.denoisers:
            if "add_time_ids" in tensors:
                ids = torch.cat([half for half in self._halves("add_time_ids") if half is not None])
                shift = ids - self._begun_ids()[-len(ids) :]
                denoiser.time_ids_shift = shift.round().long() if shift.any() else None
            for name in {"image", "control_image"} & set(tensors):
                images = tensors[name] if isinstance(tensors[name], list) else [tensors[name]]
                for image in images:
                    self._halves(name, image)
                denoiser.control = replace(base.control, images=images)
            if "w_embedding" in tensors:
                denoiser.timestep_cond = tensors["w_embedding"]

    def _begun_ids(self):
        """Time ids of both halves as the run began with them."""
        micro = self.denoisers[0].micro
        return torch.cat([self._time_ids(micro.negative or micro), self._time_ids(micro)])

    def _halves(self, name, value=None) -> tuple[torch.Tensor | None, torch.Tensor]:
        """The unconditional and the conditional rows of a tensor that the callback may have changed."""
        value, n = self.tensors[name] if value is None else value, self.pictures
        if len(value) not in (n, 2 * n):
            raise ValueError(
                f"{name}: expected {n} or {2 * n} rows for {n} pictures from the callback, got {len(value)}"
            )
        return (value[:n], value[n:]) if len(value) == 2 * n else (None, value)


def _stacked(unconditional, conditional):
    return conditional if unconditional is None else torch.cat([unconditional, conditional])


def _copied(tensor):
    return tensor if tensor is None else tensor.clone()

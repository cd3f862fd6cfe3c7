"""`InstantASPipeline`: a diffusers pipeline that paints any size, from text or picture, through the fewest windows."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.utils import logging

from instantas.checks import integer, real
from instantas.pipelines.arguments import (
    check_callback,
    check_choices,
    check_encoders,
    check_names,
    check_pipeline,
    check_scheduler,
    check_texts,
    prompts_of,
)
from instantas.pipelines.attention import regional_prompts
from instantas.pipelines.bar import Counted, Shown
from instantas.pipelines.callbacks import StepEnd
from instantas.pipelines.conditions import adapter_embeds, adapter_masks, embed, guidance_embedding, micro_conditions
from instantas.pipelines.control import control, picture_size
from instantas.pipelines.denoiser import WindowDenoiser
from instantas.pipelines.entry import module_of
from instantas.pipelines.multidiffusion import RegionDenoiser, plain_colours, region_prompts
from instantas.pipelines.starts import Source, Start, first_timestep, roles, smaller_start, steps_before
from instantas.pipelines.tasks import Tasks
from instantas.pipelines.turns import host_tensors, turn
from instantas.regions import RegionMap, check_blend, region_lists
from instantas.regions.prompts import PipelineEncoder
from instantas.sampling import coarse
from instantas.sampling.bridging import bridge
from instantas.sampling.checkpoint import Checkpoint
from instantas.sampling.parallel import shared
from instantas.sampling.sampler import sample
from instantas.sampling.settings import check_interval, check_settings, set_timesteps


class InstantASPipeline(Tasks):
    """Text to image, image to image and inpainting at any size with a Stable Diffusion 1.x, 2.x or XL model, with or
    without a ControlNet.

    Holds a diffusers pipeline and evaluates its UNet on windows of its native size. Components and everything else that
    is not said here are the held pipeline's: `pipe.unet`, `pipe.scheduler = ...`, `pipe.load_lora_weights(...)`,
    `pipe.load_ip_adapter(...)`, `pipe.enable_model_cpu_offload()`, `pipe.set_progress_bar_config(...)`. Threads that
    call pipelines with the same UNet or scheduler take turns.

    Args:
        pipe: a diffusers pipeline of one of `arguments.PIPELINES`. Its UNet, autoencoder and scheduler may be missing
            until it is called.
        defaults: values of `num_inference_steps` and `guidance_scale` that suit the model, by default diffusers', and
            of `coarse_sigma`, where it was measured (`calibration.calibrate`), and of `start`, by default "none".

    Raises:
        TypeError: for another kind of pipeline.
    """

    @torch.no_grad()
    @shared
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        timesteps: Sequence[int] | None = None,
        sigmas: Sequence[float] | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        ip_adapter_image: Any = None,
        ip_adapter_image_embeds: list[torch.Tensor] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        cross_attention_kwargs: dict | None = None,
        guidance_rescale: float = 0.0,
        clip_skip: int | None = None,
        callback_on_step_end: Callable | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        *,
        regions: Sequence | None = None,
        region_mode: str = "blend",
        base_weight: float = 0.0,
        semantic_schedule: str = "constant",
        bridging: Any = "default",
        start: Any = "default",
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        wrap: tuple[bool, bool] = (False, False),
        window_batch_size: int | None = None,
        cuda_graph: bool = False,
        method: str = "instantas",
        stride: int | tuple[int, int] | None = None,
        image: Any = None,
        mask_image: Any = None,
        blend: int = 16,
        strength: float | None = None,
        control_image: Any = None,
        controlnet_conditioning_scale: float | list[float] | None = None,
        control_guidance_start: float | list[float] = 0.0,
        control_guidance_end: float | list[float] = 1.0,
        guess_mode: bool = False,
        prompt_2: str | list[str] | None = None,
        negative_prompt_2: str | list[str] | None = None,
        pooled_prompt_embeds: torch.Tensor | None = None,
        negative_pooled_prompt_embeds: torch.Tensor | None = None,
        original_size: tuple[int, int] | None = None,
        crops_coords_top_left: tuple[int, int] = (0, 0),
        target_size: tuple[int, int] | None = None,
        negative_original_size: tuple[int, int] | None = None,
        negative_crops_coords_top_left: tuple[int, int] = (0, 0),
        negative_target_size: tuple[int, int] | None = None,
        denoising_end: float | None = None,
        original_inference_steps: int | None = None,
        checkpoint: str | os.PathLike | Checkpoint | None = None,
        group: Any = None,
        **unknown: Any,
    ) -> Any:
        """Paint pictures. What is not listed is diffusers' and means the same.

        On a canvas of one window without regions the result is diffusers' own for the same seed. Pictures come prompt
        by prompt, `num_images_per_prompt` of each; a list of negative prompts has one for each prompt.

        Args:
            height, width: pixels, any from 1 up; by default those of the picture to start from, else of a control
                picture, else the native ones. Made on whole latent cells, then cropped.
            num_inference_steps, guidance_scale: by default the model's own (`instantas.json` beside its
                `model_index.json`), else diffusers'.
            latents: (pictures, C, rows, columns) standard normal noise, `canvas(height, width)` cells.
            output_type: "pil", "np" (pictures, height, width, 3) in 0..1, "pt" (pictures, 3, height, width), or
                "latent", uncropped.
            callback_on_step_end: function of (self, step, timestep, tensors), or one of diffusers' callbacks. What it
                returns of the tensors, those of the held pipeline's `_callback_tensor_inputs`, the run goes on with
                (`callbacks.StepEnd`); `self._guidance_scale = ...` holds from the next step on, and
                `self._interrupt = True` ends the run. With `cuda_graph` it may change the latents alone.
            ip_adapter_image, ip_adapter_image_embeds: of the IP-Adapters that are loaded. Their masks, in
                `cross_attention_kwargs["ip_adapter_masks"]`, lie over the whole picture, each window gets its part.
            regions: `instantas.regions.Region`s with prompts of their own, a list for all pictures or one for each.
            region_mode: "blend" or "joint" (`ops.regional_attention`); base_weight, semantic_schedule: see `RegionMap`.
            bridging: what ties the windows together, a name or an object of `instantas.sampling.bridging`; "none"
                or None: nothing.
            start: "coarse" or an object (`instantas.sampling.coarse.CoarseStart`): begin on a smaller canvas, where few
                windows see the whole, and go on from its enlarged latents: one scene, for fewer evaluations. Its noise
                level is the object's, else the model's own (`coarse_sigma` in `instantas.json`), else `coarse.SIGMA`.
                Regions, their masks and control pictures are made smaller; callbacks are given the latents of the
                canvas at hand, and parts of the run (`Region.start`, `guidance_interval`) are parts of its steps.
                "none" or None: every step on the whole canvas. "default": the model's own (`start` in
                `instantas.json`) where that is possible (by the fewest windows, with a scheduler whose steps can begin
                at any timestep and whose levels are known) and saves evaluations, and neither a picture to start from
                nor `latents`, `timesteps` or `sigmas` are given; else "none".
            guidance_interval: (start, end), fractions of the run outside of which the UNet is evaluated with the prompt
                alone, as with a callback that sets the guidance scale to 1.
            wrap: (vertical, horizontal), whether opposite edges join. Such a side must be whole cells.
            window_batch_size: windows in one evaluation of the UNet; None: 4. Of no effect on the picture.
            cuda_graph: capture a step once and replay it for all steps that are alike (`sampler.sample`). On a GPU,
                where launching the network's kernels takes the host longer than they run.
            method: "instantas" (the fewest windows), or the baseline "multidiffusion" (overlapping windows at a stride;
                with regions its region mode, one evaluation for each region and window).
            stride: of multidiffusion, in cells; None: an eighth of the window.
            image: the picture to start from (`pictures.read_pictures`), with `strength` or `mask_image`. Else, of a
                ControlNet, as `control_image` is beside one (`control.control`): as large as the picture, or resized to
                it. Each window gets its part.
            mask_image: where `image` is painted, white, and where it is kept, black, from half on
                (`pictures.read_masks`); of the picture's proportions. A cell is painted if its upper left pixel is.
                Pixels outside of the mask are the picture's own, bit for bit, and windows that hold no painted cell, of
                any picture of the batch, are never evaluated. An empty mask evaluates nothing and gives the picture
                back; a full one keeps nothing.
            blend: pixels inside of the mask, from its edge on, that are drawn to the colours there (`joining.joined`).
            controlnet_conditioning_scale: by default the one of the held pipeline's kind.
            strength: the part of the steps that is taken, from `image` with the noise of the first of them, 0 to 1 as
                in diffusers' img2img; with a mask, 1 begins with pure noise. None: of the held pipeline's kind; of a
                kind from text with a mask 1 (SDXL: 0.9999), without all steps, from noise.
            original_size, crops_coords_top_left, target_size: of SDXL; by default each window's own, as a crop of the
                whole picture.
            denoising_end: part of the noise schedule after which the run ends, with noise left; None: all of it.
            original_inference_steps: of a latent consistency model's scheduler.
            checkpoint: file in which the run is kept after every step, and from which the same call, generators newly
                seeded, goes on to the same picture (`instantas.sampling.checkpoint.Checkpoint`, to say more). What a
                callback has changed is kept too; what it keeps for itself is not.
            group: the processes that share the windows (`sampler.sample`) and the autoencoder's tiles (`codec.decode`):
                each calls with the same arguments and gets the pictures. Generators and latents are rank 0's, the
                callback and the progress bar are there too.

        Returns:
            diffusers' output with `.images`; a tuple without `return_dict`.

        Raises:
            TypeError, ValueError: naming the argument, what was expected and what came, before the UNet is evaluated.
        """
        check_names(unknown, height)
        checkpoint = Checkpoint.of(checkpoint)
        pipe, default_device = self.pipe, torch.get_default_device()
        check_pipeline(pipe, whole=True)
        with turn(module_of(pipe.unet), pipe.scheduler), host_tensors():
            check_scheduler(pipe.scheduler)
            strength = self._default("strength", strength)
            given = roles(pipe, image, mask_image, control_image, strength, latents)
            image, mask_image, control_image, strength = given
            decides = control_image if image is None else image
            height, width, wrap = self._size(*picture_size(decides, height, width), wrap)
            plan = self.plan(height, width, wrap=wrap, method=method, stride=stride)
            size, whole_cells = (height, width), (plan.height * self.cell, plan.width * self.cell)
            bridging = None if bridging == "default" and method == "multidiffusion" else bridge(bridging)
            if timesteps is None and sigmas is None:
                num_inference_steps = self._default("num_inference_steps", num_inference_steps)
            guidance_scale = self._default("guidance_scale", guidance_scale)
            real("guidance_scale", guidance_scale)
            integer("blend", blend, 0)
            check_choices(output_type, region_mode, num_images_per_prompt, cross_attention_kwargs)
            if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
                callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
            check_callback(callback_on_step_end, callback_on_step_end_tensor_inputs, pipe._callback_tensor_inputs)
            texts = dict(
                prompt=prompt,
                prompt_2=prompt_2,
                negative_prompt=negative_prompt,
                negative_prompt_2=negative_prompt_2,
                prompt_embeds=prompt_embeds,
                negative_prompt_embeds=negative_prompt_embeds,
                pooled_prompt_embeds=pooled_prompt_embeds,
                negative_pooled_prompt_embeds=negative_pooled_prompt_embeds,
            )
            check_texts(pipe, texts)
            region_map = self._regions(regions, size, wrap, base_weight, semantic_schedule)
            if cuda_graph and region_map is not None and method == "multidiffusion":
                raise ValueError(
                    "cuda_graph: expected False with regions of multidiffusion, whose steps differ, got True"
                )
            if strength is not None and region_map is not None and method == "multidiffusion":
                raise ValueError(
                    "strength: expected None with regions of multidiffusion, which begin with noise, got one"
                )
            guidance = guidance_scale if region_map is None else region_map.guidance(max(guidance_scale, 1.0))
            distilled = pipe.unet.config.time_cond_proj_dim  # told the scale, instead of evaluated without the prompt
            guided = distilled is None and bool(torch.as_tensor(guidance).max() > 1)
            check_encoders(pipe, texts, guided, clip_skip)
            ways = {} if original_inference_steps is None else dict(original_inference_steps=original_inference_steps)
            set_timesteps(pipe.scheduler, num_inference_steps, timesteps, pipe._execution_device, sigmas, **ways)
            begin = None
            if strength is not None and (strength < 1 or mask_image is None):
                begin = first_timestep(pipe.scheduler, strength)
            end = steps_before(pipe.scheduler, denoising_end)
            if begin is not None and end <= begin:
                raise ValueError(f"denoising_end: expected after where strength begins, got {denoising_end}")
            if start == "default" and any(each is not None for each in (latents, timesteps, sigmas)):
                start = "none"  # a smaller canvas would draw noise, and take timesteps, beside those that are given
            smaller = smaller_start(start, self.defaults, method, image, plan, pipe.scheduler, bridging, end)
            legs = coarse.legs(smaller, plan, pipe.scheduler, end)
            if begin is not None:
                legs = [legs[0]._replace(begin=begin)]
            steps = sum(leg.steps for leg in legs)
            for name, value in dict(
                guidance_scale=guidance_scale,
                guidance_rescale=guidance_rescale,
                clip_skip=clip_skip,
                cross_attention_kwargs=cross_attention_kwargs,
                denoising_end=denoising_end,
                num_timesteps=steps,
                interrupt=False,
            ).items():
                setattr(pipe, f"_{name}", value)

            source = None
            if image is not None:
                source = Source.read(pipe, image, mask_image, size, whole_cells, prompts_of(texts))
            how = dict(clip_skip=clip_skip, lora_scale=(cross_attention_kwargs or {}).get("scale"))
            prompts = embed(pipe, texts, copies=num_images_per_prompt, guided=guided, **how)
            pictures = len(prompts.embeds)
            if region_map is not None and pictures % region_map.pictures:
                raise ValueError(
                    f"regions: expected one list, or one for each of {pictures} pictures, got {region_map.pictures}"
                )
            check_settings(pictures, guidance_rescale, eta, generator)
            check_interval(guidance_interval)
            if group:
                group.seeded(generator, pipe._execution_device)
            if source is None:
                canvas = Start.of_noise(pipe, pictures, (plan.height, plan.width), generator, latents)
            else:
                canvas = Start.of(pipe, source, begin, pictures=pictures, wrap=wrap, generator=generator, group=group)
            noise, known = canvas.latents, canvas.known
            one_window = plan.window == (plan.height, plan.width) and not any(wrap)
            conditions = dict(
                micro=micro_conditions(
                    pipe,
                    size,
                    (original_size, target_size, crops_coords_top_left),
                    (negative_original_size, negative_target_size, negative_crops_coords_top_left),
                ),
                control=control(
                    pipe,
                    control_image,
                    size,
                    whole_cells,
                    pictures=pictures,
                    copies=num_images_per_prompt,
                    scale=self._default("controlnet_conditioning_scale", controlnet_conditioning_scale),
                    start=control_guidance_start,
                    end=control_guidance_end,
                    guess_mode=guess_mode,
                ),
                timestep_cond=guidance_embedding(pipe, guidance_scale, noise),
                image_embeds=adapter_embeds(
                    pipe, ip_adapter_image, ip_adapter_image_embeds, pictures=pictures, guided=guided
                ),
                adapter_masks=adapter_masks(pipe, cross_attention_kwargs, size, whole_cells, whole=one_window),
                cross_attention_kwargs=cross_attention_kwargs,
                told=canvas.told,
            )
            told = dict(guidance_scale=guidance, guidance_rescale=guidance_rescale)
            cells = None if known is None else known.cells
            evaluated = functools.partial(coarse.evaluations, bridging, legs, painted=cells)
            paint = self._denoiser(method, prompts, conditions, region_map, region_mode, noise, generator, how)
            unit, total = ("step", steps) if cuda_graph or group else ("window", pictures * evaluated())
            progress = logging.tqdm(disable=True) if group and group.rank else pipe.progress_bar(total=total)
            with paint as denoiser, progress as bar:
                bar.unit = unit
                step_end = StepEnd(
                    self,
                    callback_on_step_end,
                    callback_on_step_end_tensor_inputs,
                    getattr(denoiser, "denoisers", [denoiser]),
                    region_map,
                    plan,
                    known,
                    constant=cuda_graph,
                    default_device=default_device,
                )
                result = sample(
                    Counted(denoiser, bar, told, lambda context: pictures * evaluated(until=context)),
                    noise,
                    plan,
                    pipe.scheduler,
                    evaluations=end - (begin or 0),
                    begin=begin,
                    origin=canvas.origin,
                    known=known,
                    guidance_scale=guidance if cuda_graph else step_end.guidance,
                    guidance_rescale=guidance_rescale if cuda_graph else step_end.guidance_rescale,
                    guidance_interval=guidance_interval,
                    eta=eta,
                    generator=generator,
                    # windows that have to overlap give way to each other slowly; MultiDiffusion's count alike
                    weight=plan.weight("linear").to(noise.device) if method == "instantas" and plan.overlap else None,
                    window_batch_size=window_batch_size,
                    bridging=bridging,
                    start=smaller,
                    cuda_graph=cuda_graph,
                    callback=Shown(step_end, bar, steps),
                    checkpoint=checkpoint,
                    group=group,
                )
            if step_end.denoised is not None:  # on a smaller canvas, if the run was ended there
                result = coarse.enlarged(step_end.denoised, (plan.height, plan.width), wrap)
            images, flagged = self._decoded(
                result, size, wrap, output_type, generator, source=source, blend=blend, group=group
            )
            pipe.maybe_free_model_hooks()
        return self._output(images, flagged, return_dict)

    def _regions(self, regions, size, wrap, base_weight, semantic_schedule):
        check_blend(base_weight, semantic_schedule)
        lists = region_lists(regions or ())
        if not any(lists):
            return None
        return RegionMap(
            lists,
            *size,
            self.cell,
            self.canvas(*size),
            wrap,
            base_weight=base_weight,
            semantic_schedule=semantic_schedule,
            device=self.pipe._execution_device,
        )

    @contextlib.contextmanager
    def _denoiser(self, method, prompts, conditions, region_map, region_mode, noise, generator, how) -> Iterator:
        """The denoiser of a run: the UNet's, with regional prompts installed on it, or MultiDiffusion's of regions."""
        pipe = self.pipe
        make: Any = functools.partial(WindowDenoiser, pipe, cell=self.cell, **conditions)
        if region_map is None:
            yield make(prompts)
        elif method == "multidiffusion":
            slots = range(max(map(len, region_map.lists)))
            each = [prompts, *(region_prompts(pipe, region_map.lists, slot, prompts, **how) for slot in slots)]
            colours = plain_colours(pipe.vae, generator, noise.device)
            yield RegionDenoiser([make(found) for found in each], region_map, noise, colours)
        else:
            encode = PipelineEncoder(pipe, **how)
            with regional_prompts(pipe.unet, region_map, pipe=pipe, encode=encode, mode=region_mode) as regional:
                regional.base(prompts.embeds, prompts.negative)
                yield make(prompts, regional=regional)

"""`InstantASPipeline`: a diffusers text-to-image pipeline that paints any size, through the fewest windows."""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoPipelineForText2Image, DiffusionPipeline
from diffusers.pipelines.stable_diffusion import StableDiffusionPipelineOutput
from diffusers.pipelines.stable_diffusion_xl import StableDiffusionXLPipelineOutput
from diffusers.utils.torch_utils import randn_tensor

from instantas.checks import flag, integer, pair, positive, real
from instantas.pipelines.attention import regional_prompts
from instantas.pipelines.codec import decode
from instantas.pipelines.conditions import check_texts, embed, is_xl, micro_conditions
from instantas.pipelines.control import control, picture_size
from instantas.pipelines.denoiser import WindowDenoiser
from instantas.pipelines.multidiffusion import RegionDenoiser, plain_colours, region_prompts
from instantas.regions import RegionMap, check_blend, region_lists
from instantas.regions.prompts import encode_prompts
from instantas.sampling.bridging import bridge, evaluations
from instantas.sampling.sampler import check_settings, sample, set_timesteps
from instantas.windows import WindowPlan

METHODS = ("instantas", "multidiffusion")
OUTPUT_TYPES = ("pil", "np", "pt", "latent")
DEFAULTS_FILE = "instantas.json"
"""Beside a model's model_index.json: its own num_inference_steps and guidance_scale."""


class InstantASPipeline:
    """Text to image at any size with a Stable Diffusion 1.x, 2.x or XL model, with or without a ControlNet.

    Holds a diffusers pipeline and evaluates its UNet on windows of its native size. Components and everything else that
    is not said here are the held pipeline's: `pipe.unet`, `pipe.scheduler = ...`, `pipe.load_lora_weights(...)`,
    `pipe.enable_model_cpu_offload()`, `pipe.set_progress_bar_config(...)`.

    Args:
        pipe: a diffusers pipeline with a UNet, an autoencoder and `encode_prompt`.
        defaults: values of `num_inference_steps` and `guidance_scale` that suit the model; by default diffusers'.

    Raises:
        TypeError: for another kind of pipeline.
    """

    def __init__(self, pipe: DiffusionPipeline, defaults: dict | None = None):
        _check_pipeline(pipe)
        usual = {
            name: inspect.signature(type(pipe).__call__).parameters[name].default
            for name in ("num_inference_steps", "guidance_scale")
        }
        self.__dict__.update(pipe=pipe, defaults=usual | (defaults or {}), _interrupt=False)

    @classmethod
    def from_pretrained(cls, model: str | os.PathLike, **settings) -> InstantASPipeline:
        """Load a model from a folder in diffusers' layout or from the hub.

        Args:
            settings: of diffusers' `from_pretrained`, such as torch_dtype, variant, controlnet.

        Raises:
            ValueError: for a folder that is missing or incomplete.
        """
        folder = Path(model)
        if folder.is_dir() and not (folder / "model_index.json").is_file():
            raise ValueError(f"model: expected a folder with a model_index.json, got {str(model)!r} without one")
        looks_local = folder.is_absolute() or str(model).startswith((".", "~")) or str(model).count("/") > 1
        if not folder.is_dir() and looks_local:
            raise ValueError(f"model: expected a folder in diffusers' layout or a hub id, got {str(model)!r}")
        loader = AutoPipelineForText2Image if "controlnet" in settings else DiffusionPipeline
        try:
            pipe = loader.from_pretrained(model, **settings)
        except OSError as error:
            if not folder.is_dir():
                raise
            raise ValueError(f"model: expected a whole model in {str(model)!r}, got {error}") from error
        return cls(pipe, _defaults(folder))

    @classmethod
    def from_pipe(cls, pipe: DiffusionPipeline) -> InstantASPipeline:
        """Around a diffusers pipeline that is there already; its components are shared, not copied."""
        return cls(pipe.pipe if isinstance(pipe, cls) else pipe)

    def to(self, *args, **kwargs) -> InstantASPipeline:
        """Move the components, as diffusers' `to` does."""
        self.pipe.to(*args, **kwargs)
        return self

    def __getattr__(self, name):
        if name == "pipe":  # not there yet: while it is being unpickled, say
            raise AttributeError(name)
        return getattr(self.pipe, name)

    def __setattr__(self, name, value):
        setattr(self.pipe, name, value) if name in self.pipe.components else super().__setattr__(name, value)

    @property
    def cell(self) -> int:
        """Pixels of a latent cell."""
        return self.pipe.vae_scale_factor

    @property
    def window(self) -> tuple[int, int]:
        """(height, width) in cells that the UNet was trained on."""
        size = self.pipe.unet.config.sample_size
        return (size, size) if isinstance(size, int) else tuple(size)

    def canvas(self, height: int, width: int) -> tuple[int, int]:
        """(rows, columns) of latent cells for a picture of so many pixels.

        Whole cells, and at least as many as the UNet's coarsest level needs to have one.
        """
        least = 2 ** (len(self.pipe.unet.config.down_block_types) - 1)
        return tuple(max(least, -(-side // self.cell)) for side in (height, width))

    def plan(
        self,
        height: int,
        width: int,
        *,
        wrap: tuple[bool, bool] = (False, False),
        method: str = "instantas",
        stride: int | None = None,
    ) -> WindowPlan:
        """The windows for a picture of so many pixels; arguments as in the call."""
        height, width, wrap = self._size(height, width, wrap)
        if method not in METHODS:
            raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")
        if method == "instantas":
            if stride is not None:
                raise ValueError(f"stride: expected None, as only multidiffusion has one, got {stride!r}")
            return WindowPlan.minimum_coverage(*self.canvas(height, width), self.window, wrap=wrap)
        strides = tuple(max(1, side // 8) for side in self.window) if stride is None else stride
        return WindowPlan.strided(*self.canvas(height, width), self.window, strides, wrap=wrap)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        timesteps: Sequence[int] | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
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
        bridging="default",
        wrap: tuple[bool, bool] = (False, False),
        window_batch_size: int | None = None,
        cuda_graph: bool = False,
        method: str = "instantas",
        stride: int | tuple[int, int] | None = None,
        image=None,
        controlnet_conditioning_scale: float | list[float] = 1.0,
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
    ):
        """Paint pictures. What is not listed is diffusers' and means the same.

        On a canvas of one window without regions the result is diffusers' own for the same seed. Pictures come prompt
        by prompt, `num_images_per_prompt` of each; a list of negative prompts has one for each prompt.

        Args:
            height, width: pixels, any from 1 up; by default a control picture's size, else the native one. Made on
                whole latent cells, then cropped.
            num_inference_steps, guidance_scale: by default the model's own (`instantas.json` beside its
                `model_index.json`), else diffusers'.
            latents: (pictures, C, rows, columns) standard normal noise, `canvas(height, width)` cells.
            output_type: "pil", "np" (pictures, height, width, 3) in 0..1, "pt" (pictures, 3, height, width), or
                "latent", uncropped.
            callback_on_step_end: function of (self, step, timestep, {"latents": ...}) that returns such a dictionary;
                `self._interrupt = True` in it ends the run.
            regions: `instantas.regions.Region`s with prompts of their own, a list for all pictures or one for each.
            region_mode: "blend" or "joint" (`ops.regional_attention`); base_weight, semantic_schedule: see `RegionMap`.
            bridging: what ties the windows together, a name or an object of `instantas.sampling.bridging`; "none"
                or None: nothing.
            wrap: (vertical, horizontal), whether opposite edges join. Such a side must be whole cells.
            window_batch_size: windows in one evaluation of the UNet; None: 4. Of no effect on the picture.
            cuda_graph: capture a step once and replay it for all steps that are alike (`sampler.sample`). On a GPU,
                where launching the network's kernels takes the host longer than they run.
            method: "instantas" (the fewest windows), or the baseline "multidiffusion" (overlapping windows at a stride;
                with regions its region mode, one evaluation for each region and window).
            stride: of multidiffusion, in cells; None: an eighth of the window.
            image: of a ControlNet (`control.control`): as large as the picture, or resized to it. Each window gets
                its part.
            original_size, crops_coords_top_left, target_size: of SDXL; by default each window's own, as a crop of the
                whole picture.

        Returns:
            diffusers' output with `.images`; a tuple without `return_dict`.

        Raises:
            TypeError, ValueError: naming the argument, what was expected and what came, before the UNet is evaluated.
        """
        pipe = self.pipe
        height, width, wrap = self._size(*picture_size(image, height, width), wrap)
        plan = self.plan(height, width, wrap=wrap, method=method, stride=stride)
        bridging = None if bridging == "default" and method == "multidiffusion" else bridge(bridging)
        num_inference_steps = self._default("num_inference_steps", num_inference_steps, timesteps)
        guidance_scale = self._default("guidance_scale", guidance_scale)
        real("guidance_scale", guidance_scale)
        _check_choices(output_type, callback_on_step_end_tensor_inputs, num_images_per_prompt, region_mode)
        check_texts(prompt, negative_prompt, prompt_embeds, negative_prompt_embeds)
        region_map = self._regions(regions, (height, width), wrap, base_weight, semantic_schedule)
        if cuda_graph and region_map is not None and method == "multidiffusion":
            raise ValueError("cuda_graph: expected False with regions of multidiffusion, whose steps differ, got True")
        guidance = guidance_scale if region_map is None else region_map.guidance(guidance_scale)
        distilled = pipe.unet.config.time_cond_proj_dim  # told the scale, instead of evaluated without the prompt
        guided = distilled is None and bool(torch.as_tensor(guidance).max() > 1)
        self._interrupt, pipe._guidance_scale = False, guidance_scale
        pipe._cross_attention_kwargs = cross_attention_kwargs
        set_timesteps(pipe.scheduler, num_inference_steps, timesteps, pipe._execution_device)
        steps = len(pipe.scheduler.timesteps)
        evaluated = evaluations(bridging, plan, steps)

        how = dict(clip_skip=clip_skip, lora_scale=(cross_attention_kwargs or {}).get("scale"))
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
        prompts = embed(pipe, texts, copies=num_images_per_prompt, guided=guided, **how)
        pictures = len(prompts.embeds)
        if region_map is not None and pictures % region_map.pictures:
            raise ValueError(
                f"regions: expected one list, or one for each of {pictures} pictures, got {region_map.pictures}"
            )
        check_settings(pictures, guidance_rescale, eta, generator)
        noise = self._noise(pictures, plan, generator, latents)
        conditions = dict(
            micro=micro_conditions(
                pipe,
                (height, width),
                (original_size, target_size, crops_coords_top_left),
                (negative_original_size, negative_target_size, negative_crops_coords_top_left),
            ),
            control=control(
                pipe,
                image,
                (height, width),
                (plan.height * self.cell, plan.width * self.cell),
                pictures=pictures,
                copies=num_images_per_prompt,
                scale=controlnet_conditioning_scale,
                start=control_guidance_start,
                end=control_guidance_end,
                guess_mode=guess_mode,
            ),
            timestep_cond=None if distilled is None else self._guidance_embedding(guidance_scale).to(noise),
            cross_attention_kwargs=cross_attention_kwargs,
        )
        paint = self._denoiser(method, prompts, conditions, region_map, region_mode, noise, generator, how)
        with paint as denoiser, pipe.progress_bar(total=steps if cuda_graph else pictures * evaluated) as bar:
            bar.unit = "step" if cuda_graph else "window"
            result = sample(
                denoiser if cuda_graph else _counted(denoiser, bar),
                noise,
                plan,
                pipe.scheduler,
                guidance_scale=guidance,
                guidance_rescale=guidance_rescale,
                eta=eta,
                generator=generator,
                # windows that have to overlap give way to each other slowly; MultiDiffusion's count alike
                weight=plan.weight("linear").to(noise.device) if method == "instantas" and plan.overlap else None,
                window_batch_size=window_batch_size,
                bridging=bridging,
                cuda_graph=cuda_graph,
                callback=self._callback(callback_on_step_end, bar, steps),
            )
        images, flagged = self._decoded(result, (height, width), wrap, output_type)
        pipe.maybe_free_model_hooks()
        if is_xl(pipe):
            return StableDiffusionXLPipelineOutput(images=images) if return_dict else (images,)
        if not return_dict:
            return images, flagged
        return StableDiffusionPipelineOutput(images=images, nsfw_content_detected=flagged)

    @torch.no_grad()
    def decode(
        self,
        latents: torch.Tensor,
        height: int,
        width: int,
        *,
        wrap: tuple[bool, bool] = (False, False),
        output_type: str = "pil",
    ) -> Any:
        """Pictures of so many pixels, as from the call, of what it gives with `output_type="latent"`.

        Raises:
            ValueError: for latents of another size.
        """
        height, width, wrap = self._size(height, width, wrap)
        if latents.shape[-2:] != self.canvas(height, width):
            expected = self.canvas(height, width)
            raise ValueError(
                f"latents: expected (pictures, C, {expected[0]}, {expected[1]}), got {tuple(latents.shape)}"
            )
        return self._decoded(latents, (height, width), wrap, output_type)[0]

    def _size(self, height, width, wrap):
        """(height, width, wrap), checked."""
        height, width = (
            side * self.cell if given is None else given for given, side in zip((height, width), self.window)
        )
        wrap = pair("wrap", wrap, flag)
        for name, side, wraps in zip(("height", "width"), (height, width), wrap):
            integer(name, side, 1, expected="a positive whole number of pixels")
            if wraps and (side % self.cell or side < self.canvas(1, 1)[0] * self.cell):
                raise ValueError(f"{name}: expected a multiple of {self.cell} pixels on an axis that wraps, got {side}")
        return int(height), int(width), wrap

    def _default(self, name, value, other=None):
        return self.defaults[name] if value is None and other is None else value

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
    def _denoiser(self, method, prompts, conditions, region_map, region_mode, noise, generator, how):
        """The denoiser of a run: the UNet's, with regional prompts installed on it, or MultiDiffusion's of regions."""
        pipe = self.pipe
        make = functools.partial(WindowDenoiser, pipe, cell=self.cell, **conditions)
        if region_map is None:
            yield make(prompts)
        elif method == "multidiffusion":
            slots = range(max(map(len, region_map.lists)))
            each = [prompts, *(region_prompts(pipe, region_map.lists, slot, prompts, **how) for slot in slots)]
            colours = plain_colours(pipe.vae, generator, noise.device)
            yield RegionDenoiser([make(found) for found in each], region_map, noise, colours)
        else:
            encode = functools.partial(encode_prompts, pipe, **how)
            with regional_prompts(pipe.unet, region_map, pipe=pipe, encode=encode, mode=region_mode) as regional:
                regional.base(prompts.embeds, prompts.negative)
                yield make(prompts, regional=regional)

    def _noise(self, pictures, plan, generator, latents):
        shape = (pictures, self.pipe.unet.config.in_channels, plan.height, plan.width)
        device, dtype = self.pipe._execution_device, self.pipe.unet.dtype
        if latents is None:
            return randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        if not isinstance(latents, torch.Tensor) or not latents.is_floating_point():
            raise TypeError(f"latents: expected a tensor of floats, got {getattr(latents, 'dtype', type(latents))}")
        if latents.shape != shape:
            raise ValueError(f"latents: expected (pictures, C, rows, columns) = {shape}, got {tuple(latents.shape)}")
        if not latents.isfinite().all():
            raise ValueError("latents: expected finite values, got NaN or infinite ones")
        return latents.to(device, dtype)

    def _guidance_embedding(self, scale):
        wide = self.pipe.unet.config.time_cond_proj_dim
        return self.pipe.get_guidance_scale_embedding(torch.tensor([scale - 1.0]), embedding_dim=wide)

    def _callback(self, told, bar, steps):
        def after_step(i, t, latents):
            if bar.unit == "step":
                bar.update()
            bar.set_postfix_str(f"step {i + 1}/{steps}")
            if told is not None:
                latents = (told(self, i, t, {"latents": latents}) or {}).pop("latents", latents)
            if self._interrupt:
                raise StopIteration
            return latents

        return after_step

    def _decoded(self, latents, size, wrap, output_type):
        """(pictures, whether each was found unsafe or None)"""
        pipe = self.pipe
        if output_type == "latent":
            return latents, None
        images, flagged = decode(pipe.vae, latents, wrap)[:, :, : size[0], : size[1]], None
        if getattr(pipe, "safety_checker", None) is not None:
            images, flagged = pipe.run_safety_checker(images, images.device, images.dtype)
        if getattr(pipe, "watermark", None) is not None:
            images = pipe.watermark.apply_watermark(images)
        shown = [True] * len(images) if flagged is None else [not unsafe for unsafe in flagged]
        return pipe.image_processor.postprocess(images, output_type=output_type, do_denormalize=shown), flagged


def _counted(denoiser, bar):
    def run(windows, timestep, context):
        predicted = denoiser(windows, timestep, context)
        bar.update(len(windows))
        return predicted

    return run


def _defaults(folder: Path) -> dict:
    path = folder / DEFAULTS_FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _check_pipeline(pipe):
    for name in ("unet", "vae", "scheduler", "encode_prompt", "image_processor"):
        if getattr(pipe, name, None) is None:
            raise TypeError(f"pipe: expected a diffusers pipeline with {name}, got {type(pipe).__name__} without")
    config = pipe.unet.config
    if config.in_channels != config.out_channels:
        raise TypeError(
            f"pipe: expected a text-to-image UNet, got {type(pipe).__name__} with {config.in_channels} channels in and "
            f"{config.out_channels} out"
        )
    if config.encoder_hid_dim_type is not None:
        raise TypeError(f"pipe: expected a UNet of prompts alone, got {config.encoder_hid_dim_type} (unload it first)")


def _check_choices(output_type, tensor_inputs, copies, region_mode):
    if output_type not in OUTPUT_TYPES:
        raise ValueError(f"output_type: expected one of {', '.join(OUTPUT_TYPES)}, got {output_type!r}")
    if list(tensor_inputs) != ["latents"]:
        raise ValueError(f"callback_on_step_end_tensor_inputs: expected ['latents'], got {tensor_inputs!r}")
    positive("num_images_per_prompt", copies)
    if region_mode not in ("blend", "joint"):
        raise ValueError(f"region_mode: expected 'blend' or 'joint', got {region_mode!r}")

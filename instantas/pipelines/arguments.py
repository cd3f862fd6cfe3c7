"""What a pipeline and its call may be: checks that name the argument, what was expected and what came."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import (
    ControlNetUnionModel,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FlowMatchLCMScheduler,
    LatentConsistencyModelPipeline,
    StableDiffusionControlNetImg2ImgPipeline,
    StableDiffusionControlNetInpaintPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPanoramaPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLControlNetImg2ImgPipeline,
    StableDiffusionXLControlNetInpaintPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
)

from instantas.checks import integer, positive

PIPELINES = (
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionXLControlNetPipeline,
    LatentConsistencyModelPipeline,
    StableDiffusionPanoramaPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionControlNetImg2ImgPipeline,
    StableDiffusionXLControlNetImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionControlNetInpaintPipeline,
    StableDiffusionXLControlNetInpaintPipeline,
)
"""Text to image, image to image and inpainting, with or without a ControlNet: what other kinds do beside would be lost
without a word."""

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
FLOWS = (FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler, FlowMatchLCMScheduler)
INSTEAD = {
    "callback": "callback_on_step_end, a function of (pipe, step, timestep, tensors)",
    "callback_steps": "callback_on_step_end, which is called after every step and told which",
}


def is_xl(pipe: Any) -> bool:
    """Whether the UNet takes SDXL's pooled embeddings and time ids."""
    return pipe.unet.config.addition_embed_type == "text_time"


def is_told(pipe: Any) -> bool:
    """Whether the UNet is an inpainting one, which is told the mask and the latents that it leaves."""
    config = pipe.unet.config
    return config.in_channels == 2 * config.out_channels + 1


def check_pipeline(pipe: Any, *, whole: bool) -> None:
    """Refuse pipelines of other kinds.

    Args:
        whole: whether the components are looked for too.

    Raises:
        TypeError: naming the kind, or the component that is missing or of another kind.
    """
    if not isinstance(pipe, PIPELINES):
        kinds = ", ".join(kind.__name__ for kind in PIPELINES)
        raise TypeError(f"pipe: expected a pipeline of one of the kinds {kinds}, got {type(pipe).__name__}")
    for name in ("unet", "vae", "scheduler"):
        if whole and getattr(pipe, name) is None:
            raise TypeError(f"pipe: expected a diffusers pipeline with {name}, got {type(pipe).__name__} without")
    nets = getattr(pipe, "controlnet", None)
    if union := [net for net in getattr(nets, "nets", [nets]) if isinstance(net, ControlNetUnionModel)]:
        raise TypeError(f"pipe: expected ControlNetModels, got a {type(union[0]).__name__}")
    if pipe.unet is None:
        return
    config = pipe.unet.config
    if config.in_channels != config.out_channels and not is_told(pipe):
        raise TypeError(
            f"pipe: expected a UNet for text to image or inpainting, got {type(pipe).__name__} with "
            f"{config.in_channels} channels in and {config.out_channels} out"
        )
    if getattr(pipe.config, "requires_aesthetics_score", False):
        raise TypeError("pipe: expected a model of size and crop conditions, got one of aesthetic scores (a refiner)")
    if config.encoder_hid_dim_type not in (None, "ip_image_proj"):
        raise TypeError(f"pipe: expected a UNet of prompts and IP-Adapters, got {config.encoder_hid_dim_type}")


def check_scheduler(scheduler: Any) -> None:
    """Refuse a scheduler of flow matching, as the models predict noise or velocity of a noise schedule."""
    prediction = getattr(getattr(scheduler, "config", None), "prediction_type", None)
    if isinstance(scheduler, FLOWS) or prediction == "flow_prediction":
        raise ValueError(
            "scheduler: expected one for a model that predicts noise, x_0 or v, got "
            f"{type(scheduler).__name__}, which takes predictions for those of flow matching"
        )


def check_output(output_type: Any) -> None:
    """Refuse what is none of `OUTPUT_TYPES`."""
    if output_type not in OUTPUT_TYPES:
        raise ValueError(f"output_type: expected one of {', '.join(OUTPUT_TYPES)}, got {output_type!r}")


def check_choices(output_type: Any, region_mode: Any, copies: Any, cross_attention_kwargs: Any) -> None:
    """Refuse values that are none of those to choose from."""
    check_output(output_type)
    positive("num_images_per_prompt", copies)
    if region_mode not in ("blend", "joint"):
        raise ValueError(f"region_mode: expected 'blend' or 'joint', got {region_mode!r}")
    if not isinstance(cross_attention_kwargs, (dict, type(None))):
        raise TypeError(f"cross_attention_kwargs: expected a dictionary, got {type(cross_attention_kwargs).__name__}")


def check_names(unknown: dict, height: Any) -> None:
    """Refuse arguments that a call does not have, saying what stands in the place of diffusers' former ones."""
    for name in unknown:
        if name in INSTEAD:
            raise TypeError(f"{name}: expected {INSTEAD[name]}, got the argument of earlier diffusers")
        raise TypeError(f"{name}: expected an argument that the call has, got an unknown one")
    if isinstance(height, torch.Tensor) or hasattr(height, "convert"):
        raise TypeError("height: expected a positive whole number of pixels, got a picture; give it by name: image=...")


def check_callback(callback: Any, names: Sequence[str], known: Sequence[str]) -> None:
    """Refuse a callback that cannot be called as diffusers' are, or asks for tensors that there are none of."""
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"callback_on_step_end_tensor_inputs: expected some of {', '.join(known)}, got {unknown}")
    if callback is None:
        return
    if not callable(callback):
        raise TypeError(f"callback_on_step_end: expected a function, got {type(callback).__name__}")
    try:
        inspect.signature(callback).bind(None, 0, 0, {})
    except TypeError as error:
        raise TypeError(
            f"callback_on_step_end: expected a function of (pipe, step, timestep, tensors), got {callback!r} ({error})"
        ) from error
    except ValueError:  # no signature is known, as of some built-in functions
        pass


def check_texts(pipe: Any, texts: dict) -> None:
    """Refuse prompts and embeddings of a call that do not go together.

    Args:
        texts: prompt, prompt_2, negative_prompt, negative_prompt_2, and prompt_embeds, negative_prompt_embeds,
            pooled_prompt_embeds, negative_pooled_prompt_embeds, or None.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    if not is_xl(pipe) and (unfit := [n for n, v in texts.items() if v is not None and ("_2" in n or "pooled" in n)]):
        raise ValueError(
            f"{unfit[0]}: expected None, as the model has one text encoder and no pooled embeddings, got "
            f"{texts[unfit[0]]!r:.60}"
        )
    for prefix in ("", "negative_"):
        embeds = texts[f"{prefix}prompt_embeds"]
        for name in (f"{prefix}prompt", f"{prefix}prompt_2"):
            text = texts[name]
            if text is not None and embeds is not None:
                raise ValueError(f"{name}: expected either {name} or {prefix}prompt_embeds, got both")
            if isinstance(text, list) and not (text and all(isinstance(t, str) for t in text)):
                raise TypeError(f"{name}: expected a string or a list of strings, got {text!r}")
            if text is not None and not isinstance(text, (str, list)):
                raise TypeError(f"{name}: expected a string or a list of strings, got {type(text).__name__}")
        pooled = texts[f"{prefix}pooled_prompt_embeds"]
        if is_xl(pipe) and embeds is not None and pooled is None:
            raise ValueError(f"{prefix}pooled_prompt_embeds: expected some beside {prefix}prompt_embeds, got None")
    if texts["prompt"] is None and texts["prompt_embeds"] is None:
        raise ValueError("prompt: expected a prompt or prompt_embeds, got neither")
    _check_counts(pipe, texts)


def prompts_of(texts: dict) -> int:
    """How many prompts there are."""
    prompt, embeds = texts["prompt"], texts["prompt_embeds"]
    return len(embeds) if isinstance(embeds, torch.Tensor) else len(prompt) if isinstance(prompt, list) else 1


def _check_counts(pipe, texts):
    """One row of embeddings and one string of a list for each prompt, as wide as the UNet takes them."""
    prompt, embeds, count = texts["prompt"], texts["prompt_embeds"], max(prompts_of(texts), 1)
    if isinstance(prompt, str) and isinstance(texts["negative_prompt_embeds"], torch.Tensor):
        count = 1
    config = pipe.unet.config
    width, wide = config.cross_attention_dim, None
    if is_xl(pipe):
        wide = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    for name, value in texts.items():
        if name.endswith("embeds") and value is not None:
            layout, sides = ("(prompts, E)", (wide,)) if "pooled" in name else ("(prompts, L, D)", (None, width))
            if not (isinstance(value, torch.Tensor) and value.is_floating_point()):
                raise TypeError(f"{name}: expected a tensor {layout} of floats, got {value!r:.80}")
            wanted = (count, *sides)
            fits = value.dim() == len(wanted) and all(
                s == t if isinstance(t, int) else s for s, t in zip(value.shape, wanted)
            )
            if not fits:
                wanted = ", ".join(str(s) if isinstance(s, int) else "any" for s in wanted)
                raise ValueError(f"{name}: expected {layout} = ({wanted}), got {tuple(value.shape)}")
            if not value.isfinite().all():
                raise ValueError(f"{name}: expected finite values, got NaN or infinite ones")
        elif isinstance(value, list) and name != "prompt" and len(value) != count:
            raise ValueError(f"{name}: expected one for each of {count} prompts, got {len(value)}")
    negative = texts["negative_prompt_embeds"]
    if embeds is not None and negative is not None and embeds.shape != negative.shape:
        raise ValueError(
            f"negative_prompt_embeds: expected {tuple(embeds.shape)} like prompt_embeds, got {tuple(negative.shape)}"
        )


def check_encoders(pipe: Any, texts: dict, guided: bool, clip_skip: Any) -> None:
    """Refuse what the text encoders cannot embed.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    found = [getattr(pipe, name, None) for name in ("text_encoder", "text_encoder_2")]
    encoders: list[Any] = [encoder for encoder in found if encoder is not None]
    if clip_skip is not None:
        integer("clip_skip", clip_skip, 0)
        layers = min((encoder.config.num_hidden_layers for encoder in encoders), default=0) - is_xl(pipe)
        if texts["prompt"] is not None and clip_skip > layers:
            raise ValueError(f"clip_skip: expected at most {layers}, as the text encoder has no more, got {clip_skip}")
    if not encoders and texts["prompt"] is not None:
        raise ValueError(
            "prompt: expected prompt_embeds in its place, as the pipeline has no text encoder, got "
            f"{texts['prompt']!r:.60}"
        )
    zeros = is_xl(pipe) and texts["negative_prompt"] is None and pipe.config.force_zeros_for_empty_prompt
    if not guided or texts["prompt_embeds"] is None or texts["negative_prompt_embeds"] is not None or zeros:
        return
    length = texts["prompt_embeds"].shape[1]
    longest = min((encoder.config.max_position_embeddings for encoder in encoders), default=0)
    if length > longest:
        raise ValueError(
            f"negative_prompt_embeds: expected some of {length} tokens like prompt_embeds, as the text encoder gives "
            f"at most {longest}, got None"
        )


def check_latents(latents: Any, shape: tuple[int, ...], sigma: float) -> None:
    """Refuse latents that are no noise of that shape; warn of noise that has the scheduler's scale already.

    Args:
        sigma: the standard deviation that they are going to be multiplied by.
    """
    if not isinstance(latents, torch.Tensor) or not latents.is_floating_point():
        raise TypeError(f"latents: expected a tensor of floats, got {getattr(latents, 'dtype', type(latents))}")
    if latents.shape != shape:
        raise ValueError(f"latents: expected (pictures, C, rows, columns) = {shape}, got {tuple(latents.shape)}")
    if not latents.isfinite().all():
        raise ValueError("latents: expected finite values, got NaN or infinite ones")
    spread = float(latents.float().std())
    if sigma > 2 and spread > sigma / 2:
        warnings.warn(
            f"latents: expected standard normal noise, got a standard deviation of {spread:.3g}; they are multiplied "
            f"by the scheduler's init_noise_sigma, {sigma:.3g}, here: leave that out",
            stacklevel=6,
        )

"""What a diffusers UNet is told beside the noisy windows: prompts, SDXL's sizes and crops."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch


@dataclass(frozen=True)
class Prompts:
    """Embedded prompts of the pictures.

    Attributes:
        embeds, negative: (pictures, L, D); negative None: no guidance.
        pooled, negative_pooled: (pictures, E), of SDXL's second text encoder; None for others.
    """

    embeds: torch.Tensor
    negative: torch.Tensor | None = None
    pooled: torch.Tensor | None = None
    negative_pooled: torch.Tensor | None = None

    def to(self, dtype: torch.dtype) -> Prompts:
        return Prompts(*(t if t is None else t.to(dtype) for t in (getattr(self, f.name) for f in fields(self))))


def is_xl(pipe) -> bool:
    """Whether the UNet takes SDXL's pooled embeddings and time ids."""
    return pipe.unet.config.addition_embed_type == "text_time"


def embed(pipe, texts: dict, *, copies: int, guided: bool, lora_scale=None, clip_skip=None) -> Prompts:
    """Embed prompts by the pipeline's `encode_prompt`, `copies` pictures of each.

    Args:
        texts: prompt, negative_prompt, prompt_embeds and the like by name; those that are None are left out.
    """
    if not is_xl(pipe) and (unfit := [n for n, v in texts.items() if v is not None and ("_2" in n or "pooled" in n)]):
        raise ValueError(f"{unfit[0]}: expected None, as the model has one text encoder and no pooled embeddings")
    prompt, negative = texts.get("prompt"), texts.get("negative_prompt")
    if isinstance(prompt, list) and isinstance(negative, str):
        texts = texts | {"negative_prompt": [negative] * len(prompt)}
    given = {"prompt": None} | {name: value for name, value in texts.items() if value is not None}
    embeds, negative, *pooled = pipe.encode_prompt(
        **given,
        device=pipe._execution_device,
        num_images_per_prompt=copies,
        do_classifier_free_guidance=guided,
        lora_scale=lora_scale,
        clip_skip=clip_skip,
    )
    if not guided:
        return Prompts(embeds, None, *pooled[:1]).to(pipe.unet.dtype)
    return Prompts(embeds, negative, *pooled).to(pipe.unet.dtype)


def check_texts(prompt, negative_prompt, prompt_embeds, negative_prompt_embeds) -> None:
    """Refuse prompts that do not go together.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    for name, text, embeds in (
        ("prompt", prompt, prompt_embeds),
        ("negative_prompt", negative_prompt, negative_prompt_embeds),
    ):
        if text is not None and embeds is not None:
            raise ValueError(f"{name}: expected either {name} or {name}_embeds, got both")
        if isinstance(text, list) and not (text and all(isinstance(t, str) for t in text)):
            raise TypeError(f"{name}: expected a string or a list of strings, got {text!r}")
        if text is not None and not isinstance(text, (str, list)):
            raise TypeError(f"{name}: expected a string or a list of strings, got {type(text).__name__}")
        if embeds is not None and not (isinstance(embeds, torch.Tensor) and embeds.dim() == 3):
            raise TypeError(f"{name}_embeds: expected a tensor (prompts, L, D), got {embeds!r:.80}")
    if prompt is None and prompt_embeds is None:
        raise ValueError("prompt: expected a prompt or prompt_embeds, got neither")
    if isinstance(negative_prompt, list):
        count = len(prompt_embeds) if prompt is None else len(prompt) if isinstance(prompt, list) else 1
        if len(negative_prompt) != count:
            raise ValueError(f"negative_prompt: expected one for each of {count} prompts, got {len(negative_prompt)}")
    if prompt_embeds is not None and negative_prompt_embeds is not None:
        if prompt_embeds.shape != negative_prompt_embeds.shape:
            raise ValueError(
                f"negative_prompt_embeds: expected {tuple(prompt_embeds.shape)} like prompt_embeds, got "
                f"{tuple(negative_prompt_embeds.shape)}"
            )


@dataclass(frozen=True)
class MicroConditions:
    """SDXL's size and crop conditions in pixels, (height, width) or (top, left).

    Attributes:
        canvas: size of the whole picture. A window has it as its original size, its own place as crop and its own size
            as target: it is a crop of a larger picture, as SDXL was trained on.
        original_size, target_size: in place of those.
        crop: added to the place of each window.
        negative: the same for the unconditional branch; None: no other ones.
    """

    canvas: tuple[int, int]
    original_size: tuple[int, int] | None = None
    target_size: tuple[int, int] | None = None
    crop: tuple[int, int] = (0, 0)
    negative: MicroConditions | None = None

    def ids(self, context, cell: int) -> torch.Tensor:
        """(m, 6) int64: original size, crop and target size of each window of a `sampler.StepContext`."""
        # padding to whole cells is no part of the picture
        window = [min(side * cell, whole) for side, whole in zip(context.plan.window, self.canvas)]
        original, (y, x) = self.canvas, context.origins.long().mul(cell).T
        if context.view is not None:  # each window sees the whole picture, in strides
            original, y, x = window, torch.zeros_like(y), torch.zeros_like(x)
        sizes = (*(self.original_size or original), *(self.target_size or window))
        top, left, bottom, right = (torch.full_like(y, size) for size in sizes)
        return torch.stack([top, left, y + self.crop[0], x + self.crop[1], bottom, right], dim=1)


def micro_conditions(pipe, canvas, given: tuple, negative: tuple) -> MicroConditions | None:
    """SDXL's conditions from (original size, target size, crop); as in diffusers, negative ones need both sizes.

    Raises:
        ValueError: for conditions given to another model.
    """
    if is_xl(pipe):
        return MicroConditions(canvas, *given, MicroConditions(canvas, *negative) if None not in negative[:2] else None)
    if any(value not in (None, (0, 0)) for value in (*given, *negative)):
        raise ValueError(f"original_size: expected no SDXL conditions for another model, got {given}, {negative}")
    return None

"""What a diffusers UNet is told beside the noisy windows: prompts, pictures of IP-Adapters, SDXL's sizes, guidance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F

from instantas.pipelines.arguments import is_xl
from instantas.regions.prompts import EMBEDDING
from instantas.sampling.step import StepContext


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
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        converted: dict[str, Any] = {name: t if t is None else t.to(dtype) for name, t in tensors.items()}
        return Prompts(**converted)


def embed(
    pipe: Any,
    texts: dict[str, Any],
    *,
    copies: int,
    guided: bool,
    lora_scale: float | None = None,
    clip_skip: int | None = None,
) -> Prompts:
    """Embed prompts by the pipeline's `encode_prompt`, `copies` pictures of each.

    Args:
        texts: prompt, negative_prompt, prompt_embeds and the like by name; those that are None are left out.

    Raises:
        ValueError: for embeddings of another length than those that are made here.
    """
    prompt, negative = texts.get("prompt"), texts.get("negative_prompt")
    if isinstance(prompt, list) and isinstance(negative, str):
        texts = texts | {"negative_prompt": [negative] * len(prompt)}
    given = {"prompt": None} | {name: value for name, value in texts.items() if value is not None}
    with EMBEDDING:
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
    if embeds.shape != negative.shape:
        name = "negative_prompt_embeds" if texts.get("negative_prompt_embeds") is not None else "prompt_embeds"
        own, other = (negative, embeds) if name.startswith("negative") else (embeds, negative)
        raise ValueError(
            f"{name}: expected {other.shape[1]} tokens, as the other branch of guidance has, got {own.shape[1]}"
        )
    return Prompts(embeds, negative, *pooled).to(pipe.unet.dtype)


def adapter_embeds(
    pipe: Any, image: Any, embeds: list[torch.Tensor] | None, *, pictures: int, guided: bool
) -> list[torch.Tensor] | None:
    """Embedded pictures of each IP-Adapter, as its projection takes them; None without an IP-Adapter.

    Args:
        image: a picture, or a list with one or a list of several for each IP-Adapter.
        embeds: in place of it, one tensor for each, (k, pictures, ...) or under guidance (2 k, pictures, ...) with the
            unconditional ones first. As in diffusers, every picture painted has all k.

    Returns:
        One tensor for each, (k times the pictures painted, pictures, ...), under guidance twice as many rows, the
        unconditional ones first.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    if pipe.unet.config.encoder_hid_dim_type is None:
        for name, value in (("ip_adapter_image", image), ("ip_adapter_image_embeds", embeds)):
            if value is not None:
                raise ValueError(f"{name}: expected None, as no IP-Adapter is loaded, got {type(value).__name__}")
        return None
    layers = pipe.unet.encoder_hid_proj.image_projection_layers
    if (image is None) == (embeds is None):
        raise ValueError(
            "ip_adapter_image: expected a picture, or ip_adapter_image_embeds in its place, for the IP-Adapter that is "
            f"loaded, got {'neither' if image is None else 'both'}"
        )
    if image is not None and getattr(pipe, "image_encoder", None) is None:
        raise ValueError(
            "ip_adapter_image: expected ip_adapter_image_embeds, as the pipeline has no image_encoder, got a picture"
        )
    name, value = ("ip_adapter_image", image) if embeds is None else ("ip_adapter_image_embeds", embeds)
    if embeds is not None and not (isinstance(embeds, list) and all(_has_axes(e, 3, 4) for e in embeds)):
        raise TypeError(f"{name}: expected a list of tensors of 3 or 4 axes, got {embeds!r:.80}")
    count = len(value) if isinstance(value, list) else 1
    if count != len(layers):
        raise ValueError(f"{name}: expected one for each of {len(layers)} IP-Adapters, got {count}")
    for tensor in embeds or ():
        if not len(tensor) or len(tensor) % (1 + guided):
            wanted = "an even number of rows, the unconditional ones first" if guided else "some rows"
            raise ValueError(f"{name}: expected {wanted}, got {len(tensor)}")
        if not tensor.isfinite().all():
            raise ValueError(f"{name}: expected finite values, got NaN or infinite ones")
    prepared = pipe.prepare_ip_adapter_image_embeds(image, embeds, pipe._execution_device, pictures, guided)
    for layer, tensor in zip(layers, prepared):  # FaceID Plus has a second embedding, which is set on it
        own = getattr(layer, "clip_embeds", None)
        if own is not None and len(own) != len(tensor):
            raise ValueError(
                f"clip_embeds: expected {len(tensor)} rows, as {name} has for all pictures, got {len(own)}"
            )
    return prepared


def _has_axes(value, *axes):
    return isinstance(value, torch.Tensor) and value.dim() in axes


def adapter_masks(
    pipe: Any, attention: dict | None, size: tuple[int, int], canvas: tuple[int, int], *, whole: bool
) -> list | None:
    """The masks of IP-Adapters among `cross_attention_kwargs`, one (1, pictures, *canvas) for each, to be cut.

    None without, and where windows are `whole` canvases: the layers then fit the masks themselves.

    Args:
        size, canvas: (height, width) in pixels of the picture, and of the whole cells that hold it.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    masks = (attention or {}).get("ip_adapter_masks")
    if masks is None:
        return None
    if pipe.unet.config.encoder_hid_dim_type is None:
        raise ValueError("cross_attention_kwargs: expected no ip_adapter_masks, as no IP-Adapter is loaded, got some")
    masks = masks if isinstance(masks, list) else list(masks.unsqueeze(1))
    fitted = []
    for mask in masks:
        if mask is not None and not (_has_axes(mask, 4) and len(mask) == 1 and mask.isfinite().all()):
            raise ValueError(
                "cross_attention_kwargs: expected ip_adapter_masks of shape (1, pictures, height, width) and finite, "
                f"got {mask!r:.80}"
            )
        if mask is not None and not whole and tuple(mask.shape[2:]) != tuple(canvas):
            mask = mask if tuple(mask.shape[2:]) == tuple(size) else F.interpolate(mask.float(), size, mode="area")
            mask = F.pad(mask, (0, canvas[1] - size[1], 0, canvas[0] - size[0]), mode="replicate")
        fitted.append(mask if mask is None else mask.to(pipe._execution_device))
    return None if whole else fitted


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

    def ids(self, context: StepContext, cell: int) -> torch.Tensor:
        """(m, 6) int64: original size, crop and target size of each window of a step."""
        y, x = context.origins.long().mul(cell).T
        rows, columns = context.size
        # a coarse start has smaller canvases
        own = replace(self, canvas=(min(self.canvas[0], rows * cell), min(self.canvas[1], columns * cell)))
        return own.placed(y, x, [side * cell for side in context.plan.window], whole=context.view is not None)

    def placed(self, y: torch.Tensor, x: torch.Tensor, window: Sequence[int], *, whole: bool = False) -> torch.Tensor:
        """(m, 6) int64 of windows of a size in pixels at (y, x), int64 (m,); `whole`: each sees all, in strides."""
        # padding to whole cells is no part of the picture
        window = min(window[0], self.canvas[0]), min(window[1], self.canvas[1])
        original = self.canvas
        if whole:
            original, y, x = window, torch.zeros_like(y), torch.zeros_like(x)
        sizes = (*(self.original_size or original), *(self.target_size or window))
        top, left, bottom, right = (torch.full_like(y, size) for size in sizes)
        return torch.stack([top, left, y + self.crop[0], x + self.crop[1], bottom, right], dim=1)


def micro_conditions(pipe: Any, canvas: tuple[int, int], given: tuple, negative: tuple) -> MicroConditions | None:
    """SDXL's conditions from (original size, target size, crop); as in diffusers, negative ones need both sizes.

    Raises:
        ValueError: for conditions given to another model.
    """
    if is_xl(pipe):
        opposite = MicroConditions(canvas, *negative) if None not in negative[:2] else None
        return replace(MicroConditions(canvas, *given), negative=opposite)
    if any(value not in (None, (0, 0)) for value in (*given, *negative)):
        raise ValueError(f"original_size: expected no SDXL conditions for another model, got {given}, {negative}")
    return None


def guidance_embedding(pipe: Any, scale: float, noise: torch.Tensor) -> torch.Tensor | None:
    """(pictures, E) of the noise's dtype: the guidance scale that a distilled UNet is told; None for others.

    Args:
        noise: (pictures, C, H, W), what the run begins with.
    """
    wide = pipe.unet.config.time_cond_proj_dim
    if wide is None:
        return None
    embedding = pipe.get_guidance_scale_embedding(torch.tensor([scale - 1.0]), embedding_dim=wide)
    return embedding.to(noise).expand(len(noise), -1)

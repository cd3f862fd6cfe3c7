"""Pictures and masks that a run goes on from, in every form that is taken; refused by name where they are not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.image_processor import VaeImageProcessor
from PIL import Image, ImageOps

from instantas.pipelines.control import prepared

MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")  # of 8 bits: others would be cut off
SLACK = 1e-3  # over which floats may leave 0 to 1


def upright(given: Any) -> Any:
    """Pictures, in lists too, turned the way their camera was held where a tag (EXIF) says so."""
    if isinstance(given, (list, tuple)):
        return [upright(each) for each in given]
    return ImageOps.exif_transpose(given) if isinstance(given, Image.Image) else given


def read_pictures(pipe: Any, image: Any, size: tuple[int, int], canvas: tuple[int, int], prompts: int) -> torch.Tensor:
    """(1 or prompts, 3, *canvas) float32 in 0..1, padded by their edge.

    Args:
        image: a picture (PIL of 8 bits a channel, on white where it is transparent; numpy (height, width, 3) or tensor
            (3, height, width), floats in 0..1 or uint8), a list of them or a batch, one for all prompts or one for
            each; of another size than `size` they are resized (PIL: Lanczos).
        size, canvas: (height, width) in pixels of the picture, and of the whole cells that hold it.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    given = image if isinstance(image, (list, tuple)) else [image]
    config = dict(do_normalize=False, do_convert_rgb=True)
    processor = VaeImageProcessor.from_config(pipe.image_processor.config, **config)
    given = [opaque(p, "image", "white") if isinstance(p, Image.Image) else _floats(p, "image") for p in given]
    return prepared(pipe, processor, given, 3, torch.float32, size, canvas, prompts).clamp(0, 1)


def read_masks(
    pipe: Any,
    mask_image: Any,
    own: tuple[int, int],
    size: tuple[int, int],
    canvas: tuple[int, int],
    prompts: int,
) -> torch.Tensor:
    """(1 or prompts, 1, *canvas) bool, from 0.5 on True.

    Args:
        mask_image: a mask (PIL, on black where it is transparent; numpy or tensor (height, width), with an axis of one
            channel or not; bool, floats in 0..1, or uint8, of which 1 is all where there is no more), a list of them or
            a batch, one for all prompts or one for each.
        own, size: (height, width) of the picture and of what is painted. A mask has the proportions of either.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    settings = dict(do_normalize=False, do_binarize=True, do_convert_grayscale=True)
    processor = VaeImageProcessor(vae_scale_factor=1, **settings)
    found = []
    for mask in mask_image if isinstance(mask_image, (list, tuple)) else [mask_image]:
        grey: Any = opaque(mask, "mask_image", "black").convert("L") if isinstance(mask, Image.Image) else _grey(mask)
        shape = (grey.height, grey.width) if isinstance(grey, Image.Image) else tuple(grey.shape[-2:])
        if not any(_alike(shape, of) for of in (own, size)):
            got = f"{shape[1]}x{shape[0]}"
            got += "" if isinstance(mask, Image.Image) else f" in an array {tuple(mask.shape)}"
            raise ValueError(f"mask_image: expected the proportions of the picture, {own[1]}x{own[0]}, got {got}")
        found.append(processor.preprocess(grey, *size))
    if (count := sum(map(len, found))) not in (1, prompts):
        raise ValueError(f"mask_image: expected one mask, or one for each of {prompts} prompts, got {count}")
    masks = torch.cat(found).to(pipe._execution_device)
    return F.pad(masks, (0, canvas[1] - size[1], 0, canvas[0] - size[0]), mode="replicate") >= 0.5


def shown(images: torch.Tensor, output_type: str) -> Any:
    """Pictures (B, 3, height, width) in 0..1 as the pipeline gives them: "pil", "np" or "pt"."""
    return VaeImageProcessor(do_normalize=False).postprocess(images, output_type=output_type)


def opaque(picture: Image.Image, name: str, ground: str) -> Image.Image:
    """A PIL picture without transparency, in RGB.

    Args:
        name: of the argument that it comes from.
        ground: colour of what is transparent.

    Raises:
        ValueError: for more than 8 bits a channel.
    """
    if picture.mode not in MODES:
        raise ValueError(f"{name}: expected a picture of 8 bits a channel, got mode {picture.mode!r}")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, ground), picture)
    return picture.convert("RGB")


def _floats(values, name):
    """Arrays and tensors as floats in 0..1; what is neither stays, to be refused where its shape is looked at."""
    if not isinstance(values, (np.ndarray, torch.Tensor)) or 0 in values.shape:
        return values
    kind = str(values.dtype).removeprefix("torch.")
    if kind == "uint8":
        return values / (1.0 if name == "mask_image" and values.max() <= 1 else 255.0)
    if kind == "bool":
        return values + 0.0
    if not kind.startswith(("float", "bfloat")):
        raise TypeError(f"{name}: expected floats from 0 to 1 or uint8, got {kind}")
    low, high = float(values.min()), float(values.max())
    if low < -SLACK or high > 1 + SLACK:
        raise ValueError(f"{name}: expected values from 0 to 1, got {low:.3g} to {high:.3g}")
    return values


def _grey(mask: Any) -> torch.Tensor:
    """(n, 1, height, width) float32 of a mask that is an array or a tensor."""
    if not isinstance(mask, (np.ndarray, torch.Tensor)):
        raise TypeError(
            f"mask_image: expected masks (PIL, numpy arrays or tensors) or a list of them, got {type(mask).__name__}"
        )
    last = isinstance(mask, np.ndarray) and mask.ndim > 2 and mask.shape[-1] == 1  # the channel
    tensor: Any = torch.from_numpy(np.array(mask)) if isinstance(mask, np.ndarray) else mask
    tensor = tensor.movedim(-1, -3) if last else tensor
    if tensor.dim() in (2, 3):
        tensor = tensor.reshape(-1, 1, *tensor.shape[-2:])
    if tensor.dim() != 4 or tensor.shape[1] != 1 or 0 in tensor.shape:
        raise ValueError(f"mask_image: expected (height, width) or a batch of such masks, got {tuple(mask.shape)}")
    if not tensor.isfinite().all():
        raise ValueError("mask_image: expected finite values, got NaN or infinite ones")
    return _floats(tensor, "mask_image").float()


def _alike(shape: Sequence[int], size: Sequence[int]) -> bool:
    """Whether one (height, width) is the other enlarged, whose sides were rounded to whole pixels."""
    (a, b), (c, d) = shape, size
    return 2 * abs(a * d - b * c) <= max(a + b, c + d)

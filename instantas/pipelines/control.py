"""What a ControlNet is told: its pictures, in every form that diffusers takes, its scales and its part of the steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from instantas.checks import flag, real


@dataclass(frozen=True)
class Control:
    """What a ControlNet is given.

    Attributes:
        images: one (pictures, 3, height, width) for each network, as large as the canvas.
        scales: one for each network.
        spans: (start, end) for each network, the part of the steps in which it has a say.
        guess_mode: the network is evaluated for the conditional branch alone.
    """

    images: Sequence[torch.Tensor]
    scales: Sequence[float]
    spans: Sequence[tuple[float, float]]
    guess_mode: bool = False


def picture_size(image: Any, height: int | None, width: int | None) -> tuple[int | None, int | None]:
    """(height, width), where they are None those of the first control picture, as in diffusers; None without one."""
    while isinstance(image, (list, tuple)) and image:
        image = image[0]
    if image is None:
        return height, width
    _check_picture(image)
    if isinstance(image, Image.Image):
        own = image.height, image.width
    else:
        own = image.shape[-2:] if isinstance(image, torch.Tensor) or image.ndim == 2 else image.shape[-3:-1]
    return own[0] if height is None else height, own[1] if width is None else width


def control(
    pipe: Any,
    image: Any,
    size: tuple[int, int],
    canvas: tuple[int, int],
    *,
    pictures: int,
    copies: int,
    scale: float | Sequence[float] = 1.0,
    start: float | Sequence[float] = 0.0,
    end: float | Sequence[float] = 1.0,
    guess_mode: bool = False,
) -> Control | None:
    """The control of a pipeline with a ControlNet; None for one without.

    Args:
        image: for one network a picture (PIL, numpy (height, width, 3) or tensor (3, height, width)), a list of them or
            a batch; for several a list with such a one for each network, or for each prompt a list with one for each
            network. One picture serves all prompts. A picture as large as `size` is taken as it is, others are resized.
        size, canvas: (height, width) in pixels of the picture, and of the whole cells that hold it.
        pictures, copies: how many are painted, and of each prompt.
        scale, start, end: floats, or lists with one for each network.

    Raises:
        TypeError, ValueError: naming the argument of the pipeline's call, what was expected and what came.
    """
    net = getattr(pipe, "controlnet", None)
    if (net is None) != (image is None):
        wanted = "one for the pipeline's ControlNet"
        if net is None:
            wanted = "strength or mask_image beside it, or None, as the pipeline has no ControlNet"
        raise ValueError(f"image: expected {wanted}, got {type(image).__name__}")
    if net is None:
        return None
    nets = list(getattr(net, "nets", [net]))
    scales = _each("controlnet_conditioning_scale", scale, nets)
    starts, ends = _each("control_guidance_start", start, nets), _each("control_guidance_end", end, nets)
    for first, last in zip(starts, ends):
        if not 0 <= first < last <= 1:
            raise ValueError(f"control_guidance_start: expected 0 <= start < end <= 1, got {first} and {last}")
    guess_mode = flag("guess_mode", guess_mode) or nets[0].config.global_pool_conditions
    given = _by_network(image, nets) if hasattr(net, "nets") else [image]
    images = []
    for one, own in zip(given, nets):
        channels, prompts = own.config.conditioning_channels, pictures // copies
        image = prepared(pipe, pipe.control_image_processor, one, channels, own.dtype, size, canvas, prompts)
        images.append(image.repeat_interleave(pictures // len(image), dim=0))
    return Control(images, scales, list(zip(starts, ends)), guess_mode)


def _each(name, value, nets):
    """One number for each network."""
    values = value if isinstance(value, (list, tuple)) else [value] * len(nets)
    if len(values) != len(nets):
        raise ValueError(f"{name}: expected one for each of {len(nets)} ControlNets, got {value!r:.80}")
    return [real(name, one) for one in values]


def _by_network(image, nets):
    """What each of several networks is given."""
    if not isinstance(image, (list, tuple)):
        raise TypeError(f"image: expected a list for {len(nets)} ControlNets, got {type(image).__name__}")
    nested = [isinstance(one, (list, tuple)) for one in image]
    if any(nested) and not all(nested):
        raise TypeError("image: expected a picture for each ControlNet, or a list of them for each prompt, got both")
    for row in image if any(nested) else [image]:
        if len(row) != len(nets):
            raise ValueError(f"image: expected one for each of {len(nets)} ControlNets, got {len(row)}")
    return [list(own) for own in zip(*image)] if any(nested) else image


def prepared(
    pipe: Any,
    processor: Any,
    given: Any,
    channels: int,
    dtype: torch.dtype,
    size: tuple[int, int],
    canvas: tuple[int, int],
    prompts: int,
) -> torch.Tensor:
    """(1 or prompts, channels, *canvas) from pictures of any form, resized to `size` and padded to whole cells.

    Raises:
        TypeError, ValueError: for what are no such pictures, as many as there are prompts or one, with finite values.
    """
    given = given if isinstance(given, (list, tuple)) else [given]
    for picture in given:
        _check_picture(picture)
    # as diffusers prepares them, but to the pixel: its own processor rounds sizes down to whole cells
    processor = type(processor).from_config(processor.config, vae_scale_factor=1)
    found = [processor.preprocess(picture, *size).float() for picture in given]
    for tensor in found:
        if tensor.shape[1] != channels:
            raise ValueError(f"image: expected {channels} channels, got {tensor.shape[1]}")
        if not tensor.isfinite().all():
            raise ValueError("image: expected finite values, got NaN or infinite ones")
    tensor = torch.cat(found).to(pipe._execution_device, dtype)
    if len(tensor) not in (1, prompts):
        raise ValueError(f"image: expected one picture, or one for each of {prompts} prompts, got {len(tensor)}")
    # the picture's edge continues over the padding
    return F.pad(tensor, (0, canvas[1] - size[1], 0, canvas[0] - size[0]), mode="replicate")


def _check_picture(picture):
    if not isinstance(picture, (Image.Image, np.ndarray, torch.Tensor)):
        raise TypeError(
            f"image: expected pictures (PIL, numpy arrays or tensors) or a list of them, got {type(picture).__name__}"
        )
    dimensions = () if isinstance(picture, Image.Image) else (2, 3, 4) if isinstance(picture, np.ndarray) else (3, 4)
    if dimensions and (picture.ndim not in dimensions or 0 in picture.shape):
        raise ValueError(f"image: expected (3, height, width) or a batch of them, got {tuple(picture.shape)}")

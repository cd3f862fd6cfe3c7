"""Where a run begins: with noise, on a smaller canvas, from a picture (img2img, SDEdit), in a mask (inpainting)."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderTiny
from diffusers.utils.torch_utils import randn_tensor

from instantas.checks import real
from instantas.pipelines import codec
from instantas.pipelines.arguments import check_latents, is_told, is_xl
from instantas.pipelines.control import picture_size
from instantas.pipelines.joining import joined
from instantas.pipelines.pictures import read_masks, read_pictures, upright
from instantas.sampling import coarse
from instantas.sampling.known import Known
from instantas.windows import WindowPlan


def roles(
    pipe: Any, image: Any, mask_image: Any, control_image: Any, strength: float | None, latents: Any
) -> tuple[Any, Any, Any, float | None]:
    """(picture to start from, mask, picture of a ControlNet, strength) of a call, upright; None without.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    masks = is_told(pipe) or "mask_image" in inspect.signature(type(pipe).__call__).parameters
    if mask_image is None and masks:
        raise ValueError(f"mask_image: expected a mask for the {type(pipe).__name__}, which inpaints, got None")
    if strength is None and mask_image is not None:
        strength = 0.9999 if is_xl(pipe) else 1.0  # as diffusers
    if strength is None:
        if control_image is not None:
            raise ValueError("control_image: expected None without strength, as image is the ControlNet's, got one")
        return None, None, upright(image), None
    if image is None or latents is not None:
        given, got = "strength" if mask_image is None else "mask", "none" if image is None else "both"
        raise ValueError(f"image: expected a picture in place of latents, as there is a {given}, got {got}")
    if not callable(getattr(pipe.scheduler, "add_noise", None)):
        raise ValueError(f"scheduler: expected one with add_noise beside image, got {type(pipe.scheduler).__name__}")
    net = getattr(pipe, "controlnet", None)
    if (net is None) != (control_image is None):
        wanted = "None, as the pipeline has no ControlNet" if net is None else "a picture for the pipeline's ControlNet"
        raise ValueError(f"control_image: expected {wanted}, got {type(control_image).__name__}")
    return upright(image), upright(mask_image), upright(control_image), real("strength", strength, 0, 1)


def smaller_start(
    start: Any,
    own: Mapping[str, Any],
    method: str,
    image: Any,
    plan: WindowPlan,
    scheduler: Any,
    bridging: Any,
    end: int | None = None,
) -> coarse.CoarseStart | None:
    """The start on a smaller canvas of a name; None: there is none.

    Args:
        start: as the pipeline takes it. "default": what the model's own `start` says, if it is possible and a smaller
            canvas saves evaluations.
        own: the model's defaults, with its `coarse_sigma` where that was measured.
        scheduler: with its timesteps set, of which `end` are taken; None: all.
        bridging: of the run, by which its evaluations are counted.

    Raises:
        TypeError, ValueError: for an unknown start, and for one that is asked for and not possible.
    """
    names = "default", *coarse.STARTS
    if isinstance(start, str) and start not in names:
        raise ValueError(f"start: expected one of {', '.join(names)}, got {start!r}")
    other = "multidiffusion" if method == "multidiffusion" else None if image is None else "a picture to start from"
    by_default = isinstance(start, str) and start == "default"
    found = coarse.start_of(own.get("start") if by_default else start, own.get("coarse_sigma"))
    try:
        if found is not None and other:
            raise ValueError(f'start: expected "none" with {other}, got {start!r}')
        runs = coarse.legs(found, plan, scheduler, end)
    except ValueError:
        if not by_default:
            raise
        return None
    if by_default and len(runs) > 1:
        whole = coarse.legs(None, plan, scheduler, end)
        if coarse.evaluations(bridging, runs) >= coarse.evaluations(bridging, whole):
            return None
    return found


def first_timestep(scheduler: Any, strength: float) -> int:
    """Number of the timestep at which the last `strength` of a scheduler's steps begins, as in diffusers.

    Raises:
        TypeError, ValueError: for a strength outside of 0 to 1, and for one that leaves no step.
    """
    order, steps = getattr(scheduler, "order", 1), scheduler.num_inference_steps or len(scheduler.timesteps)
    taken = min(int(steps * real("strength", strength, 0, 1)), steps)
    if not taken:
        raise ValueError(f"strength: expected at least {1 / steps:.2g}, one of {steps} steps, got {strength}")
    return (steps - taken) * order


def steps_before(scheduler: Any, denoising_end: float | None) -> int:
    """How many of the scheduler's timesteps lie before the end."""
    timesteps = scheduler.timesteps
    if denoising_end is None or real("denoising_end", denoising_end, 0, 1, above=True) == 1:
        return len(timesteps)
    trained = scheduler.config.num_train_timesteps
    count = int((timesteps >= int(round(trained - denoising_end * trained))).sum())
    if not count:
        raise ValueError(f"denoising_end: expected at least one step before it, got {denoising_end}")
    return count


def stages(size: tuple[int, int], scale: float) -> list[tuple[int, int]]:
    """Sizes, of (height, width) pixels, through which a picture becomes `scale` times as large: each at most twice the
    one before.

    Raises:
        TypeError, ValueError: for a scale that is not above 1, and for one too small to add a pixel.
    """
    if real("scale", scale, 1) == 1:
        raise ValueError(f"scale: expected more than 1, got {scale}")
    count = max(1, math.ceil(math.log2(scale) - 1e-9))
    factors = [scale ** (i / count) for i in range(1, count + 1)]
    if (found := [(round(size[0] * factor), round(size[1] * factor)) for factor in factors])[-1] == tuple(size):
        raise ValueError(f"scale: expected one that makes {size[1]}x{size[0]} pixels more, got {scale}")
    return found


@dataclass(frozen=True, eq=False)
class Source:
    """The picture that a run goes on from.

    Attributes:
        pictures: (1 or prompts, 3, *canvas) float32 in 0..1.
        mask: (1 or prompts, 1, *canvas) bool, True where it is painted; None: everywhere.
    """

    pictures: torch.Tensor
    mask: torch.Tensor | None = None

    @classmethod
    def read(
        cls, pipe: Any, image: Any, mask_image: Any, size: tuple[int, int], canvas: tuple[int, int], prompts: int
    ) -> Source:
        """From the arguments of a call (`pictures.read_pictures`, `pictures.read_masks`).

        Args:
            size, canvas: (height, width) in pixels of the picture, and of the whole cells that hold it.

        Raises:
            TypeError, ValueError: naming the argument, what was expected and what came.
        """
        pictures = read_pictures(pipe, image, size, canvas, prompts)
        if mask_image is None:
            return cls(pictures)
        height, width = picture_size(image, None, None)
        mask = read_masks(pipe, mask_image, (height or 1, width or 1), size, canvas, prompts)
        cell = pipe.vae_scale_factor
        if any(bool(one.any()) and not one[..., ::cell, ::cell].any() for one in mask):
            raise ValueError(
                f"mask_image: expected one that holds the upper left pixel of some cell of {cell}x{cell} pixels, by "
                "which cells are chosen, or none at all, got one too thin"
            )
        return cls(pictures, mask)

    def joined(self, images: torch.Tensor, blend: int, wrap: tuple[bool, bool]) -> torch.Tensor:
        """Pictures (B, 3, height, width) in 0..1 that were painted, outside of the mask the source's own pixels
        (`joining.joined`)."""
        if self.mask is None:
            return images
        height, width = images.shape[-2:]
        mask, source = (_each(t[..., :height, :width], len(images)) for t in (self.mask, self.pictures))
        return joined(images.float(), source, mask, blend, wrap)


@dataclass(frozen=True, eq=False)
class Start:
    """What a run goes on from.

    Attributes:
        latents: (pictures, C, H, W), as `sampler.sample` takes them: noise, or with `begin` a noised picture.
        origin: of a noised picture, its clean latents and the noise.
        known: the cells outside of the mask; None without.
        told: (pictures, 1 + C, H, W), the mask and the latents of what it leaves, for an inpainting UNet.
    """

    latents: torch.Tensor
    origin: tuple[torch.Tensor, torch.Tensor] | None = None
    known: Known | None = None
    told: torch.Tensor | None = None

    @classmethod
    def of_noise(
        cls,
        pipe: Any,
        pictures: int,
        size: tuple[int, int],
        generator: torch.Generator | list[torch.Generator] | None,
        latents: torch.Tensor | None = None,
    ) -> Start:
        """Noise of (H, W) cells: drawn, or the latents that a call was given in its place.

        Raises:
            TypeError, ValueError: for latents that are no finite floats (pictures, C, H, W).
        """
        shape = (pictures, pipe.unet.config.out_channels, *size)
        device, dtype = pipe._execution_device, pipe.unet.dtype
        if latents is None:
            return cls(randn_tensor(shape, generator=generator, device=device, dtype=dtype))
        check_latents(latents, shape, float(getattr(pipe.scheduler, "init_noise_sigma", 1.0)))
        return cls(latents.to(device, dtype))

    @classmethod
    def of(
        cls,
        pipe: Any,
        source: Source,
        begin: int | None,
        *,
        pictures: int,
        wrap: tuple[bool, bool],
        generator: torch.Generator | list[torch.Generator] | None,
        group: Any = None,
    ) -> Start:
        """The source's latents with the noise of a timestep of the pipeline's scheduler.

        What is drawn comes in the order of diffusers: the autoencoder's latents, the noise, the autoencoder's latents
        of what the mask leaves.

        Args:
            begin: number of the timestep; None: pure noise.
            pictures: how many are painted.
            group: the processes that share the autoencoder's tiles.
        """
        device, dtype, scheduler = pipe._execution_device, pipe.unet.dtype, pipe.scheduler
        mask, given = source.mask, 2 * source.pictures - 1
        if mask is None and isinstance(generator, list):  # each picture draws its own
            given = _each(given, pictures)

        def encoded(given, **how):
            drawn = generator[: len(given)] if isinstance(generator, list) else generator
            how |= dict(wrap=wrap, generator=drawn, group=group)
            latents = codec.encode(pipe.vae, given.to(pipe.vae.dtype), **how)
            return _each(latents.to(device, dtype), pictures)

        # of an inpainting UNet that begins with noise diffusers draws none
        latents = encoded(given, sample_mode="argmax" if is_told(pipe) and begin is None else "sample")
        noise = randn_tensor(latents.shape, generator=generator, device=device, dtype=dtype)
        noised, origin = noise, None
        if begin is not None:
            origin = latents, noise
            noised = scheduler.add_noise(
                latents, noise, scheduler.timesteps[begin : begin + 1].to(device).repeat(pictures)
            )
        if mask is None:
            return cls(noised, origin)
        cell = pipe.vae_scale_factor
        painted = mask[..., ::cell, ::cell]
        painted = painted if len(painted) == 1 else _each(painted, pictures)
        known, told = Known(latents, noise, painted, told=is_told(pipe)), None
        left = given * ~mask
        if known.told:
            told = torch.cat([_each(painted, pictures).to(dtype), encoded(left)], dim=1)
        elif not isinstance(pipe.vae, AutoencoderTiny):  # diffusers encodes it for every UNet: draw as much
            drawn = torch.Size((len(left), *latents.shape[1:]))
            some = generator[: len(left)] if isinstance(generator, list) else generator
            wide = torch.float32 if codec.overflows(pipe.vae) else pipe.vae.dtype
            randn_tensor(drawn, generator=some, device=device, dtype=wide)
        return cls(noised, origin, known, told)


def _each(tensor, pictures):
    """One row for each picture, of a tensor with as many for each prompt."""
    return tensor.repeat_interleave(pictures // len(tensor), dim=0)

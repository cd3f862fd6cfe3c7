"""From latents to pictures: what a pipeline gives of its run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from diffusers.pipelines.stable_diffusion import StableDiffusionPipelineOutput
from diffusers.pipelines.stable_diffusion_xl import StableDiffusionXLPipelineOutput

from instantas.pipelines.arguments import is_xl
from instantas.pipelines.codec import bands, decode
from instantas.pipelines.held import HeldPipeline
from instantas.pipelines.pictures import shown
from instantas.sampling.parallel import shared


class Decoding(HeldPipeline):
    """Pictures of latents, whole or in bands."""

    @torch.no_grad()
    @shared
    def decode(
        self,
        latents: torch.Tensor,
        height: int,
        width: int,
        *,
        wrap: tuple[bool, bool] = (False, False),
        output_type: str = "pil",
        generator: torch.Generator | list[torch.Generator] | None = None,
        tiles: str | int | tuple[int, int] = "auto",
        group: Any = None,
    ) -> Any:
        """Pictures of so many pixels, as from the call, of what it gives with `output_type="latent"`.

        Args:
            tiles: "auto", "whole" or cells (`codec.decode`): smaller ones need less memory.
            group: the processes that share the tiles, as the call has it; each gets the pictures.

        Raises:
            TypeError, ValueError: for latents of another size, and for other tiles.
            PeerError: where another process has failed or is gone.
        """
        height, width, wrap = self._checked(latents, height, width, wrap)
        return self._decoded(latents, (height, width), wrap, output_type, generator, tiles, group=group)[0]

    @torch.no_grad()
    def bands(
        self,
        latents: torch.Tensor,
        height: int,
        width: int,
        *,
        wrap: tuple[bool, bool] = (False, False),
        generator: torch.Generator | None = None,
        tiles: str | int | tuple[int, int] = "auto",
    ) -> Iterator[np.ndarray]:
        """The pixels that `decode` gives, in bands from top to bottom: (rows, width, 3) in uint8, as they come.

        For a picture that is too large to be held: it never is, only one row of the autoencoder's tiles.

        Args:
            latents: (1, C, rows, columns), of one picture.

        Raises:
            TypeError, ValueError: as `decode`; and with a safety checker or a watermark, which need the whole picture.
        """
        height, width, wrap = self._checked(latents, height, width, wrap)
        if self.needs_whole_pictures:
            raise ValueError("safety_checker, watermark: expected none, as bands are no whole pictures, got one")
        left = height
        for band in bands(self.pipe.vae, latents, wrap=wrap, tiles=tiles, generator=generator):
            rows = band[None, :, :left, :width]
            left -= rows.shape[2]
            yield np.asarray(self.pipe.image_processor.postprocess(rows, output_type="pil")[0])

    @property
    def needs_whole_pictures(self) -> bool:
        """Whether there is a safety checker or a watermark."""
        return any(getattr(self.pipe, name, None) is not None for name in ("safety_checker", "watermark"))

    def _checked(self, latents, height, width, wrap):
        """(height, width, wrap), which such latents have."""
        height, width, wrap = self._size(height, width, wrap)
        rows, columns = self.canvas(height, width)
        if latents.shape[-2:] != (rows, columns):
            raise ValueError(f"latents: expected (pictures, C, {rows}, {columns}), got {tuple(latents.shape)}")
        return height, width, wrap

    def _decoded(self, latents, size, wrap, output_type, generator, tiles="auto", source=None, blend=0, group=None):
        """(pictures, whether each was found unsafe or None)"""
        pipe = self.pipe
        if output_type == "latent":
            return latents, None
        images = decode(pipe.vae, latents, wrap=wrap, tiles=tiles, generator=generator, group=group)
        images, flagged = images[:, :, : size[0], : size[1]], None
        if getattr(pipe, "safety_checker", None) is not None:
            images, flagged = pipe.run_safety_checker(images, images.device, images.dtype)
        if getattr(pipe, "watermark", None) is not None:
            images = pipe.watermark.apply_watermark(images)
        safe = [True] * len(images) if flagged is None else [not unsafe for unsafe in flagged]
        images = pipe.image_processor.postprocess(images, output_type="pt", do_denormalize=safe)
        if source is not None:
            images = source.joined(images, blend if all(safe) else 0, wrap)  # what is unsafe stays black
        return shown(images, output_type), flagged

    def _output(self, images, flagged, return_dict):
        if is_xl(self.pipe):
            return StableDiffusionXLPipelineOutput(images=images) if return_dict else (images,)
        if not return_dict:
            return images, flagged
        return StableDiffusionPipelineOutput(images=images, nsfw_content_detected=flagged)

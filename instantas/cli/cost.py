"""What a picture of some size needs, from arithmetic alone: known, and refused, before anything is made."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from instantas.cli.limits import memory_limits

FLOAT = 4  # bytes
BAND = 128  # cells: no tile of the autoencoder is higher


def window_count(
    canvas: Sequence[int],
    window: Sequence[int],
    wrap: Sequence[bool] = (False, False),
    stride: Sequence[int] | None = None,
) -> int:
    """Windows of `WindowPlan.minimum_coverage`, with a stride of `WindowPlan.strided`; all (vertical, horizontal)."""
    count = 1
    for axis, (length, side, wraps) in enumerate(zip(canvas, window, wrap)):
        if length <= side:
            continue
        if stride is None:
            count *= -(-length // side)
        else:
            count *= -(-length // stride[axis]) if wraps else -(-(length - side) // stride[axis]) + 1
    return count


@dataclass(frozen=True)
class Memory:
    """Bytes that one picture takes at least.

    Attributes:
        canvas: the latents and what is predicted in every window.
        middle: what the autoencoder has at the latent's resolution, before it goes on in tiles; on its device.
        decoded: the decoder's output, on its device.
        picture: what becomes of it on the host, float32 twice: as it comes and as it is scaled.
    """

    canvas: int
    middle: int
    decoded: int
    picture: int

    @classmethod
    def of(cls, pipe: Any, height: int, width: int, wrap: Sequence[bool], method: str, banded: bool = False) -> Memory:
        """For a picture of so many pixels by an `InstantASPipeline`; `banded`: of which one band is held at a time."""
        from instantas.pipelines.codec import middle_bytes

        canvas, stride = pipe.canvas(height, width), [max(1, side // 8) for side in pipe.window]
        count = window_count(canvas, pipe.window, wrap, stride if method == "multidiffusion" else None)
        cells = math.prod(canvas) + count * math.prod(map(min, canvas, pipe.window))
        pixels = 3 * width * (min(height, BAND * pipe.cell) if banded else height)
        latents = cells * pipe.unet.config.in_channels * pipe.unet.dtype.itemsize
        return cls(latents, middle_bytes(pipe.vae, *canvas), pixels * pipe.vae.dtype.itemsize, 2 * pixels * FLOAT)

    def check(self, device: torch.device, size: str) -> None:
        """Refuse what the machine cannot hold, or a limit on this process (`limits`) does not let it.

        Raises:
            ValueError: naming what is needed and what is there.
        """
        host = self.picture if device.type != "cpu" else max(self.canvas + self.picture, self.middle)
        needs = [(host, there, place) for there, place in memory_limits()]
        if device.type == "cuda":
            need = max(self.canvas + self.decoded, self.middle)
            needs.append((need, torch.cuda.mem_get_info(device)[0], str(device)))
        for need, there, place in needs:
            if need > there:
                raise ValueError(
                    f"size: expected a picture that fits into the {in_bytes(there)} of {place}, got {size}, "
                    f"which needs at least {in_bytes(need)}"
                )

    def __str__(self) -> str:
        middle = f", {in_bytes(self.middle)} for the autoencoder's middle" if self.middle else ""
        return f"at least {in_bytes(self.canvas)} for the canvas{middle} and {in_bytes(self.picture)} for the picture"


def in_bytes(count: int) -> str:
    """In the unit that suits the number: 384 MiB."""
    count = min(count, 2**1000)  # more is no float
    power = min(6, max(0, (count.bit_length() - 1) // 10))
    return f"{count / 1024**power:,.3g} {('B', 'KiB', 'MiB', 'GiB', 'TiB', 'PiB', 'EiB')[power]}"

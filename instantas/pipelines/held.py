"""A diffusers pipeline that is held: its components, its settings, its sizes and the windows on them."""

from __future__ import annotations

import inspect
import os
from typing import Any

from diffusers import DiffusionPipeline
from typing_extensions import Self

from instantas.checks import flag, integer, pair
from instantas.pipelines.arguments import PIPELINES, check_pipeline, is_xl
from instantas.pipelines.callbacks import RunSettings
from instantas.pipelines.loading import load
from instantas.windows import WindowPlan

METHODS = ("instantas", "multidiffusion")


class HeldPipeline(RunSettings):
    """What `InstantASPipeline` is beside its call: everything that is not said here is the held pipeline's."""

    def __init__(self, pipe: DiffusionPipeline, defaults: dict | None = None):
        self._check(pipe)
        known = inspect.signature(type(pipe).__call__).parameters
        names = ("num_inference_steps", "guidance_scale", "strength", "controlnet_conditioning_scale")
        usual = {name: known[name].default for name in names if name in known}
        self.__dict__.update(pipe=pipe, defaults=usual | (defaults or {}))

    @staticmethod
    def _check(pipe):
        check_pipeline(pipe, whole=False)

    @classmethod
    def _around(cls, pipe, defaults=None):
        from instantas.pipelines.hosted import HostedPipeline  # which is one of these

        refiner = getattr(getattr(pipe, "config", None), "requires_aesthetics_score", False)
        own = (isinstance(pipe, PIPELINES) and not refiner) or not isinstance(pipe, DiffusionPipeline)
        return (cls if own else HostedPipeline)(pipe, defaults)

    @classmethod
    def from_pretrained(cls, model: str | os.PathLike, task: str | None = None, **settings: Any) -> Self:
        """Load a model from a folder in diffusers' layout, from a single checkpoint file or from the hub.

        Its pipeline may be of any kind that `from_pipe` takes.

        Args:
            task: "text-to-image", "image-to-image" or "inpainting": the kind of diffusers' pipeline that is held, whose
                own defaults hold, `strength` among them. All take pictures and masks; that for image to image needs a
                picture, that for inpainting a mask too. None: what the folder says, of a file text to image.
            settings: of diffusers' `from_pretrained` or `from_single_file`, such as torch_dtype, variant, controlnet.

        Raises:
            ValueError: for a folder or file that is missing or incomplete, and for another task.
        """
        return cls._around(*load(model, task, **settings))

    @classmethod
    def from_pipe(cls, pipe: DiffusionPipeline) -> Self:
        """Around a diffusers pipeline that is there already; its components are shared, not copied. Of one of these,
        with its defaults.

        Kinds beside `arguments.PIPELINES` (InstructPix2Pix, PAG, T2I-Adapter, AnimateDiff, SDXL's refiner, ...) give a
        `hosted.HostedPipeline`, which runs their own call with its own arguments.

        Raises:
            TypeError: for a pipeline whose network cannot be given windows, with the reason.
        """
        return cls._around(pipe.pipe, pipe.defaults) if isinstance(pipe, HeldPipeline) else cls._around(pipe)

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move the components, as diffusers' `to` does."""
        self.pipe.to(*args, **kwargs)
        return self

    def __getattr__(self, name):
        if name == "pipe":  # not there yet: while it is being unpickled, say
            raise AttributeError(name)
        return getattr(self.pipe, name)

    def __setattr__(self, name, value):
        own = name in self.__dict__ or hasattr(type(self), name)
        super().__setattr__(name, value) if own else setattr(self.pipe, name, value)

    @property
    def cell(self) -> int:
        """Pixels of a latent cell."""
        return self.pipe.vae_scale_factor

    @property
    def window(self) -> tuple[int, int]:
        """(height, width) in cells that the UNet was trained on; where its configuration does not say, its family's."""
        size = self.pipe.unet.config.sample_size or (128 if is_xl(self.pipe) else 64)
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
        stride: int | tuple[int, int] | None = None,
    ) -> WindowPlan:
        """The windows for a picture of so many pixels; arguments as in the call."""
        height, width, wrap = self._size(height, width, wrap)
        if method not in METHODS:
            raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")
        if method == "instantas":
            if stride is not None:
                raise ValueError(f"stride: expected None, as only multidiffusion has one, got {stride!r}")
            return WindowPlan.minimum_coverage(*self.canvas(height, width), self.window, wrap=wrap)
        h, w = self.window
        strides = (max(1, h // 8), max(1, w // 8)) if stride is None else stride
        return WindowPlan.strided(*self.canvas(height, width), self.window, strides, wrap=wrap)

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

    def _default(self, name, value):
        return self.defaults.get(name) if value is None else value

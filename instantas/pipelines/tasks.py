"""What is made of calls of a pipeline: enlarging a picture, and extending it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch

from instantas.checks import integer
from instantas.pipelines.arguments import check_output, prompts_of
from instantas.pipelines.control import picture_size
from instantas.pipelines.decoding import Decoding
from instantas.pipelines.outpainting import Margins
from instantas.pipelines.pictures import read_pictures, shown, upright
from instantas.pipelines.starts import stages
from instantas.sampling.checkpoint import Checkpoint
from instantas.sampling.parallel import shared


class Tasks(Decoding):
    """Tasks beside the call that the pipeline has."""

    __call__: Callable[..., Any]

    @shared
    def upscale(
        self, image: Any, scale: float = 4.0, prompt: Any = "", *, strength: float = 0.35, **settings: Any
    ) -> Any:
        """A larger picture: enlarged, then painted again from the noise of the last `strength` of the steps.

        In stages of at most twice the size, each a call with `image` and `strength`. A ControlNet (tile) is told the
        picture itself.

        Args:
            image: as in the call; of any size.
            scale: more than 1.
            prompt: what the picture shows.
            strength: 0 to 1; the more, the more is made up, and the less is kept.
            settings: of the call, for every stage; but `regions`, whose boxes may be pixels, for one stage only, and of
                a `checkpoint` each of several stages has a file with its number.

        Returns:
            As the call.

        Raises:
            TypeError, ValueError: naming the argument, what was expected and what came.
        """
        if image is None:
            raise ValueError("image: expected a picture, got None")
        for name in ("height", "width"):
            if name in settings:
                raise ValueError(f"{name}: expected none beside scale, got {settings[name]}")
        image = upright(image)
        *before, last = stages(cast(tuple[int, int], picture_size(image, None, None)), scale)
        if before and settings.get("regions"):
            raise ValueError(f"regions: expected none with a scale above 2, which takes stages, got {scale}")
        checkpoint = Checkpoint.of(settings.pop("checkpoint", None))
        for number, (height, width) in enumerate([*before, last], 1):
            stage = dict(settings, height=height, width=width, image=image, strength=strength)
            if checkpoint is not None:
                stage |= dict(checkpoint=checkpoint.stage(number) if before else checkpoint)
            if getattr(self.pipe, "controlnet", None) is not None:
                stage.setdefault("control_image", image)
            if (height, width) != last:
                stage |= dict(output_type="pil", return_dict=True)
            result = self(prompt, **stage)
            image = result.images if (height, width) != last else image
        return result

    @torch.no_grad()
    @shared
    def extend(
        self,
        image: Any,
        left: int = 0,
        top: int = 0,
        right: int = 0,
        bottom: int = 0,
        prompt: Any = "",
        *,
        strength: float = 1.0,
        blend: int = 16,
        **settings: Any,
    ) -> Any:
        """A larger picture: the same, with so many more pixels on each side, painted to go on from it.

        The picture's pixels stay as they are, bit for bit. Cells that hold a new pixel are painted; windows that hold
        no such cell are not evaluated.

        Args:
            image: as in the call; it holds at least one whole cell in its new place.
            left, top, right, bottom: pixels, from 0 up.
            prompt: what the larger picture shows.
            strength: 1: new cells start from noise; below, from the picture's edge continued, with less noise.
            blend: width in pixels of the border, on the new side alone, in which colours are drawn to the picture's: by
                as much as what was decoded is off at its edge, falling to nothing. 0: no such border.
            settings: of the call; sizes and places in them are of the larger picture.

        Returns:
            As the call.

        Raises:
            TypeError, ValueError: naming the argument, what was expected and what came.
        """
        if image is None:
            raise ValueError("image: expected a picture, got None")
        for name in {"height", "width", "mask_image"} & set(settings):
            raise ValueError(f"{name}: expected none beside the sides to extend, got {settings[name]!r:.80}")
        margins, image = Margins(left, top, right, bottom), upright(image)
        integer("blend", blend, 0)
        kind, whole = settings.pop("output_type", "pil"), settings.pop("return_dict", True)
        check_output(kind)
        own = cast(tuple[int, int], picture_size(image, None, None))
        texts = dict(prompt=prompt, prompt_embeds=settings.get("prompt_embeds"))
        pictures = read_pictures(self.pipe, image, own, own, prompts_of(texts))
        given = dict(image=margins.grown(pictures), mask_image=margins.mask(*own, self.cell), strength=strength)
        latents = self(prompt, **settings, **given, output_type="latent").images
        if kind == "latent":
            return self._output(latents, None, whole)
        wrap, generator = settings.get("wrap", (False, False)), settings.get("generator")
        painted, flagged = self._decoded(
            latents, margins.size(*own), wrap, "pt", generator, group=settings.get("group")
        )
        pictures = pictures.repeat_interleave(len(painted) // len(pictures), dim=0)
        blend = 0 if flagged is not None and any(flagged) else blend  # what is unsafe stays black
        images = margins.joined(painted.float(), pictures, blend, wrap)
        self.pipe.maybe_free_model_hooks()
        return self._output(shown(images, kind), flagged, whole)

"""Diffusers pipelines of every other kind at any size: their own call, whose network sees windows."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Sequence
from typing import Any, NoReturn

from instantas.pipelines.attention import regional_prompts
from instantas.pipelines.entry import module_of
from instantas.pipelines.pipeline import InstantASPipeline
from instantas.pipelines.turns import turn
from instantas.pipelines.windowed import check_windows, windowed
from instantas.regions import check_blend, region_lists
from instantas.sampling.fingerprint import digests
from instantas.sampling.parallel import shared


class HostedPipeline(InstantASPipeline):
    """A diffusers pipeline whose own call is run: of a kind that `InstantASPipeline` has no loop for, or of any.

    Each call is the held pipeline's own, inside of `windowed`: InstructPix2Pix, depth to image, T2I-Adapter, PAG,
    AnimateDiff, also of SDXL; image to image and inpainting too, where it is made by its own name.

    Raises:
        TypeError: for a pipeline whose network cannot be given windows, with the reason.
    """

    @staticmethod
    def _check(pipe):
        check_windows(pipe)

    @shared
    def __call__(
        self,
        *args: Any,
        regions: Sequence | None = None,
        region_mode: str = "blend",
        base_weight: float = 0.0,
        semantic_schedule: str = "constant",
        bridging: Any = "default",
        wrap: tuple[bool, bool] = (False, False),
        window_batch_size: int | None = None,
        group: Any = None,
        **call: Any,
    ) -> Any:
        """The held pipeline's call, on a canvas of any size that it takes.

        At native size without regions the result is the plain pipeline's, bit for bit.

        Args:
            args, call: its own arguments, which say the size too: `height` and `width`, or the picture's.
            regions, region_mode, base_weight, semantic_schedule: as `InstantASPipeline` has them, but
                `Region.guidance_scale`, as guidance is the pipeline's. A region of a video is one of each frame.
            bridging, window_batch_size: as `InstantASPipeline` has them.
            wrap: (vertical, horizontal), whether opposite edges of the latents join. The autoencoder, which is the
                pipeline's own, does not join them.
            group: the processes that share the windows, as `windowed` has it; generators are rank 0's.

        Returns:
            The held pipeline's output.

        Raises:
            TypeError, ValueError: naming the argument, what was expected and what came, before the UNet is evaluated.
        """
        pipe = self.pipe
        check_windows(pipe)
        check_blend(base_weight, semantic_schedule)
        call = self._arguments(args, call)
        with turn(module_of(pipe.unet), pipe.scheduler), contextlib.ExitStack() as stack:
            how = dict(bridging=bridging, window_batch_size=window_batch_size, wrap=wrap, group=group)
            stack.enter_context(windowed(pipe, self.window, **how))
            if group:
                told = dict(regions=regions, region_mode=region_mode)
                group.same(digests(told | dict(base_weight=base_weight, semantic_schedule=semantic_schedule)))
                group.seeded(call.get("generator"), pipe._execution_device)
            if any(region_lists(regions or ())):
                blend: dict[str, Any] = dict(base_weight=base_weight, semantic_schedule=semantic_schedule)
                if not hasattr(pipe, "do_classifier_free_guidance"):
                    blend |= dict(classifier_free_guidance=call["guidance_scale"] > 1)
                stack.enter_context(regional_prompts(pipe, regions or (), mode=region_mode, **blend))
            return pipe(**call)

    def upscale(self, *args: Any, **settings: Any) -> NoReturn:
        """Refused: it is made of `InstantASPipeline`'s own starts from a picture."""
        raise TypeError(f"pipe: expected a text-to-image pipeline to upscale with, got {type(self.pipe).__name__}")

    def extend(self, *args: Any, **settings: Any) -> NoReturn:
        """Refused, as `upscale`."""
        raise TypeError(f"pipe: expected a text-to-image pipeline to extend with, got {type(self.pipe).__name__}")

    def _arguments(self, args, call):
        """All arguments of the held pipeline's call by name, those that only our own loop has refused."""
        kind: Any = type(self.pipe)
        signature, own = inspect.signature(kind.__call__), inspect.signature(InstantASPipeline.__call__).parameters
        known = {name for name, parameter in signature.parameters.items() if parameter.kind != parameter.VAR_KEYWORD}
        for name in call.keys() - known:
            default = own[name].default if name in own else inspect.Parameter.empty
            if name == "start" and call[name] in (None, "none"):  # as a loop of its own begins
                continue
            if type(call[name]) is not type(default) or call[name] != default:
                whose = f"expected none, as {kind.__name__} has a loop of its own, got"
                whose = whose if name in own else f"expected an argument of {kind.__name__}'s call, got"
                raise TypeError(f"{name}: {whose} {call[name]!r:.60}")
        given = signature.bind(self.pipe, *args, **{name: call[name] for name in call.keys() & known}).arguments
        given = {name: value for name, value in given.items() if name in known and name != "self"}
        return {name: value for name, value in self.defaults.items() if name in known} | given

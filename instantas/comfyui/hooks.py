"""The hooks of ComfyUI through which a model is evaluated by windows; nothing of ComfyUI's is replaced."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch

from instantas.sampling.hosted import Place, Windowed, keep_eps, step_of
from instantas.windows import WindowPlan

CELL = 8  # pixels of a latent cell of every model that is taken
KEY = "instantas"  # of the wrappers, and of the `Place` in transformer_options


class Strided(Windowed):
    """MultiDiffusion's windows: one at every multiple of the stride, in cells, and no bridge."""

    def __init__(self, window: tuple[int, int], stride: int, **settings: Any):
        super().__init__(window, bridging=None, **settings)
        self.stride = stride

    def plan(self, size: tuple[int, int]) -> WindowPlan:
        window = min(self.window[0], size[0]), min(self.window[1], size[1])
        strides = min(self.stride, window[0]), min(self.stride, window[1])
        return WindowPlan.strided(*size, window, strides, wrap=self.wrap)


class Shared:
    """What a copy of a model's options has in common with them: ComfyUI copies them deeply for every node."""

    def __deepcopy__(self, memo: dict) -> Any:
        return self


class Hooks(Shared):
    """The hooks of one patched model.

    Args:
        host: has the windows, and what is re-used of a run.
        inner: the unet function wrapper that was there before, which then sees windows; None: there was none.
    """

    def __init__(self, host: Windowed, inner: Callable | None):
        self.host, self.inner = host, inner
        self._sigmas: Any = None
        self._controls: dict[int, DeferredControl] = {}

    @classmethod
    def install(cls, model: Any, host: Windowed) -> Any:
        """A clone of a ModelPatcher that is evaluated through the host's windows.

        Raises:
            ValueError: for a model that is no image UNet of the Stable Diffusion family.
        """
        from comfy.patcher_extension import WrappersMP

        check_unet(model)
        model = model.clone()
        hooks = cls(host, model.model_options.get("model_function_wrapper"))
        model.set_model_unet_function_wrapper(hooks.network)
        model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, hooks.sample)
        model.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, KEY, hooks.evaluate_conditions)
        return model

    def sample(
        self, executor: Any, noise: Any, latent_image: Any, sampler: Any, sigmas: Any, *rest: Any, **named: Any
    ) -> Any:
        """OUTER_SAMPLE: a run begins with nothing to re-use, and leaves nothing."""
        if noise.dim() != 4:
            raise ValueError(f"latent_image: expected pictures (B, C, H, W), got {tuple(noise.shape)}")
        height, width = (min(side, window) * CELL for side, window in zip(noise.shape[-2:], self.host.window))
        for conds in executor.class_obj.conds.values():
            for cond in conds:  # SDXL is told the size of what it sees, unless the graph says another
                cond.setdefault("width", width)
                cond.setdefault("height", height)
        self._reset(sigmas)
        try:
            return executor(noise, latent_image, sampler, sigmas, *rest, **named)
        finally:
            self._reset(None)

    def _reset(self, sigmas):
        self.host.reset()
        self._sigmas, self._controls = sigmas, {}

    def evaluate_conditions(
        self, executor: Any, model: Any, conds: Any, x: Any, timestep: Any, options: dict, *rest: Any
    ) -> Any:
        """CALC_COND_BATCH: ControlNets wait for the windows; refuses what looks at whole canvases.

        Raises:
            ValueError: for a wrapper set after ours, GLIGEN, self-attention guidance.
        """
        if options.get("model_function_wrapper") != self.network:
            raise ValueError("model: expected Windows after all nodes that wrap the model's function, got one after it")
        if any("nodes_sag" in getattr(f, "__module__", "") for f in options.get("sampler_post_cfg_function", ())):
            raise ValueError(
                "model: expected no Self-Attention Guidance, which reads attention to the whole canvas, got one with it"
            )
        deferred = [group and [self._deferred(cond) for cond in group] for group in conds]
        return executor(model, deferred, x, timestep, options, *rest)

    def _deferred(self, cond):
        if "gligen" in cond:
            raise ValueError("conditioning: expected no GLIGEN boxes, which lie on the whole canvas, got some")
        control = cond.get("control")
        if control is None:
            return cond
        return cond | {"control": self._controls.setdefault(id(control), DeferredControl(control))}

    def network(self, apply_model: Callable, args: dict) -> torch.Tensor:
        """The unet function wrapper: x_0 of the canvas (B, C, H, W), merged from its windows."""
        x, time, c = args["input"], args["timestep"], args["c"]
        options, size = c["transformer_options"], tuple(x.shape[-2:])

        def evaluate(windows, place):
            given = c if windows is x else place.fit({k: v for k, v in c.items() if k not in KEPT}, len(x), size)
            given = given | {"transformer_options": options | {KEY: place}}
            times = time if windows is x else place.pick(time)
            if "control" in c:
                given["control"] = c["control"].at(windows, times, given, None if windows is x else place, len(x))
            if self.inner is not None:
                return self.inner(apply_model, args | {"input": windows, "timestep": times, "c": given})
            return apply_model(windows, times, **given)

        steps = max(1, len(self._sigmas) - 1)
        return self.host(
            evaluate,
            x,
            step_of(self._sigmas, time),
            steps,
            stream=[(uuid, *_patches(options)) for uuid in options["uuids"]],
            carry=keep_eps,
            mark=time,
        )


KEPT = ("control", "transformer_options")  # of a call's arguments: not cut as they are


class DeferredControl:
    """Stands for a ControlNet, and those before it, until the windows are known: ComfyUI asks for the whole canvas."""

    def __init__(self, control: Any):
        self.control = control
        self._rest: tuple = ()
        self._hints: dict[tuple, torch.Tensor] = {}

    def get_control(self, x: Any, t: Any, cond: Any, *rest: Any) -> DeferredControl:
        """What ComfyUI calls; rest: the number of conditions in the batch, and whatever else there is."""
        self._rest = rest
        return self

    def at(self, x: torch.Tensor, t: torch.Tensor, cond: dict, place: Place | None, batch: int) -> Any:
        """What the ControlNets say of windows x; place None: of the whole canvas.

        Args:
            batch: elements of the host's batch, of which the windows are.
        """
        control = self.control if place is None else self._cut(self.control, x, place, batch)
        return control.get_control(x, t, cond, *self._rest)

    def _cut(self, control, x, place, batch):
        """A shallow copy of a chain of ControlNets that has the windows of its pictures."""
        if control is None:
            return None
        if control.latent_format is not None or control.extra_concat_orig:
            raise ValueError("control_net: expected one that takes pictures, got one that takes latents or a mask too")
        windows = copy.copy(control)
        windows.cond_hint_original = place.cut(self._hint(control, x, place.size, batch))
        windows.cond_hint = None
        windows.previous_controlnet = self._cut(control.previous_controlnet, x, place, batch)
        return windows

    def _hint(self, control, x, size, batch):
        """The picture of each element of the batch, of the canvas's size as ComfyUI makes it, or one for all."""
        key = id(control), size, batch
        if key not in self._hints:
            from comfy.utils import common_upscale

            height, width = (side * control.compression_ratio for side in size)
            hint = common_upscale(control.cond_hint_original, width, height, control.upscale_algorithm, "center")
            if len(hint) > 1:
                each = batch // self._rest[0]
                hint = hint[torch.arange(batch) % each % min(each, len(hint))]
            self._hints[key] = hint.to(x.device)
        return self._hints[key]


def check_unet(model: Any) -> None:
    """Refuse what is no image UNet that predicts noise, x_0 or v.

    Raises:
        ValueError: with the model's class.
    """
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
    from comfy.model_base import ModelType, SVD_img2vid

    kinds = "EPS", "V_PREDICTION", "V_PREDICTION_EDM", "V_PREDICTION_CONTINUOUS", "EDM"
    network, found = model.get_model_object("diffusion_model"), model.model
    known = isinstance(network, UNetModel) and found.model_type in [getattr(ModelType, kind) for kind in kinds]
    if not known or isinstance(found, SVD_img2vid):
        raise ValueError(f"model: expected an image UNet (Stable Diffusion 1, 2, XL), got {type(found).__name__}")


def _patches(options):
    """Tells apart the passes of one condition in one step, as of perturbed-attention guidance: by their patches."""
    lists = [*options.get("patches", {}).values()]
    lists += [blocks.values() for blocks in options.get("patches_replace", {}).values()]
    return [id(patch) for patches in lists for patch in patches]

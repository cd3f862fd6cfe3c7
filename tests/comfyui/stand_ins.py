"""Small stand-ins for what ComfyUI calls the nodes with: no checkout is needed."""

import copy
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from instantas.comfyui import Windows

WINDOW = 8
SIGMAS = torch.tensor([14.0, 7.0, 3.0, 1.5, 0.7, 0.3, 0.1, 0.0])


class UNet(torch.nn.Module):
    """One cross-attention in each part, as ComfyUI names them."""

    def __init__(self):
        super().__init__()
        layer = lambda: torch.nn.ModuleDict({"attn1": torch.nn.Identity(), "attn2": torch.nn.Identity()})  # noqa: E731
        self.input_blocks = torch.nn.ModuleList([torch.nn.ModuleList(), torch.nn.ModuleList([layer()])])
        self.middle_block = torch.nn.ModuleList([torch.nn.Identity(), layer()])
        self.output_blocks = torch.nn.ModuleList([torch.nn.ModuleList([layer()])])


class Patcher:
    """As ComfyUI's ModelPatcher: a clone's options are deep copies."""

    def __init__(self, kind="EPS", network=None, model=SimpleNamespace):
        self.model, self.network = model(model_type=kind), UNet() if network is None else network
        self.model_options, self.wrappers = {"transformer_options": {}}, {}

    def clone(self):
        clone = copy.copy(self)
        clone.model_options, clone.wrappers = copy.deepcopy(self.model_options), dict(self.wrappers)
        return clone

    def get_model_object(self, name):
        return self.network

    def set_model_unet_function_wrapper(self, wrapper):
        self.model_options["model_function_wrapper"] = wrapper

    def add_wrapper_with_key(self, kind, key, wrapper):
        self.wrappers[kind] = wrapper

    def set_model_attn2_patch(self, patch):
        self.model_options["transformer_options"].setdefault("patches", {})["attn2_patch"] = [patch]

    def set_model_attn2_replace(self, patch, block, number):
        replaced = self.model_options["transformer_options"].setdefault("patches_replace", {})
        replaced.setdefault("attn2", {})[block, number] = patch


class Video(SimpleNamespace):
    pass


@pytest.fixture(autouse=True)
def comfy(monkeypatch):
    """The names that are imported of ComfyUI."""

    def module(name, **names):
        made = ModuleType(name)
        made.__dict__.update(names)
        monkeypatch.setitem(sys.modules, name, made)

    kinds = "EPS", "V_PREDICTION", "V_PREDICTION_EDM", "V_PREDICTION_CONTINUOUS", "EDM", "FLUX"
    wrappers = "OUTER_SAMPLE", "CALC_COND_BATCH", "DIFFUSION_MODEL"
    module("comfy")
    module("comfy.patcher_extension", WrappersMP=SimpleNamespace(**{name: name for name in wrappers}))
    module("comfy.model_base", ModelType=SimpleNamespace(**{kind: kind for kind in kinds}), SVD_img2vid=Video)
    module("comfy.ldm.modules.diffusionmodules.openaimodel", UNetModel=UNet)
    module("comfy.utils", common_upscale=lambda image, width, height, *how: upscaled(image, height, width))


def upscaled(image, height, width):
    return torch.nn.functional.interpolate(image, (height, width), mode="nearest-exact")


def windowed(model, **settings):
    return Windows().patch(model, 8 * WINDOW, 8 * WINDOW, **settings)[0]


def network(x, sigma, gain=0.5, c_concat=None, control=None, transformer_options=None):
    """x_0, which depends on the whole window."""
    spread = torch.fft.ifft2(torch.fft.fft2(x).abs()).real
    added = sum(each for each in (c_concat, control) if each is not None)
    return gain * x / (1 + sigma.view(-1, 1, 1, 1)) + 0.1 * torch.tanh(spread) + added


def sampled(model, x, conds, groups=lambda step: None, seen=None):
    """Euler as ComfyUI runs it: conditions {"positive": {...}} in batches, of which `groups` may choose the names."""
    seen = [] if seen is None else seen
    lists = {name: [dict(cond, uuid=name)] for name, cond in conds.items()}

    def apply_model(x, t, **c):
        seen.append(x)
        return network(x, t, **c)

    def batch(model_, group, x, sigma, options):
        named = [cond for conds in group for cond in conds]
        given = {}
        for key in ("gain", "c_concat"):
            if key in named[0]:
                given[key] = torch.cat([cond[key] for cond in named])
        given["transformer_options"] = {**options["transformer_options"], "uuids": [cond["uuid"] for cond in named]}
        whole, times = x.repeat(len(named), 1, 1, 1), sigma.repeat(len(named))
        if "control" in named[0]:
            given["control"] = named[0]["control"].get_control(whole, times, given, len(named))
        args = {"input": whole, "timestep": times, "c": given, "cond_or_uncond": list(range(len(named)))}
        return options["model_function_wrapper"](apply_model, args).chunk(len(named))

    def outer(noise, latent, sampler, sigmas):
        x = noise * sigmas[0]
        for step, (sigma, following) in enumerate(zip(sigmas, sigmas[1:])):
            said = {}
            for names in groups(step) or [list(lists)]:
                group = [lists[name] for name in names]
                args = model, group, x, sigma.expand(len(x)), model.model_options
                said |= dict(zip(names, model.wrappers["CALC_COND_BATCH"](batch, *args)))
            denoised = sum(said[name] * weight for name, weight in zip(lists, (2.0, -1.0)))
            x = x + (following - sigma) * (x - denoised) / sigma
        return x

    executor = Executor(outer, SimpleNamespace(conds=lists))
    return model.wrappers["OUTER_SAMPLE"](executor, x, torch.zeros_like(x), None, SIGMAS), lists


class Executor:
    def __init__(self, call, class_obj):
        self.call, self.class_obj = call, class_obj

    def __call__(self, *args, **named):
        return self.call(*args, **named)


def two(**named):
    """Conditions of one prompt each; named: what both have."""
    gains = {"positive": 0.5, "negative": -0.3}
    return {name: dict(named, gain=torch.full((1, 1, 1, 1), gain)) for name, gain in gains.items()}

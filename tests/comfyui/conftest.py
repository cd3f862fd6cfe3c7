"""A ComfyUI checkout, where the environment variable COMFYUI names one, on the CPU, with a tiny random model."""

import os
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.comfyui.checkout import UNET, prompt, with_random_weights


@pytest.fixture(scope="session")
def comfy():
    """The modules of ComfyUI that are used here."""
    folder = os.environ.get("COMFYUI")
    if not folder:
        pytest.skip("needs a ComfyUI checkout with its requirements: COMFYUI=folder")
    if not Path(folder, "comfyui_version.py").exists():
        raise ValueError(f"COMFYUI: expected a folder with a ComfyUI checkout, got {folder!r}")
    sys.path.append(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import comfy.cli_args

        comfy.cli_args.args.cpu = True
        import comfy.controlnet
        import comfy.model_base
        import comfy.model_patcher
        import comfy.sample
        import comfy.samplers
        import comfy.supported_models
        import comfyui_version
    print(f"ComfyUI {comfyui_version.__version__}")
    return comfy


@pytest.fixture(scope="session")
def tiny(comfy):
    """function of (base class, settings of the UNet) -> ModelPatcher"""

    def make(kind="BaseModel", **settings):
        config = comfy.supported_models.SD15(dict(UNET, **settings))
        model = getattr(comfy.model_base, kind)(config)
        with_random_weights(model.diffusion_model)
        device = torch.device("cpu")
        return comfy.model_patcher.ModelPatcher(model, load_device=device, offload_device=device)

    return make


@pytest.fixture(scope="session")
def model(tiny):
    return tiny()


@pytest.fixture
def run(comfy):
    """Samples as the KSampler node does; the result, and how many elements each call of the UNet had."""

    def sample(model, start, steps=3, sampler="euler", cfg=4.0, latent=None, positive=None, negative=None, **settings):
        calls = []
        network = model.model.diffusion_model
        hook = network.register_forward_pre_hook(lambda module, args, kwargs: calls.append(args[0]), with_kwargs=True)
        latent = torch.zeros_like(start) if latent is None else latent
        positive, negative = positive or prompt(1), negative or prompt(2)
        given = start, steps, cfg, sampler, "normal", positive, negative, latent
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                result = comfy.sample.sample(model, *given, seed=5, disable_pbar=True, **settings)
        finally:
            hook.remove()
        return SimpleNamespace(result=result, calls=calls, count=sum(map(len, calls)))

    return sample

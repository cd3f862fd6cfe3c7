"""Tiny diffusers pipelines of every kind, what each is called with, and what is looked at while they run."""

import diffusers
import numpy as np
import torch
from PIL import Image

from instantas.testing import tiny
from instantas.testing.tiny import CELL, WINDOW, tiny_controlnet, tiny_pipeline, tiny_xl_pipeline

NATIVE, LARGE = (WINDOW * CELL, WINDOW * CELL), (192, 320)
CALL = dict(num_inference_steps=2, output_type="latent", prompt="red stone")


def picture(size, seed=0):
    """Of (height, width) pixels."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8))


def mask(size):
    """White in the right half."""
    drawn = np.zeros(size, dtype=np.uint8)
    drawn[:, size[1] // 2 :] = 255
    return Image.fromarray(drawn)


def sized(size):
    return dict(height=size[0], width=size[1])


def started(size):
    return dict(image=picture(size), strength=0.9)


def masked(size):
    return started(size) | sized(size) | dict(mask_image=mask(size))


def controlled(size):
    return sized(size) | dict(image=picture(size))


def restarted(size):
    return started(size) | sized(size) | dict(control_image=picture(size, 1))


def of(name, **components):
    """Makes the pipeline of a class of diffusers, for text, of tiny components."""
    return lambda: tiny_pipeline(kind=getattr(diffusers, name), **{n: make() for n, make in components.items()})


def xl(name, **components):
    """The same of SDXL, from the components of its text-to-image pipeline."""

    def make():
        held = tiny_xl_pipeline()
        return quiet(getattr(diffusers, name)(**held.components, **{n: make() for n, make in components.items()}))

    return make


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def bare(name, **components):
    """Of a pipeline without a safety checker."""

    def make():
        held = tiny_pipeline()
        own = {n: getattr(held, n) for n in ("vae", "text_encoder", "tokenizer", "unet", "scheduler")}
        return quiet(getattr(diffusers, name)(**own | {n: make() for n, make in components.items()}))

    return make


def several():
    return [tiny_controlnet(), tiny_controlnet()]


def adapter():
    torch.manual_seed(5)
    made = diffusers.T2IAdapter(in_channels=3, channels=[16, 32], num_res_blocks=1, downscale_factor=8)
    return made.eval()


def motion():
    torch.manual_seed(6)
    made = diffusers.MotionAdapter(
        block_out_channels=(16, 32), motion_layers_per_block=1, motion_norm_num_groups=8, motion_num_attention_heads=2
    )
    for parameter in made.parameters():
        parameter.data.normal_(std=0.1)
    return made.eval()


def inputs(channels):
    return lambda: tiny.unet(in_channels=channels)


def lcm():
    return tiny.scheduler(kind=diffusers.LCMScheduler)


def consistent():
    return tiny.unet(time_cond_proj_dim=8)


KINDS = {
    "text to image": (of("StableDiffusionPipeline"), sized),
    "img2img": (of("StableDiffusionImg2ImgPipeline"), started),
    "inpaint, 4 channels": (of("StableDiffusionInpaintPipeline"), masked),
    "inpaint, 9 channels": (of("StableDiffusionInpaintPipeline", unet=inputs(9)), masked),
    "InstructPix2Pix": (
        of("StableDiffusionInstructPix2PixPipeline", unet=inputs(8)),
        lambda size: dict(image=picture(size)),
    ),
    "depth to image": (
        bare(
            "StableDiffusionDepth2ImgPipeline",
            unet=inputs(5),
            depth_estimator=lambda: None,
            feature_extractor=lambda: None,
        ),
        lambda size: started(size) | dict(depth_map=torch.rand(1, *size, generator=torch.Generator().manual_seed(0))),
    ),
    "ControlNet": (of("StableDiffusionControlNetPipeline", controlnet=tiny_controlnet), controlled),
    "ControlNet, guess mode": (
        of("StableDiffusionControlNetPipeline", controlnet=tiny_controlnet),
        lambda size: controlled(size) | dict(guess_mode=True),
    ),
    "ControlNets, two": (
        of("StableDiffusionControlNetPipeline", controlnet=several),
        lambda size: controlled(size) | dict(image=[picture(size), picture(size, 1)]),
    ),
    "ControlNet img2img": (of("StableDiffusionControlNetImg2ImgPipeline", controlnet=tiny_controlnet), restarted),
    "ControlNet inpaint": (
        of("StableDiffusionControlNetInpaintPipeline", controlnet=tiny_controlnet),
        lambda size: restarted(size) | dict(mask_image=mask(size)),
    ),
    "T2I-Adapter": (of("StableDiffusionAdapterPipeline", adapter=adapter), controlled),
    "PAG": (of("StableDiffusionPAGPipeline"), lambda size: sized(size) | dict(pag_scale=2.0)),
    "LCM": (of("LatentConsistencyModelPipeline", unet=consistent, scheduler=lcm), sized),
    "SDXL": (xl("StableDiffusionXLPipeline"), sized),
    "SDXL img2img": (xl("StableDiffusionXLImg2ImgPipeline"), started),
    "SDXL inpaint": (xl("StableDiffusionXLInpaintPipeline"), masked),
    "SDXL ControlNet": (
        xl("StableDiffusionXLControlNetPipeline", controlnet=lambda: xl_controlnet()),
        controlled,
    ),
    "SDXL ControlNet img2img": (
        xl("StableDiffusionXLControlNetImg2ImgPipeline", controlnet=lambda: xl_controlnet()),
        restarted,
    ),
    "SDXL ControlNet inpaint": (
        xl("StableDiffusionXLControlNetInpaintPipeline", controlnet=lambda: xl_controlnet()),
        lambda size: restarted(size) | dict(mask_image=mask(size)),
    ),
    "SDXL T2I-Adapter": (xl("StableDiffusionXLAdapterPipeline", adapter=adapter), controlled),
    "SDXL PAG": (xl("StableDiffusionXLPAGPipeline"), lambda size: sized(size) | dict(pag_scale=2.0)),
    "PAG ControlNet": (
        of("StableDiffusionControlNetPAGPipeline", controlnet=tiny_controlnet),
        lambda size: controlled(size) | dict(pag_scale=2.0),
    ),
    "PAG img2img": (of("StableDiffusionPAGImg2ImgPipeline"), lambda size: started(size) | dict(pag_scale=2.0)),
    "AnimateDiff": (
        bare("AnimateDiffPipeline", motion_adapter=motion),
        lambda size: sized(size) | dict(num_frames=2),
    ),
    "AnimateDiff ControlNet": (
        bare(
            "AnimateDiffControlNetPipeline",
            motion_adapter=motion,
            controlnet=tiny_controlnet,
            feature_extractor=lambda: None,
        ),
        lambda size: sized(size) | dict(num_frames=2, conditioning_frames=[picture(size), picture(size, 1)]),
    ),
    "AnimateDiff video to video": (
        bare("AnimateDiffVideoToVideoPipeline", motion_adapter=motion),
        lambda size: sized(size) | dict(video=[picture(size), picture(size, 1)], strength=0.9),
    ),
}
"""Name -> how the pipeline is made, and its arguments for a picture of (height, width) pixels."""


def xl_controlnet():
    net = diffusers.ControlNetModel.from_unet(tiny_xl_pipeline().unet, conditioning_embedding_out_channels=(8, 8, 8, 8))
    torch.manual_seed(4)
    for name, parameter in net.named_parameters():
        if "controlnet_" in name or "conv_out" in name:
            parameter.data.normal_(std=0.1)
    return net.eval()


def painted(pipe, arguments):
    output = pipe(**CALL | arguments, generator=torch.Generator().manual_seed(0))
    return output.frames if hasattr(output, "frames") else output.images


def nets(pipe):
    control = getattr(pipe, "controlnet", None)
    return [] if control is None else list(getattr(control, "nets", [control]))


def recorded(pipe, networks):
    """The last two sides of what networks are given from now on."""
    seen = []

    def record(module, args, kwargs):
        given = dict(sample=args[0] if args else kwargs["sample"], shown=kwargs.get("controlnet_cond"))
        seen.extend((name, tuple(t.shape[-2:])) for name, t in given.items() if t is not None)

    for network in networks:
        network.register_forward_pre_hook(record, with_kwargs=True)
    return seen


def difference(ours, theirs):
    return ((ours - theirs).norm() / theirs.norm()).item()

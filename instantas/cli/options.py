"""What the commands share: options, their types, and the names of schedulers and dtypes."""

from __future__ import annotations

import re
from typing import Any

import click
import torch

from instantas.cli.errors import first_line

SCHEDULERS: dict[
    str, tuple[str, dict[str, str]]
] = {  # command line's name -> diffusers' class and what it is made with
    "ddim": ("DDIMScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
    "deis": ("DEISMultistepScheduler", {}),
    "dpm++": ("DPMSolverMultistepScheduler", {}),
    "dpm++-single": ("DPMSolverSinglestepScheduler", {}),
    "dpm": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler-a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "kdpm2": ("KDPM2DiscreteScheduler", {}),
    "lcm": ("LCMScheduler", {}),
    "lms": ("LMSDiscreteScheduler", {}),
    "pndm": ("PNDMScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {}),
}
OUTPUT = "PNG, JPEG, WebP or TIFF by its ending; TIFF of more than 8192x8192 px is written as it is decoded."
SEED = click.IntRange(0, 2**63 - 1)
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class Size(click.ParamType):
    """WIDTHxHEIGHT in pixels, with an x, X, * or × in the middle."""

    name = "WxH"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        if isinstance(value, tuple):
            return value
        match = re.fullmatch(r"\s*(\d{1,18})\s*[xX*×]\s*(\d{1,18})\s*", value)
        width, height = map(int, match.groups()) if match else (0, 0)
        if not width or not height:
            self.fail(f"expected WIDTHxHEIGHT in whole pixels from 1 up, such as 1024x512, got {value!r}", param, ctx)
        return width, height


class Sides(click.ParamType):
    """L,T,R,B -> pixels on the left, the top, the right and the bottom."""

    name = "L,T,R,B"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if isinstance(value, (tuple, list)):
            return tuple(value)
        if not re.fullmatch(r"\s*\d{1,18}(\s*,\s*\d{1,18}){3}\s*", value):
            self.fail(f"expected LEFT,TOP,RIGHT,BOTTOM in whole pixels, such as 0,0,256,0, got {value!r}", param, ctx)
        return tuple(map(int, value.split(",")))


class Wrap(click.ParamType):
    """x, y or x,y -> (vertical, horizontal)."""

    name = "x,y"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[bool, bool]:
        if isinstance(value, tuple):
            return value
        axes = value.split(",")
        if not set(axes) <= {"x", "y"}:
            self.fail(f"expected x, y or x,y, got {value!r}", param, ctx)
        return "y" in axes, "x" in axes


class Device(click.ParamType):
    """A torch device that is really there."""

    name = "device"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        try:
            torch.empty(0, device=value)
        except (RuntimeError, AssertionError) as error:
            self.fail(
                f"expected a device that this machine has, got {value!r:.40}: {first_line(error):.120}", param, ctx
            )
        if torch.device(value).type == "meta":
            self.fail(f"expected a device that computes, got {value!r}", param, ctx)
        return value


steps_option = click.option(
    "--steps", type=click.IntRange(1), help="Scheduler steps; by default the model's own number, else 50."
)
seed_option = click.option("--seed", type=SEED, help="By default a random one, which is printed.")
guidance_option = click.option("--guidance", type=float, help="Guidance scale; by default the model's own, else 7.5.")
scheduler_option = click.option(
    "--scheduler", type=click.Choice(sorted(SCHEDULERS)), help="By default the model's own."
)
negative_option = click.option("--negative", metavar="PROMPT", help="What the picture should not show.")
wrap_option = click.option("--wrap", type=Wrap(), default=(False, False), help="Axes that close to a circle.")
window_batch_option = click.option(
    "--window-batch", type=click.IntRange(1), default=4, show_default=True, help="Windows per network call."
)
dtype_option = click.option(
    "--dtype", type=click.Choice(list(DTYPES)), help="By default float16 on a GPU, float32 elsewhere."
)
device_option = click.option("--device", type=Device(), help="By default cuda where there is one, else cpu.")
force_option = click.option(
    "--force", is_flag=True, help="Replace the output if it exists, previews and the file of a stopped run too."
)


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"

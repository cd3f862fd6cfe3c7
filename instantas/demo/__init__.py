"""The embedded model: a small latent diffusion model of twelve materials and a nebula, trained from scratch.

`folder()` is a Stable Diffusion pipeline in diffusers' layout: AutoencoderTiny, CLIPTextModel and UNet2DConditionModel,
3.7 M parameters in float16, one native window is 16x16 latents = 128x128 px. Beside `model_index.json` lies
`instantas.json` with the settings that suit it. `materials.py` draws its training pictures, `train.py` trains a model
of the same kind, `judge.py` recognises the materials; they need `instantas[train]`, importing this module nothing.
"""

from __future__ import annotations

from pathlib import Path

MATERIALS = (
    "brick",
    "grass",
    "gravel",
    "stars",
    "sand",
    "water",
    "clouds",
    "wood",
    "lava",
    "marble",
    "leaves",
    "snow",
    "nebula",
)
"""What the model can paint; each name is also a prompt."""

PROMPTS = {
    "red brick wall": "dark red bricks in courses with pale mortar",
    "grass": "fresh green blades seen from above",
    "gravel": "small gray stones packed side by side",
    "night sky": "white stars on dark blue",
    "purple nebula": "purple and blue glowing gas with a few stars",
    "red desert sand": "wind ripples in orange red sand",
    "turquoise ocean": "small waves with white glints on green blue water",
    "sunset clouds": "orange and pink clouds on a violet sky",
    "dark wooden planks": "long dark brown boards with black gaps",
    "lava": "a net of glowing orange cracks in black crust",
    "white marble": "white polished stone with thin gray veins",
    "autumn leaves": "orange, yellow and red leaves in a heap",
    "snow": "soft white drifts with blue shadows",
    "grass next to gravel": "both in one picture, the border wherever the model likes it",
}
"""Example prompts and what their pictures look like."""


def folder() -> Path:
    """The folder of the embedded model, in diffusers' layout.

    Raises:
        FileNotFoundError: if the package was installed without the model's files.
    """
    path = Path(__file__).resolve().parent / "model"
    if not (path / "model_index.json").is_file():
        raise FileNotFoundError(
            f"the embedded model is missing from this installation: expected {path / 'model_index.json'}"
        )
    return path

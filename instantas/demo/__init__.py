"""The embedded model: a small latent diffusion model of thirteen materials and eight scenes, trained from scratch.

`folder()` is a Stable Diffusion pipeline in diffusers' layout: AutoencoderTiny, CLIPTextModel and UNet2DConditionModel,
3.7 M parameters in float16, one native window is 16x16 latents = 128x128 px. Beside `model_index.json` lies
`instantas.json` with the settings that suit it. `materials.py` and `scenes.py` draw its training pictures, `train.py`
trains a model of the same kind, `judge.py` recognises the materials; they need `instantas[train]`. `detector.py` finds
and counts the scenes' subjects with torch and safetensors alone. Importing this module needs nothing.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path

from instantas.demo.training import captions
from instantas.demo.training import scenery as _scenery
from instantas.demo.training.palettes import LOOKS, NOUNS

MATERIALS = tuple(NOUNS)
"""The materials that the model can paint; each name is also a prompt."""

SUBJECTS = tuple(filter(None, _scenery.SCENES))
"""What its scenes show one of; each name is also a prompt."""

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
"""Example prompts of materials and what their pictures look like."""

SCENE_PROMPTS = {
    "lighthouse by the sea at dusk": "a banded tower on its rock under an orange sky",
    "sailing boat at sea": "a hull with two sails on blue or evening water",
    "lone tree in a field": "a round crown on a green plain",
    "house on a hill at sunset": "a house with lit windows on a grassy hilltop",
    "sun over mountains": "a yellow disc above jagged peaks",
    "full moon at night": "a pale disc among stars",
    "hot air balloon in the desert": "a striped balloon above dunes",
    "stone bridge over a river": "three arches from bank to bank",
}
"""Example prompts of scenes and what their pictures look like."""


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


def vocabulary() -> dict[str, tuple[tuple[str, ...], tuple[str, ...]]]:
    """By material and by subject, the names that it goes by and the words for its looks, settings and lights."""
    found = {
        material: (nouns, tuple(dict.fromkeys(word for look in LOOKS[material] for word in look.adjectives if word)))
        for material, nouns in NOUNS.items()
    }
    for subject in SUBJECTS:
        kind = _scenery.SCENES[subject]
        settings = [words for setting, _ in kind.settings for words in _scenery.SETTINGS[setting][1]]
        lights = [words for _, light in kind.settings for words in _scenery.LIGHTS[light].words]
        found[subject] = kind.nouns, tuple(dict.fromkeys(settings + lights))
    return found


def unknown_words(prompt: str) -> list[str]:
    """The words of a prompt that were in no caption of the model's training."""
    return [word for word in _words(prompt) if word not in _seen()]


def paintable(prompt: str) -> bool:
    """Whether a word of the prompt stands for something that the model can paint."""
    return not _named().isdisjoint(_words(prompt))


@functools.cache
def _named():
    """The words of materials' names, and the last ones of subjects' and settings' ("lone tree")."""
    names = {word for nouns in NOUNS.values() for noun in nouns for word in noun.split()}
    phrases = [noun for subject in SUBJECTS for noun in _scenery.SCENES[subject].nouns]
    phrases += [name for names, _ in _scenery.SETTINGS.values() for name in names]
    return (names | {phrase.split()[-1] for phrase in phrases}) - set(captions.FILLERS)


@functools.cache
def _seen():
    return frozenset(captions.words())


def _words(prompt):
    return re.findall(r"\w+", prompt.lower())

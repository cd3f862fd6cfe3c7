"""Captions of the training pictures: of one material, of two, and of scenes."""

from __future__ import annotations

import string
from collections.abc import Sequence

import numpy as np

from instantas.demo.training.palettes import LOOKS, NOUNS, Look
from instantas.demo.training.scenery import LIGHTS, SCENES, SETTINGS

TEMPLATES = (
    (0.50, "{}"),
    (0.15, "a photo of {}"),
    (0.07, "{} texture"),
    (0.07, "a picture of {}"),
    (0.07, "close up of {}"),
    (0.14, "{} background"),
)
"""Probability and wording of a caption of one material."""

JOINT_TEMPLATES = (
    (0.36, "{} and {}"),
    (0.36, "{} next to {}"),
    (0.10, "{} with {}"),
    (0.09, "{}, {}"),
    (0.09, "{} beside {}"),
)
"""Probability and wording of a caption of two materials."""

SCENE_TEMPLATES = (
    (0.70, "{}"),
    (0.12, "a photo of {}"),
    (0.18, "a picture of {}"),
)
"""Probability and wording of a caption of a scene."""

SAID = {"day": 0.4, "dusk": 0.7, "night": 0.75}
"""How often a caption of a scene with a subject names its light."""

FILLERS = (
    "the image closeup view surface seamless detailed beautiful natural realistic high quality with under over big "
    "small large wide landscape pattern ground wall floor covered full very bright soft rough smooth"
).split()
"""Words that people add to a prompt and that say nothing about the material."""

PLACES = "left right top bottom in on at an".split()
"""Words with a token of their own that no caption uses."""


def phrase(rng: np.random.Generator, material: str, look: Look, other_noun: float = 0.5) -> str:
    """Adjective and noun; a look that has no "" among its adjectives never goes by the bare noun.

    Args:
        rng: source of the choices.
        material: what is shown.
        look: its appearance.
        other_noun: how often any of the material's nouns is used instead of its first.
    """
    named = "" not in look.adjectives or rng.random() < 0.85
    adjective = rng.choice(look.adjectives) if named else ""
    nouns = NOUNS[material]
    noun = rng.choice(nouns) if rng.random() < other_noun else nouns[0]
    return f"{adjective} {noun}".strip()


def caption(rng: np.random.Generator, material: str, look: Look) -> str:
    """A caption of one material; every fifth has a word in it that means nothing, so that unknown words do no harm."""
    return _with_noise(rng, _fill(rng, TEMPLATES, phrase(rng, material, look)))


def _with_noise(rng: np.random.Generator, text: str) -> str:
    if rng.random() < 0.2:
        letters = "".join(rng.choice(list(string.ascii_lowercase), rng.integers(3, 9)))
        filler = rng.choice(FILLERS) if rng.random() < 0.5 else letters
        text = str(rng.choice((f"{filler} {text}", f"{text}, {filler}", f"{text} {filler}")))
    return text


def joint_caption(rng: np.random.Generator, first: tuple[str, Look], second: tuple[str, Look]) -> str:
    """A caption of two materials, in either order."""
    phrases = [phrase(rng, material, look, other_noun=0.3) for material, look in (first, second)]
    if rng.random() < 0.5:
        phrases.reverse()
    text = _fill(rng, JOINT_TEMPLATES, *phrases)
    return text if rng.random() < 0.75 else f"{rng.choice(('a photo of', 'a picture of'))} {text}"


def scene_caption(rng: np.random.Generator, subject: str, setting: str, light: str) -> str:
    """A caption of a scene: its subject with or without setting and light; where there is none, the setting's."""
    names, places = SETTINGS[setting]
    time = rng.choice(LIGHTS[light].words)
    if not subject:
        return _with_noise(rng, _fill(rng, SCENE_TEMPLATES, f"{rng.choice(names)} {time}"))
    nouns = SCENES[subject].nouns
    noun = str(rng.choice(nouns) if rng.random() < 0.4 else nouns[0])
    text = noun if rng.random() < 0.6 else f"a {noun}"
    named = rng.random()
    if named < 0.45:
        text = f"{text} {rng.choice(places)}"
    elif named < 0.65:
        text = f"{text}, {rng.choice(names)}"
    if rng.random() < SAID[light]:
        text = f"{text} {time}"
    return _with_noise(rng, _fill(rng, SCENE_TEMPLATES, text))


def words() -> list[str]:
    """Every word of every caption, sorted: the tokenizer gives each a token of its own."""
    texts = [template for _, template in TEMPLATES + JOINT_TEMPLATES + SCENE_TEMPLATES] + FILLERS + PLACES
    texts += [noun for kind in SCENES.values() for noun in kind.nouns]
    texts += [phrase for setting in SETTINGS.values() for phrases in setting for phrase in phrases]
    texts += [phrase for light in LIGHTS.values() for phrase in light.words]
    texts += [noun for nouns in NOUNS.values() for noun in nouns]
    texts += [adjective for looks in LOOKS.values() for look in looks for adjective in look.adjectives]
    bare = " ".join(texts).replace("{}", " ").replace(",", " ")
    return sorted(set(bare.split()))


def _fill(rng: np.random.Generator, templates: Sequence[tuple[float, str]], *phrases: str) -> str:
    probabilities, texts = zip(*templates)
    return str(rng.choice(texts, p=probabilities)).format(*phrases)

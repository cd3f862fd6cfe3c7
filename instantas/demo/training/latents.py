"""What the diffusion model is trained on: captioned latents of materials, of two in one picture, and of scenes."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from scipy import ndimage

from instantas.demo.training.captions import caption, joint_caption, scene_caption
from instantas.demo.training.drawing import SIZE
from instantas.demo.training.materials import Render
from instantas.demo.training.scenes import Scene
from instantas.demo.training.stage import Stage
from instantas.demo.training.tokenizer import MAX_LENGTH

WINDOW = 16
"""Side of the model's native window in latent cells."""

RIM = 2
"""Latent cells left out at a picture's border, where the encoder has seen padding."""

COMPOSITE = 176
"""Side of a picture of two materials in pixels: the window, the rims and a little freedom."""

CAPTIONS, JOINT_CAPTIONS = 40, 4
"""Captions made for every picture of one and of two materials."""

EMPHASIS = {"leaves": 2.6, "stars": 1.5, "nebula": 1.4, "wood": 1.3, "grass": 1.2, "marble": 1.1} | {
    "sand": 0.8,
    "brick": 0.7,
    "lava": 0.7,
    "water": 0.6,
    "storm": 3.5,
    "sunset": 1.5,
}
"""How much more often than the average a material or a kind of look is shown: some are learned more slowly."""

SCENE_EMPHASIS = {
    "lighthouse": 2.2,
    "bridge": 1.6,
    "balloon": 1.5,
    "boat": 1.3,
    "tree": 1.1,
    "moon": 0.9,
    "sun": 0.7,
    "": 0.5,
}
"""How often scenes of a subject are shown, where a house is shown once: some are learned more slowly."""


class TrainingLatents(NamedTuple):
    """Scaled latents float16 and caption tokens int64.

    Attributes:
        single: (n, 2, 4, h, w), every picture and its mirror image.
        single_tokens: (n, CAPTIONS, MAX_LENGTH).
        weights: (n,) probabilities of the pictures.
        joint: (m, 4, h', w').
        joint_tokens: (m, JOINT_CAPTIONS, MAX_LENGTH).
        scenes: (k, 2, 4, WINDOW, WINDOW), every scene as it fills a native window, and its mirror image.
        details: k of (4, h, w), the same scenes as large as they were drawn.
        scene_tokens: (k, CAPTIONS, MAX_LENGTH).
        scene_weights: (k,) probabilities of the scenes.
        scale: the factor that has given them standard deviation 1.
    """

    single: torch.Tensor
    single_tokens: torch.Tensor
    weights: np.ndarray
    joint: torch.Tensor
    joint_tokens: torch.Tensor
    scenes: torch.Tensor
    details: list[torch.Tensor]
    scene_tokens: torch.Tensor
    scene_weights: np.ndarray
    scale: float


@torch.no_grad()
def encode(autoencoder: Any, images: np.ndarray) -> torch.Tensor:
    """uint8 (n, size, size, 3) to unscaled latents (n, 4, size/8 - 2 RIM, size/8 - 2 RIM)."""
    pictures = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.autocast("cpu", torch.bfloat16):
        latents = autoencoder.encoder(pictures.contiguous(memory_format=torch.channels_last))
    return latents.float()[:, :, RIM:-RIM, RIM:-RIM].contiguous()


def composite(rng: np.random.Generator, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Crops of two pictures joined along a straight or wavy, sharp or soft border: uint8 (COMPOSITE, COMPOSITE, 3)."""

    def crop(image: np.ndarray) -> np.ndarray:
        y, x = rng.integers(0, image.shape[0] - COMPOSITE + 1, 2)
        part = image[y : y + COMPOSITE, x : x + COMPOSITE]
        return (part[:, ::-1] if rng.random() < 0.5 else part).astype(np.float32)

    y, x = np.mgrid[:COMPOSITE, :COMPOSITE] - (COMPOSITE - 1) / 2
    angle = rng.integers(0, 4) * np.pi / 2 if rng.random() < 0.5 else rng.uniform(0, 2 * np.pi)
    distance = np.cos(angle) * x + np.sin(angle) * y - rng.uniform(-34, 34)
    if rng.random() < 0.5:
        wave = ndimage.gaussian_filter(rng.standard_normal((COMPOSITE, COMPOSITE)), 10, mode="wrap")
        distance = distance + 122 * wave
    width = 1 if rng.random() < 0.5 else rng.uniform(6, 40)
    share = np.clip(distance / width + 0.5, 0, 1)[..., None]
    share = share * share * (3 - 2 * share)
    return (crop(first) * (1 - share) + crop(second) * share + 0.5).astype(np.uint8)


def native(image: np.ndarray) -> np.ndarray:
    """A uint8 scene of any size reduced to the size at which it fills a native window, with the rims."""
    return np.asarray(Image.fromarray(image).resize((SIZE // 2, SIZE // 2), Image.Resampling.LANCZOS))


def mirrored(images: np.ndarray) -> np.ndarray:
    """(n, h, w, 3) flipped and moved by half a latent cell; what wraps around lies in the rim."""
    return np.roll(images[:, :, ::-1], (4, 4), (1, 2))


def make_latents(
    autoencoder: Any,
    tokenizer: Any,
    renders: list[Render],
    drawn: list[Scene],
    stage: Stage,
    rng: np.random.Generator,
    batch: int = 8,
    scale: float | None = None,
) -> TrainingLatents:
    """Encode pictures and composites of them until the stage's time is over, at most four composites per picture.

    Args:
        autoencoder: the trained one.
        tokenizer: what makes tokens of captions.
        renders: pictures of materials.
        drawn: pictures of scenes.
        stage: the clock.
        rng: source of all choices.
        batch: pictures of a round.
        scale: the factor for the latents; by default what gives those of materials standard deviation 1.
    """

    def tokens(texts: list[str], each: int) -> torch.Tensor:
        ids = tokenizer(texts, padding="max_length", truncation=True, max_length=MAX_LENGTH, return_tensors="pt")
        return ids.input_ids.view(-1, each, MAX_LENGTH)

    images = np.stack([render.image for render in renders])
    single: list[torch.Tensor] = []
    joint: list[torch.Tensor] = []
    pairs: list[tuple[int, int]] = []
    scenes: list[torch.Tensor] = []
    details: list[torch.Tensor] = []
    stage.most = -(-4 * len(images) // batch)
    for _ in stage:
        part = images[stage.step * batch : (stage.step + 1) * batch]
        if len(part):
            single.append(torch.stack([encode(autoencoder, part), encode(autoencoder, mirrored(part))], 1).half())
        shown = [scene.image for scene in drawn[stage.step * batch : (stage.step + 1) * batch]]
        if shown:
            small = np.stack([native(image) for image in shown])
            scenes.append(torch.stack([encode(autoencoder, small), encode(autoencoder, mirrored(small))], 1).half())
            details += [encode(autoencoder, image[None])[0].half() for image in shown]
        chosen = [_two_materials(rng, renders) for _ in range(batch)]
        joint.append(encode(autoencoder, np.stack([composite(rng, images[a], images[b]) for a, b in chosen])).half())
        pairs += chosen
    pictures, composites = torch.cat(single), torch.cat(joint)
    scale = scale or 1 / pictures.float().std().item()
    encoded = renders[: len(pictures)]
    captions = [caption(rng, render.material, render.look) for render in encoded for _ in range(CAPTIONS)]
    joint_captions = [
        joint_caption(rng, renders[a][1:], renders[b][1:]) for a, b in pairs for _ in range(JOINT_CAPTIONS)
    ]
    whole = torch.cat(scenes)
    scene_captions = [scene_caption(rng, *scene[1:4]) for scene in drawn[: len(whole)] for _ in range(CAPTIONS)]
    weights = np.array([EMPHASIS.get(r.material, 1.0) * EMPHASIS.get(r.look.kind, 1.0) for r in encoded])
    scene_weights = np.array([SCENE_EMPHASIS.get(scene.subject, 1.0) for scene in drawn[: len(whole)]])
    return TrainingLatents(
        pictures * scale,
        tokens(captions, CAPTIONS),
        weights / weights.sum(),
        composites * scale,
        tokens(joint_captions, JOINT_CAPTIONS),
        whole * scale,
        [part * scale for part in details],
        tokens(scene_captions, CAPTIONS),
        scene_weights / scene_weights.sum(),
        scale,
    )


def _two_materials(rng: np.random.Generator, renders: list[Render]) -> tuple[int, int]:
    while True:
        a, b = (int(i) for i in rng.integers(0, len(renders), 2))
        if renders[a].material != renders[b].material:
            return a, b

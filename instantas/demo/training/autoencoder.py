"""The autoencoder: diffusers' `AutoencoderTiny`, 8 times smaller latents of 4 channels, trained with a discriminator.

It has no normalisation layers, so what it makes of a place depends on the neighbourhood alone and large canvases can be
decoded in tiles.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from instantas.demo.training.stage import MovingAverage, Stage, set_learning_rate

CROP = 64
"""Side of a training crop in pixels."""

CONTEXT = 16
"""Pixels around a crop that the encoder sees too when only the decoder is trained."""

BATCH = 16


def make_autoencoder() -> Any:
    """An untrained `AutoencoderTiny` of the embedded model's shape, 0.8 M parameters."""
    from diffusers import AutoencoderTiny

    autoencoder = AutoencoderTiny(
        encoder_block_out_channels=(32, 32, 32, 32),
        decoder_block_out_channels=(48, 48, 48, 48),
        num_encoder_blocks=(1, 2, 2, 2),
        num_decoder_blocks=(3, 2, 2, 1),
        scaling_factor=1.0,
    )
    return autoencoder.to(memory_format=torch.channels_last)


class Discriminator(nn.Module):
    """Four convolutions that score overlapping patches (PatchGAN, Isola et al. 2017): the scores and the features."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(
            [
                nn.Conv2d(3, 32, 4, 2, 1),
                spectral_norm(nn.Conv2d(32, 64, 4, 2, 1)),
                spectral_norm(nn.Conv2d(64, 96, 3, 1, 1)),
            ]
        )
        self.score = nn.Conv2d(96, 1, 3, 1, 1)

    def forward(self, pictures: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        features = []
        for layer in self.layers:
            pictures = F.leaky_relu(layer(pictures), 0.2)
            features.append(pictures)
        return self.score(pictures), features


def gradient_loss(a: torch.Tensor, b: torch.Tensor, levels: int = 3) -> torch.Tensor:
    """Mean absolute difference of the gradients along both axes at three scales, plus that of the coarsest pictures."""
    loss = a.new_zeros(())
    for level in range(levels):
        if level:
            a, b = F.avg_pool2d(a, 2), F.avg_pool2d(b, 2)
        loss = loss + F.l1_loss(a.diff(dim=2), b.diff(dim=2)) + F.l1_loss(a.diff(dim=3), b.diff(dim=3))
    return loss + F.l1_loss(a, b)


Pictures = Sequence[Sequence[np.ndarray]]
"""Groups of uint8 pictures (h, w, 3) of any size; each group is shown as often as the others."""


def random_crops(rng: np.random.Generator, pictures: Pictures, side: int, mixed: float = 0.12) -> torch.Tensor:
    """(BATCH, 3, side, side) crops in -1..1, mirrored at random; a part of them shows two pictures with a border.

    Args:
        rng: source of the choices.
        pictures: what to crop.
        side: side of the crops in pixels.
        mixed: the share of crops with a border.
    """

    def crop() -> np.ndarray:
        group = pictures[int(rng.integers(len(pictures)))]
        image = group[int(rng.integers(len(group)))]
        y, x = rng.integers(0, image.shape[0] - side + 1, 2)
        part = image[y : y + side, x : x + side]
        return part[:, ::-1] if rng.random() < 0.5 else part

    def mixture() -> np.ndarray:
        y, x = np.mgrid[:side, :side].astype(np.float32) - side / 2
        angle = rng.uniform(0, 2 * np.pi)
        distance = np.cos(angle) * x + np.sin(angle) * y - rng.uniform(-side / 6, side / 6)
        second = np.clip(distance / rng.choice([1.0, 12.0]) + 0.5, 0, 1)[..., None]
        return crop() * (1 - second) + crop() * second

    crops = np.stack([mixture() if rng.random() < mixed else crop() for _ in range(BATCH)]).astype(np.float32)
    batch = torch.from_numpy(crops).permute(0, 3, 1, 2) / 127.5 - 1
    return batch.contiguous(memory_format=torch.channels_last)


def train_autoencoder(autoencoder: Any, pictures: Pictures, stage: Stage, rng: np.random.Generator) -> None:
    """Train encoder and decoder in place; the discriminator joins after 30 % of the time.

    The latents are kept near mean 0 and standard deviation 1, and get noise before they are decoded, so that the
    decoder forgives the diffusion model's small errors.
    """
    game = _Game(autoencoder.parameters(), learning_rate=1e-3)
    for done in stage:
        target = random_crops(rng, pictures, CROP)
        with torch.autocast("cpu", torch.bfloat16):
            latents = autoencoder.encoder(target)
            output = autoencoder.decoder(latents + 0.08 * torch.randn_like(latents))
        latents = latents.float()
        variance, mean = torch.var_mean(latents, (0, 2, 3))
        prior = 0.02 * (mean.square().sum() + (variance - 1).square().sum()) + 1e-3 * F.relu(latents.abs() - 3).mean()
        game.step(stage, done, output.float(), target, prior, adversarial_weight=0.1 * min(1.0, (done - 0.3) / 0.1))
    game.average.copy_to_parameters()


def train_decoder(autoencoder: Any, pictures: Pictures, stage: Stage, rng: np.random.Generator) -> None:
    """Train the decoder alone, in place, on crops whose surroundings the encoder sees; the latents do not change."""
    game = _Game(autoencoder.decoder.parameters(), learning_rate=5e-4)
    cell = CONTEXT // 8
    for done in stage:
        crops = random_crops(rng, pictures, CROP + 2 * CONTEXT)
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                latents = autoencoder.encoder(crops)[:, :, cell:-cell, cell:-cell]
            output = autoencoder.decoder(latents + 0.1 * torch.randn_like(latents))
        target = crops[:, :, CONTEXT:-CONTEXT, CONTEXT:-CONTEXT].contiguous(memory_format=torch.channels_last)
        game.step(stage, done, output.float(), target, torch.zeros(()), adversarial_weight=0.1 * min(1.0, done / 0.08))
    game.average.copy_to_parameters()


class _Game:
    """One step of the painter, then one of the discriminator (hinge loss), and the painter's moving average."""

    def __init__(self, parameters: Iterable[nn.Parameter], learning_rate: float):
        self.parameters = list(parameters)
        self.learning_rate = learning_rate
        self.discriminator = Discriminator()
        self.discriminator.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.painter_step = torch.optim.AdamW(self.parameters, lr=learning_rate, betas=(0.9, 0.99), weight_decay=1e-4)
        self.critic_step = torch.optim.AdamW(self.discriminator.parameters(), lr=4e-4, betas=(0.5, 0.95))
        self.average = MovingAverage(self.parameters, decay=0.995)

    def step(
        self,
        stage: Stage,
        done: float,
        output: torch.Tensor,
        target: torch.Tensor,
        extra_loss: torch.Tensor,
        adversarial_weight: float,
    ) -> None:
        """Lower `output`'s distance to `target`; a weight of 0 or less leaves the discriminator out."""
        set_learning_rate(self.painter_step, self.learning_rate, stage.step, done)
        error = F.l1_loss(output, target)
        loss = error + 0.5 * gradient_loss(output, target) + extra_loss
        if adversarial_weight > 0:
            with torch.autocast("cpu", torch.bfloat16):
                scores, features = self.discriminator(output)
                with torch.no_grad():
                    wanted = self.discriminator(target)[1]
            matching = torch.stack([F.l1_loss(a.float(), b.float()) for a, b in zip(features, wanted)]).mean()
            loss = loss + adversarial_weight * (3 * matching - scores.float().mean())
        self.painter_step.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.painter_step.step()
        self.average.update()
        if adversarial_weight > 0:
            with torch.autocast("cpu", torch.bfloat16):
                scores = self.discriminator(torch.cat([target, output.detach()]))[0].float()
            real, painted = scores.chunk(2)
            self.critic_step.zero_grad()
            (F.relu(1 - real).mean() + F.relu(1 + painted).mean()).backward()
            self.critic_step.step()
        stage.record(error=error.item())

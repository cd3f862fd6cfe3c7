"""The diffusion model: a small UNet with cross-attention and a small CLIP text encoder, trained together from scratch.

v-prediction (Salimans and Ho 2022, "Progressive Distillation for Fast Sampling of Diffusion Models") on Stable
Diffusion's noise schedule, with some captions dropped for classifier-free guidance.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from instantas.demo.training.latents import WINDOW, TrainingLatents
from instantas.demo.training.stage import MovingAverage, Stage, set_learning_rate
from instantas.demo.training.tokenizer import MAX_LENGTH

SINGLE, JOINT, WHOLE, DETAILS = 5, 2, 18, 3
"""Windows of a step: of one material, of two, whole scenes, and parts of larger scenes."""

BATCH = SINGLE + JOINT + WHOLE + DETAILS

DETAILS_UNTIL = 0.5
"""Parts of scenes are shown at the schedule's earlier, less noisy time steps alone: where the noise hides nearly all, a
window is a whole scene, and what a part's caption does not say is already in the picture."""

DROPPED_CAPTIONS = 0.12
LEARNING_RATE = 6e-4

SCHEDULER = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "timestep_spacing": "leading",
}
"""The configuration of diffusers' `DDIMScheduler`."""


def make_unet() -> Any:
    """An untrained `UNet2DConditionModel` of the embedded model's shape, 2.8 M parameters."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=WINDOW,
        block_out_channels=(64, 96),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        cross_attention_dim=64,
        attention_head_dim=2,
        norm_num_groups=16,
    )


def make_text_encoder(tokenizer: Any) -> Any:
    """An untrained `CLIPTextModel` of two layers for the tokenizer's vocabulary."""
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=192,
        projection_dim=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=MAX_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


class MatmulAttention:
    """Attention of two matrix products, for training: on the CPU the fused attention's backward pass is slower."""

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
    ) -> torch.Tensor:
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states

        def heads(projected: torch.Tensor) -> torch.Tensor:
            return projected.unflatten(2, (attn.heads, -1)).transpose(1, 2)

        query, key, value = (heads(attn.to_q(hidden_states)), heads(attn.to_k(context)), heads(attn.to_v(context)))
        weights = (query @ key.transpose(2, 3) * attn.scale).softmax(-1).to(value.dtype)
        return attn.to_out[0]((weights @ value).transpose(1, 2).flatten(2))


def draw_batch(
    data: TrainingLatents, empty: torch.Tensor, rng: np.random.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents (BATCH, 4, WINDOW, WINDOW) and their caption tokens (BATCH, MAX_LENGTH); some captions are `empty`.

    The last DETAILS are parts of scenes.
    """

    def crop(latents: torch.Tensor) -> torch.Tensor:
        y, x = rng.integers(0, latents.shape[-1] - WINDOW + 1, 2)
        return latents[:, y : y + WINDOW, x : x + WINDOW]

    def caption(tokens: torch.Tensor, chosen: np.ndarray) -> torch.Tensor:
        return tokens[chosen, rng.integers(0, tokens.shape[1], len(chosen))]

    singles = rng.choice(len(data.single), SINGLE, p=data.weights)
    joints = rng.integers(0, len(data.joint), JOINT)
    scenes, details = np.split(rng.choice(len(data.scenes), WHOLE + DETAILS, p=data.scene_weights), [WHOLE])
    crops = [
        *(crop(data.single[i, rng.integers(2)]) for i in singles),
        *(crop(data.joint[i]) for i in joints),
        *(data.scenes[i, rng.integers(2)] for i in scenes),
        *(crop(data.details[i]) for i in details),
    ]
    captions = [
        caption(data.single_tokens, singles),
        caption(data.joint_tokens, joints),
        caption(data.scene_tokens, scenes),
        caption(data.scene_tokens, details),
    ]
    dropped = torch.from_numpy(rng.random((BATCH, 1)) < DROPPED_CAPTIONS)
    return torch.stack(crops).float(), torch.where(dropped, empty, torch.cat(captions))


def add_noise(latents: torch.Tensor, alphas_cumprod: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(noisy latents, time steps, wanted v). The time steps of a batch are spread evenly, the last DETAILS' halved.

    Sampling starts from pure noise although the schedule's last step still holds a little of the picture; a third of
    the samples at the last steps are pure noise too, or dark and bright prompts would lose their brightness.
    """
    count = len(latents)
    steps = len(alphas_cumprod)
    share = (torch.rand(1) + torch.randperm(count) / count) % 1
    share[count - DETAILS :] *= DETAILS_UNTIL
    t = (share * steps).long().clamp(max=steps - 1)
    signal = alphas_cumprod[t].sqrt().view(-1, 1, 1, 1)
    noise_level = (1 - alphas_cumprod[t]).sqrt().view(-1, 1, 1, 1)
    noise = torch.randn_like(latents)
    pure = ((t >= 0.88 * steps) & (torch.rand(count) < 0.35)).view(-1, 1, 1, 1)
    noisy = torch.where(pure, noise, signal * latents + noise_level * noise)
    return noisy, t, signal * noise - noise_level * latents


def train_diffusion(
    unet: Any, text_encoder: Any, tokenizer: Any, data: TrainingLatents, stage: Stage, rng: np.random.Generator
) -> None:
    """Train the UNet and the text encoder in place; they end as the moving averages of their weights."""
    from diffusers import DDIMScheduler
    from diffusers.models.attention_processor import AttnProcessor2_0

    alphas_cumprod = DDIMScheduler(**SCHEDULER).alphas_cumprod
    empty = tokenizer("", padding="max_length", max_length=MAX_LENGTH, return_tensors="pt").input_ids
    unet.set_attn_processor(MatmulAttention())
    parameters = list(itertools.chain(unet.parameters(), text_encoder.parameters()))
    average = MovingAverage(parameters, decay=0.999)
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    for done in stage:
        set_learning_rate(optimizer, LEARNING_RATE, stage.step, done, warmup=200)
        latents, tokens = draw_batch(data, empty, rng)
        noisy, t, wanted = add_noise(latents, alphas_cumprod)
        with torch.autocast("cpu", torch.bfloat16):
            predicted = unet(noisy, t, text_encoder(tokens)[0], return_dict=False)[0]
        loss = F.mse_loss(predicted.float(), wanted)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        average.update()
        stage.record(loss=loss.item())
    average.copy_to_parameters()
    unet.set_attn_processor(AttnProcessor2_0())

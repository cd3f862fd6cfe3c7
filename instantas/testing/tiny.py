"""Tiny Stable Diffusion pipelines with random weights, for tests: no download, milliseconds an evaluation."""

from __future__ import annotations

import functools
import inspect
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    ControlNetModel,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

WINDOW = 16  # native window of the tiny UNets, in latent cells
CELL = 8  # pixels of a latent cell
_WORDS = "a an the of red green blue brick wall grass water sky stone wood photo picture next to and".split()


@functools.cache
def tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer that knows single letters and a few words, 16 tokens long."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,-!"
    tokens = [*letters, *(letter + "</w>" for letter in letters)]
    merges = []
    for word in _WORDS:
        pieces = [*word[:-1], word[-1] + "</w>"]
        while len(pieces) > 1:
            merge = f"{pieces[0]} {pieces[1]}"
            pieces = [pieces[0] + pieces[1], *pieces[2:]]
            if merge not in merges:
                merges.append(merge)
                tokens.append(pieces[0])
    tokens = list(dict.fromkeys([*tokens, "<|startoftext|>", "<|endoftext|>"]))
    vocabulary = {token: i for i, token in enumerate(tokens)}
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "vocab.json").write_text(json.dumps(vocabulary))
        Path(folder, "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
        return CLIPTokenizer.from_pretrained(folder, model_max_length=16)


def text_encoder(width: int = 32, projected: bool = False) -> CLIPTextModel | CLIPTextModelWithProjection:
    """A CLIP text encoder of two layers."""
    vocabulary = tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(vocabulary),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        bos_token_id=vocabulary.bos_token_id,
        eos_token_id=vocabulary.eos_token_id,
        pad_token_id=vocabulary.pad_token_id,
    )
    torch.manual_seed(1)
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config).eval()


def unet(cross_attention_dim: int = 32, **config: Any) -> UNet2DConditionModel:
    """A UNet of two levels, cross-attention at 16x16 and 8x8."""
    torch.manual_seed(2)
    return UNet2DConditionModel(
        **dict(
            sample_size=WINDOW,
            block_out_channels=(16, 32),
            layers_per_block=1,
            norm_num_groups=8,
            attention_head_dim=2,
            cross_attention_dim=cross_attention_dim,
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        )
        | config
    ).eval()


def autoencoder(tiny: bool = False) -> AutoencoderKL | AutoencoderTiny:
    """AutoencoderKL of 8 pixels a cell, with attention in its middle as the real ones have; or an AutoencoderTiny."""
    torch.manual_seed(3)
    if tiny:
        channels = (8, 8, 8, 8)
        return AutoencoderTiny(encoder_block_out_channels=channels, decoder_block_out_channels=channels).eval()
    return AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        norm_num_groups=4,
        sample_size=WINDOW * CELL,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    ).eval()


def scheduler(prediction_type: str = "epsilon", kind: type = DDIMScheduler, **config: Any) -> Any:
    """A scheduler on Stable Diffusion's noise schedule."""
    if kind is DDIMScheduler:
        config = dict(set_alpha_to_one=False) | config
    if "clip_sample" in inspect.signature(kind).parameters:
        config = dict(clip_sample=False) | config
    if "steps_offset" in inspect.signature(kind).parameters:
        config = dict(steps_offset=1) | config
    noise = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000)
    return kind(**noise, prediction_type=prediction_type, **config)


def tiny_pipeline(
    prediction_type: str = "epsilon",
    cross_attention_dim: int = 32,
    kind: type = StableDiffusionPipeline,
    **components: Any,
) -> Any:
    """A Stable Diffusion pipeline of random weights, always the same; native 128x128 px. Components can be replaced."""
    components = {
        "vae": autoencoder(),
        "text_encoder": text_encoder(cross_attention_dim),
        "tokenizer": tokenizer(),
        "unet": unet(cross_attention_dim),
        "scheduler": scheduler(prediction_type),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    } | components
    pipe = kind(**components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_xl_pipeline(prediction_type: str = "epsilon", **config: Any) -> StableDiffusionXLPipeline:
    """The same, shaped like SDXL: two text encoders, pooled embeddings and six time ids. config: of the UNet."""
    pipe = StableDiffusionXLPipeline(
        vae=autoencoder(),
        text_encoder=text_encoder(32),
        text_encoder_2=text_encoder(32, projected=True),
        tokenizer=tokenizer(),
        tokenizer_2=tokenizer(),
        unet=unet(
            64,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=32 + 6 * 8,
            **config,
        ),
        scheduler=scheduler(prediction_type),
        add_watermarker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_controlnet(cross_attention_dim: int = 32) -> ControlNetModel:
    """A ControlNet for `unet`, whose last layers are not zero so that it has an effect."""
    net = ControlNetModel.from_unet(unet(cross_attention_dim), conditioning_embedding_out_channels=(8, 8, 8, 8))
    torch.manual_seed(4)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if "controlnet_down" in name or "controlnet_mid" in name or "conv_out" in name:
                parameter.normal_(std=0.1)
    return net.eval()

"""What a ComfyUI checkout is tried with: a tiny UNet shaped like Stable Diffusion 1.5's, of random weights."""

import torch

WINDOW = 16  # cells that the tiny model is taken to know
WIDTH = 32  # of its embeddings
UNET = dict(
    image_size=WINDOW,
    in_channels=4,
    out_channels=4,
    model_channels=32,
    num_res_blocks=[1, 1],
    channel_mult=(1, 2),
    transformer_depth=[1, 1],
    transformer_depth_middle=1,
    transformer_depth_output=[1, 1, 1, 1],
    context_dim=WIDTH,
    num_heads=2,
    use_spatial_transformer=True,
    use_linear_in_transformer=False,
    legacy=False,
    adm_in_channels=None,
    use_temporal_attention=False,
    dtype=torch.float32,
)


def with_random_weights(module, seed=0, std=0.05):
    """ComfyUI leaves memory as it is found, for weights that are loaded."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.normal_(std=std, generator=generator)
            if name.endswith("weight") and parameter.dim() == 1:
                parameter += 1
    return module.eval().requires_grad_(False)


def prompt(seed, tokens=7, **options):
    """Conditioning, as a text encoder's node gives it."""
    return [[noise(tokens, WIDTH, seed=seed)[0, :1], options]]


def noise(height, width, batch=1, seed=9, channels=4):
    return torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(seed))

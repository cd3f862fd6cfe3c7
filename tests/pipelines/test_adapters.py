"""IP-Adapters against diffusers' own pipelines, and on canvases of several windows."""

import diffusers
import pytest
import torch
from diffusers.image_processor import IPAdapterMaskProcessor
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

from instantas.pipelines.pipeline import InstantASPipeline
from instantas.testing import tiny

NATIVE = tiny.WINDOW * tiny.CELL
WIDTH = 32  # of the embeddings of pictures


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed))


def image_encoder():
    torch.manual_seed(6)
    config = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        projection_dim=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
    )
    return CLIPVisionModelWithProjection(config).eval()


def load_adapters(pipe, number=1, face=False):
    """IP-Adapters of random weights, loaded as diffusers loads them."""
    unet, states = pipe.unet, []
    cross = unet.config.cross_attention_dim
    for adapter in range(number):
        state, source = {}, seeded(10 + adapter)
        for key, processor in enumerate(unet.attn_processors, 0):
            if "attn2" not in processor:
                continue
            layer = unet.get_submodule(processor.removesuffix(".processor"))
            for name in ("to_k_ip", "to_v_ip"):
                state[f"{key}.{name}.weight"] = torch.randn(layer.inner_dim, cross, generator=source)
        if face:
            hidden = 2 * WIDTH
            projection = {
                "proj.0.weight": torch.randn(hidden, WIDTH, generator=source) * 0.2,
                "proj.0.bias": torch.zeros(hidden),
                "proj.2.weight": torch.randn(4 * cross, hidden, generator=source) * 0.2,
                "proj.2.bias": torch.zeros(4 * cross),
                "norm.weight": torch.ones(cross),
                "norm.bias": torch.zeros(cross),
            }
        else:
            projection = {
                "proj.weight": torch.randn(4 * cross, WIDTH, generator=source) * 0.2,
                "proj.bias": torch.zeros(4 * cross),
                "norm.weight": torch.ones(cross),
                "norm.bias": torch.zeros(cross),
            }
        states.append({"image_proj": projection, "ip_adapter": state})
    unet._load_ip_adapter_weights(states)
    return pipe


def consistent():
    return tiny.tiny_pipeline(
        kind=diffusers.LatentConsistencyModelPipeline,
        unet=tiny.unet(time_cond_proj_dim=8),
        scheduler=tiny.scheduler(kind=diffusers.LCMScheduler),
    )


def controlled():
    return tiny.tiny_pipeline(kind=diffusers.StableDiffusionControlNetPipeline, controlnet=tiny.tiny_controlnet())


PIPELINES = {"sd": tiny.tiny_pipeline, "xl": tiny.tiny_xl_pipeline, "lcm": consistent, "control": controlled}


def paint(pipe, seed=0, **call):
    call = dict(prompt="wall", num_inference_steps=3, guidance_scale=4.0, output_type="latent") | call
    if isinstance(pipe.unet, torch.nn.Module) and hasattr(pipe, "controlnet"):
        call |= dict(image=torch.ones(1, 3, NATIVE, NATIVE))
    return pipe(**call, generator=seeded(seed)).images


def difference(a, b):
    return float((a - b).norm() / b.norm())


def both(theirs, **call):
    return [paint(pipe, **call) for pipe in (InstantASPipeline.from_pipe(theirs), theirs)]


@pytest.mark.parametrize("name", PIPELINES)
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_embedded_pictures(name, scale):
    theirs = PIPELINES[name]()
    plain = paint(theirs, guidance_scale=scale)
    ours = InstantASPipeline.from_pipe(theirs)
    load_adapters(theirs)  # after ours was made
    rows = 2 if scale > 1 and name != "lcm" else 1
    call = dict(ip_adapter_image_embeds=[random(rows, 1, WIDTH)], guidance_scale=scale, num_images_per_prompt=2)
    call |= dict(prompt=["wall", "grass"])
    got, wanted = paint(ours, **call), paint(theirs, **call)
    assert difference(got, wanted) < 1e-4 and difference(wanted[:1], plain) > 1e-2


def test_pictures_are_embedded():
    encoder = CLIPImageProcessor(crop_size=32, size=32)
    theirs = load_adapters(tiny.tiny_pipeline(feature_extractor=encoder, image_encoder=image_encoder()))
    picture = (random(32, 32, 3).clamp(0, 1).numpy() * 255).astype("uint8")
    got, wanted = both(theirs, ip_adapter_image=picture, prompt=["wall", "grass"])
    assert difference(got, wanted) < 1e-4


def test_several_adapters_with_scales_of_their_own():
    theirs = load_adapters(tiny.tiny_pipeline(), number=2)
    theirs.set_ip_adapter_scale([0.3, 0.8])
    embeds = [random(2, 1, WIDTH), random(2, 3, WIDTH, seed=1)]
    got, wanted = both(theirs, ip_adapter_image_embeds=embeds)
    assert difference(got, wanted) < 1e-4


def test_embedded_faces():
    theirs = load_adapters(tiny.tiny_pipeline(), face=True)
    got, wanted = both(theirs, ip_adapter_image_embeds=[random(2, 1, 1, WIDTH)])
    assert difference(got, wanted) < 1e-4


def test_a_cutoff_of_the_scale():
    theirs = load_adapters(tiny.tiny_pipeline())
    call, made = dict(ip_adapter_image_embeds=[random(2, 1, WIDTH)]), []
    for pipe in (InstantASPipeline.from_pipe(theirs), theirs):
        theirs.set_ip_adapter_scale(1.0)
        cutoff = diffusers.callbacks.IPAdapterScaleCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=0)
        made.append(paint(pipe, callback_on_step_end=cutoff, **call))
    theirs.set_ip_adapter_scale(1.0)
    assert difference(*made) < 1e-4 < difference(made[1], paint(theirs, **call))


@pytest.mark.parametrize("name, scale, rows", [("sd", 4.0, 4), ("sd", 1.0, 2), ("lcm", 4.0, 2), ("xl", 1.0, 3)])
def test_several_rows_belong_to_every_picture(name, scale, rows):
    theirs = load_adapters(PIPELINES[name]())
    embeds = [random(rows, 1, WIDTH)]
    got, wanted = both(theirs, ip_adapter_image_embeds=embeds, guidance_scale=scale, prompt=["wall", "grass"])
    assert difference(got, wanted) < 1e-4


def halves(height, width):
    """Masks of the left half and of the right."""
    left = torch.zeros(height, width)
    left[:, : width // 2] = 1
    return IPAdapterMaskProcessor().preprocess([left, 1 - left], height=height, width=width)[:, 0][None]


@pytest.mark.parametrize("size", [(NATIVE, NATIVE), (2 * NATIVE, 2 * NATIVE)])  # of the masks
def test_masks_in_one_window(size):
    theirs = load_adapters(tiny.tiny_pipeline())
    theirs.set_ip_adapter_scale([[0.7, 0.9]])
    call = dict(ip_adapter_image_embeds=[random(2, 2, WIDTH)])
    masks, swapped = ({"ip_adapter_masks": [halves(*size)[:, order]]} for order in ([0, 1], [1, 0]))
    got, wanted = both(theirs, cross_attention_kwargs=masks, **call)
    assert difference(got, wanted) < 1e-4 < difference(paint(theirs, cross_attention_kwargs=swapped, **call), wanted)


@pytest.mark.parametrize("bridging", ["none", "dilated"])
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_every_window_has_its_part_of_the_masks(bridging, scale):
    theirs = load_adapters(tiny.tiny_pipeline())
    ours = InstantASPipeline.from_pipe(theirs)
    embeds, rows = random(2, 2, WIDTH), slice(None) if scale > 1 else slice(1, None)
    wide = dict(height=NATIVE, width=2 * NATIVE, bridging=bridging, guidance_scale=scale)
    masks = {"ip_adapter_masks": [halves(NATIVE, 2 * NATIVE)]}
    got = paint(ours, **wide, ip_adapter_image_embeds=[embeds[rows]], cross_attention_kwargs=masks)
    left, right = (paint(ours, **wide, ip_adapter_image_embeds=[embeds[rows, i : i + 1]]) for i in (0, 1))
    if bridging == "none":
        assert difference(got[..., :16], left[..., :16]) < 1e-4
        assert difference(got[..., 16:], right[..., 16:]) < 1e-4
    assert difference(left, right) > 1e-2 and difference(got, left) > 1e-2


class SecondEmbedding(torch.nn.Module):
    """A projection that looks at an embedding set on it beside the one it is given, as FaceID Plus does."""

    def __init__(self, projection, embeds):
        super().__init__()
        self.projection, self.clip_embeds = projection, embeds

    def forward(self, embeds):
        return self.projection(embeds + self.clip_embeds.flatten(0, 1))


def test_every_window_has_its_rows_of_what_is_set_on_a_projection():
    theirs = load_adapters(tiny.tiny_pipeline())
    layers = theirs.unet.encoder_hid_proj.image_projection_layers
    layers[0] = SecondEmbedding(layers[0], random(4, 1, WIDTH, seed=2))
    call = dict(prompt=["wall", "grass"], ip_adapter_image_embeds=[random(2, 1, WIDTH)])
    got, wanted = both(theirs, **call)
    assert difference(got, wanted) < 1e-4
    ours = InstantASPipeline.from_pipe(theirs)
    wide = paint(ours, height=NATIVE, width=2 * NATIVE, bridging="none", window_batch_size=3, **call)
    latents = torch.randn(2, 4, 16, 32, generator=seeded())
    for part in (slice(0, 16), slice(16, 32)):
        alone = paint(ours, latents=latents[..., part].contiguous(), **call)
        assert difference(wide[..., part], alone) < 1e-4
    assert len(layers[0].clip_embeds) == 4


@pytest.mark.parametrize(
    "loaded, error, match, call",
    [
        (True, ValueError, "ip_adapter_image: expected a picture, or ip_adapter_image_embeds", {}),
        (True, ValueError, "ip_adapter_image: expected ip_adapter_image_embeds, as the pipeline has no image_encoder",
         dict(ip_adapter_image=torch.zeros(1, 3, 8, 8))),
        (True, ValueError, "ip_adapter_image: .* got both",
         dict(ip_adapter_image=torch.zeros(1, 3, 8, 8), ip_adapter_image_embeds=[random(2, 1, WIDTH)])),
        (True, ValueError, "ip_adapter_image_embeds: expected one for each of 1",
         dict(ip_adapter_image_embeds=[random(2, 1, WIDTH)] * 2)),
        (True, ValueError, "ip_adapter_image_embeds: expected an even number of rows",
         dict(ip_adapter_image_embeds=[random(1, 1, WIDTH)])),
        (True, ValueError, "ip_adapter_image_embeds: expected some rows",
         dict(ip_adapter_image_embeds=[random(0, 1, WIDTH)], guidance_scale=1.0)),
        (True, TypeError, "ip_adapter_image_embeds: expected a list of tensors",
         dict(ip_adapter_image_embeds=random(2, 1, WIDTH))),
        (True, ValueError, "ip_adapter_image_embeds: expected finite",
         dict(ip_adapter_image_embeds=[random(2, 1, WIDTH) * torch.nan])),
        (True, ValueError, "cross_attention_kwargs: expected ip_adapter_masks of shape",
         dict(ip_adapter_image_embeds=[random(2, 1, WIDTH)],
              cross_attention_kwargs={"ip_adapter_masks": [torch.zeros(3, 3)]})),
        (False, ValueError, "ip_adapter_image: expected None", dict(ip_adapter_image=torch.zeros(1, 3, 8, 8))),
        (False, ValueError, "ip_adapter_image_embeds: expected None",
         dict(ip_adapter_image_embeds=[random(2, 1, WIDTH)])),
        (False, ValueError, "cross_attention_kwargs: expected no ip_adapter_masks",
         dict(cross_attention_kwargs={"ip_adapter_masks": [halves(8, 8)]})),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_before_any_evaluation(loaded, error, match, call):
    theirs = load_adapters(tiny.tiny_pipeline()) if loaded else tiny.tiny_pipeline()
    theirs.unet.register_forward_pre_hook(lambda *args: pytest.fail("the network was evaluated"))
    with pytest.raises(error, match=match):
        paint(InstantASPipeline.from_pipe(theirs), **call)

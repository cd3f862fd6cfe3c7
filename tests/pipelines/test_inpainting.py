"""Painting inside of a mask: at one native window diffusers' inpainting, at any other size the same through windows."""

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    ControlNetModel,
    StableDiffusionControlNetImg2ImgPipeline,
    StableDiffusionControlNetInpaintPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionXLControlNetImg2ImgPipeline,
    StableDiffusionXLControlNetInpaintPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
)
from PIL import Image, ImageDraw, ImageOps

from instantas import InstantASPipeline, Region
from instantas.pipelines.pictures import read_masks
from instantas.sampling.bridging import evaluations
from instantas.testing.tiny import scheduler, tiny_controlnet, tiny_pipeline, tiny_xl_pipeline, unet
from tests.pipelines.starting import NATIVE, close, latents_of, photo, seeded


def mask(box=(21, 40, 90, 99), width=NATIVE, height=NATIVE):
    drawn = Image.new("L", (width, height))
    ImageDraw.Draw(drawn).rectangle(box, fill="white")
    return drawn


def of(pipe, kind=StableDiffusionInpaintPipeline, **more):
    """diffusers' own pipeline of a kind, of the same components."""
    more |= dict(add_watermarker=False) if "XL" in kind.__name__ else dict(requires_safety_checker=False)
    theirs = kind(**pipe.components | more)
    theirs.set_progress_bar_config(disable=True)
    return theirs


def xl_controlnet():
    net = ControlNetModel.from_unet(tiny_xl_pipeline().unet, conditioning_embedding_out_channels=(8, 8, 8, 8))
    torch.manual_seed(4)
    for name, parameter in net.named_parameters():
        if "controlnet_down" in name or "controlnet_mid" in name or "conv_out" in name:
            parameter.data.normal_(std=0.1)
    return net.eval()


# At one native window


@pytest.mark.parametrize(
    "kind, strength, channels",
    [
        ("DDIM", 1.0, 4),
        ("DDIM", 0.5, 9),
        ("EulerDiscrete", 0.5, 4),
        ("EulerDiscrete", 1.0, 9),
        ("EulerAncestralDiscrete", 0.5, 4),
        ("DPMSolverMultistep", 1.0, 4),
        ("HeunDiscrete", 0.5, 4),
        ("PNDM", 1.0, 9),
        ("LCM", 0.5, 4),
    ],
)
def test_diffusers_inpainting(kind, strength, channels):
    config = dict(skip_prk_steps=True) if kind == "PNDM" else {}
    chosen = scheduler(kind=getattr(diffusers, f"{kind}Scheduler"), **config)
    pipe = tiny_pipeline(scheduler=chosen, unet=unet(in_channels=channels))
    given = dict(image=photo(), mask_image=mask(), strength=strength, num_inference_steps=4)
    drawn = seeded(), seeded()
    close(*(latents_of(p, **given, generator=g) for p, g in zip((InstantASPipeline.from_pipe(pipe), of(pipe)), drawn)))
    assert torch.equal(*(generator.get_state() for generator in drawn))


@pytest.mark.parametrize("channels, prediction_type", [(4, "epsilon"), (9, "v_prediction")])
def test_diffusers_inpainting_of_sdxl(channels, prediction_type):
    pipe = tiny_xl_pipeline(prediction_type, in_channels=channels)
    given = dict(image=photo(), mask_image=mask(), num_inference_steps=4, guidance_rescale=0.5)
    close(
        *(
            latents_of(p, **given)
            for p in (InstantASPipeline.from_pipe(pipe), of(pipe, StableDiffusionXLInpaintPipeline))
        )
    )


@pytest.mark.parametrize("channels", [4, 9])
def test_a_guidance_interval_is_a_callback_that_sets_the_scale_to_1(channels):
    pipe = tiny_pipeline(unet=unet(in_channels=channels))
    names = ["prompt_embeds", "mask", *(["masked_image_latents"] if channels == 9 else [])]

    def conditional(pipe, step, timestep, tensors):
        if step != 1:
            return {}
        pipe._guidance_scale = 1.0
        return {name: tensors[name].chunk(2)[1] for name in names}

    given = dict(image=photo(), mask_image=mask(), num_inference_steps=4)
    told = dict(callback_on_step_end=conditional, callback_on_step_end_tensor_inputs=names)
    ours = latents_of(InstantASPipeline.from_pipe(pipe), **given, guidance_interval=(0.0, 0.5))
    close(ours, latents_of(of(pipe), **given, **told))


@pytest.mark.parametrize("channels", [4, 9])
def test_diffusers_inpainting_with_a_controlnet(channels):
    net = tiny_controlnet()
    pipe = tiny_pipeline(kind=StableDiffusionControlNetPipeline, controlnet=net, unet=unet(in_channels=channels))
    given = dict(image=photo(), mask_image=mask(), control_image=photo(seed=1), strength=0.6, num_inference_steps=4)
    given |= dict(controlnet_conditioning_scale=0.9)  # 1 by default from text, 0.5 of diffusers' inpainting
    theirs = of(pipe, StableDiffusionControlNetInpaintPipeline)
    close(*(latents_of(p, **given) for p in (InstantASPipeline.from_pipe(pipe), theirs)))


def test_several_pictures_masks_and_generators():
    pipe = tiny_pipeline()
    ours, theirs = InstantASPipeline.from_pipe(pipe), of(pipe)
    two = dict(prompt=["red brick", "grass"], image=[photo(), photo(seed=1)], num_inference_steps=3)
    both = dict(mask_image=[mask(), mask((0, 0, 60, 50))])
    close(*(latents_of(p, **two, **both, generator=[seeded(3), seeded(4)]) for p in (ours, theirs)))
    close(*(latents_of(p, **two, mask_image=mask(), strength=0.7) for p in (ours, theirs)))
    one = dict(two, image=photo(), mask_image=mask(), strength=0.7)
    close(*(latents_of(p, **one, generator=[seeded(3), seeded(4)]) for p in (ours, theirs)))


def test_the_pipeline_of_a_task_and_its_strength(tmp_path):
    tiny_pipeline().save_pretrained(tmp_path)
    given = dict(image=photo(), num_inference_steps=5)
    for task, more in (("image-to-image", {}), ("inpainting", dict(mask_image=mask()))):
        ours = InstantASPipeline.from_pretrained(tmp_path, task=task)
        ours.set_progress_bar_config(disable=True)
        close(latents_of(ours, **given, **more), latents_of(ours.pipe, **given, **more))
        with pytest.raises(ValueError, match=f"^{'mask_image' if more else 'image'}: expected a"):
            ours("grass", image=photo() if more else None)
    with pytest.raises(
        ValueError, match="task: expected one of text-to-image, image-to-image, inpainting, got 'video'"
    ):
        InstantASPipeline.from_pretrained(tmp_path, task="video")


@pytest.mark.parametrize(
    "kind, net, xl",
    [
        (StableDiffusionXLImg2ImgPipeline, False, True),
        (StableDiffusionControlNetImg2ImgPipeline, True, False),
        (StableDiffusionXLInpaintPipeline, False, True),
        (StableDiffusionControlNetInpaintPipeline, True, False),
        (StableDiffusionXLControlNetImg2ImgPipeline, True, True),
        (StableDiffusionXLControlNetInpaintPipeline, True, True),
    ],
)
def test_pipelines_that_start_from_pictures_are_held(kind, net, xl):
    """By their own arguments and defaults, their callbacks' tensors included."""
    more = dict(controlnet=xl_controlnet() if xl else tiny_controlnet()) if net else {}
    theirs = of(tiny_xl_pipeline() if xl else tiny_pipeline(), kind, **more)
    given = dict(image=photo(), num_inference_steps=5)
    given |= dict(mask_image=mask()) if "Inpaint" in kind.__name__ else {}
    given |= dict(control_image=photo(seed=1)) if net else {}
    seen: list = []
    names = [n for n in kind._callback_tensor_inputs if not n.startswith(("negative", "masked", "latents"))]

    def look(pipe, step, timestep, tensors):
        seen.append({name: tensors[name].clone() for name in names})
        return {}

    look_at = dict(callback_on_step_end=look, callback_on_step_end_tensor_inputs=names)
    close(*(latents_of(p, **given, **look_at) for p in (InstantASPipeline.from_pipe(theirs), theirs)))
    ours, their_own = seen[: len(seen) // 2], seen[len(seen) // 2 :]
    for mine, own in zip(ours, their_own, strict=True):
        for name in names:
            close(mine[name].float(), own[name].float())


# At any size


BRIDGES = ["none", "shift", "economy", "centred", "moments", "dilated"]


@pytest.mark.parametrize("bridging, channels", [*((b, 4) for b in BRIDGES), ("shift", 9), ("dilated", 9)])
def test_what_the_mask_leaves_is_the_picture(bridging, channels):
    """Bit for bit, in pixels and in latents; and windows that hold nothing to be painted are not evaluated."""
    pipe = tiny_pipeline(unet=unet(in_channels=channels))
    ours, picture, where = InstantASPipeline.from_pipe(pipe), photo(420, 200), mask((30, 40, 90, 120), 420, 200)
    given = dict(image=picture, mask_image=where, bridging=bridging, num_inference_steps=6)
    with counted(ours.unet) as places:
        painted = ours("grass", **given, generator=seeded()).images[0]
    kept = np.asarray(where) < 128
    source, result = np.asarray(picture), np.asarray(painted)
    assert (result[kept] == source[kept]).all() and (result[~kept] != source[~kept]).mean() > 0.5
    plan = ours.plan(200, 420)
    whole, some = evaluations(bridging, plan, 6), evaluations(bridging, plan, 6, painted=cells_of(where, plan))
    assert sum(places) == some * 2 and (some < whole or bridging == "dilated")
    if bridging == "none":
        assert some == 6 * 2  # of 2 x 4 windows the two that the mask's 60 columns and 80 rows touch


def cells_of(where, plan):
    pixels = torch.from_numpy(np.asarray(where) >= 128)
    pixels = torch.nn.functional.pad(pixels.float(), (0, plan.width * 8 - pixels.shape[1], 0, 0)) > 0
    return pixels[::8, ::8]


class counted:
    """Windows that a network is evaluated on, call by call."""

    def __init__(self, network):
        self.network, self.places = network, []

    def __enter__(self):
        self.hook = self.network.register_forward_pre_hook(lambda _, args: self.places.append(len(args[0])))
        return self.places

    def __exit__(self, *error):
        self.hook.remove()


def test_a_large_picture_is_painted_where_its_part_would_be():
    """A mask inside of one window, whose picture is a native one of its own: the same windows, and nothing else."""
    pipe = tiny_pipeline()
    ours, given = InstantASPipeline.from_pipe(pipe), dict(num_inference_steps=3, bridging="none", output_type="latent")
    picture, where = photo(256, 128), mask((150, 20, 200, 90), 256, 128)
    with counted(ours.unet) as places:
        latents_of(ours, image=picture, mask_image=where, **given)
    assert places == [2, 2, 2]


@pytest.mark.parametrize("kind", ["pil", "np", "pt"])
def test_pixels_are_the_pictures_own_in_every_form(kind):
    ours = InstantASPipeline.from_pipe(tiny_pipeline())
    given = np.random.default_rng(0).random((130, 101, 3), dtype=np.float32)
    where = np.zeros((130, 101), dtype=bool)
    where[:60, :70] = True
    if kind == "pil":
        given = Image.fromarray((given * 255).astype(np.uint8))
    settings = dict(image=given, mask_image=where, output_type=kind, num_inference_steps=2, generator=seeded())
    result = ours("grass", **settings).images[0]
    result = result.permute(1, 2, 0).numpy() if kind == "pt" else np.asarray(result)
    np.testing.assert_array_equal(result[~where], np.asarray(given)[~where])


def test_masks_in_every_form_are_one():
    ours, drawn = InstantASPipeline.from_pipe(tiny_pipeline()), mask()
    grey = np.asarray(drawn)
    forms = [
        drawn.convert("1"),
        drawn.convert("RGB"),
        Image.merge("RGBA", [Image.new("L", drawn.size, 255)] * 3 + [drawn]),
        drawn.convert("P"),
        grey,
        grey > 127,
        (grey > 127).astype(np.uint8),
        grey[..., None] / 255.0,
        torch.from_numpy(grey > 127),
        torch.from_numpy(grey.copy())[None],
        torch.from_numpy(grey / np.float32(255.0))[None, None],
        [drawn],
        np.where(grey > 127, 0.5, 0.49).astype(np.float16),
        drawn.resize((64, 64), Image.Resampling.NEAREST).resize((128, 128), Image.Resampling.NEAREST),
    ]
    settings = dict(size=(128, 128), canvas=(128, 128), own=(128, 128), prompts=1)
    wanted = read_masks(ours.pipe, drawn, **settings)
    assert wanted.dtype == torch.bool and wanted.shape == (1, 1, 128, 128) and wanted.sum() == 70 * 60
    for form in forms[:-1]:
        assert torch.equal(read_masks(ours.pipe, form, **settings), wanted), form
    assert read_masks(ours.pipe, drawn.resize((256, 256), 0), **settings).sum() == pytest.approx(70 * 60, rel=0.1)


def test_masks_and_pictures_of_each_prompt_and_copies():
    ours = InstantASPipeline.from_pipe(tiny_pipeline())
    masks = [mask((0, 0, 50, 60)), mask((60, 60, 127, 127))]
    given = dict(prompt=["red brick", "grass"], image=[photo(), photo(seed=1)], mask_image=masks)
    images = ours(**given, num_images_per_prompt=2, num_inference_steps=2, generator=seeded()).images
    for picture, result in enumerate(images):
        kept = np.asarray(masks[picture // 2]) < 128
        np.testing.assert_array_equal(
            np.asarray(result)[kept], np.asarray(given["image"][picture // 2])[kept], err_msg=str(picture)
        )
    assert not np.array_equal(np.asarray(images[0]), np.asarray(images[1]))


def test_nothing_and_everything_to_be_painted():
    ours, full, empty = InstantASPipeline.from_pipe(tiny_pipeline()), np.ones((128, 300)), np.zeros((128, 300))
    for bridging in ("shift", "dilated+moments"):
        with counted(ours.unet) as places:
            given = dict(image=photo(300, 128), mask_image=empty, num_inference_steps=3, guidance_rescale=0.5)
            same = ours("grass", **given, bridging=bridging).images[0]
        assert not places and np.array_equal(np.asarray(same), np.asarray(photo(300, 128)))
    given = dict(image=photo(300, 128), strength=0.5)
    close(latents_of(ours, **given, mask_image=full), latents_of(ours, **given))


def test_regions_and_wraps_beside_a_mask():
    ours, where = InstantASPipeline.from_pipe(tiny_pipeline()), mask((0, 30, 20, 90), 256, 128)
    given = dict(image=photo(256, 128), mask_image=where, num_inference_steps=3)
    plain = latents_of(ours, **given)
    close(latents_of(ours, **given, regions=[Region("red brick", box=(0.0, 0.0, 1.0, 1.0))]), plain)
    other = latents_of(ours, **given, regions=[Region("grass", box=(0.0, 0.0, 0.5, 1.0))])
    assert not torch.allclose(other, plain) and torch.equal(other[..., 8:], plain[..., 8:])
    round_ = latents_of(ours, **given, wrap=(False, True))
    assert round_.isfinite().all() and not torch.allclose(round_, plain)
    strided = ours("grass", **given, method="multidiffusion", stride=8, generator=seeded()).images[0]
    assert np.array_equal(np.asarray(strided)[:, 21:], np.asarray(photo(256, 128))[:, 21:])


def test_a_run_that_is_stopped_keeps_the_picture():
    ours, where = InstantASPipeline.from_pipe(tiny_pipeline()), mask()

    def stop(pipe, step, timestep, tensors):
        pipe._interrupt = step == 1
        return {}

    given = dict(image=photo(), mask_image=where, num_inference_steps=4, callback_on_step_end=stop)
    stopped = np.asarray(ours("grass", **given, generator=seeded()).images[0])
    assert np.array_equal(stopped[:40], np.asarray(photo())[:40])


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "CMYK", "1"])
def test_pictures_of_other_modes(mode):
    picture = photo().convert("RGB").quantize(16) if mode == "P" else photo().convert(mode)
    ours = InstantASPipeline.from_pipe(tiny_pipeline())
    given = dict(image=picture, mask_image=mask(), num_inference_steps=1, generator=seeded())
    result = np.asarray(ours("grass", **given).images[0])
    assert np.array_equal(result[:40], np.asarray(picture.convert("RGB"))[:40])


def test_a_picture_lies_as_its_camera_was_held():
    ours, turned = InstantASPipeline.from_pipe(tiny_pipeline()), photo(96, 64)
    turned.getexif()[0x0112] = 6
    upright = ImageOps.exif_transpose(turned)
    given = dict(mask_image=mask((0, 0, 20, 20), 64, 96), num_inference_steps=1)
    result = ours("grass", image=turned, **given, generator=seeded()).images[0]
    assert result.size == (64, 96) and np.array_equal(np.asarray(result)[21:], np.asarray(upright)[21:])


def test_one_pixel():
    ours = InstantASPipeline.from_pipe(tiny_pipeline())
    dot, whole = Image.new("RGB", (1, 1), "red"), Image.new("L", (1, 1), 255)
    result = ours("grass", image=dot, mask_image=whole, num_inference_steps=1, generator=seeded()).images[0]
    assert result.size == (1, 1)


@pytest.mark.parametrize(
    "settings, error, message",
    [
        (dict(image=None), ValueError, "image: expected a picture"),
        (dict(strength=1.5), ValueError, "strength: expected 0 to 1, got 1.5"),
        (dict(strength=0), ValueError, "strength: expected at least"),
        (
            dict(mask_image=mask(width=64)),
            ValueError,
            "mask_image: expected the proportions of the picture, 128x128, got 64x128",
        ),
        (dict(mask_image="mask.png"), TypeError, "mask_image: expected masks"),
        (
            dict(mask_image=[mask()] * 3),
            ValueError,
            "mask_image: expected one mask, or one for each of 1 prompts, got 3",
        ),
        (dict(mask_image=np.full((128, 128), np.nan)), ValueError, "mask_image: expected finite values"),
        (dict(mask_image=np.full((128, 128), 255.0)), ValueError, "mask_image: expected values from 0 to 1"),
        (
            dict(mask_image=np.zeros((128, 128, 3))),
            ValueError,
            r"mask_image: expected the proportions of the picture, 128x128, got 3x128 in an array \(128, 128, 3\)",
        ),
        (
            dict(mask_image=[]),
            ValueError,
            "mask_image: expected one mask, or one for each of 1 prompts, got 0",
        ),
        (dict(mask_image=torch.zeros(1, 3, 128, 128)), ValueError, r"mask_image: expected \(height, width\)"),
        (
            dict(mask_image=np.zeros((128, 128), np.int32)),
            TypeError,
            "mask_image: expected floats from 0 to 1 or uint8",
        ),
        (dict(mask_image=Image.new("I;16", (128, 128))), ValueError, "mask_image: expected a picture of 8 bits"),
        (dict(mask_image=mask((9, 9, 12, 12))), ValueError, "mask_image: expected one that holds the upper left pixel"),
        (dict(image=Image.new("I;16", (128, 128))), ValueError, "image: expected a picture of 8 bits a channel"),
        (dict(image=Image.new("F", (128, 128))), ValueError, "image: expected a picture of 8 bits a channel"),
        (dict(image=np.full((128, 128, 3), 255.0)), ValueError, "image: expected values from 0 to 1, got 255"),
        (dict(image=np.zeros((128, 128, 3), np.uint16)), TypeError, "image: expected floats from 0 to 1 or uint8"),
        (dict(image=[photo()] * 2), ValueError, "image: expected one picture, or one for each of 1 prompts, got 2"),
        (dict(latents=torch.zeros(1, 4, 16, 16)), ValueError, "image: expected a picture in place of latents"),
    ],
)
def test_bad_input_is_named_before_any_network_is_evaluated(settings, error, message):
    pipe = tiny_pipeline()
    for network in (pipe.unet, pipe.vae, pipe.text_encoder):
        network.register_forward_pre_hook(lambda *args: pytest.fail("a network was evaluated"))
    with pytest.raises(error, match=message):
        InstantASPipeline.from_pipe(pipe)("grass", **dict(image=photo(), mask_image=mask()) | settings)


def test_a_model_that_inpaints_needs_a_mask():
    ours = InstantASPipeline.from_pipe(tiny_pipeline(unet=unet(in_channels=9)))
    with pytest.raises(ValueError, match="mask_image: expected a mask for the StableDiffusionPipeline, which inpaints"):
        ours("grass", image=photo(), strength=0.5)

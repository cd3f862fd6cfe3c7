"""A picture that is extended: its pixels stay, the border is drawn to it on the new side, no window too many."""

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionInpaintPipeline

from instantas import InstantASPipeline
from instantas.pipelines.outpainting import Margins
from instantas.testing.tiny import tiny_pipeline, tiny_xl_pipeline, unet
from tests.pipelines.starting import photo, seeded


@pytest.mark.parametrize("sides, channels", [((64, 0, 0, 0), 4), ((31, 17, 42, 50), 4), ((0, 13, 5, 0), 9)])
def test_the_pictures_pixels_stay(sides, channels):
    ours, picture = InstantASPipeline.from_pipe(tiny_pipeline(unet=unet(in_channels=channels))), photo(130, 101)
    left, top, right, bottom = sides
    large = ours.extend(picture, *sides, "grass", num_inference_steps=1, generator=seeded()).images[0]
    assert large.size == (130 + left + right, 101 + top + bottom)
    inside = np.asarray(large)[top : top + 101, left : left + 130]
    np.testing.assert_array_equal(inside, np.asarray(picture))


def test_the_border_is_drawn_to_the_picture_on_the_new_side_alone():
    ours = InstantASPipeline.from_pipe(tiny_pipeline())
    settings = dict(num_inference_steps=2, output_type="np")
    hard, soft = (
        ours.extend(photo(), 0, 0, 64, 0, "grass", blend=blend, generator=seeded(), **settings).images[0]
        for blend in (0, 16)
    )
    changed = np.abs(hard - soft).max((0, 2))
    assert not changed[:128].any() and changed[128:143].all() and not changed[144:].any()
    steps = [np.abs(image[:, 128].mean(0) - image[:, 127].mean(0)).max() for image in (hard, soft)]
    assert steps[1] < steps[0]


def test_joining_mends_what_the_autoencoder_loses():
    """An error that is the same everywhere is gone at the border, and there in full from `blend` pixels on."""
    margins, source = Margins(left=20, top=0, right=0, bottom=10), torch.rand(2, 3, 12, 9)
    painted = margins.grown(source) - 0.0
    joined = margins.joined(painted - 0.1, source, 8, (False, False))
    expected = painted - 0.1 + 0.1 * (1 - distance(22, 29, 12, 20) / 8).clamp(min=0)
    torch.testing.assert_close(joined, expected.clamp(0, 1))
    assert torch.equal(joined[..., :12, 20:], source)


def distance(rows, columns, bottom, left):
    """Of each pixel from a picture in the upper right corner, the larger of both axes."""
    y, x = torch.arange(rows)[:, None], torch.arange(columns)
    return torch.maximum((y - bottom + 1).clamp(min=0), (left - x).clamp(min=0)).float()


def test_the_border_goes_round_where_the_canvas_does():
    margins, source = Margins(0, 0, 24, 0), torch.full((1, 3, 8, 40), 0.5)
    painted = torch.full((1, 3, 8, 64), 0.4)
    for wrap, last in (((False, False), 0.4), ((False, True), 0.4875)):
        joined = margins.joined(painted, source, 8, wrap)
        assert joined[0, 0, 0, 40].item() == pytest.approx(0.4875)
        assert joined[0, 0, 0, 63].item() == pytest.approx(last) and joined[0, 0, 0, 52].item() == pytest.approx(0.4)


def test_windows_inside_of_the_picture_are_not_evaluated():
    """128 more pixels of 512: of four windows one."""
    ours, places = InstantASPipeline.from_pipe(tiny_pipeline()), []
    hook = ours.unet.register_forward_pre_hook(lambda _, args: places.append(len(args[0])))
    ours.extend(photo(384), right=128, prompt="grass", num_inference_steps=3, bridging="none", generator=seeded())
    hook.remove()
    assert places == [2, 2, 2]


def test_several_pictures_and_what_the_call_gives():
    ours = InstantASPipeline.from_pipe(tiny_pipeline())
    given = dict(prompt=["grass", "red brick"], num_images_per_prompt=2, num_inference_steps=1, generator=seeded())
    images = ours.extend([photo(), photo(seed=1)], 16, **given, output_type="pt").images
    assert images.shape == (4, 3, 128, 144)
    for i, image in enumerate(images):
        wanted = np.asarray(photo(seed=i // 2)) / np.float32(255)
        np.testing.assert_array_equal(image[:, :, 16:].permute(1, 2, 0).numpy(), wanted)
    latents = ours.extend(photo(), 16, prompt="grass", num_inference_steps=1, output_type="latent", return_dict=False)
    assert latents[0].shape == (1, 4, 16, 18)
    xl = InstantASPipeline.from_pipe(tiny_xl_pipeline())
    assert xl.extend(photo(), 16, prompt="grass", num_inference_steps=1, return_dict=False)[0][0].size == (144, 128)
    held = StableDiffusionInpaintPipeline(**tiny_pipeline().components, requires_safety_checker=False)
    held.set_progress_bar_config(disable=True)
    assert InstantASPipeline.from_pipe(held).extend(photo(), 16, num_inference_steps=1).images[0].size == (144, 128)


@pytest.mark.parametrize(
    "arguments, settings, error, message",
    [
        ((None, 8), {}, ValueError, "image: expected a picture, got None"),
        ((photo(),), {}, ValueError, "left: expected pixels to extend the picture by on some side, got 0 on all"),
        ((photo(), -8), {}, ValueError, "left: expected an integer from 0 up, got -8"),
        ((photo(), 0, 8.5), {}, TypeError, "top: expected an integer"),
        ((photo(), 8), dict(height=128), ValueError, "height: expected none beside the sides to extend, got 128"),
        ((photo(), 8), dict(mask_image=photo()), ValueError, "mask_image: expected none beside the sides"),
        ((photo(), 8), dict(blend=-1), ValueError, "blend: expected an integer from 0 up"),
        ((photo(), 8), dict(strength=1.1), ValueError, "strength: expected 0 to 1"),
        ((photo(), 8), dict(output_type="png"), ValueError, "output_type: expected one of pil"),
        ((photo(1, 1), 8, 0, 8), {}, ValueError, "image: expected a whole cell of 8x8 pixels in its place, got 1x1"),
        ((photo(12, 12), 3, 0, 3), {}, ValueError, "image: expected a whole cell of 8x8 pixels in its place"),
    ],
)
def test_what_cannot_be_extended_is_named(arguments, settings, error, message):
    pipe = tiny_pipeline()
    for network in (pipe.unet, pipe.vae, pipe.text_encoder):
        network.register_forward_pre_hook(lambda *args: pytest.fail("a network was evaluated"))
    with pytest.raises(error, match=message):
        InstantASPipeline.from_pipe(pipe).extend(*arguments, prompt="grass", **settings)

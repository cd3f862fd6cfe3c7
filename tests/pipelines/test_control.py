"""A ControlNet's pictures, scales and sizes, beside diffusers' own pipelines and where those drop or crash."""

import math

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionControlNetPipeline
from PIL import Image

from instantas.pipelines.pipeline import InstantASPipeline
from instantas.testing.tiny import CELL, WINDOW, tiny_controlnet, tiny_pipeline

NATIVE = WINDOW * CELL
CALL = dict(num_inference_steps=2, output_type="latent", guidance_scale=3.0, controlnet_conditioning_scale=1.0)
SEEDED = torch.Generator().manual_seed(0)
R, G, B, W = (Image.new("RGB", (NATIVE, NATIVE), colour) for colour in ("red", "green", "blue", "white"))


def pipeline(nets=1):
    """diffusers' pipeline with so many ControlNets that differ and see their pictures well."""
    controlnets = [tiny_controlnet() for _ in range(nets)]
    for seed, net in enumerate(controlnets):
        seeded = torch.Generator().manual_seed(seed)
        for parameter in net.controlnet_cond_embedding.parameters():
            parameter.data.mul_(3)
        net.controlnet_cond_embedding.conv_out.weight.data.normal_(generator=seeded)
    net = controlnets if nets > 1 else controlnets[0]
    return tiny_pipeline(kind=StableDiffusionControlNetPipeline, controlnet=net)


def painted(pipe, **call):
    return pipe(**CALL | call, generator=torch.Generator().manual_seed(0)).images


def same(theirs, **call):
    """Whether ours paints what diffusers paints, to rounding."""
    wanted = painted(theirs, **call)
    ours = painted(InstantASPipeline.from_pipe(theirs), **call)
    return ours.shape == wanted.shape and ((ours - wanted).norm() / wanted.norm()).item() < 1e-4


def test_what_a_network_is_shown_moves_the_picture():
    prompt, theirs = ["red", "blue"], pipeline(2)
    one, other = (painted(theirs, prompt=prompt, image=image) for image in ([[R, G], [B, W]], [[R, B], [G, W]]))
    assert (one - other).norm() / one.norm() > 1e-2


def shown(theirs):
    """Collects what the ControlNets are shown."""
    seen = []
    for net in getattr(theirs.controlnet, "nets", [theirs.controlnet]):
        net.register_forward_pre_hook(lambda m, a, k: seen.append(k["controlnet_cond"]), with_kwargs=True)
    return seen


@pytest.mark.parametrize(
    "prompt, image",
    [
        (["red", "blue"], [[R, G], [B, W]]),  # an inner list for each prompt
        (["red", "blue", "wall"], [[R, G]] * 3),
        (["red", "blue", "wall"], [[R, G]]),
        ("red", [[R, G]]),
        ("red", [R, G]),
        (["red", "blue"], [R, G]),
        (["red", "blue"], [[R, G], [B, B]]),
        (
            ["red", "blue"],
            [torch.rand(2, 3, NATIVE, NATIVE, generator=SEEDED), torch.rand(1, 3, NATIVE, NATIVE, generator=SEEDED)],
        ),
        (["red", "blue"], [np.random.default_rng(0).random((2, NATIVE, NATIVE, 3)), R]),
    ],
)
@pytest.mark.parametrize("copies", [1, 2])
def test_pictures_of_several_networks_and_prompts_go_where_diffusers_puts_them(prompt, image, copies):
    assert same(pipeline(2), prompt=prompt, image=image, num_images_per_prompt=copies)


@pytest.mark.parametrize(
    "prompt, image",
    [
        (["red", "blue"], [R, B]),
        (["red", "blue"], [R]),
        ("red", [R]),
        (["red", "blue"], R),
        (["red", "blue"], torch.rand(2, 3, NATIVE, NATIVE, generator=SEEDED)),
        (
            ["red", "blue"],
            [torch.rand(3, NATIVE, NATIVE, generator=SEEDED), torch.rand(3, NATIVE, NATIVE, generator=SEEDED)],
        ),
        ("red", np.random.default_rng(0).random((NATIVE, NATIVE, 3))[None]),
        ("red", Image.new("L", (NATIVE, NATIVE), 90)),
    ],
)
@pytest.mark.parametrize("copies", [1, 2])
def test_pictures_of_one_network_go_where_diffusers_puts_them(prompt, image, copies):
    assert same(pipeline(), prompt=prompt, image=image, num_images_per_prompt=copies)


@pytest.mark.parametrize(
    "nets, prompts, image",
    [
        (1, 1, [R, G]),
        (1, 2, [R, G, B]),
        (1, 3, [R, G]),
        (1, 4, [R, G]),
        (1, 2, torch.rand(4, 3, NATIVE, NATIVE, generator=SEEDED)),
        (2, 2, [[R, G], [B, W], [W, W]]),
        (2, 3, [[R, G], [B, W]]),
        (2, 4, [[R, G], [B, W]]),
        (
            2,
            2,
            [torch.rand(2, 3, NATIVE, NATIVE, generator=SEEDED), torch.rand(3, 3, NATIVE, NATIVE, generator=SEEDED)],
        ),
    ],
)
@pytest.mark.parametrize("copies", [1, 2])
def test_other_numbers_of_pictures_and_prompts_are_refused_as_by_diffusers(nets, prompts, image, copies):
    theirs, call = pipeline(nets), dict(prompt=["red"] * prompts, image=image, num_images_per_prompt=copies)
    with pytest.raises(Exception):  # noqa: B017 of several kinds, some from inside of torch
        painted(theirs, **call)
    seen = shown(theirs)
    with pytest.raises(ValueError, match=f"image: expected one picture, or one for each of {prompts} prompts, got"):
        painted(InstantASPipeline.from_pipe(theirs), **call)
    assert not seen


@pytest.mark.parametrize(
    "nets, image, error, told",
    [
        (2, [[R, G, B], [B, W, G]], ValueError, "one for each of 2 ControlNets, got 3"),
        (2, [[R, G], [B, W, R]], ValueError, "one for each of 2 ControlNets, got 3"),  # diffusers drops the third
        (2, [[R, G], B], TypeError, "got both"),
        (2, [R], ValueError, "one for each of 2 ControlNets, got 1"),
        (2, R, TypeError, "expected a list for 2 ControlNets, got Image"),
        (1, [[R]], TypeError, "or a list of them, got list"),
        (1, "pose.png", TypeError, "or a list of them, got str"),
        (1, [], TypeError, "or a list of them, got list"),
        (1, torch.rand(NATIVE, NATIVE, generator=SEEDED), ValueError, r"a batch of them, got \(128, 128\)"),
        (1, torch.rand(1, 4, NATIVE, NATIVE, generator=SEEDED), ValueError, "3 channels, got 4"),
        (1, np.zeros((NATIVE, NATIVE)), ValueError, "3 channels, got 1"),
        (1, torch.full((3, NATIVE, NATIVE), math.nan), ValueError, "expected finite values"),
        (1, np.full((NATIVE, NATIVE, 3), math.inf), ValueError, "expected finite values"),
        (
            2,
            [R, torch.rand(3, NATIVE, NATIVE, generator=SEEDED).index_fill(1, torch.tensor(7), math.nan)],
            ValueError,
            "finite",
        ),
        (1, None, ValueError, "expected one for the pipeline's ControlNet, got NoneType"),
    ],
)
def test_pictures_that_cannot_be_meant_are_refused(nets, image, error, told):
    theirs = pipeline(nets)
    seen = shown(theirs)
    with pytest.raises(error, match="image: .*" + told):
        painted(InstantASPipeline.from_pipe(theirs), prompt=["red", "blue"], image=image)
    assert not seen


@pytest.mark.parametrize(
    "name, value, error",
    [
        ("controlnet_conditioning_scale", math.nan, ValueError),
        ("controlnet_conditioning_scale", math.inf, ValueError),
        ("controlnet_conditioning_scale", "1", TypeError),
        ("controlnet_conditioning_scale", [1.0, 1.0], ValueError),
        ("controlnet_conditioning_scale", [[1.0]], TypeError),
        ("control_guidance_start", math.nan, ValueError),
        ("control_guidance_start", "0", TypeError),
        ("control_guidance_start", 1.0, ValueError),
        ("control_guidance_end", [0.5, 1.0], ValueError),
        ("guess_mode", "yes", TypeError),
    ],
)
def test_scales_and_spans_are_numbers(name, value, error):
    theirs = pipeline()
    seen = shown(theirs)
    with pytest.raises(error, match=f"{name}: expected"):
        painted(InstantASPipeline.from_pipe(theirs), prompt="red", image=R, **{name: value})
    assert not seen


def lines(height, width):
    """Black with 1-px white lines every 16 columns."""
    picture = np.zeros((height, width, 3), dtype=np.uint8)
    picture[:, ::16] = 255
    return picture


@pytest.mark.parametrize("height, width", [(128, 300), (131, 128), (137, 305), (5, 3)])
@pytest.mark.parametrize("form", ["pil", "numpy", "tensor"])
def test_a_picture_as_large_as_the_canvas_is_never_resampled(height, width, form):
    theirs = pipeline()
    seen, picture = shown(theirs), lines(height, width)
    unit = torch.from_numpy(picture).permute(2, 0, 1) / 255
    image = {"pil": Image.fromarray(picture), "numpy": picture / 255, "tensor": unit}[form]
    ours = InstantASPipeline.from_pipe(theirs)
    painted(ours, prompt="wall", height=height, width=width, image=image, num_inference_steps=1, guidance_scale=1.0,
            bridging=None, window_batch_size=100)  # fmt: skip
    plan = ours.plan(height, width)
    canvas = torch.full((3, plan.height * CELL, plan.width * CELL), -1.0)
    for window, (y, x) in zip(seen[0], plan.origins * CELL):
        canvas[:, y : y + window.shape[1], x : x + window.shape[2]] = window
    assert torch.equal(canvas[:, :height, :width], unit)
    assert torch.equal(canvas[:, height:], canvas[:, height - 1 : height].expand_as(canvas[:, height:]))
    assert torch.equal(canvas[:, :, width:], canvas[:, :, width - 1 : width].expand_as(canvas[:, :, width:]))


def test_another_size_is_resized_once_to_the_pixel():
    theirs = pipeline()
    seen, small = shown(theirs), torch.tensor([0.0, 1.0]).expand(3, 20, 2)
    painted(InstantASPipeline.from_pipe(theirs), prompt="wall", height=20, width=20, image=small, guidance_scale=1.0)
    assert torch.equal(seen[0][0, :, :20, :20], torch.tensor([0.0, 1.0]).repeat_interleave(10).expand(3, 20, 20))


@pytest.mark.parametrize(
    "given, size",
    [
        ({}, (96, 64)),
        ({"height": 64}, (64, 64)),
        ({"width": 128}, (96, 128)),
        ({"height": 128, "width": 128}, (128, 128)),
    ],
)
def test_without_height_and_width_the_first_picture_has_the_size(given, size):
    image = Image.fromarray(lines(96, 64))
    theirs = pipeline()
    ours = painted(InstantASPipeline.from_pipe(theirs), prompt="wall", image=image, **given)
    assert ours.shape[-2:] == (size[0] // CELL, size[1] // CELL)
    assert same(theirs, prompt="wall", image=image, **given)


@pytest.mark.parametrize(
    "image",
    [
        torch.rand(3, 100, 75, generator=SEEDED),
        torch.rand(2, 3, 100, 75, generator=SEEDED),
        np.zeros((100, 75, 3)),
        [np.zeros((1, 100, 75, 3))],
        [Image.new("RGB", (75, 100)), R],
        (Image.new("RGB", (75, 100)),),
    ],
)
def test_every_form_has_a_size_to_the_pixel(image):
    ours = InstantASPipeline.from_pipe(pipeline())
    assert painted(ours, prompt=["red", "blue"], image=image, output_type="pt").shape == (2, 3, 100, 75)


def test_several_networks_take_the_first_ones_size():
    theirs = pipeline(2)
    image = [[Image.fromarray(lines(64, 96)), R], [G, B]]
    ours = painted(InstantASPipeline.from_pipe(theirs), prompt=["red", "blue"], image=image)
    assert ours.shape == (2, 4, 8, 12)

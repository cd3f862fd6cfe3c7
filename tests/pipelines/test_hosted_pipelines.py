"""`InstantASPipeline.from_pipe` of other kinds: their own calls at any size, plain at native size, with regions."""

import inspect

import diffusers
import pytest
import torch

from instantas import InstantASPipeline, Region, regional_prompts, windowed
from instantas.pipelines.hosted import HostedPipeline
from instantas.pipelines.windowed import REFUSED
from instantas.testing import tiny
from instantas.testing.tiny import CELL, WINDOW, tiny_pipeline
from tests.pipelines.kinds import KINDS, LARGE, NATIVE, difference, painted, recorded, sized

OWN = {"text to image", "ControlNet", "ControlNet, guess mode", "ControlNets, two", "LCM", "SDXL", "SDXL ControlNet"}
PICTURES = {
    *("img2img", "inpaint, 4 channels", "inpaint, 9 channels", "ControlNet img2img", "ControlNet inpaint"),
    *("SDXL img2img", "SDXL inpaint", "SDXL ControlNet img2img", "SDXL ControlNet inpaint"),
}  # which our own loop paints from, and theirs where it is asked for by name
OTHERS = [kind for kind in KINDS if kind not in OWN]
EVERYWHERE = [Region("blue water", box=(0.0, 0.0, 1.0, 1.0), negative_prompt="wood")]
LEFT = [Region("blue water", box=(0.0, 0.0, 0.5, 1.0), feather=16)]


def untouched(pipe):
    pipe.unet.register_forward_pre_hook(lambda *args: pytest.fail("the network was evaluated"))
    return pipe


@pytest.mark.parametrize("kind", OTHERS)
def test_other_kinds_are_plain_at_native_size_and_see_windows_of_larger_ones(kind):
    make, arguments = KINDS[kind]
    pipe = make()
    ours = HostedPipeline(pipe) if kind in PICTURES else InstantASPipeline.from_pipe(pipe)
    assert isinstance(ours, HostedPipeline) and ours.pipe is pipe
    assert torch.equal(painted(ours, arguments(NATIVE)), painted(pipe, arguments(NATIVE)))
    calls = recorded(pipe, [pipe.unet])
    large = painted(ours, arguments(LARGE) | dict(bridging="economy"))
    assert large.isfinite().all() and tuple(large.shape[-2:]) == tuple(side // CELL for side in LARGE)
    assert set(calls) == {("sample", (WINDOW, WINDOW))}
    with windowed(pipe, bridging="economy"):
        assert torch.equal(large, painted(pipe, arguments(LARGE)))


@pytest.mark.parametrize("kind", sorted(OWN | PICTURES))
def test_what_our_own_loop_paints_stays_there(kind):
    assert type(InstantASPipeline.from_pipe(KINDS[kind][0]())) is InstantASPipeline


def test_a_refiner_runs_its_own_call():
    refiner = KINDS["SDXL img2img"][0]()
    refiner.register_to_config(requires_aesthetics_score=True)
    assert isinstance(InstantASPipeline.from_pipe(refiner), HostedPipeline)


@pytest.mark.parametrize(
    "kind, size",
    [
        ("inpaint, 9 channels", LARGE),
        ("InstructPix2Pix", LARGE),
        ("InstructPix2Pix", NATIVE),
        ("depth to image", NATIVE),
        ("T2I-Adapter", LARGE),
        ("PAG", LARGE),
        ("PAG img2img", NATIVE),
        ("AnimateDiff", LARGE),
        ("AnimateDiff", NATIVE),
    ],
)
def test_one_region_everywhere_is_its_prompt_alone(kind, size):
    """In every branch of the batch: the region's negative prompt too."""
    make, arguments = KINDS[kind]
    ours = HostedPipeline(make())
    base = arguments(size) | dict(guidance_scale=3.0)
    given = painted(ours, base | dict(regions=EVERYWHERE))
    alone = painted(ours, base | dict(prompt="blue water", negative_prompt="wood"))
    assert difference(given, alone) < 1e-5 < 1e-3 < difference(given, painted(ours, base))


@pytest.mark.parametrize("kind", ["InstructPix2Pix", "SDXL PAG", "AnimateDiff"])
def test_regions_lie_on_the_canvas_whatever_the_batches(kind):
    make, arguments = KINDS[kind]
    ours = HostedPipeline(make())
    given, plain = arguments(LARGE) | dict(regions=LEFT), painted(ours, arguments(LARGE))
    one, all_at_once = (painted(ours, given | dict(window_batch_size=size)) for size in (1, 9))
    assert difference(one, all_at_once) < 1e-5 < difference(one, plain)
    with windowed(ours.pipe), regional_prompts(ours.pipe, LEFT):
        assert difference(painted(ours.pipe, arguments(LARGE)), one) < 1e-5


def test_regions_of_several_videos_are_of_each():
    make, arguments = KINDS["AnimateDiff"]
    ours, size = HostedPipeline(make()), arguments(LARGE)
    noise = torch.randn(2, 4, 2, *(side // CELL for side in LARGE), generator=torch.Generator().manual_seed(1))
    prompts, lists = ["red stone", "wood"], [LEFT, EVERYWHERE]
    both = painted(ours, size | dict(prompt=prompts, latents=noise, regions=lists))
    each = [
        painted(ours, size | dict(prompt=prompt, latents=noise[i : i + 1], regions=regions))
        for i, (prompt, regions) in enumerate(zip(prompts, lists))
    ]
    assert difference(both, torch.cat(each)) < 1e-5


def test_a_canvas_that_wraps():
    make, arguments = KINDS["img2img"]
    pipe, given = make(), arguments(LARGE)
    round_it = painted(HostedPipeline(pipe), given | dict(wrap=(False, True)))
    with windowed(pipe, wrap=(False, True)):
        assert torch.equal(round_it, painted(pipe, given))
    assert difference(round_it, painted(HostedPipeline(pipe), given)) > 1e-3


def test_the_models_own_defaults_and_positional_arguments():
    pipe = KINDS["img2img"][0]()
    ours, picture = HostedPipeline(pipe, dict(num_inference_steps=3, guidance_scale=2.0)), torch.rand(1, 3, *NATIVE)
    seeded = [torch.Generator().manual_seed(0) for _ in range(3)]
    wanted = pipe("wood", picture, 0.7, 3, guidance_scale=2.0, generator=seeded[0], output_type="latent")[0]
    assert torch.equal(ours("wood", picture, 0.7, generator=seeded[1], output_type="latent")[0], wanted)
    other = ours("wood", picture, 0.7, 3, None, None, 4.0, generator=seeded[2], output_type="latent")[0]
    assert not torch.equal(other, wanted)


def test_a_saved_model_is_loaded_as_what_it_is(tmp_path):
    made = KINDS["InstructPix2Pix"][0]()
    made.save_pretrained(tmp_path)
    ours = InstantASPipeline.from_pretrained(tmp_path)
    ours.set_progress_bar_config(disable=True)
    arguments = KINDS["InstructPix2Pix"][1](NATIVE)
    assert isinstance(ours, HostedPipeline) and ours.window == (WINDOW, WINDOW)
    assert torch.equal(painted(ours, arguments), painted(made, arguments))


# What is refused, before any evaluation


REFUSED_CALLS = [
    (
        TypeError,
        "cuda_graph: expected none, as StableDiffusionImg2ImgPipeline has a loop of its own",
        dict(cuda_graph=True),
    ),
    (TypeError, "method: expected none, as Stable", dict(method="multidiffusion")),
    (TypeError, "stride: expected none, as Stable", dict(stride=8)),
    (TypeError, "height: expected none, as Stable", dict(height=192)),
    (TypeError, "start: expected none, as Stable", dict(start="coarse")),
    (TypeError, "blend: expected none, as Stable", dict(blend=8)),
    (TypeError, "colour: expected an argument of StableDiffusionImg2ImgPipeline's call, got 'red'", dict(colour="red")),
    (ValueError, "region_mode|mode: expected 'blend' or 'joint'", dict(regions=LEFT, region_mode="add")),
    (ValueError, "base_weight: expected", dict(base_weight=-1.0)),
    (ValueError, "bridging: expected one of", dict(bridging="glue")),
    (TypeError, "wrap: expected", dict(wrap=(1, 2))),
    (ValueError, "window_batch_size: expected", dict(window_batch_size=0)),
    (ValueError, "guidance_scale: expected None", dict(regions=[Region("wood", box=(0, 0, 1, 1), guidance_scale=2.0)])),
    (TypeError, "regions: expected a list of Region", dict(regions=["wood"])),
]


@pytest.mark.parametrize("error, match, call", REFUSED_CALLS, ids=lambda value: None)
def test_what_is_wrong_is_said_before_any_evaluation(error, match, call):
    make, arguments = KINDS["img2img"]
    ours = HostedPipeline(untouched(make()))
    with pytest.raises(error, match=match):
        painted(ours, arguments(LARGE) | call)


def test_our_own_loops_arguments_at_their_defaults_mean_nothing():
    make, arguments = KINDS["img2img"]
    pipe = make()
    own = {
        name: parameter.default
        for name, parameter in inspect.signature(InstantASPipeline.__call__).parameters.items()
        if parameter.default is not parameter.empty and name not in inspect.signature(type(pipe).__call__).parameters
    }
    assert {"cuda_graph", "method", "stride"} < set(own)
    given = painted(HostedPipeline(pipe), own | arguments(NATIVE))
    for start in ("default", "none", None):  # a loop of its own has no other
        assert torch.equal(given, painted(HostedPipeline(pipe), dict(start=start) | arguments(NATIVE)))
    assert torch.equal(given, painted(pipe, arguments(NATIVE)))


@pytest.mark.parametrize("name", ["StableDiffusionSAGPipeline", "StableDiffusionGLIGENPipeline"])
def test_what_windows_cannot_serve_is_refused_with_the_reason(name):
    pipe = tiny_pipeline(kind=getattr(diffusers, name), unet=tiny.unet())
    with pytest.raises(TypeError, match=f"pipe: .* got {name}, which {REFUSED[name]}"):
        InstantASPipeline.from_pipe(pipe)


def test_a_pipeline_without_a_unet_is_refused():
    with pytest.raises(
        TypeError, match="pipe: expected a diffusers pipeline with a UNet2DConditionModel .* got DDPMPi"
    ):
        InstantASPipeline.from_pipe(diffusers.DDPMPipeline(torch.nn.Identity(), diffusers.DDPMScheduler()))


def test_enlarging_is_our_own_loops():
    ours = HostedPipeline(untouched(KINDS["img2img"][0]()))
    for task, given in (("upscale", {}), ("extend", dict(left=8))):
        with pytest.raises(TypeError, match=f"pipe: expected a text-to-image pipeline to {task} with, got StableDiff"):
            getattr(ours, task)(torch.rand(1, 3, *NATIVE), **given)


def test_a_picture_of_its_own_kind_is_what_comes_back():
    ours = InstantASPipeline.from_pipe(KINDS["PAG"][0]())
    output = ours(**sized(LARGE), prompt="wood", num_inference_steps=1, output_type="np")
    assert type(output).__name__ == "StableDiffusionPipelineOutput" and output.images.shape == (1, *LARGE, 3)

"""What pipelines and calls may be: schedules as diffusers has them, and errors before any evaluation."""

import re
import warnings

import diffusers
import pytest
import torch

from instantas.pipelines.pipeline import InstantASPipeline
from instantas.regions import Region
from instantas.testing import tiny

NATIVE = tiny.WINDOW * tiny.CELL
HALF = [Region("grass", box=(0.0, 0.0, 0.5, 1.0))]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed))


def paint(pipe, seed=0, **call):
    call = dict(prompt="wall", num_inference_steps=4, guidance_scale=4.0, output_type="latent") | call
    return pipe(**call, generator=seeded(seed)).images


def difference(a, b):
    return float((a - b).norm() / b.norm())


def both(theirs, **call):
    return [paint(pipe, **call) for pipe in (InstantASPipeline.from_pipe(theirs), theirs)]


def scheduled(name, **config):
    return tiny.tiny_pipeline(scheduler=tiny.scheduler(kind=getattr(diffusers, name + "Scheduler"), **config))


# Schedules of one's own


@pytest.mark.parametrize("timesteps", [[999, 600, 300, 10], [700], [999, 998, 1]])
@pytest.mark.parametrize("name", ["DDPM", "DDPMParallel", "EulerDiscrete", "DPMSolverMultistep", "LCM", "HeunDiscrete"])
def test_timesteps(name, timesteps):
    theirs = scheduled(name)
    got, wanted = both(theirs, timesteps=timesteps, num_inference_steps=None)
    assert difference(got, wanted) < 1e-4


@pytest.mark.parametrize("timesteps", [[22, 0], [30, 11, 5, 1]])
def test_timesteps_of_a_consistency_model(timesteps):
    theirs = tiny.tiny_pipeline(scheduler=diffusers.CMStochasticIterativeScheduler(num_train_timesteps=40))
    got, wanted = both(theirs, timesteps=timesteps, num_inference_steps=None)
    assert difference(got, wanted) < 1e-4


@pytest.mark.parametrize("make", [tiny.tiny_pipeline, tiny.tiny_xl_pipeline])
@pytest.mark.parametrize("sigmas", [[14.6, 3.0, 0.8, 0.1, 0.0], [2.0, 0.5, 0.0], [7.0, 0.0]])
def test_sigmas(make, sigmas):
    theirs = make()
    theirs.scheduler = tiny.scheduler(kind=diffusers.EulerDiscreteScheduler)
    got, wanted = both(theirs, sigmas=sigmas, num_inference_steps=None)
    assert difference(got, wanted) < 1e-4 < difference(paint(theirs), wanted)


@pytest.mark.parametrize("end", [0.3, 0.7, 0.999, 1.0])
@pytest.mark.parametrize("name", ["DDIM", "EulerDiscrete", "DPMSolverMultistep", "HeunDiscrete", "DDPM"])
def test_denoising_end_of_sdxl(name, end):
    theirs = tiny.tiny_xl_pipeline()
    theirs.scheduler = tiny.scheduler(kind=getattr(diffusers, name + "Scheduler"))
    got, wanted = both(theirs, num_inference_steps=5, denoising_end=end)
    assert difference(got, wanted) < 1e-4
    assert end >= 0.999 or difference(paint(theirs, num_inference_steps=5), wanted) > 1e-4


def test_regions_count_the_steps_that_are_taken():
    """A region over everything until half of a run of four: two steps of its prompt, then two of the base's."""
    pipe = InstantASPipeline.from_pipe(tiny.tiny_xl_pipeline())
    call = dict(num_inference_steps=8, denoising_end=0.5)
    got = paint(pipe, regions=[Region("grass", box=(0.0, 0.0, 1.0, 1.0), end=0.5)], **call)
    grass, wall = (pipe.encode_prompt(text, device="cpu")[:2] for text in ("grass", "wall"))
    pooled = pipe.encode_prompt("wall", device="cpu")[2:]  # the base prompt's, for all regions
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    after = {"prompt_embeds": torch.cat([wall[1], wall[0]])}
    call |= dict(callback_on_step_end=lambda pipe, i, t, tensors: after if i == 1 else None)
    wanted = paint(pipe, prompt=None, **dict(zip(names, (*grass, *pooled))), **call)
    assert difference(got, wanted) < 1e-4


@pytest.mark.parametrize("steps", [2, 4])
def test_steps_of_the_distillation_of_a_consistency_model(steps):
    theirs = tiny.tiny_pipeline(
        kind=diffusers.LatentConsistencyModelPipeline,
        unet=tiny.unet(time_cond_proj_dim=8),
        scheduler=tiny.scheduler(kind=diffusers.LCMScheduler),
    )
    got, wanted = both(theirs, num_inference_steps=steps, original_inference_steps=20)
    assert difference(got, wanted) < 1e-4


# Numbers that are none


@pytest.mark.parametrize("name", ["DDIM", "DDPM", "LCM", "TCD"])
def test_a_schedule_that_divides_by_zero_is_refused(name):
    """diffusers paints nothing but NaN there."""
    theirs = scheduled(name, rescale_betas_zero_snr=True, timestep_spacing="trailing")
    assert torch.isnan(paint(theirs)).any()
    theirs.unet.register_forward_pre_hook(lambda *args: pytest.fail("the network was evaluated"))
    with pytest.raises(ValueError, match="scheduler: expected finite steps.*rescale_betas_zero_snr=True"):
        paint(InstantASPipeline.from_pipe(theirs))


@pytest.mark.parametrize("name, config", [("DDIM", dict(timestep_spacing="leading")), ("DDIM", dict(clip_sample=True)),
                                          ("EulerDiscrete", dict(timestep_spacing="trailing")),
                                          ("DDIM", dict(prediction_type="v_prediction"))])  # fmt: skip
def test_one_that_does_not_is_painted(name, config):
    zero = dict(rescale_betas_zero_snr=True, timestep_spacing="trailing", clip_sample=False) | config
    theirs = scheduled(name, **{key: zero[key] for key in zero if key != "clip_sample"})
    theirs.scheduler.register_to_config(clip_sample=zero["clip_sample"])  # a pipeline sets it to False
    got, wanted = both(theirs)
    assert torch.isfinite(wanted).all() and difference(got, wanted) < 1e-4


# Embeddings


def test_long_embeddings():
    theirs = tiny.tiny_pipeline()
    call = dict(prompt=None, prompt_embeds=random(2, 48, 32), negative_prompt_embeds=random(2, 48, 32, seed=1))
    got, wanted = both(theirs, **call)
    assert difference(got, wanted) < 1e-4
    xl = tiny.tiny_xl_pipeline()
    pooled = dict(pooled_prompt_embeds=random(1, 32, seed=2))
    got, wanted = both(xl, prompt=None, prompt_embeds=random(1, 48, 64), **pooled)  # negative ones are zeros
    assert difference(got, wanted) < 1e-4
    got, wanted = both(theirs, prompt=None, prompt_embeds=random(1, 48, 32), guidance_scale=1.0)
    assert difference(got, wanted) < 1e-4


EMBEDS, POOLED = random(2, 16, 32), random(2, 32)
XL = dict(prompt=None, prompt_embeds=random(2, 16, 64), pooled_prompt_embeds=POOLED)
UNFIT = [
    ("sd", "negative_prompt_embeds: expected .* = .1, any, 32.", dict(negative_prompt_embeds=EMBEDS)),
    ("sd", "negative_prompt_embeds: expected 16 tokens", dict(negative_prompt_embeds=random(1, 24, 32))),
    ("sd", "negative_prompt_embeds: expected .2, 16, 32. like prompt_embeds",
     dict(prompt=None, prompt_embeds=EMBEDS, negative_prompt_embeds=random(2, 24, 32))),
    ("sd", "negative_prompt_embeds: expected .* = .2, any, 32.",
     dict(prompt=None, prompt_embeds=EMBEDS, negative_prompt_embeds=random(3, 16, 32))),
    ("sd", "prompt_embeds: expected .* = .2, any, 32.", dict(prompt=None, prompt_embeds=random(2, 16, 64))),
    ("sd", "prompt_embeds: expected .* = .16, any, 32.", dict(prompt=None, prompt_embeds=random(16, 32))),
    ("sd", "prompt_embeds: expected .* = .1, any, 32.", dict(prompt=None, prompt_embeds=random(0, 16, 32))),
    ("sd", "prompt_embeds: expected .* = .1, any, 32.", dict(prompt=None, prompt_embeds=random(1, 0, 32))),
    ("sd", "negative_prompt_embeds: expected some of 48 tokens", dict(prompt=None, prompt_embeds=random(1, 48, 32))),
    ("sd", "prompt_embeds: expected finite", dict(prompt=None, prompt_embeds=EMBEDS * torch.inf)),
    ("sd", "negative_prompt: expected one for each of 2",
     dict(prompt=None, prompt_embeds=EMBEDS, negative_prompt=["a"])),
    ("sd", "pooled_prompt_embeds: expected None", dict(pooled_prompt_embeds=POOLED)),
    ("xl", "pooled_prompt_embeds: expected some", dict(prompt=None, prompt_embeds=XL["prompt_embeds"])),
    ("xl", "negative_pooled_prompt_embeds: expected some", XL | dict(negative_prompt_embeds=XL["prompt_embeds"])),
    ("xl", "pooled_prompt_embeds: expected .* = .2, 32.", XL | dict(pooled_prompt_embeds=random(1, 32))),
    ("xl", "pooled_prompt_embeds: expected .* = .2, 32.", XL | dict(pooled_prompt_embeds=random(2, 30))),
    ("xl", "negative_pooled_prompt_embeds: expected .* = .2, 32.",
     XL | dict(negative_prompt_embeds=XL["prompt_embeds"], negative_pooled_prompt_embeds=random(3, 32))),
    ("xl", "prompt_embeds: expected .* = .2, any, 64.", XL | dict(prompt_embeds=EMBEDS)),
    ("xl", "prompt_2: expected either prompt_2 or prompt_embeds", XL | dict(prompt_2="a")),
    ("xl", "prompt_2: expected one for each of 1", dict(prompt_2=["a", "b"])),
    ("xl", "negative_prompt_2: expected one for each of 1", dict(negative_prompt_2=["a", "b"])),
]  # fmt: skip


@pytest.mark.parametrize("how", [{}, dict(regions=HALF), dict(method="multidiffusion", regions=HALF)], ids=str)
@pytest.mark.parametrize("model, match, call", UNFIT, ids=lambda value: None)
def test_embeddings_that_do_not_fit_are_refused_before_any_evaluation(model, match, call, how):
    theirs = tiny.tiny_pipeline() if model == "sd" else tiny.tiny_xl_pipeline()
    theirs.unet.register_forward_pre_hook(lambda *args: pytest.fail("the network was evaluated"))
    with pytest.raises((ValueError, TypeError), match=f"^{match}"):
        paint(InstantASPipeline.from_pipe(theirs), **call, **how)


def test_multidiffusion_refuses_embeddings_longer_than_its_regions_prompts():
    theirs = tiny.tiny_pipeline()
    theirs.unet.register_forward_pre_hook(lambda *args: pytest.fail("the network was evaluated"))
    call = dict(prompt=None, prompt_embeds=random(1, 48, 32), negative_prompt_embeds=random(1, 48, 32))
    with pytest.raises(ValueError, match="^prompt_embeds: expected 16 tokens"):
        paint(InstantASPipeline.from_pipe(theirs), method="multidiffusion", regions=HALF, **call)


# Kinds of pipelines


@pytest.mark.parametrize(
    "kind, more",
    [
        (diffusers.StableDiffusionPAGPipeline, {}),
        (diffusers.StableDiffusionSAGPipeline, {}),
        (diffusers.StableDiffusionPAGImg2ImgPipeline, {}),
        (diffusers.StableDiffusionControlNetPAGInpaintPipeline, {"controlnet": True}),
        (diffusers.StableDiffusionAdapterPipeline, {"adapter": True}),
    ],
)
def test_our_own_loop_refuses_by_name_pipelines_that_would_lose_what_makes_them(kind, more):
    """`from_pipe` takes most of them, and runs their own call."""
    if "controlnet" in more:
        more = dict(controlnet=tiny.tiny_controlnet())
    if "adapter" in more:
        more = dict(adapter=diffusers.T2IAdapter(channels=(8, 8), num_res_blocks=1, downscale_factor=2))
    theirs = tiny.tiny_pipeline(kind=kind, **more)
    with pytest.raises(TypeError, match=f"pipe: expected a pipeline of one of the kinds.*got {kind.__name__}"):
        InstantASPipeline(theirs)


def test_a_union_of_controlnets_is_refused_also_when_it_comes_later():
    union = diffusers.ControlNetUnionModel(
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=2,
        cross_attention_dim=32,
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        conditioning_embedding_out_channels=(8, 8, 8, 8),
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=16,
        num_control_type=2,
    )
    theirs = tiny.tiny_pipeline(kind=diffusers.StableDiffusionControlNetPipeline, controlnet=tiny.tiny_controlnet())
    ours = InstantASPipeline.from_pipe(theirs)
    ours.controlnet = union
    for act in (lambda: InstantASPipeline.from_pipe(theirs), lambda: paint(ours, image=torch.ones(1, 3, 8, 8))):
        with pytest.raises(TypeError, match="pipe: expected ControlNetModels, got a ControlNetUnionModel"):
            act()


@pytest.mark.parametrize("name", ["unet", "vae", "scheduler"])
def test_a_component_that_is_missing_is_missed_when_it_is_needed(name):
    theirs = tiny.tiny_pipeline()
    kept = getattr(theirs, name)
    theirs.register_modules(**{name: None})
    ours = InstantASPipeline.from_pipe(theirs)
    assert ours.encode_prompt("wall", "cpu", 1, True)[0].shape == (1, 16, 32)
    with pytest.raises(TypeError, match=f"pipe: expected a diffusers pipeline with {name}"):
        paint(ours)
    setattr(ours, name, kept)
    assert torch.isfinite(paint(ours)).all()


def test_a_unet_that_does_not_say_its_size():
    theirs = tiny.tiny_pipeline(unet=tiny.unet(sample_size=None))
    ours = InstantASPipeline.from_pipe(theirs)
    got, wanted = both(theirs, height=NATIVE, width=NATIVE + 64)
    assert difference(got, wanted) < 1e-4
    assert ours.window == (64, 64) and paint(ours).shape == (1, 4, 64, 64)
    xl = tiny.tiny_xl_pipeline()
    xl.unet.register_to_config(sample_size=None)
    assert InstantASPipeline.from_pipe(xl).window == (128, 128)


# Schedulers, latents and other arguments


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(
    "scheduler",
    [
        diffusers.FlowMatchEulerDiscreteScheduler(),
        diffusers.FlowMatchHeunDiscreteScheduler(),
        diffusers.DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_a_scheduler_of_another_family_is_refused(scheduler, prediction_type):
    ours = InstantASPipeline.from_pipe(tiny.tiny_pipeline(prediction_type))
    ours.scheduler = scheduler
    ours.unet.register_forward_pre_hook(lambda *args: pytest.fail("the network was evaluated"))
    with pytest.raises(ValueError, match=f"scheduler: expected .* got {type(scheduler).__name__}"):
        paint(ours)


@pytest.mark.parametrize("name", ["EulerDiscrete", "HeunDiscrete", "LMSDiscrete"])
def test_latents_that_are_scaled_already_are_said_to_be(name):
    ours = InstantASPipeline.from_pipe(scheduled(name))
    noise = random(1, 4, 16, 16)
    ours.scheduler.set_timesteps(4)
    with warnings.catch_warnings(record=True) as said:  # pytest.warns passes those of others on under our name
        warnings.simplefilter("always")
        paint(ours, latents=noise * float(ours.scheduler.init_noise_sigma))
    ours_alone = [str(warning.message) for warning in said if warning.category is UserWarning]
    assert len(ours_alone) == 1
    assert re.match("latents: expected standard normal noise, got a standard deviation of 1[0-9]", ours_alone[0])


@pytest.mark.filterwarnings("error:latents")
def test_latents_that_are_not_scaled_are_not_warned_of():
    for theirs in (scheduled("EulerDiscrete"), tiny.tiny_pipeline()):
        for spread in (1.0, 0.3, 2.0):
            paint(InstantASPipeline.from_pipe(theirs), latents=spread * random(1, 4, 16, 16), num_inference_steps=1)


def old_signature(step, timestep, latents):
    pass


REFUSED = [
    (ValueError, "clip_skip: expected at most 2", dict(clip_skip=9)),
    (ValueError, "clip_skip: expected an integer from 0", dict(clip_skip=-1)),
    (TypeError, "clip_skip: expected an integer", dict(clip_skip=1.5)),
    (TypeError, "callback: expected callback_on_step_end", dict(callback=old_signature)),
    (TypeError, "callback_steps: expected callback_on_step_end", dict(callback_steps=1)),
    (TypeError, "callback_on_step_end: expected a function of .pipe, step", dict(callback_on_step_end=old_signature)),
    (TypeError, "callback_on_step_end: expected a function, got int", dict(callback_on_step_end=3)),
    (ValueError, "image: expected a picture in place of latents", dict(strength=0.5)),
    (TypeError, "cross_attention_kwargs: expected a dictionary", dict(cross_attention_kwargs=0.5)),
    (ValueError, "sigmas: expected either sigmas or num_inference_steps", dict(sigmas=[1.0, 0.0])),
    (ValueError, "sigmas: expected None, as DDIMScheduler", dict(sigmas=[1.0, 0.0], num_inference_steps=None)),
    (ValueError, "denoising_end: expected more than 0 to 1", dict(denoising_end=0.0)),
    (ValueError, "denoising_end: expected at least one step", dict(denoising_end=1e-6)),
    (TypeError, "denoising_end: expected a number", dict(denoising_end="half")),
    (ValueError, "original_inference_steps: expected None", dict(original_inference_steps=20)),
    (TypeError, "height: expected .* got a picture; give it by name", dict(height=torch.zeros(1, 3, 8, 8))),
]


@pytest.mark.parametrize("error, match, call", REFUSED, ids=lambda value: None)
def test_what_is_wrong_is_said_before_any_evaluation(error, match, call):
    theirs = tiny.tiny_pipeline()
    theirs.unet.register_forward_pre_hook(lambda *args: pytest.fail("the network was evaluated"))
    with pytest.raises(error, match=match):
        paint(InstantASPipeline.from_pipe(theirs), **call)


def test_the_layers_that_may_be_skipped():
    xl = tiny.tiny_xl_pipeline()
    got, wanted = both(xl, clip_skip=1)
    assert difference(got, wanted) < 1e-4 < difference(paint(xl), wanted)
    with pytest.raises(ValueError, match="clip_skip: expected at most 1"):  # XL skips one of its own
        paint(InstantASPipeline.from_pipe(xl), clip_skip=2)


def test_a_pipeline_without_text_encoders_paints_embeddings_alone():
    theirs = tiny.tiny_pipeline(text_encoder=None, tokenizer=None)
    ours = InstantASPipeline.from_pipe(theirs)
    with pytest.raises(ValueError, match="prompt: expected prompt_embeds in its place"):
        paint(ours)
    with pytest.raises(ValueError, match="negative_prompt_embeds: expected some of 16 tokens"):
        paint(ours, prompt=None, prompt_embeds=random(1, 16, 32))
    call = dict(prompt=None, prompt_embeds=random(1, 16, 32), negative_prompt_embeds=random(1, 16, 32, seed=1))
    got, wanted = both(theirs, **call)
    assert difference(got, wanted) < 1e-4


def test_a_class_in_place_of_a_scheduler_is_refused():
    ours = InstantASPipeline.from_pipe(tiny.tiny_pipeline())
    ours.scheduler = diffusers.EulerDiscreteScheduler
    with pytest.raises(
        TypeError, match="scheduler: expected an instance, got the class; EulerDiscreteScheduler.from_c"
    ):
        paint(ours)

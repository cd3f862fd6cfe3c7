"""Callbacks, each against diffusers' own pipeline with the same callback."""

import diffusers
import pytest
import torch
from diffusers import callbacks

from instantas.pipelines.pipeline import InstantASPipeline
from instantas.regions import Region
from instantas.testing import recorded, tiny

NATIVE = tiny.WINDOW * tiny.CELL


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


IMAGE = torch.rand(1, 3, NATIVE, NATIVE, generator=seeded(1))


def controlled():
    return tiny.tiny_pipeline(kind=diffusers.StableDiffusionControlNetPipeline, controlnet=tiny.tiny_controlnet())


def xl_controlled():
    base = tiny.tiny_xl_pipeline()
    net = diffusers.ControlNetModel.from_unet(base.unet, conditioning_embedding_out_channels=(8, 8, 8, 8))
    torch.manual_seed(4)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if "controlnet_" in name:
                parameter.normal_(std=0.1)
    components = base.components | dict(controlnet=net.eval())
    pipe = diffusers.StableDiffusionXLControlNetPipeline(**components, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def consistent():
    """A latent consistency model, which is told the guidance scale."""
    return tiny.tiny_pipeline(
        kind=diffusers.LatentConsistencyModelPipeline,
        unet=tiny.unet(time_cond_proj_dim=8),
        scheduler=tiny.scheduler(kind=diffusers.LCMScheduler),
    )


def difference(ours, theirs):
    return float((ours - theirs).norm() / theirs.norm())


def both(theirs, callback, names=("latents",), **call):
    """Latents of our pipeline and of diffusers', each with a callback of its own."""
    call = dict(prompt="red brick wall", num_inference_steps=5, output_type="latent", guidance_scale=4.0) | call
    made = []
    for pipe in (InstantASPipeline.from_pipe(theirs), theirs):
        settings = dict(callback_on_step_end=callback(), callback_on_step_end_tensor_inputs=list(names))
        made.append(pipe(**call, **settings, generator=seeded()).images)
    return made


def plain(theirs, **call):
    call = dict(prompt="red brick wall", num_inference_steps=5, output_type="latent", guidance_scale=4.0) | call
    return theirs(**call, generator=seeded()).images


def at(step, change):
    """A callback that changes something once, after a step."""

    def make():
        def callback(pipe, i, t, tensors):
            return change(pipe, tensors) or tensors if i == step else tensors

        return callback

    return make


def scaled(value):
    return at(1, lambda pipe, tensors: setattr(pipe, "_guidance_scale", value))


@pytest.mark.parametrize("make", [tiny.tiny_pipeline, tiny.tiny_xl_pipeline, controlled], ids=["sd", "xl", "control"])
@pytest.mark.parametrize("value", [12.0, 1.5])
def test_a_guidance_scale_holds_from_the_next_step_on_and_for_this_run(make, value):
    theirs = make()
    more = dict(image=IMAGE) if make is controlled else {}
    ours, wanted = both(theirs, scaled(value), **more)
    assert theirs.guidance_scale == value
    again = plain(InstantASPipeline.from_pipe(theirs), **more)
    assert difference(ours, wanted) < 1e-4 < difference(again, wanted)
    assert difference(again, plain(theirs, **more)) < 1e-4


def test_a_guidance_rescale_holds_from_the_next_step_on():
    theirs = tiny.tiny_pipeline()
    ours, wanted = both(theirs, at(1, lambda pipe, tensors: setattr(pipe, "_guidance_rescale", 0.7)))
    assert difference(ours, wanted) < 1e-4 < difference(plain(theirs), wanted)


@pytest.mark.parametrize("name", ["prompt_embeds", "negative_prompt_embeds"])
@pytest.mark.parametrize("in_place", [False, True])
def test_embeddings_are_replaced_and_changed_in_place(name, in_place):
    def change(pipe, tensors):
        if not in_place:
            return tensors | {name: tensors[name] * 1.5}
        tensors[name].mul_(1.5)

    theirs = tiny.tiny_pipeline()
    ours, wanted = both(theirs, at(1, change), ["latents", name], prompt=["wall", "grass"], negative_prompt=["a", "b"])
    assert difference(ours, wanted) < 1e-4
    before = plain(theirs, prompt=["wall", "grass"], negative_prompt=["a", "b"])
    assert (difference(before, wanted) > 1e-4) == (name == "prompt_embeds")  # the other is a part of it already


def test_what_is_returned_beside_what_was_asked_for_counts_too():
    embeds = torch.randn(2, 16, 32, generator=seeded(3))
    theirs = tiny.tiny_pipeline()
    ours, wanted = both(theirs, at(0, lambda pipe, tensors: tensors | {"prompt_embeds": embeds}))
    assert difference(ours, wanted) < 1e-4 < difference(plain(theirs), wanted)


@pytest.mark.parametrize("name", ["add_text_embeds", "add_time_ids"])
def test_conditions_of_sdxl_are_replaced(name):
    theirs = tiny.tiny_xl_pipeline()
    ours, wanted = both(theirs, at(1, lambda pipe, tensors: {name: tensors[name] + 40.0}), ["add_text_embeds", name])
    assert difference(ours, wanted) < 1e-4 < difference(plain(theirs), wanted)


PIPELINES = {
    "sd": (tiny.tiny_pipeline, {}),
    "xl": (tiny.tiny_xl_pipeline, {}),
    "control": (controlled, dict(image=IMAGE)),
    "xl control": (xl_controlled, dict(image=IMAGE)),
    "lcm": (consistent, {}),
}


@pytest.mark.parametrize("name", PIPELINES)
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_every_tensor_is_what_diffusers_has(name, scale):
    make, more = PIPELINES[name]
    theirs, seen = make(), []

    def callback(pipe, i, t, tensors):
        seen.append({key: value if value is None else value.clone() for key, value in tensors.items()})
        return tensors

    both(theirs, lambda: callback, theirs._callback_tensor_inputs, num_inference_steps=2, guidance_scale=scale, **more)
    for ours, wanted in zip(seen[:2], seen[2:]):
        assert list(ours) == list(wanted) == list(theirs._callback_tensor_inputs)
        for key, value in wanted.items():
            assert (ours[key] is None) == (value is None), key
            assert value is None or torch.allclose(ours[key], value, atol=1e-4), key


@pytest.mark.parametrize("name", PIPELINES)
def test_what_a_callback_may_read_is_current(name):
    make, more = PIPELINES[name]
    pipe, seen = InstantASPipeline.from_pipe(make()), []

    def callback(pipe, i, t, tensors):
        pipe._guidance_scale = 3.0
        names = "guidance_scale guidance_rescale clip_skip num_timesteps cross_attention_kwargs denoising_end interrupt"
        seen.append([getattr(pipe, name) for name in names.split()] + [pipe.do_classifier_free_guidance])

    skip = 1 if "xl" in name else None  # diffusers' other pipelines look for a text_model, which CLIP no longer has
    settings = dict(guidance_scale=4.0, guidance_rescale=0.5, clip_skip=skip, num_inference_steps=4, denoising_end=0.5)
    settings |= dict(cross_attention_kwargs={"scale": 1.0}, output_type="latent", generator=seeded())
    pipe("wall", **settings, callback_on_step_end=callback, **more)
    guided = name != "lcm"  # it is told the scale
    assert seen == [[3.0, 0.5, skip, 2, {"scale": 1.0}, 0.5, False, guided]] * 2
    pipe("wall", num_inference_steps=1, guidance_scale=1.0, output_type="latent", **more)
    assert (pipe.guidance_scale, pipe.guidance_rescale, pipe.clip_skip, pipe.num_timesteps) == (1.0, 0.0, None, 1)
    assert pipe.cross_attention_kwargs is pipe.denoising_end is None and not pipe.do_classifier_free_guidance


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize(
    "name, kind",
    [
        ("sd", callbacks.SDCFGCutoffCallback),
        ("xl", callbacks.SDXLCFGCutoffCallback),
        ("xl control", callbacks.SDXLControlnetCFGCutoffCallback),
    ],
)
def test_official_callbacks_switch_guidance_off(name, kind, several):
    make, more = PIPELINES[name]
    theirs = make()

    def callback():
        cutoff = kind(cutoff_step_ratio=0.4)
        return callbacks.MultiPipelineCallbacks([cutoff, kind(cutoff_step_ratio=0.8)]) if several else cutoff

    count = []
    theirs.unet.register_forward_pre_hook(lambda module, args: count.append(len(args[0])))
    ours, wanted = both(theirs, callback, **more)
    assert count == [2, 2, 2, 1, 1] * 2
    assert difference(ours, wanted) < 1e-4 < difference(plain(theirs, **more), wanted)


def test_guidance_goes_off_and_on_again_with_new_embeddings():
    embeds = torch.randn(2, 16, 32, generator=seeded(3))

    def callback(pipe, i, t, tensors):
        if i == 0:
            pipe._guidance_scale = 0.0
            return tensors | {"prompt_embeds": tensors["prompt_embeds"][-1:]}
        if i == 2:
            pipe._guidance_scale = 6.0
            return tensors | {"prompt_embeds": embeds}
        return tensors

    ours, wanted = both(tiny.tiny_pipeline(), lambda: callback, ["latents", "prompt_embeds"])
    assert difference(ours, wanted) < 1e-4


@pytest.mark.parametrize("bridging", ["none", "shift", "economy", "centred", "dilated", "moments"])
def test_guidance_that_goes_off_and_on_counts_in_every_window(bridging):
    """As many pictures of one window as the canvas holds, which know nothing of each other, for "none"."""
    pipe = InstantASPipeline.from_pipe(tiny.tiny_pipeline())

    def paint(scales, **call):
        def callback(pipe, i, t, tensors):
            pipe._guidance_scale = scales[i + 1] if i + 1 < len(scales) else pipe._guidance_scale

        settings = dict(num_inference_steps=len(scales), guidance_scale=scales[0], callback_on_step_end=callback)
        return pipe("wall", output_type="latent", **settings, **call).images

    noise = torch.randn(1, 4, 20, 36, generator=seeded(5))
    call = dict(latents=noise, height=160, width=288, bridging=bridging)
    off = paint([4.0, 1.0, 1.0, 4.0, 1.0, 4.0], **call)
    assert torch.isfinite(off).all() and difference(off, paint([4.0] * 6, **call)) > 1e-3
    assert torch.equal(off, paint([4.0, 0.3, 1.0, 4.0, 0.0, 4.0], **call))  # up to 1 is no guidance
    if bridging == "none":
        whole, half = dict(height=128, width=256, latents=noise[:, :, :16, :32]), dict(height=128, width=128)
        apart = paint([4.0, 1.0, 2.0], bridging="none", **whole)
        left = paint([4.0, 1.0, 2.0], latents=noise[:, :, :16, :16], **half)
        assert difference(apart[..., :16], left) < 1e-4


def test_guidance_of_regions_goes_on_beside_a_changed_scale():
    pipe = InstantASPipeline.from_pipe(tiny.tiny_pipeline())
    call = dict(num_inference_steps=4, output_type="latent", height=NATIVE, width=2 * NATIVE, bridging="none")
    regions = [Region("grass", box=(0.0, 0.0, 0.5, 1.0), guidance_scale=3.0)]

    def paint(scale, change, **more):
        return pipe(
            "grass",
            guidance_scale=scale,
            callback_on_step_end=at(1, lambda pipe, tensors: setattr(pipe, "_guidance_scale", change))(),
            generator=seeded(),
            **call,
            **more,
        ).images

    got = paint(6.0, 2.0, regions=regions)
    assert difference(got[..., :16], paint(3.0, 3.0)[..., :16]) < 1e-4
    assert difference(got[..., 16:], paint(6.0, 2.0)[..., 16:]) < 1e-4


def test_embeddings_of_the_base_prompt_change_under_regions():
    pipe = InstantASPipeline.from_pipe(tiny.tiny_pipeline())
    embeds = pipe.encode_prompt(["stone"], "cpu", 1, True)
    call = dict(num_inference_steps=3, output_type="latent", height=NATIVE, width=2 * NATIVE, bridging="none")
    call |= dict(callback_on_step_end_tensor_inputs=["prompt_embeds"])

    def change(pipe, tensors):
        return tensors | {"prompt_embeds": torch.cat([embeds[1], embeds[0]])}

    got, wanted = (
        pipe("wall", regions=regions, callback_on_step_end=at(0, change)(), generator=seeded(), **call).images
        for regions in ([Region("grass", box=(0.0, 0.0, 0.5, 1.0))], None)
    )
    grass = pipe("grass", generator=seeded(), num_inference_steps=3, output_type="latent", height=NATIVE,
                 width=2 * NATIVE, bridging="none").images  # fmt: skip
    assert difference(got[..., 16:], wanted[..., 16:]) < 1e-4 and difference(got[..., :16], grass[..., :16]) < 1e-4


def test_time_ids_change_in_every_window():
    theirs, seen = tiny.tiny_xl_pipeline(), []
    note = lambda module, args, kwargs: seen.append(kwargs["added_cond_kwargs"]["time_ids"].tolist())  # noqa: E731
    theirs.unet.register_forward_pre_hook(note, with_kwargs=True)
    shift = torch.tensor([0.0, 0.0, 5.0, 7.0, 0.0, 0.0])
    InstantASPipeline.from_pipe(theirs)(
        "wall",
        height=NATIVE,
        width=2 * NATIVE,
        num_inference_steps=2,
        guidance_scale=1.0,
        bridging="none",
        output_type="latent",
        callback_on_step_end=at(0, lambda pipe, tensors: {"add_time_ids": tensors["add_time_ids"] + shift})(),
        callback_on_step_end_tensor_inputs=["add_time_ids"],
    )
    assert seen == [
        [[128, 256, 0, 0, 128, 128], [128, 256, 0, 128, 128, 128]],
        [[128, 256, 5, 7, 128, 128], [128, 256, 5, 135, 128, 128]],
    ]


def test_a_control_picture_is_replaced():
    theirs = controlled()
    other = 100 * torch.rand(2, 3, NATIVE, NATIVE, generator=seeded(2))
    change = at(0, lambda pipe, tensors: tensors | {"image": other})
    ours, wanted = both(theirs, change, ["image"], image=IMAGE)
    assert difference(ours, wanted) < 1e-4 < difference(plain(theirs, image=IMAGE), wanted)


def test_the_clean_latents_of_a_consistency_model_are_what_is_decoded():
    theirs = consistent()
    change = at(3, lambda pipe, tensors: tensors | {"denoised": tensors["denoised"] * 0.5})
    ours, wanted = both(theirs, change, ["latents", "denoised"], num_inference_steps=4)
    assert difference(ours, wanted) < 1e-4
    assert difference(wanted, 0.5 * plain(theirs, num_inference_steps=4)) < 1e-6
    change = at(0, lambda pipe, tensors: tensors | {"w_embedding": tensors["w_embedding"] * 0.5})
    ours, wanted = both(theirs, change, ["w_embedding"], num_inference_steps=4)
    assert difference(ours, wanted) < 1e-4 < difference(plain(theirs, num_inference_steps=4), wanted)


@pytest.mark.parametrize("held", [False, True])
def test_a_run_is_interrupted_with_the_latents_of_the_callback(held):
    theirs = tiny.tiny_pipeline()

    def change(pipe, tensors):
        target = theirs if held else pipe
        target._interrupt = True
        return {"latents": tensors["latents"] + 1}

    ours, wanted = both(theirs, at(2, change))
    assert difference(ours, wanted) < 1e-4 < difference(plain(theirs), wanted)
    assert difference(plain(InstantASPipeline.from_pipe(theirs)), plain(theirs)) < 1e-4


@pytest.mark.parametrize(
    "error, match, change",
    [
        (ValueError, "prompt_embeds: expected 2 rows", lambda p, x: setattr(p, "_guidance_scale", 3.0)),
        (ValueError, "prompt_embeds: expected 1 or 2 rows", lambda p, x: {"prompt_embeds": torch.zeros(3, 16, 32)}),
        (ValueError, "guidance_scale: expected a finite", lambda p, x: setattr(p, "_guidance_scale", torch.nan)),
        (TypeError, "callback_on_step_end: expected a dictionary", lambda p, x: [x]),
    ],
)
def test_changes_that_cannot_be_are_refused(error, match, change):
    pipe = InstantASPipeline.from_pipe(tiny.tiny_pipeline())
    call = dict(num_inference_steps=3, guidance_scale=1.0, callback_on_step_end_tensor_inputs=["prompt_embeds"])
    with pytest.raises(error, match=match):
        pipe("wall", **call, callback_on_step_end=at(0, change)())


@pytest.mark.parametrize(
    "names, change, right",
    [
        (["latents"], lambda pipe, tensors: {"latents": tensors["latents"] * 1.5}, True),
        (["latents"], lambda pipe, tensors: setattr(pipe, "_guidance_scale", 2.0), False),
        (["prompt_embeds"], lambda pipe, tensors: {"prompt_embeds": tensors["prompt_embeds"] * 1.5}, False),
    ],
)
def test_in_a_graph_latents_alone_may_change(names, change, right):
    pipe = InstantASPipeline.from_pipe(tiny.tiny_pipeline())
    call = dict(num_inference_steps=6, guidance_scale=4.0, output_type="latent", bridging="none", width=2 * NATIVE)
    call |= dict(callback_on_step_end=at(1, change)(), callback_on_step_end_tensor_inputs=names)
    eager = pipe("wall", generator=seeded(), **call).images
    with recorded.recording() as made:
        if not right:
            with pytest.raises(ValueError, match="cuda_graph: expected a callback that changes the latents alone"):
                pipe("wall", generator=seeded(), cuda_graph=True, **call)
            return
        assert difference(pipe("wall", generator=seeded(), cuda_graph=True, **call).images, eager) < 1e-5
    assert made


@pytest.mark.parametrize("make", [tiny.tiny_pipeline, tiny.tiny_xl_pipeline])
def test_a_guidance_interval_is_a_callback_that_sets_the_scale_to_1(make):
    theirs, seen = make(), []
    names = ["prompt_embeds", "add_text_embeds", "add_time_ids"] if make is tiny.tiny_xl_pipeline else ["prompt_embeds"]

    def conditional(pipe, tensors):
        pipe._guidance_scale = 1.0
        return {name: tensors[name].chunk(2)[1] for name in names}

    call = dict(prompt="red brick wall", num_inference_steps=5, output_type="latent", guidance_scale=4.0)
    wanted = theirs(
        **call, generator=seeded(), callback_on_step_end=at(2, conditional)(), callback_on_step_end_tensor_inputs=names
    ).images
    theirs.unet.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    ours = InstantASPipeline.from_pipe(theirs)(**call, generator=seeded(), guidance_interval=(0.0, 0.6)).images
    assert difference(ours, wanted) < 1e-4 < difference(plain(theirs), wanted)
    assert seen[:5] == [2, 2, 2, 1, 1]


@pytest.mark.parametrize(
    "interval, error", [((0.5, 0.5), ValueError), ((-0.1, 1.0), ValueError), (0.5, TypeError), (("a", 1.0), TypeError)]
)
def test_guidance_intervals_that_are_none(interval, error):
    with pytest.raises(error, match="guidance_interval: expected"):
        InstantASPipeline.from_pipe(tiny.tiny_pipeline())("grass", guidance_interval=interval, num_inference_steps=2)

"""The nodes in a ComfyUI checkout (COMFYUI=folder): nothing changes at native size, windows alone on large canvases."""

import pytest
import torch

from instantas.comfyui import MultiDiffusion, Windows
from instantas.sampling.bridging import evaluations
from instantas.windows import WindowPlan
from tests.comfyui.checkout import UNET, WINDOW, noise, prompt, with_random_weights

PIXELS = 8 * WINDOW


def windowed(model, **settings):
    return Windows().patch(model, PIXELS, PIXELS, **settings)[0]


def test_every_sampler_is_bit_equal_at_native_size(comfy, model, run):
    patched, start = windowed(model), noise(WINDOW, WINDOW, batch=2)
    unequal = []
    for sampler in comfy.samplers.KSampler.SAMPLERS:
        plain, ours = (run(each, start, sampler=sampler) for each in (model, patched))
        assert plain.result.isfinite().all()
        if not torch.equal(plain.result, ours.result) or plain.count != ours.count:
            unequal.append(sampler)
    print(f"{len(comfy.samplers.KSampler.SAMPLERS)} samplers, of which not bit-equal at native size: {unequal}")
    assert not unequal


@pytest.mark.parametrize("bridging", ["none", "shift", "economy", "centred", "dilated"])
def test_as_many_evaluations_as_our_own_sampler(model, run, bridging):
    steps, found = 7, run(windowed(model, bridging=bridging), noise(24, 40), steps=7)
    plan = WindowPlan.minimum_coverage(24, 40, WINDOW)
    assert {tuple(x.shape[-2:]) for x in found.calls} == {(WINDOW, WINDOW)}
    print(f"{bridging}: {found.count} evaluations of 24x40 cells in {steps} steps, guided")
    assert found.count == 2 * evaluations(None if bridging == "none" else bridging, plan, steps)
    assert found.result.isfinite().all()


def test_the_baselines_windows_lie_a_stride_apart(model, run):
    patched = MultiDiffusion().patch(model, PIXELS, PIXELS, stride=64)[0]
    found, small = run(patched, noise(24, 40)), run(patched, noise(WINDOW, WINDOW))
    plan = WindowPlan.strided(24, 40, WINDOW, 8)
    assert found.count == 2 * 3 * plan.count and {x.shape[-1] for x in found.calls} == {WINDOW}
    assert torch.equal(small.result, run(model, noise(WINDOW, WINDOW)).result)


class Sides:
    """Two pictures of native size and the canvas that they are the halves of."""

    def __init__(self, tensors):
        self.parts, self.whole = tensors, torch.cat(tensors, dim=-1)

    def __iter__(self):
        return iter((self.whole, *self.parts))


def halves(batch=1, channels=4, scale=1, seed=20):
    return Sides([noise(scale * WINDOW, scale * WINDOW, batch, seed + i, channels) for i in range(2)])


def difference(ours, theirs):
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def agree(run, patched, plain, start, *settings, **same):
    """The canvas through windows is its halves, each sampled alone by the plain model; settings: of the three runs.

    What a half is given matters: with the other half's it is another picture.
    """
    settings = settings or ({},) * 3
    whole = run(patched, start.whole, **same, **settings[0]).result
    apart = [run(plain, part, **same, **own).result for part, own in zip(start.parts, settings[1:])]
    assert difference(whole, torch.cat(apart, dim=-1)) <= 1e-4
    if settings[0] is not settings[1]:
        other = run(plain, start.parts[0], **same, **settings[2]).result
        assert difference(other, apart[0]) >= 1e-2


@pytest.fixture
def control(comfy):
    """function of (pictures, seed, the control before) -> a ControlNet that has an effect"""

    def make(picture, seed=1, previous=None, **settings):
        import comfy.cldm.cldm

        config = {k: v for k, v in UNET.items() if k not in ("out_channels", "transformer_depth_output")}
        net = comfy.cldm.cldm.ControlNet(hint_channels=3, operations=comfy.ops.disable_weight_init, **config)
        device = torch.device("cpu")
        made = comfy.controlnet.ControlNet(with_random_weights(net, seed, std=0.15), load_device=device)
        made.set_cond_hint(picture.abs().clamp(max=1), 0.8, **settings)
        return made.set_previous_controlnet(previous)

    return make


def test_halves_are_sampled_as_alone(model, run):
    agree(run, windowed(model, bridging="none"), model, halves(batch=2))


def test_controlnets_see_windows(model, run, control):
    pictures, others = halves(channels=3, scale=8), halves(channels=3, scale=8, seed=30)
    nets = [control(first, 1, control(second, 2)) for first, second in zip(pictures, others)]
    settings = [
        dict(positive=prompt(1, control=net, control_apply_to_uncond=False), negative=prompt(2, control=net))
        for net in nets
    ]
    agree(run, windowed(model, bridging="none"), model, halves(), *settings)


def test_a_controlnets_pictures_of_a_batch_and_its_part_of_the_run(model, run, control):
    settings = [
        dict(positive=prompt(1, control=control(each, timestep_percent_range=(0.0, 0.5))))
        for each in halves(2, channels=3, scale=8)
    ]
    agree(run, windowed(model, bridging="none"), model, halves(batch=2), *settings)


def test_control_pictures_of_another_size(model, run, control):
    """As ComfyUI scales them to the canvas: here twice as small, each pixel twice."""
    settings = [dict(positive=prompt(1, control=control(each))) for each in halves(channels=3, scale=4)]
    agree(run, windowed(model, bridging="none"), model, halves(), *settings)


def test_img2img_with_a_mask_for_the_noise(model, run):
    pictures, masks = halves(seed=40), halves(channels=1, seed=50)
    settings = [dict(latent=p, noise_mask=(m[:, 0] > 0).float()) for p, m in zip(pictures, masks)]
    agree(run, windowed(model, bridging="none"), model, halves(), *settings, denoise=0.6)


def test_masked_and_timed_conditions(model, run):
    masks = halves(channels=1, seed=60)
    settings = [
        dict(
            positive=prompt(1, mask=(mask[:, 0] > 0).float(), mask_strength=1.0)
            + prompt(3, start_percent=0.0, end_percent=0.5)
        )
        for mask in masks
    ]
    agree(run, windowed(model, bridging="none"), model, halves(), *settings, steps=4)


def test_inpaint_models(tiny, run):
    inpaint = tiny(in_channels=9)
    inpaint.model.set_inpaint()
    pictures, masks = halves(seed=40), halves(channels=1, scale=8, seed=50)
    settings = [
        dict(
            positive=prompt(1, concat_latent_image=p, concat_mask=(m[:, 0] > 0).float()),
            negative=prompt(2, concat_latent_image=p, concat_mask=(m[:, 0] > 0).float()),
        )
        for p, m in zip(pictures, masks)
    ]
    agree(run, windowed(inpaint, bridging="none"), inpaint, halves(), *settings)


def test_an_area_is_a_canvas_of_its_own(model, run):
    """A prompt in the right half alone, beside one everywhere."""
    area = prompt(1) + prompt(3, area=(WINDOW, WINDOW, 0, WINDOW), strength=1.0)
    found = run(windowed(model, bridging="shift"), noise(WINDOW, 2 * WINDOW), positive=area)
    assert {tuple(x.shape[-2:]) for x in found.calls} == {(WINDOW, WINDOW)} and found.result.isfinite().all()
    plain = run(model, noise(WINDOW, WINDOW), positive=prompt(1) + prompt(3, area=(8, 8, 0, 0)))
    ours = run(windowed(model), noise(WINDOW, WINDOW), positive=prompt(1) + prompt(3, area=(8, 8, 0, 0)))
    assert torch.equal(plain.result, ours.result)


def test_conditions_that_come_and_go_re_use_their_own(model, run):
    """A third condition that begins in the middle of the run changes how ComfyUI batches the others."""
    late = prompt(1) + prompt(3, start_percent=0.5, end_percent=1.0)
    found = run(windowed(model, bridging="economy"), noise(24, 40), positive=late, steps=8)
    assert found.result.isfinite().all()
    assert found.count < 3 * 8 * 6


def test_a_wrapper_that_was_there_sees_windows(model, run):
    seen, before = [], model.clone()
    before.set_model_unet_function_wrapper(
        lambda apply, args: seen.append(args["input"].shape[-2:]) or apply(args["input"], args["timestep"], **args["c"])
    )
    ours = run(windowed(before), noise(24, 40))
    assert set(seen) == {(WINDOW, WINDOW)}
    assert torch.equal(ours.result, run(windowed(model), noise(24, 40)).result)


def test_perturbed_guidance_re_uses_its_own(model, run):
    from comfy_extras.nodes_pag import PerturbedAttentionGuidance

    guided = PerturbedAttentionGuidance().execute(model, 3.0)[0]
    start = noise(WINDOW, WINDOW)
    assert torch.equal(run(guided, start).result, run(windowed(guided), start).result)
    found = run(windowed(guided, bridging="economy"), noise(24, 40), steps=7)
    assert found.count == 3 * evaluations("economy", WindowPlan.minimum_coverage(24, 40, WINDOW), 7)


def test_what_cannot_be_right_is_refused(comfy, model, tiny, run):
    after = windowed(model)
    after.set_model_unet_function_wrapper(lambda apply, args: apply(args["input"], args["timestep"], **args["c"]))
    with pytest.raises(ValueError, match="model: expected Windows after all nodes that wrap"):
        run(after, noise(24, 40))
    with pytest.raises(ValueError, match="conditioning: expected no GLIGEN"):
        run(windowed(model), noise(24, 40), positive=prompt(1, gligen=("position", model, [])))
    from comfy_extras.nodes_sag import SelfAttentionGuidance

    with pytest.raises(ValueError, match="Self-Attention Guidance"):
        run(windowed(SelfAttentionGuidance().execute(model, 0.5, 2.0)[0]), noise(24, 40))
    flow = model.clone()
    flow.model = type(model.model).__new__(type(model.model))
    torch.nn.Module.__init__(flow.model)
    flow.model.model_type, flow.model.diffusion_model = comfy.model_base.ModelType.FLUX, model.model.diffusion_model
    with pytest.raises(ValueError, match="model: expected an image UNet"):
        windowed(flow)


def test_a_window_of_an_xl_model_is_told_its_own_size(tiny, run):
    """Its halves, each sampled alone, are of the window's size; a graph that says another is heard."""
    large = tiny("SDXL", num_classes="sequential", adm_in_channels=2816)
    patched, start = windowed(large, bridging="none"), halves()
    pooled = {"pooled_output": noise(1, 1280)[0, :1, 0]}
    own = dict(positive=prompt(1, **pooled), negative=prompt(2, **pooled))
    agree(run, patched, large, start, own, own, own)
    said = dict(positive=prompt(1, width=2048, **pooled), negative=own["negative"])
    assert difference(run(patched, start.whole, **said).result, run(patched, start.whole, **own).result) >= 1e-3


def test_nodes_after_windows_leave_it_as_it_is(model, run):
    assert torch.equal(
        run(windowed(model).clone().clone(), noise(24, 40)).result, run(windowed(model), noise(24, 40)).result
    )


def test_wrapping_axes_join(model, run):
    """A picture that is a circle, moved along it: windows of no bridge lie elsewhere on it, all else is the same."""
    patched = windowed(model, bridging="none", wrap="horizontal")
    found = run(patched, noise(WINDOW, 32))
    moved = run(patched, noise(WINDOW, 32).roll(16, dims=-1))
    assert difference(moved.result.roll(-16, dims=-1), found.result) <= 1e-4


class Adapter(torch.nn.Module):
    """A T2I-Adapter of one layer, for the UNet's first."""

    unshuffle_amount = 8

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Conv2d(3, UNET["model_channels"], 8, stride=8)

    def forward(self, hint):
        return {"input": [self.layer(hint)]}


def test_adapters_see_windows_behind_and_before_a_controlnet(comfy, model, run, control):
    net, settings = with_random_weights(Adapter(), std=0.2), []
    for hint, other in zip(halves(channels=3, scale=8), halves(channels=3, scale=8, seed=30)):
        adapters = [comfy.controlnet.T2IAdapter(net, 3, 8, "nearest-exact", device="cpu") for _ in range(2)]
        first = adapters[0].set_cond_hint(hint.abs(), 0.7)
        last = adapters[1].set_cond_hint(other.abs(), 0.5)
        last.set_previous_controlnet(control(other, previous=first))
        settings.append(dict(positive=prompt(1, control=last)))
    agree(run, windowed(model, bridging="none"), model, halves(), *settings)


def test_without_guidance_the_negative_prompt_is_not_evaluated(model, run):
    patched, start = windowed(model, bridging="none"), halves()
    agree(run, patched, model, start, cfg=1.0)
    assert run(patched, start.whole, cfg=1.0).count == 3 * 2


@pytest.mark.parametrize("sampler", ["heun", "dpmpp_2m", "uni_pc", "dpm_adaptive"])
def test_other_samplers_on_halves(model, run, sampler):
    """Deterministic ones; an adaptive one chooses its steps by the whole canvas, and is finite."""
    start, patched = halves(), windowed(model, bridging="none")
    if sampler == "dpm_adaptive":
        assert run(windowed(model), noise(24, 40), sampler=sampler).result.isfinite().all()
    else:
        agree(run, patched, model, start, sampler=sampler)

"""The nodes that give a model windows, and their hooks, with stand-ins for what ComfyUI calls them with."""

import inspect
from types import SimpleNamespace

import pytest
import torch

from instantas.comfyui import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS, MultiDiffusion, Windows
from instantas.comfyui.hooks import DeferredControl, Hooks, Strided
from instantas.sampling.bridging import Stage, evaluations
from instantas.sampling.hosted import Windowed
from instantas.windows import WindowPlan
from tests.comfyui.checkout import noise
from tests.comfyui.stand_ins import SIGMAS, WINDOW, Executor, Patcher, Video, comfy, sampled, two, upscaled, windowed  # noqa: F401


@pytest.mark.parametrize("bridging", ["none", "shift", "economy", "centred", "dilated"])
def test_the_network_sees_windows_as_often_as_with_our_sampler(bridging):
    seen = []
    sampled(windowed(Patcher(), bridging=bridging), noise(12, 20), two(), seen=seen)
    plan = WindowPlan.minimum_coverage(12, 20, WINDOW)
    assert {x.shape[-2:] for x in seen} == {(WINDOW, WINDOW)}
    assert sum(map(len, seen)) == 2 * evaluations(None if bridging == "none" else bridging, plan, len(SIGMAS) - 1)


@pytest.mark.parametrize("bridging", ["shift", "economy"])
def test_what_is_re_used_is_the_conditions_own_in_any_batch(bridging):
    """As at the mercy of free memory: both at once, the other way round, one by one."""
    groups = [["positive", "negative"]], [["negative", "positive"]], [["negative"], ["positive"]]
    usual, _ = sampled(windowed(Patcher(), bridging=bridging), noise(12, 20), two())
    changing, _ = sampled(windowed(Patcher(), bridging=bridging), noise(12, 20), two(), lambda step: groups[step % 3])
    torch.testing.assert_close(changing, usual, rtol=1e-5, atol=1e-5)


class Half:
    """Evaluates the left window alone, but for the first step."""

    def step(self, step, steps, plan):
        return Stage(plan if step == 0 else plan.subset(plan.origins[:, 1] == 0))


def test_where_the_network_is_not_evaluated_its_noise_stays():
    hooks, found = Hooks(Windowed(WINDOW, bridging=Half()), None), []
    hooks._sigmas = SIGMAS
    for step, sigma in enumerate(SIGMAS[:2]):
        x = noise(WINDOW, 2 * WINDOW, seed=step)
        args = {"input": x, "timestep": sigma[None], "c": {"transformer_options": {"uuids": ["a"]}}}
        found.append((x, hooks.network(lambda windows, t, **c: 0.5 * windows, args)))
    (x, said), (later, reused) = found
    eps = (x - said) / SIGMAS[0]
    torch.testing.assert_close(reused[..., :WINDOW], 0.5 * later[..., :WINDOW])
    torch.testing.assert_close(reused[..., WINDOW:], (later - SIGMAS[1] * eps)[..., WINDOW:])


def test_at_native_size_the_call_is_what_it_was():
    model, seen = windowed(Patcher()), []
    hooks = model.wrappers["OUTER_SAMPLE"].__self__
    c = {"c_crossattn": noise(7, 3), "transformer_options": {"uuids": ["a"]}}
    x, t = noise(WINDOW, WINDOW), torch.tensor([3.0])
    hooks._sigmas = SIGMAS
    said = hooks.network(lambda x, t, **c: seen.append((x, t, c)) or x, {"input": x, "timestep": t, "c": c})
    assert said is x and seen[0][0] is x and seen[0][1] is t and seen[0][2]["c_crossattn"] is c["c_crossattn"]


class Control:
    """Adds its picture's mean over each cell, at every step."""

    def __init__(self, picture, previous=None, ratio=8):
        self.cond_hint_original, self.cond_hint, self.previous_controlnet = picture, None, previous
        self.compression_ratio, self.upscale_algorithm = ratio, "nearest-exact"
        self.latent_format, self.extra_concat_orig = None, []

    def get_control(self, x, t, cond, batched):
        before = 0 if self.previous_controlnet is None else self.previous_controlnet.get_control(x, t, cond, batched)
        size = [side * self.compression_ratio for side in x.shape[-2:]]
        hint = torch.nn.functional.avg_pool2d(upscaled(self.cond_hint_original, *size), self.compression_ratio)
        return before + (hint if len(hint) in (1, len(x)) else hint.repeat(batched, 1, 1, 1))


@pytest.mark.parametrize("pictures", [1, 2])
def test_what_belongs_to_the_canvas_is_cut_like_the_latents(pictures):
    """A canvas of two windows is its halves, each sampled alone: several control pictures, an inpaint model's image."""
    start = noise(WINDOW, 2 * WINDOW, batch=2)
    image = noise(WINDOW, 2 * WINDOW, batch=2, seed=1)
    hints = noise(8 * WINDOW, 16 * WINDOW, pictures, 2), noise(4 * WINDOW, 8 * WINDOW, seed=3)

    def run(columns):
        first, second = (h[..., columns.start * k : columns.stop * k] for h, k in zip(hints, (8, 4)))
        control = Control(first, Control(second))
        conds = two(c_concat=image[..., columns], control=control)
        conds = {name: cond | {"gain": cond["gain"].repeat(2, 1, 1, 1)} for name, cond in conds.items()}
        return sampled(windowed(Patcher(), bridging="none"), start[..., columns], conds)[0]

    apart = torch.cat([run(slice(0, WINDOW)), run(slice(WINDOW, 2 * WINDOW))], dim=-1)
    torch.testing.assert_close(run(slice(0, 2 * WINDOW)), apart, rtol=1e-4, atol=1e-4)


def test_a_wrapper_that_was_there_is_called_with_windows():
    model, seen = Patcher(), []

    def inner(apply_model, args):
        seen.append((args["input"].shape, args["cond_or_uncond"]))
        return apply_model(args["input"], args["timestep"], **args["c"])

    plain, _ = sampled(windowed(model), noise(12, 20), two())
    model.set_model_unet_function_wrapper(inner)
    chained, _ = sampled(windowed(model), noise(12, 20), two())
    assert torch.equal(plain, chained)
    assert {(shape[-2:], tuple(which)) for shape, which in seen} == {((WINDOW, WINDOW), (0, 1))}


def test_hooks_are_the_same_in_a_clone_of_a_clone():
    once = windowed(Patcher())
    again = once.clone().clone()
    assert torch.equal(sampled(once, noise(12, 20), two())[0], sampled(again, noise(12, 20), two())[0])


def test_conditions_say_the_size_of_a_window_unless_the_graph_does():
    conds = two()
    conds["negative"] |= {"width": 1024}
    _, lists = sampled(windowed(Patcher()), noise(6, 20), conds)
    assert [(c["width"], c["height"]) for (c,) in lists.values()] == [(64, 48), (1024, 48)]


def test_nothing_is_kept_of_a_run_not_even_of_a_failing_one():
    model = windowed(Patcher(), bridging="economy")
    hooks = model.wrappers["OUTER_SAMPLE"].__self__

    def fail(*args):
        hooks.host._latest["positive"] = "something"
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        hooks.sample(Executor(fail, SimpleNamespace(conds={})), noise(12, 20), None, None, SIGMAS)
    assert not hooks.host._latest and hooks._sigmas is None


def test_the_baselines_plan():
    plan = Strided((WINDOW, WINDOW), 4, wrap=(False, True)).plan((20, 6))
    assert plan == WindowPlan.strided(20, 6, (WINDOW, 6), 4, wrap=(False, True))
    seen = []
    sampled(MultiDiffusion().patch(Patcher(), 64, 64, stride=32)[0], noise(12, 20), two(), seen=seen)
    assert sum(map(len, seen)) == 2 * (len(SIGMAS) - 1) * WindowPlan.strided(12, 20, WINDOW, 4).count


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(width=100), "width: expected a multiple of 8 pixels, got 100"),
        (dict(height=0), "height: expected a multiple of 8 pixels, got 0"),
        (dict(bridging="moments"), "bridging: expected one of shift"),
        (dict(window_batch=0), "window_batch_size: expected a positive integer"),
        (dict(model=Patcher("FLUX")), "model: expected an image UNet"),
        (dict(model=Patcher(network=torch.nn.Identity())), "model: expected an image UNet"),
        (dict(model=Patcher(model=Video)), r"model: expected an image UNet \(Stable Diffusion 1, 2, XL\), got Video"),
    ],
)
def test_windows_refuses(settings, message):
    with pytest.raises(ValueError, match=message):
        Windows().patch(**{"model": Patcher(), "width": 64, "height": 64, **settings})


def test_the_baseline_refuses_strides_that_leave_holes():
    with pytest.raises(ValueError, match="stride: expected at most the window's 64 pixels, got 128"):
        MultiDiffusion().patch(Patcher(), 128, 64, stride=128)


def test_runs_that_cannot_be_right_are_refused():
    with pytest.raises(ValueError, match="conditioning: expected no GLIGEN"):
        sampled(windowed(Patcher()), noise(12, 20), two(gligen=("position",)))
    for latents in (dict(latent_format="latents"), dict(extra_concat_orig=[1])):
        control = Control(noise(64, 64))
        control.__dict__.update(latents)
        with pytest.raises(ValueError, match="control_net: expected one that takes pictures"):
            sampled(windowed(Patcher()), noise(12, 20), two(control=control))
    after = windowed(Patcher())
    after.set_model_unet_function_wrapper(lambda apply_model, args: None)
    with pytest.raises(ValueError, match="model: expected Windows after all nodes that wrap"):
        sampled(after, noise(12, 20), two())
    guided = windowed(Patcher())
    guided.model_options["sampler_post_cfg_function"] = [SimpleNamespace(__module__="comfy_extras.nodes_sag")]
    with pytest.raises(ValueError, match="Self-Attention Guidance"):
        sampled(guided, noise(12, 20), two())
    with pytest.raises(ValueError, match=r"latent_image: expected pictures \(B, C, H, W\), got \(1, 4, 2, 12, 20\)"):
        sampled(windowed(Patcher()), noise(12, 20)[:, :, None].repeat(1, 1, 2, 1, 1), two())


def test_a_control_is_itself_at_native_size():
    control, x = Control(noise(64, 64)), noise(WINDOW, WINDOW)
    deferred = DeferredControl(control)
    assert deferred.get_control(x, None, {}, 1) is deferred
    assert torch.equal(deferred.at(x, None, {}, None, 1), control.get_control(x, None, {}, 1))


@pytest.mark.parametrize("name", NODE_CLASS_MAPPINGS)
def test_declared_inputs_are_those_of_the_function(name):
    node = NODE_CLASS_MAPPINGS[name]
    groups = node.INPUT_TYPES()
    parameters = dict(inspect.signature(getattr(node, node.FUNCTION)).parameters)
    parameters.pop("self")
    declared = {key: dict(*settings) for group in groups.values() for key, (kind, *settings) in group.items()}
    assert list(declared) == list(parameters)
    for key, settings in declared.items():
        if parameters[key].default is not inspect.Parameter.empty and "default" in settings:
            assert settings["default"] == parameters[key].default
    assert name in NODE_DISPLAY_NAME_MAPPINGS and node.DESCRIPTION and node.CATEGORY == "instantas"


def test_hooks_need_no_comfyui_to_be_made():
    assert Hooks(Windowed(WINDOW), None).host.window == (WINDOW, WINDOW)

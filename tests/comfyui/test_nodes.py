"""The nodes and their hooks, with small stand-ins for what ComfyUI calls them with: no checkout is needed."""

import copy
import inspect
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from instantas import ops
from instantas.comfyui import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS, MultiDiffusion, Region, Regions, Windows
from instantas.comfyui.hooks import DeferredControl, Hooks, Strided
from instantas.comfyui.regions import ATTENDED, RegionHooks
from instantas.sampling.bridging import Stage, evaluations
from instantas.sampling.hosted import Place, Windowed
from instantas.windows import WindowPlan
from tests.comfyui.checkout import noise, prompt

WINDOW = 8
SIGMAS = torch.tensor([14.0, 7.0, 3.0, 1.5, 0.7, 0.3, 0.1, 0.0])


class UNet(torch.nn.Module):
    """One cross-attention in each part, as ComfyUI names them."""

    def __init__(self):
        super().__init__()
        layer = lambda: torch.nn.ModuleDict({"attn1": torch.nn.Identity(), "attn2": torch.nn.Identity()})  # noqa: E731
        self.input_blocks = torch.nn.ModuleList([torch.nn.ModuleList(), torch.nn.ModuleList([layer()])])
        self.middle_block = torch.nn.ModuleList([torch.nn.Identity(), layer()])
        self.output_blocks = torch.nn.ModuleList([torch.nn.ModuleList([layer()])])


class Patcher:
    """As ComfyUI's ModelPatcher: a clone's options are deep copies."""

    def __init__(self, kind="EPS", network=None, model=SimpleNamespace):
        self.model, self.network = model(model_type=kind), UNet() if network is None else network
        self.model_options, self.wrappers = {"transformer_options": {}}, {}

    def clone(self):
        clone = copy.copy(self)
        clone.model_options, clone.wrappers = copy.deepcopy(self.model_options), dict(self.wrappers)
        return clone

    def get_model_object(self, name):
        return self.network

    def set_model_unet_function_wrapper(self, wrapper):
        self.model_options["model_function_wrapper"] = wrapper

    def add_wrapper_with_key(self, kind, key, wrapper):
        self.wrappers[kind] = wrapper

    def set_model_attn2_patch(self, patch):
        self.model_options["transformer_options"].setdefault("patches", {})["attn2_patch"] = [patch]

    def set_model_attn2_replace(self, patch, block, number):
        replaced = self.model_options["transformer_options"].setdefault("patches_replace", {})
        replaced.setdefault("attn2", {})[block, number] = patch


class Video(SimpleNamespace):
    pass


@pytest.fixture(autouse=True)
def comfy(monkeypatch):
    """The names that are imported of ComfyUI."""

    def module(name, **names):
        made = ModuleType(name)
        made.__dict__.update(names)
        monkeypatch.setitem(sys.modules, name, made)

    kinds = "EPS", "V_PREDICTION", "V_PREDICTION_EDM", "V_PREDICTION_CONTINUOUS", "EDM", "FLUX"
    wrappers = "OUTER_SAMPLE", "CALC_COND_BATCH", "DIFFUSION_MODEL"
    module("comfy")
    module("comfy.patcher_extension", WrappersMP=SimpleNamespace(**{name: name for name in wrappers}))
    module("comfy.model_base", ModelType=SimpleNamespace(**{kind: kind for kind in kinds}), SVD_img2vid=Video)
    module("comfy.ldm.modules.diffusionmodules.openaimodel", UNetModel=UNet)
    module("comfy.utils", common_upscale=lambda image, width, height, *how: upscaled(image, height, width))


def upscaled(image, height, width):
    return torch.nn.functional.interpolate(image, (height, width), mode="nearest-exact")


def windowed(model, **settings):
    return Windows().patch(model, 8 * WINDOW, 8 * WINDOW, **settings)[0]


def network(x, sigma, gain=0.5, c_concat=None, control=None, transformer_options=None):
    """x_0, which depends on the whole window."""
    spread = torch.fft.ifft2(torch.fft.fft2(x).abs()).real
    added = sum(each for each in (c_concat, control) if each is not None)
    return gain * x / (1 + sigma.view(-1, 1, 1, 1)) + 0.1 * torch.tanh(spread) + added


def sampled(model, x, conds, groups=lambda step: None, seen=None):
    """Euler as ComfyUI runs it: conditions {"positive": {...}} in batches, of which `groups` may choose the names."""
    seen = [] if seen is None else seen
    lists = {name: [dict(cond, uuid=name)] for name, cond in conds.items()}

    def apply_model(x, t, **c):
        seen.append(x)
        return network(x, t, **c)

    def batch(model_, group, x, sigma, options):
        named = [cond for conds in group for cond in conds]
        given = {}
        for key in ("gain", "c_concat"):
            if key in named[0]:
                given[key] = torch.cat([cond[key] for cond in named])
        given["transformer_options"] = {**options["transformer_options"], "uuids": [cond["uuid"] for cond in named]}
        whole, times = x.repeat(len(named), 1, 1, 1), sigma.repeat(len(named))
        if "control" in named[0]:
            given["control"] = named[0]["control"].get_control(whole, times, given, len(named))
        args = {"input": whole, "timestep": times, "c": given, "cond_or_uncond": list(range(len(named)))}
        return options["model_function_wrapper"](apply_model, args).chunk(len(named))

    def outer(noise, latent, sampler, sigmas):
        x = noise * sigmas[0]
        for step, (sigma, following) in enumerate(zip(sigmas, sigmas[1:])):
            said = {}
            for names in groups(step) or [list(lists)]:
                group = [lists[name] for name in names]
                args = model, group, x, sigma.expand(len(x)), model.model_options
                said |= dict(zip(names, model.wrappers["CALC_COND_BATCH"](batch, *args)))
            denoised = sum(said[name] * weight for name, weight in zip(lists, (2.0, -1.0)))
            x = x + (following - sigma) * (x - denoised) / sigma
        return x

    executor = Executor(outer, SimpleNamespace(conds=lists))
    return model.wrappers["OUTER_SAMPLE"](executor, x, torch.zeros_like(x), None, SIGMAS), lists


class Executor:
    def __init__(self, call, class_obj):
        self.call, self.class_obj = call, class_obj

    def __call__(self, *args, **named):
        return self.call(*args, **named)


def two(**named):
    """Conditions of one prompt each; named: what both have."""
    gains = {"positive": 0.5, "negative": -0.3}
    return {name: dict(named, gain=torch.full((1, 1, 1, 1), gain)) for name, gain in gains.items()}


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


def left(columns=160):
    mask = torch.zeros(1, 96, columns)
    mask[..., : columns // 2] = 1
    return mask


def listed(*regions):
    found = ()
    for conditioning, mask in regions:
        (found,) = Region().add(conditioning, mask, regions=found)
    return found


def lay_out(hooks, x, place=None, uuids=("positive", "negative")):
    """The bank and the layout with which a network would be evaluated."""
    context = torch.cat([prompt(i)[0][0] for i in range(len(uuids))]).repeat_interleave(len(x) // len(uuids), 0)
    options = {"uuids": list(uuids), "sigmas": SIGMAS[:1], "patches_replace": {"attn2": {("middle", 0): hooks.attend}}}
    options |= {} if place is None else {"instantas": place}
    seen = []
    hooks.evaluate(lambda *args, **named: seen.append(args[5]), x, None, context, transformer_options=options)
    return seen[0]


def regional_hooks(regions, mode="blend", uuids=("positive",)):
    hooks = RegionHooks(regions, mode, 0.0)
    hooks._lengths, hooks._sigmas = dict.fromkeys(uuids, 7), SIGMAS
    return hooks


def test_windows_have_their_part_of_the_regions_and_the_negative_prompt_none():
    plan = WindowPlan.minimum_coverage(12, 20, WINDOW)
    place = Place(plan, torch.arange(2).repeat_interleave(2), torch.tensor([[0, 0], [4, 12]] * 2).int(), range(2), 0.0)
    hooks = regional_hooks(listed((prompt(7), left())))
    bank, layout = lay_out(hooks, noise(WINDOW, WINDOW, batch=4), place)[ATTENDED]
    assert bank.shape == (3, 7, 32)  # positive, negative, the region's
    weights = layout.weights_at((WINDOW, WINDOW))
    assert layout.ids.tolist() == [[0, 2], [0, 2], [1, -1], [1, -1]]
    for element, (base, region) in enumerate([(0.0, 1.0), (1.0, 0.0), (1.0, 0.0), (1.0, 0.0)]):
        assert (weights[element, 0] == base).all() and (weights[element, 1] == region).all()


def test_layers_attend_by_the_layout_at_their_resolution():
    hooks = regional_hooks(listed((prompt(7), left())))
    options = lay_out(hooks, noise(12, 20, batch=2)) | {"n_heads": 2, "activations_shape": [2, 32, 6, 10]}
    query, bank, value = hooks.swap(noise(60, 32)[0, :2], None, None, options)
    assert bank is value
    out = hooks.attend(query, bank, 0.5 * value, options)
    layout = options[ATTENDED][1]
    heads = [each.unflatten(-1, (2, -1)) for each in (query, bank, 0.5 * value)]
    expected = ops.regional_attention(*heads, layout.ids, layout.weights_at((6, 10)))
    torch.testing.assert_close(out, expected.flatten(-2))


def test_regions_are_of_the_positive_conditions_for_one_run():
    model = Regions().patch(Patcher(), listed((prompt(7), left())))[0]
    replaced = model.model_options["transformer_options"]["patches_replace"]["attn2"]
    assert set(replaced) == {("input", 1), ("middle", 0), ("output", 0)}
    hooks, found = model.wrappers["OUTER_SAMPLE"].__self__, []
    conds = {name: [{"uuid": name, "cross_attn": prompt(1)[0][0]}] for name in ("positive", "negative")}
    executor = Executor(lambda *args: found.append(dict(hooks._lengths)), SimpleNamespace(conds=conds))
    hooks.sample(executor, noise(12, 20), None, None, SIGMAS)
    assert found == [{"positive": 7}] and not hooks._lengths and not hooks._maps
    conds["negative"][0]["area"] = (8, 8, 0, 0)
    with pytest.raises(ValueError, match="conditioning: expected no areas beside regions"):
        hooks.sample(executor, noise(12, 20), None, None, SIGMAS)
    del conds["positive"]
    with pytest.raises(ValueError, match="guider: expected one with positive conditions, got negative"):
        hooks.sample(executor, noise(12, 20), None, None, SIGMAS)


@pytest.mark.parametrize(
    "conditioning, mask, message",
    [
        (prompt(1) + prompt(2), left(), "conditioning: expected one prompt, got 2 combined"),
        (prompt(1, area=(8, 8, 0, 0)), left(), "conditioning: expected a prompt alone, got one with area"),
        (prompt(1, control=object()), left(), "conditioning: expected a prompt alone, got one with control"),
        (prompt(1), left().repeat(2, 1, 1), r"mask: expected \(height, width\)"),
        (prompt(1), torch.zeros(1, 96, 160), "mask: expected some part above 0"),
    ],
)
def test_region_refuses(conditioning, mask, message):
    with pytest.raises(ValueError, match=message):
        Region().add(conditioning, mask)


def test_regions_refuse_what_another_node_replaces():
    regions = listed((prompt(7), left()))
    with pytest.raises(ValueError, match="model: expected cross-attention that no other node replaces"):
        Regions().patch(Regions().patch(Patcher(), regions)[0], regions)
    with pytest.raises(ValueError, match="mode: expected 'blend' or 'joint', got 'sum'"):
        Regions().patch(Patcher(), regions, mode="sum")
    hooks = regional_hooks(regions)
    options = {"uuids": ["positive"], "patches_replace": {"attn2": {("middle", 0): print}}}
    with pytest.raises(ValueError, match="IP-Adapter"):
        hooks.evaluate(print, noise(12, 20), context=prompt(1)[0][0], transformer_options=options)


def test_hooks_need_no_comfyui_to_be_made():
    assert Hooks(Windowed(WINDOW), None).host.window == (WINDOW, WINDOW)

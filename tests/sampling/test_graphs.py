"""Whole steps captured once and replayed: the same results, with nothing left of the host; no copy in the loop.

Without a GPU, operations recorded on the CPU take the graphs' place (`recorded.py`).
"""

import contextlib
from unittest import mock

import diffusers
import pytest
import torch
from diffusers import StableDiffusionControlNetPipeline
from torch.utils._python_dispatch import TorchDispatchMode

from instantas.ops import validation
from instantas.pipelines.attention import regional_prompts
from instantas.pipelines.conditions import MicroConditions, Prompts
from instantas.pipelines.control import Control
from instantas.pipelines.denoiser import WindowDenoiser
from instantas.pipelines.pipeline import InstantASPipeline
from instantas.regions import Region, RegionMap
from instantas.sampling import bridging, coarse, sampler, spectrum
from instantas.sampling.sampler import sample
from instantas.testing import recorded, tiny
from instantas.windows import WindowPlan

WIDE = WindowPlan.minimum_coverage(20, 50, 16)
REGIONS = [
    Region("grass", box=(0.0, 0.0, 0.5, 1.0), feather=16),
    Region("stone", box=(0.4, 0.2, 1.0, 1.0), negative_prompt="wood"),
]


@pytest.fixture
def recording():
    with recorded.recording() as made:
        yield made


def of(name, prediction_type="epsilon"):
    config = dict(skip_prk_steps=True) if name == "PNDM" else {}
    return tiny.scheduler(prediction_type, kind=getattr(diffusers, name + "Scheduler"), **config)


def denoise(windows, timestep, context):
    """Depends on the time, on where the windows lie, and on what surrounds a cell."""
    share, place = timestep / 1000, context.origins.sum(1)[:, None, None, None] / 100
    mean = windows.mean((2, 3), keepdim=True)
    return torch.tanh(windows + place) * (1 - share) + 0.2 * mean, torch.sin(windows - place) * share + 0.1 * mean


def both(denoiser, recording, plan=WIDE, kind="DDIM", prediction_type="epsilon", steps=9, pictures=1, **settings):
    """A run without graphs and one with them, and how often the host was asked for predictions."""
    noise = torch.randn(pictures, 4, plan.height, plan.width, generator=torch.Generator().manual_seed(0))
    settings = dict(num_inference_steps=steps, guidance_scale=3.0) | settings
    counted, results = mock.Mock(side_effect=denoiser), []
    for given, graph in ((denoiser, False), (counted, True)):
        counted.phase = getattr(denoiser, "phase", None)
        results.append(sample(given, noise, plan, of(kind, prediction_type), cuda_graph=graph, **settings))
    return *results, counted.call_count


@pytest.mark.parametrize("kind", ["DDIM", "EulerDiscrete", "DPMSolverMultistep", "PNDM", "UniPCMultistep"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_a_replayed_run_is_the_run(recording, kind, prediction_type):
    plain, replayed, calls = both(denoise, recording, kind=kind, prediction_type=prediction_type, steps=20)
    torch.testing.assert_close(replayed, plain, rtol=1e-5, atol=1e-5)
    assert len(recording) == 1 and calls == 2 * 2  # two batches: as it is, and captured


@pytest.mark.parametrize("name", ["shift", "economy", "centred", "dilated", "moments", "moments+shift"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("wrap", [(False, False), (False, True)])
def test_bridges_move_the_windows_of_a_graph(recording, name, prediction_type, wrap):
    plan = WindowPlan.minimum_coverage(32, 50, 16, wrap=wrap)
    settings = dict(plan=plan, bridging=name, prediction_type=prediction_type, steps=24, window_batch_size=3)
    plain, replayed, calls = both(denoise, recording, **settings)
    torch.testing.assert_close(replayed, plain, rtol=1e-5, atol=1e-5)
    evaluated = bridging.evaluations(name, plan, 24) / plan.count * 3
    if "moments" not in name:
        assert recording and calls < evaluated / 2


@pytest.mark.parametrize(
    "settings",
    [
        dict(guidance_rescale=0.5),
        dict(pictures=2, window_batch_size=5),
        dict(weight=WIDE.weight("gaussian")),
        dict(guidance_scale=torch.linspace(0, 4, 1000).view(20, 50)),
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_settings_of_a_run(recording, settings):
    plain, replayed, _ = both(denoise, recording, **settings)
    torch.testing.assert_close(replayed, plain, rtol=1e-5, atol=1e-5)
    assert len(recording) == 1


def test_callbacks_see_replace_and_stop(recording):
    seen = []

    def callback(i, t, latents):
        seen.append(latents)
        if i == 7:
            raise StopIteration
        return latents * 0.5 if i == 4 else None

    plain, replayed, _ = both(denoise, recording, callback=callback)
    torch.testing.assert_close(replayed, plain, rtol=1e-5, atol=1e-5)
    for without, with_graphs in zip(seen[:8], seen[8:]):  # each the latents of its own step, also later
        torch.testing.assert_close(with_graphs, without, rtol=1e-5, atol=1e-5)


def test_phases_have_graphs_of_their_own(recording):
    def changing(windows, timestep, context):
        return denoise(windows, timestep, context) if context.step < 5 else (windows * 0.1, windows * 0.2)

    plain, replayed, _ = both(changing, recording, steps=12)
    assert not torch.allclose(replayed, plain, rtol=1e-3, atol=1e-3)  # it did not say so
    changing.phase = lambda context: context.step < 5
    plain, replayed, _ = both(changing, recording, steps=12)
    torch.testing.assert_close(replayed, plain, rtol=1e-5, atol=1e-5)
    assert len(recording) == 1 + 2


@pytest.mark.parametrize("saved", [False, True])
def test_steps_in_and_outside_of_a_guidance_interval_have_graphs_of_their_own(recording, saved):
    def saving(windows, timestep, context):
        cond, uncond = denoise(windows, timestep, context)
        return cond, uncond if context.guided or not saved else None

    plain, replayed, _ = both(saving, recording, steps=12, guidance_interval=(0.0, 0.5))
    torch.testing.assert_close(replayed, plain, rtol=1e-5, atol=1e-5)
    assert len(recording) == 2


def test_graphs_of_a_coarse_start(recording, monkeypatch):
    """Each canvas has its own."""
    seeded = torch.Generator()
    for module in (coarse, spectrum):
        monkeypatch.setattr(
            module, "normal", lambda like, _: torch.randn(like.shape, generator=seeded.manual_seed(like.shape[-1]))
        )
    plain, replayed, _ = both(denoise, recording, WindowPlan.minimum_coverage(32, 32, 16), steps=12, start="coarse")
    torch.testing.assert_close(replayed, plain, rtol=1e-5, atol=1e-5)
    assert len(recording) == 2


def test_a_denoiser_that_reads_a_value_cannot_be_captured(recording):
    def reading(windows, timestep, context):
        return windows * (0.1 if timestep > 500 else 0.2)

    with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
        both(reading, recording)


# The pipeline


def paint(pipe, cuda_graph=False, **settings):
    settings = dict(height=200, width=332, num_inference_steps=12, guidance_scale=4.0, output_type="latent") | settings
    return pipe("the water", generator=torch.Generator().manual_seed(0), cuda_graph=cuda_graph, **settings).images


@pytest.mark.parametrize(
    "settings",
    [
        dict(),
        dict(bridging="none", window_batch_size=2),
        dict(regions=REGIONS),
        dict(regions=REGIONS, region_mode="joint", bridging="none"),
        dict(regions=[Region("grass", box=(0.0, 0.0, 0.5, 1.0), end=0.5, guidance_scale=2.0)]),
        dict(regions=[REGIONS, REGIONS[:1]], num_images_per_prompt=2, window_batch_size=16),
        dict(method="multidiffusion", height=128, width=192),
    ],
    ids=str,
)
def test_pictures_of_graphs(recording, settings):
    pipe = InstantASPipeline.from_pipe(tiny.tiny_pipeline())
    torch.testing.assert_close(paint(pipe, True, **settings), paint(pipe, **settings), rtol=1e-4, atol=1e-4)
    assert recording


def test_regions_that_change_at_every_step_are_not_captured(recording):
    pipe = InstantASPipeline.from_pipe(tiny.tiny_pipeline())
    settings = dict(regions=REGIONS, semantic_schedule="linear", bridging="none")
    torch.testing.assert_close(paint(pipe, True, **settings), paint(pipe, **settings), rtol=1e-4, atol=1e-4)
    assert not recording


def test_sdxl_in_graphs(recording):
    pipe = InstantASPipeline.from_pipe(tiny.tiny_xl_pipeline())
    torch.testing.assert_close(paint(pipe, True), paint(pipe), rtol=1e-4, atol=1e-4)
    assert recording


def test_a_controlnet_in_graphs(recording):
    pipe = tiny.tiny_pipeline(kind=StableDiffusionControlNetPipeline, controlnet=tiny.tiny_controlnet())
    settings = dict(
        image=torch.rand(1, 3, 200, 332, generator=torch.Generator().manual_seed(1)), control_guidance_end=0.6
    )
    pipe = InstantASPipeline.from_pipe(pipe)
    torch.testing.assert_close(paint(pipe, True, **settings), paint(pipe, **settings), rtol=1e-4, atol=1e-4)
    assert len(recording) == 2


# Refusals, and what a GPU would wait for


@pytest.mark.parametrize(
    "kind, cuda_graph, error, words",
    [
        ("DDIM", True, ValueError, "cuda_graph: expected False for latents that are not on a CUDA device, got cpu"),
        ("DDIM", "yes", TypeError, "cuda_graph: expected True or False, got 'yes'"),
    ],
)
def test_what_cannot_be_captured_is_refused(kind, cuda_graph, error, words):
    with pytest.raises(error, match=words):
        sample(mock.Mock(), torch.zeros(1, 4, 20, 50), WIDE, of(kind), num_inference_steps=3, cuda_graph=cuda_graph)


def test_a_scheduler_that_draws_noise_is_refused():
    latents = mock.Mock(device=torch.device("cuda"))
    with pytest.raises(ValueError, match="cuda_graph: expected False with a scheduler that draws noise"):
        sampler.check_graph(True, latents, of("DDPM"), None)


def test_multidiffusion_of_regions_is_refused():
    pipe = InstantASPipeline.from_pipe(tiny.tiny_pipeline())
    with pytest.raises(ValueError, match="cuda_graph: expected False with regions of multidiffusion"):
        paint(pipe, True, method="multidiffusion", regions=REGIONS)


class Transfers(TorchDispatchMode):
    """The operations that have tensors both of the host and of the device, here "meta", which is no memory at all."""

    def __init__(self):
        super().__init__()
        self.found = []

    def begin(self, i, t, latents):
        """A callback: after two steps what is made once has been made."""
        if i == 1:
            self.__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = torch.utils._pytree.tree_leaves((args, kwargs, result))
        where = {t.device.type for t in tensors if isinstance(t, torch.Tensor) and (t.dim() or t.is_meta)}
        if where == {"cpu", "meta"}:
            self.found.append(func)
        return result


@pytest.mark.parametrize("name", ["none", *bridging.BRIDGES])
@pytest.mark.parametrize("kind", ["DDIM", "DPMSolverMultistep"])
def test_no_step_copies_from_the_host_or_reads_a_value(name, kind, monkeypatch):
    """On "meta" reading a value raises."""
    monkeypatch.setattr(validation, "tracing", lambda tensor: True)  # what is read before the first step
    plan, transfers = WindowPlan.minimum_coverage(32, 50, 16), Transfers()

    latents, schedule = torch.empty(1, 4, plan.height, plan.width, device="meta"), of(kind)
    schedule.set_timesteps(10)
    sample(denoise, latents, plan, schedule, guidance_scale=2.0, bridging=name, callback=transfers.begin)
    transfers.__exit__(None, None, None)
    assert transfers.found == []


@pytest.mark.parametrize("name", ["none", "shift", "centred"])
def test_weights_are_looked_at_before_the_first_step(name):
    looked = mock.Mock(side_effect=validation.weight_total)
    at = []
    with mock.patch.object(validation, "weight_total", looked):
        callback = lambda i, t, latents: at.append(looked.call_count)  # noqa: E731
        weight, latents = WIDE.weight("cosine"), torch.zeros(1, 4, 20, 50)
        settings = dict(num_inference_steps=5, bridging=name, callback=callback)
        sample(lambda windows, *_: windows, latents, WIDE, of("DDIM"), weight=weight, **settings)
    assert at[0] > 0 and len(set(at)) == 1


@pytest.mark.parametrize("what", ["prompts", "regions", "sdxl", "controlnet"])
def test_no_evaluation_of_a_network_copies_from_the_host(what, monkeypatch):
    monkeypatch.setattr(validation, "tracing", lambda tensor: True)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)  # knows no "meta"
    meta, plan, transfers = torch.device("meta"), WindowPlan.minimum_coverage(25, 42, 16), Transfers()
    networks = tiny.tiny_xl_pipeline() if what == "sdxl" else mock.Mock(unet=tiny.unet())
    pipe = mock.Mock(unet=networks.unet.to(meta), controlnet=tiny.tiny_controlnet().to(meta))
    width, settings = pipe.unet.config.cross_attention_dim, {}
    prompts = Prompts(*[torch.empty(1, 16, width, device=meta)] * 2, *[torch.empty(1, 32, device=meta)] * 2)
    if what == "sdxl":
        settings["micro"] = MicroConditions((200, 332))
    if what == "controlnet":
        settings["control"] = Control([torch.empty(1, 3, 200, 336, device=meta)], [1.0], [(0.0, 1.0)])
    with contextlib.ExitStack() as stack:
        if what == "regions":
            regions = RegionMap([REGIONS], 200, 336, 8, (25, 42), semantic_schedule="linear")
            object.__setattr__(regions, "masks", regions.masks.to(meta))
            encode = lambda texts: torch.randn(len(texts), 16, width)  # noqa: E731
            settings["regional"] = regional = stack.enter_context(regional_prompts(pipe.unet, regions, encode=encode))
            regional.base(torch.randn(1, 16, width), torch.randn(1, 16, width))
            regional.bank.embeddings = regional.bank.embeddings.to(meta)
        network, step = WindowDenoiser(pipe, prompts, 8, **settings), torch.empty((), device=meta)
        schedule = of("DDIM")
        schedule.set_timesteps(6)
        with torch.no_grad():
            sample(
                lambda windows, _, context: network(windows, step, context),
                torch.empty(1, 4, 25, 42, device=meta),
                plan,
                schedule,
                bridging="shift",
                callback=transfers.begin,
            )
        transfers.__exit__(None, None, None)
    assert transfers.found == []


def test_memory_that_runs_out_in_a_capture_is_not_tried_again(recording):
    def hungry(windows, timestep, context):
        if context.captured:
            raise torch.OutOfMemoryError
        return windows

    with pytest.raises(torch.OutOfMemoryError):
        both(hungry, recording)


# What a capture has read


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("ends", [(0.25, 0.75), (0.3, 0.6)])
def test_a_region_that_turns_on_and_off(recording, schedule, ends):
    """The graph of the steps before is replayed after: the shares that it reads are still there."""
    pipe = InstantASPipeline.from_pipe(tiny.tiny_pipeline())
    regions = [Region("grass", box=(0.0, 0.0, 0.5, 1.0), start=ends[0], end=ends[1])]
    settings = dict(regions=regions, semantic_schedule=schedule, bridging="none", num_inference_steps=16)
    torch.testing.assert_close(paint(pipe, True, **settings), paint(pipe, **settings), rtol=1e-4, atol=1e-4)
    assert len(recording) == 1 + (schedule == "constant")


def test_two_regions_in_turn(recording):
    pipe = InstantASPipeline.from_pipe(tiny.tiny_pipeline())
    regions = [
        Region("grass", box=(0.0, 0.0, 0.5, 1.0), start=0.25, end=0.5),
        Region("stone", box=(0.5, 0.0, 1.0, 1.0), start=0.75),
    ]
    settings = dict(regions=regions, bridging="none", num_inference_steps=16)
    torch.testing.assert_close(paint(pipe, True, **settings), paint(pipe, **settings), rtol=1e-4, atol=1e-4)
    assert len(recording) == 3


def test_the_recorder_sees_memory_that_was_freed():
    values, held = [torch.ones(3)], torch.zeros(3)
    graph = recorded.Recorded(lambda: held.add_(values[0] * 2), None)
    assert held.tolist() == [0, 0, 0]  # recording changes nothing
    graph.replay()
    assert held.tolist() == [2, 2, 2]
    values[0].fill_(2)
    graph.replay()
    assert held.tolist() == [6, 6, 6]
    values.clear()
    with pytest.raises(RuntimeError, match="memory which has been freed"):
        graph.replay()

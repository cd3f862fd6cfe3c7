"""A call of a pipeline that was stopped goes on from its file to the same pictures."""

import io

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from tqdm.auto import tqdm

from instantas.pipelines.pipeline import InstantASPipeline
from instantas.regions import Region
from instantas.sampling.checkpoint import Checkpoint, read
from instantas.testing.tiny import scheduler, tiny_controlnet, tiny_pipeline, tiny_xl_pipeline, unet

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (136, 200, 3), dtype=np.uint8))
REGIONS = [Region("green grass", box=(0.0, 0.5, 1.0, 1.0), guidance_scale=4.0, start=0.3)]


class StoppedError(Exception):
    pass


class Stopping:
    """A callback that fails after a step."""

    def __init__(self, step, inner=None):
        self.step, self.inner = step, inner

    def __call__(self, pipe, step, timestep, tensors):
        given = self.inner(pipe, step, timestep, tensors) if self.inner else {}
        if step == self.step:
            raise StoppedError
        return given


def painted(pipe, path=None, stop=None, callback=None, **settings):
    asked = dict(height=136, width=200, num_inference_steps=4, guidance_scale=3.0, output_type="pt")
    generator = torch.Generator().manual_seed(5)
    after = callback if stop is None else Stopping(stop, callback)
    call = InstantASPipeline(pipe)
    images = call("a red wall", generator=generator, checkpoint=path, callback_on_step_end=after, **(asked | settings))
    return images.images, generator.get_state()


@pytest.mark.parametrize(
    "make, settings",
    [
        (tiny_pipeline, dict(regions=REGIONS)),
        (tiny_pipeline, dict(regions=REGIONS, method="multidiffusion", stride=8)),
        (lambda: tiny_pipeline(scheduler=scheduler(kind=diffusers.LCMScheduler)), dict(num_images_per_prompt=2)),
        (tiny_pipeline, dict(image=PICTURE, strength=0.8)),
        (
            lambda: tiny_pipeline(
                kind=diffusers.StableDiffusionControlNetPipeline,
                controlnet=tiny_controlnet(),
                scheduler=scheduler(kind=diffusers.EulerAncestralDiscreteScheduler),
            ),
            dict(image=PICTURE),
        ),
        (tiny_xl_pipeline, dict(bridging="economy", guidance_rescale=0.5)),
    ],
)
def test_a_stopped_call_goes_on_to_the_same_pictures(tmp_path, make, settings):
    path = tmp_path / "run.checkpoint"
    whole = painted(make(), **settings)
    with pytest.raises(StoppedError):
        painted(make(), path, 1, **settings)
    for _ in range(2):  # the second time all steps are done
        found = painted(make(), path, **settings)
        assert torch.equal(found[0], whole[0]) and torch.equal(found[1], whole[1])
        assert read(path)["done"] == read(path)["steps"]


@pytest.mark.parametrize("stop, canvas", [(1, (16, 16)), (3, (17, 17))])
def test_a_coarse_start_goes_on_from_any_canvas_and_so_does_its_bar(tmp_path, stop, canvas):
    """What was evaluated before is in the bar when the first window is."""
    bars, settings = [], dict(start="coarse", width=136, regions=REGIONS)

    def bar(total):
        bars.append(tqdm(total=total, file=io.StringIO()))
        return bars[-1]

    def begun():
        pipe = tiny_pipeline(scheduler=scheduler(kind=diffusers.EulerAncestralDiscreteScheduler))
        pipe.progress_bar = bar
        return pipe

    path, whole = tmp_path / "run.checkpoint", painted(begun(), **settings)
    with pytest.raises(StoppedError):
        painted(begun(), path, stop, **settings)
    saved = read(path)
    assert (saved["done"], saved["canvas"].shape[2:]) == (stop, canvas)
    found = painted(begun(), path, **settings)
    assert torch.equal(found[0], whole[0]) and torch.equal(found[1], whole[1])
    once, stopped, again = bars
    assert [each.n for each in (once, again)] == [once.total] * 2
    assert stopped.initial == once.initial == 0 < again.initial < stopped.n


def test_what_a_callback_has_changed_is_kept(tmp_path):
    def change(pipe, step, timestep, tensors):
        if step == 1:
            pipe._guidance_scale = 6.0
            return dict(prompt_embeds=tensors["prompt_embeds"] * 0.5)
        return {}

    settings = dict(callback=change, callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"])
    path, pipe = tmp_path / "run.checkpoint", tiny_pipeline()
    whole = painted(pipe, **settings)[0]
    assert not torch.equal(whole, painted(pipe)[0])
    with pytest.raises(StoppedError):
        painted(pipe, Checkpoint(path, 2), 2, **settings)
    assert torch.equal(painted(pipe, path, **settings)[0], whole)


def test_clean_latents_are_kept_where_the_picture_is_made_of_them(tmp_path):
    pipe = tiny_pipeline(
        kind=diffusers.LatentConsistencyModelPipeline,
        unet=unet(time_cond_proj_dim=8),
        scheduler=scheduler(kind=diffusers.LCMScheduler),
    )
    path, whole = tmp_path / "run.checkpoint", painted(pipe)[0]
    with pytest.raises(StoppedError):
        painted(pipe, path, 2)
    for _ in range(2):
        assert torch.equal(painted(pipe, path)[0], whole)


def test_an_interrupted_call_goes_on(tmp_path):
    def interrupt(pipe, step, timestep, tensors):
        pipe._interrupt = step == 1
        return {}

    path, pipe = tmp_path / "run.checkpoint", tiny_pipeline()
    interrupted = painted(pipe, Checkpoint(path, None), callback=interrupt)[0]
    assert read(path)["done"] == 2
    whole = painted(pipe)[0]
    assert torch.equal(painted(pipe, path)[0], whole) and not torch.equal(interrupted, whole)


@pytest.mark.parametrize(
    "settings, named",
    [
        (dict(negative_prompt="water"), "prompt"),
        (dict(regions=REGIONS), "guidance_scale, another regions"),
        (dict(guidance_scale=4.0), "guidance_scale"),
        (dict(guidance_rescale=0.5), "guidance_rescale"),
        (dict(cross_attention_kwargs={"a": 1}), "cross_attention_kwargs"),
        (dict(height=128), "latents"),
    ],
    ids=str,
)
def test_another_calls_file_is_refused_by_name(tmp_path, settings, named):
    path, pipe = tmp_path / "run.checkpoint", tiny_pipeline()
    painted(pipe, path)
    with pytest.raises(ValueError, match=f"of one with another .*{named}"):
        painted(pipe, path, callback=Stopping(0), **settings)


def test_other_weights_are_refused(tmp_path):
    path, pipe = tmp_path / "run.checkpoint", tiny_pipeline()
    painted(pipe, path)
    with torch.no_grad():
        pipe.unet.conv_out.weight += 0.1
    with pytest.raises(ValueError, match="of one with another unet$"):
        painted(pipe, path)


def test_stages_of_an_enlargement_have_a_file_each(tmp_path):
    pipe = InstantASPipeline(tiny_pipeline())
    small = PICTURE.resize((64, 64))
    asked = dict(strength=0.5, num_inference_steps=4, output_type="pt")

    def enlarged(path=None, stop=None):
        seeded = torch.Generator().manual_seed(5)
        after = None if stop is None else Stopping(stop)
        calls = []

        def counted(pipe, step, timestep, tensors):
            calls.append(step)
            return after(pipe, step, timestep, tensors) if after and len(calls) > 2 else {}

        found = pipe.upscale(small, 4.0, "a wall", checkpoint=path, callback_on_step_end=counted, generator=seeded,
                             **asked)  # fmt: skip
        return found.images, len(calls)

    whole, steps = enlarged()
    with pytest.raises(StoppedError):
        enlarged(tmp_path / "run.checkpoint", 1)  # after the first step of the second stage
    assert sorted(file.name for file in tmp_path.iterdir()) == ["run.1.checkpoint", "run.2.checkpoint"]
    images, left = enlarged(tmp_path / "run.checkpoint")
    assert torch.equal(images, whole) and (steps, left) == (4, 1)

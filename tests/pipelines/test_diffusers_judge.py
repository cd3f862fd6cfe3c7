"""diffusers' own fast tests on our pipelines, and the adapter that puts ours in their place.

Those of a checkout of the installed version run where `DIFFUSERS_CHECKOUT` says where it is; they take about an hour.
"""

import collections
import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.pipelines.pipeline_utils import StableDiffusionMixin
from diffusers.pipelines.stable_diffusion import StableDiffusionPipelineOutput

from instantas import InstantASPipeline
from instantas.testing.tiny import tiny_pipeline
from tests.pipelines.diffusers_judge import Judge, closeness, compare, difference

CHECKOUT = os.environ.get("DIFFUSERS_CHECKOUT")
MODULES = (
    "pipelines/stable_diffusion/test_stable_diffusion.py",
    "pipelines/stable_diffusion_2/test_stable_diffusion.py",
    "pipelines/stable_diffusion_xl/test_stable_diffusion_xl.py",
    "pipelines/controlnet/test_controlnet.py",
    "pipelines/controlnet/test_controlnet_sdxl.py",
    "pipelines/latent_consistency_models/test_latent_consistency_models.py",
    "pipelines/stable_diffusion_panorama/test_stable_diffusion_panorama.py",
    "lora/test_lora_layers_sd.py",
    "lora/test_lora_layers_sdxl.py",
)
_COUNTS_STEPS = "counts the calls of scheduler.step; ours reads the scheduler's coefficients off a copy of it"
REFUSED = {
    "test_stable_diffusion_two_xl_mixture_of_denoiser_fast": _COUNTS_STEPS,
    "test_controlnet_sdxl_two_mixture_of_denoiser_fast": _COUNTS_STEPS,
}
"""Tests that cannot pass through ours, by name, and why not."""

DIFFERENT = {
    ("test_controlnet_sdxl.py", "test_callback_cfg"): "its loop applies the guidance scale that the call was given; "
    "ours what a callback has set, as diffusers' other loops do",
}
"""Calls that give something else than diffusers', by file and test, and why."""

of_a_checkout = pytest.mark.skipif(
    not CHECKOUT, reason="DIFFUSERS_CHECKOUT: expected the folder of a diffusers checkout of the installed version"
)


@functools.cache
def judged(kind, module):
    """The report on a module of the checkout."""
    if not Path(CHECKOUT, "tests", module).is_file():
        pytest.skip(f"DIFFUSERS_CHECKOUT: expected tests/{module}, which this version does not have")
    here = Path(__file__).parent
    paths = os.pathsep.join([str(here.parents[1]), str(here)])
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RUN_")}  # slow, nightly
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.json")
        command = [sys.executable, "-m", "pytest", "-q", "-p", "diffusers_judge", "-p", "no:cacheprovider"]
        command += [f"--judge={kind}", f"--judge-report={report}", f"tests/{module}"]
        environment |= {"PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"}
        run = subprocess.run(command, cwd=CHECKOUT, env=environment, capture_output=True, text=True)
        assert run.returncode in (0, 1), run.stdout + run.stderr  # 1: some tests failed
        return json.loads(report.read_text())


def passing(kind, module):
    return {test for test, (outcome, _) in judged(kind, module)["outcomes"].items() if outcome == "passed"}


def refused(test):
    return test.split("::")[-1] in REFUSED


def other(test):
    path, *_, name = test.split("::")
    return (path.split("/")[-1], name) in DIFFERENT


@of_a_checkout
@pytest.mark.parametrize("module", MODULES)
def test_what_passes_in_diffusers_passes_through_ours(module):
    theirs, ours = passing("diffusers", module), passing("instantas", module)
    print(f"{len(theirs)} pass in diffusers, {len(theirs & ours)} of them through ours")
    outcomes = judged("instantas", module)["outcomes"]
    assert theirs
    assert {test: outcomes[test] for test in theirs - ours if not refused(test)} == {}


@of_a_checkout
@pytest.mark.parametrize("module", MODULES)
def test_every_call_gives_what_diffusers_gives(module):
    calls = judged("shadow", module)["calls"]
    right = "equal", "refused by both", "in several windows", "not repeatable in diffusers"
    alike = [call for call in calls if call["verdict"] in right]
    print(collections.Counter(call["verdict"] for call in calls))
    assert calls
    unlike = [call for call in calls if call not in alike and not refused(call["test"])]
    assert [call for call in unlike if not (call["verdict"] == "different" and other(call["test"]))] == []


@of_a_checkout
@pytest.mark.parametrize("kind", ["regional", "halves"])
@pytest.mark.parametrize("module", MODULES)
def test_a_region_of_the_calls_own_prompt_breaks_nothing(module, kind):
    theirs, regional = passing("diffusers", module), passing(kind, module)
    outcomes = judged(kind, module)["outcomes"]
    assert {test: outcomes[test] for test in theirs - regional} == {}


def small(pipe, **settings):
    return pipe("red brick", num_inference_steps=2, output_type="np", **dict(height=128, width=128) | settings)


def test_a_face_looks_like_diffusers_class_and_makes_ours():
    face = Judge("instantas").faces[StableDiffusionPipeline]
    pipe = face(**tiny_pipeline().components)
    assert isinstance(pipe, InstantASPipeline) and type(pipe.pipe) is StableDiffusionPipeline
    assert issubclass(face, StableDiffusionMixin) and face._callback_tensor_inputs
    assert isinstance(face.from_pipe(pipe), InstantASPipeline)
    assert type(face(**tiny_pipeline().components | {"unet": None})) is StableDiffusionPipeline


def test_the_shadow_of_a_call_is_equal_and_leaves_the_generator_as_one_call_does():
    judge = Judge("shadow")
    pipe = judge.faces[StableDiffusionPipeline](**tiny_pipeline().components)
    pipe.set_progress_bar_config(disable=True)
    generator, alone = torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)
    image = small(pipe, generator=generator).images
    np.testing.assert_allclose(image, small(tiny_pipeline(), generator=alone).images, atol=1e-5)
    assert torch.equal(generator.get_state(), alone.get_state())
    with pytest.raises(ValueError, match="prompt_embeds"):
        small(pipe, prompt_embeds=torch.zeros(1, 16, 32))
    small(pipe, width=192)
    assert [call["verdict"] for call in judge.calls] == ["equal", "refused by both", "in several windows"]


@pytest.mark.parametrize("kind", ["regional", "halves"])
def test_a_regional_face_calls_diffusers_under_regional_prompts(kind):
    components = tiny_pipeline().components
    pipe = Judge(kind).faces[StableDiffusionPipeline](**components)
    pipe.set_progress_bar_config(disable=True)
    installed = []

    def look(pipe, step, timestep, tensors):
        installed.extend(type(processor).__name__ for processor in pipe.unet.attn_processors.values())
        return tensors

    image = small(pipe, generator=torch.Generator().manual_seed(1), callback_on_step_end=look).images
    assert "RegionalAttnProcessor" in installed
    np.testing.assert_allclose(
        image, small(tiny_pipeline(), generator=torch.Generator().manual_seed(1)).images, atol=1e-5
    )


def output(images):
    return StableDiffusionPipelineOutput(images=images, nsfw_content_detected=None)


def test_verdicts():
    def drawn(shift=0.0, extra=0):
        def call():
            return output(torch.rand(1, 2, 2, 3, generator=generator)[:, : 2 - extra] + shift)

        return call

    def failing():
        raise ValueError("no")

    generator = torch.Generator().manual_seed(0)
    assert compare(drawn(), drawn(), generator)[0]["verdict"] == "equal"
    assert compare(drawn(), drawn(0.1), generator)[0]["verdict"] == "different"
    assert compare(drawn(), drawn(extra=1), generator)[0]["verdict"] == "different"
    assert compare(failing, failing, generator)[0]["verdict"] == "refused by both"
    assert compare(drawn(), failing, generator)[0]["verdict"] == "refused by ours alone"
    assert compare(failing, drawn(), generator)[0]["verdict"] == "refused by diffusers alone"
    fixed = output(torch.zeros(1, 2, 2, 3))
    verdict = compare(lambda: fixed, lambda: (torch.rand(1, generator=generator), fixed)[1], generator)[0]["verdict"]
    assert verdict == "equal, generator in another state"
    unseeded = lambda: output(torch.rand(1, 2, 2, 3))  # noqa: E731
    assert compare(unseeded, drawn(), generator)[0]["verdict"] == "not repeatable in diffusers"
    assert compare(unseeded, drawn(extra=1), generator)[0]["verdict"] == "different"
    assert compare(drawn(), unseeded, generator)[0]["verdict"] == "different"
    assert compare(unseeded, unseeded, None)[0]["verdict"] == "equal"


def test_pictures_may_differ_by_rounding_alone():
    assert 1e-5 < closeness("np", torch.float32) == closeness("latent", torch.float32) < 2**-10  # half precision shows
    assert 1 / 255 < closeness("pil", torch.float32) < 2 / 255
    assert 2 * 2**-8 < closeness("pil", torch.bfloat16) == closeness("np", torch.float8_e4m3fn) < 3 * 2**-8


def test_difference_of_outputs():
    ours, theirs = np.zeros((1, 2, 2, 3)), np.zeros((1, 2, 2, 3))
    ours[0, 1, 1, 2] = 0.25
    assert difference(output(ours), output(theirs)) == 0.25
    theirs[0, 0, 0, 0] = 10  # latents: in units of their largest
    assert difference(output(ours), output(theirs)) == 1.0
    ours[0, 0, 0, 0] = theirs[0, 0, 0, 0] = np.nan
    ours[0, 1, 1, 2] = 0
    assert difference(output(ours), output(theirs)) == 0
    ours[0, 1, 1, 2] = np.nan
    assert difference(output(ours), output(theirs)) == float("inf")

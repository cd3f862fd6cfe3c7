"""A pipeline's own level of coarse starts: measured, kept in its folder, and taken from there."""

import json

import pytest
import torch

from instantas.pipelines.calibration import calibrate
from instantas.pipelines.loading import keep_default, read_defaults
from instantas.pipelines.pipeline import InstantASPipeline
from instantas.sampling.coarse import CoarseStart
from instantas.testing import tiny

SIDE = 2 * tiny.WINDOW * tiny.CELL


def paint(pipe, start="coarse"):
    settings = dict(num_inference_steps=6, output_type="latent", generator=torch.Generator().manual_seed(0))
    return pipe("the water", height=SIDE, width=SIDE, start=start, **settings).images


def test_a_start_goes_on_from_the_models_own_level():
    theirs = tiny.tiny_pipeline()
    own = InstantASPipeline(theirs, {"coarse_sigma": 0.3})
    assert torch.equal(paint(own), paint(own, CoarseStart(sigma=0.3)))
    assert not torch.equal(paint(own), paint(InstantASPipeline(theirs)))
    assert torch.equal(paint(own, CoarseStart(sigma=1.5)), paint(InstantASPipeline(theirs)))
    own.defaults["coarse_sigma"] = "high"
    with pytest.raises(TypeError, match="coarse_sigma: expected a number, got 'high'"):
        paint(own)
    own("the water", num_inference_steps=1, output_type="latent")  # which does not ask for it


def test_the_level_is_kept_beside_the_models_other_settings(tmp_path):
    tiny.tiny_pipeline().save_pretrained(tmp_path)
    assert "coarse_sigma" not in InstantASPipeline.from_pretrained(tmp_path).defaults
    (tmp_path / "instantas.json").write_text('{"num_inference_steps": 7, "note": "größer"}', encoding="utf-8")
    keep_default(tmp_path, "coarse_sigma", 0.8)
    keep_default(tmp_path, "coarse_sigma", 0.9)
    assert read_defaults(tmp_path) == {"num_inference_steps": 7, "note": "größer", "coarse_sigma": 0.9}
    loaded = InstantASPipeline.from_pretrained(tmp_path).defaults
    assert (loaded["num_inference_steps"], loaded["coarse_sigma"]) == (7, 0.9)


@pytest.mark.parametrize(
    "content, got", [(b"{", "Expecting"), (b"[1]", "got list"), (b"\xff\xfe", "codec can't decode")]
)
def test_broken_settings_are_named_and_left_alone(tmp_path, content, got):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    (tmp_path / "instantas.json").write_bytes(content)
    for use in (InstantASPipeline.from_pretrained, lambda folder: keep_default(folder, "coarse_sigma", 1.0)):
        with pytest.raises(ValueError, match=f"model: expected .*JSON.*instantas.json.*{got}"):
            use(tmp_path)
    assert (tmp_path / "instantas.json").read_bytes() == content


@pytest.mark.parametrize(
    "name, value, got",
    [
        ("start", "fine", "start: expected one of none, coarse, got 'fine'"),
        ("start", 3, "start: expected a name or a CoarseStart, got int"),
        ("num_inference_steps", "7", "num_inference_steps: expected .*'7'"),
        ("num_inference_steps", 0, "num_inference_steps: expected .* 0"),
        ("guidance_scale", "high", "guidance_scale: expected .*'high'"),
        ("coarse_sigma", -1, "coarse_sigma: expected .* -1"),
    ],
)
def test_settings_that_are_none_are_named_with_their_file(tmp_path, name, value, got):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    (tmp_path / "instantas.json").write_text(json.dumps({name: value, "note": "any"}))
    with pytest.raises(ValueError, match=f"^model: expected other settings in .*instantas.json.*: {got}"):
        InstantASPipeline.from_pretrained(tmp_path)


@pytest.mark.parametrize("make", [tiny.tiny_pipeline, tiny.tiny_xl_pipeline])
def test_pictures_are_painted_and_then_looked_at_without_guidance(make):
    """The second run sees the pictures of the first, at every level with new noise; a seed gives the same again."""
    pipe, seen = InstantASPipeline.from_pipe(make()), []
    pipe.unet.register_forward_pre_hook(
        lambda m, a, k: seen.append((len(k["encoder_hidden_states"]), a[0])), with_kwargs=True
    )
    before = torch.get_rng_state()
    found = calibrate(pipe, ["grass", "the water"], pictures=1, num_inference_steps=4, guidance_scale=3.0)
    assert [rows for rows, _ in seen] == [4] * 4 + [2] * 4 and torch.equal(torch.get_rng_state(), before)
    sigmas = [sigma for sigma, _ in found.shares]
    assert len(sigmas) == 4 and sigmas == sorted(set(sigmas))
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2, 4, tiny.WINDOW, tiny.WINDOW, generator=generator)
    settings = dict(num_inference_steps=4, guidance_scale=3.0, output_type="latent")
    clean = pipe(["grass", "the water"], latents=noise, **settings).images
    for number, (_, shown) in enumerate(seen[4:8]):
        fresh = torch.randn(clean.shape, generator=generator)
        timestep = pipe.scheduler.timesteps[number][None]
        torch.testing.assert_close(shown, pipe.scheduler.add_noise(clean, fresh, timestep), atol=1e-5, rtol=1e-5)
    settings = dict(num_inference_steps=4, guidance_scale=3.0, return_dict=False)
    again = calibrate(pipe, ["grass", "the water"], pictures=1, **settings)
    assert again == found


@pytest.mark.parametrize(
    "settings, kind, message",
    [
        (dict(prompts=[]), ValueError, "prompts: expected a list of at least one"),
        (dict(prompts=None), ValueError, "prompts: expected a list of at least one, got None"),
        (dict(seed="x"), TypeError, "seed: expected an integer"),
        (dict(seed=2**64), ValueError, "seed: expected -2\\^63 to 2\\^64 - 1, got 18446744073709551616"),
        (dict(seed=-(2**63) - 1), ValueError, "seed: expected"),
        (dict(pictures=0), ValueError, "pictures: expected a positive integer"),
        (dict(scale=0.5), ValueError, "scale: expected more than 1"),
        (dict(num_inference_steps=0), ValueError, "num_inference_steps: expected"),
        (dict(guidance_scale="high"), TypeError, "guidance_scale: expected a number"),
    ],
)
def test_wrong_settings_are_refused_before_the_network_is_evaluated(monkeypatch, settings, kind, message):
    pipe = InstantASPipeline.from_pipe(tiny.tiny_pipeline())
    monkeypatch.setattr(pipe.unet, "forward", lambda *a, **k: pytest.fail("the network was evaluated"))
    with pytest.raises(kind, match=message):
        calibrate(pipe, **dict(num_inference_steps=2) | settings)


def test_a_pipeline_with_a_loop_of_its_own_is_refused():
    with pytest.raises(TypeError, match="pipe: expected a pipeline of one of the kinds"):
        calibrate(InstantASPipeline.from_pipe(_pix2pix()))


def _pix2pix():
    from diffusers import StableDiffusionInstructPix2PixPipeline

    return tiny.tiny_pipeline(kind=StableDiffusionInstructPix2PixPipeline, unet=tiny.unet(in_channels=8))

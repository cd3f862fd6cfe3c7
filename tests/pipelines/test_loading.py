"""Models from folders and from single files."""

import diffusers
import pytest
import torch
from safetensors.torch import save_file

from instantas.pipelines.loading import load
from instantas.pipelines.pipeline import InstantASPipeline
from instantas.testing import tiny

# one weight of a checkpoint in the layout of the models' authors, by which diffusers tells the families apart
SD, XL = (
    "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight",
    ("conditioner.embedders.1.model.transformer.resblocks.9.mlp.c_proj.bias"),
)


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize(
    "key, controlnet, kind, make",
    [
        (SD, False, diffusers.StableDiffusionPipeline, tiny.tiny_pipeline),
        (XL, False, diffusers.StableDiffusionXLPipeline, tiny.tiny_xl_pipeline),
        (SD, True, diffusers.StableDiffusionControlNetPipeline, tiny.tiny_pipeline),
        (XL, True, diffusers.StableDiffusionXLControlNetPipeline, tiny.tiny_xl_pipeline),
    ],
)
def test_a_single_file_is_loaded_as_what_it_is(tmp_path, monkeypatch, key, controlnet, kind, make, relative):
    path, asked = tmp_path / "my.safetensors", []
    save_file({key: torch.zeros(4, 4)}, path)

    def from_single_file(cls, file, **settings):
        asked.append((cls, file, settings))
        return make()

    monkeypatch.setattr(diffusers.loaders.FromSingleFileMixin, "from_single_file", classmethod(from_single_file))
    monkeypatch.chdir(tmp_path)
    settings = dict(torch_dtype=torch.float32) | (dict(controlnet=tiny.tiny_controlnet()) if controlnet else {})
    ours = InstantASPipeline.from_pretrained(path.name if relative else path, **settings)
    assert asked == [(kind, path.name if relative else str(path), settings)]
    assert ours.window == (tiny.WINDOW, tiny.WINDOW) and ours.defaults["num_inference_steps"] == 50


@pytest.mark.parametrize("name", ["playground-v2-5", "xl_inpaint", "inpainting_v2"])
def test_families_are_told_from_all_names_that_diffusers_has(tmp_path, monkeypatch, name):
    """The last two have inpainting's nine channels; of the first XL's name says nothing."""
    inpainting = "model.diffusion_model.input_blocks.0.0.weight"
    weights = {
        "playground-v2-5": {"edm_mean": torch.zeros(4), XL: torch.zeros(4)},
        "xl_inpaint": {inpainting: torch.zeros(4, 9, 3, 3), XL: torch.zeros(4)},
        "inpainting_v2": {
            inpainting: torch.zeros(4, 9, 3, 3),
            "model.diffusion_model.input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight": torch.zeros(4, 1024),
        },
    }
    save_file(weights[name], tmp_path / "my.safetensors")
    asked = []
    monkeypatch.setattr(
        diffusers.loaders.FromSingleFileMixin,
        "from_single_file",
        classmethod(lambda kind, file, **_: asked.append(kind)),
    )
    load(tmp_path / "my.safetensors")
    assert asked == [
        diffusers.StableDiffusionPipeline if name == "inpainting_v2" else diffusers.StableDiffusionXLPipeline
    ]


@pytest.mark.parametrize(
    "key, found",
    [
        ("double_blocks.0.img_attn.norm.key_norm.scale", "flux"),
        ("control_model.time_embed.0.weight", "controlnet"),
    ],
)
def test_weights_of_other_families_are_named(tmp_path, key, found):
    save_file({key: torch.zeros(4, 4)}, tmp_path / "my.safetensors")
    with pytest.raises(
        ValueError, match=f"^model: expected Stable Diffusion 1.x, 2.x or XL in .*got weights of {found}"
    ):
        load(tmp_path / "my.safetensors")


@pytest.mark.parametrize("name", ["my.safetensors", "my.ckpt"])
def test_a_broken_file_is_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b"no weights at all")
    with pytest.raises((ValueError, OSError), match=name):
        load(tmp_path / name)


@pytest.mark.parametrize("name", ["my.safetensors", "models/my.ckpt", "no/such/folder", "./here", "~/no/such/model"])
def test_a_path_without_a_model_is_not_looked_for_on_the_hub(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="model: expected a folder in diffusers' layout or a hub id"):
        InstantASPipeline.from_pretrained(name)


def test_other_files_are_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("a model")
    with pytest.raises(ValueError, match="model: expected a checkpoint .*notes.txt"):
        InstantASPipeline.from_pretrained(tmp_path / "notes.txt")


def test_a_folder_in_the_users_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    tiny.tiny_pipeline().save_pretrained(tmp_path / "model")
    assert InstantASPipeline.from_pretrained("~/model").window == (tiny.WINDOW, tiny.WINDOW)

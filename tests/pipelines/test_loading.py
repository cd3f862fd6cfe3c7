"""Models from folders and from single files."""

import diffusers
import pytest
import torch
from safetensors.torch import save_file

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

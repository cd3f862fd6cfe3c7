"""The embedded model: its folder, its training pictures, its captions, and training one like it."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from instantas import demo
from instantas.pipelines.pipeline import InstantASPipeline

pytest.importorskip("skimage", reason="needs instantas[train]")
pytest.importorskip("sklearn", reason="needs instantas[train]")

from instantas.demo import train  # noqa: E402
from instantas.demo.training import captions, drawing, latents, materials, tokenizer  # noqa: E402
from instantas.demo.training.palettes import LOOKS, NOUNS  # noqa: E402
from instantas.demo.training.stage import MovingAverage, Stage, set_learning_rate  # noqa: E402


def generator(seed=0):
    return np.random.default_rng(seed)


# The folder


def test_the_folder_is_small_and_whole():
    files = [path for path in demo.folder().rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 12e6
    index = json.loads((demo.folder() / "model_index.json").read_text())
    for part, kind in index.items():
        assert not (isinstance(kind, list) and kind[0]) or any(path.parent.name == part for path in files)
    assert json.loads((demo.folder() / "instantas.json").read_text()) == train.DEFAULTS


def test_it_loads_in_diffusers_and_paints_what_it_is_asked_for():
    pipe = StableDiffusionPipeline.from_pretrained(demo.folder(), torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    assert sum(p.numel() for part in (pipe.unet, pipe.vae, pipe.text_encoder) for p in part.parameters()) < 4e6
    assert pipe.unet.config.sample_size == latents.WINDOW and pipe.vae_scale_factor == 8

    prompts = ["green grass", "turquoise ocean", "snow", "night sky"]
    pictures = pipe(prompts, num_inference_steps=8, guidance_scale=2.5, output_type="np",
                    generator=torch.Generator().manual_seed(1)).images  # fmt: skip
    assert pictures.shape == (4, 128, 128, 3)
    (grass_red, grass_green, grass_blue), (ocean_red, ocean_green, ocean_blue), snow, night = pictures.mean((1, 2))
    assert grass_green > grass_red and grass_green > grass_blue
    assert ocean_green > ocean_red and ocean_blue > ocean_red
    assert snow.mean() > 0.6 and night.mean() < 0.3 and pictures[3].max() > 0.5  # the stars


def test_a_folder_without_its_files_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(demo, "__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(
        FileNotFoundError, match="the embedded model is missing from this installation: expected .*model"
    ):
        demo.folder()


def test_every_caption_word_is_one_token(tmp_path):
    made = tokenizer.make_tokenizer(tmp_path)
    embedded = type(made).from_pretrained(demo.folder() / "tokenizer")
    for each in (made, embedded):
        assert {word for word in captions.words() if len(each(word).input_ids) != 3} == set()
        assert each.decode(each("a photo of lava", add_special_tokens=False).input_ids).strip() == "a photo of lava"
        other = each("xylophone é 猫", add_special_tokens=False).input_ids  # in bytes, none of them unknown
        assert len(other) > 5 and each.unk_token_id not in other


# Pictures and captions


@pytest.mark.parametrize("material", demo.MATERIALS)
def test_renders_are_the_same_every_time(material):
    one, same, next_, seeded = (materials.render(material, i, seed) for i, seed in ((3, 0), (3, 0), (4, 0), (3, 1)))
    assert one.image.dtype == np.uint8 and one.image.shape == (drawing.SIZE, drawing.SIZE, 3)
    assert np.array_equal(one.image, same.image) and one[1:] == same[1:] == (material, one.look)
    assert not np.array_equal(one.image, next_.image) and not np.array_equal(one.image, seeded.image)
    assert one.look in LOOKS[material] and one.image.std() > 3


def test_a_look_can_be_chosen_and_changes_nothing_else():
    dry = LOOKS["grass"][1]
    green, yellow = (materials.render("grass", 0, look=look).image.mean((0, 1)) for look in LOOKS["grass"][:2])
    assert materials.render("grass", 0, look=dry).look is dry
    assert yellow[0] > yellow[1] and green[1] > green[0]


def test_an_unknown_material_is_refused():
    with pytest.raises(ValueError, match="material: expected one of brick, .*, got 'cheese'"):
        materials.render("cheese", 0)


def test_a_contact_sheet_has_a_row_for_each_material(tmp_path, capsys):
    assert materials.main([str(tmp_path / "sheet.png"), "--columns", "1"]) == 0
    from PIL import Image

    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (132, 132 * len(demo.MATERIALS))
    assert materials.main([str(tmp_path / "missing" / "sheet.png")]) == 2
    assert capsys.readouterr().err.startswith("path: expected an existing folder")


def test_captions_name_what_is_shown():
    rng = generator()
    for material in demo.MATERIALS:
        for look in LOOKS[material]:
            for _ in range(20):
                said = captions.caption(rng, material, look)
                assert any(noun in said for noun in NOUNS[material]), said
                assert "" in look.adjectives or any(word in said for word in look.adjectives), said
    pair = captions.joint_caption(rng, ("grass", LOOKS["grass"][0]), ("snow", LOOKS["snow"][0]))
    assert any(n in pair for n in NOUNS["grass"]) and any(n in pair for n in NOUNS["snow"])


def test_a_composite_shows_both_pictures():
    black, white = (np.full((drawing.SIZE, drawing.SIZE, 3), value, np.uint8) for value in (0, 255))
    for seed in range(8):
        both = latents.composite(generator(seed), black, white)
        assert both.shape == (latents.COMPOSITE, latents.COMPOSITE, 3) and both.dtype == np.uint8
        assert both.min() == 0 and both.max() == 255 and 0.1 < (both > 127).mean() < 0.9


# Training


def test_a_stage_runs_at_least_two_rounds_and_at_most_so_many():
    said = []
    stage = Stage("some", 1e-9, said.append)
    for done in stage:
        assert 0 <= done <= 1
        stage.record(loss=2.0)
    assert stage.step == 1 and said[-1].endswith("done") and "loss 2.0000" in said[-1]
    stage = Stage("some", 60, said.append)
    stage.most = 5
    assert len(list(stage)) == 5


def test_the_learning_rate_rises_and_falls():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    rates = []
    for step in range(100):
        set_learning_rate(optimizer, 0.5, step, step / 99, warmup=10)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates[0] == pytest.approx(0.05) and max(rates) == pytest.approx(0.5, rel=0.05)
    assert rates[-1] == pytest.approx(0.01) and rates[9:] == sorted(rates[9:], reverse=True)


def test_a_moving_average_follows_and_is_put_in_place():
    parameter = torch.nn.Parameter(torch.zeros(2))
    average = MovingAverage([parameter], decay=0.5)
    for value in (1.0, 2.0, 3.0):
        parameter.data.fill_(value)
        average.update()
    average.copy_to_parameters()
    expected = 0.0
    for i, value in enumerate((1.0, 2.0, 3.0)):
        decay = min(0.5, (1 + i) / (10 + i))
        expected = decay * expected + (1 - decay) * value
    assert parameter.tolist() == pytest.approx([expected] * 2)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A model of two rounds in every stage."""
    folder = tmp_path_factory.mktemp("train") / "model"
    lines = []
    assert train.train(folder, minutes=1e-4, report=lines.append) == folder
    assert [line.split()[0] for line in lines if line.endswith("done")] == list(train.SHARES)
    return folder


def test_training_writes_a_folder_that_loads_and_paints(trained):
    assert [path.name for path in trained.parent.iterdir()] == ["model"]
    names = {str(p.relative_to(trained)) for p in trained.rglob("*") if p.is_file()}
    assert names == {str(p.relative_to(demo.folder())) for p in demo.folder().rglob("*") if p.is_file()}
    pipe = InstantASPipeline.from_pretrained(trained)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.defaults == train.DEFAULTS
    picture = pipe("lava", height=100, width=200, num_inference_steps=2, output_type="np").images[0]
    assert picture.shape == (100, 200, 3) and np.isfinite(picture).all()


def test_training_has_changed_every_part(trained):
    from diffusers import AutoencoderTiny, UNet2DConditionModel

    from instantas.demo.training.autoencoder import make_autoencoder
    from instantas.demo.training.diffusion import make_unet

    torch.manual_seed(0)  # the seed of the training: the first weights that it makes are the autoencoder's
    for kind, part, make in ((AutoencoderTiny, "vae", make_autoencoder), (UNet2DConditionModel, "unet", make_unet)):
        found = kind.from_pretrained(trained / part, torch_dtype=torch.float32)
        assert all(torch.isfinite(p).all() for p in found.parameters())
        if part == "vae":
            start = [p.half().float() for p in make().parameters()]
            moved = [not torch.equal(a, b) for a, b in zip(found.parameters(), start)]
            assert np.mean(moved) > 0.9
            scale = found.config.scaling_factor
            assert scale > 0 and scale != 1
        assert [p.shape for p in found.parameters()] == [p.shape for p in make().parameters()]


def test_training_can_go_on_from_a_model(trained, tmp_path):
    from transformers import CLIPTextModel, CLIPTokenizer

    from instantas.demo.training.autoencoder import make_autoencoder
    from instantas.demo.training.diffusion import make_text_encoder, make_unet

    class Renumbered:
        """The words in order, and one of them new."""

        def get_vocab(self):
            names = sorted(CLIPTokenizer.from_pretrained(trained / "tokenizer").get_vocab())
            return {name if name != "lava</w>" else "lavender</w>": number for number, name in enumerate(names)}

    renumbered = Renumbered().get_vocab()
    parts = make_autoencoder(), make_unet(), make_text_encoder(tokenizer.make_tokenizer(tmp_path))
    untrained = parts[2].get_input_embeddings().weight.detach().clone()
    train.load_start(trained, *parts, Renumbered())
    before = CLIPTextModel.from_pretrained(trained / "text_encoder", torch_dtype=torch.float32)
    old = CLIPTokenizer.from_pretrained(trained / "tokenizer").get_vocab()
    moved, table = parts[2].get_input_embeddings().weight, before.get_input_embeddings().weight
    assert torch.equal(moved[renumbered["snow</w>"]], table[old["snow</w>"]])
    assert torch.equal(moved[renumbered["lavender</w>"]], untrained[renumbered["lavender</w>"]])
    for part, name in zip(parts, ("vae", "unet", "text_encoder")):
        kept = type(part).from_pretrained(trained / name, torch_dtype=torch.float32).state_dict()
        assert all(torch.equal(w, kept[n]) for n, w in part.state_dict().items() if "token_embedding" not in n)


def test_a_model_of_another_kind_is_no_start(tmp_path, capsys):
    assert train.main(["--out", str(tmp_path / "model"), "--start", str(tmp_path), "--minutes", "1e-4"]) == 2
    assert capsys.readouterr().err.startswith("start: expected a folder that training has written, got ")


WRONG = {
    "minutes: expected a positive number, got 0.0": ["--minutes", "0"],
    "minutes: expected a positive number, got nan": ["--minutes", "nan"],
    "threads: expected at least 1, got 0": ["--threads", "0"],
    "seed: expected 0 or more, got -1": ["--seed", "-1"],
}


@pytest.mark.parametrize("message", WRONG)
def test_bad_options_are_one_line(message, tmp_path, capsys):
    assert train.main(["--out", str(tmp_path / "model"), *WRONG[message]]) == 2
    assert capsys.readouterr().err == message + "\n"
    assert not list(tmp_path.iterdir())


def test_a_folder_in_use_is_refused_and_left_alone(tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    assert train.main(["--out", str(tmp_path)]) == 2
    assert re.match("out: expected a new or empty folder, got", capsys.readouterr().err)
    assert train.main(["--out", str(tmp_path / "missing" / "model")]) == 2
    assert capsys.readouterr().err.startswith("out: expected a place in a folder that can be written")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_nothing_is_left_of_a_training_that_fails(tmp_path, monkeypatch):
    def fail(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "draw_pictures", fail)
    with pytest.raises(KeyboardInterrupt):
        train.train(tmp_path / "model", minutes=1)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("module", ["train", "training.materials", "judge"])
def test_what_is_missing_is_named(module):
    code = f"import sys; sys.modules['skimage'] = None; import instantas.demo.{module} as m; m.train('x', minutes=1)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 1 and re.search(
        r"skimage(\.\w+)? is missing: pip install 'instantas\[train\]'", run.stderr
    )


def test_every_page_counts_the_materials_alike():
    pages = [demo.__doc__, materials.__doc__]
    pages += [Path(demo.__file__).with_name("README.md").read_text(encoding="utf-8")]
    pages += [(Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")]
    assert len(demo.MATERIALS) == 13
    assert [set(re.findall(r"(\w+) materials", page)) & {"twelve", "thirteen", "fourteen"} for page in pages] == [
        {"thirteen"}
    ] * 4

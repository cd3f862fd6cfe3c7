"""`instantas generate --image --strength --lora --control`: what the pipeline is given, what the picture records."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image

from instantas import InstantASPipeline, demo
from instantas.cli import main
from instantas.cli.inputs import digests
from instantas.cli.pictures import read_record

RUN = ("--steps", "4", "--seed", "3", "--device", "cpu")


def photo(width=40, height=24, seed=0, mode="RGB"):
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (4, 6, 3), dtype=np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC).convert(mode)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two LoRAs and two ControlNets for the embedded model."""
    folder = tmp_path_factory.mktemp("weights")
    for number in (0, 1):
        torch.manual_seed(number)
        unet = UNet2DConditionModel.from_pretrained(demo.folder(), subfolder="unet")
        net = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(16, 16, 32, 32))
        for layer in (*net.controlnet_down_blocks, net.controlnet_mid_block, net.controlnet_cond_embedding.conv_out):
            torch.nn.init.normal_(layer.weight, std=0.1)
        net.save_pretrained(folder / f"net{number}")
        unet.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q", "to_v"]))
        layers = get_peft_model_state_dict(unet)
        name = f"lora{number}.safetensors"
        StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=layers, weight_name=name)
    return folder


def pixels(name="instantas.png"):
    with Image.open(name) as picture:
        return np.asarray(picture)


def painted(pipe, **settings):
    generator = torch.Generator().manual_seed(3)
    return np.asarray(pipe("lava", num_inference_steps=4, generator=generator, **settings).images[0])


def settings(name="instantas.png"):
    return json.loads(read_record(Path(name))["settings"])


def digest(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def paints_again(name="instantas.png"):
    main(["generate", "--like", name, "--device", "cpu", "-o", "again.png"])
    return np.array_equal(pixels(name), pixels("again.png")) and settings(name) == settings("again.png")


@pytest.mark.parametrize(
    "options, size, strength, steps", [([], (40, 24), 0.8, 3), (["--size", "64x72"], (64, 72), 0.5, 2)]
)
def test_a_picture_to_start_from(capsys, options, size, strength, steps):
    photo().save("photo.png")
    options = options + ["--strength", str(strength)] * (strength != 0.8)
    main(["generate", "lava", "--image", "photo.png", *options, *RUN])
    assert f"in {steps} steps" in capsys.readouterr().out
    pipe = InstantASPipeline.from_pretrained(demo.folder())
    wanted = painted(pipe, image=photo(), strength=strength, width=size[0], height=size[1])
    assert np.array_equal(pixels(), wanted)
    path = str(Path("photo.png").resolve())
    noted = settings()
    assert (noted["image"], noted["strength"], noted["files"]) == (path, strength, {path: digest(path)})
    assert paints_again()


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning:peft")
def test_loras_are_added_by_their_scales(folder):
    one, two = folder / "lora0.safetensors", folder / "lora1.safetensors"
    main(["generate", "lava", "--size", "40x24", *RUN, "--lora", str(one), "--lora", f"{two}:-0.5"])
    pipe = InstantASPipeline.from_pretrained(demo.folder())
    plain = painted(pipe, width=40, height=24)
    pipe.load_lora_weights(str(one), adapter_name="a")
    pipe.load_lora_weights(str(two), adapter_name="b")
    pipe.set_adapters(["a", "b"], [1.0, -0.5])
    assert np.array_equal(pixels(), painted(pipe, width=40, height=24))
    assert not np.array_equal(pixels(), plain)
    assert settings()["loras"] == [f"{one}:1.0", f"{two}:-0.5"]
    assert settings()["files"] == {str(one): digest(one), str(two): digest(two)}
    assert paints_again()


@pytest.mark.parametrize("count, start", [(1, False), (2, True)], ids=["from noise", "two, from a picture"])
def test_control_nets_are_told_their_pictures(folder, count, start):
    images = [photo(seed=number + 1) for number in range(count)]
    arguments = []
    for number, image in enumerate(images):
        image.save(f"hint{number}.png")
        arguments += ["--control", f"hint{number}.png:{folder / f'net{number}'}"]
    if start:
        photo().save("photo.png")
        arguments += ["--image", "photo.png", "--strength", "0.5"]
    main(["generate", "lava", *arguments, *RUN])
    nets = [ControlNetModel.from_pretrained(folder / f"net{number}") for number in range(count)]
    pipe = InstantASPipeline.from_pretrained(demo.folder(), controlnet=nets if count > 1 else nets[0])
    hint = images if count > 1 else images[0]
    told = dict(image=photo(), strength=0.5, control_image=hint) if start else dict(image=hint)
    assert np.array_equal(pixels(), painted(pipe, width=40, height=24, **told))
    white = Image.new("RGB", images[0].size, "white")
    other = told | {"control_image" if start else "image": [white] * count if count > 1 else white}
    assert not np.array_equal(pixels(), painted(pipe, width=40, height=24, **other))
    assert [entry.rpartition(":")[2] for entry in settings()["controls"]] == [
        str(folder / f"net{n}") for n in range(count)
    ]
    assert len(settings()["files"]) == 2 * count + start
    assert paints_again()


@pytest.mark.parametrize("name", ["photo.png", "hint.png", "lora.safetensors"])
def test_an_input_that_is_another_now_is_refused(refused, folder, name):
    photo().save("photo.png")
    photo(seed=1).save("hint.png")
    Path("lora.safetensors").write_bytes((folder / "lora0.safetensors").read_bytes())
    inputs = ["--image", "photo.png", "--lora", "lora.safetensors", "--control", f"hint.png:{folder / 'net0'}"]
    main(["generate", "lava", *inputs, *RUN, "-o", "a.png"])
    with open(name, "ab") as file:
        file.write(b" ")
    line = refused("generate", "--like", "a.png", "-o", "b.png")
    assert line.endswith("which has changed") and name in line and not Path("b.png").exists()
    asked = {"photo.png": inputs[:2], "lora.safetensors": inputs[2:4], "hint.png": inputs[4:]}[name]
    if name != "lora.safetensors":  # whose format knows of no such byte
        main(["generate", "--like", "a.png", *asked, "-o", "b.png", "--device", "cpu"])


@pytest.mark.parametrize("kind", ["clear", "palette", "grey", "cmyk", "turned", "one pixel", "deep colours"])
def test_pictures_of_every_kind_start_a_run(kind):
    image = photo(1, 1) if kind == "one pixel" else photo()
    name, wanted, how = "photo.png", image.size, {}
    if kind == "clear":
        image.putalpha(128)
    elif kind == "turned":
        how["exif"] = Image.Exif()
        how["exif"][0x0112] = 8
        name, wanted = "photo.jpg", (24, 40)
    elif kind == "deep colours":
        name = "photo.tif"
    else:
        image = image.convert({"palette": "P", "grey": "L", "cmyk": "CMYK"}.get(kind, "RGB"))
        name = "photo.tif" if kind == "cmyk" else name
    image.save(name, **how)
    main(["generate", "lava", "--image", name, *RUN])
    assert pixels().shape == (wanted[1], wanted[0], 3)


@pytest.mark.parametrize(
    "arguments, told",
    [
        (["--image", "none.png"], "image: expected a picture file, got 'none.png'"),
        (["--image", "broken.png"], "image: expected a picture file, got 'broken.png'"),
        (["--image", "deep.png"], "image: expected 8 bits a channel, got mode 'I;16' of 'deep.png'"),
        (["--image", "photo.png", "--strength", "1.5"], "strength: expected 0 to 1, got 1.5"),
        (["--image", "photo.png", "--strength", "nan"], "strength: expected"),
        (["--image", "photo.png", "--strength", "0"], "strength: expected at least 0.25, one of 4 steps, got 0"),
        (["--size", "8x8", "--strength", "0.5"], "strength: expected none without --image, got 0.5"),
        (
            ["--size", "8x8", "--lora", "none.safetensors"],
            "lora: expected weights for the model, got 'none.safetensors'",
        ),
        (["--size", "8x8", "--lora", "photo.png"], "lora: expected weights for the model, got 'photo.png'"),
        (["--size", "8x8", "--lora", "empty.safetensors:0.5"], "lora: expected weights for the model, got 'empty.saf"),
        (["--size", "8x8", "--lora", "a.safetensors:nan"], "expected PATH[:SCALE], such as"),
        (["--size", "8x8", "--lora", "a.safetensors:-inf"], "expected PATH[:SCALE], such as"),
        (["--size", "8x8", "--lora", ""], "expected PATH[:SCALE], such as style.safetensors:0.8, got ''"),
        (["--size", "8x8", "--lora", ":0.5"], "expected PATH[:SCALE], such as style.safetensors:0.8, got ':0.5'"),
        (["--image", "photo.png", "--start", "coarse"], "start: expected none with --image"),
        (["--control", "photo.png"], "expected IMAGE:MODEL, such as edges.png:my/controlnet, got 'photo.png'"),
        (["--control", "photo.png:"], "expected IMAGE:MODEL"),
        (["--control", "none.png:net"], "control: expected a picture file, got 'none.png'"),
        (["--control", "photo.png:net"], "control: expected a ControlNet, got 'net'"),
        (["--control", "photo.png:photo.png"], "control: expected a ControlNet, got 'photo.png'"),
        (["--control", "photo.png:other"], "control: expected cross_attention_dim 64, the model's, got 32 of 'other'"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(refused, arguments, told):
    photo().save("photo.png")
    Path("broken.png").write_bytes(Path("photo.png").read_bytes()[:200])
    Image.fromarray(np.zeros((4, 4), np.uint16)).save("deep.png")
    Path("empty.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    Path("net").mkdir()
    if "photo.png:other" in arguments:
        ControlNetModel(
            block_out_channels=(8, 8),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            cross_attention_dim=32,
            attention_head_dim=2,
            norm_num_groups=2,
        ).save_pretrained("other")
    before = set(Path().iterdir())
    assert told in refused("generate", "lava", *RUN, *arguments)
    assert set(Path().iterdir()) == before


@pytest.mark.parametrize("what", ["mask", "extend"])
def test_a_picture_that_is_painted_in_a_part(capsys, monkeypatch, what):
    """Its evaluations are told; a run that is stopped before its picture is written goes on to the same one."""
    start, white = photo(200, 24), Image.new("L", (200, 24))
    start.save("photo.png")
    white.paste(255, (0, 0, 30, 24))
    white.save("mask.png")
    option = ["--mask", "mask.png"] if what == "mask" else ["--extend", "40,0,0,8"]
    command = ["generate", "lava", "--image", "photo.png", *option, *RUN, "--bridging", "none"]
    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", lambda *args, **how: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(SystemExit):
            main([*command, "-o", "stopped.png"])
    capsys.readouterr()
    main(command)
    count = 4 if what == "mask" else 8  # of two windows the left one; the new rows below are of both
    assert f"windows: 2, evaluations: {count} in 4 steps" in capsys.readouterr().out
    pipe = InstantASPipeline.from_pretrained(demo.folder())
    generator = torch.Generator().manual_seed(3)
    settings_ = dict(num_inference_steps=4, generator=generator, bridging="none")
    if what == "mask":
        wanted = pipe("lava", image=start, mask_image=white, **settings_).images[0]
    else:
        wanted = pipe.extend(start, 40, 0, 0, 8, "lava", **settings_).images[0]
    assert np.array_equal(pixels(), np.asarray(wanted))
    main(["generate", "--resume", "stopped.checkpoint", "--device", "cpu", "-o", "resumed.png"])
    assert np.array_equal(pixels("resumed.png"), pixels()) and paints_again()
    read = [Path(name).resolve() for name in ("photo.png", "mask.png")[: 2 if what == "mask" else 1]]
    assert settings()["files"] == {str(path): digest(path) for path in read}
    if what == "mask":
        white.paste(0, (0, 0, 10, 24))
        white.save("mask.png")
        with pytest.raises(SystemExit):
            main(["generate", "--like", "instantas.png", "-o", "changed.png"])
        assert "mask.png', which has changed" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, message",
    [
        (["--size", "40x24", "--mask", "photo.png"], "mask: expected a picture beside it, got no --image"),
        (["--size", "40x24", "--extend", "8,0,0,0"], "extend: expected a picture beside it, got no --image"),
        (
            ["--image", "photo.png", "--mask", "photo.png", "--extend", "8,0,0,0"],
            "mask: expected none beside --extend, got 'photo.png'",
        ),
        (["--image", "photo.png", "--extend", "8,0,0,0", "--size", "48x24"], "size: expected none beside --extend"),
        (["--image", "photo.png", "--extend", "0,0,0,0"], "extend: expected pixels on some side, got 0,0,0,0"),
        (["--image", "photo.png", "--extend", "8,0,0"], "expected LEFT,TOP,RIGHT,BOTTOM in whole pixels"),
        (
            ["--image", "photo.png", "--mask", "square.png"],
            "mask_image: expected the proportions of the picture, 40x24",
        ),
        (["--image", "photo.png", "--mask", "none.png"], "mask: expected a picture file"),
    ],
)
def test_parts_that_cannot_be_painted(capsys, options, message):
    photo().save("photo.png")
    photo(24, 24).save("square.png")
    with pytest.raises(SystemExit):
        main(["generate", "lava", *options, *RUN])
    assert message in capsys.readouterr().err and not Path("instantas.png").exists()


@pytest.mark.parametrize(
    "options, name",
    [
        (["--image", "photo.png", "-o", "photo.png"], "output"),
        (["--image", "photo.png", "--preview", "./photo.png"], "preview"),
        (["--image", "photo.png", "--mask", "mask.png", "-o", "mask.png"], "output"),
        (["--region", "snow@mask.png", "--size", "40x24", "--preview", "mask.png"], "preview"),
        (["--image", "link.png", "-o", "photo.png"], "output"),
    ],
)
def test_no_input_is_written_over(refused, options, name):
    photo().save("photo.png")
    photo(mode="L").save("mask.png")
    Path("link.png").symlink_to("photo.png")
    before = digest("photo.png"), digest("mask.png")
    line = refused("generate", "lava", *options, *RUN, "--force")
    assert line.startswith(f"instantas: {name}: expected a file of its own, got ")
    assert (digest("photo.png"), digest("mask.png")) == before and not Path("instantas.png").exists()


def test_the_digest_of_a_folder_is_that_of_what_is_loaded_from_it():
    folder = Path("net").resolve()
    (folder / "part").mkdir(parents=True)
    (folder / "part" / "weights.safetensors").write_text("weights")
    found = [digests([folder])]
    (folder / "a.png").write_text("a picture")
    found.append(digests([folder]))
    (folder / "config.json").write_text("{}")
    found.append(digests([folder]))
    (folder / "config.json").rename(folder / "part" / "config.json")
    found.append(digests([folder]))
    assert found[0] == found[1] and len({each[str(folder)] for each in found}) == 3


def test_a_folder_that_is_another_now_is_refused(refused, folder):
    Path("lora").mkdir()
    weights = Path("lora/pytorch_lora_weights.safetensors")
    weights.write_bytes((folder / "lora0.safetensors").read_bytes())
    main(["generate", "lava", "--size", "8x8", "--steps", "1", "--lora", "lora", "-o", "a.png", "--device", "cpu"])
    weights.write_bytes((folder / "lora1.safetensors").read_bytes())
    assert "lora', which has changed" in refused("generate", "--like", "a.png", "-o", "b.png")

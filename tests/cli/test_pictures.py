"""Picture files: each format with its record, what is read to start from, and what is refused."""

import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from diffusers import UNet2DConditionModel
from PIL import Image

from instantas.cli import main, pictures
from instantas.cli.pictures import FORMATS, check_record, read_picture, read_record, write_picture

TEXT = {"prompt": "Schnee, « é 雪 »", "seed": "7", "size": "47x33", "settings": '{"a": "b\\n"}', "Software": "us"}


def photo(width=47, height=33, mode="RGB"):
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 256, (4, 6, 3), dtype=np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC).convert(mode)


@pytest.fixture
def no_evaluation(monkeypatch):
    def fail(*arguments, **settings):
        raise AssertionError("the network was evaluated")

    monkeypatch.setattr(UNet2DConditionModel, "forward", fail)


@pytest.mark.parametrize("ending", [*FORMATS, ".PNG", ".Jpg"])
def test_every_format_carries_its_record(ending):
    path = Path("a" + ending)
    write_picture(photo(), path, TEXT, False)
    assert read_record(path) == TEXT
    with Image.open(path) as written:
        assert (written.format, written.mode, written.size) == (FORMATS[ending.lower()].name, "RGB", (47, 33))
        difference = abs(np.asarray(written).astype(int) - np.asarray(photo())).max()
    assert difference <= (8 if written.format == "JPEG" else 0)
    assert [file.name for file in Path().iterdir()] == [path.name]


@pytest.mark.parametrize("ending", FORMATS)
def test_the_record_is_read_whatever_the_file_is_called(ending):
    write_picture(photo(), Path("a" + ending), TEXT, False)
    Path("a" + ending).rename("picture")
    assert read_record(Path("picture")) == TEXT


@pytest.mark.parametrize("command", [("generate", "lava", "--size", "8x8"), ("upscale", "photo.png")])
@pytest.mark.parametrize("name", ["a.gif", "a", "a.png.bmp", ".png"])
def test_another_ending_is_refused_at_once(refused, no_evaluation, command, name):
    photo().save("photo.png")
    line = refused(*command, "-o", name)
    assert line.endswith(f"a file name that ends in .png, .jpg, .jpeg, .webp, .tif, .tiff, got {name!r}")


@pytest.mark.parametrize(
    "name, size, told",
    [
        ("a.webp", "16384x8", "at most 16383 pixels a side in a WEBP file, got 16384x8"),
        ("a.jpg", "8x65501", "at most 65500 pixels a side in a JPEG file, got 8x65501"),
    ],
)
def test_a_size_that_the_format_cannot_hold_is_refused_at_once(refused, no_evaluation, name, size, told):
    assert told in refused("generate", "lava", "--size", size, "-o", name)
    assert list(Path().iterdir()) == []


def test_enlarged_pictures_are_refused_at_once_too(refused, no_evaluation):
    photo(100, 2).save("thin.png")
    assert "at most 16383 pixels" in refused("upscale", "thin.png", "--scale", "164", "-o", "a.webp")


@pytest.mark.parametrize("name, side", [("a.webp", 16383), ("a.jpg", 65500)])
def test_the_largest_side_can_be_written(name, side):
    write_picture(Image.new("RGB", (side, 1)), Path(name), TEXT, False)
    with Image.open(name) as written:
        assert written.size == (side, 1)


def test_a_record_too_long_for_jpeg_is_refused_at_once(refused, no_evaluation):
    places = [{"prompt": "lava", "box": [0, 0, 1, 1], "negative_prompt": "snow " * 14000}]
    Path("regions.json").write_text(json.dumps(places))
    line = refused("generate", "lava", "--size", "8x8", "--regions", "regions.json", "-o", "a.jpg")
    assert "output: expected a format that holds" in line and "got a JPEG file" in line
    check_record(Path("a.webp"), TEXT | {"prompt": "x" * 10**5})
    longest = TEXT | {"prompt": "x" * 65200}
    check_record(Path("a.jpg"), longest)
    write_picture(photo(), Path("a.jpg"), longest, False)
    assert read_record(Path("a.jpg")) == longest


@pytest.mark.parametrize("ending", FORMATS)
def test_nothing_is_written_unless_whole(monkeypatch, ending):
    def fail(self, file, **settings):
        Path(file).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    path = Path("a" + ending)
    path.write_bytes(b"mine")
    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match="No space"):
        write_picture(photo(), path, TEXT, True)
    assert path.read_bytes() == b"mine" and len(list(Path().iterdir())) == 1


def test_the_commands_write_every_format():
    main(["generate", "lava", "--size", "40x24", "--steps", "1", "--seed", "3", "--device", "cpu", "-o", "a.png"])
    for name in ("a.webp", "a.tif"):
        main(["generate", "lava", "--size", "40x24", "--steps", "1", "--seed", "3", "--device", "cpu", "-o", name])
        with Image.open("a.png") as one, Image.open(name) as other:
            assert np.array_equal(one, other)
        assert read_record(Path(name)) == read_record(Path("a.png"))
    main(["upscale", "a.webp", "--steps", "2", "--strength", "0.5", "--scale", "2", "--device", "cpu", "-o", "b.jpg"])
    assert read_record(Path("b.jpg"))["size"] == "80x48"


# Pictures to start from


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1", "LA"])
def test_pictures_of_every_common_mode_are_read(mode):
    name = "photo.jpg" if mode == "CMYK" else "photo.png"
    photo(mode=mode).save(name)
    image = read_picture(Path(name))
    assert (image.mode, image.size) == ("RGB", (47, 33))


def test_transparent_parts_are_white_and_turned_pictures_upright():
    clear = photo(mode="RGBA")
    clear.putalpha(0)
    clear.save("clear.png")
    assert np.asarray(read_picture(Path("clear.png"))).min() == 255
    exif = Image.Exif()
    exif[0x0112] = 6  # held upright by a camera that lay on its side
    photo().save("turned.jpg", exif=exif)
    assert read_picture(Path("turned.jpg")).size == (33, 47)
    Image.new("P", (2, 1)).save("palette.png", transparency=0)
    assert read_picture(Path("palette.png")).getpixel((0, 0)) == (255, 255, 255)


def test_a_picture_of_one_pixel_is_read():
    Image.new("RGB", (1, 1), (1, 2, 3)).save("one.png")
    assert read_picture(Path("one.png")).getpixel((0, 0)) == (1, 2, 3)


@pytest.mark.parametrize("ending", FORMATS)
def test_broken_files_are_refused_in_one_line(ending):
    whole = Path("a" + ending)
    write_picture(photo(400, 300), whole, TEXT, False)
    data = whole.read_bytes()
    for kept in (0, 3, 20, 100, len(data) // 3, len(data) // 2):
        whole.write_bytes(data[:kept])
        with pytest.raises(ValueError, match="^image: expected a picture file, got 'a[^\n]*$"):
            read_picture(whole, "image")


def claimed(width, height):
    """A PNG file that says to be so large, and holds nothing."""
    head = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + head + struct.pack(">I", zlib.crc32(head))


def test_a_picture_larger_than_the_memory_is_refused(monkeypatch):
    Path("bomb.png").write_bytes(claimed(2**20, 2**20) + b"\0\0\0\0IDAT\x35\xaf\x06\x1e")
    with pytest.raises(ValueError, match="picture: expected a picture that fits into the memory, got 8 TiB of it"):
        read_picture(Path("bomb.png"))
    photo().save("photo.png")
    monkeypatch.setattr(pictures, "memory_limits", lambda: [(8 * 47 * 33 - 1, "this process")])
    with pytest.raises(ValueError, match="fits into the memory"):
        read_picture(Path("photo.png"))


def test_a_picture_larger_than_pillow_expects_is_read(monkeypatch):
    write_picture(photo(), Path("a.png"), TEXT, False)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert read_picture(Path("a.png")).size == (47, 33) and read_record(Path("a.png")) == TEXT
    assert Image.MAX_IMAGE_PIXELS == 100

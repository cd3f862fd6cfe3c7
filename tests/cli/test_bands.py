"""Large TIFF files: written in bands, with a preview, whole or not at all."""

import contextlib
import os
import sys
from datetime import timedelta
from functools import partialmethod
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tifffile
from PIL import Image

from instantas import InstantASPipeline
from instantas.cli import bands, finish, main
from instantas.cli.bands import Preview, write_bands
from instantas.cli.cost import Memory
from instantas.cli.pictures import read_picture, read_record

TEXT = {"prompt": "« é »", "seed": "7", "size": "700x1000", "settings": "{}", "Software": "instantas 0"}
RUN = ("--size", "96x136", "--steps", "1", "--seed", "3", "--device", "cpu")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Small pictures are large ones, of three rows of tiles."""
    monkeypatch.setattr(bands, "LARGE", 96 * 136 - 1)
    for name in ("bands", "decode"):
        monkeypatch.setattr(InstantASPipeline, name, partialmethod(getattr(InstantASPipeline, name), tiles=9))


def picture(height=1000, width=700):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def cut(picture, *heights):
    return np.split(picture, np.cumsum(heights))


@pytest.mark.parametrize("heights", [(1000,), (1, 255, 256, 400), (300, 300, 300), (50,) * 19])
def test_bands_of_any_height_make_one_file(heights):
    wanted = picture()
    write_bands(iter(cut(wanted, *heights)), Path("a.tif"), 700, 1000, TEXT, False)
    assert np.array_equal(tifffile.imread("a.tif"), wanted)
    assert np.array_equal(read_picture(Path("a.tif")), wanted)
    with tifffile.TiffFile("a.tif") as file:
        assert file.is_bigtiff and len(file.pages) == 1 and file.pages[0].tile == (256, 256)
    assert read_record(Path("a.tif")) == TEXT == read_record(Path("a.preview.png"))
    assert sorted(os.listdir()) == ["a.preview.png", "a.tif"]


@pytest.mark.parametrize("size", [(1000, 700), (61, 1), (1, 61), (64, 64)])
def test_the_preview_is_the_mean_of_squares(monkeypatch, size):
    monkeypatch.setattr(bands, "PREVIEW", 16)
    wanted, preview = picture(*size), Preview(*size[::-1])
    list(preview.seen(np.array_split(wanted, min(7, size[0]))))
    found, side = preview.picture(), -(-max(size) // 16)
    assert max(found.shape) <= 16 and found.shape == (-(-size[0] // side), -(-size[1] // side), 3)
    for y in (0, found.shape[0] - 1):
        for x in (0, found.shape[1] - 1):
            square = wanted[y * side : (y + 1) * side, x * side : (x + 1) * side].astype(float)
            assert abs(found[y, x] - square.mean((0, 1))).max() <= 0.5


def test_a_large_picture_is_what_it_is_at_once(capsys):
    main(["generate", "lava", *RUN, "-o", "a.png"])
    main(["generate", "lava", *RUN, "-o", "a.tif"])
    assert capsys.readouterr().out.splitlines()[-2:] == ["a.preview.png: preview", "a.tif: 96x136, seed 3"]
    with Image.open("a.png") as whole, Image.open("a.preview.png") as preview:
        assert np.array_equal(tifffile.imread("a.tif"), whole) and np.array_equal(preview, whole)
    main(["generate", "--like", "a.tif", "-o", "b.tif"])
    assert Path("a.tif").read_bytes() == Path("b.tif").read_bytes()
    main(["upscale", "a.png", "--scale", "1.5", "--steps", "2", "--strength", "0.5", "--device", "cpu", "-o", "c.tif"])
    assert Path("c.preview.png").exists() and tifffile.imread("c.tif").shape == (204, 144, 3)


def test_smaller_ones_and_those_that_are_looked_at_are_written_at_once(monkeypatch):
    main(["generate", "lava", *RUN, "--size", "95x136", "-o", "small.tif"])
    monkeypatch.setattr(InstantASPipeline, "needs_whole_pictures", True)
    main(["generate", "lava", *RUN, "-o", "checked.tif"])
    assert sorted(os.listdir()) == ["checked.tif", "small.tif"]


def test_nothing_is_written_unless_whole(monkeypatch, refused):
    def broken(self, *arguments, **settings):
        yield picture(64, 96)
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(InstantASPipeline, "bands", broken)
        line = refused("generate", "lava", *RUN, "-o", "a.tif")
    assert "No space left" in line and "instantas generate --resume a.checkpoint -o a.tif" in line
    assert os.listdir() == ["a.checkpoint"]
    main(["generate", "--resume", "a.checkpoint", "-o", "a.tif"])
    main(["generate", "lava", *RUN, "-o", "b.tif"])
    assert Path("a.tif").read_bytes() == Path("b.tif").read_bytes()


def test_what_stands_in_the_way_is_told_before_anything_is_painted(monkeypatch, refused):
    monkeypatch.setattr(InstantASPipeline, "__call__", lambda *arguments, **settings: pytest.fail("painted"))
    Path("a.preview.png").write_text("mine")
    assert "a.preview.png', which exists" in refused("generate", "lava", *RUN, "-o", "a.tif")
    monkeypatch.setitem(sys.modules, "tifffile", None)
    line = refused("generate", "lava", *RUN, "-o", "b.tif")
    assert "tifffile" in line and line.endswith("this command needs: pip install 'instantas[tiff]'")
    assert os.listdir() == ["a.preview.png"]


def test_the_preview_takes_the_place_of_no_other_file(refused):
    Image.new("RGB", (96, 136)).save("a.preview.png")
    before = Path("a.preview.png").read_bytes()
    for options in (["--image", "a.preview.png"], ["--preview", "a.preview.png"]):
        line = refused("generate", "lava", *RUN, *options, "-o", "a.tif", "--force")
        assert line.endswith("got 'a.preview.png', which the run reads or writes too")
    assert Path("a.preview.png").read_bytes() == before and os.listdir() == ["a.preview.png"]
    start = "--image", "a.preview.png", "--strength", "1"
    main(["generate", "lava", *RUN, "--size", "8x8", *start, "-o", "a.tif"])  # not in bands


def test_a_picture_in_bands_needs_less_memory():
    pipe = InstantASPipeline.from_pretrained(str(Path(bands.__file__).parents[1] / "demo" / "model"))
    whole, banded = (Memory.of(pipe, 2**20, 2**10, (False, False), "instantas", each) for each in (False, True))
    assert banded.picture * 1024 == whole.picture and banded.canvas == whole.canvas


@pytest.mark.parametrize("rank", [0, 1])
def test_other_processes_wait_for_rank_0_however_long_it_writes(monkeypatch, rank):
    """The group's own timeout is of a process that hangs in a step: half an hour, in which no large file is written."""
    waited = []

    class Waiting:
        def __init__(self, group, timeout):
            waited.append((group, timeout >= timedelta(days=1)))

        @contextlib.contextmanager
        def together(self):
            yield
            waited.append(Path("a.tif").exists())

    monkeypatch.setattr(finish, "Ranks", Waiting)
    pipe = SimpleNamespace(needs_whole_pictures=False, bands=lambda *size, wrap: cut(picture(136, 96), 100))
    text = TEXT | dict(size="96x136", settings='{"wrap": [false, false]}')
    finish.finish(pipe, None, Path("a.tif"), text, False, SimpleNamespace(rank=rank, group="all"))
    assert waited == [("all", True), rank == 0]

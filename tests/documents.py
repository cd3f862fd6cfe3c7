"""What a reader copies from the documentation, run in the current folder by whichever instantas is installed.

    python -I tests/documents.py README.md docs/examples/*.py      # prints what has painted what it should

The README's calls take one step each; nothing else is changed.
"""

import contextlib
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from PIL import Image

from instantas.cli import main
from instantas.pipelines.pipeline import InstantASPipeline

SIZES = [(1024, 256), (1152, 256), (512, 256), (512, 512), None]  # of what the README's Python blocks paint


def blocks(page: Path, language: str) -> list[str]:
    found = re.findall(r"(?ms)^```(\w*)\n(.*?)^```$", page.read_text(encoding="utf-8"))
    return [text for name, text in found if name == language]


def commands(page: Path) -> list[list[str]]:
    """The arguments of every `instantas` in a block, but for those that download a model."""
    lines = "".join(blocks(page, "")).replace("\\\n", "").splitlines()
    found = [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("instantas ")]
    return [arguments for arguments in found if "--model" not in arguments]


@contextlib.contextmanager
def one_step() -> Iterator[None]:
    """Calls of the pipeline take one."""
    call = InstantASPipeline.__call__

    def quick(self, *arguments, **settings):
        few = {"num_inference_steps": 1, "strength": None if settings.get("strength") is None else 1.0}
        return call(self, *arguments, **settings | few)

    with mock.patch.object(InstantASPipeline, "__call__", quick):
        yield


@one_step()
def run_blocks(page: Path) -> None:
    """The README's Python blocks one after the other."""
    cond, uncond, latents = *torch.zeros(2, 1, 4, 4, 64, 64), torch.ones(1, 4, 64, 256)
    names = dict(cond=cond, uncond=uncond, latents=latents, a=0.5, b=1.0)  # what a reader has of their own
    for block, size in zip(blocks(page, "python"), SIZES, strict=True):
        exec(block, names)
        assert size is None or names["image"].size == size
    assert (names["latents"] == 0.5).all()


@one_step()
def run_commands(page: Path) -> None:
    """The README's commands one after the other, in the folder of its blocks."""
    for arguments in commands(page):
        main(arguments)
    for arguments in commands(page):
        for option in ("-o", "--plot", "--preview"):
            if option in arguments:
                with Image.open(arguments[arguments.index(option) + 1]) as picture:
                    size = "{}x{}".format(*picture.size)
                if option == "-o" and "--size" in arguments:
                    assert size == arguments[arguments.index("--size") + 1]


def run_example(path: Path) -> None:
    output = f"{path.stem}.png"
    with mock.patch.object(sys, "argv", [str(path), output]):
        runpy.run_path(str(path), run_name="__main__")
    with Image.open(output) as picture:
        pixels = np.asarray(picture).astype(float)
    assert pixels.shape[0] == 128 and pixels.std() > 5


if __name__ == "__main__":
    for page in map(Path, sys.argv[1:]):
        for run in [run_example] if page.suffix == ".py" else [run_blocks, run_commands]:
            run(page)
        print(page.name, flush=True)

"""The examples of the documentation run, and paint; links between its pages lead somewhere."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from instantas.pipelines.pipeline import InstantASPipeline

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "docs" / "examples").glob("*.py"))
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_paints_a_picture(path, tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, path, "a.png"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "a.png") as picture:
        pixels = np.asarray(picture).astype(float)
    assert pixels.shape[0] == 128 and pixels.std() > 5


def test_readmes_blocks_run_one_after_the_other(monkeypatch):
    call = InstantASPipeline.__call__
    monkeypatch.setattr(InstantASPipeline, "__call__", lambda self, *a, **k: call(self, *a, **k, num_inference_steps=1))
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    cond, uncond, latents = *torch.zeros(2, 1, 4, 4, 64, 64), torch.ones(1, 4, 64, 256)
    names = dict(cond=cond, uncond=uncond, latents=latents, a=0.5, b=1.0)  # what a reader has of their own
    for block, size in zip(blocks, [(1024, 256), (512, 256), (512, 512), None], strict=True):
        exec(block, names)
        assert size is None or names["image"].size == size
    assert (names["latents"] == 0.5).all()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_contents_lead_to_headings(page):
    text = page.read_text(encoding="utf-8")
    headings = {
        re.sub(r"[^\w -]", "", line).strip().lower().replace(" ", "-") for line in re.findall(r"(?m)^#+(.*)$", text)
    }
    assert set(re.findall(r"\]\(#([^)]*)\)", text)) <= headings


def test_there_are_examples():
    assert {path.stem for path in EXAMPLES} >= {"op_in_a_loop", "own_bridge", "regions_in_diffusers"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_named_files_exist(page):
    text = page.read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!https?:)([^)#]+)(?:#[^)]*)?\)", text)
    assert not [link for link in links if not (page.parent / link).exists()]
    named = re.findall(
        r"`((?:instantas|kernels|csrc|bench|docs|tests)/[\w./-]+\.(?:py|md|cu|cuh|cpp|h|json|csv))`", text
    )
    assert not [name for name in named if not (ROOT / name).exists()]

"""The examples of the documentation run, and paint; links between its pages lead somewhere."""

import re
from pathlib import Path

import pytest

from tests import documents

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "docs" / "examples").glob("*.py"))
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_paints_a_picture(path, tmp_path, monkeypatch):
    if path.stem == "k_diffusion_loop":
        pytest.importorskip("k_diffusion", reason="k-diffusion is not installed")
    monkeypatch.chdir(tmp_path)
    documents.run_example(path)


def test_readmes_commands_are_found_and_its_blocks_run(tmp_path, monkeypatch):
    """The commands run from a wheel, in `test_packaging.py`; what they do in a process of the checkout, in `cli/`."""
    names = [name for name, *_ in documents.commands(ROOT / "README.md")]
    assert names == ["generate", "plan", "info", "info", *["generate"] * 3, "upscale", *["generate"] * 2, "info"]
    monkeypatch.chdir(tmp_path)
    documents.run_blocks(ROOT / "README.md")


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

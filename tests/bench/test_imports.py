"""Every benchmark can be imported: what it takes from the package is there."""

import importlib
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "bench"


@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("*.py")))
def test_a_benchmark_is_imported(name):
    for extra in ("matplotlib", "sklearn", "skimage", "pytest_benchmark"):
        pytest.importorskip(extra, reason="needs instantas[bench,train]")
    importlib.import_module(f"bench.{name}")

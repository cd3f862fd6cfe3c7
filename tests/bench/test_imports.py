"""Every benchmark can be imported: what it takes from the package is there."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NAMES = sorted(path.stem for path in (ROOT / "bench").glob("*.py"))


def test_every_benchmark_is_imported():
    """In a process of its own: some set up Triton for a GPU, and not for the interpreter."""
    for extra in ("matplotlib", "sklearn", "skimage", "pytest_benchmark", "triton"):
        pytest.importorskip(extra, reason="needs instantas[bench,train]")
    program = f"import importlib\nfor name in {NAMES}: importlib.import_module(f'bench.{{name}}')"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]

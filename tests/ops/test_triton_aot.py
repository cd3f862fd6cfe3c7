"""Every Triton kernel compiles for every architecture, without spilling and within the chip's shared memory."""

import json
import os
import subprocess
import sys

import pytest

from instantas.testing import oracle

triton = pytest.importorskip("triton")

KERNELS = {"gather", "scatter", "step", "attention", "grad_query", "grad_key_value"}
PROGRAM = """
import json, sys
from bench import resources
architecture = int(sys.argv[1])
partial = architecture == 90  # that these compile is the same everywhere, and they need no more than the whole
rows = [row._asdict() for row in resources.triton_usage(False, partial, [architecture])]
print(json.dumps([resources.triton.__version__, rows, resources.SHARED_LIMIT[architecture]]))
"""


OLD = oracle.ROOT / "build" / "triton-3.6"  # the oldest that is served; it comes with torch 2.11


@pytest.mark.parametrize(
    "architecture, folders",
    [
        *((architecture, [oracle.ROOT]) for architecture in (80, 90, 100)),
        pytest.param(90, [OLD, oracle.ROOT], marks=pytest.mark.skipif(not OLD.exists(), reason="make triton-3.6")),
    ],
    ids=["80", "90", "100", "90 Triton 3.6"],
)
def test_no_spills_and_shared_memory_within_the_limit(architecture, folders, tmp_path):
    """In a process of its own, because kernels that were imported for the interpreter cannot be compiled."""
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(map(str, folders))}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-c", PROGRAM, str(architecture)]
    done = subprocess.run(command, env=environment, cwd=oracle.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    version, rows, limit = json.loads(done.stdout)
    assert version.startswith("3.6.") or OLD not in folders
    assert {row["kernel"] for row in rows} == KERNELS
    for row in rows:
        assert row["spilled"] == 0 and 0 < row["registers"] <= 255 and row["shared"] <= limit, row

"""The operations against what one would use instead: `python -m bench.operations [--device cuda] [PYTEST OPTIONS]`.

The comparisons are pytest-benchmark tests, one file an operation.
"""

import sys
from pathlib import Path

import pytest

sys.exit(pytest.main([str(Path(__file__).parent), "-q", *sys.argv[1:]]))

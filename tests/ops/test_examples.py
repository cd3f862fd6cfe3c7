"""No two backends differ by more than the error budget, over random plans, shapes, weights, dtypes and modes.

Each of the 2000 examples holds every backend that runs here to the budget against float64, which bounds the difference
between any two of them. Examples are drawn from fixed seeds, so that a failure is a change and not a throw of dice.
"""

import random

import pytest

from instantas.testing import examples, oracle

CHUNKS, EXAMPLES = 10, 50  # of each of the four operations; chunks run in parallel
OTHERS = [name for name in oracle.BACKENDS if name != "reference"]


@pytest.mark.parametrize("chunk", range(CHUNKS))
@pytest.mark.parametrize("operation", examples.OPERATIONS, ids=lambda operation: operation.__name__)
def test_backends_agree(operation, chunk):
    draw = random.Random(chunk)
    for _ in range(EXAMPLES):
        examples.judge(OTHERS, operation, draw)

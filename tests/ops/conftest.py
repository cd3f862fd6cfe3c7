"""The grid that tests of the operations run over: every backend that runs here, dtype and plan."""

import pytest

from instantas.testing import oracle
from instantas.testing.oracle import (
    BACKENDS,
    PLANS,
)


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


@pytest.fixture(params=oracle.DTYPES, ids=str)
def dtype(request):
    return request.param


@pytest.fixture(params=PLANS)
def plan(request):
    return PLANS[request.param]

"""The grid that tests of the operations run over: every backend that runs here, dtype and plan."""

import ctypes
import shutil
import subprocess

import pytest

from instantas.ops import stamp
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


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Function of C++ that includes the host's sources, and of an optimisation: the library that becomes of it."""

    def compile_source(source, optimisation):
        if shutil.which("g++") is None or not stamp.CHECKOUT:
            pytest.skip("needs g++ and the sources")
        folder = tmp_path_factory.mktemp("compiled")
        (folder / "source.cpp").write_text(source)
        flags = ["-std=c++17", optimisation, "-shared", "-fPIC", f"-I{stamp.SOURCES}"]
        subprocess.run(["g++", *flags, "source.cpp", "-o", "library.so"], cwd=folder, check=True)
        return ctypes.CDLL(folder / "library.so")

    return compile_source

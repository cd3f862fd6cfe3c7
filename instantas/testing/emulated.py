"""The CUDA kernels on the CPU: `csrc/`, with the device's instructions replaced by those of `emulation/`.

    with emulated.cuda():
        ops.gather_windows(...)  # CPU tensors, through the host code and the kernels of the CUDA library

The library is built when it is first needed, and again when a source changes.
"""

import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import os
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import torch

from instantas import ops
from instantas.ops.backend import BACKENDS
from instantas.ops.library import CUDA

ROOT = Path(__file__).parents[2]
COMPILER = shlex.split(os.environ.get("CXX", "g++"))
FLAGS = ["-x", "c++", "-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-shared"]
FLAGS += ["-DTORCH_TARGET_VERSION=0x020a000000000000"]
FLAGS += ["-U_FORTIFY_SOURCE"]  # which takes a jump to another fiber for a mistake
EMULATED = dataclasses.replace(BACKENDS["cuda"], devices=("cpu",), absent=lambda: None, refused=lambda device: None)
AVAILABLE = shutil.which(COMPILER[0]) is not None and Path("/proc/self").exists()


@contextlib.contextmanager
def cuda() -> Iterator[None]:
    """Force the emulated CUDA backend, for tensors on the CPU."""
    _load()
    with ops.use_backend(EMULATED):
        yield


@contextlib.contextmanager
def order(seed: int) -> Iterator[None]:
    """Another order in which threads and blocks run; 0: one after the other."""
    _load()
    torch.ops.instantas_emulation.set_order(seed)
    try:
        yield
    finally:
        torch.ops.instantas_emulation.set_order(0)


def copied() -> int:
    """Bytes that asynchronous copies have read from memory until now."""
    _load()
    return torch.ops.instantas_emulation.copied()


def attention_rows(depth: int) -> int:
    """Queries of a tile of the attention kernel, in half precision and for a head size."""
    _load()
    return torch.ops.instantas_emulation.attention_rows(depth)


def quotient(dividend: int, divisor: int) -> int:
    """dividend // divisor, as the kernels divide by what the host knows; each from 0, or 1, to below 2^31."""
    _load()
    return torch.ops.instantas_emulation.quotient(dividend, divisor)


@functools.cache
def _load():
    sources = {
        path.name: path
        for folder in ("csrc", "instantas/testing/emulation")
        for path in sorted((ROOT / folder).iterdir())
    }
    text = b"".join(name.encode() + path.read_bytes() for name, path in sources.items())
    key = hashlib.sha256(text + repr((COMPILER, FLAGS, torch.__version__)).encode()).hexdigest()[:16]
    folder = ROOT / "build" / "emulation"
    library = folder / f"{key}.so"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:  # the first of the test processes builds, the others wait
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            _build(sources, folder / key, library)
    CUDA.define()
    torch.ops.load_library(library)


def _build(sources, work, library):
    """A folder in which the emulation's headers take the place of the device's."""
    torch_folder = Path(torch.__file__).parent
    work.mkdir(exist_ok=True)
    for name, path in sources.items():
        shutil.copyfile(path, work / name)
    units = [str(work / name) for name in sources if name.endswith(".cu")]
    libraries = [f"-L{torch_folder / 'lib'}", "-ltorch_cpu"]
    command = [*COMPILER, *FLAGS, "-isystem", str(torch_folder / "include"), *units, *libraries]
    subprocess.run([*command, "-o", str(work / "library.so")], check=True)
    os.replace(work / "library.so", library)
    shutil.rmtree(work)

"""Groups for tests of `bench.gpu`: its checks and comparisons, on stand-ins for the kernels of which some are faulty.

The stand-ins are the reference. FAULTS in the environment says which of their operations are wrong, and how:
"triton gather_windows wrong; cuda scatter_windows endless".
"""

import ctypes
import dataclasses
import os
import time
from functools import partial

import torch

from bench import gpu_checks, gpu_groups
from bench.gpu_groups import Group, Item
from instantas.ops.backend import BACKENDS
from instantas.testing import faults, oracle

ENOUGH = 300  # seconds for what comes to its end
SHORT = 3  # for what does not


def groups(setting, field=None):
    """A group of checks for each stand-in, and the comparisons of two operations."""
    found = [Group(f"grid: {name}", partial(_checks, name)) for name in setting.backends]
    return found + [
        Group(f"speeds: {operation}", partial(_speeds, operation, field)) for operation in ("gather", "step")
    ]


def _checks(backend):
    plant()
    for name, check in gpu_checks.grid([backend], [torch.float32], ", exact"):
        yield Item(name, check, _limit(*name.split(", ")[::2]))


def _speeds(operation, field):
    plant()
    whole = {group.name: group for group in gpu_groups.groups(gpu_groups.Setting("cpu", smoke=True), field)}
    for item in whole[f"speeds: {operation}"].items():
        if item.name.endswith("bfloat16"):
            yield item._replace(seconds=SHORT if _endless(operation) and not field.lost else ENOUGH)


def _limit(backend, case):
    return SHORT if _endless(case.removeprefix("guided "), backend) else ENOUGH


def _endless(operation, backend=""):
    return any(f"{backend} " in fault and operation in fault for fault in _faults() if fault.endswith("endless"))


def _faults():
    return os.environ["FAULTS"].split("; ")


def plant():
    """Put the stand-ins in the backends' places, with the faults asked for."""
    oracle.EMULATED = False
    functions = {"triton": {}, "cuda": {}}
    for backend, operation, kind in map(str.split, filter(None, _faults())):
        functions[backend][operation] = partial(KINDS[kind], BACKENDS["reference"].functions()[operation])
    for name, wrong in functions.items():
        BACKENDS[name] = dataclasses.replace(faults.stand_in(name, wrong), devices=("cpu",))
    del BACKENDS["cpp"]


def _wrong(right, *arguments):
    return right(*arguments) * 2


def _endless_loop(right, *arguments):
    while True:
        time.sleep(0.1)


def _illegal_address(right, *arguments):
    """As in the emulation, where memory ends at a page that nobody may touch."""
    ctypes.string_at(1)


def _lost_device(right, *arguments):
    """As on a GPU, where nothing works any more after an illegal address."""
    gpu_checks.alive = lambda device: False
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


KINDS = dict(wrong=_wrong, endless=_endless_loop, address=_illegal_address, device=_lost_device)

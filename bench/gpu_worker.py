"""One group of `bench.gpu`, in a process that may die of it.

    python -m bench.gpu_worker JOB

JOB is JSON: "groups", the module that describes them; "group", the name of one; "setting"; "done", items that are not
to be run again; "lost", contenders that are not to be run again, and why. What happens is told line by line, in JSON,
on what was the standard output: see `bench.gpu_crew`, which reads it. All else that is printed goes to stderr.
"""

from __future__ import annotations

import faulthandler
import importlib
import json
import os
import resource
import signal
import sys
import threading
import time

import torch

from bench import gpu_checks
from bench.gpu_groups import Setting
from bench.gpu_speeds import Field
from instantas.bench.measure import DisagreementError, reason
from instantas.testing import interpreted

DEAD = 3  # exit status once the device cannot be used any more


def main(job: dict) -> None:
    channel = os.fdopen(os.dup(1), "w")  # which children do not inherit
    os.dup2(2, 1)
    faulthandler.enable()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    threading.Thread(target=_end_with, args=[os.getppid()], daemon=True).start()

    def tell(**news):
        print(json.dumps(news), file=channel, flush=True)

    def failed(name, ours, error):
        tell(failed=name, ours=ours, why=reason(error), disagrees=isinstance(error, DisagreementError))
        leave_if_dead()

    def leave_if_dead():
        if not gpu_checks.alive(device):
            os._exit(DEAD)  # without the destructors, which would use the device

    setting = Setting(**job["setting"])
    device = torch.device(setting.device)
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)  # a device without a number is refused
    interpreted.prepare()
    field = Field(job["lost"], lambda name, ours: tell(running=name, ours=ours), failed)
    groups = importlib.import_module(job["groups"]).groups(setting, field)
    items = list(next(group for group in groups if group.name == job["group"]).items())
    leave_if_dead()  # which readies the device, too
    tell(items=[item.name for item in items])
    for item in items:
        if item.name not in job["done"]:
            tell(begin=item.name, seconds=item.seconds)
            _run(item, device, tell)
            leave_if_dead()


def _run(item, device, tell):
    try:
        kept = item.run()
        if not gpu_checks.alive(device):
            raise RuntimeError("the device failed after the item had come to its end")
    except gpu_checks.AbsentError as error:
        tell(end=item.name, absent=str(error))
    except Exception as error:  # whatever compilers, kernels and drivers raise
        tell(end=item.name, why=reason(error))
    else:
        tell(end=item.name, **(kept if isinstance(kept, dict) else {}))


def _end_with(parent):
    """Ends this process, and its children, when the one that started it is gone."""
    while os.getppid() == parent:
        time.sleep(1)
    os.killpg(os.getpgrp(), signal.SIGKILL)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))

"""Lives of one run, each in a process of its own that is killed at a random moment; the last one's result is compared.

`python killed.py FOLDER [KILLS]`. A moment is a number of calls, of Python functions and of C ones, every second time
of those that write the file: which moments are hit depends on no clock. A life begins with the file that those before
have left.
"""

import itertools
import os
import random
import signal
import sys
from pathlib import Path

import torch
from diffusers import DPMSolverMultistepScheduler, EulerAncestralDiscreteScheduler

from instantas.sampling.checkpoint import Recorder
from instantas.sampling.sampler import sample
from instantas.windows import WindowPlan

PLAN = WindowPlan.minimum_coverage(10, 20, 8)
RUNS = (  # a scheduler and a start
    (EulerAncestralDiscreteScheduler, None),
    (DPMSolverMultistepScheduler, None),
    (DPMSolverMultistepScheduler, "coarse"),
)


def denoiser(windows, timestep, context):
    return torch.tanh(windows), torch.sin(windows)


def run(kind, start, checkpoint=None):
    generator = torch.Generator().manual_seed(1)
    return sample(
        denoiser,
        torch.randn(1, 4, 10, 20, generator=generator),
        PLAN,
        kind(),
        start=start,
        num_inference_steps=5,
        guidance_scale=3.0,
        generator=generator,
        bridging="shift",
        checkpoint=checkpoint,
    )


def live(given, folder, calls, writing):
    """Run in a process that is killed at a call, or at one of those that write the file; whether it was.

    One that was not has left its result, and how many calls there were.
    """
    child = os.fork()
    if not child:
        left, counts = calls, not writing

        def count(frame, event, argument):
            nonlocal left, counts
            if writing and frame.f_code is Recorder._write.__code__:
                counts = event == "call" or (counts and event != "return")
            left -= counts
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)

        try:
            sys.setprofile(count)
            latents = run(*given, folder / "run.checkpoint")
            sys.setprofile(None)
            torch.save((latents, calls - left), folder / "result")
        except BaseException as error:  # nothing of the parent may run here
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(status) == 0
    return False


def begin_anew(folder):
    for file in folder.iterdir():
        file.unlink()


def main(folder, kills):
    torch.set_num_threads(1)
    chosen, killed = random.Random(0), 0
    for number, given in enumerate(RUNS, 1):
        wanted, calls = run(*given), {}
        for writing in (False, True):
            begin_anew(folder)
            assert not live(given, folder, -1, writing)
            calls[writing] = torch.load(folder / "result")[1]
        while killed < number * kills / len(RUNS):
            begin_anew(folder)
            for writing in itertools.cycle((False, True)):
                if not live(given, folder, chosen.randint(1, calls[writing]), writing):
                    break
                killed += 1
            assert torch.equal(torch.load(folder / "result")[0], wanted)
            assert sorted(file.name for file in folder.iterdir()) == ["result", "run.checkpoint"]
    print(f"{killed} kills, the same bits")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 50)

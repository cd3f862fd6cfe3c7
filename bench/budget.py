"""Whether the error budget of attention holds whatever the numbers, and whether it sees faults.

    python -m bench.budget                        # 20 seeds of the whole grid on every backend
    python -m bench.budget --backends cpp cuda    # without Triton's interpreter, which takes most of the time
    python -m bench.budget --seeds 2 --backends   # the planted faults alone

prints how many cases fail, and how many cases of each fault are caught. Fails unless that is none, and all.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator, Sequence

import torch

from instantas.testing import interpreted

interpreted.prepare()

from bench.gpu_checks import Check, failures  # noqa: E402
from instantas.ops.backend import Backend  # noqa: E402
from instantas.testing import faults, oracle  # noqa: E402

MODES = "blend", "joint"


def grid(backend: str | Backend, dtype: torch.dtype, seeds: int, fault: str | None = None) -> Iterator[Check]:
    """(name, check) of each case, mode and seed, forward and backward; of those in which the fault shows."""
    for case, mode in itertools.product(oracle.ATTENTION, MODES):
        examples = oracle.attention_examples(case, mode, range(0, 10 * seeds, 10))
        for seed, example in enumerate(examples):
            if fault is not None and not faults.shows(fault, *example[1]):
                continue
            check = lambda e=example: oracle.judge(backend, *e, dtype, 3, attention=True)  # noqa: E731
            yield f"{case}, {mode}, seed {seed}", check


def pooled(backend: str) -> Iterator[Check]:
    """(name, check) of each case and mode, over its seeds together."""
    for case, mode in itertools.product(oracle.ATTENTION, MODES):
        yield f"{case}, {mode}", lambda c=case, m=mode: oracle.judge_pooled(backend, c, m)


def caught(fault: str, operation: str, dtype: torch.dtype, seeds: int) -> tuple[int, int]:
    """In how many cases the judge refuses the fault, of how many in which it shows."""
    count, wrong = failures(grid(faults.planted(fault, operation), dtype, seeds, fault))
    return sum(why.startswith("AssertionError: result") for why in wrong.values()), count


def holds(what: str, checks: Iterator[Check]) -> bool:
    """Whether no check fails; prints how many do, and why."""
    count, wrong = failures(checks)
    print(f"{what}: {count} cases, {len(wrong)} failures", flush=True)
    for name, why in wrong.items():
        print(f"    {name}: {why}", flush=True)
    return not wrong


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.budget", description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=20, metavar="N", help="of each case (default %(default)s)")
    others = [name for name in oracle.BACKENDS if name != "reference"]
    parser.add_argument("--backends", nargs="*", choices=others, default=others, help="default: all that run here")
    options = parser.parse_args(arguments)
    right = []
    for backend in options.backends:
        for dtype in oracle.DTYPES:
            right.append(holds(f"{backend}, {str(dtype)[6:]}", grid(backend, dtype, options.seeds)))
        right.append(holds(f"{backend}, float32, pooled", pooled(backend)))
    for fault, operation, dtype in itertools.product(faults.FAULTS, faults.OPERATIONS, oracle.DTYPES):
        seen, count = caught(fault, operation, dtype, options.seeds)
        right.append(seen == count)
        print(f"{fault} in {operation}, {str(dtype)[6:]}: caught in {seen} of {count} cases", flush=True)
    return not all(right)


if __name__ == "__main__":
    raise SystemExit(main())

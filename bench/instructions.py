"""Instructions of every CUDA kernel in the machine code, for each element that a thread writes, without a GPU.

    python -m bench.instructions               # of the built library, to bench/results/instructions.csv
    python -m bench.instructions BEFORE.so     # beside those of another build; fails if a kernel has grown

What stands there is counted, not what runs: loops once, and branches that are seldom taken too.
"""

from __future__ import annotations

import argparse
import csv
import re
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from bench.resources import CUDA_LIBRARY, CUOBJDUMP, ROOT, kernel_and_case
from instantas.files import whole_file


class Count(NamedTuple):
    kernel: str
    case: str
    architecture: str
    elements: int  # that a thread writes; 0: it depends on the arguments
    instructions: int
    before_loading: int  # instructions before the first load from global memory
    reciprocals: int  # each begins a division, of integers too
    conversions: int  # of single numbers of 16, 32 and 64 bits

    @property
    def each(self) -> float:
        return self.instructions / self.elements


def counts(library: Path = CUDA_LIBRARY) -> list[Count]:
    """Of every kernel in the library, for every architecture; unused space at the end does not count."""
    found = []
    for architecture, function, names in _functions(library):
        while names[-1] in ("NOP", "BRA"):
            names.pop()
        kernel, case = kernel_and_case(function)
        loads = [i for i, name in enumerate(names) if name.startswith("LDG")]
        reciprocals = sum(name.startswith("MUFU.RCP") for name in names)
        conversions = sum(name.startswith(("F2F", "HADD2.F32")) for name in names)
        numbers = len(names), loads[0] if loads else len(names), reciprocals, conversions
        found.append(Count(kernel, case, architecture, _elements(kernel, case), *numbers))
    return sorted(found)


def _functions(library: Path) -> Iterator[tuple[str, str, list[str]]]:
    """(architecture, function, names of its instructions)."""
    with subprocess.Popen([CUOBJDUMP, "-sass", library], stdout=subprocess.PIPE, text=True) as process:
        architecture, function, names = "", "", []
        for line in process.stdout or ():
            if match := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([\w.]+)", line):
                names.append(match[1])
            elif match := re.match(r"\s*(?:arch = (\S+)|Function : (\S+))", line):
                if names:
                    yield architecture, function, names
                architecture, function, names = match[1] or architecture, match[2] or function, []
        if names:
            yield architecture, function, names


def _elements(kernel: str, case: str) -> int:
    """As csrc/windows.cuh (GATHER_PACKS), plan.cuh (CHANNELS_OF_THREAD) and attention.cuh (16 rows a warp) have it."""
    width = int(match[0]) if (match := re.search(r"\d+(?= a pack)|(?<=D<=)\d+", case)) else 0
    if kernel == "attention":
        return width // 2
    return width * (4 if kernel == "gather" or width < 8 else 2)


def table(before: Sequence[Count], after: Sequence[Count]) -> str:
    """What another build has and this one, of the kernels that move 16 bytes at once; fp16 is much as bf16."""
    old = {count[:3]: count for count in before}
    shown = [new for new in after if re.match(r"(16 bit|bf16) (8|D)|(32 bit|fp32) 4", new.case)]
    architectures = sorted({count.architecture for count in shown})
    columns = [f"{what}, {name}" for name in architectures for what in ("per element", "to first load", "reciprocals")]
    lines = [f"| kernel | case | {' | '.join(columns)} |", f"|---|---|{'--:|' * len(columns)}"]
    for case in dict.fromkeys(count[:2] for count in shown):
        cells = []
        for new in (count for count in shown if count[:2] == case):
            for number in ("{0.each:.1f}", "{0.before_loading}", "{0.reciprocals}"):
                was, now = number.format(old[new[:3]]), number.format(new)
                cells.append(now if was == now else f"{was} → {now}")
        lines.append(f"| {' | '.join([*case, *cells])} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.instructions", description=__doc__.splitlines()[0])
    parser.add_argument("before", nargs="?", type=Path, help="another build of the CUDA library")
    options = parser.parse_args(arguments)
    after = counts()
    with whole_file(ROOT / "bench" / "results" / "instructions.csv") as path, open(path, "w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([Count._fields, *after])
    before = counts(options.before) if options.before else after
    print(table(before, after))
    old = {count[:3]: count.instructions for count in before}
    grown = [count for count in after if count.instructions > old[count[:3]]]
    for count in grown:
        print(f"grown: {', '.join(count[:3])}")
    return bool(grown)


if __name__ == "__main__":
    raise SystemExit(main())

"""Registers, spills and shared memory of every kernel on every architecture, without a GPU.

    python -m bench.resources

compiles the Triton kernels ahead of time with the arguments that the operations really launch them with, reads the
CUDA library where it is built, and writes bench/results/resources.csv, with every case, and resources.md, with the
most that any case of a kernel needs. Minutes.
"""

from __future__ import annotations

import csv
import itertools
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

os.environ.pop("TRITON_INTERPRET", None)  # read when a kernel is decorated: interpreted kernels cannot be compiled

import torch  # noqa: E402
import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from instantas.files import whole_file  # noqa: E402
from instantas.kernels import attention, step, windows  # noqa: E402
from instantas.windows import WindowPlan  # noqa: E402

ROOT = Path(__file__).parent.parent
CUDA_LIBRARY = ROOT / "instantas" / "libinstantas_cuda.so"
ARCHITECTURES = (80, 90, 100)
SHARED_LIMIT = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}  # bytes one block may use, CUDA programming guide
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class Usage(NamedTuple):
    language: str
    kernel: str
    case: str
    architecture: str
    registers: int  # per thread
    spilled: int  # bytes of stack per thread
    shared: int  # bytes per block


def cases(full: bool = True, partial: bool = True) -> Iterator[tuple[str, Callable[[], object]]]:
    """(name, call): the calls that launch every Triton kernel in every shape of its configuration.

    partial: also those to which not all is given; their kernels are parts of the others'.
    """
    for name in DTYPES if full else ("fp32", "bf16"):
        for align, plan in (("aligned", WindowPlan.minimum_coverage(128, 128, 64)), ("odd", _odd_plan())):
            if full or align == "aligned":
                yield from _window_cases(f"{name} {align}", DTYPES[name], plan)
    for name, depth in ATTENTION if full else ATTENTION[:3]:
        for mode in ("blend", "joint"):
            yield f"{name} D={depth} {mode}", _attention_case(DTYPES[name], depth, mode == "joint")
    for mode in ("blend", "joint") if partial else ():  # must compile too, and has a launch of its own
        for ordered in (True, False):
            case = _attention_case(torch.bfloat16, 64, mode == "joint", ordered, lengths=False)
            yield f"bf16 D=64 {mode}, {'ordered' if ordered else 'raster order'}, whole prompts", case


# the largest layers of SD 2.0 and 1.5, and the largest head size, in a test; all in the table
ATTENTION = [("bf16", 64), ("fp16", 160), ("fp32", 256), ("fp16", 64), ("fp32", 64), ("bf16", 256), ("fp16", 256)]
ATTENTION += [(name, depth) for name in ("bf16", "fp32") for depth in (32, 40, 80, 96, 128, 160)]


def _odd_plan():
    return WindowPlan.minimum_coverage(63, 89, (17, 23))


def _window_cases(name, dtype, plan):
    canvas = torch.zeros(2, 4, plan.height, plan.width, dtype=dtype)
    inputs = torch.zeros(2, plan.count, 4, *plan.window, dtype=dtype)
    tables, weight = plan.tables(canvas.device), plan.weight("gaussian")
    map_ = torch.ones(plan.height, plan.width)
    pair = torch.zeros(2, dtype=torch.float64)

    def guided(k, uncond, guidance_map, branches=0):
        coefficients = torch.zeros(2 + k, dtype=torch.float64)
        history, latest = (canvas.new_zeros(entries, *canvas.shape) for entries in (k, branches))
        state = history, latest, coefficients, pair, pair
        arguments = inputs, uncond, canvas, weight, *state, 7.5, guidance_map
        return lambda: step.guided_step(*arguments, *tables, plan.geometry)

    yield name, lambda: windows.gather_windows(canvas, *tables, plan.geometry)
    for normalize in (True, False):
        each = None if not normalize else weight
        yield name, lambda w=each, n=normalize: windows.scatter_windows(inputs, w, *tables, plan.geometry, n)
    yield f"{name} k=0 unguided", guided(0, None, None)
    yield f"{name} k=2 guided", guided(2, inputs, None)
    yield f"{name} k=3 map", guided(3, inputs, map_)
    yield f"{name} k=0 unguided, latest", guided(0, None, None, 1)
    yield f"{name} k=3 map, latest", guided(3, inputs, map_, 2)


def _attention_case(dtype, depth, joint, ordered=True, lengths=True):
    query, bank = torch.zeros(2, 256, 8, depth, dtype=dtype), torch.zeros(4, 77, 8, depth, dtype=dtype)
    ids, weights = torch.zeros(2, 4, dtype=torch.int32), torch.ones(2, 4, 256)
    order = torch.arange(256, dtype=torch.int32).repeat(2, 1) if ordered else None
    how = joint, depth**-0.5, order, torch.full((4,), 77, dtype=torch.int32) if lengths else None

    def call():
        attention.regional_attention(query, bank, bank, ids, weights, *how)
        if lengths or not ordered:
            attention.regional_attention_backward(query, query, bank, bank, ids, weights, *how)

    return call


def launches(call: Callable[[], object]) -> list[tuple]:
    """(kernel, positional arguments, keyword arguments) of every Triton launch of a call; nothing is run."""
    seen = []

    def run(kernel, *arguments, grid, warmup, **keywords):
        seen.append((kernel, arguments, keywords))

    real, triton.JITFunction.run = triton.JITFunction.run, run
    try:
        call()
    finally:
        triton.JITFunction.run = real
    return seen


def compiled(kernel, arguments, keywords, architecture: int):
    """The kernel as the just-in-time compiler would make it for these arguments."""
    given = dict(zip(kernel.arg_names, arguments)) | keywords
    options = {name: given.pop(name) for name in ("num_warps", "num_stages", "maxnreg") if name in given}
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        value = given[parameter.name]
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = "*" + triton.runtime.jit.type_canonicalisation_dict[str(value.dtype)[6:]]
            attributes[(i,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


def triton_usage(full: bool = True, partial: bool = True, architectures=ARCHITECTURES) -> Iterator[Usage]:
    """What every Triton kernel uses; `full=False`: a choice of shapes that reaches every kernel."""
    for case, call in cases(full, partial):
        for kernel, arguments, keywords in launches(call):
            for architecture in architectures:
                binary = compiled(kernel, arguments, keywords, architecture)
                (_, _, registers, stack, _), *_ = dump(binary.asm["cubin"])
                name = kernel.__name__.strip("_").removesuffix("_kernel")
                shared = binary.metadata.shared
                yield Usage("Triton", name, case, f"sm_{architecture}", registers, stack, shared)


def cuda_usage(library: Path = CUDA_LIBRARY) -> Iterator[Usage]:
    """What every CUDA kernel uses, in every instance and for every architecture of the library."""
    for architecture, function, registers, stack, shared in dump(library.read_bytes()):
        yield Usage("CUDA", *kernel_and_case(function), architecture, registers, stack, shared)


_ELEMENTS = {"f": "fp32", "6__half": "fp16", "13__nv_bfloat16": "bf16", "t": "16 bit", "j": "32 bit"}


def kernel_and_case(function: str) -> tuple[str, str]:
    """Such as ("step", "fp16 8 a pack guided"), of a function that is called step_kernel<__half, 8, true, false>."""
    name, arguments = re.match(r"_ZN9instantas\d+([a-z_]+)_kernel(?:I(.*?)EEv)?", function).groups()
    if arguments is None:
        return name, "fp32"
    element, number, *flags = re.match(
        r"(f|t|j|6__half|13__nv_bfloat16)(?:Li(\d+)E?)?(?:Lb(\d)E?)?(?:Lb(\d)E?)?$", arguments
    ).groups()
    case = _ELEMENTS[element]
    if number:
        case += f" D<={number}" if name == "attention" else f" {number} a pack"
    return name, case + "".join(f" {word}" for word, flag in zip(("guided", "latest"), flags) if flag == "1")


def dump(binary: bytes) -> list[tuple[str, str, int, int, int]]:
    """(architecture, function, registers, stack bytes, static shared bytes) of every kernel in a cubin or a library."""
    with tempfile.NamedTemporaryFile(suffix=".bin") as file:
        file.write(binary)
        file.flush()
        command = [CUOBJDUMP, "--dump-resource-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found, architecture = [], ""
    for match in re.finditer(r"arch = (\S+)|Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)", text):
        if match[1]:
            architecture = match[1]
        else:
            found.append((architecture, match[2], *map(int, match.groups()[2:])))
    return found


def table(rows: list[Usage]) -> str:
    """The most of each number over a kernel's cases, and how many cases there are."""
    lines = [
        "| kernel | architecture | cases | registers | spilled bytes | shared bytes |",
        "|---|---|--:|--:|--:|--:|",
    ]
    for (kernel, architecture), group in itertools.groupby(rows, lambda row: (row.kernel, row.architecture)):
        group = list(group)
        worst = (max(getattr(row, name) for row in group) for name in ("registers", "spilled", "shared"))
        lines.append(f"| {kernel} | {architecture} | {len(group)} | {' | '.join(map(str, worst))} |")
    return "\n".join(lines)


TEXT = """# Registers, spills and shared memory

Written by `python -m bench.resources`, ahead of time: nothing was run. The most that any case of a kernel needs;
`resources.csv` has every case. Registers and spilled bytes are per thread, shared bytes per block.

## Triton {version}

{triton}

## CUDA

Shared bytes are the static ones; sm_90a counts 1024 that the system keeps for itself. The attention kernels ask for
more when they are launched, 4 bytes for each region and 32 queries and besides: 24 KiB for half precision and D = 32,
42 for 64, 47 for 96, 75 for 160, 84 for 256; with float32 arithmetic and D = 256, 81 forward, 97 backward. Every
architecture since sm_80 has 99 KiB. In half precision a second buffer for queries takes 10 to 33 KiB where as many
blocks fit a multiprocessor with it (`docs/kernels.md`).

`wgmma` was not tried on sm_90a, where `mma.sync` runs as everywhere: which of the two is faster is not measured.

{cuda}
"""


def _place(row):
    return row.language, row.kernel, row.architecture, row.case, row


def main():
    rows = sorted(set(triton_usage()), key=_place)
    cuda = sorted(cuda_usage(), key=_place) if CUDA_LIBRARY.exists() else []
    results = ROOT / "bench" / "results"
    results.mkdir(exist_ok=True)
    with whole_file(results / "resources.csv") as path, open(path, "w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([Usage._fields, *rows, *cuda])
    with whole_file(results / "resources.md") as path:
        absent = "not built where this was written"
        path.write_text(
            TEXT.format(version=triton.__version__, triton=table(rows), cuda=table(cuda) if cuda else absent)
        )
    spilling = sum(row.spilled > 0 for row in (*rows, *cuda))
    print(f"{len(rows)} Triton and {len(cuda)} CUDA kernels, {spilling} with spills: {results / 'resources.md'}")


if __name__ == "__main__":
    main()

"""Measuring: contenders run in turn in one process, after their results were checked against float64.

A speed is a ratio. Every lap runs each contender once, on inputs of its own from a set larger than the cache, and a
copy and (where operations are declared) a matrix product as well, so that all of them meet the same machine. Before
each run the cache is filled with something else. On a GPU the clock is the device's, with the launches queued
beforehand; on a CPU it is `time.perf_counter`, or with a single thread `time.thread_time`, from which other processes
take nothing. Needs only torch.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from instantas.files import whole_file

RIVAL_ROUNDINGS = 8  # a rival may round what it computes on the way: units in the last place of the largest result
_CACHE = 1 << 26  # bytes, where the system does not say


class DisagreementError(AssertionError):
    """A contender's result is not what it should be: it gets no speed."""


@dataclass(frozen=True)
class Timing:
    """Seconds of one contender: the median and the quartiles of its runs.

    `ratio` is the median, over the laps, of its time divided by the first contender's in the same lap. `error` is the
    largest difference from the float64 result, `allowed` what it may be.
    """

    name: str
    median: float
    low: float
    high: float
    runs: int
    ratio: float
    error: float
    allowed: float


@dataclass(frozen=True)
class Comparison:
    """Contenders on the same work. `bytes` must move and `flops` be done, whoever does it; rates are per second.

    `copy_rate` counts the bytes read and the bytes written by a copy; `matmul_rate` is of a large matrix product in the
    same dtype. Both were measured in the same laps.
    """

    title: str
    device: str
    dtype: str
    bytes: int
    flops: int
    copy_rate: float
    matmul_rate: float | None
    timings: tuple[Timing, ...]
    absent: dict[str, str] = field(default_factory=dict)  # name -> why it was not run

    def timing(self, name: str) -> Timing:
        return next(t for t in self.timings if t.name == name)

    def best(self, names: Sequence[str]) -> Timing:
        return min((self.timing(name) for name in names), key=lambda t: t.median)

    @property
    def floor(self) -> float:
        """Seconds that the bytes and the operations need at the measured rates, whichever is more."""
        return max(self.bytes / self.copy_rate, self.flops / self.matmul_rate if self.matmul_rate else 0)

    def share(self, name: str) -> float:
        """Of the roofline: the floor divided by the contender's time."""
        return self.floor / self.timing(name).median

    def table(self) -> str:
        """Lines of text: milliseconds, how many times as long as the first contender, share of the roofline."""
        gigabytes = f"copy {self.copy_rate / 1e9:.1f} GB/s"
        lines = [
            f"{self.title}, {self.dtype} ({gigabytes})",
            f"{'':<30}{'ms':>10}{'quartiles':>20}{'ratio':>9}{'roofline':>10}",
        ]
        for t in self.timings:
            spread = f"{1e3 * t.low:.3f} - {1e3 * t.high:.3f}"
            lines.append(f"  {t.name:<28}{1e3 * t.median:>10.3f}{spread:>20}{t.ratio:>9.2f}{self.share(t.name):>10.0%}")
        return "\n".join(lines + [f"  {name}: {reason}" for name, reason in self.absent.items()])

    def as_dict(self) -> dict:
        timings = [asdict(t) | {"share": self.share(t.name)} for t in self.timings]
        return asdict(self) | {"floor": self.floor, "timings": timings}


def compare(
    title: str,
    inputs: Callable[[torch.Generator], tuple],
    contenders: Mapping[str, Callable],
    exact: Callable | Mapping[str, Callable],
    *,
    bytes: int,
    flops: int = 0,
    rivals: Mapping[str, Callable] | None = None,
    absent: Mapping[str, str] | None = None,
    seconds: float = 2.0,
    laps: tuple[int, int] = (5, 100),
    progress: Callable[[float], object] = lambda share: None,
    running: Callable[[str], object] = lambda name: None,
    failed: Callable[[str, Exception], object] | None = None,
) -> Comparison:
    """Check the results of every contender, then time them in turn.

    Args:
        inputs: makes one set of arguments; its first tensor says which device and dtype are meant.
        contenders: name -> function of the arguments, the first being what the others are compared with. A result
            (a tensor or a tuple) may differ from float64 by twice as much as that of `exact` in the inputs' dtype.
        exact: the definition of correct; or one per contender, where they do different work. Run in float64 and in the
            inputs' dtype.
        bytes, flops: that the work needs at least: inputs read once, results written once.
        rivals: more contenders, which may also round what they compute on the way, up to 8 units in the last place of
            the largest result.
        absent: name -> reason, of contenders that cannot run here; kept for the report.
        seconds: for the laps; at least laps[0] and at most laps[1] of them are run.
        progress: called with the share of the laps that is done.
        running: called with the name of a contender before it is checked and before it warms up, with "" after it.
        failed: called with a contender that raises or disagrees, and the error, in place of raising it: the contender
            gets no speed, `absent` says why, and the others go on.

    Raises:
        DisagreementError: naming the contender, or where none is left. No speed is given.
    """
    rivals, absent = dict(rivals or {}), dict(absent or {})
    runners = {**contenders, **rivals}

    @contextlib.contextmanager
    def attempt(name):
        running(name)
        try:
            yield
        except Exception as error:  # of any kind: compilers and kernels have errors of their own
            if failed is None:
                raise
            failed(name, error)
            absent[name] = reason(error)
            del runners[name]
        running("")

    generator = torch.Generator().manual_seed(0)
    first = inputs(generator)
    sample = next(a for a in first if isinstance(a, torch.Tensor))
    errors = _check(runners, rivals, exact, first, sample.dtype, attempt)
    sets = [first]
    size = sum(a.nbytes for a in first if isinstance(a, torch.Tensor))
    wanted = max(1, min(64, -(-2 * cache_bytes(sample.device) // max(1, size)) + 1))
    sets += [inputs(generator) for _ in range(wanted - 1)]
    yardsticks = {"copy": _copy(sample.device)}
    if flops:
        yardsticks["matmul"] = _matmul(sample.device, sample.dtype)
    times = _laps(yardsticks, runners, sets, _clock(sample.device), seconds, laps, progress, attempt)
    if not runners:
        raise DisagreementError("; ".join(f"{name}: {why}" for name, why in absent.items()))
    base = times[next(iter(runners))]
    timings = []
    for name in runners:
        low, median, high = statistics.quantiles(times[name], n=4, method="inclusive")
        ratio = statistics.median(t / b for t, b in zip(times[name], base))
        timings.append(Timing(name, median, low, high, len(base), ratio, *errors[name]))
    rates = {name: stick.work / statistics.median(times[name]) for name, stick in yardsticks.items()}
    return Comparison(
        title,
        device_name(sample.device),
        str(sample.dtype).removeprefix("torch."),
        bytes,
        flops,
        rates["copy"],
        rates.get("matmul"),
        tuple(timings),
        absent,
    )


def reason(error: Exception) -> str:
    """An error in a line."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


def machine(device: torch.device | str = "cpu") -> dict[str, str | int]:
    """What a result should name: device, versions, date."""
    facts: dict[str, str | int] = {"device": device_name(torch.device(device)), "torch": torch.__version__}
    for package in ("triton", "diffusers"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            facts[package] = metadata.version(package)
    if torch.version.cuda:
        facts["cuda"] = torch.version.cuda
    facts |= {"python": platform.python_version(), "threads": torch.get_num_threads()}
    return facts | {"date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")}


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return f"{line.split(':', 1)[1].strip()}, {torch.get_num_threads()} threads"
    return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


def cache_bytes(device: torch.device) -> int:
    """Size of the last cache before memory."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    # sysconf would count the caches of all processors of the machine
    return max((int(size.removesuffix("K")) << 10 for size in sizes if size.endswith("K")), default=_CACHE)


def peak_memory(run: Callable[[], object], device: torch.device | str = "cpu") -> int:
    """Bytes by which the memory in use rises at most while `run` runs. Of the whole process on a CPU (Linux)."""
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    gc.collect()  # what earlier work has freed, or left to be freed meanwhile, would hide what this one takes
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak to the present size
    before = _resident("VmHWM")
    run()
    return _resident("VmHWM") - before


def _resident(entry):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(entry))


def keep(path: str | os.PathLike, results: Mapping[str, Mapping[str, Any]], device: torch.device | str = "cpu") -> None:
    """Write results to a JSON file under their names, each with `machine`; others that the file has stay."""
    path, facts = Path(path), machine(device)
    known = json.loads(path.read_text()) if path.exists() else {}
    known |= {name: {"machine": facts, **result} for name, result in results.items()}
    with whole_file(path) as part:
        part.write_text(json.dumps(known, indent=1) + "\n")


# Checking


def _check(runners, rivals, exact, arguments, dtype, attempt):
    """name -> (error, allowed), of every contender; the definition is evaluated once for all that share it."""
    judged, found = {}, {}
    for name, run in list(runners.items()):
        truth = exact if callable(exact) else exact[name]
        if truth not in judged:
            precise = _results(truth, [_widened(a, dtype) for a in arguments])
            judged[truth] = precise, [_deviation(*pair) for pair in zip(_results(truth, arguments), precise)]
        with attempt(name):
            found[name] = _agreement(name, _results(run, arguments), *judged[truth], dtype, name in rivals)
    return found


def _agreement(name, results, precise, usual, dtype, rival):
    """(error, allowed) of the result with the largest error."""
    if [r.shape for r in results] != [p.shape for p in precise]:
        raise DisagreementError(f"{name}: expected {[*map(_shape, precise)]}, got {[*map(_shape, results)]}")
    worst = 0.0, 0.0
    for result, right, error in zip(results, precise, usual):
        unit = torch.finfo(dtype).eps * right.abs().max().item() if right.numel() else 0.0
        allowed = max(2 * error or 2 * unit, RIVAL_ROUNDINGS * unit if rival else 0.0)
        error = _deviation(result, right)
        if not error <= allowed:
            raise DisagreementError(f"{name}: off by {error:.3g} from float64, allowed {allowed:.3g}: no speed given")
        worst = max(worst, (error, allowed))
    return worst


def _results(run, arguments):
    with torch.no_grad():
        results = run(*arguments)
    return [r for r in (results if isinstance(results, (tuple, list)) else (results,)) if r is not None]


def _shape(tensor):
    return tuple(tensor.shape)


def _widened(value, dtype):
    return value.double() if isinstance(value, torch.Tensor) and value.dtype == dtype else value


def _deviation(result, precise):
    return (result.double() - precise).abs().max().item() if precise.numel() else 0.0


# Timing


@dataclass(frozen=True)
class _Yardstick:
    run: Callable[[], object]
    work: int  # bytes or operations


def _copy(device):
    size = max(1 << (28 if device.type == "cuda" else 26), 2 * cache_bytes(device)) // 4
    source, target = torch.zeros(size, device=device), torch.empty(size, device=device)
    return _Yardstick(lambda: target.copy_(source), 2 * source.nbytes)


def _matmul(device, dtype):
    n = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return _Yardstick(lambda: a @ b, 2 * n**3)


def _laps(yardsticks, runners, sets, clock, seconds, laps, progress, attempt):
    """name -> seconds, one for each lap."""
    turn, collecting, flush = 0, gc.isenabled(), yardsticks["copy"].run

    def timed(name, run, fixed):
        nonlocal turn
        arguments = () if fixed else sets[turn % len(sets)]
        turn += not fixed
        flush()  # results land where earlier ones lay, which a cache may still hold
        return clock(name, run, arguments)

    calls = [(name, run, False) for name, run in runners.items()]
    calls += [(name, stick.run, True) for name, stick in yardsticks.items()]
    gc.disable()
    try:
        with torch.no_grad():
            for call in calls:  # warms up
                with contextlib.nullcontext() if call[0] in yardsticks else attempt(call[0]):
                    timed(*call)
            calls = [call for call in calls if call[0] in yardsticks or call[0] in runners]
            times = {call[0]: [] for call in calls}
            start, lap = time.perf_counter(), 0
            while lap < laps[0] or (lap < laps[1] and time.perf_counter() - start < seconds):
                for call in calls if lap % 2 else reversed(calls):
                    times[call[0]].append(timed(*call))
                lap += 1
                spent = (time.perf_counter() - start) / seconds if seconds else 0.0
                progress(min(1.0, max(lap / laps[1], spent)))
    finally:
        if collecting:
            gc.enable()
    return times


def _clock(device):
    if device.type == "cuda":
        return _DeviceClock(device)
    return _HostClock(time.thread_time if torch.get_num_threads() == 1 else time.perf_counter)


class _HostClock:
    def __init__(self, now):
        self.now = now

    def __call__(self, name, run, arguments):
        start = self.now()
        run(*arguments)
        return self.now() - start


class _DeviceClock:
    """Time on the device's own clock. The device is kept busy while the host queues the work, so that it never waits
    for a launch, which favours whoever launches the most."""

    def __init__(self, device):
        self.device, self.queueing = device, {}  # name -> seconds the host took
        self.cycles = 1000 * getattr(torch.cuda.get_device_properties(device), "clock_rate", 1_500_000)

    def __call__(self, name, run, arguments):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.device(self.device):
            torch.cuda._sleep(int(self.cycles * min(0.05, 2 * self.queueing.get(name, 1e-3) + 1e-4)))
            queued = time.perf_counter()
            begin.record()
            run(*arguments)
            end.record()
            self.queueing[name] = time.perf_counter() - queued
            end.synchronize()
        return begin.elapsed_time(end) / 1e3

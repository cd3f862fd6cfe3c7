"""Runs the groups of `bench.gpu` in workers (`bench.gpu_worker`), reads what they tell, and outlives them.

A worker that dies, hangs in an item, or loses its device is replaced, and the new one goes on after that item. A
comparison is done again without the contender that was running. A group whose workers come to grief too often is given
up. Whatever a worker started ends with it.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

from bench.gpu_groups import TOGETHER, Group, Setting
from bench.gpu_report import KEPT, Report

ROOT = Path(__file__).parents[1]
START = 120  # seconds until a worker has imported what it needs and found its items
LOGGED = {"sanitizer"}  # stages whose output is kept whatever comes of them
FORGIVEN = {"speeds", "sanitizer"}  # stages in which an item that hangs has shown no wrong result: it is absent
LOOK = 1  # seconds: a signal that comes just before a thread begins to wait is handled once the wait ends
LOSSES = 3  # workers that a group may lose and still be given another


class Crew:
    """Runs groups one after the other, or side by side where nothing is measured; reports what happens.

    Args:
        module: that describes the groups, as `bench.gpu_groups` does.
        budget: seconds after which nothing new is begun.
        cores: processes at the same time, at most.
    """

    def __init__(self, setting: Setting, report: Report, module: str, budget: float, cores: int):
        self.setting, self.report, self.module, self.cores = setting, report, module, cores
        self.end, self.stopped = time.monotonic() + budget, False
        self._workers: set[subprocess.Popen] = set()
        self._lock = threading.Lock()

    def run(self, groups: Sequence[Group]) -> None:
        for stage, members in itertools.groupby(groups, lambda group: group.stage):
            self._side_by_side(list(members), self.cores if stage in TOGETHER else 1)

    def _side_by_side(self, groups, processes):
        processes = min(processes, len(groups))
        threads = max(1, self.cores // processes)
        with ThreadPoolExecutor(processes) as pool:
            try:
                futures = [pool.submit(self._group, group, threads) for group in groups]
                while wait(futures, LOOK).not_done:
                    pass
                for future in futures:
                    future.result()
            except BaseException:  # an interrupt among them
                self.stop()
                raise

    def stop(self) -> None:
        """End all workers, and begin nothing new."""
        with self._lock:
            self.stopped = True
            for worker in self._workers:
                end(worker)

    @property
    def over(self) -> str | None:
        """Why nothing new is begun."""
        return "stopped" if self.stopped else "the budget is spent" if time.monotonic() > self.end else None

    def _group(self, group, threads):
        if why := self.over:
            return self.report.group(group.name, state=f"not run: {why}", left=None)
        begun, course = time.monotonic(), _Course(group, self.report)
        self.report.group(group.name, state="under way")
        with tempfile.TemporaryFile() as log:
            while not (course.finished or self.over):
                self._work(course, log, threads)
            log.seek(max(0, log.seek(0, os.SEEK_END) - KEPT))
            words = log.read().decode(errors="replace").strip() if course.strange else ""
        state = "done"
        if course.left:
            state = f"not all was run: {self.over or 'too many workers were lost'}"
        self.report.group(
            group.name, state=state, left=course.left, seconds=round(time.monotonic() - begun, 1), log=words
        )
        print(f"{group.name}: {state}, {time.monotonic() - begun:.0f} s", flush=True)

    def _work(self, course, log, threads):
        """One worker, until the group is done, the worker lost, or the budget spent."""
        job = dict(groups=self.module, group=course.group.name, setting=self.setting._asdict())
        job |= dict(done=sorted(course.done), lost=course.lost)
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "TRITON_INTERPRET": "0"}
        if self.setting.device == "cpu":
            environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, "-m", "bench.gpu_worker", json.dumps(job)]
        with self._lock:
            if self.stopped:
                return
            worker = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=log, start_new_session=True
            )
            self._workers.add(worker)
        with worker.stdout:
            try:
                course.deadline = time.monotonic() + START
                for news in _lines(worker.stdout.fileno(), lambda: course.deadline):
                    course.hear(news)
                    if "end" in news and self.over:
                        return
                if not self.stopped:
                    course.lose(_cause(worker, hung=time.monotonic() >= course.deadline))
            finally:
                end(worker)
                with self._lock:
                    self._workers.discard(worker)


class _Course:
    """What became of a group so far."""

    def __init__(self, group: Group, report: Report):
        self.group, self.report = group, report
        self.items: list[str] | None = None  # until a worker has told
        self.done: set[str] = set()
        self.lost: dict[str, str] = {}  # contenders
        self.losses, self.deadline, self.seconds = 0, 0.0, 0.0
        self.current: str | None = None
        self.running: tuple[str, bool] | None = None  # a contender, and whether it is ours
        self.failure = ""
        self.strange = group.stage in LOGGED  # whether what was printed is worth keeping

    @property
    def left(self) -> int:
        return len(self.items or ()) - len(self.done)

    @property
    def finished(self) -> bool:
        return self.losses > LOSSES or (self.items is not None and not self.left)

    def hear(self, news: dict) -> None:
        """One line of a worker (`bench.gpu_worker`)."""
        match news:
            case {"items": items}:
                self.items = items
            case {"begin": item, "seconds": seconds}:
                self.current, self.running, self.failure, self.seconds = item, None, "", seconds
                self.deadline = time.monotonic() + seconds
            case {"running": name, "ours": ours}:
                self.running = (name, ours) if name else None
                self.deadline = time.monotonic() + self.seconds
            case {"failed": name, "ours": ours, "why": why, "disagrees": disagrees}:
                self.failure = why
                if ours and disagrees:
                    self._wrong(f"{self.current}, {name}", why)
            case {"end": item, **result}:
                self._end(item, result)

    def _end(self, item, result):
        self.done.add(item)
        self.current, self.deadline = None, time.monotonic() + START
        if "why" in result:
            (self._absent if self.group.stage == "speeds" else self._wrong)(item, result["why"])
        elif "absent" in result:
            self.report.absent(self.group.name, item, result["absent"])
        else:
            self.report.right(self.group.name, item, result)

    def lose(self, cause: str) -> None:
        """The worker is gone: blame the contender that was running, else the item, and leave it out from now on."""
        if self.finished:
            return
        self.losses, self.strange = self.losses + 1, True
        cause = f"{self.failure}; {cause}" if self.failure else cause
        if self.items is None:
            self.losses = LOSSES + 1
            self._wrong("the worker", f"did not start: {cause}")
        elif self.running:
            name, ours = self.running
            self.lost[name] = cause
            (self._wrong if ours else self._absent)(f"{self.current}, {name}", cause)
        elif self.current:
            self.done.add(self.current)
            (self._absent if self.group.stage in FORGIVEN else self._wrong)(self.current, cause)
        self.current = self.running = None

    def _wrong(self, item, why):
        self.strange = True
        self.report.wrong(self.group.name, item, why)

    def _absent(self, item, why):
        self.strange = True
        self.report.absent(self.group.name, item, why)


def _lines(source: int, deadline: Callable[[], float]) -> Iterator[dict]:
    """JSON lines, until their end or the deadline."""
    rest = b""
    while select.select([source], [], [], max(0.0, deadline() - time.monotonic()))[0]:
        chunk = os.read(source, 1 << 16)
        if not chunk:
            return
        *lines, rest = (rest + chunk).split(b"\n")
        yield from map(json.loads, lines)


def _cause(worker, hung):
    """How a worker that tells nothing any more came to its end."""
    try:
        status = worker.wait(0 if hung else 30)
    except subprocess.TimeoutExpired:
        return "not finished in time: killed"
    return f"died of {signal.Signals(-status).name}" if status < 0 else f"ended with exit status {status}"


def end(worker: subprocess.Popen) -> None:
    """Kill the leader of a session and all that is in it; what cannot be killed is left behind."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(worker.pid, signal.SIGKILL)
    for _ in range(50):
        alive = [pid for pid, state, session in _processes() if session == worker.pid and state != "Z"]
        for pid in alive:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if not alive:
            break
        time.sleep(0.1)
    with contextlib.suppress(subprocess.TimeoutExpired):
        worker.wait(1)


def _processes():
    """(process, state, session) of all."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, _, session = stat.read_text().rpartition(")")[2].split()[:4]
            yield int(stat.parent.name), state, int(session)

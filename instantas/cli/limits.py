"""How much memory this process may have: the machine's, or what a container or a shell leaves of it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

Limit = tuple[int, str]  # bytes, and whose they are


def memory_limits(root: Path = Path("/")) -> list[Limit]:
    """The limits that hold here, the smallest first; none on a system that does not say.

    root: where the system's `proc` and `sys` lie.
    """
    found = [*_machine(), *_process(), *_control_groups(root)]
    return sorted((size, whose) for size, whose in found if size > 0)  # -1: unlimited


def _machine() -> Iterator[Limit]:
    try:
        yield os.sysconf("SC_PAGE_SIZE") * max(0, os.sysconf("SC_PHYS_PAGES")), "the machine"
    except (AttributeError, ValueError, OSError):
        return


def _process() -> Iterator[Limit]:
    try:
        import resource
    except ImportError:  # on Windows
        return
    yield resource.getrlimit(resource.RLIMIT_AS)[0], "this process (ulimit -v)"


def _control_groups(root: Path) -> Iterator[Limit]:
    """Of the groups that the process is in and of those around them, as both versions of Linux' cgroups tell them."""
    mount = root / "sys" / "fs" / "cgroup"
    for line in _read(root / "proc" / "self" / "cgroup").strip("\n").split("\n"):
        controllers, _, path = line.partition(":")[2].partition(":")
        if controllers and "memory" not in controllers.split(","):
            continue
        top, name = (mount / "memory", "memory.limit_in_bytes") if controllers else (mount, "memory.max")
        parts = path.strip("/").split("/")
        group = top if ".." in parts else top.joinpath(*parts)  # "..": outside of what can be seen from here
        for folder in (group, *group.parents[: len(group.parts) - len(top.parts)]):
            limit = _read(folder / name).strip()
            if limit.isdecimal():  # "max": none
                yield int(limit), f"the control group ({folder / name})"


def _read(file: Path) -> str:
    """Its text; nothing of a file that cannot be read. A container may see neither its group nor those around it."""
    try:
        return file.read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:
        return ""

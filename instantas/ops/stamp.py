"""The note beside a compiled library: what it was built from and for, and why it must not be loaded.

Needs nothing but Python: setup.py, which writes the notes, runs this file by its path.
"""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from pathlib import Path
from typing import NamedTuple

PACKAGE = Path(__file__).parents[1]  # where the libraries lie
SOURCES = PACKAGE.parent / "csrc"
_ARCHITECTURE = re.compile(r"(sm|compute)_(\d+)(\d)([af]?)")
CHECKOUT = (SOURCES / "library.cpp").exists()  # an editable install is one too, a wheel is not


class Note(NamedTuple):
    """Written as JSON beside `libinstantas_*.so`; where that could not be built, in its place."""

    version: str  # of instantas
    sources: str = ""  # fingerprint of what it was built from
    torch: str = ""  # the oldest torch that it runs with
    architectures: tuple[str, ...] = ()  # sm_80: machine code, compute_80: PTX
    digest: str = ""  # SHA-256 of the library
    left_out: str = ""  # why there is no library


def note_path(library: Path) -> Path:
    return library.with_suffix(".json")


def fingerprint() -> str:
    """Changes with every source of the libraries, the operations' schemas included."""
    digest = hashlib.sha256()
    sources = sorted(path for path in SOURCES.iterdir() if path.suffix in (".cpp", ".cu", ".h", ".cuh"))
    for path in (*sources, PACKAGE / "ops" / "schemas.py"):
        digest.update(path.name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def digest(library: Path) -> str:
    return hashlib.sha256(library.read_bytes()).hexdigest()


def write(library: Path, note: Note) -> None:
    note_path(library).write_text(json.dumps(note._asdict(), indent=1) + "\n")


def read(library: Path) -> Note | None:
    """None where there is no note, or none that can be understood."""
    try:
        note = Note(**json.loads(note_path(library).read_text()))
        return note._replace(architectures=tuple(note.architectures))
    except (OSError, ValueError, TypeError):
        return None


def unfit(library: Path, version: str, torch: str) -> str | None:
    """Why the library is not that of this version of instantas, as it was built, for this torch; None: it is."""
    note, name = read(library), library.name
    if not library.exists():
        return f"not built: {note.left_out if note and note.left_out else f'{name} is not there'}"
    if note is None:
        return f"{name} is of unknown origin: {note_path(library).name} beside it is missing or unreadable"
    if note.digest != digest(library):
        return f"{name} is damaged, or not the file that was built"
    if note.version != version:
        return f"{name} was built for instantas {note.version}, this is {version}"
    if CHECKOUT and note.sources != fingerprint():
        return f"{name} was built from other sources than csrc/ and ops/schemas.py have now"
    if _numbers(torch) < _numbers(note.torch):
        return f"{name} needs torch {note.torch} or later, this is {torch}"
    return None


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version)[:2]))


def remedy() -> str:
    """The command that builds the libraries, given that setuptools and torch are there."""
    command = "pip install --no-build-isolation --no-deps "
    return command + f"-e {shlex.quote(str(PACKAGE.parent))}" if CHECKOUT else f"{command}. (in the checkout)"


def serves(architectures: tuple[str, ...], capability: tuple[int, int]) -> bool:
    """Whether code for these architectures runs on a GPU of that compute capability.

    Machine code runs on later minor versions too, PTX on everything later; with an "a" on that very capability alone,
    with an "f" on later minor versions alone.
    """
    for found in map(_ARCHITECTURE.fullmatch, architectures):
        if found:
            kind, major, minor, suffix = found.groups()
            built = int(major), int(minor)
            later = capability >= built and (built[0] == capability[0] or (kind == "compute" and not suffix))
            if capability == built or (later and suffix != "a"):
                return True
    return False

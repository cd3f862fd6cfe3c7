"""Files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import glob
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path


def check_writable(path: str | os.PathLike, *, overwrite: bool = True, name: str = "path") -> Path:
    """The path, after checking that a file can be made there: ask before the work, not after it.

    name: of the argument, for errors.

    Raises:
        ValueError: for a missing or read-only folder, a path that is a folder, and an existing file unless `overwrite`.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{name}: expected a file, got the folder {str(path)!r}")
    if not path.parent.is_dir():
        raise ValueError(f"{name}: expected an existing folder, got {str(path.parent)!r}")
    if path.exists() and not overwrite:
        raise ValueError(f"{name}: expected a new file, got {str(path)!r}, which exists")
    try:  # permissions do not tell of read-only disks, of names that are too long, and nothing to the superuser
        tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.stem}.", suffix=f".part{path.suffix}").close()
    except OSError as error:
        raise ValueError(
            f"{name}: expected a file that can be written, got {str(path)!r} ({error.strerror})"
        ) from error
    return path


@contextlib.contextmanager
def whole_file(path: str | os.PathLike, *, overwrite: bool = True) -> Iterator[Path]:
    """A temporary path beside the wanted one; moved onto it when the block ends well, removed when it does not.

    What is moved has reached the disk: a machine that stops has the file as it was or as it is to be.
    """
    path = check_writable(path, overwrite=overwrite)
    part = path.with_name(f".{path.stem}.{os.getpid()}.part{path.suffix}")
    try:
        yield part
        if not overwrite and path.exists():
            raise ValueError(f"path: expected a new file, got {str(path)!r}, which exists")
        _reach_disk(part, os.O_RDWR)
        os.replace(part, path)
        if os.name == "posix":
            _reach_disk(path.parent, os.O_RDONLY)  # the name too
    finally:
        part.unlink(missing_ok=True)


def remove_parts(path: str | os.PathLike) -> None:
    """Remove what `whole_file` has left beside a path that one process alone writes, where it was killed."""
    path = Path(path)
    for part in path.parent.glob(f".{glob.escape(path.stem)}.*.part{glob.escape(path.suffix)}"):
        if "." not in part.name[len(path.stem) + 2 : -len(f".part{path.suffix}")]:  # no other stem's
            part.unlink(missing_ok=True)


def _reach_disk(path, how):
    opened = os.open(path, how)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)

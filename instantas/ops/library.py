"""The compiled libraries: the operators that they implement, and why one cannot be loaded."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from . import cpu, stamp
from .schemas import SCHEMAS


class Library:
    """A file that implements operators `torch.ops.<namespace>.*` for one dispatch key, "CPU" or "CUDA"."""

    def __init__(
        self,
        path: Path,
        namespace: str,
        key: str,
        python: Mapping[str, Callable[..., Any]] = {},  # noqa: B006  (operators that are written in Python)
    ) -> None:
        self.path, self.namespace, self.key, self.python = path, namespace, key, python
        self._operators: torch.library.Library | None = None  # their definitions go with it

    @functools.cached_property
    def architectures(self) -> tuple[str, ...]:
        note = stamp.read(self.path)
        return note.architectures if note else ()

    def define(self) -> None:
        """Define the operators, which the library then implements."""
        if self._operators is None:
            self._operators = torch.library.Library(self.namespace, "DEF")
            for name, schema in SCHEMAS.items():
                self._operators.define(name + schema.replace("SymInt[]", "int[]"))
            for name, function in self.python.items():
                self._operators.impl(name, function, self.key)

    def unfit(self) -> str | None:
        """Why it must not be loaded, and the command that mends it; None: it may."""
        reason = stamp.unfit(self.path, __version__, torch.__version__)
        return f"{reason}; to build it: {stamp.remedy()}" if reason and sys.platform.startswith("linux") else reason

    def load(self) -> str | None:
        """Why it cannot be loaded, or lacks operators; None: it is loaded."""
        self.define()
        try:
            torch.ops.load_library(self.path)
        except OSError as error:
            return f"{self.path.name} does not load: {str(error.__cause__ or error).splitlines()[0]}"
        has = torch._C._dispatch_has_kernel_for_dispatch_key
        missing = [name for name in SCHEMAS if not has(f"{self.namespace}::{name}", self.key)]
        return f"{self.path.name} lacks {', '.join(missing)}" if missing else None

    def functions(self) -> dict[str, Callable[..., Any]]:
        """Operation -> operator, once it is loaded."""
        return {name: getattr(getattr(torch.ops, self.namespace), name).default for name in SCHEMAS}


CPP = Library(
    stamp.PACKAGE / "libinstantas_cpu.so",
    "instantas_cpp",
    "CPU",
    python={"regional_attention_backward": cpu.regional_attention_backward},
)
CUDA = Library(stamp.PACKAGE / "libinstantas_cuda.so", "instantas_cuda", "CUDA")

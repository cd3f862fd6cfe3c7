"""What a picture carries: the settings from which it can be made again."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from instantas import __version__
from instantas.cli.inputs import digests, whole
from instantas.cli.model import EMBEDDED


def record(
    pipe: Any,
    prompt: str,
    seed: int,
    size: tuple[int, int],
    settings: dict[str, Any],
    *,
    model: str | None,
    scheduler: str | None,
    files: Iterable[Path],
) -> dict[str, str]:
    """The text that a picture carries: whatever it takes to paint it again.

    Args:
        size: (width, height).
        settings: of the run, by their names in the pipeline.
        model, scheduler: as the command line was told.
        files: that the picture was painted from, noted with their digests.
    """
    noted = settings | {
        "instantas": __version__,
        "model": EMBEDDED if model is None else whole(model),
        "scheduler": scheduler,
        "scheduler_class": type(pipe.scheduler).__name__,
        "dtype": str(pipe.dtype).removeprefix("torch."),
        "files": digests(files),
    }
    return {
        "prompt": prompt,
        "seed": str(seed),
        "size": f"{size[0]}x{size[1]}",
        "settings": json.dumps(noted, sort_keys=True),
        "Software": f"instantas {__version__}",
    }

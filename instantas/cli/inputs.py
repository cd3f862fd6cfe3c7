"""What a picture is painted from beside its prompt: regions and their masks, LoRAs, ControlNets and their pictures."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click

from instantas.regions import Region, load_regions

LOADED = (".bin", ".json", ".safetensors")  # of what lies in a folder


class Lora(NamedTuple):
    """A file, a folder or a hub id with LoRA weights, and how much of them is added."""

    path: str
    scale: float

    def __str__(self) -> str:
        return f"{whole(self.path)}:{self.scale}"


class Control(NamedTuple):
    """A picture, and the file, the folder or the hub id of a ControlNet that is told it."""

    image: Path
    model: str

    def __str__(self) -> str:
        return f"{self.image.resolve()}:{whole(self.model)}"


class LoraType(click.ParamType):
    """PATH[:SCALE]"""

    name = "PATH[:SCALE]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Lora:
        path, colon, scale = value.rpartition(":")
        try:
            lora = Lora(path, float(scale)) if colon else Lora(value, 1.0)
        except ValueError:  # a colon of the path's own
            lora = Lora(value, 1.0)
        if not lora.path.strip() or not math.isfinite(lora.scale):
            self.fail(f"expected PATH[:SCALE], such as style.safetensors:0.8, got {value!r}", param, ctx)
        return lora


class ControlType(click.ParamType):
    """IMAGE:MODEL"""

    name = "IMAGE:MODEL"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Control:
        image, _, model = value.rpartition(":")
        if not image or not model:
            self.fail(f"expected IMAGE:MODEL, such as edges.png:my/controlnet, got {value!r}", param, ctx)
        return Control(Path(image), model)


def whole(name: str) -> str:
    """The whole path of what is here; other names as they are, the hub's among them."""
    path = Path(name).expanduser()
    return str(path.resolve()) if path.exists() else name


def read_regions(places: Sequence[str], file: str | None) -> tuple[list[Region], list[dict]]:
    """Regions from the command line and from a JSON file, and what to note of them.

    A note has every argument of `Region`, those that were not given too, with the mask's whole path: a list of them is
    a file for `--regions`.

    Raises:
        ValueError: saying which region is wrong and what was expected.
    """
    regions: list[Region] = []
    masks: list[str | Path] = []
    for number, place in enumerate(places, 1):
        try:
            regions.append(Region.parse(place))
        except (TypeError, ValueError) as error:
            raise ValueError(f"region {number}, {place!r}: {error}") from error
        masks.append(place.rpartition("@")[2].strip())
    if file:
        regions += load_regions(file)
        entries = json.loads(Path(file).read_text(encoding="utf-8"))
        masks += [Path(file).parent / (entry.get("mask") or "") for entry in entries]
    names = [field.name for field in dataclasses.fields(Region)]
    notes = [{name: getattr(region, name) for name in names if name != "mask"} for region in regions]
    for region, note, mask in zip(regions, notes, masks):
        note["mask"] = None if region.mask is None else str(Path(mask).resolve())
    return regions, notes


def files(
    notes: Sequence[dict] = (),
    image: Path | None = None,
    loras: Sequence[Lora] = (),
    controls: Sequence[Control] = (),
    mask: Path | None = None,
) -> list[Path]:
    """Whole paths of the files and folders that a run reads; models of the hub are none."""
    masks = [Path(note["mask"]) for note in notes if note["mask"]]
    pictures = [each for each in (image, mask, *(control.image for control in controls)) if each]
    weights = [Path(whole(name)) for name in (*(lora.path for lora in loras), *(control.model for control in controls))]
    return [path.resolve() for path in [*masks, *pictures, *(path for path in weights if path.exists())]]


def digests(paths: Iterable[Path]) -> dict[str, str]:
    """SHA-256 by name: of files, and for a folder of its weights' and settings' names and digests."""
    return {str(path): _digest(path) for path in sorted(set(paths))}


def _digest(path):
    if not path.is_dir():
        return hashlib.sha256(path.read_bytes()).hexdigest()
    parts = [part for part in path.rglob("*") if part.suffix in LOADED and part.is_file()]
    listed = [f"{_digest(part)} {part.relative_to(path).as_posix()}\n" for part in sorted(parts)]
    return hashlib.sha256("".join(listed).encode()).hexdigest()

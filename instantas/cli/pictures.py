"""Picture files: reading one to start from, writing one with the record of how it was made, reading that again.

The record is text: PNG's own text chunks; elsewhere one JSON object of them in the tag ImageDescription, which JPEG and
WebP have in their EXIF data and TIFF among its own.
"""

from __future__ import annotations

import contextlib
import json
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from instantas.cli.cost import in_bytes
from instantas.cli.errors import first_line
from instantas.cli.limits import memory_limits
from instantas.files import check_writable, whole_file

TEXT = ("prompt", "seed", "size", "settings", "Software")  # of a record
DESCRIPTION, SOFTWARE = 0x010E, 0x0131  # tags of EXIF and TIFF
EXIF_BYTES = 65533  # of a JPEG file


class Format(NamedTuple):
    """A kind of picture file: Pillow's name, the most pixels of a side, and how Pillow is to write it."""

    name: str
    side: float
    how: dict[str, Any]


JPEG = Format("JPEG", 65500, {"quality": 95, "subsampling": 0})
TIFF = Format("TIFF", math.inf, {"compression": "tiff_adobe_deflate"})
FORMATS = {
    ".png": Format("PNG", math.inf, {}),
    ".jpg": JPEG,
    ".jpeg": JPEG,
    ".webp": Format("WEBP", 16383, {"lossless": True}),
    ".tif": TIFF,
    ".tiff": TIFF,
}


def check_output(output: Path, force: bool) -> None:
    """Refuse a name whose ending is no picture format's, and a place where no file can be made.

    Raises:
        ValueError: naming what was expected.
    """
    if output.suffix.lower() not in FORMATS:
        raise ValueError(f"output: expected a file name that ends in {', '.join(FORMATS)}, got {output.name!r}")
    check_writable(output, overwrite=force, name="output")


def format_of(output: Path) -> Format:
    """By the name's ending."""
    return FORMATS[output.suffix.lower()]


def check_size(output: Path, width: int, height: int) -> None:
    """Refuse a picture that is too large for its file's format.

    Raises:
        ValueError: naming the format and its largest side.
    """
    kind = format_of(output)
    if max(width, height) > kind.side:
        raise ValueError(
            f"size: expected at most {kind.side} pixels a side in a {kind.name} file, got {width}x{height}"
        )


def check_record(output: Path, text: dict[str, str]) -> None:
    """Refuse a picture and a record that are too large for the file's format.

    Raises:
        ValueError: naming the format.
    """
    check_size(output, *map(int, text["size"].split("x")))
    if format_of(output) is JPEG and (length := len(_exif(text).tobytes())) > EXIF_BYTES:
        raise ValueError(f"output: expected a format that holds {length} bytes of settings, got a JPEG file")


def described(text: dict[str, str]) -> str:
    """The record as ASCII."""
    return json.dumps(text)


def write_picture(picture: Any, output: Path, text: dict[str, str], force: bool) -> None:
    """A PIL picture as a file with its record, whole or not at all."""
    from PIL.PngImagePlugin import PngInfo

    kind = format_of(output)
    if kind.name == "PNG":
        chunks = PngInfo()
        for key, value in text.items():
            chunks.add_itxt(key, value)
        carried: dict[str, Any] = {"pnginfo": chunks}
    else:
        carried = {"exif": _exif(text)}
    with whole_file(output, overwrite=force) as part:
        picture.save(part, format=kind.name, **carried, **kind.how)


def read_record(path: Path) -> dict[str, str]:
    """The record in a picture that `write_picture` wrote.

    Raises:
        ValueError: for a file that is no picture, or one without a record.
    """
    from PIL import Image

    with _readable("like", path), Image.open(path) as picture:
        text = getattr(picture, "text", {})
        if picture.format != "PNG":
            with contextlib.suppress(ValueError, TypeError):
                text = json.loads(picture.getexif().get(DESCRIPTION, ""))
    text = text if isinstance(text, dict) else {}
    if missing := [name for name in TEXT if not isinstance(text.get(name), str)]:
        raise ValueError(f"like: expected a picture with its settings inside, got {str(path)!r} without {missing[0]}")
    return {name: str(text[name]) for name in TEXT}


def read_picture(path: Path, name: str = "picture", ground: str = "white") -> Any:
    """A picture file as RGB, turned the way its camera was held.

    Args:
        name: of the argument that the path comes from.
        ground: colour of what is transparent.

    Raises:
        ValueError: for a file that is none, one of more than 8 bits, and one that does not fit into the memory.
    """
    from PIL import Image, ImageOps

    with _readable(name, path):
        opened = Image.open(path)
    from instantas.pipelines.pictures import MODES, opaque

    with opened:
        if opened.mode not in MODES:
            raise ValueError(f"{name}: expected 8 bits a channel, got mode {opened.mode!r} of {str(path)!r}")
        need = 8 * opened.width * opened.height  # as it is and turned, up to four channels each
        if (limits := memory_limits()) and need > limits[0][0]:
            raise ValueError(f"{name}: expected a picture that fits into the memory, got {in_bytes(need)} of it")
        with _readable(name, path):
            image = ImageOps.exif_transpose(opened)
    return opaque(image, name, ground)


def _exif(text):
    from PIL import Image

    exif = Image.Exif()
    exif[DESCRIPTION], exif[SOFTWARE] = described(text), text["Software"]
    return exif


@contextlib.contextmanager
def _readable(name: str, path: Path) -> Iterator[None]:
    """What Pillow raises of a file that it cannot read, as one kind of error; files of any size are read."""
    from PIL import Image

    largest, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None  # what we write may be larger
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about details of a file that can be read
            yield
    except MemoryError:
        raise
    except Exception as error:  # which one depends on the format and on what is broken
        raise ValueError(f"{name}: expected a picture file, got {str(path)!r}: {first_line(error)}") from error
    finally:
        Image.MAX_IMAGE_PIXELS = largest

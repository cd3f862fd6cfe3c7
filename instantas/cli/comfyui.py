"""`instantas comfyui`: the nodes in a ComfyUI installation."""

from __future__ import annotations

from pathlib import Path

import click

LINK = """\
\"\"\"The nodes of instantas, which `instantas comfyui` has linked here.\"\"\"
from instantas.comfyui import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS, comfy_entrypoint  # noqa: F401
"""
PARTS = "nodes.py", "comfy", "custom_nodes"  # of every ComfyUI


@click.command()
@click.argument("path", type=click.Path(path_type=Path))
def comfyui(path: Path) -> None:
    """Link the nodes into the ComfyUI installation at PATH."""
    folder, new = link(path)
    click.echo(f"{'linked' if new else 'linked before'}: {folder}")
    click.echo("The Python that runs ComfyUI must have instantas; the nodes are there when ComfyUI is started again.")


def link(path: Path) -> tuple[Path, bool]:
    """The folder of an installation's custom_nodes that imports the nodes, and whether it is new.

    Raises:
        ValueError: for what is no ComfyUI, and for a folder of that name that is not this link.
    """
    missing = [part for part in PARTS if not (path / part).exists()]
    if missing:
        raise ValueError(f"path: expected a ComfyUI installation, got {str(path)!r}, which has no {missing[0]}")
    folder = path / "custom_nodes" / "instantas"
    file = folder / "__init__.py"
    if file.is_file() and file.read_text(encoding="utf-8") == LINK:
        return folder, False
    if folder.exists() or folder.is_symlink():
        raise ValueError(f"path: expected no {str(folder)!r} but this link, got another; remove it first")
    folder.mkdir()
    file.write_text(LINK, encoding="utf-8")
    return folder, True

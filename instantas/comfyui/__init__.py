"""Nodes for ComfyUI: windows over any canvas, and regions with prompts of their own.

ComfyUI finds them in a folder of its `custom_nodes`, which `instantas comfyui PATH` makes. Both forms in which it takes
nodes are here: the mappings of classes, and `comfy_entrypoint` for its newer interface.
"""

from __future__ import annotations

from typing import Any

from instantas.comfyui.regions import Region, Regions
from instantas.comfyui.windows import MultiDiffusion, Windows

NODE_CLASS_MAPPINGS: dict[str, Any] = {
    "InstantASWindows": Windows,
    "InstantASRegion": Region,
    "InstantASRegions": Regions,
    "InstantASMultiDiffusion": MultiDiffusion,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "InstantASWindows": "Windows (InstantAS)",
    "InstantASRegion": "Region (InstantAS)",
    "InstantASRegions": "Regions (InstantAS)",
    "InstantASMultiDiffusion": "MultiDiffusion (InstantAS)",
}


async def comfy_entrypoint() -> Any:
    """The nodes for ComfyUI's newer interface."""
    from comfy_api.latest import ComfyExtension, io

    class Extension(ComfyExtension):
        async def get_node_list(self):
            return [_current(io, name, node) for name, node in NODE_CLASS_MAPPINGS.items()]

    return Extension()


def _current(io, name, node):
    """A node of the newer interface, from the class of the older one."""
    groups = node.INPUT_TYPES()
    inputs = [
        _input(io, key, optional, *declared)
        for optional, group in ((False, "required"), (True, "optional"))
        for key, declared in groups.get(group, {}).items()
    ]
    schema = io.Schema(
        node_id=name,
        display_name=NODE_DISPLAY_NAME_MAPPINGS[name],
        category=node.CATEGORY,
        description=node.DESCRIPTION,
        inputs=inputs,
        outputs=[io.Custom(kind).Output() for kind in node.RETURN_TYPES],
    )

    class Current(io.ComfyNode):
        @classmethod
        def define_schema(cls):
            return schema

        @classmethod
        def execute(cls, **given):
            return io.NodeOutput(*getattr(node(), node.FUNCTION)(**given))

    Current.__name__ = name
    return Current


def _input(io, key, optional, kind, settings=None):
    settings = (settings or {}) | {"optional": optional}
    if isinstance(kind, list):
        return io.Combo.Input(key, options=kind, **settings)
    numbers = {"INT": io.Int, "FLOAT": io.Float}
    return numbers[kind].Input(key, **settings) if kind in numbers else io.Custom(kind).Input(key, **settings)

"""The documentation's graph in ComfyUI's own executor, which runs in inference mode (COMFYUI=folder)."""

import asyncio
import json
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from instantas import comfyui
from instantas.cli.comfyui import LINK
from tests.comfyui.checkout import prompt

GRAPH = Path(__file__).parents[2] / "docs" / "examples" / "comfyui.json"


@pytest.fixture
def nodes(comfy):
    """ComfyUI's table of nodes, which is put back."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import nodes
    before = dict(nodes.NODE_CLASS_MAPPINGS)
    yield nodes
    nodes.NODE_CLASS_MAPPINGS.clear()
    nodes.NODE_CLASS_MAPPINGS.update(before)


def source(kind, value):
    """A node that gives what would be loaded."""
    attributes = dict(
        RETURN_TYPES=(kind,), FUNCTION="give", CATEGORY="test", INPUT_TYPES=classmethod(lambda cls: {"required": {}})
    )
    return type(kind.title(), (), attributes | {"give": lambda self: (value,)})


def executed(nodes, graph, model):
    """The latents of a graph, with the tiny model and prompts in place of a checkpoint's."""
    kept = []
    sink = type("Keep", (), {})
    sink.INPUT_TYPES = classmethod(lambda cls: {"required": {"samples": ("LATENT",)}})
    sink.RETURN_TYPES, sink.FUNCTION, sink.CATEGORY, sink.OUTPUT_NODE = (), "keep", "test", True
    sink.keep = lambda self, samples: kept.append((samples["samples"], torch.is_inference_mode_enabled())) or {}
    nodes.NODE_CLASS_MAPPINGS |= {"Keep": sink, "Model": source("MODEL", model)}
    for i, name in enumerate(("everywhere", "nowhere", "lake")):
        nodes.NODE_CLASS_MAPPINGS[name] = source("CONDITIONING", prompt(i))
        graph[name] = {"class_type": name, "inputs": {}}
    graph["checkpoint"] = {"class_type": "Model", "inputs": {}}
    graph["saved"] = {"class_type": "Keep", "inputs": {"samples": ["sampler", 0]}}
    del graph["decoded"]
    graph["sampler"]["inputs"]["steps"] = 2
    for name in ("canvas", "nothing", "all", "below", "windows"):  # a quarter as wide and as high
        inputs = graph[name]["inputs"]
        inputs.update({side: inputs[side] // 4 for side in ("width", "height", "x", "y") if side in inputs})
    import execution

    server = SimpleNamespace(client_id=None, last_node_id=None, last_prompt_id=None, send_sync=lambda *args: None)
    valid, error, outputs, problems = asyncio.run(execution.validate_prompt("graph", graph, None))
    assert valid, (error, problems)
    executor = execution.PromptExecutor(server)
    executor.execute(graph, "graph", {}, outputs)
    assert executor.success, executor.status_messages[-1]
    ((latents, in_inference_mode),) = kept
    assert in_inference_mode
    return latents


@pytest.fixture
def linked(nodes, tmp_path):
    """Loads the nodes as ComfyUI does from the link, without the names that it shall not see."""

    def load(name, *without):
        folder = tmp_path / name
        folder.mkdir()
        lines = LINK + "".join(f"del {each}\n" for each in without)
        (folder / "__init__.py").write_text(lines)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert asyncio.run(nodes.load_custom_node(str(folder)))
            asyncio.run(nodes.load_custom_node(str(Path(nodes.__file__).parent / "comfy_extras" / "nodes_mask.py")))

    return load


def test_the_graph_runs_with_the_nodes_of_either_interface(nodes, linked, model):
    found = []
    for name, without in (("classic", ()), ("current", ("NODE_CLASS_MAPPINGS",))):
        linked(name, *without)
        assert (nodes.NODE_CLASS_MAPPINGS["InstantASWindows"] is comfyui.Windows) == (name == "classic")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found.append(executed(nodes, json.loads(GRAPH.read_text()), model))
    assert found[0].shape == (1, 4, 16, 48) and found[0].isfinite().all()
    assert torch.equal(*found)


def test_both_interfaces_declare_the_same(nodes, linked):
    linked("current", "NODE_CLASS_MAPPINGS")
    for name, classic in comfyui.NODE_CLASS_MAPPINGS.items():
        current = nodes.NODE_CLASS_MAPPINGS[name]
        ours, theirs = classic.INPUT_TYPES(), current.INPUT_TYPES()
        assert {group: list(ours[group]) for group in ours} == {group: list(theirs[group]) for group in ours}
        for group in ours:
            for key, (kind, *settings) in ours[group].items():
                told, *rest = theirs[group][key]
                assert (rest[0]["options"] == kind) if isinstance(kind, list) else told == kind
                assert dict(*settings).items() <= rest[0].items()
        assert tuple(current.RETURN_TYPES) == classic.RETURN_TYPES

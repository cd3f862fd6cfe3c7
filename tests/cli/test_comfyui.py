"""`instantas comfyui`: links the nodes into what is a ComfyUI, and touches nothing else."""

import importlib.util
import inspect

import pytest

from instantas.cli import main
from instantas.cli.comfyui import LINK


@pytest.fixture
def installation(tmp_path):
    for folder in ("comfy", "custom_nodes"):
        (tmp_path / folder).mkdir()
    (tmp_path / "nodes.py").touch()
    return tmp_path


def refused(capsys, path):
    with pytest.raises(SystemExit) as stopped:
        main(["comfyui", str(path)])
    assert stopped.value.code == 2
    return capsys.readouterr().err


def test_links_once(installation, capsys):
    main(["comfyui", str(installation)])
    linked = installation / "custom_nodes" / "instantas"
    assert str(linked) in capsys.readouterr().out
    assert [path.name for path in linked.iterdir()] == ["__init__.py"]
    spec = importlib.util.spec_from_file_location("as_comfyui_imports_it", linked / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert "InstantASWindows" in module.NODE_CLASS_MAPPINGS
    assert set(module.NODE_DISPLAY_NAME_MAPPINGS) == set(module.NODE_CLASS_MAPPINGS)
    assert inspect.iscoroutinefunction(module.comfy_entrypoint)
    main(["comfyui", str(installation)])
    assert "linked before" in capsys.readouterr().out


@pytest.mark.parametrize("missing", ["nodes.py", "comfy", "custom_nodes"])
def test_what_is_no_comfyui_is_refused(installation, missing, capsys):
    path = installation / missing
    path.unlink() if path.is_file() else path.rmdir()
    error = refused(capsys, installation)
    assert "path: expected a ComfyUI installation" in error and f"which has no {missing}" in error
    assert not (installation / "custom_nodes" / "instantas").exists()
    assert "path: expected a ComfyUI installation" in refused(capsys, installation / "nowhere")


@pytest.mark.parametrize("text", ["", LINK + "# mine\n"])
def test_what_is_there_is_not_overwritten(installation, text, capsys):
    other = installation / "custom_nodes" / "instantas" / "__init__.py"
    other.parent.mkdir()
    other.write_text(text)
    assert "got another; remove it first" in refused(capsys, installation)
    assert other.read_text() == text

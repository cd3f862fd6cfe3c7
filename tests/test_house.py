"""The house: which rooms there are, and that imports point one way, from the door down to the ground floor.

`python tests/test_house.py` prints the rooms and the arrows between them.
"""

import ast
import sys
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "instantas"
FLOORS = (  # from the ground up; a room imports rooms of lower floors, never one beside it
    ("checks", "files"),
    ("plots",),
    ("windows",),
    ("kernels",),
    ("ops",),
    ("sampling", "regions"),
    ("pipelines",),
    ("demo", "bench", "testing"),
    ("cli", "comfyui"),
    ("__main__",),
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
LAZY = "__init__"  # the face: names that are imported when they are used
TESTED = ("bench", "cli", "comfyui", "demo", "ops", "pipelines", "regions", "sampling")  # rooms of tests/
TORCH_ALONE = ("ops/reference.py",)


def room(module: str) -> str:
    """The room of `instantas.a.b`: "a"; of the package itself, its face."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else LAZY


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path, text: str | None = None):
    """(line, module) of everything that a file (or other text in its place) imports, at its top or in a function."""
    text = path.read_text(encoding="utf-8") if text is None else text
    package = module_of(path) if path.name == "__init__.py" else module_of(path).rpartition(".")[0]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, name.name) for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            yield node.lineno, module
            if module == "instantas":  # `from instantas import ops`
                yield from (
                    (node.lineno, f"instantas.{name.name}") for name in node.names if name.name != "__version__"
                )


def sources():
    linked = (PACKAGE / "kernels").glob("*.py")  # a link, into which rglob does not go
    return sorted(path for path in {*PACKAGE.rglob("*.py"), *linked} if path != PACKAGE / "__init__.py")


def arrows() -> dict[tuple[str, str], list[str]]:
    """(room, room that it imports) -> the places where it does."""
    found = defaultdict(list)
    for path in sources():
        own = room(module_of(path))
        for line, module in imports(path):
            if module.split(".")[0] == "instantas" and module != "instantas" and room(module) != own:
                found[own, room(module)].append(f"{path.relative_to(ROOT)}:{line}")
    return dict(found)


def test_every_module_is_in_a_room_of_the_layout():
    assert {room(module_of(path)) for path in sources()} == set(FLOOR)


def test_no_arrow_points_upward():
    upward = {f"{a} -> {b}": places for (a, b), places in arrows().items() if FLOOR[b] >= FLOOR[a]}
    assert not upward


def test_what_stands_alone_imports_torch_alone():
    """The reference, and the kernels beside each other, know nothing of the house."""
    for path in (PACKAGE / name for name in TORCH_ALONE):
        assert {module.split(".")[0] for _, module in imports(path)} <= {"torch", *sys.stdlib_module_names}
    for path in (ROOT / "kernels").glob("*.py"):
        assert "instantas" not in {module.split(".")[0] for _, module in imports(path)}


def test_what_the_hub_is_given_imports_the_package_by_no_name():
    """A copy under another name is whole (setup.py hub): its imports are relative."""
    rooms = {"checks", "files", "plots", "windows", "kernels", "ops"}
    for path in (path for path in sources() if room(module_of(path)) in rooms):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [name.name for name in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            assert "instantas" not in {name.split(".")[0] for name in names}, path


def test_only_pipelines_and_what_is_above_know_diffusers():
    for path in sources():
        if FLOOR[room(module_of(path))] < FLOOR["pipelines"]:
            known = {module.split(".")[0] for _, module in imports(path)}
            assert not known & {"diffusers", "transformers"}, path


def test_only_the_nodes_know_comfyui_and_nothing_knows_the_nodes():
    for path in sources():
        found = {module for _, module in imports(path)}
        if room(module_of(path)) == "comfyui":  # in functions alone: the nodes can be looked at without ComfyUI
            top = ast.parse(path.read_text(encoding="utf-8")).body
            late = {m for node in top if isinstance(node, ast.ImportFrom) for m in [node.module or ""]}
            assert not {m for m in late if m.split(".")[0].startswith("comfy")}, path
        else:
            assert not {m for m in found if m.split(".")[0].startswith("comfy") or room(m) == "comfyui"}, path


def test_tests_mirror_the_rooms():
    assert {path.name for path in (ROOT / "tests").iterdir() if path.is_dir() and path.name[0] != "_"} == set(TESTED)
    assert set(TESTED) <= set(FLOOR)


@pytest.mark.parametrize(
    "text, module",
    [
        ("def late():\n    from ..sampling import sampler", "instantas.sampling"),
        ("from .reference import gather_windows", "instantas.ops.reference"),
        ("from instantas import demo", "instantas.demo"),
        ("import instantas.cli as door", "instantas.cli"),
    ],
)
def test_every_form_of_an_import_is_seen(text, module):
    assert module in {found for _, found in imports(PACKAGE / "ops" / "cpu.py", text)}


def house() -> str:
    """Rooms by floor, the door on top, each with the rooms that it imports."""
    below = defaultdict(set)
    for a, b in arrows():
        below[a].add(b)
    lines = []
    for rooms in reversed(FLOORS):
        for name in rooms:
            files = sum(room(module_of(path)) == name for path in sources())
            lower = sorted(below[name], key=lambda other: (-FLOOR[other], other))
            lines.append(
                f"{name:<10} {files:>2} {'file ' if files == 1 else 'files'}  -> {', '.join(lower) or 'nothing'}"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    print(house())

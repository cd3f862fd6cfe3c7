"""Public signatures are annotated, and a program that uses them from outside of the package passes a type checker."""

import ast
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "instantas"


def public_functions(path: Path):
    """(qualified name, node) of the functions and methods of a module that have no underscore in front."""
    pending = [("", node) for node in ast.parse(path.read_text(encoding="utf-8")).body]
    while pending:
        prefix, node = pending.pop()
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            pending += [(f"{prefix}{node.name}.", inner) for inner in node.body]
        elif isinstance(node, ast.FunctionDef) and (
            not node.name.startswith("_") or node.name in ("__init__", "__call__")
        ):
            yield prefix + node.name, node


def missing(node: ast.FunctionDef) -> list[str]:
    """The parameters of a function, and "return", that have no annotation."""
    given = node.args
    parameters = [*given.posonlyargs, *given.args, *given.kwonlyargs, *filter(None, (given.vararg, given.kwarg))]
    names = [p.arg for p in parameters if p.annotation is None and p.arg not in ("self", "cls")]
    return names + ["return"] * (node.returns is None and node.name != "__init__")


def test_every_public_signature_is_annotated():
    found = {
        f"{path.relative_to(ROOT)}:{node.lineno} {name}": gaps
        for path in sorted(PACKAGE.rglob("*.py"))
        for name, node in public_functions(path)
        if (gaps := missing(node))
    }
    assert not found


def test_the_package_says_that_it_is_typed():
    assert (PACKAGE / "py.typed").is_file()


@pytest.mark.skipif(importlib.util.find_spec("mypy") is None, reason="mypy is not installed")
def test_a_program_outside_of_the_package_passes_the_type_checker(tmp_path):
    # of our settings that diffusers is skipped: to read it takes a minute, and it has no types to check against
    settings = ["--config-file", str(ROOT / "pyproject.toml"), "--cache-dir", str(ROOT / ".mypy_cache")]
    command = [sys.executable, "-m", "mypy", *settings]
    program = Path(__file__).with_name("typed_program.py")
    path = os.environ | {"MYPYPATH": str(ROOT)}  # an editable install is a hook, which a type checker does not run
    done = subprocess.run([*command, str(program)], cwd=tmp_path, env=path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout

"""The package as a stranger gets it: a checkout, an editable install, a wheel; with and without the extras."""

import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXTRAS = ("diffusers", "transformers", "accelerate", "PIL", "click", "matplotlib", "scipy", "skimage", "sklearn")


def python(code: str, *, cwd, path=None) -> str:
    """What a fresh Python prints for the code."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    if path:
        environment["PYTHONPATH"] = str(path)
    run = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def test_kernels_of_the_root_do_not_shadow_another_package():
    # a folder without __init__.py is at most a namespace package, which any installed `kernels` takes precedence over
    origin = python("import importlib.util as u; s = u.find_spec('kernels'); print(s and s.origin)", cwd=ROOT)
    assert origin == "None" or not Path(origin).is_relative_to(ROOT)
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="triton is not installed")
@pytest.mark.parametrize("folder", [ROOT, ROOT.parent], ids=["checkout", "editable install"])
def test_kernels_are_importable(folder):
    stems = python("from instantas.kernels import attention, step, windows; print(windows.__name__)", cwd=folder)
    assert stems == "instantas.kernels.windows"


def test_the_operations_need_only_torch():
    blocked = "".join(f"sys.modules[{name!r}] = None; " for name in EXTRAS)
    code = f"import sys; {blocked}import instantas.ops as ops; print(ops.backends()['reference'])"
    assert python(code, cwd=ROOT) == "available"
    loaded = python("import sys, instantas.ops; print(sorted(sys.modules))", cwd=ROOT)
    assert not any(f"'{name}'" in loaded for name in EXTRAS)


def test_the_command_says_which_extra_it_needs():
    code = "import sys; sys.modules['click'] = None; from instantas.__main__ import main; main()"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 2 and run.stderr.count("\n") == 1 and "instantas[diffusers]" in run.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel of the tree without csrc/, as on a machine that can compile nothing, unpacked."""
    tree = tmp_path_factory.mktemp("tree")
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "kernels"):
        source = ROOT / name
        shutil.copytree(source, tree / name) if source.is_dir() else shutil.copy(source, tree)
    ignore = shutil.ignore_patterns("*.so", "__pycache__", "*.arch")
    shutil.copytree(ROOT / "instantas", tree / "instantas", symlinks=True, ignore=ignore)
    command = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-q", "-w", "dist", "."]
    subprocess.run(command, cwd=tree, check=True, capture_output=True)
    (built,) = (tree / "dist").glob("instantas-*.whl")
    unpacked = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(built) as archive:
        archive.extractall(unpacked)
    return unpacked


def test_wheel_holds_the_kernels_and_the_model(wheel):
    files = {str(p.relative_to(wheel)) for p in wheel.rglob("*") if p.is_file()}
    python_files = {str(p.relative_to(ROOT)) for p in (ROOT / "instantas").rglob("*.py")}
    assert python_files <= files
    assert "instantas/demo/model/unet/diffusion_pytorch_model.safetensors" in files
    assert not any(name.startswith(("tests", "bench", "kernels/")) for name in files)


def test_wheel_paints_from_another_folder(wheel, tmp_path):
    code = (
        "import instantas; print(instantas.__file__);"
        "from instantas.cli import main;"
        "main(['generate', 'grass', '--size', '140x60', '--steps', '1', '--device', 'cpu', '-o', 'a.png'])"
    )
    out = python(code, cwd=tmp_path, path=wheel)
    assert str(wheel) in out
    assert (tmp_path / "a.png").stat().st_size > 1000

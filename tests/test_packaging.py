"""The package as a stranger gets it: a checkout, an editable install, a wheel; with and without extras or compilers."""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXTRAS = ("diffusers", "transformers", "accelerate", "PIL", "click", "matplotlib", "scipy", "skimage", "sklearn")
BLOCKED = f"import sys; sys.modules.update(dict.fromkeys({EXTRAS}))\n"
COMPILER = next(filter(shutil.which, ("g++", "clang++", "c++")), None)


def run(command, *, cwd, **environment):
    """What a process prints, without the paths of this one's environment."""
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "CXX", "CUDA_HOME")}
    done = subprocess.run(list(map(str, command)), cwd=cwd, env=kept | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


def python(code, *, cwd, executable=sys.executable):
    return run([executable, "-c", code], cwd=cwd)


# The checkout


def test_kernels_of_the_root_do_not_shadow_another_package():
    # a folder without __init__.py is at most a namespace package, which any installed `kernels` takes precedence over
    origin = python("import importlib.util as u; s = u.find_spec('kernels'); print(s and s.origin)", cwd=ROOT)
    assert origin == "None" or not Path(origin).is_relative_to(ROOT)
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_an_installed_kernels_package_is_found_from_the_root(tmp_path):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("name = 'another'")
    code = f"import sys; sys.path.append({str(tmp_path)!r}); import kernels, instantas.ops; print(kernels.name)"
    assert python(code, cwd=ROOT) == "another"


@pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="triton is not installed")
def test_kernels_are_importable_from_the_root():
    code = "from instantas.kernels import attention, step, windows; print(windows.__name__)"
    assert python(code, cwd=ROOT) == "instantas.kernels.windows"


def test_the_operations_need_only_torch():
    code = """
import torch, instantas.ops as ops
from instantas.windows import WindowPlan
plan = WindowPlan.minimum_coverage(20, 30, 8)
canvas = torch.randn(1, 4, 20, 30)
windows = ops.gather_windows(canvas, plan)
assert torch.allclose(ops.scatter_windows(windows, plan), canvas)
ops.guided_step(windows, windows, canvas, plan, (1.0, 0.5), 7.5)
print(ops.backends()["reference"])"""
    assert python(BLOCKED + code, cwd=ROOT) == "available"
    loaded = python("import sys, instantas.ops, instantas.sampling.sampler; print(*sys.modules)", cwd=ROOT).split()
    assert "instantas.sampling.sampler" in loaded and not set(EXTRAS) & set(loaded)


@pytest.mark.parametrize(
    "missing, extra, command",
    [
        ("click", "diffusers", "info"),
        ("diffusers", "diffusers", "generate grass --size 9x9"),
        ("matplotlib", "plot", "plan --size 9x9 --plot a.png"),
    ],
)
def test_the_command_says_which_extra_it_needs(missing, extra, command, tmp_path):
    code = f"import sys; sys.modules[{missing!r}] = None; sys.argv[1:] = {command.split()}"
    code += "; from instantas.__main__ import main; main()"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert missing in done.stderr and f"pip install 'instantas[{extra}]'" in done.stderr
    assert not list(tmp_path.iterdir())


# A wheel and an editable install


def copied(folder):
    """A new folder with the files that a package is built from, as in a fresh clone."""
    folder.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "kernels", "csrc", "instantas"):
        ignore = shutil.ignore_patterns("*.so", "*.arch", "__pycache__")
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, symlinks=True, ignore=ignore)
        else:
            shutil.copy(source, folder)
    return folder


def wheel_of(tree, **environment):
    command = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-q", "-w", "dist", "."]
    run(command, cwd=tree, **environment)
    (built,) = (tree / "dist").glob("instantas-*.whl")
    return built


def fresh_environment(folder, *install):
    """The Python of a new virtual environment that sees this one's packages, but not its instantas."""
    run([sys.executable, "-m", "venv", "--without-pip", folder], cwd=folder.parent)
    executable = folder / "bin" / "python"
    site = Path(python("import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder, executable=executable))
    # entries of a .pth file are searched for packages, but the .pth files in them (an editable install) are not read
    (site / "others.pth").write_text(sysconfig.get_path("purelib"))
    assert (
        python("import importlib.util as u; print(u.find_spec('instantas'))", cwd=folder, executable=executable)
        == "None"
    )
    pip = [sys.executable, "-m", "pip", "--python", executable, "install", "-q", "--no-deps", "--no-index"]
    run([*pip, *install], cwd=folder, PATH=str(folder / "bin"))
    return executable


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel that was built where there is no compiler."""
    tree = copied(tmp_path_factory.mktemp("built") / "tree")
    return wheel_of(tree, PATH=str(tree))


def test_a_wheel_without_libraries_serves_every_platform(wheel):
    assert wheel.name.endswith("-py3-none-any.whl")
    files = set(zipfile.ZipFile(wheel).namelist())
    assert {str(p.relative_to(ROOT)) for p in (ROOT / "instantas").rglob("*.py")} <= files
    assert {f"instantas/kernels/{p.name}" for p in (ROOT / "kernels").glob("*.py")} <= files
    model = ROOT / "instantas" / "demo" / "model"
    assert {str(p.relative_to(ROOT)) for p in model.rglob("*") if p.is_file()} <= files
    assert "instantas/demo/README.md" in files and any(name.endswith("LICENSE") for name in files)
    assert not any(name.startswith(("tests", "bench", "kernels/", "csrc")) or name.endswith(".so") for name in files)
    assert wheel.stat().st_size < 12e6


def test_an_installed_wheel_paints_from_another_folder(wheel, tmp_path):
    executable = fresh_environment(tmp_path / "venv", wheel)
    where = python("import instantas; print(instantas.__file__)", cwd=tmp_path, executable=executable)
    assert Path(where).is_relative_to(tmp_path / "venv")
    command = ["generate", "grass", "--size", "140x60", "--steps", "1", "--device", "cpu", "-o", "a.png"]
    run([executable.with_name("instantas"), *command], cwd=tmp_path)
    from PIL import Image

    with Image.open(tmp_path / "a.png") as picture:
        assert picture.size == (140, 60) and picture.text["prompt"] == "grass"
    code = "import instantas.ops as ops; print(ops.backends()['cpp'])"
    assert "not built" in python(BLOCKED + code, cwd=tmp_path, executable=executable)
    if importlib.util.find_spec("triton"):
        python("from instantas.kernels import attention, step, windows", cwd=tmp_path, executable=executable)


@pytest.mark.skipif(not sys.platform.startswith("linux") or COMPILER is None, reason="there is no C++ compiler")
def test_a_wheel_carries_the_library_that_was_built(tmp_path):
    built = wheel_of(copied(tmp_path / "tree"), CUDA_HOME=str(tmp_path / "none"))
    assert "-py3-none-linux" in built.name
    with zipfile.ZipFile(built) as archive:
        assert "instantas/libinstantas_cpu.so" in archive.namelist()
        archive.extractall(tmp_path / "site")
    code = "import instantas.ops as ops; print(ops.__file__, ops.backends()['cpp'])"
    file, state = python(code, cwd=tmp_path / "site").split(maxsplit=1)
    assert Path(file).is_relative_to(tmp_path / "site") and state == "available"


def test_an_editable_install_has_the_kernels(tmp_path):
    tree = copied(tmp_path / "tree")
    executable = fresh_environment(tmp_path / "venv", "--no-build-isolation", "-e", tree)
    code = "import importlib.util as u; print(*[u.find_spec('instantas' + m).origin for m in ('', '.kernels.step')])"
    for found in python(code, cwd=tmp_path, executable=executable).split():
        assert Path(found).resolve().is_relative_to(tree)

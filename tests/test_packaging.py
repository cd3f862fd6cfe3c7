"""The package as a stranger gets it: a checkout, an editable install, a wheel; with and without extras or compilers."""

import importlib.util
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path
from unittest import mock

import pytest

from instantas import __version__
from instantas.ops import stamp

ROOT = Path(__file__).parents[1]
EXTRAS = ("diffusers", "transformers", "accelerate", "PIL", "click", "matplotlib", "scipy", "skimage", "sklearn")
BLOCKED = f"import sys; sys.modules.update(dict.fromkeys({EXTRAS}))\n"
STATES = "import instantas.ops as ops; [print(f'{name}: {state}') for name, state in ops.backends().items()]"
MEND = "to build it: pip install --no-build-isolation --no-deps ."
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
        ignore = shutil.ignore_patterns("*.so", "libinstantas_*.json", "__pycache__")
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, symlinks=True, ignore=ignore)
        else:
            shutil.copy(source, folder)
    return folder


def wheel_of(tree, **environment):
    environment |= {"CUDA_HOME": str(tree / "none")}  # nvcc takes most of the time
    command = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-q", "-w", "dist", "."]
    run(command, cwd=tree, **environment)
    (built,) = (tree / "dist").glob("instantas-*.whl")
    return built


def fresh_environment(folder, *install, compilers=False):
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
    path = [str(folder / "bin"), *([os.environ["PATH"]] if compilers else [])]
    run([*pip, *install], cwd=folder, PATH=os.pathsep.join(path), CUDA_HOME=str(folder))
    return executable


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel that was built where there is no compiler."""
    tree = copied(tmp_path_factory.mktemp("built") / "tree")
    return wheel_of(tree, PATH=str(tree))


def test_a_wheel_without_libraries_serves_every_platform(wheel):
    assert wheel.name == f"instantas-{__version__}-py3-none-any.whl"
    files = set(zipfile.ZipFile(wheel).namelist())
    assert {str(p.relative_to(ROOT)) for p in (ROOT / "instantas").rglob("*.py")} <= files
    assert {f"instantas/kernels/{p.name}" for p in (ROOT / "kernels").glob("*.py")} <= files
    model = ROOT / "instantas" / "demo" / "model"
    assert {str(p.relative_to(ROOT)) for p in model.rglob("*") if p.is_file()} <= files
    assert {"instantas/demo/README.md", "instantas/demo/detector.safetensors"} <= files
    assert any(name.endswith("LICENSE") for name in files)
    assert not any(name.startswith(("tests", "bench", "kernels/", "csrc")) or name.endswith(".so") for name in files)
    assert wheel.stat().st_size < 12e6


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The Python of an environment with that wheel."""
    return fresh_environment(tmp_path_factory.mktemp("installed") / "venv", wheel)


def test_an_installed_wheel_paints_from_another_folder(installed, tmp_path):
    where = python("import instantas; print(instantas.__file__)", cwd=tmp_path, executable=installed)
    assert Path(where).is_relative_to(installed.parents[1])
    (demo,) = re.findall(r"(?m)^\t\$\(BIN\)/instantas (generate .*)$", (ROOT / "Makefile").read_text())
    (tmp_path / "out").mkdir()
    run([installed.with_name("instantas"), *shlex.split(demo), "--steps", "1", "--device", "cpu"], cwd=tmp_path)
    from PIL import Image

    with Image.open(tmp_path / "out" / "demo.png") as picture:
        assert picture.size == (640, 256) and picture.text["prompt"] == "sea at dusk"
    states = python(f"{BLOCKED}{STATES}", cwd=tmp_path, executable=installed)
    assert "cpp: not built: there is no C++ compiler" in states and MEND in states
    if importlib.util.find_spec("triton"):
        python("from instantas.kernels import attention, step, windows", cwd=tmp_path, executable=installed)


def test_the_documentation_runs_from_an_installed_wheel(installed, tmp_path):
    examples = sorted((ROOT / "docs" / "examples").glob("*.py"))
    pages = [ROOT / "README.md", *(path for path in examples if path.stem != "k_diffusion_loop")]  # needs k-diffusion
    # -I: nothing of the checkout is found, the folder of the script neither
    said = run([installed, "-I", ROOT / "tests" / "documents.py", *pages], cwd=tmp_path).splitlines()
    assert [line for line in said if line in {page.name for page in pages}] == [page.name for page in pages]


needs_compiler = pytest.mark.skipif(
    not sys.platform.startswith("linux") or COMPILER is None, reason="there is no C++ compiler"
)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder with what a wheel that was built where there is a compiler, but no nvcc, installs."""
    folder = tmp_path_factory.mktemp("carrying")
    built = wheel_of(copied(folder / "tree"))
    assert "-py3-none-linux" in built.name
    with zipfile.ZipFile(built) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


@needs_compiler
def test_a_wheel_carries_the_library_that_was_built(site):
    files = {path.name for path in (site / "instantas").glob("libinstantas_*")}
    assert files == {"libinstantas_cpu.so", "libinstantas_cpu.json", "libinstantas_cuda.json"}
    code = f"import instantas.ops as ops; print(ops.__file__)\n{STATES}"
    file, *states = python(code, cwd=site).splitlines()
    assert Path(file).is_relative_to(site) and "cpp: available" in states
    (cuda,) = (state for state in states if state.startswith("cuda"))
    assert "not built: there is no nvcc in " in cuda and MEND in cuda


def truncate(library):
    os.truncate(library, library.stat().st_size // 2)


def age(library):
    note = json.loads(stamp.note_path(library).read_text())
    stamp.note_path(library).write_text(json.dumps(note | {"version": "0.0.9"}))


@needs_compiler
@pytest.mark.parametrize(
    "spoil, reason", [(truncate, "is damaged"), (age, "was built for instantas 0.0.9, this is " + __version__)]
)
def test_a_spoilt_library_is_not_loaded_and_one_warning_says_so(spoil, reason, site, tmp_path):
    shutil.copytree(site / "instantas", tmp_path / "instantas", symlinks=True)
    spoil(tmp_path / "instantas" / "libinstantas_cpu.so")
    code = f"""
import warnings; warnings.simplefilter("always")
import torch
from instantas import WindowPlan, ops
plan = WindowPlan.minimum_coverage(20, 30, 8)
for dtype in (torch.float32, torch.float64):
    canvas = torch.ones(1, 4, 20, 30, dtype=dtype)
    assert torch.equal(ops.scatter_windows(ops.gather_windows(canvas, plan), plan), canvas)
{STATES}"""
    done = subprocess.run([sys.executable, "-c", BLOCKED + code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"cpp: libinstantas_cpu.so {reason}" in done.stdout and MEND in done.stdout
    assert done.stderr.count("RuntimeWarning: instantas: operations on cpu run in plain PyTorch") == 1
    assert done.stderr.count(reason) == 1 and MEND in done.stderr


def test_an_editable_install_has_the_kernels(tmp_path):
    tree = copied(tmp_path / "tree")
    executable = fresh_environment(tmp_path / "venv", "--no-build-isolation", "-e", tree, compilers=True)
    code = "import importlib.util as u; print(*[u.find_spec('instantas' + m).origin for m in ('', '.kernels.step')])"
    for found in python(code, cwd=tmp_path, executable=executable).split():
        assert Path(found).resolve().is_relative_to(tree)
    if needs_compiler.args[0]:
        return
    assert "cpp: available" in python(STATES, cwd=tmp_path, executable=executable)
    with open(tree / "csrc" / "windows.cpp", "a") as source:  # as `git pull` may
        source.write("// a change\n")
    states = python(STATES, cwd=tmp_path, executable=executable)
    assert "cpp: libinstantas_cpu.so was built from other sources than csrc/" in states
    assert f"pip install --no-build-isolation --no-deps -e {tree}" in states


# setup.py


@pytest.fixture(scope="module")
def setup():
    """The names of setup.py, which builds nothing here."""
    before = Path.cwd()
    os.chdir(ROOT)
    try:
        with mock.patch("setuptools.setup"):
            yield runpy.run_path("setup.py")
    finally:
        os.chdir(before)


def architectures(setup, monkeypatch, listed, devices=()):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", listed)
    monkeypatch.setitem(setup["architectures"].__globals__, "device_capabilities", lambda torch: list(devices))
    return setup["architectures"](Path("torch"))


@pytest.mark.parametrize(
    "listed, kept, dropped",
    [
        ("7.5;8.0+PTX", ["8.0+PTX"], "7.5"),
        ("5.2 6.0 6.1 7.0 7.5 8.0 8.6 9.0+PTX", ["8.0", "8.6", "9.0+PTX"], "5.2, 6.0, 6.1, 7.0, 7.5"),
        ("7.0+PTX, 12.0f;", ["12.0f"], "7.0+PTX"),
        ("9.0a;10.0", ["9.0a", "10.0"], ""),
    ],
)
def test_old_architectures_are_left_out_alone(setup, monkeypatch, capsys, listed, kept, dropped):
    assert architectures(setup, monkeypatch, listed, ["8.9"]) == kept
    said = f"instantas: left out {dropped}: the kernels need compute capability 8.0\n" if dropped else ""
    assert capsys.readouterr().err == said


@pytest.mark.parametrize("listed, devices", [("7.5", []), ("5.2;7.0+PTX", ["9.0"]), ("", ["7.5"])])
def test_nothing_but_old_architectures(setup, monkeypatch, listed, devices):
    with pytest.raises(LookupError, match="^the kernels need compute capability 8.0, not "):
        architectures(setup, monkeypatch, listed, devices)


@pytest.mark.parametrize("listed", ["Hopper", "sm_80", "8", "8.0+SASS"])
def test_architectures_of_another_form(setup, monkeypatch, listed):
    with pytest.raises(LookupError, match="^TORCH_CUDA_ARCH_LIST: expected entries such as"):
        architectures(setup, monkeypatch, f"8.0;{listed}")


@pytest.mark.parametrize("listed", ["", " ", ";"])
def test_by_default_newer_gpus_are_served_too(setup, monkeypatch, listed):
    for devices, here in (([], (8, 0)), (["8.6"], (8, 6)), (["7.5", "9.0"], (9, 0))):
        built = setup["targets"](architectures(setup, monkeypatch, listed, devices))
        assert all(stamp.serves(built, capability) for capability in (here, (10, 0), (12, 1)))
    assert setup["targets"](["8.0+PTX", "8.0", "9.0a"]) == ["sm_80", "compute_80", "sm_90a"]


def test_torch_is_found_where_pip_hides_it(setup, monkeypatch):
    """The environment that pip makes for a build keeps the interpreter, and so its folders, but not their packages."""
    found = setup["torch_folder"]()
    if found.parent != Path(sysconfig.get_path("purelib")):
        pytest.skip("torch is not in this environment itself")
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path != str(found.parent)])
    assert setup["torch_folder"]() == found


def test_no_torch_or_one_that_is_too_old(setup, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(LookupError, match="^the build saw no torch$"):
        setup["torch_folder"]()
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").touch()
    for version in ("2.9.1+cu128", "1.13.0"):
        note = tmp_path / "torch-1.dist-info" / "METADATA"
        note.parent.mkdir(exist_ok=True)
        note.write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n")
        with pytest.raises(LookupError, match=", and needs 2.10 or later$"):
            setup["torch_folder"]()


def test_a_compiler_that_fails_is_named_in_a_line(setup):
    error = subprocess.CalledProcessError(1, ["/usr/local/bin/nvcc", "-gencode=arch=compute_999,code=sm_999"])
    assert setup["left_out"](error) == "nvcc failed (pip install -v shows its messages)"


@pytest.mark.parametrize("version", ["65.5.0", "76.1.0"])
def test_a_setuptools_that_is_too_old_is_said_in_a_line(version):
    with mock.patch("setuptools.__version__", version), pytest.raises(SystemExit, match="pip install 'setuptools>=77'"):
        runpy.run_path(str(ROOT / "setup.py"))

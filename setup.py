"""Package layout, and the native libraries that this machine can build. The metadata is in pyproject.toml.

Two libraries from csrc/, both optional: the host's and CUDA's. They use PyTorch's stable ABI alone, so one binary
serves torch >= 2.10 and every Python. A note beside each says what it was built from and for, or why it was left out.

CXX names the C++ compiler, CUDA_HOME the toolkit, TORCH_CUDA_ARCH_LIST the architectures (default: those of the devices
here, and what comes after them; without a device, 8.0+PTX and 9.0a).
"""

import hashlib
import importlib.metadata
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from importlib.machinery import PathFinder
from pathlib import Path
from typing import NamedTuple

import setuptools

if int(setuptools.__version__.split(".")[0]) < 77:
    sys.exit(f"instantas: setuptools>=77 builds it, here is {setuptools.__version__}: pip install 'setuptools>=77'")

from setuptools import Command, Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

SOURCES = Path("csrc")
STAMP = Path("instantas", "ops", "stamp.py")
STABLE_ABI = "2.10"  # of torch: the oldest that the libraries run with
FLAGS = ["-std=c++17", "-O3", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
DEFAULT_ARCHITECTURES = ["8.0+PTX", "9.0a"]

stamp = runpy.run_path(str(STAMP))  # importing the package would import torch


class Recipe(NamedTuple):
    """How to build a library: `compile -c source -o object` for every source, then `link objects libraries`."""

    compile: list[str]
    link: list[str]
    libraries: list[str]
    architectures: tuple[str, ...] = ()


def torch_folder() -> Path:
    """Where torch is, for its headers and libraries.

    An environment that pip makes for the build alone hides torch, but runs the Python of the one it installs into.
    """
    paths = [*sys.path, sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    spec = PathFinder.find_spec("torch", paths)
    found = [d.version for d in importlib.metadata.distributions(name="torch", path=paths)]
    if spec is None or spec.origin is None or not found:
        raise LookupError("the build saw no torch")
    if tuple(map(int, found[0].split(".")[:2])) < tuple(map(int, STABLE_ABI.split("."))):
        raise LookupError(f"the build saw torch {found[0]}, and needs {STABLE_ABI} or later")
    return Path(spec.origin).parent


def host_compiler() -> list[str]:
    for command in filter(None, (os.environ.get("CXX"), "g++", "clang++", "c++")):
        if shutil.which(shlex.split(command)[0]):
            return shlex.split(command)
    raise LookupError("there is no C++ compiler (CXX, g++, clang++ or c++)")


def device_capabilities(torch: Path) -> list[str]:
    """Such as ["8.6", "9.0"], of the devices here."""
    code = (
        "import torch; n = torch.cuda.device_count();"
        "print(*sorted({'%d.%d' % torch.cuda.get_device_capability(i) for i in range(n)}, key=float))"
    )
    environment = os.environ | {"PYTHONPATH": str(torch.parent)}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True).stdout.split()


def architectures(torch: Path) -> list[str]:
    """Such as ["8.0+PTX", "9.0a"]: what is asked for, of what the kernels run on."""
    asked = re.findall(r"[^;,\s]+", os.environ.get("TORCH_CUDA_ARCH_LIST", ""))
    if wrong := [a for a in asked if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", a)]:
        raise LookupError(f"TORCH_CUDA_ARCH_LIST: expected entries such as 8.0 or 9.0a+PTX, got {', '.join(wrong)}")
    if not asked and (here := device_capabilities(torch)):
        asked = [*here[:-1], f"{here[-1]}+PTX"]
    asked = asked or DEFAULT_ARCHITECTURES
    old = [a for a in asked if int(a.split(".")[0]) < 8]
    if old == asked:
        raise LookupError(f"the kernels need compute capability 8.0, not {', '.join(old)}")
    if old:
        print(f"instantas: left out {', '.join(old)}: the kernels need compute capability 8.0", file=sys.stderr)
    return [a for a in asked if a not in old]


def targets(architectures: list[str]) -> list[str]:
    """Such as ["sm_80", "compute_80", "sm_90a"]: machine code for each, and PTX where it is asked for."""
    names = []
    for architecture in architectures:
        number = architecture.removesuffix("+PTX").replace(".", "")
        names += [f"sm_{number}", f"compute_{number}"] if architecture.endswith("+PTX") else [f"sm_{number}"]
    return list(dict.fromkeys(names))


def host_recipe(work: Path) -> Recipe:
    torch, compiler = torch_folder(), host_compiler()
    flags = [*FLAGS, "-fPIC", "-fvisibility=hidden", "-isystem", str(torch / "include")]
    return Recipe([*compiler, *flags], [*compiler, "-shared"], [f"-L{torch / 'lib'}", "-ltorch_cpu"])


def cuda_recipe(work: Path) -> Recipe:
    torch, host = torch_folder(), host_compiler()
    home = os.environ.get("CUDA_HOME")
    nvcc = shutil.which("nvcc", path=os.path.join(home, "bin") if home else None)
    if nvcc is None:
        raise LookupError(f"there is no nvcc in {home or 'PATH'}")
    names = targets(architectures(torch))
    generated = [f"-gencode=arch=compute_{n.partition('_')[2]},code={n}" for n in names]
    # torch built for a CPU has no libtorch_cuda: an empty library of that name stands in for it at link time
    work.mkdir(parents=True, exist_ok=True)
    empty = [*host, "-shared", "-x", "c++", os.devnull, "-Wl,-soname,libtorch_cuda.so"]
    subprocess.run([*empty, "-o", str(work / "libtorch_cuda.so")], check=True)
    flags = [*FLAGS, "-DUSE_CUDA", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-isystem", str(torch / "include")]
    libraries = [f"-L{torch / 'lib'}", f"-L{work}", "-Xlinker", "--no-as-needed", "-ltorch_cuda", "-ltorch_cpu"]
    compiler = [nvcc, "-ccbin", shutil.which(host[0])]
    return Recipe([*compiler, *flags, *generated], [*compiler, "-shared"], libraries, tuple(names))


RECIPES = {"instantas.libinstantas_cpu": host_recipe, "instantas.libinstantas_cuda": cuda_recipe}


def library(name: str, pattern: str) -> Extension:
    headers = sorted(map(str, (*SOURCES.glob("*.h"), *SOURCES.glob("*.cuh"))))
    return Extension(name, sorted(map(str, SOURCES.glob(pattern))), depends=headers, optional=True)


class BuildLibraries(build_ext):
    """Builds shared libraries that torch loads; they are no Python modules."""

    def get_ext_filename(self, name):
        return os.path.join(*name.split(".")) + ".so"

    def build_extension(self, extension):
        library = Path(self.get_ext_fullpath(extension.name))
        work = Path(self.build_temp) / extension.name
        library.parent.mkdir(parents=True, exist_ok=True)
        note = stamp["Note"](self.distribution.get_version())
        try:
            if not sys.platform.startswith("linux"):
                raise LookupError(f"it is built on Linux, this is {sys.platform}")
            recipe = RECIPES[extension.name](work)
            self.build(recipe, extension, library, work)
        except (LookupError, subprocess.CalledProcessError) as error:
            library.unlink(missing_ok=True)
            note = note._replace(left_out=left_out(error))
            print(f"instantas: left out {library.name}: {note.left_out}", file=sys.stderr)
        else:
            note = note._replace(
                sources=stamp["fingerprint"](),
                torch=STABLE_ABI,
                architectures=recipe.architectures,
                digest=stamp["digest"](library),
            )
        stamp["write"](library, note)

    def build(self, recipe, extension, library, work):
        """Build it unless it is what these commands made of these sources."""
        made, inputs = work / "made", [*extension.sources, *extension.depends]
        commands = shlex.join([*recipe.compile, *recipe.link, *recipe.libraries])
        state = lambda: "\n".join([commands, *map(stamp["digest"], map(Path, [*inputs, library]))])  # noqa: E731
        if not self.force and library.exists() and made.exists() and made.read_text() == state():
            return
        work.mkdir(parents=True, exist_ok=True)
        objects = {source: str(work / Path(source).with_suffix(".o").name) for source in extension.sources}

        def compile_one(source):
            subprocess.run([*recipe.compile, "-c", source, "-o", objects[source]], check=True)

        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as pool:
            list(pool.map(compile_one, extension.sources))
        subprocess.run([*recipe.link, *objects.values(), *recipe.libraries, "-o", str(library)], check=True)
        made.write_text(state())
        print(f"instantas: built {library.name}", file=sys.stderr)

    def copy_extensions_to_source(self):
        """Put in place what was built; what was left out leaves a library from before, which its own note judges."""
        for placed in map(Path, map(self.get_ext_filename, RECIPES)):
            built = self.build_lib / placed
            if built.exists():
                replace(built, placed)
            if built.exists() or not placed.exists():
                replace(stamp["note_path"](built), stamp["note_path"](placed))


def left_out(error: Exception) -> str:
    """Why a library was left out, in a line."""
    if isinstance(error, subprocess.CalledProcessError):
        return f"{Path(error.cmd[0]).name} failed (pip install -v shows its messages)"
    return str(error)


def replace(source: Path, target: Path) -> None:
    """Copy in one step: the target may be loaded by a process that runs."""
    part = target.with_name(f"{target.name}.part")
    shutil.copy(source, part)
    os.replace(part, target)


class Wheel(bdist_wheel):
    """Libraries depend on the platform, not on the version of Python; without one the wheel serves every platform."""

    def get_tag(self):
        build = self.get_finalized_command("build")
        if any(Path(build.build_lib).glob("instantas/*.so")):
            return "py3", "none", super().get_tag()[2]
        self.root_is_pure = True
        return "py3", "none", "any"


class Hub(Command):
    """Lays out the operations for Hugging Face's `kernels`: their Python and Triton, for every system and torch."""

    description = "lay out a variant for Hugging Face's `kernels` in build/torch-universal (see build.toml)"
    user_options = [("output=", "o", "folder of the variants (build)")]
    FACE = '__version__ = "{}"\n\nfrom .ops import *\nfrom .windows import WindowPlan\n'

    def initialize_options(self):
        self.output = "build"

    def finalize_options(self):
        self.variant = Path(self.output, "torch-universal")

    def run(self):
        import tomllib  # of Python 3.11

        general = tomllib.loads(Path("build.toml").read_text())["general"]
        files = [Path("instantas", f"{stem}.py") for stem in ("checks", "files", "plots", "windows")]
        files += sorted([*Path("instantas", "ops").glob("*.py"), *Path("instantas", "kernels").glob("*.py")])
        texts = {file.relative_to("instantas"): file.read_text() for file in files}
        texts[Path("__init__.py")] = self.FACE.format(self.distribution.get_version())
        digest = hashlib.sha256("".join(map(texts.get, sorted(texts))).encode()).hexdigest()[:8]
        metadata = {
            "name": general["name"],
            "id": f"_{general['name']}_universal_{digest}",  # the package's name where it is loaded, and the operators'
            "version": general["version"],
            "license": general["license"],
            "python-depends": [],
            "backend": {"type": "cpu"},
        }
        texts[Path("metadata.json")] = json.dumps(metadata, indent=2) + "\n"
        shutil.rmtree(self.variant, ignore_errors=True)
        for file, text in texts.items():
            (self.variant / file).parent.mkdir(parents=True, exist_ok=True)
            (self.variant / file).write_text(text)
        print(f"instantas: laid out {self.variant}", file=sys.stderr)


# `kernels/` at the top level has no __init__.py, so that it never shadows Hugging Face's `kernels` package; a relative
# symlink instantas/kernels makes it importable as `instantas.kernels` in a checkout, an editable install, a wheel.
setup(
    packages=["instantas.kernels", *find_packages(include=["instantas", "instantas.*"])],
    package_data={
        "instantas": ["py.typed"],
        "instantas.demo": ["README.md", "detector.safetensors", "model/*.json", "model/*/*"],
        "instantas.testing": ["emulation/*"],
    },
    include_package_data=False,
    ext_modules=[library(*item) for item in zip(RECIPES, ("*.cpp", "*.cu")) if any(SOURCES.glob(item[1]))],
    cmdclass={"build_ext": BuildLibraries, "bdist_wheel": Wheel, "hub": Hub},
)

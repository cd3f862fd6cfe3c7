"""Package layout, and the native libraries that this machine can build. The metadata is in pyproject.toml.

Two libraries from csrc/, both optional: the host's and CUDA's. They use PyTorch's stable ABI alone, so one binary
serves torch >= 2.10 and every Python. What cannot be built is left out, with a line that says why.

CXX names the C++ compiler, CUDA_HOME the toolkit, TORCH_CUDA_ARCH_LIST the architectures (default: those of the devices
here; without a device, 8.0 and 9.0a).
"""

import importlib.metadata
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

SOURCES = Path("csrc")
FLAGS = ["-std=c++17", "-O3", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
DEFAULT_ARCHITECTURES = "8.0;9.0a"


class Recipe(NamedTuple):
    """How to build a library: `compile -c source -o object` for every source, then `link objects libraries`."""

    compile: list[str]
    link: list[str]
    libraries: list[str]
    architectures: str = ""  # for the note beside the library


def torch_folder() -> Path:
    """Where torch is, for its headers and libraries."""
    spec = importlib.util.find_spec("torch")
    if spec is None:
        raise LookupError("torch is not in the build environment (install it, then build with --no-build-isolation)")
    version = importlib.metadata.version("torch")
    if tuple(map(int, version.split(".")[:2])) < (2, 10):
        raise LookupError(f"torch {version} is older than 2.10")
    return Path(spec.origin).parent


def host_compiler() -> list[str]:
    for command in filter(None, (os.environ.get("CXX"), "g++", "clang++", "c++")):
        if shutil.which(shlex.split(command)[0]):
            return shlex.split(command)
    raise LookupError("there is no C++ compiler (CXX, g++, clang++ or c++)")


def architectures() -> list[str]:
    """Such as ["8.0", "9.0a+PTX"]."""
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST")
    if not listed:
        import torch

        capabilities = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
        listed = ";".join(f"{major}.{minor}" for major, minor in sorted(capabilities)) or DEFAULT_ARCHITECTURES
    found = re.split(r"[;,\s]+", listed.strip())
    if wrong := [a for a in found if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", a)]:
        raise LookupError(f"TORCH_CUDA_ARCH_LIST: expected entries such as 8.0 or 9.0a+PTX, got {', '.join(wrong)}")
    if old := [a for a in found if int(a.split(".")[0]) < 8]:
        raise LookupError(f"TORCH_CUDA_ARCH_LIST: the kernels need 8.0 or later, got {', '.join(old)}")
    return found


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
    targets, names = [], []
    for architecture in architectures():
        number = architecture.removesuffix("+PTX").replace(".", "")
        names.append(f"sm_{number}")
        targets += ["-gencode", f"arch=compute_{number},code=sm_{number}"]
        if architecture.endswith("+PTX"):
            targets += ["-gencode", f"arch=compute_{number},code=compute_{number}"]
    # torch built for a CPU has no libtorch_cuda: an empty library of that name stands in for it at link time
    work.mkdir(parents=True, exist_ok=True)
    empty = [*host, "-shared", "-x", "c++", os.devnull, "-Wl,-soname,libtorch_cuda.so"]
    subprocess.run([*empty, "-o", str(work / "libtorch_cuda.so")], check=True)
    flags = [*FLAGS, "-DUSE_CUDA", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-isystem", str(torch / "include")]
    libraries = [f"-L{torch / 'lib'}", f"-L{work}", "-Xlinker", "--no-as-needed", "-ltorch_cuda", "-ltorch_cpu"]
    compiler = [nvcc, "-ccbin", shutil.which(host[0])]
    return Recipe([*compiler, *flags, *targets], [*compiler, "-shared"], libraries, ", ".join(names))


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
        try:
            if not sys.platform.startswith("linux"):
                raise LookupError(f"it is built on Linux, this is {sys.platform}")
            self.build(RECIPES[extension.name](work), extension, library, work)
        except (LookupError, subprocess.CalledProcessError) as reason:
            library.unlink(missing_ok=True)
            print(f"instantas: left out {library.name}: {reason}", file=sys.stderr)

    def build(self, recipe, extension, library, work):
        inputs = [__file__, *extension.sources, *extension.depends]
        stamp = shlex.join([*recipe.compile, *recipe.link, *recipe.libraries])
        made = work / "command"
        fresh = library.exists() and made.exists() and made.read_text() == stamp
        if fresh and not self.force and library.stat().st_mtime > max(os.path.getmtime(name) for name in inputs):
            return
        work.mkdir(parents=True, exist_ok=True)
        library.parent.mkdir(parents=True, exist_ok=True)
        objects = {source: str(work / Path(source).with_suffix(".o").name) for source in extension.sources}

        def compile_one(source):
            subprocess.run([*recipe.compile, "-c", source, "-o", objects[source]], check=True)

        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as pool:
            list(pool.map(compile_one, extension.sources))
        command = [*recipe.link, *objects.values(), *recipe.libraries, "-o", str(library)]
        subprocess.run(command, check=True)
        if recipe.architectures:
            library.with_suffix(".arch").write_text(recipe.architectures + "\n")
        made.write_text(stamp)
        print(f"instantas: built {library.name}", file=sys.stderr)

    def copy_extensions_to_source(self):
        super().copy_extensions_to_source()
        for note in Path(self.build_lib).glob("instantas/*.arch"):
            self.copy_file(str(note), str(Path("instantas", note.name)))


class Wheel(bdist_wheel):
    """Libraries depend on the platform, not on the version of Python; without one the wheel serves every platform."""

    def get_tag(self):
        build = self.get_finalized_command("build")
        if any(Path(build.build_lib).glob("instantas/*.so")):
            return "py3", "none", super().get_tag()[2]
        self.root_is_pure = True
        return "py3", "none", "any"


# `kernels/` at the top level has no __init__.py, so that it never shadows Hugging Face's `kernels` package; a relative
# symlink instantas/kernels makes it importable as `instantas.kernels` in a checkout, an editable install, a wheel.
setup(
    packages=["instantas.kernels", *find_packages(include=["instantas", "instantas.*"])],
    package_data={
        "instantas": ["py.typed"],
        "instantas.demo": ["README.md", "model/*.json", "model/*/*"],
        "instantas.testing": ["emulation/*"],
    },
    include_package_data=False,
    ext_modules=[library(*item) for item in zip(RECIPES, ("*.cpp", "*.cu")) if any(SOURCES.glob(item[1]))],
    cmdclass={"build_ext": BuildLibraries, "bdist_wheel": Wheel},
)

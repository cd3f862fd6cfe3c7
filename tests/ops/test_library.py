"""Compiled libraries that must not be loaded, GPUs that they do not serve, and what then runs in their place."""

import dataclasses
import shutil
import subprocess
import warnings
from unittest import mock

import pytest
import torch

from instantas import ops
from instantas.ops import backend, library, stamp
from instantas.ops.backend import BACKENDS
from instantas.ops.schemas import SCHEMAS

compiler = next(filter(shutil.which, ("g++", "clang++", "c++")), None)
compiled = pytest.mark.skipif(compiler is None, reason="there is no C++ compiler")


# Before loading: the note beside the library


@pytest.fixture
def probe(tmp_path):
    """A file with the note that setup.py would write beside it."""
    file = tmp_path / "libprobe.so"
    file.write_bytes(bytes(range(256)) * 40)
    note(file)
    return file


def note(file, **other):
    rightful = dict(version="1.2.3", sources=stamp.fingerprint(), torch="2.10", digest=stamp.digest(file))
    stamp.write(file, stamp.Note(**rightful | other))


def unfit(file, version="1.2.3", torch="2.13.0+cpu"):
    return stamp.unfit(file, version, torch)


def test_a_library_with_its_note_is_fit(probe):
    assert unfit(probe) is None and unfit(probe, torch="2.10.0a0+git1234567") is None


@pytest.mark.parametrize(
    "damage",
    [lambda b: b[:-1], lambda b: b[: len(b) // 2], lambda b: b"", lambda b: bytes(len(b)), lambda b: b + b"\0"],
    ids=["a byte short", "half", "empty", "zeros", "a byte long"],
)
def test_a_damaged_library(probe, damage):
    probe.write_bytes(damage(probe.read_bytes()))
    assert unfit(probe) == "libprobe.so is damaged, or not the file that was built"


@pytest.mark.parametrize("version", ["1.2.2", "1.2.3.dev0", "2.0"])
def test_a_library_of_another_version(probe, version):
    note(probe, version=version)
    assert unfit(probe) == f"libprobe.so was built for instantas {version}, this is 1.2.3"


def test_a_library_of_other_sources(probe):
    note(probe, sources="0" * 64)
    assert unfit(probe) == "libprobe.so was built from other sources than csrc/ and ops/schemas.py have now"
    with mock.patch.object(stamp, "CHECKOUT", False):  # an installed wheel has no sources to compare
        assert unfit(probe) is None


@pytest.mark.parametrize("version", ["2.9.1+cu128", "1.13"])
def test_a_torch_that_is_too_old(probe, version):
    assert unfit(probe, torch=version) == f"libprobe.so needs torch 2.10 or later, this is {version}"


@pytest.mark.parametrize("text", [None, "", "sm_80, sm_90a\n", "[]", "{}", '{"version": "1.2.3", "colour": "red"}'])
def test_a_library_without_a_note_that_can_be_read(probe, text):
    stamp.note_path(probe).unlink()
    if text is not None:
        stamp.note_path(probe).write_text(text)
    assert unfit(probe) == "libprobe.so is of unknown origin: libprobe.json beside it is missing or unreadable"


def test_no_library(probe):
    probe.unlink()
    assert unfit(probe) == "not built: libprobe.so is not there"
    stamp.write(probe, stamp.Note("1.2.3", left_out="there is no nvcc in PATH"))
    assert unfit(probe) == "not built: there is no nvcc in PATH"


def test_every_source_counts(tmp_path):
    (tmp_path / "csrc").mkdir()
    (tmp_path / "ops").mkdir()
    files = [tmp_path / name for name in ("csrc/a.cpp", "csrc/b.cu", "csrc/c.h", "csrc/d.cuh", "ops/schemas.py")]
    for file in files:
        file.write_text("1")
    with mock.patch.multiple(stamp, SOURCES=tmp_path / "csrc", PACKAGE=tmp_path):
        seen = [stamp.fingerprint()]
        (tmp_path / "csrc" / ".a.cpp.swp").write_text("an editor's")
        assert stamp.fingerprint() == seen[0]
        for file in files:
            file.write_text("2")
            seen.append(stamp.fingerprint())
        files[0].rename(tmp_path / "csrc" / "e.cpp")
        seen.append(stamp.fingerprint())
    assert len(set(seen)) == len(seen) == 7


def test_what_mends_it_is_said():
    made = library.Library(stamp.PACKAGE / "libnothing.so", "instantas_nothing", "CPU")
    command = f"pip install --no-build-isolation --no-deps -e {stamp.PACKAGE.parent}"
    assert made.unfit() == f"not built: libnothing.so is not there; to build it: {command}"
    with mock.patch("sys.platform", "darwin"):
        assert made.unfit() == "not built: libnothing.so is not there"
    with mock.patch.object(stamp, "CHECKOUT", False):
        assert stamp.remedy() == "pip install --no-build-isolation --no-deps . (in the checkout)"


# After loading: operators


def loaded(tmp_path, source, namespace, **options):
    made = library.Library(tmp_path / f"lib{namespace}.so", namespace, "CPU", **options)
    (tmp_path / "source.cpp").write_text(source)
    subprocess.run([compiler, "-shared", "-fPIC", tmp_path / "source.cpp", "-o", made.path], check=True)
    return made.load()


@compiled
def test_a_library_without_the_operators(tmp_path):
    assert loaded(tmp_path, "", "instantas_none") == f"libinstantas_none.so lacks {', '.join(SCHEMAS)}"


@compiled
def test_a_library_with_a_part_of_the_operators(tmp_path):
    python = dict.fromkeys(set(SCHEMAS) - {"guided_step"}, lambda *arguments: None)
    state = loaded(tmp_path, "int x;", "instantas_part", python=python)
    assert state == "libinstantas_part.so lacks guided_step"


@compiled
def test_a_library_that_needs_another(tmp_path):
    state = loaded(tmp_path, "void far(); void near() { far(); } struct S { S() { near(); } } s;", "instantas_far")
    assert state.startswith("libinstantas_far.so does not load: ") and "undefined symbol" in state
    assert "\n" not in state


def test_a_file_that_is_no_library(tmp_path):
    made = library.Library(tmp_path / "libtext.so", "instantas_text", "CPU")
    made.path.write_text("version https://example.org/pointer")
    assert made.load().startswith("libtext.so does not load: ") and "\n" not in made.load()


# GPUs


@pytest.mark.parametrize(
    "architectures, runs, not_",
    [
        (["sm_80"], [(8, 0), (8, 6), (8, 9)], [(7, 5), (9, 0), (12, 0)]),
        (["sm_86"], [(8, 6), (8, 9)], [(8, 0), (9, 0)]),
        (["sm_90a"], [(9, 0)], [(8, 9), (10, 0), (9, 1)]),
        (["sm_100f"], [(10, 0), (10, 3)], [(9, 0), (12, 0)]),
        (["compute_80"], [(8, 0), (9, 0), (10, 0), (12, 1)], [(7, 5)]),
        (["compute_90a"], [(9, 0)], [(10, 0), (8, 0)]),
        (["compute_100f"], [(10, 0), (10, 3)], [(11, 0), (12, 0)]),
        (["sm_80", "compute_80", "sm_90a"], [(8, 0), (8, 9), (9, 0), (10, 3), (12, 0)], [(7, 0), (7, 5)]),
        (["sm_80", "sm_90a"], [(8, 7), (9, 0)], [(10, 0)]),
        ([], [], [(8, 0), (9, 0)]),
        (["80", "all"], [], [(8, 0)]),
    ],
)
def test_which_gpus_an_architecture_serves(architectures, runs, not_):
    assert all(stamp.serves(architectures, capability) for capability in runs)
    assert not any(stamp.serves(architectures, capability) for capability in not_)


@pytest.fixture
def gpus():
    """Three GPUs and a library that serves the second, as far as capabilities are asked."""
    capabilities = [(7, 5), (9, 0), (12, 0)]
    with (
        mock.patch.multiple(library.CUDA, architectures=("sm_80", "sm_90a"), unfit=lambda: None, load=lambda: None),
        mock.patch.multiple(
            torch.cuda,
            is_available=lambda: True,
            device_count=lambda: len(capabilities),
            get_device_capability=lambda device: capabilities[torch.device(device).index],
        ),
    ):
        yield capabilities


def cuda(index):
    return torch.device("cuda", index)


def test_a_gpu_that_the_library_does_not_serve_falls_to_triton(gpus):
    triton = dataclasses.replace(BACKENDS["triton"], devices=("cuda",), absent=lambda: None, default=True)
    able = dataclasses.replace(BACKENDS["cuda"], absent=lambda: None)
    with mock.patch.dict(BACKENDS, triton=triton, cuda=able), warnings.catch_warnings():
        warnings.simplefilter("error")
        names = [backend.default.__wrapped__(cuda(i), torch.float16).name for i in range(3)]
        assert names == ["triton", "cuda", "triton"]
        assert backend.default.__wrapped__(cuda(1), torch.float64).name == "reference"


def test_the_reason_names_the_gpu_and_what_was_built(gpus):
    old, served, new = (BACKENDS["cuda"].unserved(cuda(i), torch.float32) for i in range(3))
    assert served is None
    assert old == "built for sm_80, sm_90a, which cuda:0 of sm_75 does not run, and the kernels need sm_80 or later"
    assert new.startswith("built for sm_80, sm_90a, which cuda:2 of sm_120 does not run; to build it: pip install")


def test_the_library_is_absent_where_it_serves_no_gpu(gpus):
    assert backend._cuda_absent.__wrapped__() is None
    gpus[1] = (10, 0)
    assert "which cuda:0 of sm_75 does not run" in backend._cuda_absent.__wrapped__()
    with mock.patch.object(library.CUDA, "architectures", ("sm_80", "compute_80")):
        assert backend._cuda_absent.__wrapped__() is None


# What runs in its place


@pytest.fixture
def without_cpp():
    """The host library is absent, and nothing was warned of yet."""
    backend._warn_slow.cache_clear()
    with mock.patch.dict(BACKENDS, cpp=dataclasses.replace(BACKENDS["cpp"], absent=lambda: "not built: no compiler")):
        yield
    backend._warn_slow.cache_clear()


CPU = torch.device("cpu")


def test_one_warning_where_the_reference_runs_for_want_of_a_library(without_cpp):
    with pytest.warns(RuntimeWarning) as said:
        for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float32):
            assert backend.default.__wrapped__(CPU, dtype).name == "reference"
    (line,) = (str(warning.message) for warning in said)
    assert "operations on cpu run in plain PyTorch" in line and line.endswith("cpp: not built: no compiler")


def test_no_warning_where_nothing_is_wanting(without_cpp):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with ops.use_backend("reference"):  # asked for
            backend.implementation("gather_windows", torch.zeros(1))
        assert backend.default.__wrapped__(torch.device("mps"), torch.float32).name == "reference"  # nothing else there
        here = dataclasses.replace(BACKENDS["cpp"], absent=lambda: None)
        with mock.patch.dict(BACKENDS, cpp=here):
            assert backend.default.__wrapped__(CPU, torch.float64).name == "cpp"


def test_a_record_of_ones_own_can_be_forced():
    mine = dataclasses.replace(BACKENDS["reference"], name="mine", dtypes=(torch.float32,))
    with ops.use_backend(mine):
        assert backend.implementation("gather_windows", torch.zeros(1))
        with pytest.raises(
            RuntimeError, match="^backend 'mine' cannot run gather_windows: it serves float32, got float"
        ):
            backend.implementation("gather_windows", torch.zeros(1, dtype=torch.float64))
    with pytest.raises(RuntimeError, match="^backend 'mine' cannot run here: too tired$"):
        with ops.use_backend(dataclasses.replace(mine, absent=lambda: "too tired")):
            pass

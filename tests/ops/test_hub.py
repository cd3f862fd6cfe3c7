"""The copy of the operations for Hugging Face's `kernels`: loaded beside the package, with operators of its own."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from instantas import WindowPlan, ops
from instantas.ops.registration import NAMESPACE

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.skipif(sys.version_info < (3, 11), reason="setup.py hub reads build.toml with tomllib"),
    pytest.mark.filterwarnings("ignore:instantas. operations on .* run in plain PyTorch:RuntimeWarning"),
]


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """What `make hub` lays out, by the Python that runs the tests."""
    folder = tmp_path_factory.mktemp("build")
    subprocess.run([sys.executable, "setup.py", "-q", "hub", "--output", str(folder)], cwd=ROOT, check=True)
    return folder


def loaded(build, name):
    """The copy as a package of that name, loaded as `kernels` does under the id of a build."""
    variant = build / "torch-universal"
    spec = importlib.util.spec_from_file_location(name, variant / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def copy(build):
    return loaded(build, "a_copy")


def same(copy):
    """Whether its operations give what ours do, with derivatives."""
    assert not copy.ops.__name__.startswith("instantas")
    canvas = torch.randn(2, 3, 12, 20, generator=torch.Generator().manual_seed(0))
    results = []
    for their_ops, plan_kind in ((copy, copy.WindowPlan), (ops, WindowPlan)):
        x = canvas.clone().requires_grad_()
        plan = plan_kind.minimum_coverage(12, 20, 8)
        with their_ops.use_backend("reference"):
            windows = their_ops.gather_windows(x, plan)
            merged = their_ops.scatter_windows(windows, plan)
            stepped, _ = their_ops.guided_step(windows, windows * 0.5, x, plan, (0.5, 2.0), 3.0)
            query = windows[:, 0].flatten(2).transpose(1, 2)[:, :, None]
            weights = torch.ones(2, 1, 64)
            ids = torch.zeros(2, 1, dtype=torch.int32)
            attended = their_ops.regional_attention(query, query.detach(), query.detach(), ids, weights)
            (merged.square().sum() + stepped.sum() + attended.sum()).backward()
        results.append((windows, merged, stepped, attended, x.grad))
    return all(map(torch.equal, *results))


def test_a_copy_beside_the_package_has_operators_of_its_own(copy):
    namespace = copy.ops.registration.NAMESPACE
    assert NAMESPACE == "instantas" and namespace == "a_copy"
    assert same(copy)
    assert getattr(torch.ops, namespace).gather_windows.default is not torch.ops.instantas.gather_windows.default
    assert copy.backends()["cpp"].startswith("not built") and copy.backends()["reference"] == "available"


def test_several_copies_beside_each_other(build, copy):
    assert same(loaded(build, "another_copy")) and same(copy)


def test_a_copy_in_a_compiled_graph(copy):
    plan = copy.WindowPlan.minimum_coverage(8, 12, 8)
    there_and_back = lambda x: copy.scatter_windows(copy.gather_windows(x, plan), plan) * 2  # noqa: E731
    run = torch.compile(there_and_back, backend="aot_eager", fullgraph=True)
    x = torch.randn(1, 2, 8, 12, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(run(x), 2 * x)


def test_the_copy_imports_nothing_of_an_installed_package(build):
    """In a process that knows no instantas, from another folder."""
    variant = build / "torch-universal"
    code = (
        "import importlib.util, sys, warnings; warnings.simplefilter('ignore')\n"
        f"spec = importlib.util.spec_from_file_location('copy_of_it', {str(variant / '__init__.py')!r})\n"
        "copy = importlib.util.module_from_spec(spec); sys.modules['copy_of_it'] = copy\n"
        "spec.loader.exec_module(copy)\n"
        "import torch; plan = copy.WindowPlan.minimum_coverage(8, 12, 8)\n"
        "assert copy.gather_windows(torch.ones(1, 1, 8, 12), plan).shape == (1, 2, 1, 8, 8)\n"
        "from copy_of_it.ops.backend import _triton_functions\n"
        "_triton_functions() if importlib.util.find_spec('triton') else None\n"
        "print(sorted(name for name in sys.modules if name.split('.')[0] in ('instantas', 'diffusers', 'kernels')))"
    )
    finished = subprocess.run([sys.executable, "-c", code], cwd=build, capture_output=True, text=True, check=True)
    assert finished.stdout.strip() == "[]"


def test_what_the_hub_is_told(build):
    told = json.loads((build / "torch-universal" / "metadata.json").read_text())
    assert told["name"] == "instantas" and re.fullmatch("_instantas_universal_[0-9a-f]{8}", told["id"])
    assert told["license"] == "MIT" and told["python-depends"] == [] and told["version"] >= 1


def test_hugging_faces_kernels_load_it(build):
    kernels = pytest.importorskip("kernels")
    if not hasattr(kernels, "get_local_kernel"):
        pytest.skip("Hugging Face's kernels is not installed: what is found is this repository's folder")
    copy = kernels.get_local_kernel(build)
    assert copy.ops.registration.NAMESPACE.startswith("_instantas_universal_") and same(copy)

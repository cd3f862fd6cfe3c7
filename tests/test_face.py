"""The face of the package: its names, when they are imported, and that they are typed."""

import subprocess
import sys

import pytest

import instantas

HEAVY = {"diffusers", "transformers", "accelerate", "PIL", "click", "matplotlib"}


def loaded(statement: str) -> set[str]:
    """The modules of a fresh process after a statement."""
    code = f"import sys; {statement}; print(*sys.modules)"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


def test_the_names_of_the_face_are_there():
    from instantas import (
        InstantASPipeline,
        Region,
        RegionMap,
        Windowed,
        WindowPlan,
        demo,
        ops,
        regional_prompts,
        sample,
        windowed,
    )

    assert InstantASPipeline.__name__ == "InstantASPipeline" and WindowPlan.minimum_coverage(64, 256).count == 4
    assert callable(sample) and callable(regional_prompts) and ops.backends() and demo.PROMPTS
    assert callable(windowed) and Windowed(8).window == (8, 8)
    assert {Region.__module__, RegionMap.__module__} == {"instantas.regions"}


def test_every_name_is_listed_and_can_be_had():
    assert set(instantas.__all__) == {"__version__", *instantas._HOMES} and set(instantas.__all__) <= set(
        dir(instantas)
    )
    assert all(getattr(instantas, name) is not None for name in instantas.__all__)


@pytest.mark.parametrize("name", ["nothing", "Pipeline", "_private"])
def test_another_name_is_an_attribute_error(name):
    with pytest.raises(AttributeError, match=f"^module 'instantas' has no attribute '{name}'$"):
        getattr(instantas, name)


@pytest.mark.parametrize(
    "statement", ["import instantas", "import instantas.ops", "from instantas import sample, Region"]
)
def test_what_needs_torch_alone_loads_nothing_else(statement):
    assert not loaded(statement) & HEAVY


def test_the_package_itself_loads_nothing_of_its_own():
    assert {name for name in loaded("import instantas") if name.startswith("instantas")} == {"instantas"}

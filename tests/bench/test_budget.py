"""`python -m bench.budget`: what it prints and when it fails."""

import pytest

from bench import budget
from instantas.testing import faults, oracle

SMALL = [(1, 4, 1, 128, 1, 16, 4), (1, 2, 1, 256, 1, 20, 1)]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(oracle, "ATTENTION", SMALL)
    monkeypatch.setattr(faults, "FAULTS", {name: faults.FAULTS[name] for name in ("a token dropped", "a row shifted")})


@pytest.mark.skipif("cpp" not in oracle.BACKENDS, reason="the host library is not built")
def test_counts(capsys):
    assert budget.main(["--seeds", "2", "--backends", "cpp"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:4] == [
        "cpp, float32: 8 cases, 0 failures",
        "cpp, float16: 8 cases, 0 failures",
        "cpp, bfloat16: 8 cases, 0 failures",
        "cpp, float32, pooled: 4 cases, 0 failures",
    ]
    assert len(lines) == 4 + 2 * 2 * 3 and all(line.endswith(": caught in 8 of 8 cases") for line in lines[4:])


def test_a_fault_that_is_missed_fails_the_run(capsys, monkeypatch):
    monkeypatch.setitem(faults.FAULTS, "a token dropped", faults.Fault())
    assert budget.main(["--seeds", "1", "--backends"]) == 1
    assert "a token dropped in regional_attention, float16: caught in 0 of 4 cases" in capsys.readouterr().out


def test_a_wrong_backend_fails_the_run(capsys):
    backend = faults.planted("a row shifted")
    assert not budget.holds("stand-in", budget.grid(backend, oracle.DTYPES[0], 1))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "stand-in: 4 cases, 4 failures" and len(lines) == 5
    assert lines[1].startswith("    (1, 4, 1, 128, 1, 16, 4), blend, seed 0: AssertionError: result 0 of")

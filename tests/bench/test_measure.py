"""The measuring: nobody gets a speed before the results agree, and the rivals do the same work as the operations."""

import itertools
import json
import os

import pytest
import torch

from instantas.bench import cases, measure, rivals
from instantas.bench.measure import Comparison, DisagreementError, Timing, compare
from instantas.cli import main
from instantas.ops import reference
from instantas.windows import WindowPlan

PLANS = {
    "no overlap": WindowPlan.minimum_coverage(16, 24, 8),
    "uneven": WindowPlan.minimum_coverage(13, 21, 8),
    "strided": WindowPlan.strided(16, 24, 8, 4),
    "wrapping": WindowPlan.minimum_coverage(16, 20, 8, wrap=(False, True), shift=(0, 3)),
}
FORMS = {
    "no overlap": {"index", "loop over views", "reshape"},
    "uneven": {"index", "loop over views"},
    "strided": {"index", "loop over views"},
    "wrapping": {"index"},
}


@pytest.fixture
def small_cache(monkeypatch):
    monkeypatch.setattr(measure, "cache_bytes", lambda device: 1 << 10)


def square(contenders, dtype=torch.float32, **options):
    """Compare functions that should square their argument."""
    options = dict(bytes=8, seconds=0, laps=(2, 2)) | options
    return compare("squares", lambda g: (torch.rand(50, generator=g).to(dtype),), contenders, torch.square, **options)


def counting(function):
    def run(*arguments):
        run.calls += 1
        return function(*arguments)

    run.calls = 0
    return run


@pytest.mark.parametrize(
    "broken",
    {
        "a little off": lambda x: x * x * (1 + 1e-5),
        "one element": lambda x: torch.where(torch.arange(len(x)) == 7, 0, x * x),
        "not a number": lambda x: x * x * torch.nan,
        "another shape": lambda x: (x * x)[:-1],
        "a second result": lambda x: (x * x, x),
    }.items(),
    ids=lambda item: item[0],
)
def test_a_contender_that_disagrees_gets_no_speed_and_is_never_timed(broken, small_cache):
    right, wrong = counting(torch.square), counting(broken[1])
    with pytest.raises(DisagreementError, match="the broken one"):
        square({"the right one": right, "the broken one": wrong})
    assert (right.calls, wrong.calls) == (1, 1)
    with pytest.raises(DisagreementError, match="the broken one"):
        square({"the right one": right}, rivals={"the broken one": wrong})


class CompilationError(Exception):
    """As compilers of kernels have them: no RuntimeError."""


def test_a_contender_that_fails_in_any_way_is_left_out_where_that_is_asked_for(small_cache):
    def broken(x):
        raise CompilationError("out of registers\nand more lines")

    def tired(x):
        tired.calls += 1
        if tired.calls > 1:
            raise MemoryError("at the second call")
        return x * x

    tired.calls, failed, running = 0, [], []
    contenders = {"broken": broken, "wrong": torch.cos, "tired": tired, "right": torch.square}
    result = square(contenders, failed=lambda name, error: failed.append((name, type(error))), running=running.append)
    assert [t.name for t in result.timings] == ["right"] and result.timings[0].ratio == 1
    assert failed == [("broken", CompilationError), ("wrong", DisagreementError), ("tired", MemoryError)]
    assert result.absent["broken"] == "CompilationError: out of registers"
    assert result.absent["tired"] == "MemoryError: at the second call" and result.absent["wrong"].startswith("Disagree")
    assert running[::2] == ["broken", "wrong", "tired", "right", "tired", "right"] and set(running[1::2]) == {""}
    with pytest.raises(CompilationError):
        square(contenders)
    with pytest.raises(DisagreementError, match="broken: CompilationError: out of registers; wrong: "):
        square({"broken": broken, "wrong": torch.cos}, failed=lambda name, error: None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rivals_may_round_on_the_way_and_contenders_may_not(dtype, small_cache):
    def rounds(x):  # four units in the last place of the largest result
        return x * x + 4 * torch.finfo(dtype).eps

    assert square({"square": torch.square}, dtype, rivals={"rounds": rounds}).timing("rounds").error > 0
    with pytest.raises(DisagreementError, match="rounds"):
        square({"square": torch.square, "rounds": rounds}, dtype)


def test_each_contender_has_a_definition_of_its_own_where_they_do_different_work(small_cache):
    runs = {"square": torch.square, "cube": lambda x: x**3}
    exact = {"square": torch.square, "cube": lambda x: x**3}
    options = dict(bytes=8, seconds=0, laps=(2, 2))
    assert len(compare("powers", lambda g: (torch.rand(9, generator=g),), runs, exact, **options).timings) == 2
    with pytest.raises(DisagreementError, match="cube"):
        compare("powers", lambda g: (torch.rand(9, generator=g),), runs, torch.square, **options)


def test_contenders_run_in_turn_on_inputs_that_change(small_cache):
    order, given = [], []

    def noting(name):
        def run(x):
            order.append(name)
            given.append(x.data_ptr())
            return x * x

        return run

    result = square({"a": noting("a"), "b": noting("b")}, laps=(4, 4))
    laps = order[2:]  # after the check of both
    assert len(laps) == 2 * (1 + 4)  # the first lap warms up
    assert all(set(laps[i : i + 2]) == {"a", "b"} for i in range(0, len(laps), 2))
    assert laps[2:4] != laps[4:6]  # nobody always goes first
    assert len(set(given[2:])) == 10  # 2 kB of inputs for a cache of 1 kB, 200 bytes each
    assert [t.runs for t in result.timings] == [4, 4]


def test_ratio_is_the_median_over_the_laps_of_times_in_the_same_lap(monkeypatch, small_cache):
    script = {"a": itertools.chain([9], [1, 2, 4]), "b": itertools.chain([9], [3, 4, 40]), "copy": itertools.repeat(2)}
    monkeypatch.setattr(measure, "_clock", lambda device: lambda name, run, arguments: next(script[name]))
    result = square({"a": torch.square, "b": torch.square}, laps=(3, 3), seconds=1e9)
    a, b = result.timings
    assert (a.median, a.ratio, b.median, b.ratio) == (2, 1, 4, 3)
    assert (a.low, a.high) == (1.5, 3)


def test_roofline_is_the_slower_of_moving_and_computing():
    timings = (Timing("ours", 0.5, 0.4, 0.6, 9, 1.0, 0.0, 0.0), Timing("theirs", 2.0, 2.0, 2.0, 9, 4.0, 0.0, 0.0))
    moving = Comparison("t", "cpu", "float32", 100, 10, 1000.0, 1000.0, timings, {"other": "not here"})
    computing = Comparison("t", "cpu", "float32", 10, 200, 1000.0, 1000.0, timings)
    assert (moving.floor, computing.floor) == (0.1, 0.2)
    assert moving.share("ours") == 0.2 and computing.share("theirs") == 0.1
    assert "20%" in moving.table() and "4.00" in moving.table() and "other: not here" in moving.table()
    assert json.loads(json.dumps(moving.as_dict()))["timings"][0]["share"] == 0.2


def test_progress_rises_to_the_end(small_cache):
    seen = []
    square({"square": torch.square}, laps=(3, 3), seconds=1e9, progress=seen.append)
    assert seen == sorted(seen) and seen[-1] == 1


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("weighted", [False, True])
def test_rivals_do_the_same_work(name, weighted):
    plan, generator, dtype = PLANS[name], torch.Generator().manual_seed(0), torch.float64
    weight = plan.weight("gaussian") if weighted else None
    canvas = torch.randn(2, 3, plan.height, plan.width, generator=generator, dtype=dtype)
    cond, uncond = torch.randn(2, 2, plan.count, 3, *plan.window, generator=generator, dtype=dtype)
    history = torch.randn(1, *canvas.shape, generator=generator, dtype=dtype)

    found, absent = rivals.gather(plan, "cpu")
    assert FORMS[name] <= set(found) and not set(found) & set(absent)
    for run in found.values():
        torch.testing.assert_close(run(canvas), reference.gather_windows(canvas, plan), rtol=0, atol=0)

    scatters, _ = rivals.scatter(plan, weight, "cpu", dtype)
    steps, _ = rivals.step(plan, weight, (0.9, -0.2, 0.1), 7.5, (0.3, 0.9), "cpu", dtype)
    assert FORMS[name] <= set(scatters)
    weight = None if weight is None else weight.double()
    exact = reference.scatter_windows(cond, plan, weight)
    for run in scatters.values():  # the sum of the weights is float32 there
        torch.testing.assert_close(run(cond), exact, rtol=1e-5, atol=1e-5)

    options = dict(weight=weight, history=history, keep=(0.3, 0.9))
    sample, kept = reference.guided_step(cond, uncond, canvas, plan, (0.9, -0.2, 0.1), 7.5, **options)
    for run in steps.values():
        torch.testing.assert_close(run(cond, uncond, canvas, history), (sample, kept[0]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("regions", [1, 3])
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("mode", ["blend", "joint"])
def test_attention_rivals_do_the_same_work(regions, soft, mode):
    ids, weights = cases.stripes(regions, 2, 16, soft, "cpu")
    generator = torch.Generator().manual_seed(0)
    tensors = cases.bank_inputs(regions, 2, 16, 2, 8, 5, "cpu", torch.float32)(generator)
    found, _ = rivals.attention(ids, weights, 5, torch.float32, mode=mode)
    assert found or (regions == 1 and soft and mode == "joint")
    exact = reference.regional_attention(*tensors, ids, weights, mode=mode)
    for run in found.values():
        torch.testing.assert_close(run(*tensors), exact, rtol=1e-5, atol=1e-5)


def tiny_cases(device, dtype, quick):
    effort = dict(device=device, dtype=dtype, seconds=0, laps=(2, 2))
    tiny = [lambda **o: cases.gather(PLANS["strided"], **effort, **o)]
    tiny += [lambda **o: cases.scatter(PLANS["strided"], weight="linear", **effort, **o)]
    tiny += [lambda **o: cases.step(PLANS["no overlap"], history=1, **effort, **o)]
    return tiny + [lambda **o: cases.attention(2, windows=1, queries=64, heads=1, depth=8, **effort, **o)]


def test_declared_bytes_are_those_of_inputs_and_results(small_cache):
    plan = PLANS["strided"]
    canvas, windows = 4 * 3 * 16 * 24, 4 * 3 * plan.count * 64
    effort = dict(channels=3, seconds=0, laps=(2, 2))
    assert cases.gather(plan, **effort).bytes == canvas + windows
    assert cases.scatter(plan, weight="linear", **effort).bytes == canvas + windows + 4 * 64
    assert cases.step(plan, history=1, **effort).bytes == 2 * windows + 4 * canvas
    attention = cases.attention(2, windows=1, queries=64, heads=3, depth=8, tokens=5, seconds=0, laps=(2, 2))
    assert attention.bytes == 4 * (2 * 64 * 24 + 2 * 2 * 5 * 24 + 2 * 64 + 2)
    assert attention.flops == 4 * 64 * 24 * 5  # hard regions: one prompt a query


def test_command_prints_a_table_for_every_operation(monkeypatch, small_cache, capsys):
    monkeypatch.setattr(cases, "small", tiny_cases)
    main(["bench", "--quick", "--device", "cpu"])
    out = capsys.readouterr().out
    for operation in ("gather_windows", "scatter_windows", "guided_step", "regional_attention"):
        assert operation in out
    assert "instantas reference" in out and "SDPA, dense mask" in out and f"torch {torch.__version__}" in out


def test_command_prints_no_speed_when_a_rival_is_broken(monkeypatch, small_cache, capsys):
    monkeypatch.setattr(cases, "small", tiny_cases)
    monkeypatch.setattr(rivals, "gather", lambda *_, **__: ({"index": lambda canvas: canvas}, {}))
    with pytest.raises(SystemExit) as stop:
        main(["bench", "--device", "cpu"])
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and "index: expected" in err and "Traceback" not in err
    assert "ms" not in out and "GB/s" not in out


def test_the_small_cases_cover_every_operation():
    operations = {case.func for case in cases.small(quick=True)}
    assert operations == {cases.gather, cases.scatter, cases.step, cases.attention}


def test_facts_of_the_machine():
    facts = measure.machine()
    assert {"device", "torch", "python", "threads", "date"} <= set(facts)
    assert measure.cache_bytes(torch.device("cpu")) > 1 << 18


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the system does not reset peaks")
def test_peak_memory_is_what_was_held_at_once():
    size = 1 << 26

    def one_after_the_other():
        for _ in range(3):
            torch.ones(size // 4)

    def together():
        return [torch.ones(size // 4) for _ in range(3)]

    assert 0.9 * size < measure.peak_memory(one_after_the_other) < 1.2 * size
    assert 2.9 * size < measure.peak_memory(together) < 3.2 * size
    assert 0.9 * size < measure.peak_memory(one_after_the_other) < 1.2 * size  # earlier peaks are forgotten


def test_results_are_kept_beside_those_of_other_runs(tmp_path):
    measure.keep(tmp_path / "r.json", {"a": {"seconds": 1}, "b": {"seconds": 2}})
    measure.keep(tmp_path / "r.json", {"b": {"seconds": 3}})
    kept = json.loads((tmp_path / "r.json").read_text())
    assert (kept["a"]["seconds"], kept["b"]["seconds"]) == (1, 3)
    assert kept["a"]["machine"]["torch"] == torch.__version__

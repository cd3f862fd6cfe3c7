"""The whole runs that are compared: they agree where they should, are counted rightly, and refused if they differ."""

import json
import time

import pytest
import torch
from diffusers.utils import logging

from bench import end_to_end, methods, modes, report  # noqa: E402
from instantas.bench.measure import DisagreementError  # noqa: E402
from instantas.testing import recorded

logging.set_verbosity_error()


@pytest.fixture(scope="module")
def tiny():
    return end_to_end.model(dict(sample_size=64, **end_to_end.TINY))


def test_methods_that_should_give_the_same_do(tiny):
    found = methods.disagreements(tiny, steps=2)
    assert len(found) == 3 and max(found.values()) < end_to_end.AGREE


def test_no_speed_where_a_method_does_other_work(monkeypatch):
    whole = methods.loop_over_views
    monkeypatch.setattr(methods, "loop_over_views", lambda *given: 1.001 * whole(*given))
    with pytest.raises(DisagreementError, match="tiles.*no speed given"):
        end_to_end.check()


@pytest.mark.parametrize(
    "name, prompts, samples",
    [("instantas", 1, 8), ("instantas", 2, 8), ("cyclic shift", 1, 8), ("tiles, overlap 8", 1, 12)],
)
def test_samples_are_counted_at_the_network(tiny, name, prompts, samples):
    beside = end_to_end.bare(tiny.pipe.unet)
    result = end_to_end.run(name, tiny, (512, 1024), end_to_end.PROMPTS[:prompts], 2, time.perf_counter, beside)
    assert result["samples"] == samples  # with and without the prompt, two steps, two or three windows
    assert 0 < result["network"] < result["seconds"] and result["bare"] > 0
    assert not tiny.pipe.unet._forward_hooks and not tiny.pipe.unet._forward_pre_hooks


def test_the_bare_network_has_the_same_weights_and_its_own_processors(tiny):
    other = end_to_end.bare(tiny.pipe.unet)
    assert all(a is b for a, b in zip(other.parameters(), tiny.pipe.unet.parameters()))
    assert not set(map(id, other.modules())) & set(map(id, tiny.pipe.unet.modules()))


@pytest.mark.parametrize("rows, columns", [(64, 64), (64, 256), (125, 175), (70, 64)])
def test_spread_tiles_overlap_by_eight_cells_or_more(rows, columns):
    plan = methods.spread_plan(rows, columns, 64)
    for axis, length in enumerate((rows, columns)):
        places = sorted(set(plan.origins[:, axis].tolist()))
        assert all(b - a <= 64 - methods.OVERLAP for a, b in zip(places, places[1:]))
        assert len(places) == 1 or len(places) == -(-(length - 8) // 56)


def test_report_marks_what_was_not_measured():
    machine = {"device": "a", "date": "b"}
    counted = {
        f"{size}, 1 prompts, {m}": n for size, n in (("1x1", 2), ("2x2", 8)) for m in ("instantas", "MultiDiffusion")
    }
    run = dict(size="1x1", prompts=1, method="instantas", samples=2, seconds=4.0, network=3.0, peak=1 << 20)
    entries = report.runs({"1x1, 1 prompts, instantas": run | {"machine": machine}}, counted | {"machine": machine})
    seconds = {(e["size"], e["method"]): (e["seconds"], e["run"] is not None) for e in entries}
    assert seconds["1x1", "instantas"] == (4.0, True) and seconds["2x2", "instantas"] == (16.0, False)
    assert seconds["2x2", "MultiDiffusion"] == (None, False)
    text = report.end_to_end(entries)
    assert "| 4.0 |" in text and "| (16) |" in text


def test_without_results_a_device_is_not_measured(monkeypatch, tmp_path):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    assert report.report().count("Not measured.") == 2


def test_zeros_answer_as_the_network_does(tiny):
    sample = torch.zeros(1, 4, 64, 64)
    given = (sample, 1, tiny.embeds)
    assert end_to_end._zeros(*given).sample.shape == tiny.pipe.unet(*given).sample.shape
    assert end_to_end._zeros(*given, return_dict=False)[0].shape == sample.shape


def test_modes_of_whole_runs(tmp_path, monkeypatch):
    small = end_to_end.model(dict(sample_size=16, **end_to_end.TINY))
    monkeypatch.setattr(modes, "SECONDS", 0.01)
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    methods = ["instantas", "cyclic shift"]
    with recorded.recording() as made:
        some = dict(eager=methods, compiled=methods, graph=["instantas"])
        modes.measure(small, [(128, 256)], 5, tmp_path / "modes-cuda.json", some, "eager")
    found = json.loads((tmp_path / "modes-cuda.json").read_text())
    assert len(found) == 3 + 3 + 2 and len(made) == 2 + 2  # also the bare network's
    assert {r["samples"] for r in found.values()} == {20} and all(r["seconds"] > 0 < r["bare"] for r in found.values())
    assert small.pipe.unet._compiled_call_impl is None and not small.pipe.unet._forward_pre_hooks
    text = report.report()
    assert text.count("| 128x256, ") == 8 and "| 128x256, 1 prompt, instantas, graph | 20 | " in text


def test_the_pair_is_measured_in_turn(tiny, monkeypatch):
    order, whole = [], end_to_end.run

    def noted(name, *given):
        order.append(name)
        return whole(name, *given)

    monkeypatch.setattr(end_to_end, "run", noted)
    found = end_to_end.paired(tiny, (512, 1024), 2, time.perf_counter, end_to_end.bare(tiny.pipe.unet))
    assert order == ["instantas", "instantas", "cyclic shift", "cyclic shift", "instantas", "instantas"]
    for result in found.values():
        assert result["seconds"] == pytest.approx(sum(result["each"]) / 2) and result["samples"] == 8
    assert found["instantas"]["overhead"] > 0 and "overhead" not in found["cyclic shift"]

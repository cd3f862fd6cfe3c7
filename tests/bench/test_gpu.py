"""`python -m bench.gpu`, as far as a CPU can run it: its checks and comparisons, small; what befalls its workers."""

import dataclasses
import itertools
import json
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
import torch

from bench import gpu, gpu_checks, gpu_speeds
from bench.gpu_crew import LOSSES, _Course
from bench.gpu_groups import Group, Setting
from bench.gpu_report import Report
from instantas.bench.measure import Comparison, Timing
from instantas.ops.backend import BACKENDS
from instantas.testing import oracle, recorded

CPU = torch.device("cpu")
PATIENCE = 120  # seconds until something has happened that takes a few
STAND_INS = "gpu_stand_ins"
cpp = pytest.mark.skipif("cpp" not in oracle.BACKENDS, reason="the host library is not built")


def python(*arguments, **options):
    return subprocess.run([sys.executable, *arguments], cwd=oracle.ROOT, capture_output=True, text=True, **options)


@pytest.mark.skipif(oracle.GPU, reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_fails():
    done = python("-m", "bench.gpu")
    assert done.returncode == 1 and done.stderr == "bench.gpu: there is no CUDA device: nothing was measured\n"


def test_it_needs_only_torch():
    needless = "diffusers", "transformers", "pytest", "PIL"
    done = python("-c", f"import sys, bench.gpu, bench.gpu_worker; print({{*{needless}}} & {{*sys.modules}})")
    assert done.stdout == "set()\n", done.stderr


def test_groups_and_budgets_are_asked_for_by_name(tmp_path, capsys):
    names = [group.name for group in gpu.chosen(Setting())]
    assert len(names) == len(set(names)) and [g.name for g in gpu.chosen(Setting(), ["large"])] == [
        "large: triton",
        "large: cuda",
    ]
    stages = [stage for stage, _ in itertools.groupby(name.split(":")[0] for name in names)]
    assert stages == ["runs", "grid", "speeds", "sanitizer", "large", "examples"]
    with pytest.raises(SystemExit):
        gpu.main(["--device", "cpu", "--folder", str(tmp_path), "--only", "nothing"])
    assert "only: expected a part of one of runs: bridges" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        gpu.main(["--device", "cpu"])
    assert "a rehearsal needs a --folder" in capsys.readouterr().err


def test_the_parts_of_the_grid_are_all_of_it():
    parts = [[item.name for item in group.items()] for group in gpu.chosen(Setting(), ["grid"])]
    assert sorted(itertools.chain(*parts)) == sorted(name for name, _ in gpu_checks.grid(["triton", "cuda"]))
    assert {name for name, _ in gpu_checks.smoke(["cuda"])} < {name for name, _ in gpu_checks.grid(["cuda"])}


@cpp
def test_a_smoke_run(tmp_path):
    setting = Setting("cpu", ("cpp",), smoke=True)
    groups = gpu.chosen(setting, ["cpp", "gather"])
    report = gpu.run(setting, groups, tmp_path, backends={"cpp": "available"}, cores=1)
    found, text = json.loads((tmp_path / "gpu-smoke.json").read_text()), (tmp_path / "gpu-smoke.md").read_text()
    count = sum(1 for _ in gpu_checks.smoke(["cpp"]))
    assert not report.wrong_items and found["state"] == "finished" and found["backends"] == {"cpp": "available"}
    assert f"| smoke: cpp | {count} | 0 | 0 | 0 |" in text and "| speeds: gather | 2 | 0 | 0 | 0 |" in text
    assert set(found["speeds"]) == {"gather bfloat16", "gather float32"}
    assert all(kept["table"] in text for kept in found["speeds"].values())
    assert "A rehearsal on a CPU" in text and "a smoke run's sizes are too small" in text


def lines(key, **seconds):
    """What is made of a comparison in which 100 bytes are moved at 100 bytes a second."""
    timings = [
        Timing(name.replace("_", " "), t, t, t, 9, t / [*seconds.values()][0], 0, 0) for name, t in seconds.items()
    ]
    comparison = Comparison("title", "device", "bfloat16", 100, 0, 100.0, None, tuple(timings))
    return [(line.what, round(line.measured, 2), line.wanted, line.met) for line in gpu_speeds.lines(key, comparison)]


def test_the_speeds_that_the_design_asks_for():
    assert lines("gather bfloat16", instantas_cuda=1.25, fold=2) == [
        ("gather, bfloat16: share of copy bandwidth", 0.8, ">= 0.9", False)
    ]
    assert lines("step float32", instantas_cuda=1.0, fold=3.0, fold_compiled=1.0)[1:] == [
        ("step, float32: times as fast as eager", 3.0, ">= 4", False)
    ]
    assert lines("attention 4 8", instantas_cuda=1.25, mask=5.0, SDPA=4.0) == [
        ("attention, R = 4, 8 windows: share of the floor", 0.8, ">= 0.75", True),
        ("attention, R = 4, 8 windows: times as fast as SDPA", 3.2, ">= 3", True),
    ]
    hard = {"R = 1": 1.0, "R = 4": 1.1, "R = 16": 1.2}
    assert [line[1:] for line in lines("hard 8", **hard)] == [(1.1, "<= 1.15", True), (1.2, "<= 1.15", False)]
    assert lines("gather bfloat16", fold=2) == lines("hard 8", **{"R = 4": 1.1, "R = 16": 1.2}) == []  # ours are lost


@cpp
def test_a_wrong_kernel_is_found():
    right = BACKENDS["cpp"].functions()
    broken = right | {"scatter_windows": lambda *a: right["scatter_windows"](*a) * 1.01}
    with mock.patch.dict(BACKENDS, cpp=dataclasses.replace(BACKENDS["cpp"], functions=lambda: broken)):
        count, wrong = gpu_checks.failures(gpu_checks.grid(["cpp"], [torch.float32]))
    assert count > len(wrong) > 0 and all(what.startswith("AssertionError: result") for what in wrong.values())
    assert {name.split(", ")[2] for name in wrong} >= {"gather", "scatter"}  # gather's gradient is a scatter
    assert not any("attention" in name for name in wrong)


@pytest.mark.skipif("cuda" not in oracle.BACKENDS, reason="the emulation needs a compiler")
def test_what_the_sanitizer_watches_runs():
    assert gpu_checks.main(["cuda"]) is None


def test_runs_in_graphs_are_checked():
    with recorded.recording() as made:
        count, wrong = gpu_checks.failures(gpu_checks.runs(CPU))
        assert count == 12 and wrong == {} and made
        with mock.patch.object(recorded.Recorded, "replay", lambda self: None):
            _, wrong = gpu_checks.failures(gpu_checks.runs(CPU))
    assert len(wrong) > 6


# Faults, in real workers


@pytest.fixture
def stand_ins(monkeypatch):
    folder = str(Path(__file__).parent)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [folder, os.environ.get("PYTHONPATH")])))
    return monkeypatch


def run_stand_ins(monkeypatch, faults, folder, only=(), **options):
    monkeypatch.setenv("FAULTS", faults)
    setting = Setting("cpu", smoke=True)
    gpu.run(setting, gpu.chosen(setting, only, STAND_INS), folder, module=STAND_INS, cores=2, **options)
    found = json.loads((folder / "gpu-smoke.json").read_text())
    assert found["state"] == "finished" and all(group["state"] == "done" for group in found["groups"].values())
    return found["groups"], {key: kept["speed"] for key, kept in found["speeds"].items()}


def names(speed):
    return [timing["name"] for timing in speed["timings"]]


def test_a_wrong_result_and_an_endless_loop_cost_nothing_else(stand_ins, tmp_path):
    groups, speeds = run_stand_ins(stand_ins, "triton gather_windows wrong; cuda guided_step endless", tmp_path)
    triton, cuda, gather, step = groups.values()
    assert set(triton["wrong"]) == {f"triton, float32, {name}, exact" for name in ("gather", "scatter")}  # its gradient
    assert triton["right"] == 1 and all(why.startswith("AssertionError: result") for why in triton["wrong"].values())
    assert cuda["wrong"] == {"cuda, float32, guided step, exact": "not finished in time: killed"} and cuda["right"] == 2
    assert list(gather["wrong"]) == ["gather bfloat16, instantas triton"]
    assert step["wrong"] == {"step bfloat16, instantas cuda": "not finished in time: killed"}
    assert set(speeds) == {"gather bfloat16", "step bfloat16", "strided step bfloat16"}
    for key, speed in speeds.items():
        ours, gone = ("cuda", "triton") if "gather" in key else ("triton", "cuda")
        assert names(speed)[0] == f"instantas {ours}" and "index" in names(speed)
        assert ("DisagreementError" if ours == "cuda" else "killed") in speed["absent"][f"instantas {gone}"]
    text = (tmp_path / "gpu-smoke.md").read_text()
    assert "- wrong: speeds: step: step bfloat16, instantas cuda: not finished in time: killed" in text


def test_an_illegal_address_and_a_lost_device_cost_nothing_else(stand_ins, tmp_path):
    groups, speeds = run_stand_ins(stand_ins, "triton guided_step address; cuda gather_windows device", tmp_path)
    triton, cuda, gather, step = groups.values()
    assert triton["wrong"] == {"triton, float32, guided step, exact": "died of SIGSEGV"} and triton["right"] == 2
    assert set(cuda["wrong"]) == {f"cuda, float32, {name}, exact" for name in ("gather", "scatter")}
    assert all("illegal memory access" in why for why in cuda["wrong"].values()) and cuda["right"] == 1
    assert list(gather["wrong"]) == ["gather bfloat16, instantas cuda"] and list(step["wrong"]) == [
        "step bfloat16, instantas triton"
    ]
    assert "Segmentation fault" in step["log"] and "Segmentation fault" in triton["log"]
    assert len(speeds) == 3 and all(len(names(speed)) > 2 for speed in speeds.values())


def test_a_spent_budget_begins_nothing_new_and_says_what_was_left(stand_ins, tmp_path):
    stand_ins.setenv("FAULTS", "")
    setting = Setting("cpu", smoke=True)
    report = gpu.run(setting, gpu.chosen(setting, ["grid"], STAND_INS), tmp_path, module=STAND_INS, budget=0)
    text = (tmp_path / "gpu-smoke.md").read_text()
    assert report.document["state"] == "not all was run" and not report.wrong_items
    assert "| grid: triton | 0 | 0 | 0 | all | 0 | not run: the budget is spent |" in text


@pytest.mark.parametrize("how", [signal.SIGTERM, "SIGTERM while the main thread sleeps on", signal.SIGKILL])
def test_workers_end_with_the_run_and_the_report_is_there(stand_ins, tmp_path, how):
    stand_ins.setenv("FAULTS", "triton gather_windows endless; triton scatter_windows endless")
    code = f"""
import gpu_stand_ins, signal, sys, threading
from pathlib import Path
from bench import gpu
gpu_stand_ins.SHORT = 1000
signal.signal(signal.SIGTERM, lambda *_: sys.exit())
def told():
    sys.stdin.read()
    signal.pthread_kill(threading.get_ident(), signal.SIGTERM)
threading.Thread(target=told, daemon=True).start()
setting = gpu.Setting("cpu", smoke=True)
gpu.run(setting, gpu.chosen(setting, ["triton"], "gpu_stand_ins"), Path({str(tmp_path)!r}), module="gpu_stand_ins")
"""
    with subprocess.Popen([sys.executable, "-c", code], cwd=oracle.ROOT, stdin=subprocess.PIPE) as run:
        until(lambda: workers(run.pid))
        worker = workers(run.pid)[0]
        run.stdin.close() if isinstance(how, str) else run.send_signal(how)
        run.wait(PATIENCE)
    until(lambda: not Path(f"/proc/{worker}").exists())
    state = json.loads((tmp_path / "gpu-smoke.json").read_text())["state"]
    assert state == ("under way" if how == signal.SIGKILL else "stopped")


def until(condition):
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "it has not happened"
        time.sleep(0.05)


def workers(parent):
    children = Path(f"/proc/{parent}/task").glob("*/children")
    return [int(pid) for path in children for pid in path.read_text().split()]


# Building


@pytest.mark.parametrize(
    "script, why",
    [
        ("", None),
        ("raise SystemExit(3)", "setup.py ended with exit status 3"),
        ("import time; time.sleep(1000)", "setup.py took more than 2 s"),
    ],
)
def test_the_library_is_built_where_nvcc_is(tmp_path, monkeypatch, script, why):
    (tmp_path / "setup.py").write_text(script)
    (tmp_path / "nvcc").touch(mode=0o755)
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.setattr(gpu, "BUILD", PATIENCE if "sleep" not in script else 2)
    monkeypatch.setattr(gpu.CUDA, "unfit", lambda: "not built")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu.build() == why
    (tmp_path / "nvcc").unlink()
    assert gpu.build() is None


# Faults, as they are told


@pytest.fixture
def course(tmp_path):
    group = Group("speeds: gather", tuple)
    return _Course(group, Report(tmp_path, Setting("cpu"), {}, {}, [group.name]))


def test_a_group_is_given_up_when_its_workers_do_not_last(course):
    course.hear({"items": [str(i) for i in range(9)]})
    for i in range(LOSSES + 1):
        assert not course.finished
        course.hear({"begin": str(i), "seconds": 9})
        course.lose("gone")
    group = course.report.document["groups"]["speeds: gather"]
    assert course.finished and course.left == 8 - LOSSES
    assert group["absent"] == dict.fromkeys("012345678"[: LOSSES + 1], "gone")


def test_a_worker_that_does_not_start_is_not_tried_again(course):
    course.lose("ended with exit status 1")
    assert course.finished
    assert course.report.wrong_items == {"speeds: gather: the worker": "did not start: ended with exit status 1"}


def test_a_rival_that_kills_the_worker_is_absent_and_the_comparison_is_made_without_it(course):
    course.hear({"items": ["gather bfloat16"]})
    course.hear({"begin": "gather bfloat16", "seconds": 9})
    course.deadline = 0.0
    course.hear({"running": "fold", "ours": False})
    assert course.deadline > time.monotonic()  # each contender has the seconds of an item
    course.hear({"failed": "fold", "ours": False, "why": "RuntimeError: illegal", "disagrees": False})
    course.lose("ended with exit status 3")
    assert course.lost == {"fold": "RuntimeError: illegal; ended with exit status 3"} and not course.finished
    assert not course.report.wrong_items and course.left == 1


# The sanitizer


@pytest.fixture
def sanitizer(tmp_path, monkeypatch):
    """A program in the sanitizer's place that says what it is given to say, and ends."""

    def install(script):
        program = tmp_path / "compute-sanitizer"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)

    return install


def test_findings_of_the_sanitizer_are_wrong_and_its_words_are_kept(sanitizer, capsys):
    sanitizer("echo '========= Invalid read of size 4'; echo '========= ERROR SUMMARY: 1 error'; echo more >&2; exit 9")
    with pytest.raises(AssertionError, match="ERROR SUMMARY: 1 error"):
        gpu_checks.sanitize("memcheck", ["cuda"])
    assert "Invalid read of size 4" in (said := capsys.readouterr().err) and "more" in said


def test_a_sanitizer_that_does_not_work_has_found_nothing(sanitizer, monkeypatch):
    sanitizer("echo 'Device not supported'; exit 1")
    with pytest.raises(gpu_checks.AbsentError, match="exit status 1: Device not supported"):
        gpu_checks.sanitize("memcheck", ["cuda"])
    sanitizer('echo "$@"; test "$2" = racecheck')
    gpu_checks.sanitize("racecheck", ["cuda"])
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CUDA_HOME", "/nowhere")
    with pytest.raises(gpu_checks.AbsentError, match="not installed"):
        gpu_checks.sanitize("memcheck", ["cuda"])


def test_children_of_the_sanitizer_do_not_outlive_it(sanitizer, stand_ins, tmp_path):
    sanitizer(f"setsid=; set -m; sleep 1000 & echo $! > {tmp_path}/child; wait")  # in a process group of its own
    module = tmp_path / "hanging_groups.py"
    module.write_text(
        "from bench import gpu_checks\n"
        "from bench.gpu_groups import Group, Item\n"
        "def groups(setting, field=None):\n"
        "    run = lambda: gpu_checks.sanitize('memcheck', ['cuda'])\n"
        "    return [Group('sanitizer: every kernel', lambda: [Item('memcheck', run, 3)])]\n"
    )
    stand_ins.syspath_prepend(str(tmp_path))
    stand_ins.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    setting = Setting("cpu", smoke=True)
    report = gpu.run(setting, gpu.chosen(setting, module=module.stem), tmp_path / "out", module=module.stem)
    child = Path("/proc", (tmp_path / "child").read_text().strip())
    until(lambda: not child.exists() or child.joinpath("stat").read_text().split()[2] == "Z")
    group = report.document["groups"]["sanitizer: every kernel"]
    assert group["absent"] == {"memcheck": "not finished in time: killed"} and not group["wrong"]

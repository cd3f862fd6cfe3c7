"""Windows shared by processes give what one process gives, bit for bit; what stops one stops all, by name.

`ranks.py` runs it all once, in processes over gloo.
"""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import instantas
from instantas.sampling.parallel import Ranks, dealt
from instantas.sampling.sampler import sample
from instantas.testing.tiny import scheduler
from instantas.windows import WindowPlan

PATTERNS = {  # failure of rank 1 of three -> what the others say, what it says itself
    "exception": ("PeerError: rank 1 of 3: KeyError: 'mine'", "KeyError: 'mine'"),
    "out of memory": ("PeerError: rank 1 of 3: OutOfMemoryError: none left", "OutOfMemoryError: none left"),
    "Ctrl-C": ("PeerError: rank 1 of 3: KeyboardInterrupt: ", "KeyboardInterrupt: "),
    "argument": (
        "PeerError: rank 1 of 3: ValueError: eta: expected 0 to 1, got 7.0",
        "ValueError: eta: expected 0 to 1",
    ),
    "other call": ("PeerError: rank 1 of 3: ValueError: height: expected", "ValueError: height: expected"),
    "loop: exception": ("PeerError: rank 1 of 3: KeyError: 'mine'", "KeyError: 'mine'"),
    "loop: exception made another": ("PeerError: rank 1 of 3: KeyError: 'mine'", "RuntimeError: a loop's own"),
    "loop: argument": ("PeerError: rank 1 of 3: ValueError: align: expected", "ValueError: align: expected a divisor"),
    "windowed: callback": ("PeerError: rank 1 of 3: KeyError: 'mine'", "KeyError: 'mine'"),
    "pipeline: extended": ("PeerError: rank 1 of 3: ValueError: left: expected", "ValueError: left: expected"),
    "pipeline: upscaled": ("PeerError: rank 1 of 3: ValueError: scale: expected", "ValueError: scale: expected"),
    "tiles: exception": ("PeerError: rank 1 of 3: KeyError: 'mine'", "KeyError: 'mine'"),
}
SAME = ": expected the same in all processes, got another in rank 1"
EVERYWHERE = {
    "predictions": "ValueError: predictions: expected the same kind in all processes, got [(1, 4, 16, 16, ",
    "other guidance": f"ValueError: guidance_scale{SAME}",
    "other batches": f"ValueError: window_batch_size{SAME}",
    "other plan": f"ValueError: latents{SAME}",
    "other steps": f"ValueError: plan{SAME}",
    "other prompt": f"ValueError: prompt{SAME}",
    "callback of one": f"ValueError: callback{SAME}",
    "cuda_graph": "ValueError: cuda_graph: expected False with a group",
    "loop: other wrap": f"ValueError: wrap{SAME}",
    "loop: other canvas": f"ValueError: x{SAME}",
    "loop: other step": f"ValueError: step{SAME}",
    "loop: fewer steps": "PeerError: rank 1 of 3 is through, while others go on",
    "windowed: other prompt": f"ValueError: encoder_hidden_states{SAME}",
    "windowed: other seed": f"ValueError: x{SAME}",
    "held: other schedule": f"ValueError: semantic_schedule{SAME}",
    "windowed: divided weights": "ValueError: unet: expected whole weights in each process of a group, got divided",
    "pipeline: divided weights": "ValueError: unet: expected whole weights in each process of a group, got divided",
    "tiles: other sample mode": f"ValueError: sample_mode{SAME}",
    "tiles: other generators": f"ValueError: generator{SAME}",
    "tiles: other latents": f"ValueError: latents{SAME}",
    "tiles: other sides": f"ValueError: tiles{SAME}",
    "tiles: other weights": f"ValueError: vae{SAME}",
}


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """(what each of four processes found, what ranks 0 and 2 of three found when rank 1 got a signal, the folder)."""
    folder, script = tmp_path_factory.mktemp("ranks"), Path(__file__).with_name("ranks.py")
    environment = os.environ | {"PYTHONPATH": str(Path(instantas.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", str(script), str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lost = {file.name: json.loads(file.read_text()) for file in folder.glob("SIG*")}
    return json.loads((folder / "results.json").read_text()), lost, folder


def test_every_process_has_the_latents_of_one_bit_for_bit(ran):
    everyone = ran[0]
    counts = tuple(f" at {n}" for n in (2, 3, 4))
    cases = [{name: found for name, found in each.items() if name.endswith(counts)} for each in everyone]
    assert [len(each) for each in cases] == sorted(map(len, cases), reverse=True) and len(cases[0]) == 51
    for rank, each in enumerate(cases):
        assert {name: found for name, found in each.items() if found is not True} == {}, rank
    for count in counts:
        assert sum(name.endswith(count) for name in cases[0]) >= 9


@pytest.mark.parametrize("name", PATTERNS)
def test_what_fails_in_one_process_is_told_in_the_others(ran, name):
    others, own = PATTERNS[name]
    said = [each[name] for each in ran[0][:3]]
    assert said[0] == said[2] and said[0].startswith(others) and said[1].startswith(own)


@pytest.mark.parametrize("name", EVERYWHERE)
def test_what_all_can_see_is_said_by_all(ran, name):
    for each in ran[0][:3]:
        assert each[name].startswith(EVERYWHERE[name])


def test_an_error_of_rank_0s_callback_and_two_errors_at_once(ran):
    said = [each["callback"] for each in ran[0][:3]]
    assert said == ["ZeroDivisionError: in it", *["PeerError: rank 0 of 3: ZeroDivisionError: in it"] * 2]
    said = [each["callback's latents"] for each in ran[0][:3]]
    why = "ValueError: callback: expected latents (1, 4, 20, 40) or None from it, got (2, 4, 20, 40)"
    assert said == [why, *[f"PeerError: rank 0 of 3: {why}"] * 2]
    said = [each["two at once"] for each in ran[0][:3]]
    assert said == ["PeerError: rank 1 of 3: KeyError: 'of 1'; rank 2 of 3: KeyError: 'of 2'", "KeyError: 'of 1'",
                    "KeyError: 'of 2'"]  # fmt: skip


def test_memory_that_runs_out_in_one_changes_nobodys_windows_and_a_group_serves_again(ran):
    for each in ran[0][:3]:
        assert each["halved"] is True and each["let go"] is True and each["afterwards"] is True


@pytest.mark.parametrize("name", ["SIGKILL", "SIGSTOP"])
def test_a_process_that_is_gone_is_named(ran, name):
    for rank in (0, 2):
        found, seconds, again = ran[1][f"{name} {rank}"]
        assert found.startswith("PeerError: rank 1 of 3 is gone or does not answer: ")
        assert again.startswith(
            "PeerError: group: expected one whose processes are all there, got one in which rank 1 of"
        )
        assert seconds < 300  # the timeout of the group's own, half an hour, was not waited for


def test_processes_that_run_one_command_paint_one_picture(ran):
    folder = ran[2]
    assert (folder / "together.png").read_bytes() == (folder / "alone.png").read_bytes()
    said = [(folder / f"said {rank}").read_text() for rank in (None, 0, 1)]
    assert said[1] == said[0].replace("alone", "together") != "" and said[2] == ""
    assert not [*folder.glob("together*checkpoint")]


# The dealing


@given(st.integers(0, 200), st.integers(1, 20), st.integers(1, 9))
def test_windows_are_dealt_whole_and_in_order(items, batch, count):
    parts = [dealt(items, batch, rank, count) for rank in range(count)]
    assert [n for part in parts for n in range(items)[part]] == list(range(items))  # each once, in order
    alone = [tuple(range(items)[start : start + batch]) for start in range(0, items, batch)]
    shared = [tuple(range(items)[part][i : i + batch]) for part in parts for i in range(0, items, batch)]
    assert [each for each in shared if each] == alone  # the batches of one process
    sizes = [len(range(items)[part]) for part in parts]
    batches = math.ceil(items / batch)
    assert max(sizes) == sizes[0] <= math.ceil(batches / count) * batch  # nobody waits longer than needed


# What is refused by one process alone


def test_what_is_no_group_is_refused():
    plan = WindowPlan.minimum_coverage(16, 16, 16)

    def run(group):
        never = pytest.fail
        return sample(never, torch.zeros(1, 4, 16, 16), plan, scheduler(), num_inference_steps=1, group=group)

    for given_ in (True, "gloo", 2):
        with pytest.raises(ValueError, match="group: expected torch.distributed initialised .*, got it not"):
            run(given_)
    with pytest.raises(ValueError, match="group: expected torch.distributed initialised"):
        Ranks()

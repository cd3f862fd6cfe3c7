"""Which limits on memory count: the machine's, a container's in either version of its groups, a shell's."""

import subprocess
import sys
from pathlib import Path

import pytest

from instantas.cli import limits

GROUPS = "sys/fs/cgroup"
UNLIMITED = str(2**63 - 4096)  # as version 1 writes it


def system(root, member, files):
    """A folder with what a system tells of its groups."""
    for name, text in {
        "proc/self/cgroup": member,
        **{f"{GROUPS}/{name}": text for name, text in files.items()},
    }.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    return root


def of_groups(root):
    """{file: bytes} of the groups' limits."""
    found = [(size, whose) for size, whose in limits.memory_limits(root) if "control group" in whose]
    assert found == sorted(found)
    return {str(Path(whose.split("(")[1][:-1]).relative_to(root / GROUPS)): size for size, whose in found}


@pytest.mark.parametrize(
    "member, files, expected",
    [
        ("0::/\n", {"memory.max": "1000\n"}, {"memory.max": 1000}),  # in a namespace of its own
        ("0::/\n", {"memory.max": "max\n"}, {}),
        ("0::/\n", {}, {}),  # the machine's root has no limit
        (
            "0::/jobs/one\n",
            {"jobs/memory.max": "500\n", "jobs/one/memory.max": "max\n", "jobs/two/memory.max": "1\n"},
            {"jobs/memory.max": 500},
        ),
        (
            "0::/jobs/one\n",
            {"jobs/memory.max": "max\n", "jobs/one/memory.max": "700\n", "memory.max": "900\n"},
            {"jobs/one/memory.max": 700, "memory.max": 900},
        ),
        ("0::/not/mounted/here\n", {"memory.max": "800\n"}, {"memory.max": 800}),
        ("0::/../../other\n", {"memory.max": "800\n", "other/memory.max": "1\n"}, {"memory.max": 800}),
        ("0::/a:b \u2028c\n", {"a:b \u2028c/memory.max": "600\n"}, {"a:b \u2028c/memory.max": 600}),
        (
            "5:cpuset:/x\n4:cpu,memory:/docker/1f\n3:name=memory:/y\n0::/z\n",
            {"memory/docker/1f/memory.limit_in_bytes": "400\n", "memory/y/memory.limit_in_bytes": "1\n"},
            {"memory/docker/1f/memory.limit_in_bytes": 400},
        ),
        ("4:memory:/docker/1f\n", {"memory/memory.limit_in_bytes": "300\n"}, {"memory/memory.limit_in_bytes": 300}),
        ("4:memory:/\n", {"memory.max": "1\n"}, {}),  # another version's file
        ("0::/\n", {"memory.max": ""}, {}),
        ("0::/\n", {"memory.max": "-1\n"}, {}),
        ("\n\n17\n", {"memory.max": "many\n"}, {}),
    ],
)
def test_limits_of_control_groups(tmp_path, member, files, expected):
    assert of_groups(system(tmp_path, member, files)) == expected


def test_no_limit_is_larger_than_the_machine(tmp_path):
    root = system(tmp_path, "4:memory:/\n", {"memory/memory.limit_in_bytes": UNLIMITED + "\n"})
    smallest, whose = limits.memory_limits(root)[0]
    assert whose == "the machine" and 2**26 < smallest < int(UNLIMITED)


def test_a_system_that_tells_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(limits.os, "sysconf", lambda name: -1)
    monkeypatch.setitem(sys.modules, "resource", None)
    assert limits.memory_limits(tmp_path) == []
    monkeypatch.delattr(limits.os, "sysconf")
    assert limits.memory_limits(tmp_path) == []
    (tmp_path / GROUPS / "memory.max").mkdir(parents=True)
    system(tmp_path, "0::/\n", {})
    assert limits.memory_limits(tmp_path) == []


@pytest.mark.skipif(sys.platform == "win32", reason="there is no ulimit")
def test_the_limit_of_a_shell_counts():
    code = (
        "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30));"
        "limits = runpy.run_path(sys.argv[1])['memory_limits']; print(*limits(), sep='\\n')"
    )
    done = subprocess.run([sys.executable, "-c", code, limits.__file__], capture_output=True, text=True, check=True)
    assert str((2**30, "this process (ulimit -v)")) in done.stdout.splitlines()

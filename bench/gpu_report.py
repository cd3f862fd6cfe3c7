"""The report of `bench.gpu`: one document, written whole after everything that happens, as JSON and as Markdown."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterable
from pathlib import Path

from bench.gpu_groups import Setting
from instantas.files import whole_file

KEPT = 6000  # characters of what a group printed last


class Report:
    """What is known so far. Every method that adds something writes both files; threads may call them.

    Attributes:
        document: "state"; "setting", "machine", "backends"; "groups", by name: their "state", how many items are
            "right", which are "wrong" and "absent" and why, how many are "left" (None: all), the "seconds", and, where
            anything was wrong or absent, the "log"; "speeds", by key: a comparison, its "table" and its "lines".
    """

    def __init__(self, folder: Path, setting: Setting, machine: dict, backends: dict, groups: Iterable[str]):
        stem = "gpu-smoke" if setting.smoke else "gpu"
        self.paths = [folder / f"{stem}{suffix}" for suffix in (".json", ".md")]
        self.begun, self._lock = time.monotonic(), threading.RLock()
        group = dict(state="not begun", right=0, left=None, seconds=0.0, log="")
        self.document: dict = dict(state="under way", seconds=0.0, setting=setting._asdict(), machine=machine)
        self.document |= dict(backends=backends, groups={name: group | dict(wrong={}, absent={}) for name in groups})
        self.document["speeds"] = {}
        self.write()

    def group(self, name: str, **facts: object) -> None:
        with self._lock:
            self.document["groups"][name].update(facts)
            self.write()

    def right(self, name: str, item: str, speed: dict | None = None) -> None:
        """speed: what is kept of a comparison."""
        with self._lock:
            self.document["groups"][name]["right"] += 1
            self.document["speeds"] |= {item: speed} if speed else {}
            self.write()

    def wrong(self, name: str, item: str, why: str) -> None:
        with self._lock:
            self.document["groups"][name]["wrong"][item] = why
            self.write()

    def absent(self, name: str, item: str, why: str) -> None:
        with self._lock:
            self.document["groups"][name]["absent"][item] = why
            self.write()

    def close(self, state: str) -> None:
        with self._lock:
            self.document["state"] = state
            self.write()

    @property
    def wrong_items(self) -> dict[str, str]:
        groups = self.document["groups"].items()
        return {f"{name}: {item}": why for name, group in groups for item, why in group["wrong"].items()}

    @property
    def left(self) -> bool:
        """Whether anything was not run."""
        return any(group["left"] != 0 for group in self.document["groups"].values())

    def write(self) -> None:
        self.document["seconds"] = round(time.monotonic() - self.begun, 1)
        for path, text in zip(self.paths, (json.dumps(self.document, indent=1) + "\n", markdown(self.document))):
            with whole_file(path) as part:
                part.write_text(text, encoding="utf-8")


def markdown(document: dict) -> str:
    groups, setting = document["groups"], document["setting"]
    facts = ", ".join(f"{name} {value}" for name, value in document["machine"].items())
    text = ["# The operations on a GPU\n", f"Written by `python -m bench.gpu`: {facts}."]
    text += [f"{name}: {state}." for name, state in document["backends"].items()]
    if setting["device"] == "cpu":
        text += [
            "A rehearsal on a CPU, with Triton's kernels interpreted and CUDA's emulated: no time is that of a GPU."
        ]
    text += [f"\n**{document['state']}**, {document['seconds']:.0f} s.\n\n## Right\n"]
    text += [_row("group", "right", "wrong", "absent", "not run", "s", ""), "|---|--:|--:|--:|--:|--:|---|"]
    for name, group in groups.items():
        left = "all" if group["left"] is None else group["left"]
        counts = group["right"], len(group["wrong"]), len(group["absent"]), left
        text.append(_row(name, *counts, f"{group['seconds']:.0f}", group["state"]))
    text.append("")
    for kind in ("wrong", "absent"):
        for name, group in groups.items():
            text += [f"- {kind}: {name}: {item}: {why}" for item, why in group[kind].items()]
    text += ["\n## Fast\n"]
    if lines := [line for kept in document["speeds"].values() for line in kept["lines"]]:
        text += [_row("what", "measured", "wanted", "met"), "|---|--:|--:|---|"]
        for line in lines:
            met = "yes" if line["met"] else "no"
            text.append(_row(line["what"], f"{line['measured']:.2f}", line["wanted"], met))
    else:
        text += ["Not measured" + (": a smoke run's sizes are too small." if setting["smoke"] else ".")]
    text += ["\n## Measured\n"]
    text += [f"```\n{kept['table']}\n```\n" for kept in document["speeds"].values()] or ["Nothing.\n"]
    logs = {name: group["log"] for name, group in groups.items() if group["log"]}
    text += ["## Last words\n"] * bool(logs) + [f"{name}\n\n```\n{log}\n```\n" for name, log in logs.items()]
    return "\n".join(text)


def _row(*cells):
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"

"""How well the detector finds and counts the subjects of scenes: on renders that it has not seen, and natively painted.

    python -m bench.detection

On renders it is known what is there: precision and recall of boxes that overlap by 0.3, and how often two and three
planted subjects are counted right. What a painted picture shows is not known: it is asked how often exactly one of the
prompt's subject is found, and how often any other.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch

from instantas import InstantASPipeline, demo
from instantas.demo.detector import SUBJECTS, Detector, Found, overlap
from instantas.demo.judge import reconstruct
from instantas.demo.training.planting import example, plant

OVERLAP = 0.3


def matched(found: list[Found], wanted: list[tuple[str, tuple[float, ...]]]) -> list[str]:
    """The subjects among the wanted ones that were found, each box at most once."""
    left, right = list(found), []
    for subject, box in wanted:
        target = Found(subject, 1.0, *box)
        hits = [each for each in left if each.subject == subject and overlap(each, target) >= OVERLAP]
        if hits:
            left.remove(hits[0])
            right.append(subject)
    return right


def precision_and_recall(
    detector: Detector, pictures: list[np.ndarray], wanted: list
) -> dict[str, tuple[int, int, int]]:
    """By subject: how many were there, found, and found rightly."""
    there, found, right = ({subject: 0 for subject in SUBJECTS} for _ in range(3))
    for picture, boxes in zip(pictures, wanted):
        seen = detector.find(picture)
        for subject, _ in boxes:
            there[subject] += 1
        for each in seen:
            found[each.subject] += 1
        for subject in matched(seen, boxes):
            right[subject] += 1
    return {subject: (there[subject], found[subject], right[subject]) for subject in SUBJECTS}


def counted(detector: Detector, count: int, pictures: int, seed: int) -> tuple[int, int]:
    """How many of the renders with `count` subjects beside each other are counted right, of how many."""
    rng, right, tried = np.random.default_rng([seed, count]), 0, 0
    while tried < pictures:
        subject = SUBJECTS[tried % len(SUBJECTS)]
        scene = plant(rng, subject, count, (128, 384), 96)
        if len(scene.boxes) == count:
            seen = [each.subject for each in detector.find(scene.image)]
            right += seen == [subject] * count
            tried += 1
    return right, tried


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--renders", type=int, default=300, help="unseen ones")
    parser.add_argument("--pictures", type=int, default=16, help="natively painted of each subject")
    parser.add_argument("--seed", type=int, default=900)
    parser.add_argument("--detector", help="a file that training.detection has written")
    parser.add_argument("--model", default=demo.folder())
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    detector = Detector.load(options.detector)
    pipe = InstantASPipeline.from_pretrained(options.model, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)

    rng = np.random.default_rng(options.seed)
    pictures, wanted = zip(*(example(rng) for _ in range(options.renders)))
    for what, shown in (
        ("renders", pictures),
        ("the same, reconstructed", reconstruct(pipe.vae, np.stack(pictures), 4)),
    ):
        table = precision_and_recall(detector, list(shown), list(wanted))
        there, found, right = (sum(column) for column in zip(*table.values()))
        print(f"{what}: {there} subjects, precision {right / found:.3f}, recall {right / there:.3f}")
        each = (f"{name} {r / max(f, 1):.2f}/{r / max(t, 1):.2f}" for name, (t, f, r) in table.items())
        print("  precision/recall: " + ", ".join(each))
    for count in (1, 2, 3):
        right, tried = counted(detector, count, 80, options.seed)
        print(f"{count} planted: counted right in {right} of {tried}")
    for subject in SUBJECTS:
        generator = torch.Generator().manual_seed(options.seed)
        painted = pipe([subject] * options.pictures, generator=generator).images
        seen = [[each.subject for each in detector.find(np.asarray(picture))] for picture in painted]
        one = sum(names.count(subject) == 1 for names in seen)
        other = sum(any(name != subject for name in names) for names in seen)
        print(f"painted, {subject}: exactly one in {one} of {len(seen)}, another subject in {other}", flush=True)


if __name__ == "__main__":
    main()

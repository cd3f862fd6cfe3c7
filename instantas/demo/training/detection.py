"""Training the detector of subjects: `python -m instantas.demo.training.detection --out FILE [--minutes 12]`."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny
from torch import nn

from instantas.checks import integer, positive, real
from instantas.demo import SUBJECTS, folder
from instantas.demo.detector import SIDE, STRIDE, Detector, Network
from instantas.demo.judge import reconstruct
from instantas.demo.training.planting import example
from instantas.demo.training.stage import MovingAverage, Stage, set_learning_rate
from instantas.files import check_writable

BATCH, LEARNING_RATE = 8, 2e-3


def targets(
    boxes: Sequence[tuple[str, tuple[float, ...]]], size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What the network should say of subjects with boxes (y, x, height, width) in pixels, on its map of cells.

    Returns: bumps around middles (subjects, cells, cells), log sizes (2, cells, cells), and where those count.
    """
    cells = size // STRIDE
    bumps, sides, counts = (
        torch.zeros(len(SUBJECTS), cells, cells),
        torch.zeros(2, cells, cells),
        torch.zeros(cells, cells),
    )
    axis = torch.arange(cells)
    for subject, (y, x, height, width) in boxes:
        row, column = int(y / STRIDE), int(x / STRIDE)
        if not (0 <= row < cells and 0 <= column < cells):
            continue
        spread = [max(0.8, 0.09 * side / STRIDE) for side in (height, width)]
        bump = torch.exp(-((axis - row) ** 2 / (2 * spread[0] ** 2)))[:, None] * torch.exp(
            -((axis - column) ** 2 / (2 * spread[1] ** 2))
        )
        bumps[SUBJECTS.index(subject)] = torch.maximum(bumps[SUBJECTS.index(subject)], bump)
        near = slice(max(row - 1, 0), row + 2), slice(max(column - 1, 0), column + 2)
        sides[(slice(None), *near)] = torch.tensor([math.log(height), math.log(width)])[:, None, None]
        counts[near] = 1
    return bumps, sides, counts


def loss(maps: torch.Tensor, bumps: torch.Tensor, sides: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """The focal loss of middles and the mean error of log sizes (Objects as Points, equations 1 and 4)."""
    logits = maps[:, : len(SUBJECTS)]
    marks, middles = logits.sigmoid(), bumps == 1
    right = -F.logsigmoid(logits) * (1 - marks) ** 2 * middles
    wrong = -F.logsigmoid(-logits) * marks**2 * (1 - bumps) ** 4 * ~middles
    errors = (maps[:, len(SUBJECTS) :] - sides).abs() * counts[:, None]
    return (right.sum() + wrong.sum()) / middles.sum().clamp(min=1) + errors.sum() / counts.sum().clamp(min=1) / 2


def train(minutes: float = 12, pictures: int = 1600, seed: int = 0, report: Callable[[str], None] = print) -> Detector:
    """Train a detector on drawn pictures, half of them encoded and decoded by the embedded model.

    Args:
        minutes: time of the training; drawing its pictures comes before it.
        pictures: how many are drawn.
        seed: start of all random numbers.
        report: called with every progress line.

    Raises:
        ValueError, TypeError: for a time that is not positive, fewer than one picture, a negative seed.
    """
    real("minutes", minutes, 0, above=True)
    positive("pictures", pictures)
    integer("seed", seed, 0)
    torch.manual_seed(seed)
    rng = np.random.default_rng([seed, 2])
    drawn = [example(rng, SIDE) for _ in range(pictures)]
    images = np.stack([image for image, _ in drawn])
    autoencoder = AutoencoderTiny.from_pretrained(folder() / "vae", torch_dtype=torch.float32)
    images[::2] = reconstruct(autoencoder, images[::2], batch=4)
    report(f"{pictures} pictures, {sum(len(boxes) for _, boxes in drawn)} subjects")
    wanted = [targets(boxes, SIDE) for _, boxes in drawn]
    network = Network()
    optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    average = MovingAverage(network.parameters(), decay=0.998)
    stage = Stage("detector", 60 * minutes, report)
    for done in stage:
        set_learning_rate(optimizer, LEARNING_RATE, stage.step, done)
        chosen = rng.integers(0, pictures, BATCH)
        batch = torch.from_numpy(images[chosen]).permute(0, 3, 1, 2).float() / 127.5 - 1
        batch = (batch - 0.1 * torch.randn(BATCH, 3, 1, 1)) * (1 + 0.15 * torch.randn(BATCH, 1, 1, 1))
        batch = batch + 0.03 * torch.rand(BATCH, 1, 1, 1) * torch.randn_like(batch)
        marks = [torch.stack(each) for each in zip(*(wanted[i] for i in chosen))]
        if rng.random() < 0.5:
            batch, marks = batch.flip(3), [each.flip(-1) for each in marks]
        with torch.autocast("cpu", torch.bfloat16):
            maps = network(batch.contiguous(memory_format=torch.channels_last))
        error = loss(maps.float(), *marks)
        optimizer.zero_grad()
        error.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        average.update()
        stage.record(loss=error.item())
    average.copy_to_parameters()
    return Detector(network)


def main(arguments: list[str] | None = None) -> int:
    """`python -m instantas.demo.training.detection --out FILE`."""
    program = "python -m instantas.demo.training.detection"
    parser = argparse.ArgumentParser(prog=program, description="Train the detector again.")
    parser.add_argument("--out", required=True, help="the .safetensors file to write")
    parser.add_argument("--minutes", type=float, default=12, help="of training")
    parser.add_argument("--pictures", type=int, default=1600, help="drawn for it")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    try:
        check_writable(options.out, name="out")
        detector = train(options.minutes, options.pictures, options.seed, lambda line: print(line, flush=True))
        detector.save(options.out)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

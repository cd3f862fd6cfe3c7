"""`python -m bench.bands` on a small canvas: what it counts and compares."""

import re

import numpy as np
import tifffile
import torch

from bench import bands


def test_a_small_run_is_counted_and_compared(tmp_path, capsys):
    bands.main(["--size", "648x656", "-o", str(tmp_path / "a.tif")])
    told = capsys.readouterr().out
    assert "648x656 px, in bands, AutoencoderTiny" in told and "evaluations 16 of 4 windows in 4 steps" in told
    assert int(re.search(r"4 pieces decoded apart: they differ from the file by at most (\d+) of 255", told)[1]) <= 1
    peak, canvas = (int(re.search(rf"{words} (\d+) MiB", told)[1]) for words in ("of all at most", "the picture:"))
    assert peak > 0 and canvas == 1 and tifffile.imread(tmp_path / "a.tif").shape == (656, 648, 3)


@torch.no_grad()
def test_another_picture_is_found_by_the_comparison():
    vae, latents = bands.autoencoder(False), torch.randn(1, 4, 81, 82, generator=torch.Generator().manual_seed(0))
    whole = bands.codec.decode(vae, latents)[0].permute(1, 2, 0)
    picture = ((whole / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).numpy()
    assert bands.compare(vae, latents, picture) <= 1
    assert bands.compare(vae, latents, np.roll(picture, 1, 1)) > 10

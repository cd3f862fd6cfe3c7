"""Train a model of the embedded one's kind: `python -m instantas.demo.train --out DIR [--minutes 120] [--threads N]`.

Five stages share the time: pictures, autoencoder, their latents, diffusion model, decoder. The same seed starts from
the same weights and pictures; how far a stage comes depends on the machine.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from instantas.demo.training.materials import Render
    from instantas.demo.training.scenes import Scene
    from instantas.demo.training.stage import Stage

SHARES = {"pictures": 0.02, "autoencoder": 0.25, "latents": 0.08, "diffusion": 0.50, "decoder": 0.15}
"""The parts of the time that go to the stages."""

OF_MATERIAL, OF_SUBJECT = 60, 180
"""Training pictures of every material and scenes of every subject, if there is time to draw them."""

SCALES = 2, 2, 3
"""How much larger than a native window scenes are drawn, in turn: parts of them are what a large canvas shows."""

DEFAULTS = {"num_inference_steps": 25, "guidance_scale": 2.5, "start": "coarse", "coarse_sigma": 1.5}
"""The settings that suit the model, written into `instantas.json`; the level is that of its best pictures
(docs/structure.md)."""


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside the wanted one; renamed to it when the block ends well, removed when it does not.

    Raises:
        ValueError: at once, if the folder cannot be made or exists and is not empty.
    """
    parent = path.resolve().parent
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"out: expected a new or empty folder, got {str(path)!r}")
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ValueError(f"out: expected a place in a folder that can be written, got {str(path)!r}")
    part = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".part", dir=parent))
    try:
        yield part
        part.chmod(0o755)
        os.replace(part, path)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def draw_pictures(stage: Stage, seed: int) -> tuple[list[Render], list[Scene]]:
    """Scenes of all subjects in turn, between them renders of all materials, until the time is over."""
    from instantas.demo import MATERIALS
    from instantas.demo.training.materials import render
    from instantas.demo.training.scenery import SCENES
    from instantas.demo.training.scenes import render_scene

    renders, scenes = [], []
    stage.most, each = OF_SUBJECT, OF_SUBJECT // OF_MATERIAL
    for _ in stage:
        if stage.step % each == 0:
            renders += [render(material, stage.step // each, seed) for material in MATERIALS]
        scenes += [render_scene(subject, stage.step, seed, SCALES[stage.step % len(SCALES)]) for subject in SCENES]
    return renders, scenes


def save_pipeline(
    folder: Path, autoencoder: Any, text_encoder: Any, unet: Any, tokenizer: Any, vocabulary: Path
) -> None:
    """Write the parts in float16 as a `StableDiffusionPipeline`, with the vocabulary's files and `instantas.json`.

    Two settings are put right afterwards: transformers would load the text encoder in float16 if its configuration did
    not name float32, and `AutoencoderTiny` warns of a setting that it writes itself.
    """
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    from instantas.demo.training.diffusion import SCHEDULER

    pipeline = StableDiffusionPipeline(
        vae=autoencoder.half(),
        text_encoder=text_encoder.half(),
        tokenizer=tokenizer,
        unet=unet.half(),
        scheduler=DDIMScheduler(**SCHEDULER),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    for weights in folder.glob("*/*.safetensors"):
        weights.chmod(0o644)  # safetensors leaves them readable by their owner alone
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(vocabulary / name, folder / "tokenizer" / name)
    _edit_json(folder / "text_encoder" / "config.json", dtype="float32", torch_dtype=None)
    _edit_json(folder / "vae" / "config.json", block_out_channels=None)
    (folder / "instantas.json").write_text(json.dumps(DEFAULTS, indent=2) + "\n", encoding="utf-8")


def load_start(folder: Path, autoencoder: Any, unet: Any, text_encoder: Any, tokenizer: Any) -> None:
    """Copy the weights of a model of this kind into untrained ones; a token's embedding goes where its word is now.

    Raises:
        ValueError: if the folder's model is of another kind.
    """
    from diffusers import AutoencoderTiny, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    try:
        parts = [
            (autoencoder, AutoencoderTiny.from_pretrained(folder / "vae", torch_dtype=torch.float32)),
            (unet, UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=torch.float32)),
            (text_encoder, CLIPTextModel.from_pretrained(folder / "text_encoder", torch_dtype=torch.float32)),
        ]
        old = CLIPTokenizer.from_pretrained(folder / "tokenizer").get_vocab()
    except (OSError, ValueError) as error:
        raise ValueError(f"start: expected a folder that training has written, got {str(folder)!r}: {error}") from error
    known = [(number, old[token]) for token, number in tokenizer.get_vocab().items() if token in old]
    now, before = (list(column) for column in zip(*known))
    for part, trained in parts:
        weights = trained.state_dict()
        for name, weight in part.state_dict().items():
            if name.endswith("token_embedding.weight"):
                moved = weight.clone()
                moved[now] = weights[name][before]
                weights[name] = moved
        try:
            part.load_state_dict(weights)
        except RuntimeError as error:
            raise ValueError(
                f"start: expected a model of the embedded one's shape, got {str(folder)!r}: {error}"
            ) from error


def _edit_json(path: Path, **changes: str | None) -> None:
    """Set the entries; None removes one."""
    entries = json.loads(path.read_text(encoding="utf-8")) | changes
    entries = {key: value for key, value in entries.items() if not (key in changes and value is None)}
    path.write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")


def train(
    out: str | os.PathLike,
    minutes: float = 120,
    threads: int | None = None,
    seed: int = 0,
    start: str | os.PathLike | None = None,
    report: Callable[[str], None] = print,
) -> Path:
    """Train a model and write it as a folder in diffusers' layout, whole or not at all.

    Args:
        out: the folder, new or empty.
        minutes: time for the five stages together; writing the folder takes some seconds more.
        threads: CPU threads, by default torch's own choice.
        seed: start of all random numbers.
        start: folder of a model of this kind whose weights are trained on; words that it does not know are new.
        report: called with every progress line.

    Raises:
        ValueError: for a time that is not positive, fewer than one thread, a negative seed or a folder that is in use.
        ModuleNotFoundError: if scikit-image, scipy, diffusers or transformers is missing.
    """
    if not 0 < minutes < float("inf"):
        raise ValueError(f"minutes: expected a positive number, got {minutes}")
    if threads is not None and threads < 1:
        raise ValueError(f"threads: expected at least 1, got {threads}")
    if seed < 0:
        raise ValueError(f"seed: expected 0 or more, got {seed}")
    out = Path(out)
    with whole_folder(out) as folder, tempfile.TemporaryDirectory() as vocabulary:
        from instantas.demo.training.autoencoder import make_autoencoder, train_autoencoder, train_decoder
        from instantas.demo.training.diffusion import make_text_encoder, make_unet, train_diffusion
        from instantas.demo.training.latents import make_latents, native
        from instantas.demo.training.stage import Stage
        from instantas.demo.training.tokenizer import make_tokenizer

        torch.manual_seed(seed)
        rng = np.random.default_rng(seed)
        if threads is not None:
            torch.set_num_threads(threads)
        stages = {name: Stage(name, 60 * minutes * share, report) for name, share in SHARES.items()}
        tokenizer = make_tokenizer(Path(vocabulary))
        autoencoder, unet, text_encoder = make_autoencoder(), make_unet(), make_text_encoder(tokenizer)
        if start is not None:
            load_start(Path(start), autoencoder, unet, text_encoder, tokenizer)
        renders, scenes = draw_pictures(stages["pictures"], seed)
        report(f"{len(renders)} pictures of materials, {len(scenes)} scenes, {len(tokenizer)} tokens")
        wholes = [scene.image for scene in scenes]
        pictures = ([render.image for render in renders], wholes, [native(image) for image in wholes])
        train_autoencoder(autoencoder, pictures, stages["autoencoder"], rng)
        data = make_latents(autoencoder, tokenizer, renders, scenes, stages["latents"], rng)
        report(f"{len(data.joint)} pictures of two materials, scaling factor {data.scale:.4f}")
        autoencoder.register_to_config(scaling_factor=data.scale)
        train_diffusion(unet, text_encoder, tokenizer, data, stages["diffusion"], rng)
        train_decoder(autoencoder, pictures, stages["decoder"], rng)
        save_pipeline(folder, autoencoder, text_encoder, unet, tokenizer, Path(vocabulary))
    report(f"wrote {out}")
    return out


def main(arguments: list[str] | None = None) -> int:
    """The command line; errors are one line and exit code 2."""
    parser = argparse.ArgumentParser(
        prog="python -m instantas.demo.train", description="Train a model like the embedded one on a CPU."
    )
    parser.add_argument("--out", required=True, help="the folder to write, new or empty")
    parser.add_argument("--minutes", type=float, default=120, help="for all stages; 0.05: two rounds of each")
    parser.add_argument("--threads", type=int, help="CPU threads; by default torch's own choice")
    parser.add_argument("--seed", type=int, default=0, help="start of all random numbers")
    parser.add_argument("--start", help="folder of a model like it, whose weights are trained on")
    options = parser.parse_args(arguments)
    settings = dict(minutes=options.minutes, threads=options.threads, seed=options.seed, start=options.start)
    try:
        train(options.out, **settings, report=lambda line: print(line, flush=True))
    except ModuleNotFoundError as error:
        print(f"training needs {error.name}: pip install 'instantas[train,diffusers]'", file=sys.stderr)
        return 2
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

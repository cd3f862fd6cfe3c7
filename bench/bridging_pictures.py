"""The pictures of `bench/bridging.py`: every bridge and the baselines on the embedded model, same seeds for all."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from instantas import demo
from instantas.files import whole_file
from instantas.regions import Region, RegionMap
from instantas.sampling import bridging
from instantas.sampling.sampler import sample
from instantas.windows import WindowPlan

WINDOW, CELL = 16, 8  # native window in cells, pixels of a cell
STEPS, GUIDANCE = 50, 2.5
MATERIALS = [prompt for prompt in demo.PROMPTS if " next to " not in prompt]
SCENES = [
    "grass next to gravel",
    "sand next to water",
    "brick next to lava",
    "clouds next to purple nebula",
    "wood next to leaves",
    "snow next to gravel",
    "white marble next to grass",
    "stars next to water",
]
PROMPTS = MATERIALS + SCENES  # picture i has prompt i modulo their number, and seed i
QUARTERS = [
    ("grass", "turquoise ocean", "lava", "snow"),
    ("red brick wall", "autumn leaves", "sunset clouds", "gravel"),
    ("white marble", "night sky", "red desert sand", "dark wooden planks"),
    ("purple nebula", "grass", "snow", "red brick wall"),
    ("turquoise ocean", "gravel", "white marble", "lava"),
    ("red desert sand", "autumn leaves", "night sky", "sunset clouds"),
    ("dark wooden planks", "purple nebula", "grass", "white marble"),
    ("gravel", "red desert sand", "turquoise ocean", "autumn leaves"),
]  # picture i with regions has quarters i modulo their number, and seed i
BOXES = {
    (256, 256): ((0, 0, 80, 176), (80, 0, 256, 176), (0, 176, 80, 256), (80, 176, 256, 256)),
    (512, 128): ((0, 0, 64, 128), (64, 0, 192, 128), (192, 0, 320, 128), (320, 0, 512, 128)),
}  # (left, top, right, bottom) of the quarters; the windows' borders lie inside them, never along their edges
SIZES = ((256, 256), (512, 128), (128, 512), (320, 208))  # width, height; the last is no multiple of the window
FEWER = SIZES[:2]
LARGER = ((384, 384),)
SCENE_SIZES = ((256, 256), (384, 384))
BATCH = 16  # windows in one network call


class Roll:
    """The canvas rolled by a random offset at every step, whether it wraps or not: joins opposite edges."""

    def step(self, step: int, steps: int, plan: WindowPlan) -> bridging.Stage:
        shift = np.random.default_rng(step).integers(0, (plan.height, plan.width)).tolist()
        wrap = (True, True)
        return bridging.Stage(WindowPlan.minimum_coverage(plan.height, plan.width, plan.window, wrap=wrap, shift=shift))


@dataclass(frozen=True)
class Variant(bridging.Shift):
    """`shift` with another overlap weight, or with windows that do not rest in the last step."""

    weight: str = "linear"
    rests: bool = True

    def step(self, step: int, steps: int, plan: WindowPlan) -> bridging.Stage:
        unfinished = 0 if self.rests else 2  # a run that goes on does not rest yet
        stage = super().step(step, steps + unfinished, plan)
        return stage if stage.weight is None else replace(stage, weight=stage.plan.weight(self.weight))


class Method(NamedTuple):
    """bridge: of minimum coverage, or stride: of overlapping windows; few: sizes of which so many must do."""

    bridge: str | bridging.Bridge = "none"
    stride: int | None = None
    sizes: tuple = SIZES
    few: Mapping = MappingProxyType({})
    pictures: tuple = tuple(range(len(MATERIALS)))
    regions: bool = False


def seeds(count: int, prompts: Sequence[int]) -> tuple[int, ...]:
    """Indices of the pictures of so many seeds of each prompt."""
    return tuple(i + seed * len(PROMPTS) for seed in range(count) for i in prompts)


ALONE = range(len(MATERIALS))
PAIRS = range(len(MATERIALS), len(PROMPTS))
REGIONS = Method(sizes=tuple(BOXES), pictures=tuple(range(3 * len(QUARTERS))), regions=True)
TRIED = Method(sizes=SIZES[:3], pictures=seeds(3, ALONE)[-len(ALONE) :])
METHODS = {
    "none": Method(),
    "shift": Method("shift", few={SIZES[3]: 26}, pictures=seeds(6, ALONE)),
    "economy": Method("economy", few={SIZES[3]: 26}, pictures=seeds(6, ALONE)),
    "centred": Method("centred"),
    "moments": Method("moments", sizes=FEWER),
    "shift+moments": Method("shift+moments", sizes=FEWER),
    "rolled canvas": Method(Roll(), sizes=FEWER),
    "MultiDiffusion, stride 1/2": Method(stride=WINDOW // 2, sizes=FEWER),
    "MultiDiffusion, stride 1/8": Method(stride=WINDOW // 8, sizes=SIZES[:3], few={SIZES[0]: 4}),
    "tried, cosine weights": TRIED._replace(bridge=Variant(weight="cosine")),
    "tried, last step moved": TRIED._replace(bridge=Variant(rests=False)),
    "larger, none": Method(sizes=LARGER),
    "larger, shift": Method("shift", sizes=LARGER),
    "larger, economy": Method("economy", sizes=LARGER),
    "scenes, shift": Method("shift", sizes=SCENE_SIZES, pictures=seeds(2, PAIRS)),
    "scenes, shift+dilated": Method("shift+dilated", sizes=SCENE_SIZES, pictures=seeds(2, PAIRS)),
    "regions, none": REGIONS,
    "regions, shift": REGIONS._replace(bridge="shift"),
}


class Model:
    """The embedded model: its network on windows for a list of prompts or of regions, and the decoder."""

    def __init__(self, dtype: torch.dtype):
        from diffusers import StableDiffusionPipeline

        self.pipe = StableDiffusionPipeline.from_pretrained(demo.folder(), safety_checker=None)
        self.unet, self.dtype = self.pipe.unet.to(dtype), dtype
        self.empty = self._encode([""])

    @torch.no_grad()
    def _encode(self, prompts: list[str]) -> torch.Tensor:
        tokenizer = self.pipe.tokenizer
        ids = tokenizer(prompts, padding="max_length", max_length=tokenizer.model_max_length, return_tensors="pt")
        return torch.cat([self.pipe.text_encoder(row[None])[0] for row in ids.input_ids]).to(self.dtype)

    def _regions(self, chosen: list[int], width: int, height: int):
        """The context in which the network has each picture's quarters; gives what is told where the windows are."""
        from instantas.pipelines.attention import regional_prompts

        lists = [
            [Region(p, box=box) for p, box in zip(QUARTERS[i % len(QUARTERS)], BOXES[width, height])] for i in chosen
        ]
        return regional_prompts(self.unet, RegionMap(lists, height, width, CELL), encode=self._encode)

    @torch.no_grad()
    def paint(self, chosen: list[int], width: int, height: int, method: Method) -> np.ndarray:
        """(n, height, width, 3) uint8, the chosen pictures."""
        rows, columns = -(-height // CELL), -(-width // CELL)
        if method.stride:
            plan = WindowPlan.strided(rows, columns, WINDOW, method.stride)
        else:
            plan = WindowPlan.minimum_coverage(rows, columns, WINDOW)
        noise = [torch.randn(1, 4, rows, columns, generator=torch.Generator().manual_seed(i)) for i in chosen]
        text = self._encode(["" if method.regions else PROMPTS[i % len(PROMPTS)] for i in chosen])

        def denoiser(windows, timestep, context):
            n, windows = len(windows), windows.to(self.dtype)
            if method.regions:
                regions.set_windows(context.plan, context.rows, context.step / context.steps, context.view)
            prompts = torch.cat([self.empty.expand(n, -1, -1), text[context.rows[:, 0]]])
            uncond, cond = self.unet(torch.cat([windows, windows]), timestep, prompts).sample.float().split(n)
            return cond, uncond

        with self._regions(chosen, width, height) if method.regions else contextlib.nullcontext() as regions:
            if method.regions:
                regions.base(text, self.empty.expand(len(chosen), -1, -1))
            latents = sample(
                denoiser,
                torch.cat(noise),
                plan,
                self.pipe.scheduler,
                num_inference_steps=STEPS,
                guidance_scale=GUIDANCE,
                window_batch_size=BATCH,
                bridging=method.bridge,
            )
        images = self.pipe.vae.decode(latents / self.pipe.vae.config.scaling_factor).sample
        images = ((images.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1)
        return images.numpy()[:, :height, :width]


def file_of(out: Path, name: str, width: int, height: int, i: int) -> Path:
    folder = name.replace("MultiDiffusion, stride 1/", "stride-").replace(", ", "-").replace("+", "-").replace(" ", "-")
    label = f"quarters-{i % len(QUARTERS)}" if METHODS[name].regions else PROMPTS[i % len(PROMPTS)].replace(" ", "-")
    return out / folder / f"{width}x{height}-{i:02d}-{label}.png"


def pictures_of(name: str):
    """(width, height, index) of a method's pictures."""
    method = METHODS[name]
    return [(*size, i) for size in method.sizes for i in method.pictures[: method.few.get(size)]]


def paint_missing(out: Path, names, dtype) -> None:
    missing = {name: [p for p in pictures_of(name) if not file_of(out, name, *p).exists()] for name in names}
    if not any(missing.values()):
        return
    model = Model(dtype)
    for name, wanted in missing.items():
        for width, height in METHODS[name].sizes:
            chosen = [i for w, h, i in wanted if (w, h) == (width, height)]
            for part in (chosen[i : i + 4] for i in range(0, len(chosen), 4)):
                for i, image in zip(part, model.paint(part, width, height, METHODS[name])):
                    path = file_of(out, name, width, height, i)
                    path.parent.mkdir(parents=True, exist_ok=True)
                    with whole_file(path) as temporary:
                        Image.fromarray(image).save(temporary)
                print(name, width, height, part, flush=True)


def evaluation_ratio(name: str, pictures) -> float:
    """Windows evaluated over those of minimum coverage without re-use, for these pictures together."""
    method, spent, least = METHODS[name], 0, 0
    for width, height, _ in pictures:
        cells = -(-height // CELL), -(-width // CELL)
        plan = WindowPlan.minimum_coverage(*cells, WINDOW)
        least += STEPS * plan.count
        if method.stride:
            spent += STEPS * WindowPlan.strided(*cells, WINDOW, method.stride).count
        else:
            spent += bridging.evaluations(method.bridge, plan, STEPS)
    return spent / least

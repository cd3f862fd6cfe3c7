"""Whole runs on the architecture of Stable Diffusion 2.0, with random weights, against what a user would pick instead.

    python -m bench.end_to_end --counts      # network samples of every method at every size, through a tiny network
    python -m bench.end_to_end               # seconds; on two CPU cores about eight minutes
    python -m bench.end_to_end --memory      # peak memory of 4 and of 64 windows; about four minutes
    python -m bench.end_to_end --size 1024x1024 --steps 4

DDIM, guidance 7.5, the same network, noise and window batch for all, nothing accelerated. Text encoder and autoencoder
are left out on all sides: prompts are embedded beforehand, results are latents. Every method's network calls are timed
inside of its run; beside each call of ours the bare network (no regions, no hooks) is called once more on the same
inputs, so that the overhead is a ratio of neighbours in time. Results go to bench/results/end-to-end-cpu.json.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from diffusers.utils import logging
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from bench.methods import BATCH, METHODS, WITH_REGIONS, Model, disagreements
from instantas import demo
from instantas.bench.measure import DisagreementError, keep, peak_memory

RESULTS = Path(__file__).parent / "results"
SIZES = ((512, 512), (512, 2048), (2048, 512), (1024, 1024), (1000, 1400), (2048, 2048))  # height, width
PROMPTS = ["red brick wall", "green grass", "blue sky", "grey stone"]
AGREE = 1e-4  # relative, in float32
SD2 = dict(
    sample_size=64,
    block_out_channels=(320, 640, 1280, 1280),
    attention_head_dim=(5, 10, 20, 20),
    cross_attention_dim=1024,
    use_linear_projection=True,
)
TINY = dict(
    block_out_channels=(4, 8),
    layers_per_block=1,
    norm_num_groups=4,
    attention_head_dim=2,
    cross_attention_dim=16,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
)


def model(config: dict, device="cpu", dtype=torch.float32) -> Model:
    """A pipeline of random weights: the UNet as configured, text encoder and autoencoder as small as can be."""
    torch.manual_seed(0)
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    unet = UNet2DConditionModel(**config)
    torch.set_default_dtype(previous)
    wide = unet.config.cross_attention_dim
    text = CLIPTextConfig(
        hidden_size=wide, intermediate_size=wide, projection_dim=wide, num_hidden_layers=1, num_attention_heads=2
    )
    vae = AutoencoderKL(
        block_out_channels=(4,) * 4,
        norm_num_groups=2,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    )
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text),
        tokenizer=CLIPTokenizer.from_pretrained(Path(demo.folder(), "tokenizer"), model_max_length=77),
        unet=unet.eval(),
        scheduler=DDIMScheduler(
            beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False, steps_offset=1
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).to(device, dtype)
    pipe.set_progress_bar_config(disable=True)
    embeds, negative = pipe.encode_prompt("a landscape", device, 1, True)
    return Model(pipe, embeds, negative)


class Watch:
    """Counts the samples that the network is given and times its calls; beside each, the bare network, if there is.

    That one attends to (1, L, D) embeddings, whatever is installed on the first one.
    """

    def __init__(self, network, clock, bare=None, embeds=None, log=lambda line: None):
        self.network, self.clock, self.bare, self.embeds, self.log = network, clock, bare, embeds, log
        self.samples, self.inside, self.beside, self.apart = 0, 0.0, 0.0, 0.0

    def __enter__(self):
        self.handles = [
            self.network.register_forward_pre_hook(self._before, prepend=True),
            self.network.register_forward_hook(self._after, with_kwargs=True),
        ]
        return self

    def __exit__(self, *failure):
        for handle in self.handles:
            handle.remove()

    def _before(self, module, args):
        self.begun = self.clock()

    def _after(self, module, args, kwargs, output):
        ended = self.clock()
        self.samples += len(args[0])
        self.inside += ended - self.begun
        if self.bare is not None:
            kwargs = {name: value for name, value in kwargs.items() if name != "cross_attention_kwargs"}
            kwargs["encoder_hidden_states"] = self.embeds.expand(len(args[0]), -1, -1)
            start = self.clock()
            self.bare(*args, **kwargs)
            self.beside += self.clock() - start
        self.log(f"{self.samples} samples")
        self.apart += self.clock() - ended  # nothing of the run


def bare(network):
    """A network with the same weights and none of what is installed on the first one."""
    return copy.deepcopy(network, {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())})


def run(name, model, size, prompts, steps, clock, beside=None, **options) -> dict:
    """Measure one whole run."""
    watch, taken = Watch(model.pipe.unet, clock, beside, model.embeds), []

    def whole():
        start = clock()
        METHODS[name](model, size, prompts, steps, **options)
        taken.append(clock() - start - watch.apart)

    with watch:
        peak = peak_memory(whole, model.pipe.device)
    result = dict(method=name, size=f"{size[0]}x{size[1]}", prompts=len(prompts), steps=steps, samples=watch.samples)
    result |= dict(seconds=taken[0], network=watch.inside, peak=peak)
    return result | (dict(bare=watch.beside, overhead=taken[0] / watch.beside) if beside is not None else {})


def paired(model, size, steps, clock, beside) -> dict[str, dict]:
    """Ours and the scheme with as many windows, twice each in the order A B B A, so that a drift counts for both.

    After a step that is not measured, since the first calls with a batch are slower. Our overhead is of one more run,
    beside the bare network.
    """
    run("instantas", model, size, PROMPTS[:1], 1, clock)
    found = {"instantas": [], "cyclic shift": []}
    for name in (*found, *reversed(found)):
        found[name].append(run(name, model, size, PROMPTS[:1], steps, clock))
    means = {
        name: {part: statistics.mean(result[part] for result in results) for part in ("seconds", "network")}
        for name, results in found.items()
    }
    for name, results in found.items():
        means[name] = results[0] | means[name] | dict(each=[result["seconds"] for result in results])
        means[name]["peak"] = max(result["peak"] for result in results)
    alongside = run("instantas", model, size, PROMPTS[:1], steps, clock, beside)
    means["instantas"] |= {part: alongside[part] for part in ("bare", "overhead")}
    return means


def _zeros(sample, timestep, encoder_hidden_states, return_dict=True, **conditions):
    output = UNet2DConditionOutput(sample=torch.zeros_like(sample))
    return output if return_dict else output.to_tuple()


def counts(device) -> dict:
    """Network samples of two steps, counted in real runs of every method with a network that answers zeros."""
    tiny = model(dict(sample_size=64, **TINY), device)
    tiny.pipe.unet.forward = _zeros
    found = {}
    for size in SIZES:
        for prompts in (PROMPTS[:1], PROMPTS):
            for name in METHODS if len(prompts) == 1 else WITH_REGIONS:
                with Watch(tiny.pipe.unet, time.perf_counter) as watch:
                    METHODS[name](tiny, size, prompts, 2)
                found[f"{size[0]}x{size[1]}, {len(prompts)} prompts, {name}"] = watch.samples
                print(f"{size[0]}x{size[1]}, {len(prompts)} prompts, {name}: {watch.samples} samples", flush=True)
    return found


def check() -> None:
    """Refuse to measure methods that do not do what they should."""
    for name, difference in disagreements(model(dict(sample_size=64, **TINY))).items():
        if not difference < AGREE:
            raise DisagreementError(f"{name}: off by {difference:.3g}, allowed {AGREE}: no speed given")


def measure(sizes, steps, device, clock, dtype=torch.bfloat16) -> None:
    start = time.perf_counter()
    whole = model(SD2, device, dtype)
    print(f"network made in {time.perf_counter() - start:.0f} s")
    beside = bare(whole.pipe.unet)
    with torch.no_grad():  # warm up
        whole.pipe.unet(whole.noise(64, 64), 1, encoder_hidden_states=whole.embeds)
    for size in sizes:
        several = size[0] * size[1] > 512 * 512
        runs = [(name, PROMPTS[:1], steps, {}) for name in METHODS if name != "MultiDiffusion"]  # as panorama's
        if several:  # MultiDiffusion at windows side by side and in one step: a part, for its seconds a sample
            runs += [("instantas", PROMPTS, steps, {}), ("MultiDiffusion", PROMPTS, 1, dict(stride=64))]
        pair = paired(whole, size, steps, clock, beside)
        for name, prompts, some, options in runs:
            if len(prompts) == 1 and name in pair:
                result = pair[name]
            else:
                other = beside if name == "instantas" else None
                result = run(name, whole, size, prompts, some, clock, other, **options)
            key = f"{result['size']}, {len(prompts)} prompts, {name}" + "".join(
                f", {k} {v}" for k, v in options.items()
            )
            result |= options | dict(dtype=str(dtype).removeprefix("torch."), batch=BATCH, clock=clock.__name__)
            keep(RESULTS / f"end-to-end-{torch.device(device).type}.json", {key: result}, device)
            overhead = f", {result['overhead']:.3f} x the bare network" if "overhead" in result else ""
            print(
                f"{key}: {result['samples']} samples, {result['seconds']:.1f} s, "
                f"{result['seconds'] / result['network']:.3f} x its network calls{overhead}, "
                f"peak {result['peak'] / 2**20:.0f} MiB",
                flush=True,
            )


def memory(device, dtype=torch.bfloat16) -> dict:
    """Peak memory of one step of 4 and of 64 windows, beside the bytes of the canvas."""
    whole, found = model(SD2, device, dtype), {}
    METHODS["instantas"](whole, (512, 512), PROMPTS[:1], 1)  # what is made once
    for size in ((512, 2048), (4096, 4096)):
        peak = peak_memory(lambda size=size: METHODS["instantas"](whole, size, PROMPTS[:1], 1), device)
        canvas = whole.noise(size[0] // 8, size[1] // 8).nbytes
        found[f"{size[0]}x{size[1]}"] = dict(peak=peak, canvas=canvas)
        print(f"{size[0]}x{size[1]}: peak {peak / 2**20:.0f} MiB, canvas {canvas / 2**20:.2f} MiB", flush=True)
    return found


def size_of(text):
    height, width = map(int, text.split("x"))
    return height, width


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--counts", action="store_true", help="count network samples instead of timing")
    parser.add_argument("--memory", action="store_true", help="peak memory of 4 and 64 windows instead of timing")
    parser.add_argument("--size", type=size_of, action="append", help="HEIGHTxWIDTH, may be repeated")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--processor", action="store_true", help="seconds of the processor, on one thread")
    options = parser.parse_args()
    logging.set_verbosity_error()
    check()
    if options.memory:
        keep(RESULTS / f"memory-{torch.device(options.device).type}.json", {"4 and 64 windows": memory(options.device)})
        return
    if options.counts:
        keep(RESULTS / "samples.json", {"two steps": counts(options.device)}, options.device)
        return
    if options.processor:
        torch.set_num_threads(1)
    clock = time.process_time if options.processor else time.perf_counter
    measure(options.size or [(512, 512), (512, 2048)], options.steps, options.device, clock)


if __name__ == "__main__":
    main()

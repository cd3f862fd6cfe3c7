"""A pytest plugin that runs diffusers' own tests on our pipelines: `pytest -p diffusers_judge --judge=instantas ...`.

In every module that is collected it replaces the text-to-image pipelines; the tests stay as they are. What the kinds
of `--judge` put in their place:

- "diffusers": nothing, which says what of a checkout passes here at all;
- "instantas": `InstantASPipeline.from_pipe` around a diffusers pipeline of the same components;
- "shadow": the same, and every call is made on the diffusers pipeline first, from the same random state;
- "regional", "halves": diffusers' pipelines under `regional_prompts` of each call's own prompt, on the whole canvas or
  on its left half, so that nothing may change.

`--judge-report` names a JSON file for the outcome of every test and, of a shadow, every call.
"""

from __future__ import annotations

import collections
import copy
import functools
import json
import tempfile
from pathlib import Path

import diffusers  # the installed one, before the checkout's conftest puts its own sources first
import pytest
import torch
import transformers
from diffusers.image_processor import VaeImageProcessor

from instantas import InstantASPipeline, Region, regional_prompts
from instantas.testing.tiny import tokenizer

KINDS = ("diffusers", "instantas", "shadow", "regional", "halves")
PIPELINES = (
    diffusers.StableDiffusionPipeline,
    diffusers.StableDiffusionXLPipeline,
    diffusers.StableDiffusionControlNetPipeline,
    diffusers.StableDiffusionXLControlNetPipeline,
    diffusers.LatentConsistencyModelPipeline,
    diffusers.StableDiffusionPanoramaPipeline,
)
BOXES = {"regional": (0.0, 0.0, 1.0, 1.0), "halves": (0.0, 0.0, 0.5, 1.0)}
# How far apart pictures in 0..1, and latents in units of their largest, may be:
CLOSE = 3e-4  # rounding: below 1e-5 for most, 1.2e-4 seen from a noise level of 80 (EDM) to 0 in two steps
EIGHT_BITS = 1.5 / 255  # one step of 8 bits, where rounding falls on the other side of a border
COARSE = 1e-2  # two steps of bfloat16 below 1, of a network in half precision
WORST_LAST = ("passed", "skipped", "failed")


def pytest_addoption(parser):
    parser.addoption("--judge", choices=KINDS, default="diffusers")
    parser.addoption("--judge-report", type=Path)


def pytest_configure(config):
    folder = tempfile.TemporaryDirectory()
    config.add_cleanup(folder.cleanup)
    give_tiny_models(Path(folder.name))
    config.pluginmanager.register(Judge(config.getoption("--judge"), config.getoption("--judge-report")))


class Judge:
    """Replaces the pipelines in what is collected, and keeps what became of it.

    Attributes:
        faces: the class in place of each diffusers pipeline.
        outcomes: ("passed", "skipped" or "failed", why) of each test.
        calls: of a shadow, the verdict on each call.
    """

    def __init__(self, kind: str, report: Path | None = None):
        self.report, self.outcomes, self.calls, self.test = report, {}, [], None
        if kind == "diffusers":
            self.faces = {}
        elif kind in BOXES:
            self.faces = {theirs: regional(theirs, BOXES[kind]) for theirs in PIPELINES}
        else:
            ours = type("Judged", (Judged,), {"shadow": self if kind == "shadow" else None})
            self.faces = {theirs: face(theirs, ours.from_pipe) for theirs in PIPELINES}

    def pytest_itemcollected(self, item):
        for holder in (item.module, *(item.cls or object).__mro__):
            for name, value in list(vars(holder).items()):
                if isinstance(value, type) and value in self.faces:
                    setattr(holder, name, self.faces[value])

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item):
        self.test = item.nodeid
        return (yield)

    def pytest_runtest_logreport(self, report):
        why = "" if report.passed else str(getattr(report.longrepr, "reprcrash", None) or report.longrepr)
        outcomes = [self.outcomes.get(report.nodeid, ("passed", "")), (report.outcome, why)]
        self.outcomes[report.nodeid] = max(outcomes, key=lambda outcome: WORST_LAST.index(outcome[0]))

    def pytest_sessionfinish(self):
        if self.report is not None:
            self.report.write_text(json.dumps({"outcomes": self.outcomes, "calls": self.calls}, indent=1))

    def pytest_terminal_summary(self, terminalreporter):
        if self.calls:
            counts = collections.Counter(call["verdict"] for call in self.calls)
            terminalreporter.write_line("calls: " + ", ".join(f"{n} {verdict}" for verdict, n in counts.items()))


class Judged(InstantASPipeline):
    """Our pipeline; with a `Judge` as its `shadow`, every call is made on diffusers' first and the verdict kept."""

    shadow = None

    @functools.wraps(InstantASPipeline.__call__)
    def __call__(self, *args, **kwargs):
        ours = kwargs
        if isinstance(self.pipe, diffusers.StableDiffusionPanoramaPipeline):
            ours = in_our_words(**kwargs)
        paint = functools.partial(super().__call__, *args, **ours)
        if self.shadow is None:
            return paint()
        close = closeness(kwargs.get("output_type", "pil"), self.pipe.unet.dtype)
        theirs = functools.partial(self.pipe, *args, **kwargs)
        verdict, result, error = compare(theirs, paint, kwargs.get("generator"), close)
        native = (side * self.cell for side in self.window)
        if any((kwargs.get(name) or 0) > side for name, side in zip(("height", "width"), native)) and error is None:
            verdict["verdict"] = "in several windows"
        self.shadow.calls.append({"test": self.shadow.test} | verdict)
        if error is not None:
            raise error
        return result


def in_our_words(view_batch_size=1, circular_padding=False, **kwargs):
    """The arguments of diffusers' panorama."""
    wrap = (False, circular_padding)
    return kwargs | {"method": "multidiffusion", "window_batch_size": view_batch_size, "wrap": wrap}


class Face(type):
    """The class of diffusers pipelines whose instances are ours."""

    def __call__(cls, *args, **components):
        pipe = cls.theirs(*args, **components)
        return pipe if pipe.unet is None else cls.ours(pipe)  # without a UNet: to embed prompts, not to paint


def face(theirs, ours):
    """A `theirs` to look at, with its signatures and constants, that makes `ours` around a real one."""

    def wrapped(load):
        return staticmethod(functools.wraps(load)(lambda *args, **settings: ours(load(*args, **settings))))

    def from_pipe(pipe, **components):
        return ours(theirs.from_pipe(getattr(pipe, "pipe", pipe), **components))

    members = {"ours": staticmethod(ours), "theirs": theirs, "from_pipe": staticmethod(from_pipe)}
    for name in ("from_pretrained", "from_single_file"):
        if hasattr(theirs, name):
            members[name] = wrapped(getattr(theirs, name))
    return Face(theirs.__name__, (theirs,), members | {"__module__": theirs.__module__})


def regional(theirs, box):
    """`theirs`, whose calls are made under a region of their own prompt."""

    class Regional(theirs):
        @functools.wraps(theirs.__call__)
        def __call__(self, prompt=None, *args, **kwargs):
            if prompt is None or kwargs.get("prompt_2") is not None:  # not what a region's prompt can say
                return super().__call__(prompt, *args, **kwargs)
            lists = [[Region(text, box=box)] for text in ([prompt] if isinstance(prompt, str) else prompt)]
            with regional_prompts(self, lists):
                return super().__call__(prompt, *args, **kwargs)

    Regional.__name__ = theirs.__name__  # as saved pipelines name their class
    return Regional


def closeness(output_type, dtype) -> float:
    """What pictures of such a kind by a network of such a precision may differ by."""
    if dtype.itemsize < 4:
        return COARSE
    return EIGHT_BITS if output_type == "pil" else CLOSE


def compare(theirs, ours, generator, close=CLOSE):
    """(verdict, result of ours, its error) of two calls from the same random state.

    Where they differ, both are made again from another state of the default generator: some of diffusers' pipelines
    draw a decoder's noise there, whatever generator they are given, and no picture of ours can be equal to theirs.
    """
    given = generator if isinstance(generator, (list, tuple)) else [generator]
    generators = [torch.default_generator, *(g for g in given if isinstance(g, torch.Generator))]
    before = [generator.get_state() for generator in generators]
    expected, their_error = tried(theirs)
    after = [generator.get_state() for generator in generators]
    for generator, state in zip(generators, before):
        generator.set_state(state)
    result, our_error = tried(ours)
    apart = None
    if their_error and our_error:
        verdict = "refused by both"
    elif our_error:
        verdict = "refused by ours alone"
    elif their_error:
        verdict = "refused by diffusers alone"
    elif (apart := difference(result, expected)) > close:
        verdict = "different"
        if len(generators) > 1 and apart < float("inf"):
            moved = [difference(again(call, generators, before), first) for call, first in
                     ((theirs, expected), (ours, result))]  # fmt: skip
            if moved[0] > close >= moved[1]:
                verdict = "not repeatable in diffusers"
            for generator, state in zip(generators, after):
                generator.set_state(state)
    elif not all(torch.equal(generator.get_state(), state) for generator, state in zip(generators, after)):
        verdict = "equal, generator in another state"
    else:
        verdict = "equal"
    said = {"theirs": their_error and repr(their_error), "ours": our_error and repr(our_error)}
    return {"verdict": verdict, "difference": apart} | said, result, our_error


def again(call, generators, states):
    """The call's result from the states, but of the first generator, the default one."""
    for generator, state in zip(generators, states):
        generator.set_state(state)
    torch.default_generator.manual_seed(0)
    return call()


def tried(call):
    try:
        return call(), None
    except Exception as error:  # what is refused, and with what, is compared too
        return None, error


def difference(ours, theirs) -> float:
    """The largest between the pictures of two outputs; infinite where shapes differ or there is NaN in one."""
    ours, theirs = pictures(ours), pictures(theirs)
    if ours.shape != theirs.shape:
        return float("inf")
    apart = (ours - theirs).abs().masked_fill(ours.isnan() & theirs.isnan(), 0).nan_to_num(nan=float("inf"))
    return float(apart.max() / theirs.nan_to_num().abs().max().clamp(min=1))


def pictures(output) -> torch.Tensor:
    images = output[0]
    return torch.as_tensor(VaeImageProcessor.pil_to_numpy(images) if isinstance(images, list) else images).double()


def give_tiny_models(folder: Path):
    """Tokenizers and text encoders, kept in a folder, in place of the hub's tiny ones: nothing is downloaded."""
    words = copy.deepcopy(tokenizer())
    words.model_max_length = 77
    words.save_pretrained(folder / "CLIPTokenizer")
    config = transformers.CLIPTextConfig(
        vocab_size=1000,
        hidden_size=32,
        intermediate_size=37,
        projection_dim=32,
        num_hidden_layers=5,
        num_attention_heads=4,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )
    encoders = transformers.CLIPTextModel, transformers.CLIPTextModelWithProjection
    for kind in encoders:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            kind(config).save_pretrained(folder / kind.__name__)
    for kind in (transformers.CLIPTokenizer, *encoders):
        kind.from_pretrained = classmethod(_redirected(kind.from_pretrained.__func__, folder / kind.__name__))


def _redirected(load, folder):
    def from_pretrained(cls, name, *args, **settings):
        return load(cls, folder if "internal-testing/tiny" in str(name) else name, *args, **settings)

    return from_pretrained

"""The bank of prompts: each distinct embedding once, and which of them every picture attends to."""

from __future__ import annotations

import inspect
import threading
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from instantas.checks import integer
from instantas.regions import Region

EMBEDDING = threading.RLock()
"""One thread at a time: each call sets on its tokenizer how it pads and truncates. Nothing waits while it is held."""


class PromptBank:
    """Base prompts, regional and negative ones, each distinct embedding once.

    Args:
        lists: the regions of each picture.

    Attributes:
        texts: what has to be embedded.
        embeddings: (P, L, D), zeros beyond a prompt's length.
        lengths: (P,) int32, how many of its L tokens a prompt has; None: all have L.
        version: counts how often they were made anew.
    """

    def __init__(self, lists: tuple[tuple[Region, ...], ...]):
        prompts = dict.fromkeys(p for regions in lists for r in regions for p in (r.positive, r.negative))
        self.texts = [prompt for prompt in prompts if isinstance(prompt, str)]
        self._embeds = [prompt for prompt in prompts if isinstance(prompt, torch.Tensor)]
        self._numbers = {prompt: number for number, prompt in enumerate((*self.texts, *self._embeds))}
        self.lists, self.version = lists, 0
        self.embeddings: Any = None
        self.lengths: torch.Tensor | None = None
        self._rows: list[int] = []
        self._given: Any = None
        self._seen: tuple | None = None
        self._encode: Callable | None = None
        self._embedded = self._encoded_by = None

    def update(
        self,
        base: torch.Tensor,
        encode: Callable[[list[str]], torch.Tensor] | None = None,
        lengths: Sequence[int] | None = None,
    ) -> None:
        """Take the base prompts (n, L, D); nothing happens where they are those of the last time.

        The same unchanged tensor is known without a look at its values, for which a GPU would have to be waited for.
        Where a gradient is to reach base prompts or embeddings, they are taken anew every time.

        Args:
            encode: gives the texts' embeddings (texts, L, D), without gradients. Embeds again where it is not equal to
                that of the last time, or where there are new base prompts and its `state()`, if it has one, differs.
            lengths: how many of its L tokens each base prompt has; None: all.

        Raises:
            ValueError, TypeError: for regions whose prompts cannot be embedded, or do not fit the base prompts.
        """
        trained = torch.is_grad_enabled() and any(t.requires_grad for t in (base, *self._embeds))
        version = -1 if base.is_inference() else base._version
        own = [base.shape[1]] * len(base) if lengths is None else [integer("lengths", n, 1) for n in lengths]
        if len(own) != len(base) or max(own, default=0) > base.shape[1]:
            raise ValueError(f"lengths: expected {len(base)} numbers from 1 to {base.shape[1]}, got {own}")
        seen = self._seen is not None and self._seen[0] is base and version >= 0 and self._seen[1:] == (version, own)
        if trained or not seen or encode != self._encode:
            alike = self._equals(base) and self._seen is not None and self._seen[2] == own
            if self._embed(encode) or trained or not alike:
                self._make(base if trained else base.detach(), own, trained)
        self._seen, self._encode = (base, version, own), encode

    def _embed(self, encode):
        """Whether the texts were embedded anew."""
        encoded_by = encode, getattr(encode, "state", tuple)()
        if not self.texts or encoded_by == self._encoded_by:
            return False
        self._embedded, self._encoded_by = _embedded(encode, self.texts), encoded_by
        return True

    def _equals(self, base):
        given = self._given
        alike = given is not None and given.shape == base.shape and given.dtype == base.dtype
        return alike and given.device == base.device and torch.equal(given, base)

    def _make(self, base, own, trained):
        texts = "regions" if isinstance(self._encoded_by and self._encoded_by[0], PipelineEncoder) else "encode"
        parts = [(texts, self._embedded)] * bool(self.texts) + [("embeds", embeds[None]) for embeds in self._embeds]
        for name, part in parts:
            if part.shape[2] != base.shape[2] or not part.shape[1]:
                raise ValueError(
                    f"{name}: expected embeddings (prompts, tokens, {base.shape[2]}) like the base prompt's, got "
                    f"{tuple(part.shape)}"
                )
        prompts = [tokens[:length] for tokens, length in zip(base, own)]
        prompts += [tokens.to(base) if trained else tokens.detach().to(base) for _, part in parts for tokens in part]
        lengths = [len(prompt) for prompt in prompts]
        whole = torch.stack([F.pad(prompt, (0, 0, 0, max(lengths) - len(prompt))) for prompt in prompts])
        first = list(range(len(whole)))
        if not trained:  # of equal prompts one, which alone would have the gradient
            counts, flat = torch.tensor(lengths, device=base.device), whole.flatten(1)
            alike = [(flat == row).all(1) & (counts == count) for row, count in zip(flat, lengths)]
            first = torch.stack(alike).int().argmax(1).tolist()
        distinct = sorted(set(first))
        self._given, self.embeddings = base.detach().clone(), whole[distinct]
        self._rows, own = [distinct.index(i) for i in first], [lengths[i] for i in distinct]
        several = len(set(own)) > 1
        self.lengths = torch.tensor(own, dtype=torch.int32, device=base.device) if several else None
        self.version += 1

    def attended(self, elements: list[tuple[int, int, bool]], most: int) -> tuple[torch.Tensor, torch.Tensor]:
        """What each element of a batch attends to.

        Args:
            elements: (index of the base prompt, index of the list of regions, whether conditional) of each.
            most: the regions of the longest list.

        Returns:
            ids (B, S) int32, rows of the bank, -1 where there are fewer; slots (B, 1 + most) int64, where among them
            the base prompt and the region are. Alike prompts share a slot; the unconditional branch has a region's
            negative prompt in its place, or the base's.
        """
        count = len(self._given)
        attended: list[list[int]] = []
        slots: list[list[int]] = []
        for base, regions, conditional in elements:
            prompts = [r.positive if conditional else r.negative for r in self.lists[regions]]
            rows = [base] + [base if prompt is None else count + self._numbers[prompt] for prompt in prompts]
            found = [self._rows[row] for row in rows]
            attended.append(list(dict.fromkeys(found)))
            slots.append([attended[-1].index(row) for row in found] + [0] * (most - len(prompts)))
        ids = torch.full((len(attended), max(map(len, attended))), -1, dtype=torch.int32, device="cpu")
        for element, found in enumerate(attended):
            ids[element, : len(found)] = torch.tensor(found, device="cpu")
        return ids, torch.tensor(slots, device="cpu")


@dataclass(frozen=True)
class PipelineEncoder:
    """Embeds texts by a pipeline's text encoders: (prompts, L, D), without gradients.

    Attributes:
        clip_skip, lora_scale: as in a call of the pipeline.
    """

    pipe: Any
    clip_skip: int | None = None
    lora_scale: float | None = None

    def __call__(self, texts: list[str]) -> torch.Tensor:
        encode: Any = getattr(self.pipe, "encode_prompt", None) or self.pipe._encode_prompt  # InstructPix2Pix's
        known = inspect.signature(encode).parameters
        ways = {n: v for n, v in dict(clip_skip=self.clip_skip, lora_scale=self.lora_scale).items() if n in known}
        with EMBEDDING, torch.no_grad():
            embedded = encode(
                prompt=texts,
                device=self.pipe._execution_device,
                num_images_per_prompt=1,
                do_classifier_free_guidance=False,
                **ways,
            )
        return embedded[0] if isinstance(embedded, tuple) else embedded

    def state(self) -> tuple:
        """What the embeddings depend on beside the texts: the encoders' weights and adapters as they are now."""
        return tuple(adapters(encoder) for encoder in text_encoders(self.pipe))


def text_encoders(pipe: Any) -> list[torch.nn.Module]:
    """Those that a pipeline has."""
    found = (getattr(pipe, name, None) for name in ("text_encoder", "text_encoder_2"))
    return [encoder for encoder in found if encoder is not None]


def adapters(module: torch.nn.Module) -> tuple:
    """Changes whenever a LoRA of a network or one of its layers is scaled, switched or merged, or a weight changes."""
    marks: list = [-1 if weight.is_inference() else weight._version for weight in module.parameters()]
    layers: list[Any] = [layer for layer in module.modules() if hasattr(layer, "merged_adapters")]
    for layer in layers:
        marks += [
            *getattr(layer, "scaling", {}).items(),
            *layer.active_adapters,
            *layer.merged_adapters,
            layer.disable_adapters,
        ]
    return tuple(marks)


def warn_of_cut(pipe: Any, texts: list[str]) -> None:
    """Warn of words past the limit of a pipeline's tokenizers, naming them."""
    found: list[Any] = [getattr(pipe, name, None) for name in ("tokenizer", "tokenizer_2")]
    for tokenizer in found:
        for text in texts if tokenizer is not None else ():
            with EMBEDDING:
                ids, limit = tokenizer(text, verbose=False).input_ids, tokenizer.model_max_length
            if len(ids) > limit:
                cut = tokenizer.decode(ids[limit - 1 : -1]).strip()
                warnings.warn(
                    f"prompt: expected at most {limit - 2} tokens, got {len(ids) - 2}; cut off: {cut!r}", stacklevel=2
                )


def _embedded(encode, texts):
    if encode is None:
        raise ValueError("encode: expected a pipeline, or a function that embeds the regions' prompts, got neither")
    with torch.no_grad():
        embedded = encode(texts)
    if not isinstance(embedded, torch.Tensor):
        raise TypeError(f"encode: expected a tensor ({len(texts)}, L, D), got {type(embedded).__name__}")
    if embedded.dim() != 3 or len(embedded) != len(texts):
        raise ValueError(f"encode: expected ({len(texts)}, L, D), got {tuple(embedded.shape)}")
    return embedded

"""The bank of prompts: each distinct embedding once, and which of them every picture attends to."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch

from instantas.regions import Region


class PromptBank:
    """Base prompts, regional and negative ones, each distinct embedding once.

    Args:
        lists: the regions of each picture.
        encode: function of a list of prompts that gives their embeddings (prompts, L, D).

    Attributes:
        embeddings: (P, L, D).
        number: counts how often they were made anew.

    Raises:
        ValueError, TypeError: for regions whose prompts cannot be embedded.
    """

    def __init__(self, lists: tuple[tuple[Region, ...], ...], encode: Callable | None):
        texts = [text for regions in lists for r in regions for text in (r.prompt, r.negative_prompt)]
        texts = list(dict.fromkeys(text for text in texts if text is not None))
        self.lists, self._texts = lists, {text: i for i, text in enumerate(texts)}
        self._embedded = _embedded(encode, texts) if texts else None
        self.embeddings = self._given = self._seen = self._rows = None
        self.number = 0

    def update(self, base: torch.Tensor) -> None:
        """Take the base prompts (n, L, D); nothing happens where they are those of the last time.

        The same unchanged tensor is known without a look at its values, for which a GPU would have to be waited for.
        """
        version = -1 if base.is_inference() else base._version
        known = self._seen is not None and self._seen[0] is base and version >= 0 and self._seen[1] == version
        if not known and not self._equals(base):
            self._make(base.detach())
        self._seen = base, version

    def _equals(self, base):
        given = self._given
        alike = given is not None and given.shape == base.shape and given.dtype == base.dtype
        return alike and given.device == base.device and torch.equal(given, base)

    def _make(self, base):
        prompts = base
        if self._embedded is not None:
            if self._embedded.shape[1:] != base.shape[1:]:
                raise ValueError(
                    f"encode: expected embeddings (prompts, {base.shape[1]}, {base.shape[2]}) like the base prompt's, "
                    f"got {tuple(self._embedded.shape)}"
                )
            prompts = torch.cat([base, self._embedded.to(base)])
        flat = prompts.flatten(1)
        first = torch.stack([(flat == row).all(1) for row in flat]).int().argmax(1).tolist()
        distinct = sorted(set(first))
        self._given, self.embeddings = base.clone(), prompts[distinct]
        self._rows = [distinct.index(i) for i in first]
        self.number += 1

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
        count, attended, slots = len(self._given), [], []
        for base, number, conditional in elements:
            texts = [r.prompt if conditional else r.negative_prompt for r in self.lists[number]]
            rows = [base] + [base if text is None else count + self._texts[text] for text in texts]
            prompts = [self._rows[row] for row in rows]
            attended.append(list(dict.fromkeys(prompts)))
            slots.append([attended[-1].index(prompt) for prompt in prompts] + [0] * (most - len(texts)))
        ids = torch.full((len(attended), max(map(len, attended))), -1, dtype=torch.int32)
        for element, prompts in enumerate(attended):
            ids[element, : len(prompts)] = torch.tensor(prompts)
        return ids, torch.tensor(slots)


def encode_prompts(
    pipe, texts: list[str], *, clip_skip: int | None = None, lora_scale: float | None = None
) -> torch.Tensor:
    """(prompts, L, D) embeddings by a pipeline's text encoders; warns of words past their limit, naming them."""
    for tokenizer in (getattr(pipe, name, None) for name in ("tokenizer", "tokenizer_2")):
        for text in texts if tokenizer is not None else ():
            ids, limit = tokenizer(text, verbose=False).input_ids, tokenizer.model_max_length
            if len(ids) > limit:
                cut = tokenizer.decode(ids[limit - 1 : -1]).strip()
                warnings.warn(
                    f"prompt: expected at most {limit - 2} tokens, got {len(ids) - 2}; cut off: {cut!r}", stacklevel=2
                )
    settings = dict(num_images_per_prompt=1, clip_skip=clip_skip, lora_scale=lora_scale)
    with torch.no_grad():
        encoded = pipe.encode_prompt(
            prompt=texts, device=pipe._execution_device, do_classifier_free_guidance=False, **settings
        )
        return encoded[0]


def _embedded(encode, texts):
    if encode is None:
        raise ValueError("encode: expected a pipeline, or a function that embeds the regions' prompts, got neither")
    embedded = encode(texts)
    if not isinstance(embedded, torch.Tensor):
        raise TypeError(f"encode: expected a tensor ({len(texts)}, L, D), got {type(embedded).__name__}")
    if embedded.dim() != 3 or len(embedded) != len(texts):
        raise ValueError(f"encode: expected ({len(texts)}, L, D), got {tuple(embedded.shape)}")
    return embedded

"""A CLIP tokenizer whose vocabulary is the captions' words; anything else falls back to single bytes.

Byte-pair encoding (Sennrich et al. 2016, "Neural Machine Translation of Rare Words with Subword Units") as CLIP uses
it: bytes written as printable characters, the last one of a word marked with `</w>`.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from instantas.demo.training.captions import words

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

MAX_LENGTH = 32
"""Tokens of a prompt, its start and end included."""

START, END = "<|startoftext|>", "<|endoftext|>"


def byte_alphabet() -> list[str]:
    """The 256 characters that stand for the bytes: printable Latin-1 for itself, the others from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(others))]


def learn_merges(vocabulary_words: list[str]) -> list[tuple[str, str]]:
    """Merge the most frequent pair of neighbours (the first in order among equals) until every word is one token."""
    spellings = [[*word[:-1], word[-1] + "</w>"] for word in vocabulary_words]
    merges = []
    while pairs := Counter(pair for spelling in spellings for pair in zip(spelling, spelling[1:])):
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        spellings = [_merge(spelling, best) for spelling in spellings]
    return merges


def _merge(spelling: list[str], pair: tuple[str, str]) -> list[str]:
    merged, i = [], 0
    while i < len(spelling):
        if tuple(spelling[i : i + 2]) == pair:
            merged.append(spelling[i] + spelling[i + 1])
            i += 2
        else:
            merged.append(spelling[i])
            i += 1
    return merged


def write_vocabulary(folder: Path) -> None:
    """Write `vocab.json` and `merges.txt` of the captions' words into an existing folder."""
    merges = learn_merges(words())
    alphabet = byte_alphabet()
    tokens = alphabet + [character + "</w>" for character in alphabet]
    distinct = dict.fromkeys(tokens + [left + right for left, right in merges] + [START, END])
    lines = ["#version: 0.2", *(f"{left} {right}" for left, right in merges)]
    vocabulary = {token: i for i, token in enumerate(distinct)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def make_tokenizer(folder: Path) -> CLIPTokenizer:
    """transformers' `CLIPTokenizer` of the captions' words, its vocabulary files left in `folder`."""
    from transformers import CLIPTokenizer

    write_vocabulary(folder)
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=MAX_LENGTH)

"""The bank of prompts: distinct embeddings once, who attends to which, and words past the encoder's limit."""

import warnings

import pytest
import torch

from instantas.regions import Region
from instantas.regions.prompts import PipelineEncoder, PromptBank, warn_of_cut
from instantas.testing import tiny

ALL = (0.0, 0.0, 1.0, 1.0)


def region(prompt, negative=None):
    return Region(prompt, box=ALL, negative_prompt=negative)


def encode(texts):
    """Embeddings that tell the texts apart: two tokens of three numbers."""
    return torch.stack([torch.full((2, 3), float(sum(map(ord, text)))) for text in texts])


def test_each_distinct_prompt_is_there_once():
    bank = PromptBank(((region("a"), region("b", "no")), (region("a", "no"),)))
    base = encode(["x", "x", "b"])
    bank.update(base, encode)
    assert torch.equal(bank.embeddings, encode(["x", "b", "a", "no"]))


def test_rows_that_a_picture_attends_to():
    bank = PromptBank(((region("a"), region("b", "no"), region("a")), (), (region("x"),)))
    bank.update(encode(["n", "n", "n", "x", "x", "x"]), encode)  # unconditional, then conditional, as a batch has them
    texts = {tuple(row[0].tolist()): name for row, name in zip(encode(["n", "x", "a", "b", "no"]), "nxab-")}
    names = [texts[tuple(row[0].tolist())] for row in bank.embeddings]
    elements = [(0, 0, False), (3, 0, True), (4, 1, True), (5, 2, True)]
    ids, slots = bank.attended(elements, 3)
    assert ids.dtype == torch.int32
    read = ["".join(names[i] for i in row if i >= 0) for row in ids.tolist()]
    assert read == ["n-", "xab", "x", "x"]
    assert slots.tolist() == [[0, 0, 1, 0], [0, 1, 2, 1], [0, 0, 0, 0], [0, 0, 0, 0]]


def test_made_anew_only_when_the_base_prompts_change():
    bank = PromptBank(((region("a"),),))
    base = encode(["x"])
    bank.update(base, encode)
    bank.update(base, encode)
    bank.update(base.clone(), encode)
    assert bank.version == 1
    base += 1  # the same tensor with other values
    bank.update(base, encode)
    assert bank.version == 2 and torch.equal(bank.embeddings[0], base[0])
    bank.update(base.double(), encode)
    assert bank.version == 3 and bank.embeddings.dtype == torch.float64


def test_tensors_of_inference_mode():
    bank = PromptBank(((region("a"),),))
    with torch.inference_mode():
        base = encode(["x"])
        bank.update(base, encode)
        base += 1
        bank.update(base, encode)
    assert bank.version == 2


def test_no_regions_need_no_encoder():
    bank = PromptBank(((),))
    bank.update(encode(["x", "y"]))
    assert torch.equal(bank.embeddings, encode(["x", "y"]))


@pytest.mark.parametrize(
    "encoder, error, words",
    [
        (None, ValueError, "encode: expected a pipeline, or a function .* got neither"),
        (lambda texts: [0.0], TypeError, r"encode: expected a tensor \(1, L, D\), got list"),
        (lambda texts: torch.zeros(2, 2, 3), ValueError, r"encode: expected \(1, L, D\), got \(2, 2, 3\)"),
        (lambda texts: torch.zeros(1, 3), ValueError, r"encode: expected \(1, L, D\), got \(1, 3\)"),
        (lambda texts: torch.zeros(1, 9, 4), ValueError, r"encode: expected embeddings \(prompts, tokens, 3\)"),
    ],
)
def test_bad_encoders(encoder, error, words):
    with pytest.raises(error, match=f"^{words}"):
        PromptBank(((region("a"),),)).update(encode(["x"]), encoder)


# The pipeline's encoders


@pytest.fixture(scope="module")
def pipe():
    return tiny.tiny_pipeline()


def test_encoded_as_the_pipeline_does(pipe):
    embedded = PipelineEncoder(pipe)(["red brick wall", "grass"])
    expected = [pipe.encode_prompt(text, "cpu", 1, False)[0] for text in ("red brick wall", "grass")]
    assert torch.allclose(embedded, torch.cat(expected), atol=1e-6) and not embedded.requires_grad


def test_two_encoders():
    pipe = tiny.tiny_xl_pipeline()
    expected = pipe.encode_prompt("red grass", device="cpu", do_classifier_free_guidance=False)[0]
    assert expected.shape == (1, 16, 64)
    assert torch.equal(PipelineEncoder(pipe)(["red grass"]), expected)


def test_words_past_the_limit_are_named(pipe):
    fits = " ".join(["grass"] * 14)  # of 16 tokens two mark start and end
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_cut(pipe, [fits])
    with pytest.warns(UserWarning, match="^prompt: expected at most 14 tokens, got 16; cut off: 'blue sky'$"):
        warn_of_cut(pipe, ["red", fits + " blue sky"])


@pytest.mark.parametrize("lengths", [[7], [0, 3], [8, 7], [7, -2], [7, 7, 7]])
def test_lengths_that_do_not_fit_the_base_prompts(lengths):
    with pytest.raises(ValueError, match="lengths: expected"):
        PromptBank([[Region("snow", box=(0, 0, 1, 1))]]).update(torch.zeros(2, 7, 4), lambda texts: None, lengths)

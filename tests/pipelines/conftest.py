"""A tiny UNet, embedded words and noise for the tests of regional prompts."""

import pytest
import torch

from instantas.regions.prompts import PipelineEncoder
from instantas.testing import tiny
from tests.pipelines.attending import WORDS


@pytest.fixture(scope="module")
def text():
    """Text -> its embedding (1, 16, 32)."""
    pipe = tiny.tiny_pipeline()
    embedded = {word: PipelineEncoder(pipe)([word]) for word in (*WORDS, "", "stone")}
    return lambda *texts: torch.cat([embedded[t] for t in texts])


@pytest.fixture
def unet():
    return tiny.unet()


@pytest.fixture(scope="module")
def noise():
    return torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))

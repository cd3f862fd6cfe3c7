"""Decoding in tiles against decoding at once."""

import pytest
import torch
from diffusers import AutoencoderTiny

from instantas import demo
from instantas.pipelines import codec
from instantas.pipelines.codec import decode
from instantas.testing.tiny import autoencoder

LEVEL = 2 / 255  # of a picture of 8 bits, in -1..1


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(codec, "TILE", 42)


@pytest.fixture(scope="module")
def embedded():
    return AutoencoderTiny.from_pretrained(demo.folder(), subfolder="vae")


def latents(height, width, seed=0):
    return torch.randn(1, 4, height, width, generator=torch.Generator().manual_seed(seed))


def at_once(vae, given):
    with torch.no_grad():
        return vae.decode(given / vae.config.scaling_factor, return_dict=False)[0]


@pytest.mark.parametrize("size", [(43, 70), (20, 90), (91, 20)])
def test_tiles_of_a_decoder_without_norms_are_what_it_gives_at_once(size, small_tiles, embedded):
    given = latents(*size)
    with torch.no_grad():
        tiled = decode(embedded, given)
    whole = at_once(embedded, given)
    assert tiled.shape == whole.shape == (1, 3, 8 * size[0], 8 * size[1])
    assert (tiled - whole).abs().max() < LEVEL


def test_group_norms_leave_no_border_between_tiles(small_tiles):
    vae, given = autoencoder(), latents(32, 150)
    with torch.no_grad():
        difference = decode(vae, given) - at_once(vae, given)
    jumps = difference.diff(dim=-1).abs().mean((0, 1, 2))  # of what tiling changes, from column to column
    assert jumps.max() < 4 * jumps.mean()


def test_small_canvases_are_decoded_at_once(embedded):
    given = latents(10, 31)
    with torch.no_grad():
        assert torch.equal(decode(embedded, given), at_once(embedded, given))


@pytest.mark.parametrize("size", [(16, 30), (12, 100), (45, 44)])
@pytest.mark.parametrize("wrap", [(False, True), (True, False), (True, True)])
def test_wrapped_pictures_turn_with_their_latents(size, wrap, small_tiles, embedded):
    given = latents(*size)
    turns = [side // 3 if wraps else 0 for side, wraps in zip(size, wrap)]
    with torch.no_grad():
        straight, turned = decode(embedded, given, wrap), decode(embedded, given.roll(turns, (2, 3)), wrap)
    assert (straight.roll([8 * turn for turn in turns], (2, 3)) - turned).abs().max() < LEVEL


def test_every_picture_of_a_batch(small_tiles, embedded):
    given = torch.cat([latents(43, 45, seed) for seed in range(2)])
    with torch.no_grad():
        both = decode(embedded, given)
        for i in range(2):
            assert torch.allclose(both[i], decode(embedded, given[i : i + 1])[0], atol=1e-5)


def test_what_overflows_in_half_precision_is_decoded_in_single():
    vae = autoencoder().half()
    assert vae.config.force_upcast
    seen = []
    vae.decoder.register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
    with torch.no_grad():
        decode(vae, latents(8, 8).half())
    assert seen == [torch.float32] and vae.dtype == torch.float16


def test_latents_with_a_mean_and_a_spread():
    vae, given = autoencoder(), latents(8, 8)
    vae.register_to_config(latents_mean=[0.1, 0.2, 0.3, 0.4], latents_std=[1.0, 2.0, 3.0, 4.0])
    mean, spread = (torch.tensor(v).view(1, 4, 1, 1) for v in ([0.1, 0.2, 0.3, 0.4], [1.0, 2.0, 3.0, 4.0]))
    with torch.no_grad():
        wanted = vae.decode(given * spread / vae.config.scaling_factor + mean, return_dict=False)[0]
        assert torch.allclose(decode(vae, given), wanted, atol=1e-5)

"""Pictures in bands: bit for bit what is decoded at once, and no more of it than a row of tiles at a time."""

import weakref
from itertools import islice

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from instantas import InstantASPipeline
from instantas.pipelines import codec, tiles
from instantas.testing.tiny import autoencoder, tiny_pipeline


def of_layers(seed=0, **settings):
    """Small and of Stable Diffusion's shape: group norms, attention in the middle, four levels."""
    torch.manual_seed(seed)
    kinds = dict(down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4)
    shape = dict(block_out_channels=(4, 8, 8, 8), layers_per_block=1, norm_num_groups=4)
    return AutoencoderKL(**shape | kinds | settings).eval()


def latents(height, width, seed=0):
    return torch.randn(1, 4, height, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("wrap", [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize(
    "kind, size, tile", [("layers", (23, 40), (9, 40)), ("tiny", (61, 10), 16), ("layers", (30, 33), (15, 17))]
)
@torch.no_grad()
def test_bands_are_the_decoded_picture_bit_for_bit(kind, size, tile, wrap):
    vae = of_layers() if kind == "layers" else autoencoder(tiny=True)
    given = latents(*size)
    whole = codec.decode(vae, given, wrap=wrap, tiles=tile)[0]
    found = list(codec.bands(vae, given, wrap=wrap, tiles=tile))
    assert len(found) == -(-size[0] // (tile if isinstance(tile, int) else tile[0]))
    assert torch.equal(torch.cat(found, 1), whole)


@torch.no_grad()
def test_what_is_decoded_at_once_is_one_band():
    vae, given = of_layers(), latents(12, 20)
    (band,) = codec.bands(vae, given)
    assert torch.equal(band, codec.decode(vae, given)[0])


@torch.no_grad()
def test_a_band_is_there_before_the_next_one_is_decoded(monkeypatch):
    passed, plain = [], tiles.Statistics.used
    monkeypatch.setattr(tiles.Statistics, "used", lambda self: passed.append(1) or plain(self))
    found = codec.bands(of_layers(), latents(30, 33), tiles=(10, 11))
    assert passed == []
    for rows in (1, 2, 3):
        next(found)
        assert len(passed) == 3 * rows
    assert next(found, None) is None


@torch.no_grad()
def test_half_precision_that_overflows_runs_in_single_until_the_last_band():
    vae = of_layers(force_upcast=True).half()
    found = codec.bands(vae, latents(30, 12).half(), tiles=10)
    assert next(found).dtype == torch.float32 and vae.dtype == torch.float32
    list(found)
    assert vae.dtype == torch.float16
    for _ in islice(codec.bands(vae, latents(30, 12).half(), tiles=10), 1):  # and where nobody asks for the rest
        pass
    assert vae.dtype == torch.float16


def test_other_latents_are_refused():
    with pytest.raises(ValueError, match="latents: expected those of one picture, got 2"):
        next(codec.bands(of_layers(), latents(8, 8).repeat(2, 1, 1, 1)))
    with pytest.raises(ValueError, match="tiles: expected"):
        next(codec.bands(of_layers(), latents(8, 8), tiles="small"))


@pytest.mark.parametrize(
    "size, wrap", [((75, 40), (False, True)), ((75, 37), (False, False)), ((80, 37), (True, False))]
)
def test_a_pipelines_bands_are_the_pixels_of_its_picture(size, wrap):
    pipe = InstantASPipeline.from_pipe(tiny_pipeline())
    given = latents(*pipe.canvas(*size)).requires_grad_()
    picture = np.asarray(pipe.decode(given, *size, wrap=wrap, tiles=4)[0])
    found = list(pipe.bands(given, *size, wrap=wrap, tiles=4))
    assert all(band.dtype == np.uint8 and band.shape[1:] == (size[1], 3) for band in found) and len(found) == 3
    assert np.array_equal(np.concatenate(found), picture)


def test_a_pipeline_with_a_safety_checker_has_no_bands():
    pipe = InstantASPipeline.from_pipe(tiny_pipeline())
    assert not pipe.needs_whole_pictures
    pipe.pipe.safety_checker = torch.nn.Identity()
    assert pipe.needs_whole_pictures
    with pytest.raises(ValueError, match="safety_checker, watermark: expected none"):
        next(pipe.bands(latents(8, 8), 64, 64))
    with pytest.raises(ValueError, match="latents: expected"):
        next(pipe.bands(latents(8, 9), 64, 64))


# What is held


class Alive(TorchDispatchMode):
    """Counts the bytes of all tensors that are made while it is entered, at their most."""

    def __init__(self):
        super().__init__()
        self.sizes, self.most = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for each in tree_leaves(result):
            storage = each.untyped_storage()
            if storage._cdata not in self.sizes:
                self.sizes[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.sizes.pop, storage._cdata)
        self.most = max(self.most, sum(self.sizes.values()))
        return result


@pytest.mark.parametrize("attention", [True, False])
@torch.no_grad()
def test_what_the_middle_block_holds_is_known_beforehand(attention):
    vae, given = of_layers(mid_block_add_attention=attention), latents(24, 40)
    activation = 8 * 24 * 40 * 4
    with Alive() as alive:
        codec._through(codec._decoding(vae, None).before, given)
    known = codec.middle_bytes(vae, 24, 40)
    assert known == (7 if attention else 4) * activation  # and on the CPU a copy for a layer of the attention
    assert known <= alive.most < known + 2 * activation


def test_a_picture_in_tiles_is_held_once(monkeypatch):
    made, plain = [], codec.in_tiles
    monkeypatch.setattr(codec, "in_tiles", lambda *given, **how: made.append(plain(*given, **how)) or made[-1])
    picture = codec.decode(autoencoder(tiny=True), latents(5, 31), tiles=21)
    assert picture.data_ptr() == made[0].data_ptr()


def test_float16_that_overflows_counts_as_float32():
    half = of_layers(force_upcast=False).half()
    assert codec.middle_bytes(of_layers().half(), 5, 6) == codec.middle_bytes(of_layers(), 5, 6) == 7 * 8 * 30 * 4
    assert codec.middle_bytes(half, 5, 6) == 7 * 8 * 30 * 2
    assert codec.middle_bytes(autoencoder(tiny=True), 5, 6) == 0
    unknown = of_layers(up_block_types=("AttnUpDecoderBlock2D",) * 4)
    assert codec.middle_bytes(unknown, 5, 6) == 0

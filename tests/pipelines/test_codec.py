"""Pictures in tiles against pictures at once, both ways."""

import threading

import diffusers
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from diffusers.hooks import HookRegistry
from torch import nn

from instantas import demo
from instantas.pipelines import codec, tiles
from instantas.pipelines.codec import bands, decode, encode
from instantas.testing.tiny import autoencoder

SEEDS = range(3)
TILE = (20, 50)  # cells


@pytest.fixture(scope="module")
def embedded():
    return AutoencoderTiny.from_pretrained(demo.folder(), subfolder="vae")


def of_layers(seed=0, *, attention=False, **settings):
    """Small and of Stable Diffusion's shape: group norms, attention in the middle (or everywhere), four levels."""
    torch.manual_seed(seed)
    kinds = (
        ("AttnDownEncoderBlock2D", "AttnUpDecoderBlock2D") if attention else ("DownEncoderBlock2D", "UpDecoderBlock2D")
    )
    shape = dict(block_out_channels=(8, 16, 16, 16), layers_per_block=1, norm_num_groups=4)
    shape |= dict(down_block_types=kinds[:1] * 4, up_block_types=kinds[1:] * 4)
    return AutoencoderKL(**shape | settings).eval()


def latents(height, width, seed=0):
    return torch.randn(1, 4, height, width, generator=torch.Generator().manual_seed(seed))


def halves(height, width, seed=0):
    """One half bright and flat, the other dark and busy."""
    given = latents(height, width, seed)
    left = torch.arange(width) < width // 2
    return 0.18215 * torch.where(left, 0.3 * given + 1, 1.5 * given - 0.5)


@torch.no_grad()
def at_once(vae, given):
    return vae.decode(given / vae.config.scaling_factor, return_dict=False)[0]


def close(result, whole, mean=1e-3, worst=2e-2):
    """In parts of the range."""
    off, span = (result - whole).abs(), whole.max() - whole.min()
    return off.mean() < mean * span and off.max() < worst * span


@pytest.mark.parametrize("size", [(23, 40), (10, 70), (61, 10)])
@torch.no_grad()
def test_tiles_of_a_decoder_without_norms_are_what_it_gives_at_once(size, embedded):
    given = latents(*size)
    whole = at_once(embedded, given)
    assert whole.shape == (1, 3, 8 * size[0], 8 * size[1])
    assert torch.allclose(decode(embedded, given, tiles=16), whole, atol=1e-5)
    pictures = whole.clamp(-1, 1)
    assert torch.allclose(encode(embedded, pictures, tiles=16), encode(embedded, pictures, tiles="whole"), atol=1e-5)


@torch.no_grad()
def test_layers_of_stable_diffusion_without_norms_are_exact_too():
    vae = of_layers(layers_per_block=2)
    for part in (vae.decoder, vae.encoder):
        part.conv_norm_out = nn.Identity()
        for module in part.modules():
            if isinstance(module, diffusers.models.resnet.ResnetBlock2D):
                module.norm1 = module.norm2 = nn.Identity()
    given = latents(9, 40)
    whole = at_once(vae, given)
    assert torch.allclose(decode(vae, given, tiles=5), whole, atol=1e-5 * float(whole.abs().max()))
    ours, theirs = (encode(vae, whole, tiles=how, sample_mode="argmax") for how in (5, "whole"))
    assert torch.allclose(ours, theirs, atol=1e-5 * float(theirs.abs().max()))


@pytest.mark.parametrize("seed", SEEDS)
@torch.no_grad()
def test_group_norms_see_the_whole_picture(seed):
    vae, given = of_layers(seed), halves(24, 150, seed)
    whole, tiled = at_once(vae, given), decode(vae, given, tiles=TILE)
    assert close(tiled, whole)
    contrasts = [a.std() / b.std() for a, b in zip(tiled.tensor_split(15, -1), whole.tensor_split(15, -1))]
    assert 0.99 < min(contrasts) and max(contrasts) < 1.01


@pytest.mark.parametrize("seed", SEEDS)
@torch.no_grad()
def test_group_norms_of_the_encoder_too(seed):
    vae = of_layers(seed)
    pictures = at_once(vae, halves(24, 150, seed))
    whole, tiled = (encode(vae, pictures, tiles=how, sample_mode="argmax") for how in ("whole", TILE))
    assert torch.equal(whole, vae.encode(pictures).latent_dist.mode() * vae.config.scaling_factor)
    assert close(tiled, whole)


@torch.no_grad()
def test_what_the_sample_does_not_see_is_in_the_statistics():
    vae, given = of_layers(), halves(16, 150)
    hidden = torch.ones(150, dtype=torch.bool)
    hidden[tiles._blocks(150, 1)] = False
    given[..., hidden] *= 1.5
    assert hidden.sum() > 75 and close(decode(vae, given, tiles=TILE), at_once(vae, given))


@torch.no_grad()
def test_flat_pictures_are_as_at_once():
    vae, given = of_layers(), torch.zeros(1, 4, 8, 100)
    assert torch.allclose(decode(vae, given, tiles=TILE), at_once(vae, given), atol=2e-2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_as_good_in_tiles(dtype):
    vae, given = of_layers(force_upcast=False), halves(4, 30)
    with torch.inference_mode():
        exact = at_once(vae, given), decode(vae, given, tiles=15)
        vae, given = vae.to(dtype), given.to(dtype)
        rounded = at_once(vae, given), decode(vae, given, tiles=15)
    assert rounded[1].dtype == dtype
    whole, tiled = ((a.float() - b).norm() for a, b in zip(rounded, exact))
    assert tiled < 1.5 * whole


@torch.no_grad()
def test_small_canvases_are_decoded_at_once_and_large_ones_in_tiles(monkeypatch):
    vae, given = autoencoder(tiny=True), latents(10, 31)
    assert torch.equal(decode(vae, given), at_once(vae, given))
    monkeypatch.setattr(codec, "TILE", 42)
    shapes, plain = [], vae.decode
    monkeypatch.setattr(vae, "decode", lambda x, **how: shapes.append(tuple(x.shape[-2:])) or plain(x, **how))
    for size in ((42, 42), (42, 43), (9, 400)):
        decode(vae, latents(*size))
    assert shapes[0] == (42, 42) and len(shapes) > 20 and all(max(shape) <= 42 for shape in shapes)


@pytest.mark.parametrize("size", [(16, 30), (5, 60), (25, 24)])
@pytest.mark.parametrize("wrap", [(False, True), (True, False), (True, True)])
@pytest.mark.parametrize("how", ["whole", 21])
@torch.no_grad()
def test_wrapped_pictures_turn_with_their_latents(size, wrap, how):
    vae, given = autoencoder(tiny=True), latents(*size)
    turns = [side // 3 if wraps else 0 for side, wraps in zip(size, wrap)]
    straight, turned = (decode(vae, x, wrap=wrap, tiles=how) for x in (given, given.roll(turns, (2, 3))))
    moves = [8 * turn for turn in turns]
    assert torch.allclose(straight.roll(moves, (2, 3)), turned, atol=1e-5)
    pictures = straight.clamp(-1, 1)
    there, back = (encode(vae, x, wrap=wrap, tiles=how) for x in (pictures, pictures.roll(moves, (2, 3))))
    assert torch.allclose(there.roll(turns, (2, 3)), back, atol=1e-5)


@pytest.mark.parametrize("how", ["whole", (12, 25)])
@torch.no_grad()
def test_wrapped_pictures_turn_with_norms_and_attention(how):
    vae, given = of_layers(), halves(12, 80)
    settings = dict(wrap=(True, True), tiles=how)
    straight, turned = (decode(vae, x, **settings) for x in (given, given.roll((5, 33), (2, 3))))
    assert close(straight.roll((40, 264), (2, 3)), turned)
    assert close(straight, decode(vae, given, wrap=(True, True), tiles="whole"))
    settings |= dict(sample_mode="argmax")
    there, back = (encode(vae, x, **settings) for x in (straight, straight.roll((40, 264), (2, 3))))
    assert close(there.roll((5, 33), (2, 3)), back)


@torch.no_grad()
def test_every_picture_of_a_batch():
    vae, given = of_layers(), torch.cat([halves(16, 80, seed) for seed in range(2)])
    both = decode(vae, given, tiles=TILE)
    back = encode(vae, both, tiles=TILE, sample_mode="argmax")
    for i in range(2):
        assert torch.equal(both[i], decode(vae, given[i : i + 1], tiles=TILE)[0])
        assert torch.equal(back[i], encode(vae, both[i : i + 1], tiles=TILE, sample_mode="argmax")[0])


def test_what_overflows_in_half_precision_runs_in_single():
    vae = autoencoder().half()
    assert vae.config.force_upcast
    seen = []
    vae.decoder.register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
    vae.encoder.register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
    with torch.no_grad():
        encode(vae, decode(vae, latents(8, 8).half()))
    assert seen == [torch.float32] * 2 and vae.dtype == torch.float16


@torch.no_grad()
def test_threads_that_share_an_autoencoder_have_it_in_single_until_the_last_is_done():
    """One begins while another decodes, which ends first; bands that nobody takes to their end count until they go."""
    vae, given = autoencoder().half(), latents(8, 8).half()
    wanted, found = decode(vae, given), {}
    inside, go_on = ({name: threading.Event() for name in "ab"} for _ in range(2))

    def wait(module, args):
        name = threading.current_thread().name
        inside[name].set()
        go_on[name].wait(60)

    hook = vae.decoder.conv_in.register_forward_pre_hook(wait)
    threads = [threading.Thread(target=lambda n=n: found.update({n: decode(vae, given)}), name=n) for n in "ab"]
    for thread in threads:
        thread.start()
        inside[thread.name].wait(60)
    for thread in threads:
        go_on[thread.name].set()
        thread.join()
    hook.remove()
    assert torch.equal(found["a"], wanted) and torch.equal(found["b"], wanted) and vae.dtype == torch.float16
    some = codec.bands(vae, given, tiles=4)
    next(some)
    assert torch.equal(decode(vae, given), wanted) and vae.dtype == torch.float32
    some.close()
    assert vae.dtype == torch.float16


def test_tiles_need_no_gradients_to_be_switched_off():
    vae = of_layers()
    with torch.no_grad():
        wanted = decode(vae, latents(16, 20), tiles=8)
        back = encode(vae, wanted, tiles=8, sample_mode="argmax")
    assert torch.equal(decode(vae, latents(16, 20), tiles=8), wanted)
    assert torch.equal(torch.cat([*codec.bands(vae, latents(16, 20), tiles=8)], dim=1), wanted[0])
    assert torch.equal(encode(vae, wanted, tiles=8, sample_mode="argmax"), back)
    assert decode(vae, latents(8, 8).requires_grad_()).requires_grad  # at once they pass


def test_latents_with_a_mean_and_a_spread():
    vae, given = autoencoder(), latents(8, 8)
    vae.register_to_config(latents_mean=[0.1, 0.2, 0.3, 0.4], latents_std=[1.0, 2.0, 3.0, 4.0])
    mean, spread = (torch.tensor(v).view(1, 4, 1, 1) for v in ([0.1, 0.2, 0.3, 0.4], [1.0, 2.0, 3.0, 4.0]))
    with torch.no_grad():
        wanted = vae.decode(given * spread / vae.config.scaling_factor + mean, return_dict=False)[0]
        assert torch.allclose(decode(vae, given), wanted, atol=1e-5)
        wanted = (vae.encode(wanted).latent_dist.mode() - mean) * vae.config.scaling_factor / spread
        assert torch.allclose(encode(vae, decode(vae, given), sample_mode="argmax"), wanted, atol=1e-5)


@pytest.mark.parametrize("several", [False, True])
@torch.no_grad()
def test_latents_are_drawn_as_diffusers_draws_them(several):
    vae, pictures = of_layers(), torch.rand(2, 3, 32, 40, generator=torch.Generator().manual_seed(0))

    def seeded():
        generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
        return generators if several else generators[0]

    wanted = vae.encode(pictures).latent_dist.sample(seeded()) * vae.config.scaling_factor
    assert torch.allclose(encode(vae, pictures, generator=seeded()), wanted, atol=1e-6)


@torch.no_grad()
def test_nothing_is_left_behind_by_an_error():
    vae, given = of_layers(), halves(16, 100)
    before = {name: dict(vars(module)) for name, module in vae.named_modules()}
    wanted = decode(vae, given, tiles=TILE)
    calls = []

    def fail(module, args):
        calls.append(args)
        if len(calls) == 2:  # in the first tile, after the sample
            raise RuntimeError("stop")

    hook = vae.decoder.conv_out.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="stop"):
        decode(vae, given, tiles=TILE)
    hook.remove()
    assert torch.equal(decode(vae, given, tiles=TILE), wanted) and torch.equal(at_once(vae, given), at_once(vae, given))
    assert {name: dict(vars(module)) for name, module in vae.named_modules()} == before
    assert not torch.overrides._get_current_function_mode_stack()


@torch.no_grad()
def test_an_offloaded_autoencoder_is_fetched_before_its_layers_run():
    class Hook:
        fetched = 0

        def pre_forward(self, module):
            self.fetched += 1

    vae = of_layers()
    vae._hf_hook = Hook()
    decode(vae, halves(8, 60), tiles=TILE)
    assert vae._hf_hook.fetched


@pytest.mark.parametrize("attention", [True, False], ids=["attention", "hook"])
@torch.no_grad()
def test_layers_that_are_not_known_run_whole(attention, monkeypatch):
    vae, given = of_layers(attention=attention), latents(10, 10)
    if not attention:  # weights come when all of the decoder or encoder is called
        HookRegistry.check_if_exists_or_initialize(vae.decoder)
        HookRegistry.check_if_exists_or_initialize(vae.encoder)
    monkeypatch.setattr(codec, "TILE", 8)
    whole = at_once(vae, given)
    assert torch.equal(decode(vae, given), whole)
    assert torch.equal(
        encode(vae, whole, sample_mode="argmax"), encode(vae, whole, tiles="whole", sample_mode="argmax")
    )
    for refused in (lambda: decode(vae, given, tiles=8), lambda: encode(vae, whole, tiles=8)):
        with pytest.raises(
            ValueError, match="tiles: expected 'auto' or 'whole' for an AutoencoderKL of such layers, got 8"
        ):
            refused()


@torch.no_grad()
def test_the_asymmetric_decoder():
    torch.manual_seed(0)
    down, up = ("DownEncoderBlock2D",) * 2, ("UpDecoderBlock2D",) * 2
    settings = dict(down_block_out_channels=(8, 16), up_block_out_channels=(8, 16), norm_num_groups=4)
    vae = diffusers.AsymmetricAutoencoderKL(down_block_types=down, up_block_types=up, **settings).eval()
    given = halves(12, 90)
    assert close(decode(vae, given, tiles=TILE), at_once(vae, given))


@pytest.mark.parametrize(
    "wrong, error", [("half", ValueError), (0, ValueError), (1.5, TypeError), ((1, 2, 3), ValueError)]
)
def test_other_tiles_are_refused(wrong, error):
    vae = of_layers()
    with pytest.raises(error, match="^tiles: expected "):
        decode(vae, latents(8, 8), tiles=wrong)
    with pytest.raises(error, match="^tiles: expected "):
        encode(vae, torch.zeros(1, 3, 64, 64), tiles=wrong)


def test_other_pictures_and_ways_to_draw_are_refused():
    with pytest.raises(ValueError, match=r"pictures: expected sides of whole cells, 8 pixels each, got \(64, 60\)"):
        encode(of_layers(), torch.zeros(1, 3, 64, 60))
    with pytest.raises(ValueError, match="sample_mode: expected one of sample, argmax, got 'mean'"):
        encode(of_layers(), torch.zeros(1, 3, 64, 64), sample_mode="mean")


@pytest.mark.parametrize("shape", [(4, 8, 8), (0, 4, 8, 8), (1, 3, 8, 8), (1, 4, 0, 8)])
def test_what_is_no_batch_of_latents_or_pictures_is_refused(shape):
    vae, evaluated = of_layers(), []
    for part in (vae.decoder, vae.encoder):
        part.conv_in.register_forward_hook(lambda *_: evaluated.append(1))
    for use in (decode, lambda *given: list(bands(*given))):
        with pytest.raises(ValueError, match=r"^latents: expected .*got \(" + str(shape)[1:-1]):
            use(vae, torch.zeros(shape))
    channels = {3: 4, 4: 3}
    shape = *(channels.get(side, side) for side in shape[:-2]), 8 * shape[-2], 64
    with pytest.raises(ValueError, match=r"^pictures: expected .*got \(" + str(shape)[1:-1]):
        encode(vae, torch.zeros(shape))
    with pytest.raises(TypeError, match="^pictures: expected a tensor"):
        encode(vae, [[0.0]])
    assert not evaluated


@pytest.mark.parametrize("number", [1, 3])
def test_a_list_has_a_generator_for_each_picture(number):
    some = [torch.Generator()] * number
    message = f"^generator: expected one for each of 2 pictures, got {number}$"
    with pytest.raises(ValueError, match=message):
        decode(of_layers(), torch.zeros(2, 4, 8, 8), generator=some)
    with pytest.raises(ValueError, match=message):
        encode(of_layers(), torch.zeros(2, 3, 64, 64), generator=some)


def test_how_far_layers_reach():
    vae = of_layers(layers_per_block=2)
    assert tiles.reach(codec._decoding(vae, None).modules) == (7, 1 / 8)
    assert tiles.reach(codec._encoding(vae).modules) == (43, 8)

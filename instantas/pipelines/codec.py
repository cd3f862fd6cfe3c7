"""Latents to pictures and back: the autoencoder on canvases of any size, in tiles that leave no trace."""

from __future__ import annotations

import contextlib
import functools
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from diffusers import AutoencoderTiny
from diffusers.models.attention_processor import SpatialNorm
from diffusers.models.autoencoders.vae import Decoder, DiagonalGaussianDistribution, Encoder, MaskConditionDecoder
from diffusers.models.unets.unet_2d_blocks import DownEncoderBlock2D, UpDecoderBlock2D
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import nn

from instantas.checks import flag, pair, positive
from instantas.ops.validation import check_tensor
from instantas.pipelines.entry import module_of
from instantas.pipelines.tiles import Circle, in_bands, in_tiles, reach, spans
from instantas.sampling.fingerprint import digests
from instantas.sampling.parallel import shared
from instantas.sampling.settings import check_generators

TILE = 128  # cells: 1024 px, what SDXL's decoder is made for
SAMPLE_MODES = "sample", "argmax"
HELD = 7, 4  # activations that a middle block holds at once, at the least: with attention (queries, keys, ...), without

Layer = Callable[[torch.Tensor], torch.Tensor]


@shared
def decode(
    vae: Any,
    latents: torch.Tensor,
    *,
    wrap: tuple[bool, bool] = (False, False),
    tiles: str | int | tuple[int, int] = "auto",
    generator: torch.Generator | list[torch.Generator] | None = None,
    group: Any = None,
) -> torch.Tensor:
    """(B, C, H, W) latents as the diffusion model has them -> (B, 3, H cell, W cell) pictures in -1..1.

    In tiles, all layers of the latent's own resolution, the middle block with its attention among them, see the whole
    latent; the others run on one tile after the other, with the whole picture's statistics in their group norms. Only
    Stable Diffusion's autoencoders (AutoencoderKL, AsymmetricAutoencoderKL, with attention in the middle alone) and
    AutoencoderTiny can be taken apart so: others are decoded whole. No gradients pass tiles. The autoencoder itself is
    not changed; one in float16 that says it overflows (`force_upcast`) is in float32 while any thread decodes or
    encodes with it.

    Args:
        vae: a diffusers autoencoder.
        wrap: (vertical, horizontal): such an axis is a circle, and a picture turns with its latents.
        tiles: "auto": whole up to TILE^2 cells, else in tiles of that size; "whole"; or (vertical, horizontal) cells of
            a tile, without the halo around it.
        generator: for decoders that draw noise; a list has one for each picture.
        group: the processes that share the tiles, as `sampler.sample` takes it: all call alike, generators being rank
            0's, and get the pictures that one process gets, bit for bit. What has no tiles is decoded by all.

    Raises:
        TypeError, ValueError: for other `tiles`, for tiles of an autoencoder that cannot be taken apart, and for a list
            of generators that has not one for each picture.
        PeerError: where another process has failed or is gone.
    """
    _check("latents", latents, getattr(vae.config, "latent_channels", None))
    check_generators(len(latents), generator)
    _agreed(group, vae, generator, latents.device, latents=latents, wrap=wrap, tiles=tiles)
    generators = generator if isinstance(generator, list) else [generator] * len(latents)
    with _precise(vae):
        latents = _unscaled(vae, latents).to(vae.dtype)
        pictures = []
        for picture, source in zip(latents.split(1), generators):
            plain = functools.partial(_decoded, vae, generator=source)
            pictures.append(_evaluated(vae, picture, plain, _decoding(vae, plain), wrap, tiles, _in_tiles(group)))
        return torch.cat(pictures) if len(pictures) > 1 else pictures[0]  # which may be large: no copy


def bands(
    vae: Any,
    latents: torch.Tensor,
    *,
    wrap: tuple[bool, bool] = (False, False),
    tiles: str | int | tuple[int, int] = "auto",
    generator: torch.Generator | None = None,
) -> Iterator[torch.Tensor]:
    """The picture that `decode` gives, bit for bit, from top to bottom: (3, rows, W cell) for each row of tiles.

    The picture itself is never held, only one band of it; where `decode` has no tiles the whole picture is one band.

    Args:
        latents: (1, C, H, W).

    Raises:
        TypeError, ValueError: as `decode`, and for other than one picture.
    """
    _check("latents", latents, getattr(vae.config, "latent_channels", None))
    if len(latents) != 1:
        raise ValueError(f"latents: expected those of one picture, got {len(latents)}")
    with _precise(vae):
        latents = _unscaled(vae, latents).to(vae.dtype)
        plain = functools.partial(_decoded, vae, generator=generator)
        found = _evaluated(vae, latents, plain, _decoding(vae, plain), wrap, tiles, in_bands)
        for band in [found] if isinstance(found, torch.Tensor) else found:
            yield band[0]


@shared
def encode(
    vae: Any,
    pictures: torch.Tensor,
    *,
    wrap: tuple[bool, bool] = (False, False),
    tiles: str | int | tuple[int, int] = "auto",
    generator: torch.Generator | list[torch.Generator] | None = None,
    sample_mode: str = "sample",
    group: Any = None,
) -> torch.Tensor:
    """(B, 3, H cell, W cell) pictures in -1..1 -> (B, C, H, W) latents as the diffusion model has them.

    As `decode`, the other way round: tiles first, then the layers of the latent's own resolution on all of it.

    Args:
        generator: for what is drawn from the autoencoder's distribution; a list has one for each picture.
        sample_mode: "sample": drawn from that distribution; "argmax": its most likely latents. Where the autoencoder
            gives latents and no distribution, they are what is returned.
        group: as of `decode`.

    Raises:
        TypeError, ValueError: as `decode`, and for pictures that are not whole cells.
        PeerError: as `decode`.
    """
    if sample_mode not in SAMPLE_MODES:
        raise ValueError(f"sample_mode: expected one of {', '.join(SAMPLE_MODES)}, got {sample_mode!r}")
    _check("pictures", pictures, getattr(vae.config, "in_channels", None))
    check_generators(len(pictures), generator)
    told = dict(pictures=pictures, wrap=wrap, tiles=tiles, sample_mode=sample_mode)
    _agreed(group, vae, generator, pictures.device, **told)
    with _precise(vae):
        parts, over = _encoding(vae), _in_tiles(group)
        plain = functools.partial(_encoded, vae)
        each = pictures.to(vae.dtype).split(1)
        found = [_evaluated(vae, picture, plain, parts, wrap, tiles, over) for picture in each]
        if not isinstance(found[0], DiagonalGaussianDistribution):
            return _scaled(vae, torch.cat(found))
        distribution = DiagonalGaussianDistribution(torch.cat([each.parameters for each in found]))
        return _scaled(vae, distribution.mode() if sample_mode == "argmax" else distribution.sample(generator))


def middle_bytes(vae: Any, height: int, width: int) -> int:
    """What decoding (H, W) cells holds at once at the latent's resolution, of one picture, in tiles as without.

    At the least; 0 for decoders without such layers (AutoencoderTiny) and for those whose layers are not known.
    """
    parts = _decoding(vae, None)
    if not parts or not parts.before:
        return 0
    decoder: Any = module_of(vae.decoder)
    held = HELD[all(attention is None for attention in decoder.mid_block.attentions)]
    dtype = torch.float32 if overflows(vae) else vae.dtype
    return held * decoder.conv_in.out_channels * height * width * dtype.itemsize


def overflows(vae: Any) -> bool:
    """Whether it is in float16 and says that this is too small for it."""
    return vae.dtype == torch.float16 and getattr(vae.config, "force_upcast", False)


class Parts(NamedTuple):
    """An autoencoder's way in one direction: layers on the whole latent, layers in tiles, layers on the whole again."""

    before: Sequence[Layer]
    tiled: Sequence[Layer]
    after: Sequence[Layer]
    modules: Sequence[nn.Module]  # what those in tiles consist of
    unit: int  # pixels of a cell in what tiles are cut from


def _decoding(vae, plain) -> Parts | None:
    """None where the layers are not known."""
    decoder: Any = module_of(getattr(vae, "decoder", None))
    if isinstance(vae, AutoencoderTiny):
        return Parts([], [plain], [], [decoder], 1)
    known = _callable_by_layers(decoder, Decoder, MaskConditionDecoder)
    if not known or isinstance(decoder.conv_norm_out, SpatialNorm):
        return None
    if not all(isinstance(block, UpDecoderBlock2D) for block in decoder.up_blocks):
        return None
    first, *blocks = decoder.up_blocks
    resnets = (functools.partial(resnet, temb=None) for resnet in first.resnets)
    before = [vae.post_quant_conv, decoder.conv_in, decoder.mid_block, *resnets]
    tiled = [*(first.upsamplers or []), *blocks, decoder.conv_norm_out, decoder.conv_act, decoder.conv_out]
    return Parts([layer for layer in before if layer is not None], tiled, [], tiled, 1)


def _encoding(vae) -> Parts | None:
    encoder: Any = module_of(getattr(vae, "encoder", None))
    if isinstance(vae, AutoencoderTiny):
        unit = round(reach([encoder])[1])
        return Parts([], [functools.partial(_encoded, vae)], [], [encoder], unit)
    if not _callable_by_layers(encoder, Encoder):
        return None
    if not all(isinstance(block, DownEncoderBlock2D) for block in encoder.down_blocks):
        return None
    *blocks, last = encoder.down_blocks
    tiled = [encoder.conv_in, *blocks]
    after = [last, encoder.mid_block, encoder.conv_norm_out, encoder.conv_act, encoder.conv_out, vae.quant_conv]
    after = [*(layer for layer in after if layer is not None), DiagonalGaussianDistribution]
    return Parts([], tiled, after, tiled, round(reach(tiled)[1]))


def _callable_by_layers(module, *kinds) -> bool:
    """Not so where a hook of the whole module's brings its layers' weights (diffusers' group offloading)."""
    return isinstance(module, kinds) and not hasattr(module, "_diffusers_hook")


@apply_forward_hook
def _evaluated(vae, given, plain, parts, wrap, tiles, evaluate):
    """(1, C, H, W) of one picture or latent, whole or in tiles. First of all an offloaded autoencoder is fetched.

    evaluate: what goes over the tiles; with `in_bands`, where there are tiles and nothing comes after them, its bands.
    """
    wrap = pair("wrap", wrap, flag)
    unit = parts.unit if parts else 1
    cells = [side // unit for side in given.shape[-2:]]
    if any(side % unit for side in given.shape[-2:]):
        raise ValueError(f"pictures: expected sides of whole cells, {unit} pixels each, got {tuple(given.shape[-2:])}")
    modules = parts.modules if parts else ()
    halo = -(-reach(modules)[0] // unit)
    sides = _sides(vae, cells, parts is not None, tiles, halo)
    circle = Circle(wrap) if any(wrap) else contextlib.nullcontext()
    if sides is None:
        with circle:
            return plain(given)
    with circle, torch.no_grad():
        given = _through(parts.before, given)
    rows, columns = (spans(*axis, halo, wraps) for *axis, wraps in zip(cells, sides, wrap))
    norms = any(isinstance(module, nn.GroupNorm) for layer in modules for module in layer.modules())
    layers = torch.no_grad()(functools.partial(_through, parts.tiled))  # bands are evaluated later
    tiled = evaluate(layers, given, rows, columns, unit, norms)
    with circle, torch.no_grad():
        return _through(parts.after, tiled)


def _check(name, tensor, channels):
    check_tensor(name, tensor, "(B, C, H, W)", (None, channels, None, None))
    if not tensor.numel():
        raise ValueError(f"{name}: expected at least one, of some cells, got {tuple(tensor.shape)}")


def _agreed(group, vae, generator, device, **told):
    """Refuse what differs between the processes of a group; their generators are put where rank 0's are."""
    if group:
        group.same_networks(dict(vae=vae))
        group.same(digests(told))
        group.seeded(generator, device)


def _in_tiles(group):
    return functools.partial(in_tiles, ranks=group)


def _sides(vae, cells, known, tiles, halo) -> tuple[int, int] | None:
    """(vertical, horizontal) cells of a tile; None: all at once."""
    if isinstance(tiles, str):
        if tiles not in ("auto", "whole"):
            raise ValueError(f"tiles: expected 'auto', 'whole' or a number of cells, got {tiles!r}")
        if tiles == "whole" or not known or cells[0] * cells[1] <= TILE * TILE:
            return None
        return tuple(length if length <= TILE else max(TILE - 2 * halo, 1) for length in cells)
    sides = pair("tiles", tiles, positive)
    if not known:
        raise ValueError(f"tiles: expected 'auto' or 'whole' for an {type(vae).__name__} of such layers, got {tiles!r}")
    return None if sides[0] >= cells[0] and sides[1] >= cells[1] else sides


def _through(layers, x):
    for layer in layers:
        x = layer(x)
    return x


def _decoded(vae, latents, generator):
    return vae.decode(latents, return_dict=False, generator=generator)[0]


def _encoded(vae, pictures):
    """Latents, or their distribution."""
    return vae.encode(pictures, return_dict=False)[0]


def _unscaled(vae, latents):
    """Latents as the decoder takes them."""
    mean, spread = _latent_moments(vae, latents)
    return latents / vae.config.scaling_factor * spread + mean


def _scaled(vae, latents):
    """Latents as the diffusion model takes them."""
    mean, spread = _latent_moments(vae, latents)
    return (latents - mean) / spread * vae.config.scaling_factor


def _latent_moments(vae, latents):
    """(mean, spread) of each channel of the encoder's latents; 0 and 1 where the autoencoder does not say."""
    mean, spread = (getattr(vae.config, name, None) for name in ("latents_mean", "latents_std"))
    if mean is None or spread is None:
        return 0.0, 1.0
    return tuple(torch.tensor(values).view(1, -1, 1, 1).to(latents) for values in (mean, spread))


_widened: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # autoencoder: by how many it is used in float32
_widening = threading.RLock()


@contextlib.contextmanager
def _precise(vae):
    """The autoencoder in float32 while anybody uses it, if it overflows."""
    with _widening:
        users = _widened.get(vae, 0)
        narrow = overflows(vae)
        if narrow:
            vae.to(dtype=torch.float32)
        if narrow or users:
            _widened[vae] = users + 1
    try:
        yield
    finally:
        with _widening:
            if narrow or users:
                _widened[vae] -= 1
                if not _widened[vae]:
                    del _widened[vae]
                    vae.to(dtype=torch.float16)

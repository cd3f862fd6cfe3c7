"""Cross-attention layers of a diffusers network that can look up regional prompts: how they are put in and taken out.

What an evaluation attends to travels through the network in the place of `encoder_hidden_states`, from the call to the
layers, and is kept nowhere. So several threads can use one network at once, each with regions of its own or without.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers.image_processor import IPAdapterMaskProcessor
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor,
    AttnProcessor2_0,
    FusedAttnProcessor2_0,
    IPAdapterAttnProcessor,
    IPAdapterAttnProcessor2_0,
    IPAdapterXFormersAttnProcessor,
    SlicedAttnProcessor,
    XFormersAttnProcessor,
)
from diffusers.models.transformers.transformer_2d import Transformer2DModel

from instantas import ops
from instantas.pipelines.entry import SLOT, Entry, module_of
from instantas.regions.weights import Layout

PLAIN = (AttnProcessor, AttnProcessor2_0, FusedAttnProcessor2_0, SlicedAttnProcessor, XFormersAttnProcessor)
"""The processors that can be replaced: all compute the same plain cross-attention."""

IMAGES = (IPAdapterAttnProcessor, IPAdapterAttnProcessor2_0, IPAdapterXFormersAttnProcessor)
"""The same, and beside it attention to the tokens of an IP-Adapter's pictures."""


class Attended(NamedTuple):
    """What an evaluation of a network attends to.

    Attributes:
        layout: rows of the bank and their weights.
        keys, values: (P, L, heads, D) of each layer, the projected bank of prompts.
        mode: of `ops.regional_attention`.
        grid: (h, w) of the feature map that the queries come from, told by the block that a layer is in.
    """

    layout: Layout
    keys: tuple[torch.Tensor, ...]
    values: tuple[torch.Tensor, ...]
    mode: str
    grid: tuple[int, int] = (0, 0)


class RegionalAttnProcessor:
    """Cross-attention in which every query attends to the prompts of its place, by `ops.regional_attention`.

    Where no `Attended` comes, as in a thread without regions, it is the processor that it stands in for.

    Args:
        plain: that processor.
        number: of the layer.
    """

    def __init__(self, plain: Callable, number: int):
        self.plain, self.number = plain, number

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: Any = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if not isinstance(encoder_hidden_states, Attended):
            return self.plain(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        out = self.attend(attn, self.query(attn, hidden_states), encoder_hidden_states)
        return attn.to_out[1](attn.to_out[0](out.flatten(-2)))

    def query(self, attn: Attention, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, N, heads, D)"""
        query = attn.to_q(hidden_states).unflatten(-1, (attn.heads, -1))
        return query if attn.norm_q is None else attn.norm_q(query)

    def attend(self, attn: Attention, query: torch.Tensor, attended: Attended) -> torch.Tensor:
        """(B, N, heads, D)"""
        return ops.regional_attention(
            query,
            attended.keys[self.number].to(query.dtype),
            attended.values[self.number].to(query.dtype),
            attended.layout.ids,
            attended.layout.weights_at(attended.grid),
            mode=attended.mode,
            scale=attn.scale,
            order=attended.layout.orders.get(attended.grid),
            lengths=attended.layout.lengths,
        )


class RegionalIPAdapterAttnProcessor(RegionalAttnProcessor, IPAdapterAttnProcessor2_0):
    """As `RegionalAttnProcessor`, and every query attends to the tokens of an IP-Adapter's pictures beside its prompts.

    Its weights and scales are those of the processor that it stands in for, not copies.
    """

    def __init__(self, plain: torch.nn.Module, number: int):
        self.__dict__.update(plain.__dict__, plain=plain)
        self.number = number

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: Any = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
        scale: float = 1.0,
        ip_adapter_masks: Any = None,
    ) -> torch.Tensor:
        prompts = encoder_hidden_states[0] if isinstance(encoder_hidden_states, tuple) else None
        if not isinstance(prompts, Attended):
            given = encoder_hidden_states, attention_mask, temb, scale, ip_adapter_masks
            return self.plain(attn, hidden_states, *given)
        query = self.query(attn, hidden_states)
        out = self.attend(attn, query, prompts).flatten(-2)
        for share in self._shares(query, encoder_hidden_states[1], ip_adapter_masks):
            out = out + share
        return attn.to_out[1](attn.to_out[0](out))

    def _shares(self, query, images, masks):
        """(B, N, heads D) of each adapter, or of each of its pictures where they have masks."""
        if masks is None:
            masks = [None] * len(self.scale)
        elif not isinstance(masks, list):
            masks = list(masks.unsqueeze(1))
        if not len(masks) == len(images) == len(self.scale):
            raise ValueError(
                f"cross_attention_kwargs: expected ip_adapter_masks for each of {len(self.scale)} IP-Adapters, got "
                f"{len(masks)}"
            )
        for tokens, scale, to_key, to_value, mask in zip(images, self.scale, self.to_k_ip, self.to_v_ip, masks):
            pictures = [tokens.flatten(1, -2)] if mask is None else tokens.unbind(1)
            scales = scale if isinstance(scale, list) else [scale] * len(pictures)
            if len(pictures) != len(scales) or mask is not None and mask.shape[1] != len(pictures):
                raise ValueError(
                    f"cross_attention_kwargs: expected a scale and a mask of ip_adapter_masks for each of "
                    f"{tokens.shape[1]} pictures, got {len(scales)} and {0 if mask is None else mask.shape[1]}"
                )
            for number, (picture, share) in enumerate(zip(pictures, scales)):
                if share == 0:
                    continue
                out = _attention(query, to_key(picture), to_value(picture))
                if mask is not None:
                    out = out * IPAdapterMaskProcessor.downsample(mask[:, number], *out.shape).to(out)
                yield share * out


def _attention(query, key, value):
    """(B, N, heads D) of queries (B, N, heads, D), keys and values (k B, L, heads D): k go together, as in diffusers.

    A run without guidance that is given the embeddings of one with it, the negative ones too, has k = 2.
    """
    together = max(1, len(key) // len(query))
    key, value = (
        t.unflatten(0, (-1, together)).flatten(1, 2).unflatten(-1, query.shape[-2:]).transpose(1, 2)
        for t in (key, value)
    )
    return F.scaled_dot_product_attention(query.transpose(1, 2), key, value).transpose(1, 2).flatten(-2)


def projections(attn: Attention) -> tuple[torch.nn.Module, ...]:
    """Of keys and values: one where they are fused, else two."""
    return (attn.to_kv,) if attn.fused_projections else (attn.to_k, attn.to_v)


def project(attn: Attention, bank: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values (P, L, heads, D) of the bank (P, L, D)."""
    prompts = attn.norm_encoder_hidden_states(bank) if attn.norm_cross else bank
    weight = getattr(projections(attn)[0], "weight", None)
    if isinstance(weight, torch.Tensor) and weight.device.type != "meta":
        prompts = prompts.to(weight.device)  # of an offloaded network, not yet where it runs
    found = [projection(prompts) for projection in projections(attn)]
    key, value = found if len(found) == 2 else found[0].chunk(2, dim=-1)
    key, value = (t.unflatten(-1, (attn.heads, -1)).to(bank.device).contiguous() for t in (key, value))
    return key if attn.norm_k is None else attn.norm_k(key), value


_HERE: ContextVar[tuple] = ContextVar("users of networks in this thread or task", default=())
_CHANGING = threading.RLock()
_INSTALLED: weakref.WeakKeyDictionary[torch.nn.Module, Installation] = weakref.WeakKeyDictionary()


@contextlib.contextmanager
def installed(network: torch.nn.Module, user: Any) -> Iterator[None]:
    """Regional processors on a network inside of the block, for evaluations in this thread or task.

    The first of several users of a network puts them in, the last takes them out, whatever ends the blocks and in which
    order. Everybody else's evaluations are the plain ones.

    Args:
        network: compiled or not.
        user: its `prepare(layers, args, kwargs)` is told the processors by their layers and the arguments of an
            evaluation, and gives the arguments in their place.

    Raises:
        TypeError: for a network without layers to be replaced, and for processors that are not known.
        ValueError: for a second user in the same thread or task.
    """
    module = module_of(network)
    if not isinstance(module, torch.nn.Module):
        raise TypeError(f"model: expected a diffusers pipeline or UNet, got {type(module).__name__}")
    try:
        with _CHANGING:
            found = _INSTALLED.get(module)
            if found and (found.network is not network or any(other in found.users for other in _HERE.get())):
                raise ValueError("model: expected a network without regional prompts, got one that has them already")
            if found is None:
                found = Installation(network)
                _INSTALLED[module] = found
            found.add(user)
        _HERE.set((*_HERE.get(), user))
        yield
    finally:
        try:
            _leave(module, user)
        except BaseException:  # an interrupt: once more, as what was done before changes nothing
            _leave(module, user)
            raise


def _leave(module, user):
    _HERE.set(tuple(other for other in _HERE.get() if other is not user))
    with _CHANGING:
        found = _INSTALLED.get(module)
        if found is not None:
            found.remove(user)
            if not found.users:
                _INSTALLED.pop(module, None)


class Installation:
    """The regional processors of a network, and who uses them.

    Args:
        network: compiled or not.

    Attributes:
        layers: the processor of each layer.
    """

    def __init__(self, network: torch.nn.Module):
        self.blocks = cross_attention(network)
        layers = [attn for inside in self.blocks.values() for attn in inside]
        self.layers = {attn: _regional(attn.processor, number) for number, attn in enumerate(layers)}
        self.network = network
        self.users: list[Any] = []
        self._undo: list[Callable] = []

    def add(self, user: Any) -> None:
        self.users.append(user)
        if len(self.users) == 1:
            self._put_in()

    def remove(self, user: Any) -> None:
        """Nothing happens where it was removed before."""
        self.users = [other for other in self.users if other is not user]
        if not self.users:
            for undo in self._undo:
                undo()

    def _put_in(self):
        for attn, processor in self.layers.items():
            self._undo.append(lambda attn=attn, plain=processor.plain: attn.set_processor(plain))
            attn.set_processor(processor)
        for block in self.blocks:
            self._undo.append(block.register_forward_pre_hook(_tell_grid, with_kwargs=True).remove)
        entry = Entry.of(self.network)
        compiled = getattr(self.network, SLOT, None) if entry is None else entry.compiled
        if compiled is None:
            hook = self.network.register_forward_pre_hook(lambda _, a, k: self._prepared(a, k), with_kwargs=True)
            self._undo.append(hook.remove)
        else:  # compiled in place, hooks included: step in front of it

            def call(*args, **kwargs):
                args, kwargs = self._prepared(args, kwargs)
                return compiled(*args, **kwargs)

            where, name = (self.network, SLOT) if entry is None else (entry, "compiled")
            self._undo.append(lambda: setattr(where, name, compiled))
            setattr(where, name, call)

    @torch.compiler.disable
    def _prepared(self, args, kwargs):
        user = next((user for user in _HERE.get() if user in self.users), None)
        return (args, kwargs) if user is None else user.prepare(self.layers, args, kwargs)


def _regional(plain, number):
    kind = RegionalIPAdapterAttnProcessor if isinstance(plain, IMAGES) else RegionalAttnProcessor
    return kind(plain, number)


def cross_attention(network: torch.nn.Module) -> dict[Transformer2DModel, list[Attention]]:
    """The cross-attention layers of a network by the block that they are in.

    Raises:
        TypeError: for a network without any or with others, and for processors that are not known.
    """
    module = module_of(network)
    crossing = {m: None for m in module.modules() if isinstance(m, Attention) and m.is_cross_attention}
    if not crossing:
        raise TypeError(f"model: expected a network with cross-attention, got {type(module).__name__} without any")
    for attn in crossing:
        if type(attn.processor) not in PLAIN + IMAGES:
            raise TypeError(
                f"model: expected processors {', '.join(kind.__name__ for kind in PLAIN + IMAGES)}, got "
                f"{type(attn.processor).__name__}"
            )
    blocks = {}
    for block in module.modules():
        if isinstance(block, Transformer2DModel):
            blocks[block] = [attn for attn in block.modules() if attn in crossing]
    inside = sum(map(len, blocks.values()))
    if inside != len(crossing) or not _text_alone(module, any(isinstance(a.processor, IMAGES) for a in crossing)):
        raise TypeError(
            f"model: expected cross-attention to the text encoder's output in Transformer2DModel blocks alone, got "
            f"{type(module).__name__} with other layers"
        )
    return {block: layers for block, layers in blocks.items() if layers}


def _text_alone(module, images):
    """Whether prompts go to cross-attention as they are, with the tokens of pictures beside them or without."""
    config = getattr(module, "config", None)
    # by attribute: diffusers' load_ip_adapter sets that one, and leaves the entry
    embedded, dual, projected = (
        getattr(config, name, None) for name in ("addition_embed_type", "dual_cross_attention", "encoder_hid_dim_type")
    )
    elsewhere = embedded in ("text", "text_image") or dual or getattr(module, "text_encoder_hid_proj", None)
    return not elsewhere and projected == ("ip_image_proj" if images else None)


def with_prompts(args: tuple, kwargs: dict, position: int, prompts: Any) -> tuple[tuple, dict]:
    """Arguments with other `encoder_hidden_states`, which are at a position where they have no name."""
    if "encoder_hidden_states" in kwargs:
        return args, kwargs | {"encoder_hidden_states": prompts}
    return (*args[:position], prompts, *args[position + 1 :]), kwargs


def _tell_grid(block, args, kwargs):
    """A block's layers are told the size of the feature map along with the prompts."""
    given = kwargs["encoder_hidden_states"] if "encoder_hidden_states" in kwargs else args[1]
    beside = isinstance(given, tuple) and not isinstance(given, Attended)  # an IP-Adapter's pictures
    attended = given[0] if beside else given
    if not isinstance(attended, Attended):
        return None
    height, width = (args[0] if args else kwargs["hidden_states"]).shape[-2:]
    attended = attended._replace(grid=(height, width))
    return with_prompts(args, kwargs, 1, (attended, *given[1:]) if beside else attended)

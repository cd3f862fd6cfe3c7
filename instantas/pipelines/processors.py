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
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor,
    AttnProcessor2_0,
    FusedAttnProcessor2_0,
    SlicedAttnProcessor,
    XFormersAttnProcessor,
)
from diffusers.models.transformers.transformer_2d import Transformer2DModel

from instantas import ops
from instantas.regions.weights import Layout

PLAIN = (AttnProcessor, AttnProcessor2_0, FusedAttnProcessor2_0, SlicedAttnProcessor, XFormersAttnProcessor)
"""The processors that can be replaced: all compute the same plain cross-attention."""


class Attended(NamedTuple):
    """What an evaluation of a network attends to.

    Attributes:
        layout: rows of the bank and their weights.
        keys, values: (P, L, heads, D) of each layer, the projected bank of prompts.
        mode: of `ops.regional_attention`.
        grid: (h, w) of the feature map that the queries come from; None outside of blocks.
    """

    layout: Layout
    keys: tuple[torch.Tensor, ...]
    values: tuple[torch.Tensor, ...]
    mode: str
    grid: tuple[int, int] | None = None


class RegionalAttnProcessor:
    """Cross-attention in which every query attends to the prompts of its place, by `ops.regional_attention`.

    Where no `Attended` comes, as in a thread without regions, it is the processor that it stands in for.

    Args:
        plain: that processor.
        number: of the layer.
    """

    def __init__(self, plain: Callable, number: int):
        self.plain, self.number = plain, number

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
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
        )


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
    module = getattr(network, "_orig_mod", network)
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
        self.layers = {attn: RegionalAttnProcessor(attn.processor, number) for number, attn in enumerate(layers)}
        self.network, self.users, self._undo = network, [], []

    def add(self, user) -> None:
        self.users.append(user)
        if len(self.users) == 1:
            self._put_in()

    def remove(self, user) -> None:
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
        compiled = getattr(self.network, "_compiled_call_impl", None)
        if compiled is None:
            hook = self.network.register_forward_pre_hook(lambda _, a, k: self._prepared(a, k), with_kwargs=True)
            self._undo.append(hook.remove)
        else:  # compiled in place, hooks included: step in front of it

            def call(*args, **kwargs):
                args, kwargs = self._prepared(args, kwargs)
                return compiled(*args, **kwargs)

            self._undo.append(lambda: setattr(self.network, "_compiled_call_impl", compiled))
            self.network._compiled_call_impl = call

    @torch.compiler.disable
    def _prepared(self, args, kwargs):
        user = next((user for user in _HERE.get() if user in self.users), None)
        return (args, kwargs) if user is None else user.prepare(self.layers, args, kwargs)


def cross_attention(network: torch.nn.Module) -> dict[Transformer2DModel, list[Attention]]:
    """The cross-attention layers of a network by the block that they are in.

    Raises:
        TypeError: for a network without any or with others, and for processors that are not known.
    """
    module = getattr(network, "_orig_mod", network)
    crossing = {m: None for m in module.modules() if isinstance(m, Attention) and m.is_cross_attention}
    if not crossing:
        raise TypeError(f"model: expected a network with cross-attention, got {type(module).__name__} without any")
    for attn in crossing:
        if type(attn.processor) not in PLAIN:
            raise TypeError(
                f"model: expected processors {', '.join(kind.__name__ for kind in PLAIN)}, got "
                f"{type(attn.processor).__name__} (an IP-Adapter has to be unloaded first)"
            )
    blocks = {}
    for block in module.modules():
        if isinstance(block, Transformer2DModel):
            blocks[block] = [attn for attn in block.modules() if attn in crossing]
    inside = sum(map(len, blocks.values()))
    config = getattr(module, "config", {})
    unlike = ("encoder_hid_dim_type", "dual_cross_attention")
    if inside != len(crossing) or any(config.get(name) for name in unlike) or _adds_text(config):
        raise TypeError(
            f"model: expected cross-attention to the text encoder's output in Transformer2DModel blocks alone, got "
            f"{type(module).__name__} with other layers"
        )
    return {block: layers for block, layers in blocks.items() if layers}


def _adds_text(config):
    """Whether the network uses the prompt's embedding outside of cross-attention."""
    return config.get("addition_embed_type") in ("text", "text_image")


def with_prompts(args: tuple, kwargs: dict, position: int, prompts: Any) -> tuple[tuple, dict]:
    """Arguments with other `encoder_hidden_states`, which are at a position where they have no name."""
    if "encoder_hidden_states" in kwargs:
        return args, kwargs | {"encoder_hidden_states": prompts}
    return (*args[:position], prompts, *args[position + 1 :]), kwargs


def _tell_grid(block, args, kwargs):
    """A block's layers are told the size of the feature map along with the prompts."""
    attended = kwargs["encoder_hidden_states"] if "encoder_hidden_states" in kwargs else args[1]
    if not isinstance(attended, Attended):
        return None
    height, width = (args[0] if args else kwargs["hidden_states"]).shape[-2:]
    return with_prompts(args, kwargs, 1, attended._replace(grid=(height, width)))

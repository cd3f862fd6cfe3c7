"""A stand-in for CUDA graphs on the CPU: operations are recorded with their tensors, and done again on these.

As with a graph, recording changes nothing, replaying runs nothing of the host, and every tensor stays where it is. What
a capture forbids raises: reading a value on the host, and making a tensor from one. So does a replay that reads or
writes memory which was there before the capture and has been freed since: a graph keeps none but its own.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from instantas.ops import validation
from instantas.sampling import graphs, sampler

FORBIDDEN = {"aten::_local_scalar_dense", "aten::lift_fresh", "aten::nonzero", "aten::_unique2", "aten::equal"}


class _Place:
    """Where a tensor lies: in memory of the graph's own, which is held, or in other memory, which is not."""

    def __init__(self, tensor, own):
        storage = tensor.untyped_storage()
        self.own = own.get(storage._cdata)
        self.other = StorageWeakRef(storage) if self.own is None else None
        self.dtype, self.view = tensor.dtype, (tensor.storage_offset(), tensor.size(), tensor.stride())

    def tensor(self):
        storage = self.own
        if storage is None:
            storage = torch.UntypedStorage._new_with_weak_ptr(self.other.cdata)
        if storage is None:
            raise RuntimeError("a graph was replayed that needs memory which has been freed since its capture")
        return torch.empty(0, dtype=self.dtype).set_(storage, *self.view)


class Recorded(TorchDispatchMode):
    """Takes the place of `instantas.sampling.graphs.CudaGraph`."""

    active = False

    def __init__(self, function: Callable, pool: Any):
        super().__init__()
        self.operations: list[tuple] = []
        self.written: dict[int, tuple] = {}
        self.own: dict[int, torch.UntypedStorage] = {}
        Recorded.active = True
        try:
            with self:
                function()
        finally:
            Recorded.active = False
        for storage, before in self.written.values():
            storage.copy_(before)
        self.written.clear()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func._schema.name in FORBIDDEN:
            raise RuntimeError(f"{func}: operation not permitted when stream is capturing")
        for declared, value in zip(func._schema.arguments, args):
            if declared.alias_info is not None and declared.alias_info.is_write:
                storage = value.untyped_storage()
                self.written.setdefault(storage.data_ptr(), (storage, storage.clone()))
        result = func(*args, **kwargs)
        for _, new in self._fresh(func, result):
            self.own[new.untyped_storage()._cdata] = new.untyped_storage()
        places = tree_map_only(torch.Tensor, lambda tensor: _Place(tensor, self.own), (args, kwargs, result))
        self.operations.append((func, *places))
        return result

    @staticmethod
    def _fresh(func, result, places=None):
        """(place, tensor) of the results that are no views of an argument."""
        leaves = tree_leaves(result)
        for declared, new, place in zip(func._schema.returns, leaves, tree_leaves(places) if places else leaves):
            if declared.alias_info is None and isinstance(new, torch.Tensor):
                yield place, new

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, result in self.operations:
            args, kwargs = tree_map_only(_Place, _Place.tensor, (args, kwargs))
            for place, new in self._fresh(func, func(*args, **kwargs), result):
                place.tensor().copy_(new)


@contextlib.contextmanager
def recording() -> Iterator[list[Recorded]]:
    """Graphs on the CPU, whose latents may be captured too; gives the list of those that were made."""
    made: list[Recorded] = []
    tracing = validation.tracing

    def capture(function, pool):
        made.append(Recorded(function, pool))
        return made[-1]

    with (
        mock.patch.object(validation, "tracing", lambda tensor: Recorded.active or tracing(tensor)),
        mock.patch.object(graphs, "CudaGraph", capture),
        mock.patch.object(sampler, "check_graph", lambda *settings: None),
    ):
        yield made

"""A stand-in for CUDA graphs on the CPU: operations are recorded with their tensors, and done again on these.

As with a graph, recording changes nothing, replaying runs nothing of the host, and every tensor stays where it is. What
a capture forbids raises: reading a value on the host, and making a tensor from one.
"""

import contextlib
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from instantas.ops import validation
from instantas.sampling import graphs, sampler

FORBIDDEN = {"aten::_local_scalar_dense", "aten::lift_fresh", "aten::nonzero", "aten::_unique2", "aten::equal"}


class Recorded(TorchDispatchMode):
    """Takes the place of `instantas.sampling.graphs.CudaGraph`."""

    active = False

    def __init__(self, function, pool):
        super().__init__()
        self.operations, self.written = [], {}
        Recorded.active = True
        try:
            with self:
                function()
        finally:
            Recorded.active = False
        for storage, before in self.written.values():
            storage.copy_(before)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func._schema.name in FORBIDDEN:
            raise RuntimeError(f"{func}: operation not permitted when stream is capturing")
        for declared, value in zip(func._schema.arguments, args):
            if declared.alias_info is not None and declared.alias_info.is_write:
                storage = value.untyped_storage()
                self.written.setdefault(storage.data_ptr(), (storage, storage.clone()))
        result = func(*args, **kwargs)
        self.operations.append((func, args, kwargs, result))
        return result

    @torch.no_grad()
    def replay(self):
        for func, args, kwargs, result in self.operations:
            again = func(*args, **kwargs)
            for declared, old, new in zip(func._schema.returns, tree_leaves(result), tree_leaves(again)):
                if declared.alias_info is None and isinstance(old, torch.Tensor):
                    old.copy_(new)


@contextlib.contextmanager
def recording():
    """Graphs on the CPU, whose latents may be captured too; gives the list of those that were made."""
    made, tracing = [], validation.tracing

    def capture(function, pool):
        made.append(Recorded(function, pool))
        return made[-1]

    with (
        mock.patch.object(validation, "tracing", lambda tensor: Recorded.active or tracing(tensor)),
        mock.patch.object(graphs, "CudaGraph", capture),
        mock.patch.object(sampler, "_check_graph", lambda *settings: None),
    ):
        yield made

"""Several processes that run one command together: `torchrun --nproc_per_node 2 -m instantas generate ...`."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch
import torch.distributed as dist

from instantas.sampling.parallel import Ranks, ranks_of


@contextlib.contextmanager
def processes() -> Iterator[Ranks | None]:
    """Those that a launcher has started with this one, each with a GPU of its own; None: this one is alone.

    What fails in one is told in all. Rank 0 alone is heard on standard output.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) < 2 or "RANK" not in os.environ:
        yield None
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    dist.init_process_group()
    try:
        ranks = ranks_of(True)
        assert ranks is not None
        with contextlib.ExitStack() as stack:
            stack.enter_context(ranks.together())
            if ranks.rank:
                nowhere = stack.enter_context(open(os.devnull, "w"))
                stack.enter_context(contextlib.redirect_stdout(nowhere))
            yield ranks
    finally:
        dist.destroy_process_group()

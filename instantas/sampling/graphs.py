"""Steps of a sampling run in CUDA graphs: captured once, replayed for every step that is alike.

A captured step runs from gathering the windows to the scheduler's update. What differs between alike steps (timestep,
coefficients, noise levels, the windows' places) lies in tables on the device, one row a step; the graph begins by
taking the row that a counter on the device says, and adding one to the counter. Launching it is all that the host does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Any

import torch

from instantas.sampling.noise import Level
from instantas.windows import PlanTables


class CudaGraph:
    """A function of no arguments, captured: its kernels on the same memory, without the host's part.

    Args:
        function: launches kernels on the current stream and waits for none.
        pool: of memory, shared by graphs that are replayed one after the other.
    """

    def __init__(self, function: Callable, pool: Any):
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=pool):
            function()

    def replay(self) -> None:
        self.graph.replay()


class StepGraphs:
    """Advances a state, through graphs for steps of which there are three or more alike.

    The first of alike steps is not captured, which readies what a capture must not begin, kernels to be compiled among
    it; the second is. Steps with a view or an adjustment always run as they are. The state is kept in one place, and
    written over by every step.

    Args:
        advance: function of (state, step) that gives the next state (`step.State`, `step.Step`).
        steps: of the run, or the rest of them.
        phase: function of a `step.StepContext`; steps for which it differs are not alike. For a denoiser that does
            something else on the host from some step on.
    """

    def __init__(self, advance: Callable, steps: Sequence, phase: Callable | None = None):
        self.advance, self.state, self.steps = advance, None, steps
        self.kinds = {step.context.step: _kind(step, phase) for step in steps}
        self.several = {kind for kind, n in Counter(self.kinds.values()).items() if kind and n > 2}
        self.rows: dict[tuple, _Rows] = {}
        self.graphs: dict[tuple, CudaGraph] = {}
        self.pool: Any = None

    @torch.no_grad()
    def __call__(self, state: Any, step: Any) -> Any:
        """The next state; its tensors hold it until the next call."""
        self._keep(state)
        kind = self.kinds[step.context.step]
        if kind not in self.several:
            self._keep(self.advance(self.state, step))
        elif kind not in self.rows:
            self.rows[kind] = _Rows([other for other, its in zip(self.steps, self.kinds.values()) if its == kind])
            self._advance_row(kind, step, captured=False)
        else:
            if kind not in self.graphs:
                if self.pool is None and state.canvas.is_cuda:
                    self.pool = torch.cuda.graph_pool_handle()
                self.graphs[kind] = CudaGraph(lambda: self._advance_row(kind, step, captured=True), self.pool)
            self.graphs[kind].replay()
        return self.state

    def _advance_row(self, kind, like, captured):
        self.rows[kind].take()
        self._keep(self.advance(self.state, self.rows[kind].step(like, captured)))

    def _keep(self, state):
        """Copy what is not there yet to where the state lies."""
        if self.state is None:
            self.state = replace(state, canvas=state.canvas.clone())
        for name in (field.name for field in fields(state)):
            new, kept = getattr(state, name), getattr(self.state, name)
            if new is None or new is kept:
                continue
            if kept is not None and kept.shape == new.shape:
                kept.copy_(new)
            else:  # what was captured reads the state where it lay
                self.state = replace(self.state, **{name: new.clone()})
                self.graphs.clear()


def _kind(step, phase):
    """What is the same of alike steps; None for a step that is not captured."""
    stage, plan, context = step.stage, step.context.plan, step.context
    if stage.view is not None or stage.adjust is not None or not plan.count:
        return None
    return (
        (plan.height, plan.width, plan.window, plan.wrap),
        tuple(context.rows[:, 0].tolist()),
        _value(step.weight),
        context.guided,
        phase and phase(context),
    )


def _value(weight):
    """Compares by value, as bridges make a weight anew for each step."""
    return weight if weight is None else (tuple(weight.shape), weight.cpu().numpy().tobytes())


class _Rows:
    """Tables of what differs between alike steps, one row a step, and a row at a time where graphs read it."""

    def __init__(self, steps):
        device, plans = steps[0].context.pictures.device, [step.context.plan for step in steps]
        self.plan = next((plan for plan in plans if plan.partial), plans[0])  # whose cells may be left uncovered
        tables = [plan.tables(torch.device("cpu")) for plan in plans]
        longest = max(len(table.cover_index) for table in tables)
        columns = [[table.origins for table in tables], [table.cover_start for table in tables]]
        columns.append([torch.nn.functional.pad(t.cover_index, (0, longest - len(t.cover_index))) for t in tables])
        columns += [[getattr(step.context, name) for step in steps] for name in ("origins", "timestep")]
        columns += [[getattr(step, name) for step in steps] for name in ("coefficients", "keep", "scale", "carry")]
        columns.append([_level(step.context.level) for step in steps])
        self.tables = [torch.stack([torch.as_tensor(row).to(device) for row in column]) for column in columns]
        self.now = [table[0].clone() for table in self.tables]
        self.counter = torch.zeros(1, dtype=torch.int64, device=device)

    def take(self):
        """The row that the counter says, and one further."""
        for table, now in zip(self.tables, self.now):
            now.copy_(table.index_select(0, self.counter)[0])
        self.counter += 1

    def step(self, like, captured):
        """The step of the row that was taken, an alike one saying what is the same for all."""
        *tables, origins, timestep, coefficients, keep, scale, carry, level = self.now
        plan, predicts = self.plan.with_tables(PlanTables(*tables)), like.context.level and like.context.level.predicts
        level = None if predicts is None else Level(*level, predicts)
        context = replace(like.context, plan=plan, timestep=timestep, level=level, origins=origins, captured=captured)
        return replace(like, context=context, coefficients=coefficients, keep=keep, scale=scale, carry=carry)


def _level(level):
    return torch.tensor((level.signal, level.noise) if level else (0.0, 0.0))

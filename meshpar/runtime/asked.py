"""What one can ask of a parallel model: its plan, what it says, sends and keeps, and the order of its pipeline."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn
from torch.distributed.device_mesh import DeviceMesh

from meshpar.compile.program import Program
from meshpar.compile.programs import Programs
from meshpar.config import ParallelConfig
from meshpar.errors import ConfigError
from meshpar.ops.load import Tally
from meshpar.pipeline.run import Pipelined
from meshpar.pipeline.schedule import Event, Order, schedule_table
from meshpar.plan import Comm, Plan
from meshpar.report.explain import explain
from meshpar.report.memory import MemoryReport, memory
from meshpar.report.text import as_html
from meshpar.runtime.blocks import inlined, print_code
from meshpar.runtime.engine import Engine
from meshpar.runtime.load import expert_flow, expert_load
from meshpar.runtime.state.variants import Variants


class Asked(nn.Module):
    """The questions; `ParallelModel` has what they are asked of."""

    mesh: DeviceMesh
    parallel_config: ParallelConfig
    _engine: Engine
    _first: Program
    _makes: Programs
    _tallies: list[Tally]
    _variants: Variants

    @property
    def plan(self) -> Plan:
        """Every decision, as data."""
        return self._first.plan

    @property
    def lowered_graph(self) -> fx.Graph:
        """What a rank runs, as one graph of calls on local tensors; with a pipeline, that of all stages."""
        return self._first.graph

    def comms(self) -> tuple[Comm, ...]:
        """The ledger: every collective of one microbatch."""
        return self.plan.comms()

    def expert_load(self) -> dict[str, torch.Tensor]:
        """Experts module -> how many rows (token and choice) each of its experts got in the last step or forward, [E] (int64, on the CPU).

        Summed over microbatches and over the mesh, the same on every rank. Collective. Empty for a model without recognised experts, and
        before the first step.
        """
        return expert_load(self._tallies, self.mesh)

    def expert_flow(self) -> dict[str, torch.Tensor]:
        """The same before it is summed over the mesh: [ranks that route tokens of their own, E], ranks in the order of the mesh.

        Its sum over ranks is `expert_load()`. `mp.plot.expert_flow` draws it. Collective.
        """
        return expert_flow(self._tallies, self.mesh)

    def explain(self) -> str:
        """The plan in words: placements and the reasons for them, communication, repeated work."""
        program = self._first
        return explain(
            self.plan,
            program.graph,
            inlined={path: why for tree in self._engine.trees.values() for path, why in inlined(tree).items()},
            averaged=program.averaged,
            within=program.within,
            dropped=program.captured.dropped,
            unrecognised=program.captured.unrecognised,
            order=self.schedule,
            shapes=self._variants.told(),
        )

    def _repr_html_(self) -> str:
        return as_html(self.explain())

    def memory(self) -> MemoryReport:
        """What a rank keeps in memory while it trains, by kind; with a pipeline, this rank with its stages."""
        return memory(self.plan, self._first.graph, self._first.stages, self.schedule, self._stage_rank)

    @property
    def schedule(self) -> Order | None:
        """With a pipeline, what every rank of it computes, sends and receives in a training step, in order."""
        return None if self._makes.schedule is None else self._makes.schedule.order(self.parallel_config.microbatches)

    def schedule_table(self) -> str:
        """The order of computation as text: a row per rank of the pipeline, a column per slot, a dot where a rank waits for another.

        Raises ConfigError without a `pp` axis.
        """
        return schedule_table(self._order())

    def timeline(self, *args: Any, **kwargs: Any) -> tuple[Event, ...]:
        """Run one `train_step` on this batch, and return when every rank of the pipeline computed what, in seconds from a common start.

        Collective. It is a step as any other: gradients add to what `.grad` holds. Take the second or third step: the first one makes
        buffers and connections. `mp.plot.schedule(pm.schedule, measured=events)` draws it, `mp.plot.chrome_trace(events, path)` writes it.

        Clocks of ranks are set to zero when they leave one barrier: times of different ranks are off by what ranks leave it apart, much
        less than a millisecond on one machine, more over slow networks; durations on one rank are exact. On a GPU a rank waits for its
        device after every action, which costs what would overlap otherwise.

        Raises ConfigError without a `pp` axis.
        """
        self._order()
        assert isinstance(self._engine, Pipelined)
        with self._engine.measuring() as events:
            self.train_step(*args, **kwargs)
        return tuple(events)

    def _order(self) -> Order:
        if self.schedule is None:
            raise ConfigError("this mesh has no pp axis of more than one rank: there are no stages and no schedule.")
        return self.schedule

    @property
    def _stage_rank(self) -> int:
        return self._engine.axis.rank if isinstance(self._engine, Pipelined) else 0

    def print_readable(self) -> str:
        """The code this rank runs: the root's, and that of each block structure once. Returned, and printed."""
        several = len(self._engine.trees) > 1
        parts = [(f"# stage {i}\n" if several else "") + print_code(tree, self._first.key) for i, tree in self._engine.trees.items()]
        code = "\n".join(parts)
        print(code)
        return code

    def train_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Forward and backward of one step."""
        raise NotImplementedError

"""The pipeline schedule of a run: what its order of actions follows from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from torch.distributed.device_mesh import DeviceMesh

from meshpar import roles
from meshpar.config import ParallelConfig
from meshpar.mesh import stage_axis
from meshpar.pipeline.schedule import Order, forward_order, order


@dataclass(frozen=True)
class Schedule:
    """A schedule over `ranks` ranks and `stages` stages."""

    name: str
    ranks: int
    stages: int

    def order(self, microbatches: int, *, backward: bool = True) -> Order:
        """The actions of every rank for a training step, or for an evaluation. Raises ConfigError for sizes the schedule does not allow."""
        return _order(self, microbatches, backward)

    def defers(self, microbatches: int) -> bool:
        """Whether weight gradients are put off."""
        return self.order(microbatches).defers()


@cache
def _order(schedule: Schedule, microbatches: int, backward: bool) -> Order:
    return (order if backward else forward_order)(schedule.name, schedule.ranks, schedule.stages, microbatches)


def schedule_of(mesh: DeviceMesh, config: ParallelConfig) -> Schedule | None:
    """The schedule over the `pp` axis of `mesh`; None without one."""
    return _schedule(stage_axis(mesh).size, config)


def check_schedule(sizes: Mapping[str, int], config: ParallelConfig) -> None:
    """Raise ConfigError where the schedule does not allow these numbers of ranks, stages and microbatches."""
    if (schedule := _schedule(sizes.get(roles.stage_axis(), 1), config)) is not None:
        schedule.order(config.microbatches)


def _schedule(ranks: int, config: ParallelConfig) -> Schedule | None:
    return None if ranks == 1 else Schedule(config.schedule, ranks, ranks * config.stages_per_rank)

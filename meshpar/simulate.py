"""All ranks of a mesh in one process: every tensor holds one local tensor per rank, every collective moves them.

    with simulate(4) as world:
        mesh = init_device_mesh("cpu", (4,), mesh_dim_names=("tp",))
        x = per_rank(lambda rank: torch.full((2,), float(rank)))     # rank r holds [r, r]
        p_to_i(x, group=mesh.get_group("tp").group_name, size=4, rank=-1)  # every rank holds [6, 6]

Ordinary tensor code runs once per rank, autograd included. Code that depends on the rank goes through `per_rank`. Random numbers are
those that processes would draw: every rank has generators of its own (see `generators`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist

from meshpar._torch import FakeStore, LocalTensor, enabled_local_tensor_mode, layouts_at_once, resolve_process_group
from meshpar.errors import ConfigError
from meshpar.generators import Ranks, generators_in, states_of_ranks


@dataclass(frozen=True, slots=True)
class World:
    """The simulated ranks: `size` of them, numbered from 0."""

    size: int

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.size))


@contextmanager
def simulate(world_size: int) -> Iterator[World]:
    """Run the body once for `world_size` ranks, without processes or networks.

    Starts a fake process group, and ends it at exit; uses a fake one of the same size that exists. Meshes must be made inside.
    Raises `ConfigError` inside another simulation, and in a process that belongs to a real process group.

    >>> with simulate(2):
    ...     local_tensors(per_rank(lambda rank: torch.tensor(rank)))
    {0: tensor(0), 1: tensor(1)}
    """
    hook = sys.excepthook
    started = _start_fake_group(world_size)
    torchs = sys.excepthook  # it puts "[rank0]: " before every line of an error, and stays when the group ends
    try:
        with states_of_ranks(), layouts_at_once(), Ranks(world_size):
            yield World(world_size)
    finally:
        if started:
            dist.destroy_process_group()
            if sys.excepthook is torchs:
                sys.excepthook = hook


def is_simulated() -> bool:
    """Whether this code runs inside `simulate`, for all ranks at once."""
    return enabled_local_tensor_mode() is not None


def ranks() -> tuple[int, ...]:
    """The ranks this process runs: all of them inside `simulate`, else its own."""
    mode = enabled_local_tensor_mode()
    if mode is not None:
        return tuple(sorted(mode.ranks))
    return (dist.get_rank() if dist.is_initialized() else 0,)


def per_rank(fn: Callable[..., Any], *tensors: torch.Tensor) -> Any:
    """`fn(rank, *local tensors)` for every rank this process runs: where the work differs from rank to rank.

    Returns what `fn` returns; inside `simulate` its tensors (also in tuples, of one length on all ranks) hold every rank's result.
    Outside it `fn` is called once with this process's rank. No gradient passes through inside `simulate`: use it inside an
    `autograd.Function`, or for values that need none.
    """
    mode = enabled_local_tensor_mode()
    if mode is None:
        return fn(ranks()[0], *tensors)
    with mode.disable(), torch.no_grad():
        results = {}
        generators = generators_in(fn)
        for rank in sorted(mode.ranks):
            with mode.rank_alone(rank, generators) if isinstance(mode, Ranks) else nullcontext():
                results[rank] = fn(rank, *(_local(tensor, rank) for tensor in tensors))
        return _combine(results)


def local_tensors(x: torch.Tensor) -> dict[int, torch.Tensor]:
    """What every rank holds of `x`, by rank: one entry per simulated rank, or this process's own."""
    mode = enabled_local_tensor_mode()
    if isinstance(x, LocalTensor):
        return {rank: x._local_tensors[rank] for rank in sorted(x._local_tensors)}
    return {rank: x.detach() for rank in (sorted(mode.ranks) if mode is not None else ranks())}


def axis_rank(group: str, rank: int) -> int:
    """The coordinate of global `rank` on the mesh axis whose process group (the one that holds rank 0) is called `group`."""
    members = tuple(dist.get_process_group_ranks(resolve_process_group(group)))
    return _coordinates(members, dist.get_world_size())[rank]


@lru_cache(maxsize=256)
def _coordinates(members: tuple[int, ...], world_size: int) -> tuple[int, ...]:
    """Coordinate of every rank, if the groups of the axis are `members` moved to the ranks that are not yet in one.

    >>> _coordinates((0, 2), 8)
    (0, 0, 1, 1, 0, 0, 1, 1)
    """
    coordinates: dict[int, int] = {}
    for start in range(world_size):
        if start not in coordinates:
            coordinates |= {start + member - members[0]: i for i, member in enumerate(members)}
    return tuple(coordinates[rank] for rank in range(world_size))


def _start_fake_group(world_size: int) -> bool:
    """Make sure a fake process group of `world_size` ranks exists; whether it had to be started."""
    if enabled_local_tensor_mode() is not None:
        raise ConfigError("simulate() inside simulate(): leave the outer one first, or use its ranks.")
    if not dist.is_initialized():
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
        return True
    if dist.get_backend() != "fake":
        raise ConfigError(
            f"simulate({world_size}) in a process that is rank {dist.get_rank()} of a real {dist.get_backend()} process group. "
            "Simulate in a plain process (python, not torchrun), or call torch.distributed.destroy_process_group() first."
        )
    if dist.get_world_size() != world_size:
        raise ConfigError(
            f"simulate({world_size}) while a fake process group of {dist.get_world_size()} ranks exists: use that size, or end it."
        )
    return False


def _local(tensor: torch.Tensor, rank: int) -> torch.Tensor:
    return tensor._local_tensors[rank] if isinstance(tensor, LocalTensor) else tensor.detach()


def _laid_out_alike(parts: dict[int, torch.Tensor]) -> dict[int, torch.Tensor]:
    """The same without differences of layout: strides are asked of one rank for all (a slice here, new zeros there)."""
    if len({part.stride() for part in parts.values()}) == 1:
        return parts
    return {rank: part.contiguous() for rank, part in parts.items()}


def _combine(results: dict[int, Any]) -> Any:
    first = next(iter(results.values()))
    if isinstance(first, torch.Tensor):
        return LocalTensor(_laid_out_alike({rank: result.detach() for rank, result in results.items()}))
    if isinstance(first, tuple):
        return tuple(_combine({rank: result[i] for rank, result in results.items()}) for i in range(len(first)))
    if any(result != first for result in results.values()):
        raise ValueError(f"per_rank: ranks may differ in tensors only, but the function returned {results}.")
    return first

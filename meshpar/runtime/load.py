"""The load of experts over the whole mesh, and who sends them how much."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from meshpar.mesh import stage_axis, typed_axes
from meshpar.ops.collectives import p_to_i, s_to_i
from meshpar.ops.load import Tally, rows
from meshpar.simulate import is_simulated, local_tensors


@torch.no_grad()
def expert_load(tallies: Sequence[Tally], mesh: DeviceMesh) -> dict[str, torch.Tensor]:
    """The loads noted in the tallies of a step's microbatches, summed over them, the axes that cut their rows, and stages."""
    axes, found = typed_axes(mesh), dict[str, torch.Tensor]()
    for name in tallies[0].ends if tallies else ():
        total = sum((rows(tally.ends[name]) for tally in tallies[1:]), rows(tallies[0].ends[name]))
        for axis in axes:
            if axis.size > 1 and axis.name in tallies[0].axes[name]:
                total = p_to_i(total, group=axis.group, size=axis.size, rank=axis.rank)
        found[name] = local_tensors(total)[0] if is_simulated() else total.cpu()
    return _of_all_stages(found, mesh)


@torch.no_grad()
def expert_flow(tallies: Sequence[Tally], mesh: DeviceMesh) -> dict[str, torch.Tensor]:
    """The same by the ranks that dispatched: a row for each, in the order of the mesh, of the axes that cut their rows."""
    axes, found = typed_axes(mesh), dict[str, torch.Tensor]()
    for name in tallies[0].ends if tallies else ():
        total = sum((rows(tally.ends[name]) for tally in tallies[1:]), rows(tallies[0].ends[name]))[None]
        ranks = 1
        for axis in reversed([a for a in axes if a.name in tallies[0].axes[name]]):
            ranks *= axis.size
            total = s_to_i(total, 0, 1, ((ranks, 1),), group=axis.group, size=axis.size, rank=axis.rank)
        found[name] = local_tensors(total)[0] if is_simulated() else total.cpu()
    return _of_all_stages(found, mesh)


def _of_all_stages(found: dict[str, torch.Tensor], mesh: DeviceMesh) -> dict[str, torch.Tensor]:
    stages = stage_axis(mesh)
    if stages.size == 1:
        return found
    everyone: list[Any] = [None] * stages.size
    dist.all_gather_object(everyone, found, group=mesh.get_group(stages.name))
    return {name: load for one in everyone for name, load in one.items()}

"""The load of experts over the whole mesh."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from meshpar.mesh import stage_axis, typed_axes
from meshpar.ops.collectives import p_to_i
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
    stages = stage_axis(mesh)
    if stages.size == 1:
        return found
    everyone: list[Any] = [None] * stages.size
    dist.all_gather_object(everyone, found, group=mesh.get_group(stages.name))
    return {name: load for one in everyone for name, load in one.items()}

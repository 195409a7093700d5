"""Who sums the gradient of each parameter over the ranks that see other samples: FSDP2, or the graph itself."""

from __future__ import annotations

from torch.distributed.device_mesh import DeviceMesh

from meshpar.config import ParallelConfig
from meshpar.plan import Plan
from meshpar.roles import copying, dividing, summing
from meshpar.sharding.types import Owned, Shard
from meshpar.simulate import is_simulated


def unmanaged(plan: Plan, axis: str, mesh: DeviceMesh, config: ParallelConfig) -> frozenset[str]:
    """The parameters whose gradients FSDP2 does not sum over a data axis, and that no rank has to itself.

    All of them where ranks are simulated; else those that two stages of one rank use (it manages every stage by itself), those without
    dims, and experts that it would have to replicate while it shares out others.
    """
    names = (n for n, p in plan.parameters.items() if not isinstance(p.placements.get(axis), (Shard, Owned)))
    if is_simulated():
        return frozenset(names)
    return frozenset(names) & left_alone(plan, mesh, config)


def left_alone(plan: Plan, mesh: DeviceMesh, config: ParallelConfig) -> frozenset[str]:
    """The parameters that data parallelism does not manage."""
    data = summing(mesh.mesh_dim_names or ())
    if not data:
        return frozenset()
    ranks = {name: [plan.stages[s].rank for s in p.stages] for name, p in plan.parameters.items() if len(p.stages) > 1}
    found = {name for name, held in ranks.items() if len(set(held)) < len(held)}
    found |= {name for name, p in plan.parameters.items() if not p.shape}  # without dims: nothing to share out
    dense = summing(data, without="experts")
    if config.data_parallel == "replicate" or set(dense) <= set(copying(dense)):
        experts = dividing("experts", data)
        found |= {name for name, p in plan.parameters.items() if any(isinstance(p.placements.get(n), (Shard, Owned)) for n in experts)}
    return frozenset(found)

"""What leaves a parallel model: what the model returns for this data rank's samples, as plain tensors, whole on every other axis.

    on an axis whose ranks have          a value that is cut (S)        one that is not (I)
    batches of their own (dp, ep)        this rank's samples;           the same on all ranks
                                         gathered, if samples were
                                         mixed and cut anew
    the same batch (cp, tp)              gathered                       the same on all ranks

Backward from a loss computed outside: ranks with batches of their own may each have a loss of their own, and gradients are those of the
mean of these losses over the data ranks, as in any data parallelism. (So `out.loss`, which is the global batch's on every rank, gives the
gradients of the global loss.) What becomes of gradients at the outputs, and at the inputs: `borders.py`. Ranks that share a batch compute
the same loss. With `ParallelConfig(outputs="cut")` nothing is gathered: what is cut is a DTensor over the mesh, of the shape of the global
batch.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate
from torch.distributed.tensor import Shard as ShardPlacement

from meshpar.compile.program import Program
from meshpar.errors import ConfigError
from meshpar.graph.captured import Captured, Slot
from meshpar.graph.facts import Info, info_of
from meshpar.mesh import Axis, typed_axes
from meshpar.ops.collectives import i_to_r, p_to_i, r_to_i, s_to_i
from meshpar.roles import ROLES
from meshpar.runtime.borders import Passage
from meshpar.sharding.types import I, P, R, Shard, Type

Leave = Callable[[Program, torch.Tensor, int, Passage], torch.Tensor]
"""The i-th output of a program, called by a graph of the user's, on its way there."""


def leaving(mesh: DeviceMesh, outputs: str) -> Leave:
    """How the i-th output of a program leaves it, when "whole" or "cut" is asked for."""
    if outputs == "cut":
        return lambda program, value, index, passage: _cut(program, passage.leave(value, own=False), index, mesh)
    axes = tuple(one for one in typed_axes(mesh) if one.size > 1)
    known: dict[str, list[tuple[Axis, OutputTypes, tuple[bool, ...]]]] = {}

    def leave(program: Program, value: torch.Tensor, index: int, passage: Passage) -> torch.Tensor:
        if program.key not in known:
            known[program.key] = _read(program, axes)
        return _whole(program, value, index, known[program.key], passage)

    return leave if axes else lambda program, value, index, passage: passage.leave(value, own=False)


OutputTypes = tuple[Type, ...]


def _read(program: Program, axes: tuple[Axis, ...]) -> list[tuple[Axis, OutputTypes, tuple[bool, ...]]]:
    """The axes in the order in which they are undone, opposite to that in which they were lowered; the types of all outputs, and which
    of them are this rank's samples."""
    plans = {plan.axis: plan for plan in program.plan.axes}
    found = []
    for one in reversed(axes):
        if (plan := plans.get(one.name)) is not None:
            found.append((one, plan.outputs, plan.samples or (False,) * len(plan.outputs)))
    return found


def _whole(
    program: Program, value: torch.Tensor, index: int, known: list[tuple[Axis, OutputTypes, tuple[bool, ...]]], passage: Passage
) -> torch.Tensor:
    _refuse_mixed([(one, types[index]) for one, types, mine in known if mine[index] or not ROLES[one.name].own_batches], program, index)
    own = False
    for one, types, mine in known:
        if not ROLES[one.name].own_batches:
            value = gathered(value, types[index], one)
        elif mine[index]:
            own = True
        else:  # the same on all ranks: gradients of all of them are added up
            value = i_to_r(gathered(value, types[index], one), group=one.group, size=one.size, rank=one.rank)
    return passage.leave(value, own=own)


def gathered(value: torch.Tensor, type_: Type, one: Axis) -> torch.Tensor:
    """The whole value, whose gradients are the same on all ranks of the axis."""
    group = {"group": one.group, "size": one.size, "rank": one.rank}
    if isinstance(type_, Shard):
        return s_to_i(value, type_.dim, type_.repeat, type_.segments, **group)  # type: ignore[arg-type]
    if type_ == R:
        return r_to_i(value, **group)  # type: ignore[arg-type]
    if type_ == P:
        return p_to_i(value, **group)  # type: ignore[arg-type]
    if type_ != I:
        raise ConfigError(f"an output of the model is {type_} over {one.name}, and cannot leave it: return what is computed from it.")
    return value


def _refuse_mixed(known: list[tuple[Axis, Type]], program: Program, index: int) -> None:
    """One dim of samples and positions that cp and then ep cut: the outer cut is to be undone, the inner one is to stay."""
    for at, (inner, kept) in enumerate(known):
        for outer, other in known[at + 1 :]:
            nested = isinstance(kept, Shard) and isinstance(other, Shard) and kept.dim == other.dim
            if nested and ROLES[inner.name].own_batches and not ROLES[outer.name].own_batches:
                raise ConfigError(
                    f"output {index} of the model ({_shown(program.captured, index)}) has samples and positions in one dim, which "
                    f'{outer.name} and {inner.name} cut both: return them in two dims, or ask for ParallelConfig(outputs="cut").'
                )


def _cut(program: Program, value: torch.Tensor, index: int, mesh: DeviceMesh) -> torch.Tensor:
    """A tensor that is cut comes out as a DTensor."""
    types = {a.axis: a.outputs[index] for a in program.plan.axes}
    if not any(isinstance(t, Shard) for t in types.values()):
        return value
    placements: list[Placement] = []
    for name in mesh.mesh_dim_names or ():
        found = types.get(ROLES[name].typed or "")
        placements.append(ShardPlacement(found.dim) if isinstance(found, Shard) else Replicate())
    shape = torch.Size(_info(program.captured, index).shape)
    return DTensor.from_local(value, mesh, placements, run_check=False, shape=shape, stride=torch.empty(shape, device="meta").stride())


def _info(captured: Captured, index: int) -> Info:
    return info_of(next(n for n in reversed(captured.graph.nodes) if n.op == "output").args[0][index])


def _shown(captured: Captured, index: int) -> str:
    info = _info(captured, index)
    return f"{str(info.dtype).removeprefix('torch.')} {list(info.shape)}"


def returned(captured: Captured) -> str:
    """What the model returned, in words, for a batch without a loss."""
    kinds = [_shown(captured, int(leaf.key)) for leaf in captured.out_leaves if isinstance(leaf, Slot)]
    names = list(captured.out_spec.context) if isinstance(captured.out_spec.context, (list, tuple)) else []
    labelled = [f"{name}: {kind}" for name, kind in zip(names, kinds)] if len(names) == len(kinds) else kinds
    return ", ".join(labelled[:6]) + (f" and {len(labelled) - 6} more" if len(labelled) > 6 else "") if labelled else "no tensors"

"""What a training run consists of: its tensors under the names they are stored by, its values, and where this rank stands."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from meshpar.checkpoint.format.assets import Assets, assets_of
from meshpar.checkpoint.format.division import Grid
from meshpar.checkpoint.format.manifest import Manifest
from meshpar.checkpoint.online import optimizers
from meshpar.checkpoint.online.placed import Held
from meshpar.checkpoint.online.ranks import Failure, Ranks, attempt
from meshpar.checkpoint.online.tensors import Content, grid_of
from meshpar.checkpoint.online.values import encode
from meshpar.checkpoint.online.writer import PerRank
from meshpar.errors import CheckpointError
from meshpar.roles import ROLES, dividing
from meshpar.runtime.model import ParallelModel

EXTRA, MORE, OWN = "extra/", "tensors/", "rank/"


@dataclass(frozen=True)
class Agreed:
    """What all ranks agree on: the name each tensor is stored under, and who they are."""

    names: Mapping[str, str]
    mesh: str
    ranks: int


def collecting(ranks: Ranks, module: nn.Module, *what: Any) -> Callable[[], Content]:
    """Collective. A function that collects this rank's content, which may fail on some ranks only."""
    return partial(_content, _agree(module, ranks), ranks.rank == 0, module, *what)


def _content(
    agreed: Agreed,
    leads: bool,
    module: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    scheduler: Any,
    extra: Mapping[str, Any] | None,
    tensors: Mapping[str, torch.Tensor] | None,
    assets: Assets,
) -> Content:
    """Everything this rank knows of a run."""
    out: dict[str, torch.Tensor | Held] = {}
    names: dict[int, str] = {}
    for group in named_groups(module):
        out[agreed.names[group[0]]] = tensor_at(module, group[0])
        names[id(tensor_at(module, group[0]))] = agreed.names[group[0]]
    kinds: dict[str, str] = {}
    own: dict[str, torch.Tensor] = {}
    values: dict[str, Any] = {"mesh": agreed.mesh, "ranks": agreed.ranks}
    if isinstance(module, ParallelModel):
        values["random"] = module.random.state_dict()
    if optimizer is not None:
        moments, values["optimizer"] = optimizers.collect(optimizer, names)
        out |= moments
        kinds |= dict.fromkeys(moments, "optimizer")

    def keep(path: str, item: Any) -> None:
        if isinstance(item, PerRank):
            if isinstance(item.value, torch.Tensor):
                own[OWN + path] = item.value
            else:
                values[path] = PerRank(encode(item.value, path, _no_nesting))
            return
        if isinstance(item, DTensor):
            raise CheckpointError(f"{path} is a DTensor, which extra cannot hold: pass it in tensors={{...}}.")
        out[path] = item
        kinds[path] = "extra"

    if scheduler is not None:
        values["scheduler"] = encode(scheduler.state_dict(), EXTRA + "scheduler", keep)
    values["extra"] = encode(dict(extra or {}), EXTRA + "extra", keep)
    for name, tensor in (tensors or {}).items():
        out[MORE + name] = tensor
        kinds[MORE + name] = "extra"
    for name, state in generators():
        own[OWN + name] = state
    aliases = {other: name for other, name in agreed.names.items() if other != name}
    grid, stage = _place(module, out)
    files = assets_of(module.original_module if isinstance(module, ParallelModel) else module, _dtype(module), assets) if leads else {}
    return Content(out, values, kinds, own, aliases, grid, stage, files)


def _dtype(module: nn.Module) -> str:
    """The dtype of the first floating tensor of a module; "" where this rank has none."""
    return next((str(t.dtype).removeprefix("torch.") for _, t in _named(module) if t.is_floating_point()), "")


def _no_nesting(path: str, item: Any) -> None:
    raise CheckpointError(f"{path}: inside a PerRank value, a {type(item).__name__} cannot be stored; make it PerRank itself.")


def named_groups(module: nn.Module) -> list[list[str]]:
    """The names of every parameter and persistent buffer; several of one where it is tied."""
    fleeting = {f"{path}.{name}" if path else name for path, m in module.named_modules() for name in m._non_persistent_buffers_set}
    found: dict[int, list[str]] = {}
    for name, tensor in _named(module):
        if name not in fleeting:
            found.setdefault(id(tensor), []).append(name)
    return list(found.values())


def _named(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def tensor_at(module: nn.Module, fqn: str) -> torch.Tensor:
    path, _, name = fqn.rpartition(".")
    found = getattr(module.get_submodule(path), name)
    assert isinstance(found, torch.Tensor)
    return found


def _agree(module: nn.Module, ranks: Ranks) -> Agreed:
    """Collective. Tensors tied on one rank are tied on all: a stage may know only one of the names."""
    groups = attempt(lambda: named_groups(module))
    facts = groups if isinstance(groups, Failure) else ([row for row in groups if len(row) > 1], mesh_text(module))
    everyone: list[tuple[list[list[str]], str]] = ranks.everyone(facts)
    assert not isinstance(groups, Failure)
    root: dict[str, str] = {}

    def find(name: str) -> str:
        while root.setdefault(name, name) != name:
            name = root[name]
        return name

    for rows, _ in everyone:
        for first, *others in rows:
            for other in others:
                if find(first) != find(other):
                    root[find(other)] = find(first)
    names = {*root, *(name for row in groups for name in row)}
    return Agreed({name: find(name) for name in sorted(names)}, one_mesh([mesh for _, mesh in everyone]), ranks.world)


def one_mesh(meshes: Sequence[str]) -> str:
    """The meshes of all ranks; stages outside of a ParallelModel may have different ones."""
    return " | ".join(dict.fromkeys(meshes))


def resolved(module: nn.Module, manifest: Manifest) -> tuple[dict[str, torch.Tensor], Callable[[str], str]]:
    """The module's tensors by the names they are stored under, and the translation of names."""
    found: dict[str, str] = {}
    tensors: dict[str, torch.Tensor] = {}
    for group in named_groups(module):
        name = next((n for n in group if n in manifest.tensors), None)
        name = name or next((manifest.aliases[n] for n in group if n in manifest.aliases), group[0])
        found |= dict.fromkeys(group, name)
        if name in tensors:  # untied here, tied when saved
            name = group[0]
        tensors[name] = tensor_at(module, group[0])
    return tensors, found.__getitem__


def twins_of(module: nn.Module, manifest: Manifest) -> Iterator[tuple[str, tuple[str, ...], torch.Tensor]]:
    """The tensors of the module that were stored more than once, under several of their names: the first name, the others, the tensor."""
    for group in named_groups(module):
        stored = [name for name in group if name in manifest.tensors]
        if len(stored) > 1:
            yield stored[0], tuple(stored[1:]), tensor_at(module, group[0])


def _place(module: nn.Module, tensors: Mapping[str, Any]) -> tuple[Grid, int]:
    """The mesh for the record, and this rank's pipeline stage."""
    mesh = _mesh(module)
    if mesh is None:
        return Grid(), 0
    stages = dividing("stages", [n for n in mesh.mesh_dim_names or () if n in ROLES])
    return grid_of(mesh), mesh.get_local_rank(stages[0]) if stages else 0


def _mesh(module: nn.Module) -> Any:
    if isinstance(module, ParallelModel):
        return module.mesh
    meshes = [p.device_mesh for _, p in _named(module) if isinstance(p, DTensor)]
    return max(meshes, key=lambda m: m.size(), default=None)


def mesh_text(module: nn.Module) -> str:
    """The mesh in words, axes of any name, outermost first: what per-rank values belong to."""
    mesh = _mesh(module)
    if mesh is None:
        return ""
    names = mesh.mesh_dim_names or tuple(f"axis{k}" for k in range(mesh.ndim))
    return ",".join(f"{n}={s}" for n, s in zip(names, mesh.shape, strict=True) if s > 1)


def generators() -> list[tuple[str, torch.Tensor]]:
    """torch's own generators of this rank."""
    out = [("generator.cpu", torch.get_rng_state())]
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        out.append(("generator.cuda", torch.cuda.get_rng_state()))
    return out

"""Saving and loading a training run: model, optimizer, scheduler, random state, and what the user adds; from any mesh onto any other.

    mp.checkpoint.save("run/step-100", pm, optimizer, scheduler=scheduler, extra={"step": 100, "samples": 51_200})
    extra = mp.checkpoint.load("run/step-100", pm, optimizer, scheduler=scheduler)

Tensors go by their names in the whole model, so a rank may hold any of them, or none: pipeline stages, experts and shards are only ways to
divide. What a rank has its own of is declared, `extra={"position": PerRank(17)}`, and belongs to the mesh it was saved on: on another mesh
loading it is an error, unless `per_rank` is "skip" (it is None then), or "all", which gives the values of all ranks to divide anew. Better
save what does not depend on the mesh, such as the number of samples seen.

Dropout draws from `pm.random`, which is saved and gives the same numbers on every mesh. torch's own generators are per rank: they continue
on the same mesh, and on another one are left alone.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from meshpar.checkpoint.format.assets import Assets
from meshpar.checkpoint.format.faults import CorruptError
from meshpar.checkpoint.format.files import Disk
from meshpar.checkpoint.format.opened import Checkpoint
from meshpar.checkpoint.move.reading import Reader
from meshpar.checkpoint.online import optimizers
from meshpar.checkpoint.online.contents import (
    EXTRA,
    MORE,
    OWN,
    collecting,
    generators,
    mesh_text,
    named_groups,
    one_mesh,
    resolved,
    tensor_at,
    twins_of,
)
from meshpar.checkpoint.online.optimizers import Restoring
from meshpar.checkpoint.online.placed import Held, held
from meshpar.checkpoint.online.ranks import Failure, Group, Ranks, attempt
from meshpar.checkpoint.online.saving import SAVING, Saving, last_save
from meshpar.checkpoint.online.tensors import check_modes, fill, prepare, read_row, read_whole, shared_open, write_content
from meshpar.checkpoint.online.twins import check_twins
from meshpar.checkpoint.online.values import decode
from meshpar.checkpoint.online.writer import PerRank
from meshpar.errors import ConfigError, raise_all
from meshpar.runtime.model import ParallelModel
from meshpar.waiting import working


@dataclass(frozen=True)
class AllRanks:
    """The values of a `PerRank` on all ranks it was saved from, by rank, and the mesh these formed ("dp=2,tp=2")."""

    values: tuple[Any, ...]
    mesh: str


def check_kinds(module: object, optimizer: object, scheduler: object) -> None:
    """Raise ConfigError unless these are a module, an optimizer and a scheduler."""
    complaints = []
    if not isinstance(module, nn.Module):
        complaints.append(f"the module is a {type(module).__name__}: write (path, pm, optimizer).")
    if optimizer is not None and not isinstance(getattr(optimizer, "param_groups", None), list):
        complaints.append(f"the optimizer is a {type(optimizer).__name__}; other values go into extra={{name: value}}.")
    if scheduler is not None and not callable(getattr(scheduler, "state_dict", None)):
        complaints.append(f"the scheduler is a {type(scheduler).__name__}, which has no state_dict().")
    raise_all(ConfigError, "checkpoint:", complaints)


@working("saving a checkpoint")
def save(
    path: Path | str,
    module: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    scheduler: Any = None,
    extra: Mapping[str, Any] | None = None,
    tensors: Mapping[str, torch.Tensor] | None = None,
    assets: Assets = (),
    group: Group = None,
    disk: Disk | None = None,
) -> None:
    """Save a training run as a new directory at `path`. Collective over `group`; nothing appears unless all of it is on the disk.

    `module`: what `parallelize` returned, or any module of tensors and DTensors. `scheduler`: anything with `state_dict()`. `extra`:
    numbers, text, containers, small plain tensors (the same on every rank), `PerRank` values. `tensors`: more tensors by name, DTensors
    too (averaged weights), for `load(tensors=)`. `assets`: small files to carry along, a list or by name, such as a tokenizer's; the
    configuration of a model that has one in the manner of Hugging Face is carried along unasked, so that `to_hf` makes a folder that
    `from_pretrained` loads. Rank 0 writes them. Each rank writes its own shards, replicas once; no rank holds more than its own tensors
    and the host copy of one.

    Raises CheckpointError or RankError, on all ranks, when any rank fails; a path that exists is refused. Folders above it are made.

    >>> save("step-100", pm, optimizer, extra={"step": 100})                                       # doctest: +SKIP
    """
    check_kinds(module, optimizer, scheduler)
    last_save(module).settle()
    ranks = Ranks.of(group)
    share = prepare(ranks, collecting(ranks, module, optimizer, scheduler, extra, tensors, assets))
    write_content(path, ranks, share, disk)


def save_async(
    path: Path | str,
    module: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    scheduler: Any = None,
    extra: Mapping[str, Any] | None = None,
    tensors: Mapping[str, torch.Tensor] | None = None,
    assets: Assets = (),
    group: Group = None,
    disk: Disk | None = None,
) -> Saving:
    """`save`, but return once this rank's share is copied to host memory; a thread writes it while training goes on.

    Memory: a host copy of what this rank writes (parameters and optimizer state, divided over all ranks that hold the same), until it is
    written. The thread has connections of its own (gloo), so its messages never mix with those of training. Another save of the same module
    waits for this one first. Call `wait()` before the process groups are destroyed.

    >>> saving = save_async("step-100", pm, optimizer)                                             # doctest: +SKIP
    >>> train(); saving.wait()                                                                     # doctest: +SKIP
    """
    check_kinds(module, optimizer, scheduler)
    last = last_save(module)
    last.settle()
    ranks = Ranks.of(group)
    share = prepare(ranks, collecting(ranks, module, optimizer, scheduler, extra, tensors, assets), copy=True)
    apart = last.ranks if last.ranks is not None and last.group is group else ranks.apart()
    saving = Saving(Path(path), apart, group)
    module.__dict__[SAVING] = saving
    saving.start(partial(write_content, path, apart, share, disk))
    return saving


@working("loading a checkpoint")
def load(
    path: Path | str,
    module: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    scheduler: Any = None,
    tensors: Mapping[str, torch.Tensor] | None = None,
    missing: str = "error",
    unexpected: str = "error",
    dtype: str = "error",
    per_rank: str = "error",
    group: Group = None,
    disk: Disk | None = None,
) -> dict[str, Any]:
    """Continue a training run: fill the module, the optimizer and the rest from a checkpoint of any mesh. Returns `extra`. Collective.

    Strict by default; each mode says what else is accepted. `missing="skip"`: tensors that were not saved keep their values.
    `unexpected="skip"`: what was saved and is not asked for, an optimizer or scheduler too, is left. `dtype="cast"`: floating tensors of
    the model may change dtype. `per_rank` ("error", "skip", "all"): what happens to `PerRank` values when the mesh is another one. What was
    skipped or cast is said in a warning.

    Tensors that were saved under several names and are one in this module must hold the same bits, else CorruptError names them.

    On the same mesh everything is restored bit for bit. Names, shapes and dtypes are checked on all ranks before anything is changed, and
    every block that is read against its checksum. Raises CorruptError (or RankError where another rank found it).

    >>> step = load("step-100", pm, optimizer)["step"]                                             # doctest: +SKIP
    """
    check_modes(
        missing=(missing, "error skip"),
        unexpected=(unexpected, "error skip"),
        dtype=(dtype, "error cast"),
        per_rank=(per_rank, "error skip all"),
    )
    check_kinds(module, optimizer, scheduler)
    last_save(module).settle()
    ranks, disk = Ranks.of(group), disk or Disk()
    opened = shared_open(path, ranks, disk)
    mesh = one_mesh(ranks.everyone(mesh_text(module)))
    same = opened.manifest.values.get("ranks") == ranks.world and opened.manifest.values.get("mesh") == mesh
    plan: list[Restoring] = []
    heard = [name for name in opened.manifest.tensors if name.startswith(EXTRA)]

    def collect() -> dict[str, torch.Tensor | Held]:
        _check_whole(opened, {"optimizer": optimizer, "scheduler": scheduler}, unexpected, missing)
        if per_rank == "error" and not same:
            _check_per_rank(opened, mesh, ranks)
        names, resolve = resolved(module, opened.manifest)
        twins = [(name, others, held(tensor)) for name, others, tensor in twins_of(module, opened.manifest)]
        heard.extend(other for _, others, _ in twins for other in others)
        if twins:
            with Reader(opened, disk) as reader:
                check_twins(reader, twins)
        asked: dict[str, torch.Tensor | Held] = dict(names)
        if optimizer is not None and not (missing == "skip" and "optimizer" not in opened.manifest.values):
            known = {id(tensor_at(module, group[0])): group[0] for group in named_groups(module)}
            plan.append(optimizers.restoring(optimizer, known, opened.manifest, resolve, partly=missing == "skip"))
            asked |= plan[0].tensors
        return asked | {MORE + name: tensor for name, tensor in (tensors or {}).items()}

    kinds = ("model", "optimizer", "extra")
    found = fill(opened, ranks, collect, missing=missing, unexpected=unexpected, dtype=dtype, kinds=kinds, disk=disk, heard=heard)
    extra = attempt(lambda: _restore(opened, ranks.rank if same else None, module, scheduler, plan, per_rank, disk))
    ranks.everyone(extra if isinstance(extra, Failure) else None)
    assert not isinstance(extra, Failure)
    if ranks.rank == 0:
        _say(str(path), found.missing, "were not saved and keep their values")
        _say(str(path), found.unexpected, "were saved and are not asked for")
        _say(str(path), found.cast, "were cast")
    return extra


def _check_whole(opened: Checkpoint, given: Mapping[str, Any], unexpected: str, missing: str) -> None:
    """Refuse to leave part of a run behind, or to ask for a part that was not saved, without being told to."""
    values, complaints = opened.manifest.values, []
    for name, item in given.items():
        if name in values and item is None and unexpected == "error":
            complaints.append(f"it holds the state of the {name}, which would be lost: pass {name}=, or unexpected='skip' to leave it.")
        if name not in values and item is not None and missing == "error":
            complaints.append(f"it holds no {name}: leave {name}= out, or pass missing='skip'.")
    raise_all(CorruptError, f"{opened.root}:", complaints)


def _check_per_rank(opened: Checkpoint, mesh: str, ranks: Ranks) -> None:
    values = opened.manifest.values
    names = [*values.get("per_rank", {}), *(n.removeprefix(OWN) for n in opened.manifest.tensors if n.startswith(OWN + EXTRA))]
    if names:
        raise CorruptError(
            f"{opened.root}: {', '.join(n.removeprefix(EXTRA) for n in names[:5])} was kept per rank on {values.get('ranks')} ranks "
            f"({values.get('mesh') or 'no mesh'}), and these are {ranks.world} ({mesh or 'no mesh'}). per_rank='all' gives the values of "
            "all ranks as AllRanks, to be divided anew; 'skip' leaves them out."
        )


def _restore(
    opened: Checkpoint, rank: int | None, module: nn.Module, scheduler: Any, plan: list[Restoring], per_rank: str, disk: Disk
) -> dict[str, Any]:
    """Everything but the tensors, which are there already. `rank`: this one, if the ranks are those that saved."""
    values, manifest = opened.manifest.values, opened.manifest
    with Reader(opened, disk) as reader:

        def row(path: str, rank: int) -> Any:
            if OWN + path in manifest.tensors:
                return read_row(reader, OWN + path, rank)
            return decode(values["per_rank"][path][rank], _no_reference)

        def fetch(kind: str, path: str) -> Any:
            if kind == "tensor":
                return read_whole(reader, path)
            if rank is not None:
                return row(path, rank)
            return AllRanks(tuple(row(path, r) for r in range(values["ranks"])), values["mesh"]) if per_rank == "all" else None

        extra = decode(values.get("extra", {}), fetch)
        schedule = decode(values.get("scheduler"), fetch)
        if rank is not None:
            for name, _ in generators():
                if OWN + name in manifest.tensors:
                    _set_generator(name, read_row(reader, OWN + name, rank))
    for restoring in plan:
        restoring.finish()
    if scheduler is not None and schedule is not None:
        scheduler.load_state_dict(schedule)
    if isinstance(module, ParallelModel):
        module.spread_buffers()
        module.random.load_state_dict(values.get("random", module.random.state_dict()))
    assert isinstance(extra, dict)
    return extra


def _set_generator(name: str, state: torch.Tensor) -> None:
    if name == "generator.cpu":
        torch.set_rng_state(state)
    else:
        torch.cuda.set_rng_state(state)


def _no_reference(kind: str, path: str) -> Any:
    raise CorruptError(f"A per-rank value refers to {kind} {path}.")


def _say(path: str, names: tuple[str, ...], what: str) -> None:
    if names:
        warnings.warn(f"{path}: {len(names)} tensors {what}: {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}", stacklevel=3)


__all__ = ["AllRanks", "PerRank", "Saving", "load", "save", "save_async"]

"""Checkpoints that move between meshes: offline without a process group, checked byte by byte, written whole or not at all.

import meshpar as mp
mp.checkpoint.from_hf("weights", "start", "tp=2,dp=2")
mp.checkpoint.reshard("start", "wide", "tp=4,pp=2")
mp.checkpoint.verify("wide").ok, mp.checkpoint.diff("start", "wide").same

    mp.checkpoint.save("step-100", pm, optimizer, extra={"step": 100})            on running ranks, of any mesh
    extra = mp.checkpoint.load("step-100", pm, optimizer)                         on those of any other

`save`, `save_async` and `load` (a training run; a model's configuration travels along), `save_tensors` and `load_tensors` (tensors by name)
are for running ranks and need torch, which is imported when they are first used; everything else does without.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from meshpar.checkpoint.convert.dcp import from_dcp, to_dcp
from meshpar.checkpoint.convert.hf import from_hf, to_hf
from meshpar.checkpoint.convert.resharding import reshard
from meshpar.checkpoint.format.faults import CorruptError, ImpossibleError, StorageError
from meshpar.checkpoint.inspection import diff, gc, inspect, ls, verify
from meshpar.checkpoint.move.transfer import Options
from meshpar.checkpoint.online.writer import PerRank

if TYPE_CHECKING:
    from meshpar.checkpoint.online.tensors import Loaded, load_tensors, save_tensors
    from meshpar.checkpoint.online.training import AllRanks, Saving, load, save, save_async

_ONLINE = {
    **dict.fromkeys(("Loaded", "load_tensors", "save_tensors"), "meshpar.checkpoint.online.tensors"),
    **dict.fromkeys(("AllRanks", "Saving", "load", "save", "save_async"), "meshpar.checkpoint.online.training"),
}

__all__ = [
    "AllRanks",
    "CorruptError",
    "ImpossibleError",
    "Loaded",
    "Options",
    "PerRank",
    "Saving",
    "StorageError",
    "diff",
    "from_dcp",
    "from_hf",
    "gc",
    "inspect",
    "load",
    "load_tensors",
    "ls",
    "reshard",
    "save",
    "save_async",
    "save_tensors",
    "to_dcp",
    "to_hf",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name in _ONLINE:
        return getattr(import_module(_ONLINE[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

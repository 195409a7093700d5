"""Checkpoints that move between meshes: offline without a process group, checked byte by byte, written whole or not at all.

import meshpar as mp
mp.checkpoint.from_hf("weights", "start", "tp=2,dp=2")
mp.checkpoint.reshard("start", "wide", "tp=4,pp=2")
mp.checkpoint.verify("wide").ok, mp.checkpoint.diff("start", "wide").same

`save` and `load` are for running ranks and need torch, which is imported when they are first used; everything else does without.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from meshpar.checkpoint.convert import from_hf, to_hf
from meshpar.checkpoint.dcp import from_dcp, to_dcp
from meshpar.checkpoint.faults import CorruptError, ImpossibleError, StorageError
from meshpar.checkpoint.inspection import diff, gc, inspect, ls, verify
from meshpar.checkpoint.resharding import reshard
from meshpar.checkpoint.transfer import Options
from meshpar.checkpoint.writer import PerRank

if TYPE_CHECKING:
    from meshpar.checkpoint.online import load, save

__all__ = [
    "CorruptError",
    "ImpossibleError",
    "Options",
    "PerRank",
    "StorageError",
    "diff",
    "from_dcp",
    "from_hf",
    "gc",
    "inspect",
    "load",
    "ls",
    "reshard",
    "save",
    "to_dcp",
    "to_hf",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name in ("load", "save"):
        from meshpar.checkpoint import online

        return getattr(online, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

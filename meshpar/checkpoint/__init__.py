"""Checkpoints that move between meshes: offline without a process group, checked byte by byte, written whole or not at all.

import meshpar as mp
mp.checkpoint.from_hf("llama", "start", "tp=2,dp=2")
mp.checkpoint.reshard("start", "wide", "tp=4,pp=2")
mp.checkpoint.verify("wide").ok, mp.checkpoint.diff("start", "wide").same
"""

from meshpar.checkpoint.convert import from_hf, to_hf
from meshpar.checkpoint.dcp import from_dcp, to_dcp
from meshpar.checkpoint.faults import CorruptError, ImpossibleError, StorageError
from meshpar.checkpoint.inspection import diff, gc, inspect, ls, verify
from meshpar.checkpoint.resharding import reshard
from meshpar.checkpoint.transfer import Options

__all__ = [
    "CorruptError",
    "ImpossibleError",
    "Options",
    "StorageError",
    "diff",
    "from_dcp",
    "from_hf",
    "gc",
    "inspect",
    "ls",
    "reshard",
    "to_dcp",
    "to_hf",
    "verify",
]

"""The ways a checkpoint command ends badly, each with its exit status."""

from __future__ import annotations

from typing import ClassVar

from meshpar.errors import CheckpointError


class CorruptError(CheckpointError):
    """Bytes are missing, changed, or contradict each other."""

    status: ClassVar[int] = 3


class ImpossibleError(CheckpointError):
    """What was asked for cannot be planned; nothing was written."""

    status: ClassVar[int] = 4


class StorageError(CheckpointError):
    """The file system refused: disk full, read-only, or another writer at work."""

    status: ClassVar[int] = 5

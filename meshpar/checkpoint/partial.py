"""The directory a checkpoint is written in before it exists: locked, resumable, and renamed into place in one step.

    DIR/.NAME.partial/   lock       held (flock) by the one writer; the kernel releases it when the writer dies
                         journal    what the work is, and which tensors are on the disk for sure
                         ...        the files of the new checkpoint
    DIR/NAME             appears by rename, whole, after every file and the manifest are on the disk

A committed directory is never written into. A writer that is killed leaves the partial directory, which the next writer of the same name
starts over, or continues when asked to.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zlib import crc32

from meshpar.checkpoint.faults import CorruptError, ImpossibleError, StorageError
from meshpar.checkpoint.files import Disk
from meshpar.errors import ConfigError, MeshparError

LOCK, JOURNAL = "lock", "journal"
_SCRATCH = (LOCK, JOURNAL)


def partial_path(target: Path) -> Path:
    """Where a checkpoint is written before it is complete."""
    return target.parent / f".{target.name}.partial"


@dataclass
class Partial:
    """An open partial directory. `finished` is what an interrupted run recorded of its work, in its own words."""

    target: Path
    disk: Disk
    path: Path
    finished: list[Any] = field(default_factory=list)
    _lock: int = -1
    _journal: int = -1
    _journal_end: int = 0

    def record(self, rows: Mapping[str, Any]) -> None:
        """Note what is on the disk. Call only after the files were synced."""
        text = json.dumps(dict(rows), separators=(",", ":")).encode()
        line = b"%08x %s\n" % (crc32(text), text)
        self.disk.write(self._journal, [memoryview(line)], self._journal_end)
        self.disk.sync(self._journal)
        self._journal_end += len(line)

    def commit(self) -> None:
        """Make the directory the checkpoint: rename it, and put the rename on the disk."""
        self.disk.sync_directory(self.path)
        if self.target.exists() or self.target.is_symlink():
            raise StorageError(f"{self.target} appeared while it was being written. A checkpoint is never written over another one.")
        self.disk.rename(self.path, self.target)
        self.disk.sync_directory(self.target.parent)
        tidy(self.target, self.disk)

    def start(self, origin: str) -> None:
        """Begin a new journal for work with this fingerprint."""
        path = self.path / JOURNAL
        self._journal = self.disk.create(path, 0)
        self.record({"origin": origin})

    def resume(self, origin: str) -> None:
        """Continue the journal an interrupted run left; its fingerprint must be the same."""
        path = self.path / JOURNAL
        lines = list(_read_journal(self.disk, path))
        if not lines:
            _empty(self)  # whose work it is, is not known
            self.start(origin)
            return
        if lines[0][0].get("origin") != origin:
            raise ImpossibleError(
                f"{self.path} was left by a run with another source, mesh or options; it cannot be continued. "
                "Run again without --resume to start over."
            )
        for row, _ in lines[1:]:
            self.finished += row.get("finished", ())
        self._journal_end = lines[-1][1]
        self._journal = self.disk.create(path, self._journal_end)

    def close(self) -> None:
        for fd in (self._journal, self._lock):
            if fd >= 0:
                os.close(fd)
        self._journal = self._lock = -1


def tidy(target: Path, disk: Disk) -> None:
    """Remove from a committed directory what only its writer needed; one that was killed after the rename leaves it there."""
    for name in _SCRATCH:
        disk.unlink(target / name)


@contextmanager
def writing(target: Path, origin: str, disk: Disk, *, resume: bool = False) -> Iterator[Partial]:
    """Hold the partial directory of a target while it is written; the body must call `commit`.

    Raises StorageError when the target exists or another process is writing it. On an error the partial directory is removed; on an
    interrupt (or a kill) it stays, and `resume` continues it.
    """
    with storage_errors(target):
        partial = _acquire(target, disk, resume)
    try:
        with storage_errors(target):
            if resume:
                partial.resume(origin)
            else:
                partial.start(origin)
            yield partial
    except ImpossibleError:
        if not resume:
            _discard(partial)
        raise
    except (MeshparError, OSError):
        _discard(partial)
        raise
    finally:
        partial.close()


@contextmanager
def storage_errors(target: Path, what: str = "") -> Iterator[None]:
    """Turn the system's errors into ours, which say what to do."""
    advice = {
        errno.ENOSPC: "The disk is full; free space there, or write elsewhere.",
        errno.EDQUOT: "The quota there is used up.",
        errno.EROFS: "The file system is read-only; write elsewhere.",
        errno.EACCES: "The directory cannot be written; check its permissions.",
        errno.EPERM: "The directory cannot be written; check its permissions.",
        errno.ENOENT: "The directory that should hold it does not exist.",
    }
    try:
        yield
    except OSError as error:
        raise StorageError(f"{what or f'Writing {target}'} failed: {error}. {advice.get(error.errno or 0, '')}".rstrip()) from error


def check_target(target: Path) -> None:
    """Refuse a target that exists, before anything is planned."""
    if target.exists() or target.is_symlink():
        raise StorageError(f"{target} exists. A checkpoint is never written over another one: choose another name, or remove it first.")
    if target.name in ("", ".", "..") or not target.parent.is_dir():
        raise ConfigError(f"{target.parent} is not a directory; make it first, or choose another target.")


def is_locked(path: Path) -> bool:
    """Whether a live process is writing in a partial directory."""
    try:
        fd = os.open(path / LOCK, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(fd)
    return False


def _kind(path: Path) -> int | None:
    """The mode of a file, links not followed; None where there is none."""
    try:
        return path.lstat().st_mode
    except FileNotFoundError:
        return None


def _acquire(target: Path, disk: Disk, resume: bool) -> Partial:
    check_target(target)
    path = partial_path(target)
    for _ in range(100):
        try:
            disk.mkdir(path)
        except FileExistsError:
            kind = _kind(path)
            if kind is None:
                continue  # its writer has just finished
            if not stat.S_ISDIR(kind):
                raise StorageError(f"{path} is in the way and is not a directory.") from None
        try:
            fd = disk.create(path / LOCK, 0)
        except FileNotFoundError:
            continue
        except OSError:
            with suppress(OSError):
                path.rmdir()  # only if nobody else has begun there
            raise
        if not _lock(fd, path / LOCK):
            os.close(fd)
            raise StorageError(f"Another process is writing {target} (it holds {path / LOCK}). Wait for it, or choose another target.")
        if _same(fd, path / LOCK):
            break
        os.close(fd)
    else:
        raise StorageError(f"{path} keeps changing; another process works there.")
    partial = Partial(target, disk, path, _lock=fd)
    try:
        check_target(target)
        if not resume:
            _empty(partial)
    except BaseException:
        partial.close()
        raise
    return partial


def _lock(fd: int, path: Path) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _same(fd: int, path: Path) -> bool:
    """Whether the lock we hold is still the one others would find."""
    try:
        found, held = os.stat(path, follow_symlinks=False), os.fstat(fd)
    except FileNotFoundError:
        return False
    return (found.st_dev, found.st_ino) == (held.st_dev, held.st_ino)


def _empty(partial: Partial) -> None:
    """Drop what an interrupted run left, but not the lock."""
    for path in sorted(partial.path.iterdir()):
        if path.name == LOCK:
            continue
        if path.is_dir() and not path.is_symlink():
            partial.disk.remove_tree(path)
        else:
            partial.disk.unlink(path)


def _discard(partial: Partial) -> None:
    """Remove the partial directory after a failure; if even that fails, leave it to `gc`."""
    try:
        partial.disk.remove_tree(partial.path)
    except OSError:
        return


def _read_journal(disk: Disk, path: Path) -> Iterator[tuple[dict[str, Any], int]]:
    """The whole lines of a journal, each with the offset after it; a torn last line ends it."""
    try:
        data = disk.read_file(path, 1 << 32)
    except CorruptError:
        return
    at = 0
    while (end := data.find(b"\n", at)) >= 0:
        line = data[at:end]
        if len(line) < 9 or line[:8] != b"%08x" % crc32(line[9:]):
            return
        at = end + 1
        yield json.loads(line[9:]), at

"""The directory a checkpoint is written in before it exists: locked, resumable, and renamed into place in one step.

    DIR/.NAME.partial/       .lock      held (flock) by the one writer; the kernel releases it when the writer dies
                             .journal   what the work is, and which tensors are on the disk for sure
                             ...        the files of the new checkpoint
    DIR/NAME                 appears by rename, whole, after every file and the manifest are on the disk
    DIR/.NAME....removed     what is being removed: renamed first, so that nobody can come upon half of it

A committed directory is never written into. A writer that is killed leaves the partial directory, which the next writer of the same name
starts over in a new one, or continues when asked to. Whoever renames, empties or removes a partial directory holds its lock, and does so
only while the lock he holds is the one that lies there.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import secrets
import stat
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zlib import crc32

from meshpar.checkpoint.format.faults import CorruptError, ImpossibleError, StorageError
from meshpar.checkpoint.format.files import Disk
from meshpar.errors import ConfigError

LOCK, JOURNAL = ".lock", ".journal"  # hidden: no file that is carried along can be called so
SCRATCH = (LOCK, JOURNAL)
REMOVED = ".removed"
_PATIENCE, _PAUSE = 0.5, 0.01  # seconds: who only looks whether a lock is held has it for a moment


def partial_path(target: Path) -> Path:
    """Where a checkpoint is written before it is complete."""
    return target.parent / f".{target.name}.partial"


@dataclass
class Partial:
    """An open partial directory. `finished` is what an interrupted run recorded of its work, in its own words.

    `token` names this writer; it stands in the lock, for the ranks that write there too.
    """

    target: Path
    disk: Disk
    path: Path
    token: str = ""
    finished: list[Any] = field(default_factory=list)
    _lock: int = -1
    _journal: int = -1
    _journal_end: int = 0
    _committed: bool = False

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
        if not _same(self._lock, self.path / LOCK):
            raise StorageError(f"{self.path} was removed or replaced while it was being written.")
        self.disk.rename(self.path, self.target)
        self._committed = True
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
            _empty(self.path, self.disk)  # whose work it is, is not known
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

    def discard(self) -> None:
        """Remove the directory, unless it is the checkpoint by now, or another writer's; if that fails, it is left to `gc`."""
        with suppress(OSError):
            if not self._committed and _same(self._lock, self.path / LOCK):
                _remove(self.path, self.disk)

    def close(self) -> None:
        for fd in (self._journal, self._lock):
            if fd >= 0:
                os.close(fd)
        self._journal = self._lock = -1


def tidy(target: Path, disk: Disk) -> None:
    """Remove from a committed directory what only its writer needed; one that was killed after the rename leaves it there."""
    for name in SCRATCH:
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
    except Exception as error:
        if not (resume and isinstance(error, ImpossibleError)):
            partial.discard()
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


@contextmanager
def shared_directory(path: Path, token: str) -> Iterator[int]:
    """A descriptor of the partial directory of the writer with this token, for a rank that writes there without holding the lock.

    What is created by it lies in that directory even if another writer's has taken its name. Raises StorageError if it has already.
    """
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        if token and _token(fd) != token:
            raise StorageError(f"{path}: another job has taken over the directory, or the one that led this save was killed.")
        yield fd
    finally:
        os.close(fd)


def _token(directory: int) -> str:
    """What stands in the lock of a directory; nothing where there is no lock."""
    try:
        fd = os.open(LOCK, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=directory)
    except FileNotFoundError:
        return ""
    try:
        return os.read(fd, 64).decode(errors="replace")
    finally:
        os.close(fd)


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


def remove_partial(path: Path, disk: Disk) -> bool:
    """Remove a partial directory that nobody writes in; whether it was one."""
    try:
        fd = os.open(path / LOCK, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        try:
            path.rmdir()  # killed before it had a lock: empty, or somebody has just begun there
        except OSError:
            return False
        return True
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not _same(fd, path / LOCK):
            return False
        _remove(path, disk)
    except BlockingIOError:
        return False
    finally:
        os.close(fd)
    return True


def _remove(path: Path, disk: Disk) -> None:
    """Remove a partial directory whose lock is held here. The lock goes last: what is created after it is another writer's."""
    try:
        aside = set_aside(path, disk)
    except OSError:  # a disk that is full may even refuse that
        _empty(path, disk)
        disk.unlink(path / LOCK)
        path.rmdir()
    else:
        disk.remove_tree(aside)


def set_aside(path: Path, disk: Disk) -> Path:
    """Rename a directory to a name of its own under which it waits to be removed."""
    aside = path.with_name(f".{path.name.lstrip('.')[:200]}.{secrets.token_hex(4)}{REMOVED}")
    disk.rename(path, aside)
    return aside


def _acquire(target: Path, disk: Disk, resume: bool) -> Partial:
    check_target(target)
    path = partial_path(target)
    for _ in range(100):
        fd, is_new = _enter(target, path, disk)
        if fd < 0:
            continue
        partial = Partial(target, disk, path, secrets.token_hex(8), _lock=fd)
        try:
            check_target(target)  # whoever was here before may have finished
            if is_new or resume:
                os.ftruncate(fd, 0)
                disk.write(fd, [memoryview(partial.token.encode())], 0)
                return partial
            _remove(path, disk)  # and not only emptied: ranks of a killed writer may be about to write there
        except BaseException:
            if is_new or _is_bare(path):
                partial.discard()
            partial.close()
            raise
        partial.close()
    raise StorageError(f"{path} keeps changing; another process works there.")


def _is_bare(path: Path) -> bool:
    """Whether nothing lies in a partial directory but its lock: no work that could be continued."""
    with suppress(FileNotFoundError):
        return [p.name for p in path.iterdir()] == [LOCK]
    return False


def _enter(target: Path, path: Path, disk: Disk) -> tuple[int, bool]:
    """The lock of a partial directory, held, or -1 if the directory was renamed meanwhile; and whether it was made here."""
    is_new = True
    try:
        disk.mkdir(path)
    except FileExistsError:
        is_new, kind = False, _kind(path)
        if kind is not None and not stat.S_ISDIR(kind):
            raise StorageError(f"{path} is in the way and is not a directory.") from None
    try:
        fd = disk.create(path / LOCK, None)  # what its holder wrote stays
    except FileNotFoundError:
        return -1, False  # its writer has just finished
    except OSError:
        with suppress(OSError):
            path.rmdir()  # only if nobody else has begun there
        raise
    try:
        if not _lock(fd):
            raise StorageError(f"Another process is writing {target} (it holds {path / LOCK}). Wait for it, or choose another target.")
        if _same(fd, path / LOCK):
            return fd, is_new
    except BaseException:
        os.close(fd)
        raise
    os.close(fd)
    return -1, False


def _lock(fd: int) -> bool:
    until = time.monotonic() + _PATIENCE
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > until:
                return False
            time.sleep(_PAUSE)
        else:
            return True


def _same(fd: int, path: Path) -> bool:
    """Whether the lock we hold is still the one others would find."""
    try:
        found, held = os.stat(path, follow_symlinks=False), os.fstat(fd)
    except FileNotFoundError:
        return False
    return (found.st_dev, found.st_ino) == (held.st_dev, held.st_ino)


def _empty(path: Path, disk: Disk) -> None:
    """Remove what lies in a partial directory, but not the lock."""
    for entry in sorted(path.iterdir()):
        if entry.name == LOCK:
            continue
        if entry.is_dir() and not entry.is_symlink():
            disk.remove_tree(entry)
        else:
            disk.unlink(entry)


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

"""Two writers of one name, and a writer beside `gc` and `ls`, in the orders that go wrong once in a thousand runs: made on purpose here."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from meshpar.checkpoint import inspection
from meshpar.checkpoint.convert.resharding import reshard
from meshpar.checkpoint.format import partial
from meshpar.checkpoint.format.faults import CorruptError, StorageError
from meshpar.checkpoint.format.files import Disk
from meshpar.checkpoint.format.partial import LOCK, Partial, is_locked, partial_path, writing
from meshpar.checkpoint.inspection import gc, ls, verify
from meshpar.checkpoint.online.saving import Saving
from meshpar.checkpoint.online.writer import Local, Record, finish, merge, write_rank
from tests.checkpoint.making import bits, load, same, save

TENSORS = {f"layers.{k}.weight": ("F32", bits("F32", (13, 7), k)) for k in range(4)}


@pytest.fixture
def tmp_path(tmp_path: Path) -> Iterator[Path]:
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as root:
        yield Path(root)


class Between(Disk):
    """Does something once, just before (or, with `after`, just after) the n-th call of one kind."""

    def __init__(self, what: str, act: Callable[[], object], at: int = 0) -> None:
        self.what, self.act, self.at = what, act, at

    def step(self, what: str) -> None:
        if what != self.what:
            return
        self.at -= 1
        if self.at == -1:
            self.act()


def left(root: Path) -> list[str]:
    return sorted(p.name for p in root.iterdir())


def test_a_writer_that_comes_when_another_has_just_finished_leaves_nothing(tmp_path: Path) -> None:
    save(tmp_path / "a", TENSORS, "tp=2")
    late = Between("mkdir", lambda: reshard(tmp_path / "a", tmp_path / "b", "tp=2"))
    with pytest.raises(StorageError, match="never written over"):
        reshard(tmp_path / "a", tmp_path / "b", "tp=2", disk=late)
    assert left(tmp_path) == ["a", "b"]
    assert same(load(tmp_path / "b"), TENSORS)


def test_a_writer_that_meets_the_lock_of_one_that_finishes_leaves_nothing(tmp_path: Path) -> None:
    """It finds the directory, and it is gone, and there again as its own, before it can lock it."""
    save(tmp_path / "a", TENSORS, "tp=2")
    partial_path(tmp_path / "b").mkdir()
    late = Between("create", lambda: reshard(tmp_path / "a", tmp_path / "b", "tp=2"))
    with pytest.raises(StorageError, match="never written over"):
        reshard(tmp_path / "a", tmp_path / "b", "tp=2", disk=late)
    assert left(tmp_path) == ["a", "b"]


def test_a_failed_writer_removes_nothing_of_the_next_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the first one removes its directory, entry by entry, the next one of the same name begins."""
    found: list[Exception] = []

    def next_one() -> None:
        try:
            save(tmp_path / "b", TENSORS, "tp=2")
        except StorageError as error:
            found.append(error)

    real, done = os.unlink, []

    def unlink(path: str | os.PathLike[str], **options: int | None) -> None:
        real(path, **options)  # type: ignore[arg-type]
        if not done:
            done.append(path)
            next_one()

    monkeypatch.setattr(os, "unlink", unlink)
    with pytest.raises(StorageError, match="no room"), writing(tmp_path / "b", "", Disk()) as first:
        for name in ("rank-00000.safetensors", "rank-00001.safetensors", "other"):
            (first.path / name).write_bytes(b"of the first")
        raise StorageError("no room")
    assert done
    if found:
        assert left(tmp_path) == []
    else:
        assert left(tmp_path) == ["b"] and verify(tmp_path / "b").ok and same(load(tmp_path / "b"), TENSORS)


def test_a_writer_that_failed_after_its_rename_removes_nothing_of_the_next_one(tmp_path: Path) -> None:
    """The rename is done, only the report that it is on the disk fails; meanwhile the checkpoint is moved and the next one is written."""
    going: list[Partial] = []

    def meanwhile() -> None:
        (tmp_path / "b").rename(tmp_path / "c")
        going.append(begun.__enter__())
        (going[0].path / "precious").write_bytes(b"1")
        raise OSError("the disk does not answer")

    begun = writing(tmp_path / "b", "", Disk())
    late = Between("sync", meanwhile, at=-1)

    def count(what: str) -> None:
        if what == "sync" and (tmp_path / "b").exists() and not going:
            meanwhile()

    late.step = count  # type: ignore[method-assign]
    with pytest.raises(StorageError, match="does not answer"):
        save(tmp_path / "b", TENSORS, "tp=2", disk=late)
    assert (going[0].path / "precious").read_bytes() == b"1"
    going[0].commit()
    begun.__exit__(None, None, None)
    assert left(tmp_path) == ["b", "c"] and same(load(tmp_path / "c"), TENSORS)


def test_looking_does_not_refuse_a_writer(tmp_path: Path) -> None:
    """`ls` and `gc` ask for the lock for a moment; a writer that comes then waits for that moment."""
    path = partial_path(tmp_path / "b")
    path.mkdir()
    fd = os.open(path / LOCK, os.O_RDWR | os.O_CREAT)
    fcntl.flock(fd, fcntl.LOCK_EX)
    assert is_locked(path)
    soon = threading.Timer(0.05, lambda: os.close(fd))
    soon.start()
    save(tmp_path / "b", TENSORS)
    soon.join()
    assert left(tmp_path) == ["b"]


def test_gc_removes_nothing_that_a_writer_has_taken_over_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = partial_path(tmp_path / "b")
    path.mkdir()
    (path / LOCK).touch()
    real, going = inspection.is_locked, []
    begun = writing(tmp_path / "b", "", Disk())

    def look(path: Path) -> bool:
        found = real(path)
        if not going:
            going.append(begun.__enter__())
            (going[0].path / "precious").write_bytes(b"1")
        return found

    monkeypatch.setattr(inspection, "is_locked", look)
    assert gc(tmp_path) == []
    assert (going[0].path / "precious").read_bytes() == b"1"
    going[0].commit()
    begun.__exit__(None, None, None)
    assert left(tmp_path) == ["b"]


def test_two_gcs_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = partial_path(tmp_path / "b")
    path.mkdir()
    (path / LOCK).touch()
    (tmp_path / ".old.1234.removed").mkdir()
    for k in range(3):
        save(tmp_path / f"step-{k}", TENSORS)
    real, inner = inspection.ls, []

    def look(*args: object, **options: object) -> list[dict[str, object]]:
        rows = real(*args, **options)  # type: ignore[arg-type]
        if not inner:
            inner.append(None)
            inner[0] = gc(tmp_path, keep=1)  # type: ignore[call-overload]
        return rows

    monkeypatch.setattr(inspection, "ls", look)
    gc(tmp_path, keep=1)
    assert left(tmp_path) == ["step-2"]


def test_gc_finds_what_was_killed_before_its_lock_or_after_its_end(tmp_path: Path) -> None:
    partial_path(tmp_path / "b").mkdir()  # killed between mkdir and the lock
    (tmp_path / ".mine.partial").mkdir()
    (tmp_path / ".mine.partial" / "notes").touch()  # not of a writer
    assert [row["name"] for row in ls(tmp_path)] == [".b.partial"]
    assert gc(tmp_path) == [str(tmp_path / ".b.partial")]
    assert left(tmp_path) == [".mine.partial"]


def test_an_unexpected_error_leaves_nothing_either(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="what"), writing(tmp_path / "b", "", Disk()):
        raise ValueError("what")
    assert left(tmp_path) == []


def late_rank(root: Path, token: str) -> Record:
    words = bits("F32", (4,))
    return write_rank(root, 0, [Local("w", "F32", (4,), (((0, 4),),), lambda: words)], {}, Disk(), token=token)


def test_a_rank_of_a_killed_job_writes_nothing_into_the_next_one(tmp_path: Path) -> None:
    """Its leader was killed and the job began anew, under the same name, before this rank came to write."""
    begun = writing(tmp_path / "b", "", Disk())
    old = begun.__enter__()
    token, root = old.token, old.path
    old.close()  # what the kernel does when the leader is killed
    with writing(tmp_path / "b", "", Disk()) as new:
        assert new.path == root and new.token != token
        with pytest.raises(StorageError, match="another job has taken over"):
            late_rank(root, token)
        record = late_rank(root, new.token)
        with pytest.raises(OSError, match="exists"):
            late_rank(root, new.token)
        finish(new, merge([record]))
    begun.gen.close()  # type: ignore[attr-defined]
    assert left(tmp_path) == ["b"] and verify(tmp_path / "b").ok


def test_a_rank_that_is_between_looking_and_writing_when_the_job_begins_anew(tmp_path: Path) -> None:
    begun = writing(tmp_path / "b", "", Disk())
    old = begun.__enter__()
    new: list[Partial] = []
    again = writing(tmp_path / "b", "", Disk())

    def restart() -> None:
        old.close()
        new.append(again.__enter__())

    words = bits("F32", (4,))
    with pytest.raises((OSError, StorageError)):
        write_rank(old.path, 0, [Local("w", "F32", (4,), (((0, 4),),), lambda: words)], {}, Between("create", restart), token=old.token)
        raise OSError("written where nobody looks")
    assert sorted(p.name for p in new[0].path.iterdir()) == [".journal", ".lock"]
    finish(new[0], merge([late_rank(new[0].path, new[0].token)]))
    again.__exit__(None, None, None)
    begun.gen.close()  # type: ignore[attr-defined]
    assert left(tmp_path) == ["b"] and verify(tmp_path / "b").ok


def test_a_writer_that_is_refused_changes_nothing(tmp_path: Path) -> None:
    with writing(tmp_path / "b", "", Disk()) as new:
        with pytest.raises(StorageError, match="Another process"):
            save(tmp_path / "b", TENSORS)
        finish(new, merge([late_rank(new.path, new.token)]))
    assert left(tmp_path) == ["b"]


@pytest.mark.parametrize("harm", [Path.unlink, lambda p: os.truncate(p, 5)], ids=["gone", "short"])
def test_a_manifest_is_only_written_of_files_that_are_there(tmp_path: Path, harm: Callable[[Path], None]) -> None:
    """Ranks that do not share the directory, or a file that somebody removed."""
    with (
        pytest.raises(CorruptError, match=r"rank-00000.safetensors .*must see the same directory"),
        writing(tmp_path / "b", "", Disk()) as new,
    ):
        record = late_rank(new.path, new.token)
        harm(new.path / "rank-00000.safetensors")
        finish(new, merge([record]))
    assert left(tmp_path) == []


def test_files_called_lock_and_journal_travel_as_any_other(tmp_path: Path) -> None:
    from meshpar.checkpoint.convert.hf import from_hf, to_hf
    from tests.checkpoint.making import save_folder

    save_folder(tmp_path / "hf", TENSORS, assets={"lock": "mine", "journal": "mine too"})
    from_hf(tmp_path / "hf", tmp_path / "a", "tp=2")
    to_hf(tmp_path / "a", tmp_path / "back")
    assert (tmp_path / "back" / "lock").read_text() == "mine" and (tmp_path / "back" / "journal").read_text() == "mine too"


def test_what_was_killed_between_rename_and_tidying_is_not_carried_along(tmp_path: Path) -> None:
    from meshpar.checkpoint.convert.hf import from_hf
    from tests.checkpoint.making import save_folder

    save_folder(tmp_path / "hf", TENSORS, assets={"config.json": "{}"})
    for name in partial.SCRATCH:
        (tmp_path / "hf" / name).touch()
    from_hf(tmp_path / "hf", tmp_path / "a", "tp=2")
    assert left(tmp_path / "a" / "assets") == ["config.json"]


def test_a_thread_that_ends_in_any_way_says_so() -> None:
    saving = Saving(Path("nowhere"))

    def write() -> None:
        raise SystemExit(3)

    saving.start(write)
    with pytest.raises(StorageError, match="SystemExit"):
        saving.wait()


def test_a_stale_directory_of_a_dead_process_is_started_over(tmp_path: Path) -> None:
    path = partial_path(tmp_path / "b")
    path.mkdir()
    for name in (LOCK, "rank-00000.safetensors", "rank-00007.safetensors"):
        (path / name).write_bytes(b"of the dead")
    save(tmp_path / "b", TENSORS, "tp=2")
    assert left(tmp_path) == ["b"] and verify(tmp_path / "b").ok
    shutil.rmtree(tmp_path / "b")

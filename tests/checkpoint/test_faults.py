"""Killed at every step, disk full, read-only, two writers, damaged files: the old checkpoint stays, the new one is absent or whole."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from meshpar.checkpoint.convert import execution, resharding
from meshpar.checkpoint.convert.hf import from_hf, to_hf
from meshpar.checkpoint.convert.resharding import reshard
from meshpar.checkpoint.format.faults import CorruptError, ImpossibleError, StorageError
from meshpar.checkpoint.format.files import Disk
from meshpar.checkpoint.format.manifest import MANIFEST
from meshpar.checkpoint.format.partial import writing
from meshpar.checkpoint.inspection import diff, gc, ls, verify
from meshpar.checkpoint.move.transfer import Options
from tests.checkpoint.making import CountingDisk, bits, flip, kill, load, no_space, same, sample, save, save_folder

TENSORS = {f"layers.{k}.weight": ("F32", bits("F32", (13, 7), k)) for k in range(12)} | {"scale": ("BF16", bits("BF16", ()))}
SMALL = Options(slab=256, smallest=64)
Act = Callable[[Path, Disk], object]


@pytest.fixture
def tmp_path(tmp_path: Path) -> Iterator[Path]:
    """In memory where there is such a place: these tests sync thousands of times."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as root:
        yield Path(root)


def die_at(step: int, act: Act, root: Path) -> bool:
    """Run `act` in a child that kills itself at the n-th call to the disk; whether it got that far."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        try:
            execution.SYNC_BYTES = 1  # note every finished tensor, so that resuming has something to continue
            act(root, CountingDisk(step, kill))
        finally:
            os._exit(0)
    _, status = os.waitpid(pid, 0)
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


def do_reshard(root: Path, disk: Disk) -> object:
    return reshard(root / "a", root / "b", "tp=3,pp=2", options=SMALL, disk=disk)


def do_save(root: Path, disk: Disk) -> object:
    return save(root / "b", TENSORS, "tp=2,pp=2", disk=disk)


def do_to_hf(root: Path, disk: Disk) -> object:
    return to_hf(root / "a", root / "b", shard_bytes=1500, options=SMALL, disk=disk)


def steps_of(act: Act, root: Path) -> int:
    """How many calls to the disk it takes, and that it works."""
    disk = CountingDisk()
    shutil.copytree(root / "a", root / "dry" / "a")
    act(root / "dry", disk)
    assert same(load(root / "dry" / "b"), TENSORS)
    shutil.rmtree(root / "dry")
    return disk.calls


@pytest.mark.sweep(1)
@pytest.mark.parametrize("act", [do_reshard, do_save, do_to_hf], ids=["reshard", "save", "to-hf"])
def test_killed_at_every_step(tmp_path: Path, act: Act) -> None:
    save(tmp_path / "a", TENSORS, "tp=2")
    steps = steps_of(act, tmp_path)
    stride = max(1, steps // 110)
    points = sorted({*range(0, steps, stride), *range(max(steps - 12, 0), steps)})
    assert len(points) >= min(steps, 100)
    absent = resumed = 0
    for step in points:
        assert die_at(step, act, tmp_path), f"step {step} of {steps} was not reached"
        assert same(load(tmp_path / "a"), TENSORS), f"step {step}: the old checkpoint changed"
        left = sorted(p.name for p in tmp_path.iterdir())
        assert left in (["a"], [".b.partial", "a"], ["a", "b"]), f"step {step}: {left}"
        if "b" in left:
            assert same(load(tmp_path / "b"), TENSORS) and verify(tmp_path / "b").ok, f"step {step}: committed, but not whole"
        else:
            absent += 1
        resumed += finish_after(act, tmp_path)
        assert same(load(tmp_path / "b"), TENSORS), f"step {step}: not whole after resuming"
        assert verify(tmp_path / "b").ok
        assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]
        shutil.rmtree(tmp_path / "b")
    assert absent > len(points) // 2
    if act is not do_save:
        assert resumed > len(points) // 4


def finish_after(act: Act, root: Path) -> bool:
    """Complete what a killed run left, with --resume where there is one; whether anything was taken over."""
    if act is do_reshard:
        return reshard(root / "a", root / "b", "tp=3,pp=2", options=SMALL, resume=True).resumed > 0
    if act is do_to_hf:
        return to_hf(root / "a", root / "b", shard_bytes=1500, options=SMALL, resume=True).resumed > 0
    if not (root / "b").exists():
        act(root, Disk())
    return False


def test_resume_trusts_no_byte_it_has_not_read_again(tmp_path: Path) -> None:
    save(tmp_path / "a", TENSORS, "tp=2")
    steps = steps_of(do_reshard, tmp_path)
    assert die_at(steps - 8, do_reshard, tmp_path)
    path = next(p for p in sorted((tmp_path / ".b.partial").glob("*.safetensors")))
    flip(path, path.stat().st_size - 3)
    reshard(tmp_path / "a", tmp_path / "b", "tp=3,pp=2", options=SMALL, resume=True)
    assert same(load(tmp_path / "b"), TENSORS) and verify(tmp_path / "b").ok


def test_resume_refuses_another_plan_and_a_fresh_run_starts_over(tmp_path: Path) -> None:
    save(tmp_path / "a", TENSORS, "tp=2")
    assert die_at(60, do_reshard, tmp_path)
    with pytest.raises(ImpossibleError, match="left by a run with another source, mesh or options"):
        reshard(tmp_path / "a", tmp_path / "b", "tp=4", resume=True)
    reshard(tmp_path / "a", tmp_path / "b", "tp=4")
    assert same(load(tmp_path / "b"), TENSORS)


def test_resume_refuses_a_source_that_changed_meanwhile(tmp_path: Path) -> None:
    save(tmp_path / "a", TENSORS, "tp=2")
    assert die_at(60, do_reshard, tmp_path)
    shutil.rmtree(tmp_path / "a")
    save(tmp_path / "a", sample(3), "tp=2")
    with pytest.raises(ImpossibleError, match="another source"):
        reshard(tmp_path / "a", tmp_path / "b", "tp=3,pp=2", options=SMALL, resume=True)


@pytest.mark.parametrize("act", [do_reshard, do_save, do_to_hf], ids=["reshard", "save", "to-hf"])
def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, act: Act) -> None:
    save(tmp_path / "a", TENSORS, "tp=2")
    counter = CountingDisk(only=("write", "create", "mkdir", "sync", "rename"))
    act(tmp_path, counter)
    shutil.rmtree(tmp_path / "b")
    for step in range(counter.calls):
        with pytest.raises(StorageError, match="The disk is full; free space there"):
            act(tmp_path, CountingDisk(step, no_space, counter.only))
        left = [p.name for p in tmp_path.iterdir()]
        # after the rename the checkpoint is whole; only the report that it is on the disk failed
        assert left == ["a"] or (sorted(left) == ["a", "b"] and same(load(tmp_path / "b"), TENSORS)), (step, left)
        shutil.rmtree(tmp_path / "b", ignore_errors=True)
    assert same(load(tmp_path / "a"), TENSORS)


def test_a_disk_that_is_too_small_is_refused_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "a", TENSORS)
    real = os.statvfs

    def tiny(path: Path) -> os.statvfs_result:
        found = list(real(path))
        found[4] = 0
        return os.statvfs_result(found)

    monkeypatch.setattr(os, "statvfs", tiny)
    with pytest.raises(StorageError, match="which has 0 free"):
        reshard(tmp_path / "a", tmp_path / "b", "tp=2")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_real_small_file_system_fills_up(tmp_path: Path) -> None:
    mount = tmp_path / "mnt"
    mount.mkdir()
    if os.getuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", mount], capture_output=True).returncode:
        pytest.skip("mounting a file system needs rights")
    try:
        save(tmp_path / "a", {"w": ("F32", bits("F32", (300, 200)))})
        work = resharding.plan_reshard(tmp_path / "a", mount / "b", "tp=2")
        with pytest.raises(StorageError, match="free"):
            execution.execute(work, execution.How(Options(), Disk()))
        assert list(mount.iterdir()) == []
    finally:
        subprocess.run(["umount", mount], check=True)


def test_a_read_only_directory_is_an_error_and_no_traceback(tmp_path: Path) -> None:
    save(tmp_path / "a", TENSORS)
    (tmp_path / "ro").mkdir()
    if os.getuid() == 0:
        import errno

        def refuse() -> None:
            raise OSError(errno.EROFS, "Read-only file system")

        with pytest.raises(StorageError, match="read-only; write elsewhere"):
            reshard(tmp_path / "a", tmp_path / "ro" / "b", "tp=2", disk=CountingDisk(0, refuse, ("mkdir",)))
    else:
        (tmp_path / "ro").chmod(0o555)
        with pytest.raises(StorageError, match="check its permissions"):
            reshard(tmp_path / "a", tmp_path / "ro" / "b", "tp=2")
    assert list((tmp_path / "ro").iterdir()) == []


def test_of_two_writers_one_wins_and_the_other_is_told(tmp_path: Path) -> None:
    save(tmp_path / "a", TENSORS, "tp=2")
    with (
        writing(tmp_path / "b", "x", Disk()) as partial,
        pytest.raises(StorageError, match=r"Another process is writing .*b \(it holds .*lock\)"),
    ):
        do_reshard(tmp_path, Disk())
    assert partial.path.exists(), "the loser must not remove the winner's work"
    assert [row["state"] for row in ls(tmp_path) if row["form"] == "partial"] == ["interrupted"]
    do_reshard(tmp_path, Disk())
    assert same(load(tmp_path / "b"), TENSORS)


def test_many_writers_at_once_leave_one_whole_checkpoint(tmp_path: Path) -> None:
    save(tmp_path / "a", TENSORS, "tp=2")
    won: list[str] = []
    lost: list[str] = []

    def race() -> None:
        try:
            do_reshard(tmp_path, Disk())
            won.append("won")
        except StorageError as error:
            lost.append(str(error))

    threads = [threading.Thread(target=race) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1 and len(lost) == 5
    said = ("Another process is writing", "another process works there", "never written over", "appeared")
    assert all(any(words in text for words in said) for text in lost), lost
    assert same(load(tmp_path / "b"), TENSORS) and verify(tmp_path / "b").ok
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


def test_a_writer_in_another_process_is_seen_and_its_death_releases_the_name(tmp_path: Path) -> None:
    save(tmp_path / "a", TENSORS, "tp=2")
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        with writing(tmp_path / "b", "x", Disk()):
            os.write(write, b"!")
            time.sleep(60)
        os._exit(0)
    assert os.read(read, 1) == b"!"
    with pytest.raises(StorageError, match="Another process"):
        do_reshard(tmp_path, Disk())
    assert gc(tmp_path) == [], "gc must leave a live writer alone"
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    do_reshard(tmp_path, Disk())
    assert same(load(tmp_path / "b"), TENSORS)


def test_gc_removes_what_a_killed_run_left_and_keeps_the_newest(tmp_path: Path) -> None:
    save(tmp_path / "a", TENSORS, "tp=2")
    assert die_at(60, do_reshard, tmp_path)
    assert gc(tmp_path, dry_run=True) == gc(tmp_path) == [str(tmp_path / ".b.partial")]
    for k in range(3):
        save(tmp_path / f"step-{k}", {"w": ("F32", bits("F32", (2,)))})
        os.utime(tmp_path / f"step-{k}" / MANIFEST, ns=(k * 10**9, 10**18 + k * 10**9))
    os.utime(tmp_path / "a" / MANIFEST, ns=(0, 0))
    gc(tmp_path, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-1", "step-2"]


def _truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def _extend(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def _link(path: Path) -> None:
    path.rename(path.with_suffix(".real"))
    path.symlink_to(path.with_suffix(".real"))


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (_truncate, "truncated"),
    "extended": (_extend, "too long"),
    "deleted": (Path.unlink, "is missing"),
    "a link": (_link, "symbolic link"),
    "a bit of the data": (lambda p: flip(p, p.stat().st_size - 1, 7), "crc32 is"),
    "a bit of the header": (lambda p: flip(p, 20), "header"),
    "a bit of the header's length": (lambda p: flip(p, 5), "header"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_file_is_named_by_every_reader(tmp_path: Path, kind: str) -> None:
    save(tmp_path / "a", TENSORS, "tp=2")
    act, message = DAMAGE[kind]
    act(tmp_path / "a" / "rank-00001.safetensors")
    found = verify(tmp_path / "a")
    assert not found.ok and found.status == 3 and "rank-00001.safetensors" in found.corrupt[0] and message in found.corrupt[0]
    for read in (
        lambda: load(tmp_path / "a"),
        lambda: do_reshard(tmp_path, Disk()),
        lambda: do_to_hf(tmp_path, Disk()),
        lambda: diff(tmp_path / "a", tmp_path / "a"),
    ):
        with pytest.raises(CorruptError, match=rf"rank-00001.safetensors.*{message}"):
            read()
    assert not (tmp_path / "b").exists() and not (tmp_path / ".b.partial").exists()


def test_swapped_files_are_found(tmp_path: Path) -> None:
    save(tmp_path / "a", {"w": ("F32", bits("F32", (8, 4)))}, "tp=2")
    one, two = (tmp_path / "a" / f"rank-0000{k}.safetensors" for k in range(2))
    one.rename(tmp_path / "x"), two.rename(one), (tmp_path / "x").rename(two)
    with pytest.raises(CorruptError, match="swapped with another file"):
        load(tmp_path / "a")
    assert len(verify(tmp_path / "a").corrupt) == 2


def test_every_flipped_bit_of_a_small_checkpoint_is_found(tmp_path: Path) -> None:
    save(tmp_path / "a", {"w": ("F32", bits("F32", (3, 2)))}, "tp=2")
    for path in sorted((tmp_path / "a").iterdir()):
        good = path.read_bytes()
        for offset in range(0, len(good), 3 if path.name == MANIFEST else 1):
            flip(path, offset, offset % 8)
            try:
                found = verify(tmp_path / "a")
                assert not found.ok, f"{path.name} byte {offset}"
            except CorruptError:
                pass
            path.write_bytes(good)
    assert verify(tmp_path / "a").ok


def test_a_manifest_cut_anywhere_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "a", {"w": ("F32", bits("F32", (3, 2)))}, "tp=2")
    path = tmp_path / "a" / MANIFEST
    good = path.read_bytes()
    for size in range(len(good)):
        path.write_bytes(good[:size])
        with pytest.raises(CorruptError):
            load(tmp_path / "a")


def test_a_hugging_face_source_that_ends_early_is_refused(tmp_path: Path) -> None:
    save_folder(tmp_path / "hf", TENSORS, 2)
    _truncate(tmp_path / "hf" / "model-00002-of-00002.safetensors")
    with pytest.raises(CorruptError, match="model-00002-of-00002.safetensors has .* it is truncated"):
        from_hf(tmp_path / "hf", tmp_path / "b", "tp=2")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf"]


def test_an_interrupt_keeps_the_work_for_resuming(tmp_path: Path) -> None:
    save(tmp_path / "a", TENSORS, "tp=2")

    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        do_reshard(tmp_path, CountingDisk(60, interrupt))
    assert (tmp_path / ".b.partial").exists()
    reshard(tmp_path / "a", tmp_path / "b", "tp=3,pp=2", options=SMALL, resume=True)
    assert same(load(tmp_path / "b"), TENSORS)


def test_a_failing_thread_stops_the_others(tmp_path: Path) -> None:
    save(tmp_path / "a", TENSORS, "tp=2")
    flip(tmp_path / "a" / "rank-00000.safetensors", (tmp_path / "a" / "rank-00000.safetensors").stat().st_size - 1)
    before = threading.active_count()
    with pytest.raises(CorruptError, match="crc32"):
        reshard(tmp_path / "a", tmp_path / "b", "tp=3", options=Options(workers=3, slab=256, smallest=64))
    assert threading.active_count() == before and not (tmp_path / ".b.partial").exists()


def test_the_command_survives_a_kill_from_outside(tmp_path: Path) -> None:
    """The one test with a real process and the real command line."""
    big = {f"w{k}": ("F32", bits("F32", (512, 512), k)) for k in range(8)}
    save(tmp_path / "a", big, "tp=2")
    command = [sys.executable, "-m", "meshpar.checkpoint", "reshard", str(tmp_path / "a"), str(tmp_path / "b"), "--mesh", "tp=4"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while process.poll() is None and not (tmp_path / ".b.partial").exists():
        time.sleep(0.001)
    process.kill()
    process.wait()
    assert same(load(tmp_path / "a"), big)
    if not (tmp_path / "b").exists():
        reshard(tmp_path / "a", tmp_path / "b", "tp=4", resume=True)
    assert same(load(tmp_path / "b"), big)

"""Small transfers together: checksums worked out from others, and every kind of division beside every other in one batch."""

from __future__ import annotations

from pathlib import Path
from zlib import crc32

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshpar.checkpoint.convert.resharding import reshard
from meshpar.checkpoint.format.boxes import Box
from meshpar.checkpoint.format.faults import CorruptError
from meshpar.checkpoint.inspection import verify
from meshpar.checkpoint.move.channel import Traffic
from meshpar.checkpoint.move.recipes import recipe
from meshpar.checkpoint.move.stacks import _shifted
from meshpar.checkpoint.move.transfer import Options
from tests.checkpoint.making import bits, flip, load, same, save


@given(st.lists(st.binary(max_size=40), min_size=1, max_size=4), st.binary(max_size=300))
@settings(max_examples=100, deadline=None)
def test_the_checksum_of_two_stretches_follows_from_theirs(heads: list[bytes], tail: bytes) -> None:
    first = np.array([crc32(head) for head in heads], np.uint32)
    assert (_shifted(first, len(tail)) ^ crc32(tail)).tolist() == [crc32(head + tail) for head in heads]


def test_a_recipe_tells_what_a_target_is_made_of() -> None:
    rows = [Box((0, 0), (2, 4)), Box((2, 0), (2, 4))]
    assert recipe(rows, [Box((0, 0), (4, 4))], 2).parts == (((0, 0, 16), (1, 0, 16)),)
    assert recipe(rows, [Box((1, 0), (2, 4))], 1).parts == (((0, 4, 8), (1, 0, 4)),)
    assert recipe(rows, [Box((0, 0), (4, 2)), Box((0, 2), (4, 2))], 1).parts is None


@pytest.mark.parametrize("options", [Options(), Options(slab=3000, smallest=64), Options(verify=False), Options(workers=2, slab=3000)])
def test_many_kinds_in_one_batch(tmp_path: Path, options: Options) -> None:
    """Alike and not, sizes that fill a buffer exactly, empty ones; in order and against it: the bytes and checksums of each are its own."""
    shapes = [(8, 6), (8, 6), (5,), (16, 3), (0, 6), (8, 6), (7, 3)]
    tensors = {f"{k:03d}": ("BF16", bits("BF16", shapes[k % len(shapes)], k)) for k in range(110)}
    save(tmp_path / "a", tensors, "tp=4")
    save(tmp_path / "backwards", dict(reversed(tensors.items())), "tp=4")
    for source, mesh in (("a", "tp=1"), ("a", "tp=2,pp=3"), ("backwards", "dp=2"), ("backwards", "tp=8")):
        target = tmp_path / f"{source} {mesh}"
        report = reshard(tmp_path / source, target, mesh, options=options)
        assert same(load(target), tensors) and verify(target).ok
        assert report.bytes_read == report.bytes_written == sum(a.nbytes for _, a in tensors.values())


def test_a_flipped_bit_of_one_among_many_is_named(tmp_path: Path) -> None:
    tensors = {f"{k:03d}": ("BF16", bits("BF16", (8, 8), k)) for k in range(50)}
    manifest = save(tmp_path / "a", tensors, "tp=2")
    chunk = manifest.tensors["037"].chunks[1]
    flip(tmp_path / "a" / "rank-00001.safetensors", chunk.begin + 5, 2)
    with pytest.raises(
        CorruptError, match=rf"rank-00001.safetensors, tensor 037 \[4:8, 0:8\], bytes from {chunk.begin} \(block 0\): crc32"
    ):
        reshard(tmp_path / "a", tmp_path / "b", "tp=1")
    assert not (tmp_path / "b").exists()


def test_few_calls_move_many_tensors(tmp_path: Path) -> None:
    from meshpar.checkpoint.convert.execution import How, _fill
    from meshpar.checkpoint.convert.resharding import plan_reshard
    from meshpar.checkpoint.format.files import Disk
    from meshpar.checkpoint.format.partial import writing

    save(tmp_path / "a", {f"{k:03d}": ("BF16", bits("BF16", (8, 8), k)) for k in range(300)}, "tp=4")
    work, how = plan_reshard(tmp_path / "a", tmp_path / "b", "tp=1"), How(Options(), Disk())
    with writing(tmp_path / "b", "", how.disk) as partial:
        traffic, _ = _fill(work, partial, "", how.options, lambda done, total: None)
        partial.commit()
    assert traffic == Traffic(300 * 128, 300 * 128, 4, 1)

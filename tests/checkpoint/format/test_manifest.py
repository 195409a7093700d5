"""Manifests: what is written is read back, version 1 too; whatever else a manifest says is refused with the place at fault."""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from meshpar.checkpoint.convert.hf import to_hf
from meshpar.checkpoint.convert.resharding import reshard
from meshpar.checkpoint.format.faults import CorruptError
from meshpar.checkpoint.format.files import Disk
from meshpar.checkpoint.format.manifest import MANIFEST, Manifest, dump, read
from meshpar.checkpoint.format.manifest import load as load_manifest
from meshpar.checkpoint.inspection import inspect, verify
from tests.checkpoint.making import bits, load, same, sample, save, stamped

SAMPLES = Path(__file__).parent / "version1"
SMALL = {"a": ("F32", bits("F32", (6, 4))), "b": ("F32", bits("F32", (6, 4), 1)), "c": ("BF16", bits("BF16", (3,)))}


def test_tensors_that_are_alike_share_a_description_and_keep_their_order(tmp_path: Path) -> None:
    tensors = {f"{k}.{n}": ("BF16", bits("BF16", shape, k)) for k in range(9) for n, shape in (("w", (6, 4)), ("v", (5,)))}
    saved = save(tmp_path / "a", tensors, "tp=2")
    found = read(Disk(), tmp_path / "a")
    assert list(found.tensors) == list(saved.tensors) and len(found.tensors.groups) == 2
    assert dict(found.tensors) == dict(saved.tensors) and set(found.tensors) == set(tensors)
    assert list(save(tmp_path / "b", tensors).tensors) == list(read(Disk(), tmp_path / "b").tensors) == list(tensors)
    assert [c.begin for c in found.tensors["8.w"].chunks] > [c.begin for c in found.tensors["0.w"].chunks]
    assert load_manifest(dump(found), "again").tensors == found.tensors


def test_a_checkpoint_of_version_1_is_read(tmp_path: Path) -> None:
    root = SAMPLES / "saved"
    assert json.loads((root / MANIFEST).read_text())["version"] == 1
    assert same(load(root), sample()) and verify(root).ok
    facts = inspect(root)
    assert (facts["mesh"], facts["values"]) == ("dp=2,tp=2", {"step": 7, "per": [1.5, "x"]})
    assert facts["tensors"]["step"]["kind"] == "extra" and facts["tensors"]["layers.0.qkv.weight"]["chunks"] == 6
    reshard(root, tmp_path / "b", "tp=3")
    assert json.loads((tmp_path / "b" / MANIFEST).read_text())["version"] == 2
    assert same(load(tmp_path / "b"), sample()) and verify(tmp_path / "b").ok
    assert inspect(tmp_path / "b")["tensors"]["step"]["kind"] == "extra"


def test_ties_key_maps_and_assets_of_version_1_are_read(tmp_path: Path) -> None:
    root = SAMPLES / "imported"
    assert verify(root).ok and inspect(root)["aliases"] == {"head": "embed"}
    to_hf(root, tmp_path / "hf")
    found = load(tmp_path / "hf")
    assert set(found) == {"layers.0.norm", "layers.1.norm", "layers.2.norm", "head", "embed"}
    assert same({"x": found["head"]}, {"x": sample()["embed.weight"]}) and (tmp_path / "hf" / "config.json").exists()


@pytest.mark.parametrize("change", ["begin", "dtype", "size", "crc", "kind", "name"])
def test_a_wrong_manifest_of_version_1_is_refused(tmp_path: Path, change: str) -> None:
    shutil.copytree(SAMPLES / "imported", tmp_path / "a")
    body = json.loads((tmp_path / "a" / MANIFEST).read_text())
    row = body["tensors"]["norms"]
    if change == "name":
        body["tensors"]["a\nb"] = row
    elif change in row:
        row[change] = "F33"
    else:
        chunk = row["chunks"][0]
        chunk[{"size": 1, "begin": 3, "crc": 4}[change]] = {"size": [4, 8], "begin": -1, "crc": [1 << 32]}[change]
    with pytest.raises(CorruptError):
        load_manifest(stamped(body), "here")


def packed(numbers: Any, dtype: str) -> str:
    return base64.b64encode(np.array(numbers, dtype).tobytes()).decode()


@pytest.fixture(scope="module")
def body(tmp_path_factory: pytest.TempPathFactory) -> Any:
    root = tmp_path_factory.mktemp("manifest")
    save(root / "a", SMALL, "tp=2")
    text: str = (root / "a" / MANIFEST).read_text()
    return json.loads(text)


def group(body: Any) -> Any:
    """What the manifest says of a and b: two chunks each."""
    return next(g for g in body["tensors"] if g["dtype"] == "F32")


def numbers(text: str, dtype: str) -> list[int]:
    return np.frombuffer(base64.b64decode(text), dtype).tolist()  # type: ignore[no-any-return]


def moved(body: Any, k: int, by: int) -> None:
    begins = numbers(group(body)["begin"], "<u8")
    begins[k] += by
    group(body)["begin"] = packed(begins, "<u8")


HOSTILE: dict[str, tuple[Callable[[Any], Any], str]] = {
    "no names": (lambda b: b.pop("names"), "malformed: KeyError"),
    "names are a text": (lambda b: b.update(names="abc"), "names are not a list"),
    "a name twice": (lambda b: b.update(names=["a", "a", "c"]), "tensor a is named twice"),
    "a name that is none": (lambda b: b.update(names=["a", 3, "c"]), "'3' is not accepted as a tensor name"),
    "a name with a control character": (lambda b: b.update(names=["a", "b\x1b[2J", "c"]), "not accepted as a tensor name"),
    "a reserved name": (lambda b: b.update(names=["a", "__metadata__", "c"]), "not accepted as a tensor name"),
    "an empty name": (lambda b: b.update(names=["a", "", "c"]), "not accepted as a tensor name"),
    "a name too many": (lambda b: b["names"].append("d"), "here: d is described 0 times"),
    "a name too few": (lambda b: b["names"].pop(), "names none, or more than there are"),
    "a tensor twice": (lambda b: group(b).update(position=packed([0, 0], "<u4")), "a is described 2 times"),
    "a group of none": (lambda b: group(b).update(position=""), "names none"),
    "a position far away": (lambda b: group(b).update(position=packed([0, 1 << 31], "<u4")), "or more than there are"),
    "half a position": (lambda b: group(b).update(position="AAAA"), "position: 3 bytes do not hold whole numbers of 4 bytes"),
    "not base64": (lambda b: group(b).update(begin="!" * 44), "a, begin: not base64"),
    "base64 with a line break": (lambda b: group(b).update(file=group(b)["file"] + "\n"), "a, file: not base64"),
    "base64 that ends early": (lambda b: group(b).update(file=group(b)["file"][:-1]), "a, file: not base64"),
    "a list for base64": (lambda b: group(b).update(file=[0, 1, 0, 1]), "a, file: not base64"),
    "short files": (lambda b: group(b).update(file=packed([0, 1, 0], "<u4")), "a, file: 12 bytes do not hold 4 of 4 bytes"),
    "long files": (lambda b: group(b).update(file=packed([0] * 5, "<u4")), "a, file: 20 bytes do not hold 4 of 4 bytes"),
    "short begins": (lambda b: group(b).update(begin=packed([0], "<u8")), "a, begin: 8 bytes do not hold 4 of 8 bytes"),
    "begins of half the size": (lambda b: group(b).update(begin=packed([0] * 4, "<u4")), "a, begin: 16 bytes do not hold 4"),
    "short checksums": (lambda b: group(b).update(crc32=packed([0] * 3, "<u4")), "a, crc32: 12 bytes do not hold 4 of 4 bytes"),
    "no checksums where some are said": (lambda b: group(b).update(crc32=""), "a, crc32: 0 bytes do not hold 4"),
    "a negative begin": (lambda b: moved(b, 0, 0) or group(b).update(begin=packed([-8, 0, 0, 0], "<i8")), "is not a count"),
    "a negative offset": (lambda b: group(b)["boxes"][0].__setitem__(0, [-1, 0]), "-1 is not a count"),
    "a fraction": (lambda b: group(b)["boxes"][0].__setitem__(1, [3.0, 4]), "3.0 is not a count"),
    "true for a number": (lambda b: group(b)["boxes"][0].__setitem__(1, [True, 4]), "True is not a count"),
    "boxes of one number": (lambda b: group(b).update(boxes=[1, 2]), "malformed"),
    "a box of one dim and two": (lambda b: group(b)["boxes"][0].__setitem__(0, [0]), r"malformed.*a chunk at \[0\] of size \[3, 4\]"),
    "boxes of more dims": (lambda b: group(b)["boxes"].__setitem__(0, [[0, 0, 0], [3, 4, 1]]), r"a \[6, 4\]: a chunk lies outside"),
    "a box too many": (lambda b: group(b)["boxes"].append([[0, 0], [1, 1]]), "2 numbers of checksums for 3 chunks"),
    "blocks of another count": (lambda b: group(b).update(blocks=[1]), "1 numbers of checksums for 2 chunks"),
    "two checksums for one block": (lambda b: group(b).update(blocks=[2, 0]), r"a \[0:3, 0:4\] has 2 checksums for 48 bytes"),
    "a giant number of checksums": (lambda b: group(b).update(blocks=[1 << 61, 1]), "do not hold"),
    "negative blocks": (lambda b: group(b).update(blocks=[-1, 3]), "-1 is not a count"),
    "a giant shape": (lambda b: group(b).update(shape=[1 << 40, 1 << 40]), "is refused"),
    "a shape the boxes leave open": (lambda b: group(b).update(shape=[7, 4]), r"a \[7, 4\]: no chunk covers \[6:7, 0:4\]"),
    "boxes on each other": (lambda b: group(b)["boxes"][1].__setitem__(0, [2, 0]), r"a \[6, 4\]: more than one chunk covers|no chunk"),
    "another dtype": (lambda b: group(b).update(dtype="F64"), "past its end|share bytes|checksums"),
    "a dtype that is none": (lambda b: group(b).update(dtype=["F32"]), "is not one of BOOL"),
    "a kind that is none": (lambda b: group(b).update(kind="modell"), "kind 'modell'"),
    "a kind that cannot be one": (lambda b: group(b).update(kind=["model"]), "malformed: ValueError.*kind"),
    "a file that is not there": (lambda b: group(b).update(file=packed([0, 1, 0, 7], "<u4")), r"b \[3:6, 0:4\] should end .* of file 7"),
    "a chunk past the end": (lambda b: moved(b, 2, 1 << 40), r"b \[0:3, 0:4\] should end at byte \d+ of file 0, past its end"),
    "a chunk at the end of all numbers": (lambda b: moved(b, 2, (1 << 62) - 4096), r"b .* past its end"),
    "shared bytes": (lambda b: moved(b, 2, -8), r"a and b share bytes \d+\.\.\d+ of rank-00000.safetensors"),
    "files larger than all numbers": (lambda b: b["files"][0].__setitem__(1, (1 << 62) - 1), "are refused"),
    "a version of the future": (lambda b: b.update(version=3), "version 3; this release reads meshpar.checkpoint 1 and 2"),
    "a version that is true": (lambda b: b.update(version=True), "version True; this release"),
    "a version that is a list": (lambda b: b.update(version=[2]), r"version \[2\]; this release"),
    "tensors by name": (lambda b: b.update(tensors={"a": group(b)}), "malformed"),
    "a group that is a list": (lambda b: b["tensors"].append([1]), "malformed"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_manifests_are_refused(body: Any, case: str) -> None:
    change, message = HOSTILE[case]
    wrong = json.loads(json.dumps(body))
    assert load_manifest(stamped(wrong), "here").tensors.names == ("a", "b", "c")
    change(wrong)
    with pytest.raises(CorruptError, match=message) as caught:
        load_manifest(stamped(wrong), "here")
    assert str(caught.value).startswith("here")


def leaves(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a JSON value."""
    rows = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path] * bool(path) + [p for k, v in rows for p in leaves(v, (*path, k))]


ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 3),
    st.sampled_from([1 << 31, 1 << 62, 1 << 70, -(1 << 70), 0.5, "", "AAAA", "AAAAAAAAAAA=", "a", [], {}, [[]], [[0, 1]]]),
)


@given(st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_change_is_refused_or_makes_another_sound_manifest(body: Any, data: Any) -> None:
    wrong = json.loads(json.dumps(body))
    for _ in range(data.draw(st.integers(1, 2))):
        *path, last = data.draw(st.sampled_from(leaves(wrong)))
        inner = wrong
        for key in path:
            inner = inner[key]
        inner[last] = data.draw(ODD)
    try:
        found = load_manifest(stamped(wrong), "here")
    except CorruptError:
        return
    assert isinstance(found, Manifest)
    for stored in found.tensors.values():
        for chunk in stored.chunks:
            assert chunk.begin + 8 * len(chunk.box.size) >= 0 and chunk.file < len(found.files)

"""Bits of two tensors, slab by slab: zeros with signs, NaN, dtypes, shapes, parts."""

from __future__ import annotations

import pytest
import torch

from meshpar.init import same
from meshpar.init.same import difference, slabs
from meshpar.init.weights import read

NAN = float("nan")


@pytest.mark.parametrize(
    ("one", "other", "says"),
    [
        (torch.ones(2, 3), torch.ones(2, 3), ""),
        (torch.tensor([1.0, NAN]), torch.tensor([1.0, NAN]), ""),
        (torch.tensor([1.0, NAN]), torch.tensor([1.0, 2.0]), "nan and 2.0 at [1]"),
        (torch.tensor([[0.0, 1.0]]), torch.tensor([[-0.0, 1.0]]), "0.0 and -0.0 at [0, 0]"),
        (torch.tensor(3.0), torch.tensor(4.0), "3.0 and 4.0"),
        (torch.tensor(3.0), torch.tensor(3.0), ""),
        (torch.zeros(0, 4), torch.zeros(0, 4), ""),
        (torch.zeros(2), torch.zeros(3), "shapes [2] and [3]"),
        (torch.zeros(2), torch.zeros(2, dtype=torch.int32), "float32 and int32"),
        (torch.tensor([0.5, 2.0]), torch.tensor([0.5, 2.0]).bfloat16(), ""),
        (torch.tensor([0.1]), torch.tensor([0.1]).bfloat16(), "0.10000000149011612 and 0.10009765625 at [0]"),
        (torch.tensor([0.5]).half(), torch.tensor([0.5]).bfloat16(), ""),
        (torch.tensor([True, False]), torch.tensor([True, True]), "False and True at [1]"),
        (torch.tensor([1 + 2j]), torch.tensor([1 + 2j]), ""),
        (torch.tensor([0j, 1 + 2j]), torch.tensor([0j, 1 + 3j]), "(1+2j) and (1+3j) at [1]"),
        (torch.tensor([0j], dtype=torch.complex128), torch.tensor([1j], dtype=torch.complex128), "0j and 1j at [0]"),
        (torch.tensor([1.0]).to(torch.float8_e4m3fn), torch.tensor([1.0]), "float8_e4m3fn and float32"),
    ],
)
def test_differences(one: torch.Tensor, other: torch.Tensor, says: str) -> None:
    assert difference(one, other) == says


def test_only_the_part_is_looked_at_in_slabs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(same, "SLAB", 64)
    seen = 0

    def counted(value: torch.Tensor, ranges: object) -> torch.Tensor:
        nonlocal seen
        part = read(value, ranges)  # type: ignore[arg-type]
        assert part.nbytes <= 64
        seen += part.nbytes
        return part

    monkeypatch.setattr(same, "read", counted)
    one, other = torch.zeros(40, 6), torch.zeros(40, 6)
    other[33, 5] = 1
    assert difference(one, other) == "0.0 and 1.0 at [33, 5]"
    seen = 0
    assert difference(one, other, [(0, 0, 10), (0, 20, 30)]) == "" and seen == 2 * 20 * 6 * 4
    assert difference(one, other, [(1, 0, 5)]) == ""
    assert difference(one, other, [(0, 30, 40), (1, 4, 6)]) == "0.0 and 1.0 at [33, 5]"
    assert difference(one, other, [(0, 0, 0)]) == ""
    assert [r for part in slabs((), 4, ()) for r in part] == []


def test_what_lies_at_one_place_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(same, "read", lambda *_: pytest.fail("read"))
    one = torch.ones(3, 2)
    assert difference(one, one.view(3, 2)) == ""
    assert difference(torch.ones(3, device="meta"), torch.ones(3, device="meta")) == ""
    with pytest.raises(pytest.fail.Exception):
        difference(one, one.t().reshape(3, 2).clone())

"""The ledger's bytes are the closed forms for tensor and sequence parallelism."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from meshpar.compile.ledger import ledger
from meshpar.plan import Comm
from tests.sharding.models import BATCH, HIDDEN, SEQUENCE, captured, decided, lowered

WIDE = 4
"""Bytes of a float32."""
ACTIVATION = BATCH * SEQUENCE * HIDDEN * WIDE


def _entries(size: int, *, sequence: bool) -> tuple[Comm, ...]:
    return ledger(lowered(captured(), decided(captured(), size, sequence=sequence)))


def _bytes(entries: tuple[Comm, ...], wanted: Callable[[Comm], bool]) -> float:
    return sum(c.nbytes * c.count for c in entries if wanted(c))


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("layer", ["layers.0", "layers.1"])
def test_a_block_under_tensor_parallelism(size: int, layer: str) -> None:
    """8 b s h (t-1)/t elements: two all-reduces forward, two backward."""
    entries = _entries(size, sequence=False)
    assert _bytes(entries, lambda c: c.region == layer) == 8 * ACTIVATION * (size - 1) / size
    assert [c.phase for c in entries if c.region == layer].count("backward") == 2


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("layer", ["layers.0", "layers.1"])
def test_a_block_under_sequence_parallelism(size: int, layer: str) -> None:
    """The same volume as four all-gathers and four reduce-scatters, and the all-reduced gradients of its two norm weights."""
    entries = tuple(c for c in _entries(size, sequence=True) if c.region == layer)
    norms = 2 * (2 * HIDDEN * WIDE * (size - 1) / size)
    assert _bytes(entries, lambda c: c.kind == "all_reduce") == norms
    assert {(c.phase, c.node) for c in entries if c.kind == "all_reduce"} == {("backward", "i_to_r_many")}
    assert _bytes(entries, lambda c: True) - norms == 8 * ACTIVATION * (size - 1) / size
    assert sorted(c.kind for c in entries if c.kind != "all_reduce") == ["all_gather"] * 4 + ["reduce_scatter"] * 4


def test_the_embedding_is_one_all_reduce_of_the_activation() -> None:
    found = [c for c in _entries(2, sequence=False) if c.module == "embed"]
    assert [(c.kind, c.phase, c.nbytes) for c in found] == [("all_reduce", "forward", 2 * ACTIVATION / 2)]


def test_cross_entropy_over_a_cut_vocabulary_is_three_sums_per_token() -> None:
    found = [c for c in _entries(4, sequence=True) if c.node == "cross_entropy"]
    assert {(c.kind, c.phase, c.axis) for c in found} == {("all_reduce", "forward", "tp")}
    assert sum(c.nbytes for c in found) == 3 * (2 * BATCH * SEQUENCE * WIDE * 3 / 4)

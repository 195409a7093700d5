"""A few faults in what runs programs: training shows that they are wrong. `benchmarks/planted_faults/run_beside.py` plants all of them."""

from __future__ import annotations

import pytest

from benchmarks.planted_faults.beside import FAULTS
from benchmarks.planted_faults.run_beside import seen
from tests.pool import Pool

NAMES = [fault.name for fault in FAULTS]


@pytest.mark.sweep(1)
@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("a tied gradient is not added", "gradients"),
        ("a mean over data ranks, not a sum", "gradient norm"),
        ("every other update of a buffer is lost", "buffers"),
    ],
)
def test_a_fault_beside_the_program_is_seen(name: str, told: str, gloo: Pool) -> None:
    found = seen(NAMES.index(name), gloo)
    assert found.caught and told in found.told, found

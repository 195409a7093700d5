"""Mixers written as loops over positions: their matrices are cut as by hand, and what they compute is that of one device."""

from __future__ import annotations

from functools import partial
from math import prod
from typing import Literal

import pytest
import torch

import meshpar as mp
from benchmarks.planted_faults.faults import Fault, keyword, segments
from benchmarks.planted_faults.run import _changed, _read
from meshpar.compile.ledger import entries
from meshpar.compile.program import Program
from meshpar.compile.programs import Programs
from meshpar.dry_run.rehearsal import absent
from meshpar.mesh import typed_axes
from meshpar.plan import Plan
from meshpar.sharding.types import Shard
from tests.recurrences import (
    MIXERS,
    WIDTH,
    Blocks,
    ChannelMix,
    batch,
    cut_pad,
    drawn_forward,
    pad_then_slice,
    written_into_zeros,
    zeros_before,
)
from tests.sharding.models import captured_of, decided


@pytest.fixture(scope="module")
def plan() -> Plan:
    return decided(captured_of(Blocks(*MIXERS), batch()))


def test_matrices_are_cut(plan: Plan) -> None:
    matrices = {name: p for name, p in plan.parameters.items() if len(p.shape) > 1 and min(p.shape) >= WIDTH}
    gate = f"blocks.{MIXERS.index(ChannelMix)}.1.gate.weight"  # (from the stream to the stream, and little of its block)
    assert [name for name, p in matrices.items() if not isinstance(p.placements["tp"], Shard)] == [gate]


def test_what_is_left_whole_is_little(plan: Plan) -> None:
    sizes = {name: prod(p.shape) for name, p in plan.parameters.items() if len(p.shape) > 1}
    whole = sum(n for name, n in sizes.items() if not isinstance(plan.parameters[name].placements["tp"], Shard))
    assert whole <= 0.05 * sum(sizes.values())


@pytest.mark.sweep(1)
@pytest.mark.parametrize(("mesh", "sequence"), [("tp=3", False), ("dp=2,tp=2", True), ("cp=2", "auto")])
def test_same_as_on_one_device(mesh: str, sequence: Literal["auto"] | bool) -> None:
    torch.manual_seed(0)
    config = mp.ParallelConfig(sequence_parallel=sequence)
    mp.verify(Blocks(*MIXERS), mesh, batch(), config=config, steps=1).raise_if_failed()


SHIFTS = (cut_pad, pad_then_slice, zeros_before, written_into_zeros, drawn_forward)


@pytest.fixture(scope="module")
def shifting() -> tuple[Programs, Program]:
    model = Blocks(*(partial(ChannelMix, shift) for shift in SHIFTS))
    with absent("cp=2") as there:
        programs = Programs(model, there, mp.ParallelConfig())
        return programs, programs.make((), batch(), training=True)


@pytest.mark.parametrize("at", range(len(SHIFTS)), ids=[shift.__name__ for shift in SHIFTS])
def test_a_shift_of_positions_fetches_a_halo(shifting: tuple[Programs, Program], at: int) -> None:
    _, program = shifting
    sent = [c for n in program.graph.nodes for c in entries(n) if c.module.startswith(f"blocks.{at}") and c.phase == "forward"]
    assert [c.kind for c in sent] == ["halo"]
    assert program.proof.proved and not program.proof.faults and not program.proof.unproved


@pytest.mark.parametrize("fault", [segments("halo_shifted"), keyword("halo_shifted", "by", 2), keyword("halo_shifted", "dim", 2)])
def test_a_shift_that_is_another_is_found(shifting: tuple[Programs, Program], fault: Fault) -> None:
    programs, program = shifting
    with absent("cp=2") as there:
        programs.mesh = there
        wrong, _, _ = _changed(program, fault, [(a.group, a.size, a.rank) for a in typed_axes(there) if a.size > 1])
        assert _read(programs, wrong).faults


@pytest.mark.parametrize("mesh", ["cp=2,tp=2"])
def test_shifts_are_the_same_as_on_one_device(mesh: str) -> None:
    torch.manual_seed(0)
    mp.verify(Blocks(*(partial(ChannelMix, shift) for shift in SHIFTS)), mesh, batch(), steps=1).raise_if_failed()

"""Mixers written as loops over positions: their matrices are cut as by hand, and what they compute is that of one device."""

from __future__ import annotations

from math import prod
from typing import Literal

import pytest
import torch

import meshpar as mp
from meshpar.plan import Plan
from meshpar.sharding.types import Shard
from tests.recurrences import MIXERS, WIDTH, Blocks, ChannelMix, batch
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


@pytest.mark.parametrize(("mesh", "sequence"), [("tp=2", False), ("tp=3", "auto"), ("dp=2,tp=2", True), ("cp=2", "auto")])
def test_same_as_on_one_device(mesh: str, sequence: Literal["auto"] | bool) -> None:
    torch.manual_seed(0)
    config = mp.ParallelConfig(sequence_parallel=sequence)
    mp.verify(Blocks(*MIXERS), mesh, batch(), config=config, steps=1).raise_if_failed()

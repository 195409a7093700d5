"""Stages that compute the same for the loss alone as for every output are one graph, which a proof reads once."""

from __future__ import annotations

from typing import Any

import pytest
import torch.distributed as dist

import meshpar as mp
from meshpar._torch import FakeStore
from meshpar.compile.programs import Programs
from meshpar.proof.static import check
from tests.models import text, tiny


def test_all_but_the_last_stage_are_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Any] = []
    expanded = check.expanded
    monkeypatch.setattr(check, "expanded", lambda graph: read.append(graph) or expanded(graph))
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    config = mp.ParallelConfig(microbatches=2)
    model = tiny("llama", num_hidden_layers=4)
    program = Programs(model, mp.make_mesh("pp=4"), config).make((), text(), training=True, microbatches=2)
    shared = [a is b for a, b in zip(program.stages, program.all_stages, strict=True)]
    assert shared == [True, True, True, False], "the last one returns logits as well, or the loss alone"
    last = [len(stages[-1].outputs) for stages in (program.stages, program.all_stages)]
    assert last[0] == 1 < last[1]
    graphs = [stage.graph for stage in (*program.all_stages, program.stages[-1])]
    assert [graph for graph in read if graph in graphs] == graphs
    assert not program.proof.unproved and not program.proof.faults

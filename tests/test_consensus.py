"""What ranks must have alike: those that differ are named, on every rank."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from meshpar.consensus import agree, check_batch
from meshpar.errors import BatchError, PlanError
from meshpar.mesh import local_batch, make_mesh


def rank_agrees(values: dict[int, str]) -> str:
    mesh = make_mesh("dp=2,tp=2")
    agree("same", mesh, "the plan")
    try:
        agree(values.get(dist.get_rank(), "same"), mesh, "the plan")
    except PlanError as error:
        return str(error)
    return ""


def rank_checks_batch(which: str) -> str:
    mesh = make_mesh("dp=2,tp=2")
    rank = dist.get_rank()
    check_batch(local_batch({"x": torch.arange(4)}, mesh), mesh)
    batches = {
        "content": torch.arange(4) + (rank == 2),
        "shape": torch.arange(4 + (rank == 1)),
        "dtype": torch.arange(4.0).to([torch.float32, torch.half][rank == 0]),
    }
    try:
        check_batch({"x": batches[which]}, mesh)
    except BatchError as error:
        return str(error)
    return ""


def test_ranks_that_differ_are_named_on_every_rank(gloo: Any) -> None:
    for rank, text in enumerate(gloo.run(rank_agrees, {3: "other"}, world=4)):
        assert text.startswith(f"the plan differs between ranks: rank 3 of 4 differ from the rest. This is rank {rank}; its fingerprint is")
    assert "ranks 0, 1 of 4 differ" in gloo.run(rank_agrees, {0: "a", 1: "b"}, world=4)[2]


def test_batches_that_differ_are_named_on_every_rank(gloo: Any) -> None:
    for text in gloo.run(rank_checks_batch, "content", world=4):
        assert text.startswith("ranks that differ only on tp must be fed the same batch") and text.endswith("rank 3 of ranks 2, 3.")
    assert "the batch of rank 1 has other names, shapes or dtypes" in gloo.run(rank_checks_batch, "shape", world=4)[0]
    text = gloo.run(rank_checks_batch, "dtype", world=4)[0]
    assert "the batch of rank 0 has other" in text and "This is rank 0, which has ['x']: torch.float16 (4,)" in text

"""The switches of overlap: results do not depend on them, and each does what it says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

import meshpar as mp
from meshpar.pipeline.run import _Run
from tests.models import text, tiny
from tests.pool import Pool


def verified(mesh: str, **config: Any) -> tuple[float, list[bool], list[int]]:
    """The largest difference from one device; of every sum of gradients, whether it ran in a backward; messages waited for on arrival."""
    inside, waiting = list[bool](), list[int]()
    real, receive = dist.reduce_scatter_single, _Run._receive

    def watched(*args: Any, **kwargs: Any) -> Any:
        inside.append(torch._C._current_graph_task_id() != -1)
        return real(*args, **kwargs)

    def received(run: _Run, *args: Any) -> None:
        receive(run, *args)
        waiting.append(len(run.waiting))

    dist.reduce_scatter_single, _Run._receive = watched, received  # type: ignore[method-assign]
    try:
        found = mp.verify(tiny("llama"), mp.make_mesh(mesh), text(), config=mp.ParallelConfig(**config))
    finally:
        dist.reduce_scatter_single, _Run._receive = real, receive  # type: ignore[method-assign]
    return max(d.largest for d in found.differences), inside, waiting


@pytest.mark.sweep(1)
@pytest.mark.parametrize("mode", ["zero1", "zero3"])
@pytest.mark.parametrize("overlap", [True, False])
def test_gradients_are_summed_beside_backward_or_after_it(gloo: Pool, mode: str, overlap: bool) -> None:
    for worst, inside, _ in gloo.run(
        verified, "dp=2", world=2, timeout=180.0, data_parallel=mode, microbatches=2, overlap_grad_reduce=overlap
    ):
        assert worst < 1e-9
        assert inside and set(inside) == {overlap}


@pytest.mark.sweep(1)
@pytest.mark.parametrize("overlap", [True, False])
def test_messages_arrive_beside_computation_or_before_it(gloo: Pool, overlap: bool) -> None:
    for worst, _, waiting in gloo.run(verified, "pp=2", world=2, timeout=180.0, microbatches=4, overlap_p2p=overlap):
        assert worst < 1e-9
        assert waiting and any(waiting) == overlap

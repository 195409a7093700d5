"""One operator with other arguments on every simulated rank, and its gradients."""

from __future__ import annotations

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh

from meshpar.config import ParallelConfig
from meshpar.ops.each_rank import each_rank
from meshpar.proof.verify import verify
from meshpar.simulate import local_tensors, per_rank, simulate
from tests.models import plain

aten = torch.ops.aten


def test_results_and_gradients_are_those_of_every_rank() -> None:
    with simulate(3):
        group = init_device_mesh("cpu", (3,), mesh_dim_names=("tp",)).get_group("tp").group_name
        x = per_rank(lambda rank: torch.arange(2.0 * (5 - rank)).reshape(2, -1)).requires_grad_()
        w = torch.ones(2, 1, requires_grad=True)
        calls = [((x, [2, 3 - rank], 1), {}) for rank in range(3)]
        a, b = each_rank(aten.split_with_sizes.default, *calls, group=group)
        y = each_rank(aten.mul.Tensor, *[((b, w), {})] * 3, group=group)
        assert [tuple(t.shape) for t in local_tensors(y).values()] == [(2, 3), (2, 2), (2, 1)]
        (a.sum() + 2 * y.sum()).backward()
        assert x.grad is not None and w.grad is not None
        for rank, grad in local_tensors(x.grad).items():
            assert grad.tolist() == [[1, 1] + [2] * (3 - rank)] * 2
        for rank, grad in local_tensors(w.grad).items():
            part = torch.arange(2.0 * (5 - rank)).reshape(2, -1)[:, 2:]
            torch.testing.assert_close(grad, 2 * part.sum(1, keepdim=True))


def test_results_that_need_no_gradient_get_none() -> None:
    """Zeros like a value that needs one, beside that value: autograd hands them a gradient unless it is told."""
    with simulate(2):
        group = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",)).get_group("tp").group_name
        x = per_rank(lambda rank: torch.ones(3 + rank)).requires_grad_()
        zeros = each_rank(aten.zeros_like.default, *[((x,), {})] * 2, group=group)
        assert not zeros.requires_grad
        (zeros + 2 * x).sum().backward()
        assert [g.sum().item() for g in local_tensors(x.grad).values()] == [6.0, 8.0]  # type: ignore[arg-type]


def test_a_result_nobody_uses_has_no_gradient() -> None:
    with simulate(2):
        group = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",)).get_group("tp").group_name
        x = per_rank(lambda rank: torch.ones(3 + rank)).requires_grad_()
        values, places = each_rank(aten.topk.default, *[((x, 1), {})] * 2, group=group)
        assert values.requires_grad and not places.requires_grad
        values.sum().backward()
        assert [g.sum().item() for g in local_tensors(x.grad).values()] == [1.0, 1.0]  # type: ignore[arg-type]


@pytest.mark.sweep(1)
@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_uneven_parts_are_recomputed(recompute: str) -> None:
    """The derivative on each rank must not ask for all ranks to compute the block again."""
    model, batch = plain("gpt")
    config = ParallelConfig(recompute=recompute)  # type: ignore[arg-type]
    batch = {name: value[:, :11].contiguous() for name, value in batch.items()}  # 4 + 4 + 3
    verify(model, "tp=3", batch, config=config).raise_if_failed()
